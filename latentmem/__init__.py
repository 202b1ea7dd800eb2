"""latentmem: a memory for language models. Text is written into latent vectors of every layer, and asked for later."""

from typing import TYPE_CHECKING

from latentmem.version import __version__

__all__ = ["Conversation", "Memory", "MemoryModel", "MemorySettings", "Store", "__version__", "load"]

if TYPE_CHECKING:
    from latentmem.core.settings import MemorySettings
    from latentmem.files.snapshot import Memory
    from latentmem.loading.load import load
    from latentmem.model.chat import Conversation
    from latentmem.model.model import MemoryModel
    from latentmem.store import Store

_HOMES = {
    "Conversation": "latentmem.model.chat",
    "Memory": "latentmem.files.snapshot",
    "MemoryModel": "latentmem.model.model",
    "MemorySettings": "latentmem.core.settings",
    "Store": "latentmem.store",
    "load": "latentmem.loading.load",
}


def __getattr__(name: str) -> object:  # torch is imported when it is needed, so that `latentmem --help` answers at once
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'latentmem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
