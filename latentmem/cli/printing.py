"""What commands print: bars of progress, errors, facts of a memory, and tables of its sources."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from latentmem.core.memory import Memory
    from latentmem.model.model import MemoryModel
    from latentmem.model.provenance import DrawnOn
    from latentmem.model.writing import Progress
    from latentmem.store import Account, Overview, SourceStats


def progress(unit: str = "tokens", seconds: float = 30) -> Any:
    """A bar with the time left, estimated from the speed of the last seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=seconds)


def tokens(bar: Any, description: str, total: int | None = None, before: int = 0, task: Any = None) -> Progress:
    """A callable that shows (tokens done, tokens in all) in a bar.

    One of several texts has their `total` of tokens, those of the texts `before`, and the bar's `task`.
    """
    task = bar.add_task(description, total=total) if task is None else task
    return lambda done, all_: bar.update(task, completed=before + done, total=total or all_)


def table(*columns: str, right: Sequence[str] = ()) -> Any:
    """A table of the terminal; `right` names the columns of numbers. Names are folded where it is narrow."""
    from rich.table import Table

    empty = Table(box=None, pad_edge=False)
    for column in columns:
        fixed = column in (*right, "time", "changed")
        empty.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=fixed)
    return empty


def text(words: str) -> Any:
    """Words as they are, without markup."""
    from rich.text import Text

    return Text(words)


def show(renderable: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(renderable)


def error(message: str) -> None:
    typer.echo(f"latentmem: {message}", err=True)


def size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.1f} KiB"


def state(memory: Account | Memory) -> str:
    """How full a memory is, in words."""
    return f"{memory.M} of {memory.N} slots per layer, {memory.updates} update{'s' * (memory.updates != 1)}"


def said(name: str, sources: Sequence[str]) -> None:
    """What was written in a chat, and how the last of it is taken back."""
    if not sources:
        typer.echo("(nothing to write)", err=True)
        return
    turns = "1 turn" if len(sources) == 1 else f"{len(sources)} turns"
    typer.echo(f"(wrote {turns} into the memory {name!r}; the last is taken back by", err=True)
    typer.echo(f' latentmem forget "{sources[-1]}" -m {name})', err=True)


# --- a memory ---------------------------------------------------------------------------------------------------------


def facts_of(memory: Account, stats: list[SourceStats]) -> dict[str, Any]:
    """Everything that `show` knows of a memory, for JSON."""
    settings = {name: value for name, value in asdict(memory.settings).items() if name != "longterm"}
    names = ("M", "L", "d", "updates", "tokens", "half_life", "model_name", "model", "adapters")
    facts = settings | {name: getattr(memory, name) for name in names} | {"order": memory.settings.reading_order}
    facts |= {"form": memory.settings.form or "exact", "size": memory.nbytes}
    if (longterm := memory.settings.longterm) is not None:
        facts["longterm"] = asdict(longterm) | {"S": memory.stored, "bytes": memory.archive}
    facts["sources"] = [
        {
            **{name: getattr(source, name) for name in ("tokens", "slots", "stored", "pinned", "forecast")},
            "name": source.source,
            "left": list(own.slots_left),
            "expires": source.expires.isoformat() if source.expires else None,
        }
        for source, own in zip(stats, memory.sources, strict=True)
    ]
    return facts


def forgetting(memory: Account) -> str:
    """What a memory forgets next, as the end of a sentence."""
    if memory.stored:
        return f", and {memory.stored} that were dropped in its long-term part"
    if memory.M < memory.N:
        return f", forgets nothing until {memory.N - memory.M} more slots are filled"
    return f", full: half of what is in it is left after {memory.half_life:.1f} more updates"


def losses(name: str, before: Memory, now: Memory) -> None:
    """What the writes between two memories have lost for good, if anything."""
    from latentmem.longterm import losses

    if said := losses.sentence(now, losses.lost_between(before, now), name):
        typer.echo(said)


def show_facts(title: str, memory: Account, disk: Overview) -> None:
    """Size, fill and kind of a memory, and what all its versions take on disk."""
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    facts.add_row("memory", title)
    facts.add_row("fill", f"{memory.M} of {memory.N} slots in each of {memory.L} layers ({memory.M / memory.N:.0%})")
    facts.add_row("written", f"{memory.updates} updates, {memory.tokens} tokens, at most {memory.K} slots per update")
    facts.add_row(
        "half-life", f"{memory.half_life:.1f} updates of {memory.K} slots once it is full" if memory.half_life else "0"
    )
    own = memory.settings
    if own.longterm is not None:
        stored = f"{memory.stored} slots in each layer, {size(memory.archive)} of" if memory.stored else "empty,"
        limit = f"at most {size(memory.limit)}; a question takes {own.longterm.R} of them at most"
        facts.add_row("long-term", f"{stored} {limit}")
    facts.add_row("read", own.reading_order)
    per_slot = f"{own.compression} token(s) per slot" + f" ({own.choice})" * ((own.compression or 1) > 1)
    facts.add_row("kind", f"{own.preset}, {per_slot}, seed {own.seed}")
    facts.add_row("model", text(f"{memory.model_name} {memory.model[:12]}"))
    facts.add_row("bytes", f"{size(memory.nbytes)}, {own.form or 'exact'}, written in {memory.dtype}")
    prunable = f", about {size(disk.prunable)} prunable" if disk.prunable else ""
    facts.add_row("on disk", f"{size(disk.bytes)} in {disk.versions} version{'s' * (disk.versions != 1)}{prunable}")
    show(facts)


