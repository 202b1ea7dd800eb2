"""The memory at a version: put together from a snapshot and the changes behind it, and taken apart into objects.

version   0 snapshot ── 1 delta ── 2 pin ── 3 delta ── ... ── 16 snapshot
state     of 3: the snapshot of 0, the updates of 1, the pin of 2, the updates of 3
"""

from __future__ import annotations

import platform
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import transformers

from latentmem import longterm as longterms
from latentmem.core import sources
from latentmem.core.memory import Memory
from latentmem.errors import DamagedError, NotFoundError
from latentmem.files import snapshot
from latentmem.longterm.blocks import BLOCK, Block
from latentmem.store import delta
from latentmem.store.delta import Chain
from latentmem.store.journal import KINDS, Journal, Row
from latentmem.store.objects import Objects
from latentmem.version import __version__


class State(NamedTuple):
    """The memory at a version, and how many deltas stand between it and the snapshot before it."""

    memory: Memory
    deltas: int


class States:
    """The states of all versions of a store.

    Args:
        snapshot_every: deltas after which a snapshot is due.
        cache_bytes: states that were read are kept up to this size.
    """

    def __init__(self, journal: Journal, objects: Objects, snapshot_every: int, cache_bytes: int) -> None:
        self._journal, self._objects, self.snapshot_every = journal, objects, snapshot_every
        self.cache = Cache(cache_bytes)
        self._block_names: weakref.WeakKeyDictionary[Block, tuple[str, int]] = weakref.WeakKeyDictionary()
        self._blocks: weakref.WeakValueDictionary[str, Block] = weakref.WeakValueDictionary()

    def memory(self, row: Row, *, cached: bool = True) -> Memory:
        """The memory at a version that waits for nothing; it is read again where somebody prunes meanwhile.

        Raises:
            ValueError: an object is missing or damaged, or the version is gone.
        """
        while True:
            path, start = self._path(row, cached)
            try:
                memory = self._along(path, start)
                break
            except DamagedError:
                if not self._changed(path):
                    raise
        if path and cached:
            self.cache.put(row.id, memory)
        return memory

    def _path(self, row: Row, cached: bool) -> tuple[list[Row], Memory | None]:
        """The rows from a version back to a snapshot, or to one that is in the cache; and that."""
        path: list[Row] = []
        with self._journal.one_look():
            for here in self._journal.lineage(self._journal.row(row.id)):
                memory = self.cache.get(here.id) if cached else None
                if memory is not None:
                    return path, memory
                if here.kind == "pruned":
                    raise self._was_pruned(here)
                path.append(here)
                if here.kind == "snapshot":
                    return path, None
        raise ValueError(f"version {path[-1].seq} has no snapshot and nothing that it was made from.")

    def _along(self, path: list[Row], start: Memory | None) -> Memory:
        """The memory at the first row of a path."""
        if start is not None and not path:
            return start
        chain = Chain(self._snapshot(path[-1]) if start is None else start, mapped=start is None)
        for following in reversed(path):
            self._follow(following, chain)
        return plain(chain.memory())

    def _changed(self, path: list[Row]) -> bool:
        """Whether somebody has pruned or rewritten versions of a path meanwhile."""
        with self._journal.one_look():
            return any(not self._journal.exists(row.id) or self._journal.row(row.id) != row for row in path)

    def _snapshot(self, row: Row) -> Memory:
        data = self._objects.get(row.object or "")
        memory = snapshot.from_bytes(data, f"the object {row.object}", verified=True, block=self._block)
        return replace(memory, births=memory.births.clone(), origins=memory.origins.clone())

    def _follow(self, row: Row, chain: Chain) -> None:
        """Go on from the state of a version's base to its own."""
        if row.kind not in KINDS:
            raise ValueError(
                f"version {row.seq} is kept as {row.kind!r}, which this version does not read. Update latentmem."
            )
        if row.state == "failed" or row.kind == "snapshot":
            return
        if row.kind == "delta":
            for update in delta.from_bytes(self._objects.get(row.object or ""), f"the object {row.object}"):
                chain.update(update)
        else:
            chain.change(lambda memory: after_event(row, memory))

    def _block(self, name: str) -> Block:
        """A block of a long-term memory; its slots stay on the disk where the objects are on one."""
        block = self._blocks.get(name)
        if block is None:
            data = self._objects.get(name)
            block = snapshot.block_from_bytes(data, f"the object {name}")
            self._blocks[name], self._block_names[block] = block, (name, len(data))
        return block

    def put(self, row: Row, content: bytes | Memory) -> Row:
        """Write the object of a version, a delta or the snapshot of a memory; whoever calls holds the objects.

        Full blocks of a long-term memory become objects of their own, which versions share.

        Returns:
            The row, which names the object.
        """
        if isinstance(content, bytes):
            return replace(row, kind="delta", object=self._objects.put(content), bytes=len(content))
        blocks: dict[str, int] = {}

        def put_block(block: Block) -> str:
            name, size = self._block_names.get(block, ("", 0))
            if not name or name not in self._objects:
                data = snapshot.block_to_bytes(block)
                name, size = self._objects.put(data), len(data)
                self._block_names[block] = (name, size)
                self._blocks[name] = block
            blocks[name] = size
            return name

        data = snapshot.to_bytes(content, put_block)
        facts = row.facts | ({"blocks": blocks} if blocks else {})
        return replace(row, kind="snapshot", object=self._objects.put(data), bytes=len(data), facts=facts)

    def state(self, row: Row) -> State:
        """The memory at a version with its deltas; no more are counted than matter."""
        count = 0
        for here in self._journal.lineage(row):
            if here.kind == "snapshot" or count == self.snapshot_every:
                break
            count += here.kind == "delta"
        return State(self.memory(row), count)

    # --- what waits -------------------------------------------------------------------------------------------------

    def waits(self, row: Row) -> bool:
        """Whether a version is pending, or made from one that is."""
        if row.state != "pending" and not self._journal.pending(row.memory):
            return False
        for here in self._journal.lineage(row):
            if here.state == "pending" or here.kind == "snapshot":
                return here.state == "pending"
        return False

    def ready(self, row: Row) -> Row:
        """The row of a version; a ValueError if it waits, a NotFoundError if it was pruned."""
        if row.pruned:
            raise self._was_pruned(row)
        if self.waits(row):
            name = self._journal.name(row.memory)
            raise ValueError(
                f"version {row.seq} of {name!r} waits for writes that are acknowledged and not applied yet; `apply` "
                f"does it, or give the model to `open`."
            )
        return row

    def _was_pruned(self, row: Row) -> NotFoundError:
        name = self._journal.name(row.memory)
        return NotFoundError(
            f"version {row.seq} of {name!r} was pruned: its text is in the history, its slots are gone. The history "
            f"says which versions are left."
        )


