"""Locks between the threads and processes that use a store.

Always taken in this order: the turns of a memory's conversation, the memory, the objects (from the writing of one to
the commit of the row that names it), the database's own. Each but the last is a file in `locks/`, beside it who holds
it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from latentmem.errors import InUseError, NotFoundError
from latentmem.store.journal import Journal

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


def check_name(name: str) -> None:
    """A ValueError if this can not be a memory's name."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} can not be a memory's name: use letters, digits, '_' and '-', and no path.")


class Locks:
    """The locks of one store.

    Args:
        folder: where the lock files are.
        journal: knows the memories.
        timeout: seconds to wait for a lock; then an InUseError says who holds it.
    """

    def __init__(self, folder: Path, journal: Journal, timeout: float) -> None:
        self._folder, self._journal, self._timeout = folder, journal, timeout

    @contextlib.contextmanager
    def memory(self, name: str) -> Iterator[int]:
        """Hold a memory alone while it is changed; gives its id."""
        memory = self._journal.id(name)
        with self._held(memory, f"the memory {name!r}"):
            if self._journal.find(name) != memory:
                raise NotFoundError(f"the memory {name!r} was deleted meanwhile.")
            yield memory

    def objects(self) -> AbstractContextManager[None]:
        """Hold the objects alone, from the writing of one to the row that names it."""
        return self._held("objects", "the store")

    @contextlib.contextmanager
    def family(self, name: str) -> Iterator[list[int]]:
        """Hold a memory and all that forks connect with it; gives the ids.

        A fork takes the lock of its base, so the family can only have grown until it is held; then it is taken anew.
        """
        with contextlib.ExitStack() as stack:
            held: list[int] = []
            while (family := self._journal.family(self._journal.id(name))) != held:
                stack.close()
                names = {memory: name for name, memory in self._journal.names().items()}
                for memory in family:
                    stack.enter_context(self._held(memory, f"the memory {names.get(memory)!r}"))
                held = family
            yield family

    @contextlib.contextmanager
    def if_free(self, key: int | str) -> Iterator[bool]:
        """Hold a memory, or "objects", if nobody else does; gives whether."""
        try:
            with FileLock(self._path(key), timeout=0):
                yield True
        except Timeout:
            yield False

    def tidy(self) -> None:
        """Remove the lock files of memories that are deleted."""
        files = list(self._folder.iterdir())  # before the names: a memory is there before its lock
        there = {"objects", *map(str, self._journal.names().values())}
        for file in files:
            if file.stem.partition("-")[0] not in there:
                file.unlink()

    def _path(self, key: int | str) -> Path:
        return self._folder / f"{key}.lock"

    @contextlib.contextmanager
    def _held(self, key: int | str, what: str) -> Iterator[None]:
        owner = self._path(key).with_suffix(".owner")
        try:
            with FileLock(self._path(key), timeout=self._timeout):
                owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
                yield
        except Timeout:
            holder = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
            raise InUseError(
                f"{holder} is changing {what}, and did so for {self._timeout:g} seconds; try again later.",
                "the memory is in use by another process; try again later.",
            ) from None
