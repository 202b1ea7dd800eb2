"""latentmem: a memory for language models. Text is written into latent vectors of every layer, and asked for later."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Conversation", "Memory", "MemoryModel", "Store", "__version__", "load"]

if TYPE_CHECKING:
    from latentmem.chat import Conversation
    from latentmem.core.memory import Memory
    from latentmem.loading import load
    from latentmem.model import MemoryModel
    from latentmem.store import Store

_HOMES = {
    "Conversation": "latentmem.chat",
    "Memory": "latentmem.core.memory",
    "MemoryModel": "latentmem.model",
    "Store": "latentmem.store",
    "load": "latentmem.loading",
}


def __getattr__(name: str) -> Any:  # torch is imported when it is needed, so that `latentmem --help` answers at once
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'latentmem' has no attribute {name!r}")
