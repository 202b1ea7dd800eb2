"""Writing and asking: write, ask, chat, list, show, rm, doctor."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentmem.cli import base, options
from latentmem.cli.base import Device, Json, ModelName, Name, NewTokens, OwnAdapters, Quantize, Version, app

if TYPE_CHECKING:
    from latentmem.core.memory import Memory
    from latentmem.longterm.longterm import LongTerm
    from latentmem.model.model import MemoryModel
    from latentmem.store import SourceStats

PANEL = "Memories"


@app.command(rich_help_panel=PANEL)
@options.of_a_new_memory
def write(
    texts: Annotated[list[str], typer.Argument(help="Files, a text in quotes, or - for standard input.")],
    memory: Name = "default",
    role: Annotated[
        str | None, typer.Option(help="How it is wrapped: raw, system, user or assistant; by default as measured.")
    ] = None,
    *,
    chosen: options.Values,
    key: Annotated[
        str | None, typer.Option(help="Written once, however often the same command is given with this key.")
    ] = None,
    quantize: Quantize = None,
    model: ModelName = None,
    adapters: OwnAdapters = None,
    device: Device = None,
) -> None:
    """Write texts into a memory; it is made if it does not exist."""
    sources = _read_all(texts)
    store = base.opened(memory)
    before = store.open(memory, store.applied_version(memory)) if memory in store.names() else None
    if before is not None:
        options.require_same(memory, before.settings, chosen)
    llm = base.load(before, model, device, quantize, adapters)
    start = before if before is not None else llm.empty(settings=options.settings_from(chosen))
    llm.check(start)
    prompts = llm.prompts_or_raise()
    counts = [len(prompts.written(text, role)) for _, text in sources]
    if before is None:
        store.create(memory, start)
    base.finish(store, memory, llm)
    with base.progress() as bar:
        task = bar.add_task("writing", total=sum(counts))
        for i, (name, text) in enumerate(sources):
            tell = base.tokens(bar, "writing", sum(counts), sum(counts[:i]), task)
            once = key if key is None or len(sources) == 1 else f"{key} {i + 1}"
            version = store.write(llm, memory, text, name, role=role, key=once, progress=tell)
    for (name, _), count in zip(sources, counts, strict=True):
        typer.echo(f"{name}: {count} tokens")
    now = store.open(memory)
    typer.echo(f"{memory}, version {version}: {base.state(now)}{_forgetting(now)}")


@app.command(rich_help_panel=PANEL)
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    memory: Name = "default",
    version: Version = None,
    sources: Annotated[
        bool, typer.Option("--sources", help="Say afterwards which sources the answer drew on, and what is left.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Answer without the memory as well.")] = False,
    max_new_tokens: NewTokens = 128,
    model: ModelName = None,
    adapters: OwnAdapters = None,
    device: Device = None,
) -> None:
    """Ask a memory; the answer comes as it is made."""
    store = base.opened(memory)
    now, llm = base.read(store, memory, model, device, version, adapters)
    if compare:
        typer.echo("with memory:    ", nl=False)
    answer = _speak(llm.stream(now, question, max_new_tokens=max_new_tokens))
    if compare:
        typer.echo("without memory: ", nl=False)
        _speak(llm.stream(llm.blank(), question, max_new_tokens=max_new_tokens))
    if sources and answer:
        _show_drawn_on(llm.sources_of(now, question, answer), store.stats(memory, version=version))


@app.command(rich_help_panel=PANEL)
def chat(
    memory: Name = "default",
    max_new_tokens: NewTokens = 256,
    quantize: Quantize = None,
    model: ModelName = None,
    adapters: OwnAdapters = None,
    device: Device = None,
) -> None:
    """Talk with a memory; what leaves the conversation is written into it, the rest at the end (Ctrl-D or /exit)."""
    from latentmem.model.chat import Conversation
    from latentmem.store import Turns

    store, lines = base.opened(memory), _lines()
    before = store.open(memory, store.applied_version(memory)) if memory in store.names() else None
    llm = base.load(before, model, device, quantize, adapters)
    if before is None:  # it is made when there is something to remember
        first = next(lines, None)
        if first is None:
            typer.echo("(nothing to write)", err=True)
            return
        lines = itertools.chain([first], lines)
        store.create(memory, llm.empty())
    with Turns(store, memory) as turns:
        base.finish(store, memory, llm)
        talk = Conversation(llm, store.open(memory), turns.pending(), journal=turns)
        if talk.messages:
            typer.echo(f"(going on with {len(talk.messages)} turns of a chat that was cut off)", err=True)
        for line in lines:
            try:
                _speak(talk.stream(line, max_new_tokens=max_new_tokens))
            except ValueError as error:
                base.error(str(error))
            except KeyboardInterrupt:
                typer.echo(" (stopped)")
        count = len(talk.messages)
        talk.close()
    if sys.stdin.isatty():
        typer.echo()
    typer.echo(f"(wrote {count} turns into the memory {memory!r})" if count else "(nothing to write)", err=True)


@app.command("list", rich_help_panel=PANEL)
def list_() -> None:
    """List all memories."""
    from latentmem.store.home import opened

    right = ("fill", "versions", "on disk")
    table = base.table("memory", "fill", "versions", "changed", "on disk", "model", right=right)
    for one in opened().overview():
        versions = f"{one.versions}, {one.pending} to be applied" if one.pending else str(one.versions)
        when = f"{one.changed:%Y-%m-%d %H:%M}"
        fill = f"{one.M} of {one.N}" if one.N else ""
        table.add_row(one.name, fill, versions, when, base.size(one.bytes), base.text(one.model))
    if not table.rows:
        typer.echo("No memories yet. `latentmem write notes.txt --memory work` makes one.")
        return
    base.show(table)


@app.command(rich_help_panel=PANEL)
def show(
    memory: Name = "default",
    version: Version = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show what is left of each source in each layer.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Print the text that layer 0 still holds.")] = False,
    json_: Json = False,
    model: ModelName = None,
) -> None:
    """Show what a memory holds: fill, half-life, and of each source what is left and will be."""
    store = base.settled(memory, model)
    now, known = store.open(memory, version), store.stats(memory, version=version)
    number = store.history(memory)[-1].version if version is None else version
    if json_:
        facts: dict[str, Any] = {key: getattr(now, key) for key in _SHOWN}
        facts |= {"memory": memory, "version": number, "half_life": now.half_life}
        if (longterm := _longterm(now)) is not None:
            facts["longterm"] = asdict(longterm.settings) | {"S": longterm.S, "bytes": longterm.nbytes}
        facts["sources"] = [
            {
                **{key: getattr(source, key) for key in ("tokens", "slots", "stored", "pinned", "forecast")},
                "name": source.source,
                "left": left.tolist(),
                "expires": source.expires.isoformat() if source.expires else None,
            }
            for source, left in zip(known, now.slots_left(), strict=True)
        ]
        typer.echo(json.dumps(facts))
        return
    if text:
        _show_text(now, base.load(now, model, "cpu"))
        return
    _show_facts(f"{memory}, version {number}", now)
    if layers:
        _show_layers(now)
    else:
        _show_sources(known, now)


@app.command(rich_help_panel=PANEL)
def rm(memory: Annotated[str, typer.Option("--memory", "-m", help="Name of the memory.")]) -> None:
    """Delete a memory for good, with all its versions and the turns of its chat."""
    base.opened(memory).delete(memory)
    typer.echo(f"{memory}: deleted")


@app.command(rich_help_panel=PANEL)
def doctor(
    memory: Annotated[str | None, typer.Option("--memory", "-m", help="Look at this memory too.")] = None,
    question: Annotated[str | None, typer.Option(help="With --memory: what to ask it.")] = None,
    model: Annotated[
        str | None, typer.Option(help="As for `ask`; without --memory smollm2-135m.", show_default="what wrote it")
    ] = None,
    device: Device = None,
) -> None:
    """Is memory alive? Answers with the real memory, a zeroed one and another's, side by side; exit code 1 if not."""
    from latentmem.evaluate.protocols import doctor as examine

    if (memory is None) != (question is None):
        raise ValueError("--memory and --question go together: name the memory and what to ask it.")
    now = None
    if memory is None:
        llm = base.load(None, model, device)
    else:
        now, llm = base.read(base.opened(memory), memory, model, device)
    typer.echo(f"model: {llm.name}, {str(llm.decoder.dtype)[6:]} on {llm.decoder.device.type}, {_versions()}")
    difference = examine.law(llm)
    if difference is not None:
        typer.echo(f"memory against the same text in the context: largest logit difference {difference:.1e}")
    with base.progress("questions") as progress:
        cases = list(progress.track(examine.planted(llm), total=len(examine.THINGS), description="asking"))
    base.show(_side_by_side(cases))
    if now is not None and question is not None:
        other = llm.write(llm.empty(), examine.fact(0), source="doctor")
        base.show(_side_by_side([examine.ask(llm, now, other, question)]))
    alive = examine.alive(cases)
    hits = {row: sum(case.hits(row) for case in cases) for row in examine.ROWS}
    typer.echo("right answers: " + ", ".join(f"{row} {count} of {len(cases)}" for row, count in hits.items()))
    typer.echo("The memory is alive." if alive else "The memory is DEAD: what is written makes no difference.")
    raise typer.Exit(0 if alive else 1)


