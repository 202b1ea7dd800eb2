"""Threads that wait take no cores from the one that computes."""

from __future__ import annotations

import contextlib
import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def _pauses() -> list[Any]:
    """Of each GNU OpenMP that torch computes with on a CPU under Linux: what ends a thread's helpers."""
    torch_folder, pauses = Path(torch.__file__).parent, []
    for path in (*torch_folder.glob("lib/libgomp*.so*"), *torch_folder.parent.glob("torch.libs/libgomp*.so*")):
        with contextlib.suppress(OSError, AttributeError):  # not Linux, not loaded, or older than OpenMP 5
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            pauses.append(library.omp_pause_resource_all)
    return pauses


def release_threads() -> None:
    """End the helpers with which this thread computes; they come back when it computes again.

    Each thread that computes has helpers of its own. If there are more of them than cores, GNU OpenMP puts them to
    sleep after every loop, and a thread that generates beside one that only waits is much slower.
    """
    for pause in _pauses():
        pause(2)  # omp_pause_hard; it changes nothing if this thread has no helpers
