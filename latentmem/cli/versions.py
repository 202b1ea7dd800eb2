"""Going back: history, diff, undo, rollback, fork."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from latentmem.cli import base
from latentmem.cli.base import Json, Name, app

if TYPE_CHECKING:
    from latentmem.store import Store

PANEL = "Versions of a memory"


@app.command(rich_help_panel=PANEL)
def history(memory: Name = "default", json_: Json = False) -> None:
    """Show every version: when it was made, by what, and from which."""
    versions = base.opened(memory).history(memory)
    if json_:
        typer.echo(json.dumps([asdict(version) | {"time": version.time.isoformat()} for version in versions]))
        return
    table = base.table(
        "version", "time", "event", "source", "tokens", "from", "state", "bytes", right=("version", "tokens", "bytes")
    )
    for version in versions:
        name, number = version.base or ("", "")
        made_from = str(number) if name in ("", memory) else f"{number} of {name}"
        table.add_row(
            str(version.version),
            f"{version.time:%Y-%m-%d %H:%M}",
            version.event,
            base.text(version.source or ""),
            str(version.tokens or ""),
            made_from,
            version.state,
            base.size(version.bytes) if version.bytes else "",
        )
    base.show(table)
    for version in versions:
        if version.error:
            typer.echo(f"version {version.version} failed: {version.error}")


@app.command(rich_help_panel=PANEL)
def diff(
    one: Annotated[int, typer.Argument(help="A version.")],
    other: Annotated[int | None, typer.Argument(help="Another one.", show_default="the newest")] = None,
    memory: Name = "default",
) -> None:
    """Show what became of each source between two versions."""
    changes = base.settled(memory).diff(memory, one, other)
    if not changes:
        typer.echo("every source is as it was")
        return
    then = "the newest" if other is None else str(other)
    numbers = (f"tokens in {one}", f"in {then}", f"slots in {one}", f"in {then}")
    table = base.table("source", *numbers, right=numbers)
    for change in changes:
        cells = (*map(str, change.tokens), *(f"{left:.1f}" for left in change.slots_left))
        table.add_row(base.text(change.source), *cells)
    base.show(table)


@app.command(rich_help_panel=PANEL)
def undo(memory: Name = "default") -> None:
    """Go one step back, to what the newest version was made from; again and again, if you like."""
    store = base.settled(memory)
    _went_back(store, memory, store.undo(memory))


@app.command(rich_help_panel=PANEL)
def rollback(version: Annotated[int, typer.Argument(help="The version.")], memory: Name = "default") -> None:
    """Go to any version, older or newer; the way there is a version too, so nothing is lost."""
    store = base.settled(memory)
    _went_back(store, memory, store.rollback(memory, version))


def _went_back(store: Store, memory: str, new: int) -> None:
    to = store.history(memory)[new].base
    now = store.open(memory)
    typer.echo(f"{memory}: back at version {to[1] if to else 0} ({base.state(now)})")
    typer.echo(f"This is version {new}; `latentmem rollback {new - 1} -m {memory}` takes it back.")


@app.command(rich_help_panel=PANEL)
def fork(
    new: Annotated[str, typer.Argument(help="Name of the new memory.")],
    memory: Name = "default",
    version: base.Version = None,
) -> None:
    """Begin a memory that goes on from another; nothing is copied."""
    store = base.settled(memory)
    store.fork(memory, new, version)
    typer.echo(f"{new}: goes on from {memory}, {base.state(store.open(new))}")
