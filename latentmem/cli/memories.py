"""Writing and asking: write, ask, chat, list, show, rm; and `doctor`, which says whether memory is alive."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentmem.cli import base, inputs, options, printing
from latentmem.cli.base import Device, Json, ModelName, Name, NewTokens, OwnAdapters, Quantize, Version, app
from latentmem.model.prompts import Write

if TYPE_CHECKING:
    from latentmem.model.chat import Conversation
    from latentmem.store import Account, Store

PANEL = "Memories"
LIKE_A_PATH = re.compile(r"^(/|~|\.\.?/|\w+://)|\.[A-Za-z]\w{0,4}$")
SENTENCE = re.compile(r"\w[.!?]+[\"')\]]*$")  # the end of one
FILE_NAME = re.compile(r"[\w./\\~*@+%#()\[\]-]+")  # with what a shell leaves of a pattern that fits no file


@app.command(rich_help_panel=PANEL)
@options.of_a_new_memory
def write(
    texts: inputs.Texts,
    memory: Name = "default",
    role: Annotated[
        str | None, typer.Option(help="raw, system, user or assistant; by default what the model was measured with.")
    ] = None,
    *,
    chosen: options.Values,
    key: Annotated[
        str | None, typer.Option(help="Idempotency key: the same command with the same key writes once.")
    ] = None,
    encoding: inputs.Encoding = None,
    quantize: Quantize = None,
    model: ModelName = None,
    adapters: OwnAdapters = None,
    device: Device = None,
) -> None:
    """Write texts into a memory; it is made if it does not exist."""
    sources, store = _texts_of(texts, encoding), base.opened(memory)
    before = _checked(store, memory, role, chosen)
    llm = base.load(before, model, device, quantize, adapters)
    start = store.latest(memory)[1] if before is not None else llm.empty(settings=options.settings_from(chosen))
    llm.check(start)
    counts = [len(llm.tokens(text, role)) for _, text in sources]
    if before is None and (there := base.begin(store, memory, start)) is not None:
        options.require_same(memory, there.settings, chosen)
    base.finish(store, memory, llm)
    start = store.open(memory)
    with printing.progress() as bar:
        task = bar.add_task("writing", total=sum(counts))
        for i, (name, text) in enumerate(sources):
            show = printing.tokens(bar, "writing", sum(counts), sum(counts[:i]), task)
            own_key = key if key is None or len(sources) == 1 else f"{key} {i + 1}"
            version = store.write(llm, memory, text, name, role=role, key=own_key, progress=show)
    for (name, _), count in zip(sources, counts, strict=True):
        typer.echo(f"{name}: {count} tokens")
    now = store.account(memory)
    typer.echo(f"{memory}, version {version}: {printing.state(now)}{printing.forgetting(now)}")
    printing.losses(memory, start, store.open(memory))


def _checked(store: Store, memory: str, role: str | None, chosen: options.Values) -> Account | None:
    """What the memory holds already, if there is one; refuses what can be refused before a model is loaded."""
    from latentmem.model.prompts import check_role

    check_role(role)
    options.settings_from(chosen)
    before = base.applied(store, memory)
    if before is not None:
        options.require_same(memory, before.settings, chosen)
    return before


@app.command(rich_help_panel=PANEL)
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    memory: Name = "default",
    version: Version = None,
    sources: Annotated[
        bool, typer.Option("--sources", help="Print which sources and sentences the answer drew on.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Answer without the memory, too.")] = False,
    max_new_tokens: NewTokens = 128,
    model: ModelName = None,
    adapters: OwnAdapters = None,
    device: Device = None,
) -> None:
    """Ask a memory; the answer is printed as it is made. An empty memory answers nothing."""
    from latentmem.model.prompts import check_question

    check_question(question)
    store = base.opened(memory)
    now, llm = base.read(store, memory, model, device, version, adapters)
    pieces = () if now.is_empty else llm.stream(now, question, max_new_tokens=max_new_tokens)
    if now.is_empty:
        printing.nothing_known(memory)
    if compare:
        typer.echo("with memory:    ", nl=False)
    answer = _print_answer(pieces) if compare or not now.is_empty else ""
    if compare:
        typer.echo("without memory: ", nl=False)
        _print_answer(llm.stream(llm.blank(), question, max_new_tokens=max_new_tokens))
    if sources and answer:
        printing.show_drawn_on(llm.drawn_on(now, question, answer), store.stats(memory, version=version))


@app.command(rich_help_panel=PANEL)
def chat(
    memory: Name = "default",
    write: Annotated[Write, typer.Option(help="Whose words are written: yours, also the model's, or none.")] = "user",
    window: Annotated[
        int | None, typer.Option(min=0, help="Tokens of earlier turns in the context; by default what suits the model.")
    ] = None,
    max_new_tokens: NewTokens = 128,
    quantize: Quantize = None,
    model: ModelName = None,
    adapters: OwnAdapters = None,
    device: Device = None,
) -> None:
    """Chat with a memory. What you say is written into it at once, each turn under a name of its own (end: Ctrl-D)."""
    from latentmem.errors import NotFoundError

    store, lines = base.opened(memory), _typed_lines()
    before = base.applied(store, memory)
    if before is None and write == "none":
        raise NotFoundError.memory(memory, store.names())
    llm = base.load(before, model, device, quantize, adapters)
    if before is None:  # the memory is made when there is something to remember
        first = next(lines, None)
        if first is None:
            typer.echo("(nothing to write)", err=True)
            return
        lines = itertools.chain([first], lines)
        base.begin(store, memory, llm.empty())
    base.finish(store, memory, llm)
    from latentmem.model.chat import Conversation  # torch, which no refusal waits for
    from latentmem.store import Turns

    start = store.open(memory)
    conversation = Conversation(llm, start, write=write, window=window, journal=Turns(store, memory))
    _converse(conversation, lines, max_new_tokens)
    if sys.stdin.isatty():
        typer.echo()
    printing.said(memory, conversation.sources)
    printing.losses(memory, start, store.open(memory))


def _converse(conversation: Conversation, lines: Iterable[str], max_new_tokens: int) -> None:
    """Answer each line; all that was said is in the memory afterwards."""
    for line in lines:
        try:
            _print_answer(conversation.stream(line, max_new_tokens=max_new_tokens))
        except ValueError as error:
            printing.error(str(error))
        except KeyboardInterrupt:
            typer.echo(" (stopped)")
    conversation.close()


@app.command("list", rich_help_panel=PANEL)
def list_(json_: Json = False) -> None:
    """List all memories, their bytes, and the bytes that `latentmem prune --keep 1` would free."""
    from latentmem.store.home import opened

    right = ("fill", "versions", "on disk", "prunable")
    table = printing.table("memory", "fill", "versions", "changed", "on disk", "prunable", "form", "model", right=right)
    overviews = opened().overview()
    if json_:
        typer.echo(json.dumps([asdict(one) | {"changed": one.changed.isoformat()} for one in overviews]))
        return
    for one in overviews:
        versions = f"{one.versions}, {one.pending} to be applied" if one.pending else str(one.versions)
        changed = f"{one.changed:%Y-%m-%d %H:%M}"
        fill = f"{one.M} of {one.N}" if one.N else ""
        sizes = printing.size(one.bytes), printing.size(one.prunable) if one.prunable else ""
        table.add_row(one.name, fill, versions, changed, *sizes, one.form or "", printing.text(one.model))
    if not overviews:
        typer.echo("No memories yet. `latentmem write notes.txt --memory work` makes one.")
        return
    printing.show(table)
    if prunable := sum(one.prunable for one in overviews):
        typer.echo(f"Pruning to the newest versions would free about {printing.size(prunable)}:")
        typer.echo("`latentmem prune --keep 1 --memory NAME`.")


@app.command(rich_help_panel=PANEL)
def show(
    memory: Name = "default",
    version: Version = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show what is left of each source in each layer.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Print the text that layer 0 still holds.")] = False,
    json_: Json = False,
    model: ModelName = None,
) -> None:
    """Show how full a memory is, its half-life, and how much of each source is left and will be."""
    store = base.settled(memory, model)
    now = store.account(memory, version)
    store.check_objects(memory, version)
    stats = store.stats_of(memory, now)
    number = store.history(memory)[-1].version if version is None else version
    (disk,) = store.overview([memory])
    if json_:
        about = {"memory": memory, "version": number, "bytes": disk.bytes, "prunable": disk.prunable}
        typer.echo(json.dumps(about | printing.facts_of(now, stats)))
    elif text:
        printing.show_text(store.open(memory, version), base.load(now, model, "cpu"))
    else:
        printing.show_facts(f"{memory}, version {number}", now, disk)
        if layers:
            printing.show_layers(now)
        else:
            printing.show_sources(stats, now)


@app.command(rich_help_panel=PANEL)
def rm(memory: Annotated[str, typer.Option("--memory", "-m", help="Name of the memory.")]) -> None:
    """Delete a memory for good, with all its versions."""
    base.opened(memory).delete(memory)
    typer.echo(f"{memory}: deleted")


def _print_answer(parts: Iterable[str]) -> str:
    """Print an answer as it comes, without blanks around it, and return it."""
    answer = ""
    for part in parts:
        part = part if answer else part.lstrip()
        answer += part
        typer.echo(part, nl=False)
        sys.stdout.flush()
    typer.echo()
    return answer.strip()


@app.command(rich_help_panel=PANEL)
def doctor(
    memory: Annotated[str | None, typer.Option("--memory", "-m", help="Examine this memory as well.")] = None,
    question: Annotated[str | None, typer.Option(help="With --memory: the question that the memory gets.")] = None,
    model: Annotated[
        str | None, typer.Option(help="As for `ask`; without --memory smollm2-135m.", show_default="what wrote it")
    ] = None,
    device: Device = None,
) -> None:
    """Is memory alive? Print answers with the real memory, a zeroed one and another's; exit code 1 if it is dead."""
    if (memory is None) != (question is None):
        raise ValueError("--memory and --question go together: name the memory and what to ask it.")
    opened = None
    if memory is None:
        llm = base.load(None, model, device)
    else:
        opened, llm = base.read(base.opened(memory), memory, model, device)
    from latentmem.evaluate.protocols import doctor as examination

    typer.echo(f"model: {llm.name}, {str(llm.decoder.dtype)[6:]} on {llm.decoder.device.type}, {_versions()}")
    difference = examination.law(llm)
    if difference is not None:
        typer.echo(f"memory against the same text in the context: largest logit difference {difference:.1e}")
    with printing.progress("questions") as progress:
        planted = examination.planted(llm)
        cases = list(progress.track(planted, total=len(examination.THINGS), description="asking"))
    printing.show(_side_by_side(cases))
    if opened is not None and question is not None:
        other = llm.write(llm.empty(), examination.fact(0), source="doctor")
        printing.show(_side_by_side([examination.ask(llm, opened, other, question)]))
    alive = examination.alive(cases)
    hits = {row: sum(case.hits(row) for case in cases) for row in examination.ROWS}
    typer.echo("right answers: " + ", ".join(f"{row} {count} of {len(cases)}" for row, count in hits.items()))
    typer.echo("The memory is alive." if alive else "The memory is DEAD: what is written makes no difference.")
    raise typer.Exit(0 if alive else 1)


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


