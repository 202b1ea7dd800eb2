"""Named memories with versions: one folder with a journal (SQLite) and tensors (safetensors).

Every change of a memory is one row of its journal and one version of it: state = event applied to the state of its
base. The base of most is the version before; a rollback goes on from an older one, a fork from another memory's.
Tensors are objects: a snapshot of the whole memory now and then, and deltas in between. A delta of coded updates is
what they wrote, and a snapshot refers to these objects and to their coder. An object is on disk before the row that
names it, so whatever a crash leaves behind, every row can be read.

    store.py     the public face            locks.py     who may change what at one moment
    writing.py   acknowledge, compute       journal.py   the database, with the tables of tables.py
    replay.py    forget and rebuild         objects.py   tensors by the hash of their bytes
    states.py    the memory at a version    delta.py     updates as a file, and one after another
    pruning.py   which old versions go      sweeping.py  objects that no version refers to
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.errors import InUseError, NotFoundError
from latentmem.model.model import MemoryModel
from latentmem.model.writing import Progress
from latentmem.store import archive, views
from latentmem.store.journal import Journal, Row
from latentmem.store.locks import Locks, check_name
from latentmem.store.objects import Disk, objects_at
from latentmem.store.pruning import Pruned, Pruner
from latentmem.store.replay import Replay
from latentmem.store.states import States, facts, plain
from latentmem.store.sweeping import Sweeper
from latentmem.store.views import Change, Overview, SourceStats, Version
from latentmem.store.writing import Content, Writer, WritingModel, payload, tokenised


class Store:
    """Memories by name, with all their versions, in one folder.

    A store can be used by any number of threads and processes at once; a memory is changed by one at a time. The model
    is an argument where one is needed, so a store can hold memories of many models. A `progress` is called after each
    piece that is written, with (tokens done, tokens in all).

    Args:
        path: a folder of this machine, made if it is not there; SQLite's log needs a real disk, no network folder.
        objects: where tensors go: a folder or an fsspec URL such as "s3://bucket/folder". As the store was made, by
            default inside `path`.
        snapshot_every: deltas after which a full snapshot is written; of many coded updates after more of them.
        cache_bytes: memories that were opened are kept up to this size, the last used ones. Keys and values that a
            model has derived from them come on top.
        timeout: seconds to wait for whoever holds a memory.
        disk: the file operations of a folder of objects; for tests.

    Raises:
        ValueError: not a store, of another format, or damaged.
        OSError: the folder can not be written.
    """

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
        self._states = States(self._journal, self._objects, snapshot_every, cache_bytes)
        self._writer = Writer(self._journal, self._states, self._locks)
        self._replay = Replay(self._journal, self._states, self._locks, self._writer)
        self._sweeper = Sweeper(self._journal, self._objects, self._locks)
        self._pruner = Pruner(self._journal, self._states, self._locks, self._sweeper)
        self._sweeper.sweep_if_due()

    def close(self) -> None:
        """Close the database; what was acknowledged is safe without it."""
        self._journal.close()

    # --- memories ---------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """All memories, by name."""
        return list(self._journal.names())

    def __contains__(self, name: str) -> bool:
        """Whether there is a memory of this name."""
        return self._journal.find(name) is not None

    def overview(self, names: Collection[str] | None = None) -> list[Overview]:
        """The journal's numbers of memories, by default of all, by name; no memory is opened."""
        return views.overview(self._journal, names)

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the memories that are open, and of the objects that versions refer to, each counted once."""
        return self._states.nbytes, self._journal.bytes()

    def create(self, name: str, memory: Memory) -> None:
        """Begin a named memory with one that there is, usually `llm.empty(...)`.

        A memory into which something was written is taken as it is; its texts are not in the journal, so it can not be
        replayed.

        Raises:
            NameTakenError: there is a memory of this name.
            ValueError: the name is none: letters, digits, "_" and "-", at most 64.
        """
        check_name(name)
        with self._locks.objects():
            first = Row(0, "import" if memory.updates else "create", None, {}, facts=facts(memory))
            self._journal.add(name, self._states.put(first, plain(memory)))

    def delete(self, name: str) -> None:
        """Delete a memory, all its versions and the turns of its conversation for good, from the disk too.

        Raises:
            NotFoundError: no such memory.
            InUseError: others were forked from it.
        """
        with self._locks.turns(name), self._locks.memory(name) as memory:
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
            base = self._states.ready(self._journal.version(name, version))
            first = self._journal.add(new, Row(0, "fork", base.id, {}))
            for source, at in self._journal.expiries(memory).items():
                self._journal.set_expiry(first.memory, source, at)

    def family(self, name: str) -> list[str]:
        """All memories that are connected with this one by forks, by name, itself among them."""
        return sorted(map(self._journal.name, self._journal.family(self._journal.id(name))))

    def rollback(self, name: str, version: int) -> int:
        """Go to any version, older or newer; gives the new version, which can be undone too."""
        with self._locks.memory(name) as memory, self._journal.transaction():
            base = self._states.ready(self._journal.version(name, version))
            return self._journal.append(Row(memory, "rollback", base.id, {})).seq

    def undo(self, name: str) -> int:
        """Go back to the base of the newest version, one step further each time; gives the new version, a rollback.

        A rollback stands for the version that it went back to, so an undo after it goes on from there; to take a
        rollback or an undo back, roll back to the version before it.

        Raises:
            ValueError: the memory began like this, or the version before was pruned.
        """
        with self._locks.memory(name) as memory, self._journal.transaction():
            row = self._states.ready(self._journal.head(memory))
            while row.base is not None and (row.event == "rollback" or row.state == "failed"):
                row = self._journal.row(row.base)
            if row.base is None or row.event == "fork":
                raise ValueError(f"there is nothing to undo in the memory {name!r}: this is how it began.")
            base = self._states.ready(self._journal.row(row.base))
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

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(
        self,
        llm: WritingModel,
        name: str,
        text: Content,
        source: str = "text",
        *,
        role: str | None = None,
        key: str | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Write a text, turns of a conversation or token ids into a memory; when this returns, no crash loses it.

        Args:
            source: the name under which the text is accounted; as in `MemoryModel.write`.
            role: as in `MemoryModel.write`.
            key: idempotency key: a second write with the same key and text changes nothing.

        Returns:
            The version that holds it.

        Raises:
            ValueError: what `MemoryModel.write` refuses, a source that has expired, or a key of another text; nothing
                has changed.
            OSError: the disk is full; the old version is kept.
        """
        body = payload(text, source, role)
        with self._locks.memory(name) as memory:
            return self._writer.write(llm, memory, body, key, progress).seq

    def append(
        self,
        name: str,
        text: Content,
        source: str = "text",
        *,
        role: str | None = None,
        key: str | None = None,
        llm: WritingModel | None = None,
    ) -> int:
        """Acknowledge a write: the journal has it, and the next `write`, `ask` or `apply` applies it.

        Args:
            llm: refuses now what it would refuse then, and says how many tokens the write takes. It computes nothing.

        Returns:
            The version that will hold it.

        Raises:
            ValueError: an empty text, a source that has expired, a key of another text, or what `llm` refuses.
        """
        body = payload(text, source, role)
        return self._writer.append(name, body, key, None if llm is None else tokenised(llm, body)).seq

    def apply(self, llm: WritingModel, name: str, progress: Progress | None = None) -> int:
        """Apply the writes that wait, forget the sources that have expired, and give the newest version.

        A write that the model refuses, or that was broken off three times, is marked as failed and passed over.
        """
        with self._locks.memory(name) as memory:
            self._writer.advance(llm, memory, progress)
            return self._journal.head(memory).seq

    def pending_count(self, name: str) -> int:
        """How many writes are acknowledged and not applied yet."""
        return len(self._journal.pending(self._journal.id(name)))

    def has_pending(self, name: str) -> bool:
        """Whether `apply` would change something: a write waits, or the time of a source is over."""
        return self._needs_apply(self._journal.id(name))

    def _needs_apply(self, memory: int) -> bool:
        return bool(self._journal.pending(memory) or self._writer.expired(memory))

    def applied_version(self, name: str) -> int:
        """The newest version that can be opened without a model: neither it nor one that it is made from waits."""
        lineage = self._journal.lineage(self._journal.version(name))
        return next(row.seq for row in lineage if row.base is None or not self._states.waits(row))

    # --- reading ----------------------------------------------------------------------------------------------------

    def latest(self, name: str) -> tuple[int, Memory]:
        """`applied_version` and its memory, also while `forget_by_replay` numbers versions anew; errors as `open`."""
        for _ in range(8):
            with self._journal.one_look():
                version = self.applied_version(name)
            try:
                return version, self.open(name, version)
            except ValueError:
                with self._journal.one_look():
                    if self.applied_version(name) == version:
                        raise
        raise InUseError(f"the versions of {name!r} are numbered anew; try again later.")

    def open(self, name: str, version: int | None = None, *, llm: WritingModel | None = None) -> Memory:
        """A version of a memory, by default the newest; sources whose time is over are forgotten before.

        Where somebody is writing, the newest version is the one that is being written, and is waited for.

        Args:
            llm: applies the writes that are acknowledged and not applied yet.

        Raises:
            ValueError: no such memory or version, a missing or damaged object, or writes that wait for a model.
        """
        while True:
            row = self._journal.version(name, version)  # before the look at pending rows: one may be acknowledged now
            if version is None and (row.state == "pending" or self._needs_apply(row.memory)):
                with self._locks.memory(name) as memory:
                    self._writer.advance(llm, memory)
                    return self._states.memory(self._states.ready(self._journal.head(memory)))
            try:
                return self._states.memory(self._states.ready(row))
            except ValueError:  # a replay may have put another in its place, or pruning may have taken it
                if self._journal.is_head(row) if version is None else self._journal.exists(row.id):
                    raise

    def ask(
        self, llm: MemoryModel, name: str, question: str, *, version: int | None = None, **generate_kwargs: Any
    ) -> str:
        """Answer a question with a memory; `generate_kwargs` and errors as in `MemoryModel.ask`."""
        return llm.ask(self.open(name, version, llm=llm), question, **generate_kwargs)

    def diff(self, name: str, one: int, other: int | None = None) -> list[Change]:
        """The sources that differ between two versions, by default up to the newest."""
        return views.changes(self.open(name, one), self.open(name, other))

    def stats(self, name: str, ahead: Sequence[int] = (1, 10, 100), *, version: int | None = None) -> list[SourceStats]:
        """How much is left of each source of a version, by default the newest, and the forecast.

        Args:
            ahead: numbers of further updates of K slots that the forecast is for.
        """
        return self.stats_of(name, self.open(name, version), ahead)

    def stats_of(self, name: str, memory: Memory, ahead: Sequence[int] = (1, 10, 100)) -> list[SourceStats]:
        """`stats` of a version of a memory that was opened."""
        return views.stats(memory, self._journal.expiries(self._journal.id(name)), ahead)

    # --- sources ----------------------------------------------------------------------------------------------------

    def pin(self, name: str, source: str, pinned: bool = True) -> int:
        """Never drop a source's slots, within the memory's quota, or take the pin off; gives the new version.

        Raises:
            ValueError: no such source, or more than the quota.
        """
        with self._locks.memory(name) as memory:
            return self._writer.event(memory, "pin" if pinned else "unpin", source).seq

    def forget(self, name: str, source: str) -> int:
        """Drop all slots of a source from the newest version and give the new one; older ones and the journal keep it.

        Raises:
            ValueError: no such source.
        """
        with self._locks.memory(name) as memory:
            return self._writer.event(memory, "forget", source).seq

    def expire(self, name: str, source: str, after: float | datetime | None) -> None:
        """Say when a source is to be forgotten: by slots, by whoever opens or writes the memory next after that.

        Args:
            after: seconds from now, a time, or None: never.

        Raises:
            ValueError: no such source, or a time without a time zone.
        """
        if isinstance(after, datetime) and after.tzinfo is None:
            raise ValueError(f"{after} has no time zone; give one, for example datetime.now().astimezone().")
        at = after.timestamp() if isinstance(after, datetime) else None if after is None else time.time() + after
        with self._locks.memory(name) as memory:
            newest = self._states.memory(self._states.ready(self._journal.head(memory)))
            names = [held.name for held in newest.sources]
            if source not in names:
                raise NotFoundError(f"{name!r} has no source {source!r} (it has: {', '.join(names) or 'none'}).")
            self._journal.set_expiry(memory, source, at)

    def forget_by_replay(
        self, llm: WritingModel, name: str, source: str, progress: Progress | None = None
    ) -> list[str]:
        """Forget a source as if it had never been written: in this memory, in the one it was forked from, in all forks.

        Every version that holds the source is computed anew without it, by the journal; rows and objects of the old
        ones are deleted from the disk, so no rollback brings it back. Versions are numbered anew. All or nothing: a
        crash before the end changes nothing, one behind it leaves nothing to be done but a sweep, which the next
        `Store` on this folder does. Turns of a conversation under this source that wait to be written go too. Gives the
        names of the memories that were rewritten.

        Raises:
            ValueError: the source was in a memory before its journal began, or `llm` is not the model that wrote it.
        """
        try:
            rewritten = self._replay.forget(llm, name, source, progress)
        except BaseException:
            self._sweeper.sweep_objects(due=True)  # the objects of new versions, which take no place
            raise
        self.sweep()
        return rewritten

    def rebuild(
        self,
        llm: MemoryModel,
        name: str,
        new: str,
        progress: Progress | None = None,
        settings: MemorySettings | None = None,
    ) -> None:
        """Replay the journal of a memory up to its newest version into a new one, with another model or other adapters.

        Args:
            new: the name of the memory that is made.
            settings: of the new memory; by default those of the old one.

        Raises:
            ValueError: the memory held something before its journal began, or the new name is taken.
        """
        path = self._replay.path(llm, name)
        asked = settings or self._states.memory(path[0]).settings
        asked = replace(asked, form=asked.form or "exact", longterm=asked.longterm or LongTermSettings(0))
        self.create(new, llm.empty(settings=asked))
        try:
            self._replay.repeat(llm, path, new, progress)
        except BaseException:
            self.delete(new)
            raise

    # --- files ------------------------------------------------------------------------------------------------------

    def export(self, name: str, path: str | Path) -> None:
        """Write a memory with its history into one file; equal memories give equal bytes.

        A fork is exported as if it had begun with the version that it was forked from.
        """
        with self._locks.memory(name) as memory:
            archive.export(self._journal, self._objects, self._states, memory, Path(path))

    def import_(self, path: str | Path, name: str) -> None:
        """Make a memory from an exported file, with its versions; everything in the file is verified.

        Raises:
            ValueError: a file that is damaged or was not made by `export`, or a name that is taken. Nothing changes.
        """
        check_name(name)
        try:
            with archive.Reader(Path(path)) as file, self._locks.objects():
                archive.add(self._journal, self._objects, self._states, file, name)
        except BaseException:
            self.sweep()  # of the objects that were put down before the fault was found
            raise

    def sweep(self) -> int:
        """Delete objects that no version refers to, and deleted rows from the log; gives the number of objects."""
        return self._sweeper.sweep()
