"""Sources of a memory: forget, pin, expire."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from latentmem.cli import base, printing
from latentmem.cli.base import Device, ModelName, Name, app

PANEL = "Sources of a memory"
Source = Annotated[str, typer.Argument(help="The source, as `latentmem show` names it.")]
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@app.command(rich_help_panel=PANEL)
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
        state = printing.state(store.open(memory))
        typer.echo(f"{memory}, version {version}: the slots of {source!r} are gone, {state}")
        typer.echo("Still there: its text in the history, older versions and forks, and what later")
        typer.echo("texts took up from it while they were written. `--exact` removes that too.")
        return
    now = store.open(memory)
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


@app.command(rich_help_panel=PANEL)
def pin(
    source: Source,
    memory: Name = "default",
    off: Annotated[bool, typer.Option("--off", help="Remove the pin.")] = False,
) -> None:
    """Keep all slots that a source has left, however much is written later."""
    store = base.settled(memory)
    version = store.pin(memory, source, not off)
    now = store.open(memory)
    pinned = int(now.pinned().sum(1).max()) if now.M else 0
    what = "is no longer pinned" if off else "is pinned"
    typer.echo(
        f"{memory}, version {version}: {source!r} {what}; {pinned} of at most {int(now.quota * now.N)} slots are"
    )


@app.command(rich_help_panel=PANEL)
def expire(
    source: Source,
    memory: Name = "default",
    after: Annotated[str | None, typer.Option("--after", help="A number and s, m, h, d or w, such as 30d.")] = None,
    never: Annotated[bool, typer.Option("--never", help="Remove the time.")] = False,
) -> None:
    """Set the time at which the slots of a source are dropped."""
    if (after is None) == (not never):
        raise ValueError("say when: --after 30d, for example, or --never.")
    span = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", after or "0s")
    if span is None:
        raise ValueError(f"--after takes a number and one of s, m, h, d, w, such as 30d: got {after!r}.")
    store = base.settled(memory)
    store.expire(memory, source, None if never else float(span[1]) * SECONDS[span[2]])
    if never:
        typer.echo(f"{memory}: {source!r} never expires")
        return
    at = next((known.expires for known in store.stats(memory) if known.source == source), None)
    when = f"by whoever opens it after {at:%Y-%m-%d %H:%M}" if at else "now"
    typer.echo(f"{memory}: {source!r} is forgotten {when}")