# --- what commands take in --------------------------------------------------------------------------------------------


def _texts_of(arguments: list[str], encoding: str | None = None) -> list[tuple[str, str]]:
    """The arguments of `write` -> (source, text) each; files of one name in different folders keep their paths."""
    pairs: list[tuple[str, str, str]] = []
    for one in arguments:
        from_files = inputs.from_files(one, encoding)
        pairs += [(one, *_read(one))] if from_files is None else from_files
    paths: dict[str, set[str]] = {}
    for argument, name, _ in pairs:
        paths.setdefault(name, set()).add(argument)
    keep_names = {name for name in paths if len(paths[name]) == 1} | {"text", "standard input"}
    return [(name if name in keep_names else argument, text) for argument, name, text in pairs]


def _read(argument: str) -> tuple[str, str]:
    """An argument of `write` that names no file -> (source, text), if it is a sentence."""
    if not argument.strip():
        raise ValueError("the text to be written is empty; give a file, a text in quotes, or - for standard input.")
    if not _is_text(argument):
        raise ValueError(
            f"there is no file {argument!r}. (One word is taken for a text if it ends like a sentence, or can be no "
            f"file's name; any text can be piped: give - for standard input.)"
        )
    return "text", argument


def _is_text(argument: str) -> bool:
    """Whether an argument that names no file is meant as a text: not every language puts spaces between words."""
    if LIKE_A_PATH.search(argument):
        return False
    several = len(argument.split()) > 1
    return several or not argument.isascii() or bool(SENTENCE.search(argument)) or not FILE_NAME.fullmatch(argument)


def _typed_lines() -> Iterator[str]:
    """What a person types, until they leave."""
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/exit", "/quit"):
            return
        if line:
            yield line
