"""Memories that outlive the process: named, versioned, forked, rolled back, forgotten (read `store.py` first)."""

from latentmem.store.account import Account
from latentmem.store.locks import check_name
from latentmem.store.pruning import Pruned
from latentmem.store.store import Store
from latentmem.store.turns import Turns
from latentmem.store.views import Change, Overview, SourceStats, Version

__all__ = [
    "Account",
    "Change",
    "Overview",
    "Pruned",
    "SourceStats",
    "Store",
    "Turns",
    "Version",
    "check_name",
]
