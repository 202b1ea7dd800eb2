"""What a store knows and changes by its journal alone: no memory is opened, and no torch imported."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem.disk import Disk
from latentmem.errors import DamagedError, InUseError, NotFoundError
from latentmem.store import views
from latentmem.store.account import Account
from latentmem.store.books import Books, of_source
from latentmem.store.cache import Cache
from latentmem.store.contents import payload
from latentmem.store.journal import LATEST, Journal, Row
from latentmem.store.locks import Locks, check_name
from latentmem.store.objects import objects_at
from latentmem.store.pruning import Pruned, Pruner
from latentmem.store.sweeping import Sweeper
from latentmem.store.views import Change, Overview, SourceStats, Version

if TYPE_CHECKING:
    from latentmem.core.memory import Memory
    from latentmem.store.states import States


TRIES = 8  # of who reads the newest version, while versions are numbered anew


class Catalog(ABC):
    """The memories of a store, by the journal; `Store` opens and writes them."""

    def __init__(
        self,
        path: str | Path,
        *,
        objects: str | Path | None = None,
        snapshot_every: int = 16,
        cache_bytes: int = 1 << 30,
        timeout: float = 60,
        disk: Disk | None = None,
    ) -> None:
        if snapshot_every < 1:
            raise ValueError(f"snapshot_every must be 1 or more, got {snapshot_every}.")
        self.path, self.timeout, self.snapshot_every = Path(path), timeout, snapshot_every
        disk = disk or Disk()
        (self.path / "locks").mkdir(parents=True, exist_ok=True)
        disk.sync_folder(self.path.parent)
        self._journal = Journal(self.path / "store.db", timeout)
        place = self._journal.setting("objects", str(objects or ""))
        self._objects = objects_at(objects or place or self.path / "objects", disk)
        self._locks = Locks(self.path / "locks", self._journal, timeout)
        self._books = Books(self._journal, self._computed)
        self._cache, self._making = Cache(cache_bytes), threading.Lock()  # of what opens memories
        self._sweeper = Sweeper(self._journal, self._objects, self._locks)
        self._pruner = Pruner(self._journal, lambda: self._states, self._cache, self._locks, self._sweeper)
        self._acknowledge_turns()
        self._sweeper.sweep_if_due()

    def _acknowledge_turns(self) -> None:
        """Take over what an earlier commit kept of a chat that was cut off: as a write that waits."""
        if not self._journal.has_turns():
            return
        with self._journal.transaction():
            for memory, kept in self._journal.take_turns():
                row = self._journal.keyed(memory, kept["key"]) if kept["leaving"] else None
                there = kept["leaving"] if row is not None and row.state in ("applied", "pending") else 0
                if turns := kept["messages"][there:]:
                    body = payload(turns, kept["source"], None)
                    self._journal.append(Row(memory, "write", self._journal.head(memory).id, body, state="pending"))

    @property
    @abstractmethod
    def _states(self) -> States: ...

    @abstractmethod
    def _computed(self, row: Row) -> Account:
        """The account of a version whose memory is opened for it."""

    @abstractmethod
    def open(self, name: str, version: int | None = None) -> Memory:
        """A version of a memory, by default the newest; sources whose time is over are forgotten before."""

    def close(self) -> None:
        """Close the database; what was acknowledged is safe without it."""
        self._journal.close()

    # --- memories -----------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """All memories, by name."""
        return list(self._journal.names())

    def __contains__(self, name: str) -> bool:
        """Whether there is a memory of this name."""
        return self._journal.find(name) is not None

    def check_free(self, name: str) -> None:
        """A ValueError if this can not be a new memory's name."""
        check_name(name)
        self._journal.require_free(name)

    def overview(self, names: Collection[str] | None = None) -> list[Overview]:
        """The journal's numbers of memories, by default of all, by name; no memory is opened."""
        return views.overview(self._journal, names)

    def delete(self, name: str) -> None:
        """Delete a memory and all its versions for good, from the disk too.

        Raises:
            NotFoundError: no such memory.
            InUseError: others were forked from it.
        """
        with self._locks.memory(name) as memory:
            forks = self._journal.forks(memory)
            if forks:
                raise InUseError(
                    f"{', '.join(forks)} was forked from {name!r} and needs it; delete the fork first.",
                    f"memories that were forked from {name!r} need it; delete them first.",
                )
            with self._journal.transaction():
                self._journal.delete(memory)
                self._journal.keep_setting("sweep", "due")
        self.sweep()

    def fork(self, name: str, new: str, version: int | None = None) -> None:
        """Begin a memory that goes on from a version of another; nothing is copied.

        Raises:
            ValueError: no such memory or version, one that is not applied yet, or a new name that is taken.
        """
        check_name(new)
        with self._locks.memory(name) as memory, self._journal.transaction():
            base = self._books.ready(self._journal.version(name, version))
            first = self._journal.add(new, Row(0, "fork", base.id, {}))
            for source, at in self._journal.expiries(memory).items():
                self._journal.set_expiry(first.memory, source, at)

    def family(self, name: str) -> list[str]:
        """All memories that are connected with this one by forks, by name, itself among them."""
        return sorted(map(self._journal.name, self._journal.family(self._journal.id(name))))

    # --- versions -----------------------------------------------------------------------------------------------------

    def check_written(self, name: str, source: str) -> None:
        """A ValueError if no version of a memory or of those that forks connect with it wrote a source."""
        of_source(self._journal.rows(self._journal.family(self._journal.id(name))), source)

    def check_objects(self, name: str, version: int | None = None) -> None:
        """Verify all that a version of a memory is read from; a DamagedError names what is missing or damaged."""
        names = self._needed(name, version)
        for object in names:
            try:
                self._objects.check(object)
            except DamagedError:
                if names == self._needed(name, version):
                    raise
                return self.check_objects(name, version)  # others have changed the version meanwhile

    def _needed(self, name: str, version: int | None) -> list[str]:
        """The objects that a version of a memory is read from."""
        names: list[str] = []
        with self._journal.one_look():
            for row in self._journal.lineage(self._journal.version(name, version)):
                names += filter(None, (row.object, *row.facts.get("blocks", ())))
                if row.kind == "snapshot":
                    break
        return names

    def rollback(self, name: str, version: int) -> int:
        """Go to any version, older or newer; gives the new version, which can be undone too."""
        with self._locks.memory(name) as memory, self._journal.transaction():
            base = self._books.ready(self._journal.version(name, version))
            return self._journal.append(Row(memory, "rollback", base.id, {})).seq

    def undo(self, name: str) -> int:
        """Go back to the base of the newest version, one step further each time; gives the new version, a rollback.

        A rollback stands for the version that it went back to, so an undo after it goes on from there; to take a
        rollback or an undo back, roll back to the version before it.

        Raises:
            ValueError: the memory began like this, or the version before was pruned.
        """
        with self._locks.memory(name) as memory, self._journal.transaction():
            row = self._books.ready(self._journal.head(memory))
            while row.base is not None and (row.event == "rollback" or row.state == "failed"):
                row = self._journal.row(row.base)
            if row.base is None or row.event == "fork":
                raise ValueError(f"there is nothing to undo in the memory {name!r}: this is how it began.")
            base = self._books.ready(self._journal.row(row.base))
            return self._journal.append(Row(memory, "rollback", base.id, {})).seq

    def prune(
        self, name: str, *, keep: int | None = None, older_than: float | None = None, dry_run: bool = False
    ) -> Pruned:
        """Remove old versions: their slots go from the disk, their texts stay in the history.

        The newest version, the beginning and versions that forks or writes that wait go on from always stay. No text
        leaves the journal, so `rebuild`, `forget_by_replay` and idempotency keys work as before.

        Args:
            keep: so many of the newest versions stay.
            older_than: seconds; younger versions stay.
            dry_run: remove nothing.

        Raises:
            ValueError: neither of the two, both, or a number that is too small.
            OSError: the disk is full; nothing has changed.
        """
        return self._pruner.prune(name, keep, older_than, dry_run)

    def history(
        self, name: str, *, after: int | None = None, limit: int | None = None, newest_first: bool = False
    ) -> list[Version]:
        """The versions of a memory, by default all of them, oldest first.

        Args:
            after: only those behind this version, in the order that is asked for.
            limit: so many at most.
        """
        with self._journal.one_look():
            rows = self._journal.history(self._journal.id(name), after, limit, newest_first)
            return [views.version(self._journal, row) for row in rows]

    def version(self, name: str, version: int | None = None, *, key: str | None = None) -> Version:
        """One version of a memory, by default the newest, or the one that was written with an idempotency key.

        Raises:
            NotFoundError: no such memory, version or key.
        """
        with self._journal.one_look():
            if key is None:
                return views.version(self._journal, self._journal.version(name, version))
            row = self._journal.keyed(self._journal.id(name), key)
            if row is None:
                raise NotFoundError(f"{name!r} has no version with the key {key!r}.")
            return views.version(self._journal, row)

    def pending_count(self, name: str) -> int:
        """How many writes are acknowledged and not applied yet."""
        return len(self._journal.pending(self._journal.id(name)))

    def has_pending(self, name: str) -> bool:
        """Whether `apply` would change something: a write waits, or the time of a source is over."""
        return self._needs_apply(self._journal.id(name))

    def _needs_apply(self, memory: int) -> bool:
        return bool(self._journal.pending(memory) or self._books.expired(memory))

    def applied_version(self, name: str) -> int:
        """The newest version that can be opened without a model: neither it nor one that it is made from waits."""
        return self._applied(name).seq

    def _applied(self, name: str) -> Row:
        lineage = self._journal.lineage(self._journal.version(name))
        return next(row for row in lineage if row.base is None or not self._books.waits(row))

    # --- what a version holds -----------------------------------------------------------------------------------------

    def account(self, name: str, version: int | None = None) -> Account:
        """What a version of a memory holds, in numbers, as `open`; no memory is opened where the journal has them.

        Raises:
            ValueError: as `open`.
        """
        if version is None and self.has_pending(name):
            self.open(name)
        while True:
            row = self._journal.version(name, version)
            try:
                return self._books.account(self._books.ready(row))
            except ValueError:
                if self._stays(row, version):
                    raise

    def _stays(self, row: Row, version: int | None) -> bool:
        """Whether a row that was read is still there: a replay puts another in its place, and pruning takes it."""
        return self._journal.is_head(row) if version is None else self._journal.exists(row.id)

    def applied(self, name: str) -> tuple[int, Account]:
        """`applied_version` and its account, also while `forget_by_replay` numbers versions anew; errors as `open`."""
        for _ in range(TRIES):
            with self._journal.one_look():
                row = self._applied(name)
            try:
                return row.seq, self._books.account(row)
            except ValueError:
                if self._journal.exists(row.id):
                    raise
        raise InUseError(f"the versions of {name!r} are numbered anew; try again later.")

    def stats(self, name: str, ahead: Sequence[int] = (1, 10, 100), *, version: int | None = None) -> list[SourceStats]:
        """How much is left of each source of a version, by default the newest, and the forecast.

        Args:
            ahead: numbers of further updates of K slots that the forecast is for.
        """
        return self.stats_of(name, self.account(name, version), ahead)

    def stats_of(self, name: str, account: Account, ahead: Sequence[int] = (1, 10, 100)) -> list[SourceStats]:
        """`stats` of a version whose account is known."""
        return views.stats(account, self._journal.expiries(self._journal.id(name)), ahead)

    def diff(self, name: str, one: int, other: int | None = None) -> list[Change]:
        """The sources that differ between two versions, by default up to the newest."""
        return views.changes(self.account(name, one), self.account(name, other))

    # --- sources ------------------------------------------------------------------------------------------------------

    def pin(self, name: str, source: str, pinned: bool = True) -> int:
        """Never drop a source's slots, within the memory's quota, or take the pin off; gives the new version.

        Raises:
            ValueError: no such source, or more than the quota.
        """
        with self._locks.memory(name) as memory:
            return self._books.pin(memory, source, pinned).seq

    def expire(self, name: str, source: str, after: float | datetime | None) -> None:
        """Say when a source is to be forgotten: by slots, by whoever opens or writes the memory next after that.

        Args:
            after: seconds from now, a time, or None: never.

        Raises:
            ValueError: no such source, a time without a time zone, or one that is too far away.
        """
        if isinstance(after, datetime) and after.tzinfo is None:
            raise ValueError(f"{after} has no time zone; give one, for example datetime.now().astimezone().")
        at = after.timestamp() if isinstance(after, datetime) else None if after is None else time.time() + after
        if at is not None and not 0 <= at < LATEST:
            raise ValueError("a source expires between 1970 and the year 5138; give a nearer time, or None for never.")
        with self._locks.memory(name) as memory:
            names = self._books.account(self._books.ready(self._journal.head(memory))).names
            if source not in names and source not in self._journal.expiries(memory):
                raise NotFoundError(f"{name!r} has no source {source!r} (it has: {', '.join(names) or 'none'}).")
            self._journal.set_expiry(memory, source, at)

    def sweep(self) -> int:
        """Delete objects that no version refers to, and deleted rows from the log; gives the number of objects."""
        return self._sweeper.sweep()
