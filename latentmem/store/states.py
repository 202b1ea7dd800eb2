"""The memory at a version: put together from a snapshot and the changes behind it, and taken apart into objects.

version   0 snapshot ── 1 delta ── 2 pin ── 3 delta ── ... ── 16 snapshot
state     of 3: the snapshot of 0, the updates of 1, the pin of 2, the updates of 3
"""

from __future__ import annotations

import platform
import weakref
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentmem import longterm as longterms
from latentmem.coding.codec import coder_of, is_known, register
from latentmem.coding.coder import Coder
from latentmem.core import sources
from latentmem.core.memory import Memory, Update
from latentmem.errors import DamagedError
from latentmem.files import snapshot
from latentmem.longterm.blocks import BLOCK, Block
from latentmem.longterm.longterm import LongTerm
from latentmem.longterm.updates import UpdateArchive
from latentmem.store import delta
from latentmem.store.account import Account, SourceAccount
from latentmem.store.books import Books
from latentmem.store.cache import Cache
from latentmem.store.delta import Chain
from latentmem.store.journal import KINDS, Journal, Row
from latentmem.store.objects import Objects
from latentmem.version import __version__
from latentmem.written import Written

SAME = (  # of a memory and its account
    *("settings", "L", "M", "d", "updates", "tokens", "half_life"),
    *("model", "model_name", "adapters", "tokenizer", "dtype"),
)


class State(NamedTuple):
    """The memory at a version, and how many deltas stand between it and the snapshot before it."""

    memory: Memory
    deltas: int