class Cache:
    """The memories that were used last, up to a number of bytes; memories are immutable, so they can be shared."""

    def __init__(self, limit: int) -> None:
        self._limit, self.bytes, self._lock = limit, 0, threading.Lock()
        self._memories: OrderedDict[int, Memory] = OrderedDict()

    def get(self, version: int) -> Memory | None:
        with self._lock:
            if version in self._memories:
                self._memories.move_to_end(version)
            return self._memories.get(version)

    def put(self, version: int, memory: Memory) -> None:
        with self._lock:
            if version not in self._memories:
                self.bytes += size(memory)
                self._memories[version] = memory
            while self.bytes > self._limit:
                self.bytes -= size(self._memories.popitem(last=False)[1])

    def discard(self, versions: Iterable[int]) -> None:
        with self._lock:
            for version in versions:
                if version in self._memories:
                    self.bytes -= size(self._memories.pop(version))

    def clear(self) -> None:
        with self._lock:
            self._memories.clear()
            self.bytes = 0


def size(memory: Memory) -> int:
    """Bytes of a memory's tensors; of its long-term part those that it does not share with others yet."""
    longterm = longterms.of(memory)
    ranges = longterm.ranges[-1:] if longterm is not None else ()
    tail = sum(part.stored.slots.nbytes for part in ranges if not part.sealed)
    return tail + sum(t.numel() * t.element_size() for t in (memory.slots, memory.births, memory.origins))


def largest(memory: Memory) -> int:
    """A `size` that no memory of these settings exceeds: N slots, and a block of the long-term part."""
    return memory.L * (memory.N + BLOCK) * (memory.d * memory.slots.itemsize + 8)


def plain(memory: Memory) -> Memory:
    """A memory as the store keeps it: its lineage is in the journal, not in the value."""
    return replace(memory, version="", parent="") if memory.version or memory.parent else memory


def after_event(row: Row, memory: Memory) -> Memory:
    """A memory after an event without a text."""
    if row.event in ("pin", "unpin"):
        return sources.pin(memory, row.payload["source"], row.event == "pin")
    if row.event in ("forget", "expire"):
        return sources.forget(memory, row.payload["source"])
    return memory


def facts(memory: Memory) -> dict[str, Any]:
    """With what a version was computed, how full it is, and about how many bytes a snapshot of it takes."""
    longterm = longterms.of(memory)
    return {
        "M": memory.M,
        "N": memory.N,
        "size": memory.slots.nbytes + (longterm.nbytes if longterm is not None else 0),
        "model": memory.model_name,
        "dtype": str(memory.slots.dtype)[6:],
        "device": memory.slots.device.type,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "latentmem": __version__,
    }
