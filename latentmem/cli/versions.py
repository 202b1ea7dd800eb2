"""Versions of a memory: history, diff, undo, rollback, fork."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from latentmem.cli import base, printing
from latentmem.cli.base import Json, Name, app

if TYPE_CHECKING:
    from latentmem.store import Store

PANEL = "Versions of a memory"


@app.command(rich_help_panel=PANEL)
def history(memory: Name = "default", json_: Json = False) -> None:
    """Show every version: its time, its event, and the version it was made from."""
    versions = base.opened(memory).history(memory)
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


@app.command(rich_help_panel=PANEL)
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


@app.command(rich_help_panel=PANEL)
def undo(memory: Name = "default") -> None:
    """Go back to the version that the newest one was made from; again and again, if you like."""
    store = base.settled(memory)
    _print_version(store, memory, store.undo(memory))


@app.command(rich_help_panel=PANEL)
def rollback(version: Annotated[int, typer.Argument(help="The version.")], memory: Name = "default") -> None:
    """Go to any version, older or newer. This makes a new version, so nothing is lost."""
    store = base.settled(memory)
    _print_version(store, memory, store.rollback(memory, version))


def _print_version(store: Store, memory: str, new: int) -> None:
    to = store.history(memory)[new].base
    now = store.open(memory)
    typer.echo(f"{memory}: back at version {to[1] if to else 0} ({printing.state(now)})")
    typer.echo(f"This is version {new}; `latentmem rollback {new - 1} -m {memory}` takes it back.")


@app.command(rich_help_panel=PANEL)
def fork(
    new: Annotated[str, typer.Argument(help="Name of the new memory.")],
    memory: Name = "default",
    version: base.Version = None,
) -> None:
    """Make a memory that goes on from another; nothing is copied."""
    store = base.settled(memory)
    store.fork(memory, new, version)
    typer.echo(f"{new}: goes on from {memory}, {printing.state(store.open(new))}")
