"""Memories that outlive the process: named, versioned, forked, rolled back, forgotten (read `store.py` first)."""

from latentmem.errors import DamagedError
from latentmem.store.journal import HiddenError
from latentmem.store.store import Store, check_name
from latentmem.store.turns import Turns
from latentmem.store.views import Change, Overview, SourceStats, Version

__all__ = [
    "Change",
    "DamagedError",
    "HiddenError",
    "Overview",
    "SourceStats",
    "Store",
    "Turns",
    "Version",
    "check_name",
]
