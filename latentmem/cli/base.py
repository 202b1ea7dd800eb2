"""What the commands share: their options, the store, the model, and how things are printed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from latentmem.core.memory import Memory
    from latentmem.model.model import MemoryModel
    from latentmem.store import Store

app = typer.Typer(
    help="A memory for language models: write text into it, ask for it later.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from latentmem.version import __version__

        typer.echo(f"latentmem {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Say which.")] = False,
) -> None:
    pass


PACKAGED = "smollm2-135m"
Name = Annotated[str, typer.Option("--memory", "-m", help="Name of the memory.")]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="smollm2-135m, a folder, a .gguf file or a hub id; by default what wrote the memory."),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps; by default the fastest.")]
Quantize = Annotated[
    str | None, typer.Option("--quantize", help="New memory: int8 for a model of 8-bit linear layers, on a CPU.")
]
ServedQuantize = Annotated[
    str | None,
    typer.Option("--quantize", help="int8: a model of 8-bit linear layers, on a CPU; only it reads its memories."),
]
Adapters = Annotated[
    str, typer.Option("--adapters", help="auto: the model's own; none: untrained; or what `latentmem train` made.")
]
OwnAdapters = Annotated[
    str | None,
    typer.Option(
        "--adapters",
        help="none: untrained; or what `latentmem train` made, which can also stand in LATENTMEM_ADAPTERS.",
        show_default="the model's own",
    ),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Version = Annotated[
    int | None, typer.Option("--version", help="A version, see `latentmem history`; by default the newest.")
]
Json = Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")]


# --- the store and the model ------------------------------------------------------------------------------------------


def opened(name: str) -> Store:
    """The store, where a memory of this name can be asked for."""
    from latentmem.store import check_name
    from latentmem.store.home import opened

    check_name(name)
    return opened()


def settled(name: str, model: str | None = None) -> Store:
    """The store, in which nothing waits for a model: a write that was cut off is finished first."""
    store = opened(name)
    if store.pending_count(name):
        finish(store, name, load(store.open(name, store.applied_version(name)), model, None))
    return store


def finish(store: Store, name: str, llm: MemoryModel) -> None:
    """Apply what was acknowledged and cut off."""
    if store.pending_count(name):
        with progress() as bar:
            store.apply(llm, name, tokens(bar, "finishing what was cut off"))


def read(
    store: Store,
    name: str,
    model: str | None,
    device: str | None,
    version: int | None = None,
    adapters: str | None = None,
) -> tuple[Memory, MemoryModel]:
    """A version of a memory and the model that reads it."""
    known = store.open(name, store.applied_version(name) if version is None else version)
    llm = load(known, model, device, adapters=adapters)
    if version is not None:
        return known, llm
    finish(store, name, llm)
    return store.open(name), llm


def load(
    memory: Memory | None,
    model: str | None,
    device: str | None,
    quantize: str | None = None,
    adapters: str | None = None,
) -> MemoryModel:
    """The model that is asked for, or the one that wrote the memory, in the memory's dtype and quantized as it was.

    Without `adapters` and `LATENTMEM_ADAPTERS` it gets its own, or none where the memory is of the untrained model.
    """
    import latentmem

    name = model or (memory.model_name if memory is not None else "") or PACKAGED
    chosen = adapters or os.environ.get("LATENTMEM_ADAPTERS") or "auto"
    if memory is None:
        return latentmem.load(name, device=device, quantize=quantize, adapters=pair(chosen))
    if adapters is None and not memory.adapters:
        chosen = "none"
    made = memory.model.rpartition("-")[0] or None
    if quantize not in (None, made):
        raise ValueError(
            f"the memory was written by a model with {f'--quantize {made}' if made else 'exact weights'}, "
            f"not --quantize {quantize}. Leave it out, or choose a new name."
        )
    return latentmem.load(name, device=device, dtype=memory.slots.dtype, quantize=made, adapters=pair(chosen))


def pair(adapters: str) -> str | None:
    """`--adapters` as `latentmem.load` takes it."""
    return None if adapters == "none" else adapters


# --- printing ---------------------------------------------------------------------------------------------------------


def progress(unit: str = "tokens", seconds: float = 30) -> Any:
    """A bar with the time left, estimated from the speed of the last seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=seconds)


def tokens(bar: Any, what: str, total: int | None = None, before: int = 0, task: Any = None) -> Any:
    """A callable that shows (tokens done, tokens in all) in a bar.

    Args:
        total: of several texts, if this is one of them.
        before: tokens of those that are done.
        task: what the bar shows already.
    """
    task = bar.add_task(what, total=total) if task is None else task
    return lambda done, all_: bar.update(task, completed=before + done, total=total or all_)


def table(*columns: str, right: Sequence[str] = ()) -> Any:
    """A table of the terminal; `right` names the columns of numbers. Names are folded where it is narrow."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    for column in columns:
        fixed = column in (*right, "time", "changed")
        made.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=fixed)
    return made


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


def state(memory: Memory) -> str:
    """How full a memory is, in words."""
    return f"{memory.M} of {memory.N} slots per layer, {memory.updates} update{'s' * (memory.updates != 1)}"
