"""Files of memories, and other models: export, import, rebuild."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentmem.cli import base, printing
from latentmem.cli.base import Adapters, Device, ModelName, Name, app

PANEL = "Files and models"


@app.command(rich_help_panel=PANEL)
def export(file: Annotated[Path, typer.Argument(help="A new file.")], memory: Name = "default") -> None:
    """Write a memory with its history into one file."""
    store = base.opened(memory)
    if file.exists():
        raise ValueError(f"{file} exists already; choose another name, or remove it.")
    store.export(memory, file)
    typer.echo(f"{file}: {printing.size(file.stat().st_size)}, {len(store.history(memory))} versions of {memory}")
    typer.echo("It holds the texts; treat it like them.")


@app.command("import", rich_help_panel=PANEL)
def import_(
    file: Annotated[Path, typer.Argument(help="A file of `latentmem export`.")],
    memory: Annotated[str, typer.Option("--memory", "-m", help="Name of the new memory.")],
) -> None:
    """Make a memory from an exported file, with its history; the file is verified."""
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
    quantize = None if model else base.quantized_as(now)
    name = model or now.model_name or base.PACKAGED
    llm = latentmem.load(name, device=device, dtype=dtype, quantize=quantize, adapters=base.pair(adapters))
    with printing.progress() as bar:
        store.rebuild(llm, memory, new, printing.tokens(bar, "writing"))
    typer.echo(f"{new}: {memory} again, by {llm.name}, {printing.state(store.open(new))}")