# --- what is written --------------------------------------------------------------------------------------------------

_LIKE_A_PATH = re.compile(r"^(/|~|\.\.?/)|\.[A-Za-z]\w{0,4}$")


def _read_all(texts: list[str]) -> list[tuple[str, str]]:
    """The arguments of `write` -> (source, text) each; files of one name in different folders keep their paths."""
    read = [(given, *_read(given)) for given in texts]
    twice = {name for _, name, _ in read if len({given for given, other, _ in read if other == name}) > 1}
    return [
        (given if name in twice and name not in ("text", "standard input") else name, text)
        for given, name, text in read
    ]


def _read(text: str) -> tuple[str, str]:
    """An argument of `write` -> (source, text): standard input, a file, or the argument itself if it is a sentence."""
    if text == "-":
        return "standard input", _decoded("standard input", sys.stdin.buffer.read())
    path = Path(text)
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError:  # too long for a path: it is a text
        exists = is_folder = False
    if is_folder:
        raise ValueError(f"{text} is a folder; name its files, for example {text.rstrip('/')}/*.txt.")
    if exists:
        try:
            return path.name, _decoded(text, path.read_bytes())
        except OSError as error:
            raise ValueError(f"{text} can not be read: {error.strerror}.") from None
    if not text.strip():
        raise ValueError("the text to be written is empty; give a file, a text in quotes, or - for standard input.")
    if len(text.split()) == 1 or _LIKE_A_PATH.search(text):
        raise ValueError(
            f"there is no file {text!r}. (A text in quotes has at least two words and does not look like a path; "
            f"any text can be piped: give - for standard input.)"
        )
    return "text", text


