"""Versions, sources and copies of a memory: each section is one panel of `latentmem --help`."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentmem.cli import base, options, printing
from latentmem.cli.base import Device, Json, ModelName, Name, OwnAdapters, app

if TYPE_CHECKING:
    from latentmem.store import Store

VERSIONS, SOURCES, FILES = "Versions of a memory", "Sources of a memory", "Files and models"
Source = Annotated[str, typer.Argument(help="The source, as `latentmem show` names it.")]
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


# --- history, diff, undo, rollback, fork, prune -----------------------------------------------------------------------


@app.command(rich_help_panel=VERSIONS)
def history(memory: Name = "default", json_: Json = False) -> None:
    """Show every version: its time, its event, and the version it was made from."""
    store = base.opened(memory)
    versions = store.history(memory)
    if json_:
        typer.echo(json.dumps([asdict(version) | {"time": version.time.isoformat()} for version in versions]))
        return
    table = printing.table(
        "version", "time", "event", "source", "tokens", "from", "state", "bytes", right=("version", "tokens", "bytes")
    )
    for version in versions:
        name, number = version.base or ("", "")
        made_from = str(number) if name in ("", memory) else f"{number} of {name}"
        table.add_row(
            str(version.version),
            f"{version.time:%Y-%m-%d %H:%M}",
            version.event,
            printing.text(version.source or ""),
            str(version.tokens or ""),
            made_from,
            version.state,
            printing.size(version.bytes) if version.bytes else "",
        )
    printing.show(table)
    for version in versions:
        if version.error:
            typer.echo(f"version {version.version} failed: {version.error}")


@app.command(rich_help_panel=VERSIONS)
def diff(
    one: Annotated[int, typer.Argument(help="A version.")],
    other: Annotated[int | None, typer.Argument(help="Another version.", show_default="the newest")] = None,
    memory: Name = "default",
) -> None:
    """Show how the sources changed between two versions."""
    changes = base.settled(memory).diff(memory, one, other)
    if not changes:
        typer.echo("every source is as it was")
        return
    then = "the newest" if other is None else str(other)
    numbers = (f"tokens in {one}", f"in {then}", f"slots in {one}", f"in {then}")
    table = printing.table("source", *numbers, right=numbers)
    for change in changes:
        cells = (*map(str, change.tokens), *(f"{slots:.1f}" for slots in change.slots_left))
        table.add_row(printing.text(change.source), *cells)
    printing.show(table)


@app.command(rich_help_panel=VERSIONS)
def undo(memory: Name = "default") -> None:
    """Go back to the version that the newest one was made from; again and again, if you like."""
    store = base.settled(memory)
    _print_version(store, memory, store.undo(memory))


@app.command(rich_help_panel=VERSIONS)
def rollback(version: Annotated[int, typer.Argument(help="The version.")], memory: Name = "default") -> None:
    """Go to any version, older or newer. This makes a new version, so nothing is lost."""
    store = base.settled(memory)
    _print_version(store, memory, store.rollback(memory, version))


def _print_version(store: Store, memory: str, new: int) -> None:
    to = store.history(memory)[new].base
    now = store.account(memory)
    typer.echo(f"{memory}: back at version {to[1] if to else 0} ({printing.state(now)})")
    typer.echo(f"This is version {new}; `latentmem rollback {new - 1} -m {memory}` takes it back.")


@app.command(rich_help_panel=VERSIONS)
def fork(
    new: Annotated[str, typer.Argument(help="Name of the new memory.")],
    memory: Name = "default",
    version: base.Version = None,
) -> None:
    """Make a memory that goes on from another; nothing is copied."""
    store = base.settled(memory)
    store.fork(memory, new, version)
    typer.echo(f"{new}: goes on from {memory}, {printing.state(store.account(new))}")


@app.command(rich_help_panel=VERSIONS)
def prune(
    memory: Name = "default",
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="So many of the newest versions stay.")] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", help="A number and s, m, h, d or w, such as 30d: younger ones stay.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove old versions from the disk; their texts stay in the history."""
    if (keep is None) == (older_than is None):
        raise ValueError("say which versions stay: --keep 10, for example, or --older-than 30d.")
    age = None if older_than is None else _seconds(older_than, "--older-than")
    pruned = base.opened(memory).prune(memory, keep=keep, older_than=age, dry_run=dry_run)
    numbers, size = _ranges(pruned.versions), printing.size(max(0, pruned.bytes))
    if not numbers and pruned.bytes <= 0:
        typer.echo(f"{memory}: nothing to prune")
    elif dry_run:
        typer.echo(f"{memory}: this would remove {numbers or 'no version'}, and free about {size}")
    else:
        typer.echo(f"{memory}: removed {numbers or 'no version'}, {size} freed; the history still has the texts")


def _ranges(versions: list[int]) -> str:
    """Numbers in words: "versions 1 to 3 and 5"."""
    ranges: list[list[int]] = []
    for version in versions:
        if ranges and version == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], version]
        else:
            ranges.append([version])
    words = [" to ".join(map(str, numbers)) for numbers in ranges]
    listed = " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
    return f"version{'s' * (len(versions) > 1)} {listed}" if versions else ""


# --- forget, pin, expire ----------------------------------------------------------------------------------------------


