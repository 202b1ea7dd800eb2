"""What the commands share: the app, their options, the store and the model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from latentmem.cli import printing

if TYPE_CHECKING:
    from latentmem.core.memory import Memory
    from latentmem.model.model import MemoryModel
    from latentmem.store import Account, Store

app = typer.Typer(
    help="A memory for language models: write text into it, ask for it later.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from latentmem.version import __version__

        typer.echo(f"latentmem {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


PACKAGED = "smollm2-135m"
MODELS = "smollm2-135m, a folder, a .gguf file or a hub id"
Name = Annotated[str, typer.Option("--memory", "-m", help="Name of the memory.")]
ModelName = Annotated[str | None, typer.Option("--model", help=f"{MODELS}; by default the one that wrote the memory.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; by default the fastest.")]
Quantize = Annotated[
    str | None, typer.Option("--quantize", help="New memory: int8 runs the model's linear layers in 8 bits (CPU only).")
]
ServedQuantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="int8 runs the linear layers in 8 bits (CPU only). Only such a model reads the memories it writes.",
    ),
]
Adapters = Annotated[
    str, typer.Option("--adapters", help="auto: the model's own; none: untrained; or a file of `latentmem train`.")
]
OwnAdapters = Annotated[
    str | None,
    typer.Option(
        "--adapters",
        help="none: untrained; or a file of `latentmem train`, which LATENTMEM_ADAPTERS can name as well.",
        show_default="the model's own",
    ),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Version = Annotated[
    int | None, typer.Option("--version", help="A version, see `latentmem history`; by default the newest.")
]
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


def opened(name: str) -> Store:
    """The store, for a memory of this name."""
    from latentmem.store import check_name
    from latentmem.store.home import opened

    check_name(name)
    return opened()


def settled(name: str, model: str | None = None) -> Store:
    """The store, in which nothing waits for a model: a write that was cut off is finished first."""
    store = opened(name)
    if store.pending_count(name):
        finish(store, name, load(store.applied(name)[1], model, None))
    return store


def finish(store: Store, name: str, llm: MemoryModel) -> None:
    """Apply what was acknowledged and cut off."""
    if store.pending_count(name):
        with printing.progress() as bar:
            store.apply(llm, name, printing.tokens(bar, "finishing what was cut off"))


def applied(store: Store, name: str) -> Account | None:
    """What the memory holds without what waits for a model; None if there is none of this name."""
    return store.applied(name)[1] if name in store else None


def begin(store: Store, name: str, memory: Memory) -> Account | None:
    """Make a memory, or go on with one that somebody else has made meanwhile; gives what that holds."""
    from latentmem.errors import NameTakenError

    try:
        store.create(name, memory)
    except NameTakenError:
        return store.applied(name)[1]
    return None


def read(
    store: Store,
    name: str,
    model: str | None,
    device: str | None,
    version: int | None = None,
    adapters: str | None = None,
) -> tuple[Memory, MemoryModel]:
    """A version of a memory and the model that reads it."""
    account = store.applied(name)[1] if version is None else store.account(name, version)
    llm = load(account, model, device, adapters=adapters)
    if version is None:
        finish(store, name, llm)
    return store.open(name, version), llm


def load(
    memory: Account | None,
    model: str | None,
    device: str | None,
    quantize: str | None = None,
    adapters: str | None = None,
) -> MemoryModel:
    """The model that is asked for, or the one that wrote the memory, in the memory's dtype and quantized as it was.

    Without `adapters` and `LATENTMEM_ADAPTERS` the model gets its own, or none for a memory of the untrained model.
    """
    import latentmem

    name = model or (memory.model_name if memory is not None else "") or PACKAGED
    check_model(name, chosen(adapters))
    if memory is None:
        return latentmem.load(name, device=device, quantize=quantize, adapters=pair(chosen(adapters)))
    own = quantized_as(memory)
    if quantize not in (None, own):
        raise ValueError(
            f"the memory was written by a model with {f'--quantize {own}' if own else 'exact weights'}, "
            f"not --quantize {quantize}. Leave it out, or choose a new name."
        )
    return latentmem.load(name, device=device, dtype=memory.dtype, quantize=own, adapters=adapters_of(memory, adapters))


def adapters_of(memory: Account, adapters: str | None) -> str | None:
    """The adapters of the model that wrote a memory, or those that are asked for, as `latentmem.load` takes them."""
    return pair("none" if adapters is None and not memory.adapters else chosen(adapters))


def check_model(name: str, adapters: str = "auto") -> None:
    """Refuse a model or adapters that are not there, before torch is imported."""
    from latentmem.loading import names

    names.check_model(name)
    if adapters not in ("auto", "none"):
        names.check_adapters(names.path_of(adapters))


def chosen(adapters: str | None) -> str:
    """The value of `--adapters`, else of `LATENTMEM_ADAPTERS`, else "auto"."""
    return adapters or os.environ.get("LATENTMEM_ADAPTERS") or "auto"


def quantized_as(memory: Account) -> str | None:
    """How the model was quantized that wrote a memory, as `latentmem.load` takes it."""
    return memory.model.rpartition("-")[0] or None


def pair(adapters: str) -> str | None:
    """`--adapters` as `latentmem.load` takes it."""
    return None if adapters == "none" else adapters