def _decoded(name: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{name} is not UTF-8 text; turn it into plain text first.")
    if not text.strip():
        raise ValueError(f"{name} is empty: there is nothing to write.")
    return text


def _lines() -> Iterator[str]:
    """What a person says, until they leave."""
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/exit", "/quit"):
            return
        if line:
            yield line


# --- what is printed --------------------------------------------------------------------------------------------------

_SHOWN = (
    *("N", "K", "M", "L", "d", "preset", "compression", "choice", "seed", "updates", "tokens", "quota"),
    *("model_name", "model", "adapters"),
)


def _longterm(memory: Memory) -> LongTerm | None:
    from latentmem import longterm

    return longterm.of(memory)


def _speak(parts: Any) -> str:
    """Print an answer as it comes, without blanks around it, and return it."""
    said = ""
    for part in parts:
        part = part if said else part.lstrip()
        said += part
        typer.echo(part, nl=False)
        sys.stdout.flush()
    typer.echo()
    return said.strip()


def _forgetting(memory: Memory) -> str:
    if (longterm := _longterm(memory)) is not None and longterm.S:
        return f", and {longterm.S} that were dropped in its long-term part"
    if memory.M < memory.N:
        return f", forgets nothing until {memory.N - memory.M} more slots are filled"
    return f", full: half of what is in it is left after {memory.half_life:.1f} more updates"


def _show_facts(title: str, memory: Memory) -> None:
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    facts.add_row("memory", title)
    facts.add_row("fill", f"{memory.M} of {memory.N} slots in each of {memory.L} layers ({memory.M / memory.N:.0%})")
    facts.add_row("written", f"{memory.updates} updates, {memory.tokens} tokens, at most {memory.K} slots per update")
    facts.add_row(
        "half-life", f"{memory.half_life:.1f} updates of {memory.K} slots once it is full" if memory.half_life else "0"
    )
    if (store := _longterm(memory)) is not None:
        held = (
            f"{int(store.occupied.sum(1).min())} slots in each layer, {base.size(store.nbytes)}" if store.S else "empty"
        )
        takes = f"{held}; a question takes {store.settings.R} of them at most"
        facts.add_row(
            "long-term", takes if store.settings.keep else "no store; a question arranges the memory's own slots"
        )
    per_slot = f"{memory.compression} token(s) per slot" + f" ({memory.choice})" * (memory.compression > 1)
    facts.add_row("kind", f"{memory.preset}, {per_slot}, seed {memory.seed}")
    facts.add_row("model", base.text(f"{memory.model_name} {memory.model[:12]}"))
    facts.add_row("bytes", f"{base.size(memory.slots.nbytes)} in {str(memory.slots.dtype)[6:]}")
    base.show(facts)


def _show_sources(known: list[SourceStats], memory: Memory) -> None:
    ahead = [f"+{t}" for t in known[0].forecast] if known else []
    more = ["long-term"] if memory.longterm is not None else []
    numbers = ("tokens", "slots", "left", *more, *ahead)
    table = base.table("source", *numbers, "", right=numbers)
    for source in known:
        until = f"until {source.expires:%Y-%m-%d %H:%M}" if source.expires else ""
        stored = [source.stored] if more else []
        shares = [f"{share:.0%}" for share in (source.share_left, *stored, *source.forecast.values())]
        kept = ", ".join(filter(None, ["pinned" if source.pinned else "", until]))
        table.add_row(base.text(source.source), str(source.tokens), str(source.slots), *shares, kept)
    older = (memory.origins < 0).sum(1)
    if older.any():
        table.add_row("(older)", "", f"{older.float().mean():.0f}")
    if table.rows:
        base.show(table)
    if known:
        typer.echo(f"(left now, and as expected after so many more updates: {', '.join(ahead)})")


def _show_layers(memory: Memory) -> None:
    table = base.table("source", "slots", "left", "each layer, first to last", right=("slots", "left"))
    for source, left in zip(memory.sources, memory.slots_left(), strict=True):
        share, low, high = left.float() / source.slots, int(left.min()), int(left.max())
        amount = f"{share.mean():.0%} ({low})" if low == high else f"{share.mean():.0%} ({low} to {high})"
        table.add_row(base.text(source.name), str(source.slots), amount, _bars(share.tolist()))
    older = (memory.origins < 0).sum(1)
    if int(older.sum()):
        table.add_row("(older)", "", f"({int(older.min())} to {int(older.max())})", "")
    if table.rows:
        base.show(table)


def _show_drawn_on(shares: dict[str, float], known: list[SourceStats]) -> None:
    """Where an answer came from, the largest share first."""
    if not shares:
        typer.echo("(the memory is empty)")
        return
    stats = {source.source: source for source in known}
    ahead = [f"+{t}" for t in known[0].forecast] if known else []
    more = ["long-term"] if any(source.stored for source in known) else []
    columns = ("share", "left", *more, *ahead)
    table = base.table("drew on", *columns, right=columns)
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        one = stats.get(name)
        left = [one.share_left, *([one.stored] if more else []), *one.forecast.values()] if one is not None else []
        table.add_row(base.text(name or "(older)"), f"{share:.0%}", *(f"{part:.0%}" for part in left))
    base.show(table)
    typer.echo("(share: of the attention to the memory, over all layers and tokens of the answer;")
    typer.echo(" left: now, and as expected after so many more updates)")


def _bars(shares: list[float]) -> str:
    """One character per layer: the share that is left, from ▁ (none) to █ (all)."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(share * 7.999))] for share in shares)


def _show_text(memory: Memory, llm: MemoryModel) -> None:
    if not memory.rules.holds_inputs:
        raise ValueError("only memories of the preset 'exact' hold embeddings in layer 0; this one can not be printed.")
    ids, origins = llm.text_of(memory), memory.origins[0]
    edges = [0, *((origins.diff() != 0).nonzero().flatten() + 1).tolist(), memory.M]
    for start, end in itertools.pairwise(edges):
        if start < end:
            source = memory.sources[int(origins[start])].name if origins[start] >= 0 else "(older)"
            typer.echo(f"--- {source}: {end - start} slots of layer 0")
            typer.echo(llm.tokenizer.decode([int(i) for i in ids[start:end] if i >= 0]))


def _side_by_side(cases: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    from latentmem.evaluate.protocols.doctor import ROWS

    table = Table(show_lines=True)
    for column in ("question", *ROWS):
        table.add_column(column, ratio=1)
    for case in cases:
        cells = []
        for row in ROWS:
            score = f"\n(log p {case.logprobs[row]:.2f})" if case.logprobs else ""
            cells.append(Text(("✓ " if case.gold and case.hits(row) else "") + case.answers[row] + score))
        table.add_row(Text(case.question + (f"\n({case.gold})" if case.gold else "")), *cells)
    return table


def _versions() -> str:
    import torch
    import transformers

    import latentmem

    return f"latentmem {latentmem.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