@app.command(rich_help_panel=SOURCES)
def forget(
    source: Source,
    memory: Name = "default",
    exact: Annotated[
        bool,
        typer.Option("--exact", help="As if it had never been written: all versions and forks are made again."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --exact: do not ask for confirmation.")] = False,
    model: ModelName = None,
    device: Device = None,
) -> None:
    """Forget a source: drop its slots; with --exact everything that was made from it."""
    store = base.settled(memory, model)
    if not exact:
        version = store.forget(memory, source)
        state = printing.state(store.account(memory))
        typer.echo(f"{memory}, version {version}: the slots of {source!r} are gone, {state}")
        typer.echo("Still there: its text in the history, older versions and forks, and what later")
        typer.echo("texts took up from it while they were written. `--exact` removes that too.")
        return
    store.check_written(memory, source)
    now = store.account(memory)
    if not yes:
        what = f"This makes every version of {memory!r} and of all memories that forks connect with it anew"
        if not sys.stdin.isatty():
            raise ValueError(f"{what[0].lower()}{what[1:]}, and can not be undone. Say that you want it with --yes.")
        typer.confirm(f"{what}, and can not be undone. Go on?", abort=True)
    llm = base.load(now, model, device)
    with printing.progress() as bar:
        rewritten = store.forget_by_replay(llm, memory, source, printing.tokens(bar, "writing the others anew"))
    typer.echo(f"rewritten without {source!r}: {', '.join(rewritten)}")
    typer.echo("Versions are numbered anew. Not reached: exported files, and memories that were")
    typer.echo("made by `import` or `rebuild`.")


@app.command(rich_help_panel=SOURCES)
def pin(
    source: Source,
    memory: Name = "default",
    off: Annotated[bool, typer.Option("--off", help="Remove the pin.")] = False,
) -> None:
    """Keep all slots that a source has left, however much is written later."""
    store = base.settled(memory)
    version = store.pin(memory, source, not off)
    now = store.account(memory)
    what = "is no longer pinned" if off else "is pinned"
    typer.echo(
        f"{memory}, version {version}: {source!r} {what}; {max(now.pinned(), default=0)} of at most "
        f"{int(now.settings.quota * now.N)} slots are"
    )


@app.command(rich_help_panel=SOURCES)
def expire(
    source: Source,
    memory: Name = "default",
    after: Annotated[str | None, typer.Option("--after", help="A number and s, m, h, d or w, such as 30d.")] = None,
    never: Annotated[bool, typer.Option("--never", help="Remove the time.")] = False,
) -> None:
    """Set the time at which the slots of a source are dropped."""
    if (after is None) == (not never):
        raise ValueError("say when: --after 30d, for example, or --never.")
    seconds = None if after is None else _seconds(after, "--after")
    store = base.settled(memory)
    store.expire(memory, source, seconds)
    if never:
        typer.echo(f"{memory}: {source!r} never expires")
        return
    at = next((known.expires for known in store.stats(memory) if known.source == source), None)
    when = f"by whoever opens it after {at:%Y-%m-%d %H:%M}" if at else "now"
    typer.echo(f"{memory}: {source!r} is forgotten {when}")


def _seconds(span: str, option: str) -> float:
    """A span of time such as 30d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", span)
    if match is None:
        raise ValueError(f"{option} takes a number and one of s, m, h, d, w, such as 30d: got {span!r}.")
    return float(match[1]) * SECONDS[match[2]]


# --- export, import, rebuild ------------------------------------------------------------------------------------------


@app.command(rich_help_panel=FILES)
def export(file: Annotated[Path, typer.Argument(help="A new file.")], memory: Name = "default") -> None:
    """Write a memory with its history into one file."""
    store = base.opened(memory)
    if file.exists():
        raise ValueError(f"{file} exists already; choose another name, or remove it.")
    store.export(memory, file)
    typer.echo(f"{file}: {printing.size(file.stat().st_size)}, {len(store.history(memory))} versions of {memory}")
    typer.echo("It holds the texts; treat it like them.")


@app.command("import", rich_help_panel=FILES)
def import_(
    file: Annotated[Path, typer.Argument(help="A file of `latentmem export`.")],
    memory: Annotated[str, typer.Option("--memory", "-m", help="Name of the new memory.")],
) -> None:
    """Make a memory from an exported file, with its history; the file is verified."""
    store = base.opened(memory)
    store.import_(file, memory)
    typer.echo(f"{memory}: {len(store.history(memory))} versions")


@app.command(rich_help_panel=FILES)
@options.of_a_rebuilt_memory
def rebuild(
    new: Annotated[str, typer.Argument(help="Name of the new memory.")],
    memory: Name = "default",
    *,
    chosen: options.Values,
    model: ModelName = None,
    adapters: OwnAdapters = None,
    device: Device = None,
) -> None:
    """Write all texts of a memory again, into a new one, with another model, other adapters or other settings."""
    store = base.settled(memory)
    store.check_free(new)
    now = store.account(memory)
    dtype = None if model else now.dtype
    quantize = None if model else base.quantized_as(now)
    name = model or now.model_name or base.PACKAGED
    asked = base.pair(base.chosen(adapters)) if model else base.adapters_of(now, adapters)
    base.check_model(name, asked or "none")
    settings = options.settings_over(now.settings, chosen)
    import latentmem

    llm = latentmem.load(name, device=device, dtype=dtype, quantize=quantize, adapters=asked)
    with printing.progress() as bar:
        store.rebuild(llm, memory, new, printing.tokens(bar, "writing"), settings)
    typer.echo(f"{new}: {memory} again, by {llm.name}, {printing.state(store.account(new))}")
