"""Removing old versions: their tensors go, their rows stay, with texts, keys and sources.

versions    0 create ── 1 delta ──── 2 snapshot ── 3 delta ────── 4 delta ── 5 pin
keep=1      0 create ── 1 (pruned) ─ 2 (pruned) ── 3 (pruned) ─── 4 snapshot ── 5 pin

These versions stay: the beginning, which the journal can not compute; those that were asked for; those that a fork goes
on from; and the one that a version without tensors stands for: a pin, a rollback, a write that waits or has failed.
A delta whose base is pruned becomes a snapshot. Where that takes more room than the objects before it, these objects
stay instead, under versions that can not be opened any more.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from latentmem.store.cache import Cache
from latentmem.store.journal import Journal, Row
from latentmem.store.locks import Locks
from latentmem.store.sweeping import Sweeper

if TYPE_CHECKING:
    from latentmem.store.states import States

Rows = dict[int, Row]  # id -> version of one memory, oldest first
_known: WeakKeyDictionary[Journal, dict[int, tuple[tuple[int, int], int]]] = WeakKeyDictionary()  # see `prunable`


@dataclass(frozen=True)
class Pruned:
    """The versions that pruning has removed, or would remove.

    Args:
        versions: numbers of the versions that can not be opened any more, oldest first.
        bytes: freed on the disk, less what new snapshots take; an estimate where nothing was removed yet.
    """

    versions: list[int]
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What to do with the versions of a memory.

    Args:
        pruned: ids of versions that can not be opened any more.
        snapshots: ids of deltas that become snapshots.
        empty: ids of versions whose objects go.
        bytes: freed by that; an estimate, because the snapshots are not written yet.
    """

    pruned: list[int]
    snapshots: list[int]
    empty: list[int]
    bytes: int


class Pruner:
    """Prunes the memories of one store.

    Args:
        states: opens memories, where one becomes a snapshot.
    """

    def __init__(
        self, journal: Journal, states: Callable[[], States], cache: Cache, locks: Locks, sweeper: Sweeper
    ) -> None:
        self._journal, self._states, self._cache, self._locks, self._sweeper = journal, states, cache, locks, sweeper

    def prune(self, name: str, keep: int | None, older_than: float | None, dry_run: bool) -> Pruned:
        """`Store.prune`."""
        if (keep is None) == (older_than is None):
            raise ValueError(f"give either keep or older_than, got {keep} and {older_than}.")
        if keep is not None and keep < 1:
            raise ValueError(f"the newest version always stays: keep must be 1 or more, got {keep}.")
        if older_than is not None and not older_than >= 0:
            raise ValueError(f"older_than must be 0 or more seconds, got {older_than}.")
        since = None if older_than is None else time.time() - older_than
        try:
            with self._locks.memory(name) as memory:
                rows = outline(self._journal, memory)
                todo = plan(rows, self._journal.fork_bases(memory), keep, since)
                change = not dry_run and bool(todo.pruned or todo.empty)
                freed = self._carry_out(memory, todo) if change else todo.bytes
                return Pruned([rows[id].seq for id in todo.pruned], freed)
        finally:
            if not dry_run:
                self._sweeper.sweep_objects()

    def _carry_out(self, memory: int, todo: Plan) -> int:
        """Do what is planned, up to the sweep; gives the bytes that are freed."""
        snapshots = [self._put_snapshot(self._journal.row(id)) for id in todo.snapshots]
        with self._journal.transaction():
            before = self._journal.bytes()
            for row in snapshots:
                self._journal.change(row)
            self._journal.prune(todo.pruned, todo.empty)
            self._journal.built(memory)
            self._journal.needs_sweep()
            freed = before - self._journal.bytes()
        self._cache.discard(todo.pruned)
        return freed

    def _put_snapshot(self, row: Row) -> Row:
        """The row of a delta with a snapshot in its place, which is on disk and which no sweep takes."""
        content = self._states().memory(row)
        with self._locks.objects():
            return self._states().build(replace(row, kind="none", object=None, bytes=0), content)


def outline(journal: Journal, memory: int) -> Rows:
    """The versions of a memory, without their texts."""
    return {row.id: row for row in journal.outline(memory)}


