"""Where the command line and the server keep memories: a store in `$LATENTMEM_HOME`."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from latentmem.store import Store

TIMEOUT = 10.0  # seconds to wait for another process


def home() -> Path:
    """`$LATENTMEM_HOME`, by default in the user's data directory; made if it is not there."""
    named = os.environ.get("LATENTMEM_HOME") or platformdirs.user_data_dir("latentmem")
    home = Path(os.path.expanduser(named))  # noqa: PTH111 - Path's raises for an unknown user
    try:
        home.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"memories can not be kept in {home}: it is no folder. Set LATENTMEM_HOME to one.") from None
    return home


def opened() -> Store:
    """The store of this computer."""
    return Store(home() / "store", timeout=TIMEOUT)
