"""The memories that a store has opened last."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from latentmem.written import Written

if TYPE_CHECKING:
    from latentmem.core.memory import Memory


class Cache:
    """The memories that were used last, up to a number of bytes; memories are immutable, so they can be shared.

    A coded update that several of them hold counts once.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self.bytes, self._lock = limit, 0, threading.Lock()
        self._memories: OrderedDict[int, Memory] = OrderedDict()
        self._sizes: dict[int, int] = {}  # of these memories, without their coded updates
        self._holders: Counter[Written] = Counter()  # how many of these memories hold a coded update

    def get(self, version: int) -> Memory | None:
        with self._lock:
            if version in self._memories:
                self._memories.move_to_end(version)
            return self._memories.get(version)

    def put(self, version: int, memory: Memory, size: int) -> None:
        """Keep a memory, `size` bytes without its coded updates."""
        with self._lock:
            if version not in self._memories:
                self._memories[version], self._sizes[version] = memory, size
                self.bytes += size
                for one in memory.written.values():
                    self.bytes += 0 if self._holders[one] else one.nbytes
                    self._holders[one] += 1
            while self.bytes > self._limit:
                self._remove(next(iter(self._memories)))

    def _remove(self, version: int) -> None:
        memory = self._memories.pop(version)
        self.bytes -= self._sizes.pop(version)
        for one in memory.written.values():
            self._holders[one] -= 1
            if not self._holders[one]:
                self.bytes -= one.nbytes
                del self._holders[one]

    def discard(self, versions: Iterable[int]) -> None:
        with self._lock:
            for version in versions:
                if version in self._memories:
                    self._remove(version)

    def clear(self) -> None:
        with self._lock:
            self._memories.clear()
            self._sizes.clear()
            self._holders.clear()
            self.bytes = 0