def prunable(journal: Journal, memory: int) -> int:
    """Bytes that pruning a memory to its newest version frees, about; its versions are read after a change only."""
    stamp, known = journal.stamp, _known.setdefault(journal, {})
    if memory not in known or known[memory][0] != stamp:
        rows = outline(journal, memory)
        freed = max(0, plan(rows, journal.fork_bases(memory), 1, None).bytes) if rows else 0
        known[memory] = stamp, freed
    return known[memory][1]


def plan(rows: Rows, forked: Iterable[int], keep: int | None, since: float | None) -> Plan:
    """What goes and what stays.

    Args:
        forked: ids of versions that forks go on from.
        keep: so many of the newest versions stay, at least one.
        since: versions from this time on stay, in seconds since 1970, and the newest.
    """
    ids = list(rows)
    asked = ids[-keep:] if keep is not None else [id for id in ids if since is None or rows[id].time >= since]
    waiting = [id for id in ids if rows[id].state == "pending"]
    kept = {id for id in (ids[0], *forked, *asked, *waiting, ids[-1]) if not rows[id].pruned}
    deltas = {id for id in ids if rows[id].kind == "delta"}
    open_ = _with_bases(rows, kept, deltas)
    snapshots, remaining = _cheapest(rows, kept, {id for id in open_ & deltas if rows[id].base not in open_})
    needed = _with_bases(rows, kept, snapshots)
    return Plan(
        pruned=[id for id in ids if id not in open_ and not rows[id].pruned],
        snapshots=sorted(snapshots),
        empty=[id for id in ids if id not in needed and rows[id].kind != "pruned"],
        bytes=sum(_objects(rows.values()).values()) - remaining,
    )


def _cheapest(rows: Rows, kept: Collection[int], snapshots: set[int]) -> tuple[set[int], int]:
    """Those of the snapshots that take no more room than the objects before them, and the bytes of all that stays."""
    needed, sizes = _with_bases(rows, kept, snapshots), dict[str, int]()
    uses: Counter[str] = Counter()  # of an object that stays

    def use(objects: dict[str, int]) -> None:
        sizes.update(objects)
        uses.update(objects.keys())

    for id in needed:
        use(_as_if_written(rows, id) if id in snapshots else _objects([rows[id]]))
    for id in sorted(snapshots):
        new = _as_if_written(rows, id)
        before = _with_bases(rows, [rows[id].base], (), needed)
        uses.subtract(new.keys())
        freed = sum(new[name] for name in new if not uses[name])
        taken = sum(size for name, size in _objects(rows[one] for one in (id, *before)).items() if not uses[name])
        if taken < freed:
            snapshots = snapshots - {id}
            needed |= before
            for one in (id, *before):
                use(_objects([rows[one]]))
        else:
            uses.update(new.keys())
    return snapshots, sum(size for name, size in sizes.items() if uses[name])


def _with_bases(
    rows: Rows, starts: Iterable[int | None], snapshots: Collection[int], known: Collection[int] = ()
) -> set[int]:
    """Versions with all that they are made from, up to known ones, where `snapshots` are made from nothing."""
    needed: set[int] = set()
    for id in starts:
        while id is not None and id in rows and id not in needed and id not in known:
            needed.add(id)
            id = None if rows[id].kind == "snapshot" or id in snapshots else rows[id].base
    return needed


def _objects(rows: Iterable[Row]) -> dict[str, int]:
    """The objects of versions, name -> bytes."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes |= row.objects
    return sizes


def _as_if_written(rows: Rows, id: int) -> dict[str, int]:
    """The objects of a snapshot that is not written yet, about.

    It shares the blocks of the snapshot before it; one of coded updates all of them, too.
    """
    before = _with_bases(rows, [id], ())
    if rows[id].facts.get("shares"):
        shared = _objects(rows[one] for one in before if rows[one].kind == "delta")
        return shared | rows[min(before)].parts | {f"snapshot of {id}": rows[id].facts["size"]}
    blocks = rows[min(before)].parts
    known = rows[id].facts.get("size")
    size = known if known is not None else sum(_objects(rows[one] for one in before).values())
    return blocks | {f"snapshot of {id}": max(0, size - sum(blocks.values()))}
