"""Memories that outlive the process: named, versioned, forked, rolled back, forgotten (read `store.py` first)."""

from latentmem.store.store import Store
from latentmem.store.views import Change, SourceStats, Version

__all__ = ["Change", "SourceStats", "Store", "Version"]