class States:
    """The states of all versions of a store.

    Args:
        cache: keeps states that were read.
        snapshot_every: deltas after which a snapshot is due.
    """

    def __init__(self, journal: Journal, objects: Objects, books: Books, cache: Cache, snapshot_every: int) -> None:
        self._journal, self._objects, self._books = journal, objects, books
        self.cache, self.snapshot_every = cache, snapshot_every
        self._block_names: weakref.WeakKeyDictionary[Block, str] = weakref.WeakKeyDictionary()
        self._blocks: weakref.WeakValueDictionary[str, Block] = weakref.WeakValueDictionary()
        self._places: weakref.WeakKeyDictionary[Written, tuple[str, int]] = weakref.WeakKeyDictionary()
        self._updates: weakref.WeakValueDictionary[tuple[str, int], Written] = weakref.WeakValueDictionary()
        self._sizes: dict[str, int] = {}  # of objects that are parts of snapshots

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
            self.keep(row.id, memory)
        return memory

    def keep(self, version: int, memory: Memory) -> None:
        """Keep the memory at a version in the cache."""
        memory = plain(memory)
        self.cache.put(version, memory, size(memory))

    def _path(self, row: Row, cached: bool) -> tuple[list[Row], Memory | None]:
        """The rows from a version back to a snapshot, or to one that is in the cache; and that."""
        path: list[Row] = []
        with self._journal.one_look():
            for here in self._journal.lineage(self._journal.row(row.id)):
                memory = self.cache.get(here.id) if cached else None
                if memory is not None:
                    return path, memory
                if here.kind == "pruned":
                    raise self._books.was_pruned(here)
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
        memory = snapshot.from_bytes(data, f"the object {row.object}", verified=True, parts=self)
        for name in snapshot.coder_of(memory.coder):
            if not is_known(name):
                register(Coder.from_bytes(self._objects.get(name), f"the object {name}"))
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
            name = row.object or ""
            data = self._objects.get(name)
            self._sizes[name] = len(data)
            for i, update in enumerate(delta.from_bytes(data, f"the object {name}")):
                if update.written is not None:
                    update = replace(update, written=self._named(update.written, name, i))
                chain.update(update)
        else:
            chain.change(lambda memory: after_event(row, memory))

    # --- parts of snapshots that are objects of their own ------------------------------------------------------------

    def block(self, name: str) -> Block:
        """A block of a long-term memory; its slots stay on the disk where the objects are on one."""
        block = self._blocks.get(name)
        if block is None:
            data = self._objects.get(name)
            block = snapshot.block_from_bytes(data, f"the object {name}")
            self._blocks[name], self._block_names[block], self._sizes[name] = block, name, len(data)
        return block

    def updates(self, name: str) -> list[Written]:
        """The coded updates of an object; those that some memory has already are the same."""
        data = self._objects.get(name)
        written = delta.written_from_bytes(data, f"the object {name}")
        self._sizes[name] = len(data)
        return [self._named(one, name, i) for i, one in enumerate(written)]

    def _named(self, written: Written, name: str, i: int) -> Written:
        """An update at a place of an object, as some memory has it already."""
        one = self._updates.setdefault((name, i), written)
        self._places[one] = name, i
        return one

    def put_block(self, block: Block) -> str:
        """Make a full block an object; gives its name."""
        name = self._block_names.get(block, "")
        if not name or name not in self._objects:
            data = snapshot.block_to_bytes(block)
            name = self._objects.put(data)
            self._blocks[name], self._block_names[block], self._sizes[name] = block, name, len(data)
        return name

    def put_updates(self, written: Sequence[Written]) -> list[tuple[str, int]]:
        """Make updates that are in no object one for each source, so that a forgotten source leaves nothing behind.

        Returns:
            Of each update its object, and its place there.
        """
        names = {self._places[one][0] for one in written if one in self._places}
        there = {name for name in names if name in self._objects}
        fresh = [one for one in written if one not in self._places or self._places[one][0] not in there]
        by_source: dict[str, list[Written]] = {}
        for one in fresh:
            by_source.setdefault(one.source, []).append(one)
        for own in by_source.values():
            self._put_named(delta.written_to_bytes(own, [0] * len(own)), own)
        return [self._places[one] for one in written]

    def _put_named(self, data: bytes, written: Sequence[Written]) -> str:
        """Put an object of these updates; gives its name."""
        name = self._objects.put(data)
        self._sizes[name] = len(data)
        for i, one in enumerate(written):
            self._updates[name, i], self._places[one] = one, (name, i)
        return name

    def _put_coder(self, identity: str) -> None:
        for name in snapshot.coder_of(identity):
            coder = coder_of(name)
            self._sizes[name] = coder.file[1]
            if name not in self._objects:
                self._objects.put(coder.to_bytes())

    def put(self, row: Row, content: Sequence[Update] | Memory) -> Row:
        """Write the object of a version, a delta or the snapshot of a memory; whoever calls holds the objects.

        Full blocks of a long-term memory, coded updates and their coder are objects of their own, which versions share.

        Returns:
            The row, which names the object.
        """
        if not isinstance(content, Memory):
            written = [update.written for update in content if update.written is not None]
            data = delta.to_bytes(list(content))
            return replace(row, kind="delta", object=self._put_named(data, written), bytes=len(data))
        self._put_coder(content.coder)
        writer = _Parts(self)
        data = snapshot.to_bytes(content, writer)
        parts = {name: self._sizes[name] for name in writer.names | snapshot.coder_of(content.coder)}
        facts = row.facts | ({"blocks": parts} if parts else {})
        if snapshot.coder_of(content.coder):
            facts |= {"coder": content.coder}
        return replace(row, kind="snapshot", object=self._objects.put(data), bytes=len(data), facts=facts)

    def build(self, row: Row, content: Sequence[Update] | Memory) -> Row:
        """`put` for a replay or pruning, whose row comes later: until `Journal.built` no sweep takes the objects."""
        self._journal.needs_sweep()  # a crash may come before the journal knows them
        written = self.put(row, content)
        for name in written.objects:
            self._journal.build(row.memory, name)
        return written

    def state(self, row: Row) -> State:
        """The memory at a version with its deltas; no more are counted than matter."""
        memory = self.memory(row)
        return State(memory, self._journal.deltas(row, self.due(memory)))

    @property
    def nbytes(self) -> int:
        """Bytes of the memories that are open; see `Cache`."""
        return self.cache.bytes

    def due(self, memory: Memory) -> int:
        """Deltas after which a snapshot is due.

        One of coded updates names all of them, so it comes the later the more there are: together they stay small.
        """
        return max(self.snapshot_every, len(memory.written) // 16)


class _Parts:
    """A `snapshot.Writer` that notes which objects a snapshot refers to."""

    def __init__(self, states: States) -> None:
        self._states, self.names = states, set[str]()

    def put_block(self, block: Block) -> str:
        name = self._states.put_block(block)
        self.names.add(name)
        return name

    def put_updates(self, updates: Sequence[Written]) -> list[tuple[str, int]]:
        places = self._states.put_updates(updates)
        self.names.update(name for name, _ in places)
        return places


def size(memory: Memory) -> int:
    """Bytes of a memory's tensors without coded updates; of a long-term part those that it shares with nobody yet."""
    longterm = longterms.of(memory)
    ranges = longterm.ranges[-1:] if isinstance(longterm, LongTerm) else ()
    tail = sum(part.stored.slots.nbytes for part in ranges if not part.sealed)
    tables = (memory.slots, memory.births, memory.origins)
    return tail + sum(table.nbytes if table.stride(0) else table[:1].nbytes for table in tables)


def largest(memory: Memory) -> int:
    """A `size` that no memory of these settings exceeds: N slots, and a block of the long-term part."""
    if memory.settings.by_update:  # whose snapshot holds no update
        return 1 << 62
    return memory.L * (memory.N + BLOCK) * (memory.d * memory.slots.itemsize + 8)


def plain(memory: Memory) -> Memory:
    """A memory as the store keeps it: its lineage is in the journal, and tables of equal layers are kept once."""
    if memory.version or memory.parent:
        memory = replace(memory, version="", parent="")
    if not memory.settings.by_update:
        return memory
    tables = [memory.slots, memory.births, memory.origins]
    slots, births, origins = once = [_once(table) for table in tables]
    same = all(a is b for a, b in zip(once, tables, strict=True))
    return memory if same else replace(memory, slots=slots, births=births, origins=origins)


def _once(table: Tensor) -> Tensor:
    """A table [L, ...] of equal layers as views of one layer; before the first drop all layers are equal."""
    if not table.numel() or not table.stride(0) or not bool((table == table[:1]).all()):
        return table
    return table[:1].clone().expand_as(table)


def after_event(row: Row, memory: Memory) -> Memory:
    """A memory after an event without a text."""
    if row.event in ("pin", "unpin"):
        return sources.pin(memory, row.payload["source"], row.event == "pin")
    if row.event in ("forget", "expire"):
        return sources.forget(memory, row.payload["source"])
    return memory


def _snapshot_size(memory: Memory) -> int:
    """Bytes that a snapshot takes, about; of coded updates it holds one bit for each slot, and a line for each."""
    if memory.settings.by_update:
        return memory.L * _slots_written(memory) // 8 + 250 * len(memory.written) + 1000
    longterm = longterms.of(memory)
    return memory.slots.nbytes + (longterm.nbytes if longterm is not None else 0)


def _slots_written(memory: Memory) -> int:
    """Slots of all coded updates of a memory; those that its archive keeps are counted there."""
    archive = longterms.of(memory)
    counted, first = (archive.slots, archive.first) if isinstance(archive, UpdateArchive) else (0, memory.updates + 1)
    older = takewhile(lambda one: one[0] < first, memory.written.items())
    return counted + sum(len(one) for _, one in older)


def facts(memory: Memory) -> dict[str, Any]:
    """With what a version was computed, how full it is, what it keeps, and about how many bytes a snapshot takes."""
    return {
        "M": memory.M,
        "N": memory.N,
        "form": memory.settings.form or "exact",
        "order": memory.reading_order,
        "longterm": None if memory.settings.longterm is None else asdict(memory.settings.longterm),
        "size": _snapshot_size(memory),
        **({"shares": True} if memory.settings.by_update else {}),
        "model": memory.model_name,
        "dtype": memory.dtype,
        "device": memory.slots.device.type,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "latentmem": __version__,
    }


def account_of(memory: Memory) -> Account:
    """A memory in numbers."""
    archive = longterms.of(memory)
    stored = _stored(memory).double()
    sources = tuple(
        SourceAccount(
            *(one.name, one.tokens, one.slots, one.pinned),
            tuple(slots),
            archived.mean().item() if memory.L else 0.0,
        )
        for one, slots, archived in zip(memory.sources, memory.slots_left().tolist(), stored, strict=True)
    )
    same = {name: getattr(memory, name) for name in SAME}
    return Account(
        **same,
        sources=sources,
        older=tuple((memory.origins < 0).sum(1).tolist()),
        stored=int(stored.sum(0).max()) if stored.numel() else 0,
        archive=archive.nbytes if archive is not None else 0,
        limit=archive.limit if archive is not None else 0,
        nbytes=memory.slots.nbytes + _bytes_written(memory),
    )


def _stored(memory: Memory) -> Tensor:
    """`longterm.stored`; while an archive of coded updates keeps all of them, their number does not matter."""
    archive = longterms.of(memory)
    if not isinstance(archive, UpdateArchive) or archive.first > 1:
        return longterms.stored(memory)
    slots = torch.tensor([source.slots for source in memory.sources], dtype=torch.long)
    return slots[:, None] - memory.slots_left()


def _bytes_written(memory: Memory) -> int:
    """Bytes of all coded updates of a memory; those that its archive keeps are counted there."""
    archive = longterms.of(memory)
    counted, first = (archive.nbytes, archive.first) if isinstance(archive, UpdateArchive) else (0, memory.updates + 1)
    return counted + sum(one.nbytes for _, one in takewhile(lambda item: item[0] < first, memory.written.items()))
