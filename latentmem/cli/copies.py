"""A memory elsewhere: export, import, rebuild."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentmem.cli import base
from latentmem.cli.base import Adapters, Device, ModelName, Name, app

PANEL = "Files and models"


@app.command(rich_help_panel=PANEL)
def export(
    file: Annotated[Path, typer.Argument(help="The file, which must not exist.")], memory: Name = "default"
) -> None:
    """Write a memory with its history into one file."""
    store = base.opened(memory)
    if file.exists():
        raise ValueError(f"{file} exists already; choose another name, or remove it.")
    store.export(memory, file)
    typer.echo(f"{file}: {base.size(file.stat().st_size)}, {len(store.history(memory))} versions of {memory}")
    typer.echo("It holds the texts; treat it like them.")


@app.command("import", rich_help_panel=PANEL)
def import_(
    file: Annotated[Path, typer.Argument(help="What `latentmem export` made.")],
    memory: Annotated[str, typer.Option("--memory", "-m", help="Name of the new memory.")],
) -> None:
    """Make a memory from an exported file, with its history; all of it is verified."""
    store = base.opened(memory)
    store.import_(file, memory)
    typer.echo(f"{memory}: {len(store.history(memory))} versions")


@app.command(rich_help_panel=PANEL)
def rebuild(
    new: Annotated[str, typer.Argument(help="Name of the new memory.")],
    memory: Name = "default",
    model: ModelName = None,
    adapters: Adapters = "auto",
    device: Device = None,
) -> None:
    """Write all texts of a memory again, into a new one, with another model or other adapters."""
    import latentmem

    store = base.settled(memory)
    now = store.open(memory)
    dtype = None if model else now.slots.dtype
    quantize = None if model else now.model.rpartition("-")[0] or None
    name = model or now.model_name or base.PACKAGED
    llm = latentmem.load(name, device=device, dtype=dtype, quantize=quantize, adapters=base.pair(adapters))
    with base.progress() as bar:
        store.rebuild(llm, memory, new, base.tokens(bar, "writing"))
    typer.echo(f"{new}: {memory} again, by {llm.name}, {base.state(store.open(new))}")