def show_sources(stats: list[SourceStats], memory: Account) -> None:
    """Of each source what is left, and what is expected to be left."""
    ahead = _ahead(stats)
    longterm = memory.settings.longterm is not None
    numbers = ("tokens", "slots", "left", *(["long-term"] if longterm else []), *ahead)
    lines = table("source", *numbers, "", right=numbers)
    for source in stats:
        until = f"until {source.expires:%Y-%m-%d %H:%M}" if source.expires else ""
        kept = ", ".join(filter(None, ["pinned" if source.pinned else "", until]))
        shares = _shares(source, longterm)
        lines.add_row(text(source.source), str(source.tokens), str(source.slots), *shares, kept)
    if any(memory.older):
        lines.add_row("(older)", "", f"{sum(memory.older) / memory.L:.0f}")
    if lines.rows:
        show(lines)
    if stats:
        typer.echo(f"(left now, and as expected after so many more updates: {', '.join(ahead)})")


def _ahead(stats: list[SourceStats]) -> list[str]:
    """The columns of the forecast."""
    return [f"+{updates}" for updates in stats[0].forecast] if stats else []


def _shares(source: SourceStats, longterm: bool) -> list[str]:
    stored = [source.stored] if longterm else []
    return [f"{share:.0%}" for share in (source.share_left, *stored, *source.forecast.values())]


def show_layers(memory: Account) -> None:
    """Of each source what is left in each layer."""
    lines = table("source", "slots", "left", "each layer, first to last", right=("slots", "left"))
    for source in memory.sources:
        shares = [slots / source.slots for slots in source.slots_left]
        low, high, mean = min(source.slots_left), max(source.slots_left), sum(shares) / len(shares)
        amount = f"{mean:.0%} ({low})" if low == high else f"{mean:.0%} ({low} to {high})"
        lines.add_row(text(source.name), str(source.slots), amount, _bars(shares))
    if any(memory.older):
        lines.add_row("(older)", "", f"({min(memory.older)} to {max(memory.older)})", "")
    if lines.rows:
        show(lines)


def show_drawn_on(drawn: DrawnOn, stats: list[SourceStats]) -> None:
    """Which sources an answer drew on, the largest share first, and sentences of them."""
    if not drawn.sources:
        typer.echo("(the memory is empty)")
        return
    known = {source.source: source for source in stats}
    longterm = any(source.stored for source in stats)
    columns = ("share", "left", *(["long-term"] if longterm else []), *_ahead(stats))
    lines = table("drew on", *columns, right=columns)
    for name, share in sorted(drawn.sources.items(), key=lambda item: -item[1]):
        numbers = _shares(known[name], longterm) if name in known else []
        lines.add_row(text(name or "(older)"), f"{share:.0%}", *numbers)
    show(lines)
    for passage in drawn.passages:
        quoted = f'"{passage.text}"' if passage.text else "(the memory holds no longer all that was written here)"
        typer.echo(f"{passage.source or '(older)'}: {quoted}")
    if drawn.known is not None:
        typer.echo(f"known: {drawn.known:.0%} (an estimate that what was asked stands in the memory)")
    typer.echo("(share: of what was attended to more than a neutral question does; a hint, no proof;")
    typer.echo(" left: now, and as expected after so many more updates)")


def nothing_known(name: str) -> None:
    """On standard error: why an empty memory is not asked."""
    from latentmem.store import views

    error(views.nothing_known(name))


def _bars(shares: list[float]) -> str:
    """One character per layer: the share that is left, from ▁ (none) to █ (all)."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(share * 7.999))] for share in shares)


def show_text(memory: Memory, llm: MemoryModel) -> None:
    """The text that layer 0 still holds, source by source."""
    if not memory.rules.holds_inputs:
        raise ValueError("only memories of the preset 'exact' hold embeddings in layer 0; this one can not be printed.")
    ids, origins = llm.text_of(memory), memory.origins[0]
    edges = [0, *((origins.diff() != 0).nonzero().flatten() + 1).tolist(), memory.M]
    for start, end in itertools.pairwise(edges):
        if start < end:
            source = memory.sources[int(origins[start])].name if origins[start] >= 0 else "(older)"
            typer.echo(f"--- {source}: {end - start} slots of layer 0")
            typer.echo(llm.tokenizer.decode([int(i) for i in ids[start:end] if i >= 0]))
