"""Named memories with versions: one folder with a journal (SQLite) and tensors (safetensors).

Every change of a memory is one row of its journal and one version of it: state = event applied to the state of its
base. The base of most is the version before; a rollback goes on from an older one, a fork from another memory's. What
an event can not say is an object: a full snapshot now and then, and deltas between. An object is on disk before the
row that refers to it, so whatever a crash leaves behind, every row can be read.

Locks, always taken in this order: one file per memory, for whoever talks with it; another, for whoever changes it; one
for the objects, while some are written that no row refers to yet; the database's own, for a commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout

from latentmem import longterm as longterms
from latentmem.core import memory as memories
from latentmem.core import sources as source_ops
from latentmem.core.memory import Memory, Update
from latentmem.errors import InUseError, NotFoundError
from latentmem.files import snapshot
from latentmem.longterm.blocks import Block
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Message
from latentmem.model.writing import Progress
from latentmem.store import archive, delta
from latentmem.store.delta import Chain
from latentmem.store.journal import Journal, Row
from latentmem.store.objects import Disk, objects_at
from latentmem.store.views import Change, Overview, SourceStats, Version
from latentmem.version import __version__

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
CONTENTS = ("text", "turns", "ids")  # what can be written
Content = str | Sequence[Message] | Sequence[int]
ATTEMPTS = 3  # broken-off attempts to apply a write before it is given up


class Store:
    """Memories by name, with all their versions, in one folder.

    A store can be used by any number of threads and processes at once; a memory is changed by one at a time. The model
    is an argument where one is needed, so a store can hold memories of many models.

    Args:
        path: a folder of this machine, made if it is not there; SQLite's log needs a real disk, no network folder.
        objects: where tensors go: a folder or an fsspec URL such as "s3://bucket/folder". As the store was made, by
            default inside `path`.
        snapshot_every: deltas after which a full snapshot is written.
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
        self._cache = _Cache(cache_bytes)
        self._block_names: weakref.WeakKeyDictionary[Block, tuple[str, int]] = weakref.WeakKeyDictionary()
        self._blocks: weakref.WeakValueDictionary[str, Block] = weakref.WeakValueDictionary()
        if self._journal.setting("sweep", "no") == "due":
            self.sweep()

    def close(self) -> None:
        """Close the database; what was acknowledged is safe without it."""
        self._journal.close()

    # --- memories ---------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """All memories, by name."""
        return list(self._journal.names())

    def __contains__(self, name: str) -> bool:
        """Whether there is a memory of this name."""
        return self._journal.id(name) is not None

    def overview(self, names: Collection[str] | None = None) -> list[Overview]:
        """What the journal says of memories, by default of all, by name; none is opened."""
        found = []
        for name, memory, versions, pending, changed, size in self._journal.overview(names):
            row: Row | None = self._journal.head(memory)
            while row is not None and "M" not in (row.made or {}):
                row = None if row.base is None else self._journal.row(row.base)
            made = (row.made if row is not None else None) or {"model": "", "M": 0, "N": 0}
            at = datetime.fromtimestamp(changed).astimezone()
            found.append(Overview(name, versions, pending, at, size, made["M"], made["N"], made["model"]))
        return found

    def create(self, name: str, memory: Memory, *, before: Memory | None = None, key: str | None = None) -> None:
        """Begin a named memory with a given one, usually `llm.empty(...)`.

        A memory into which something was written is taken as it is; what it was made from is not in the journal, so
        it can not be replayed.

        Args:
            before: what the memory was made from; it becomes version 0 and the memory version 1.
            key: idempotency key: a second creation with the same key changes nothing.

        Raises:
            ValueError: a name that is taken, or that is none: letters, digits, "_" and "-", at most 64.
        """
        check_name(name)
        taken = self._journal.id(name)
        if taken is not None and key is not None and self._journal.keyed(taken, key):
            return
        states = [memory] if before is None else [before, memory]
        with self._putting():
            rows = [
                self._with_object(
                    Row(0, "import" if i or state.updates else "create", None, {}, made=_made(state)), _plain(state)
                )
                for i, state in enumerate(states)
            ]
            rows[-1] = replace(rows[-1], key=key)
            with self._journal.transaction():
                row = self._journal.add(name, rows[0])
                for following in rows[1:]:
                    self._journal.append(replace(following, memory=row.memory, base=row.id))

    def delete(self, name: str) -> None:
        """Delete a memory, all its versions and the turns of its conversation for good, from the disk too.

        Raises:
            ValueError: no such memory, or others were forked from it.
        """
        with self._talking(name), self._alone(name) as memory:
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
        with self._alone(name) as memory, self._journal.transaction():
            base = self._done(name, self._row(name, memory, version))
            first = self._journal.add(new, Row(0, "fork", base.id, {}))
            for source, at in self._journal.expiries(memory).items():
                self._journal.set_expiry(first.memory, source, at)

    def family(self, name: str) -> list[str]:
        """All memories that are connected with this one by forks, by name, itself among them."""
        return sorted(self._journal.name(memory) for memory in self._journal.family(self._id(name)))

    def rollback(self, name: str, version: int) -> int:
        """Go to any version, older or newer. This is a version too, so it can be undone.

        Returns:
            The new version.
        """
        with self._alone(name) as memory, self._journal.transaction():
            base = self._done(name, self._row(name, memory, version))
            return self._journal.append(Row(memory, "rollback", base.id, {})).seq

    def undo(self, name: str) -> int:
        """Go back to what the newest version was made from, and one step further each time.

        A rollback stands for the version that it went back to, so an undo after it goes on from there; to take a
        rollback or an undo back, roll back to the version before it.

        Returns:
            The new version, a rollback.

        Raises:
            ValueError: the memory began like this.
        """
        with self._alone(name) as memory, self._journal.transaction():
            row = self._done(name, self._journal.head(memory))
            while row.base is not None and (row.event == "rollback" or row.state == "failed"):
                row = self._journal.row(row.base)
            if row.base is None or row.event == "fork":
                raise ValueError(f"there is nothing to undo in the memory {name!r}: this is how it began.")
            return self._journal.append(Row(memory, "rollback", row.base, {})).seq

    def history(
        self, name: str, *, after: int | None = None, limit: int | None = None, newest_first: bool = False
    ) -> list[Version]:
        """The versions of a memory, by default all of them, oldest first.

        Args:
            after: only those behind this version, in the order that is asked for.
            limit: so many at most.
        """
        with self._journal.one_look():
            return [self._view(row) for row in self._journal.history(self._id(name), after, limit, newest_first)]

    def version(self, name: str, version: int | None = None, *, key: str | None = None) -> Version:
        """One version of a memory, by default the newest, or the one that was written with an idempotency key.

        Raises:
            ValueError: no such memory, version or key.
        """
        with self._journal.one_look():
            memory = self._id(name)
            row = self._row(name, memory, version) if key is None else self._journal.keyed(memory, key)
            if row is None:
                raise NotFoundError(f"{name!r} has no version with the key {key!r}.")
            return self._view(row)

    def _view(self, row: Row) -> Version:
        base = None
        if row.base is not None:
            from_row = self._journal.row(row.base)
            base = (self._journal.name(from_row.memory), from_row.seq)
        says = row.payload
        return Version(
            row.seq,
            row.event,
            says.get("source"),
            says.get("tokens", 0),
            next((says[what] for what in CONTENTS if what in says), None),
            base,
            row.state,
            row.error,
            row.key,
            row.bytes,
            row.made or {},
            datetime.fromtimestamp(row.time).astimezone(),
        )

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(
        self,
        llm: MemoryModel,
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
            source: as in `MemoryModel.write`.
            role: as in `MemoryModel.write`.
            key: idempotency key: a second write with the same key and text changes nothing.
            progress: called after each piece with (tokens done, tokens in all).

        Returns:
            The version that holds it.

        Raises:
            ValueError: what `MemoryModel.write` refuses, a source that has expired, or a key of another text; nothing
                has changed.
            OSError: the disk is full; the old version is kept.
        """
        says = _said(text, source, role)
        with self._alone(name) as memory:
            self._advance(llm, name, memory)
            known = self._known(name, memory, key, says)
            if known is not None:
                return _succeeded(known).seq
            _ids(llm, says)
            pending = self._append(name, memory, says, key)
            try:
                self._settle(llm, memory, progress)
                return _succeeded(self._journal.row(pending.id)).seq
            except BaseException as error:
                self._withdraw(pending, error)
                raise

    def append(
        self,
        name: str,
        text: Content,
        source: str = "text",
        *,
        role: str | None = None,
        key: str | None = None,
    ) -> int:
        """Acknowledge a write without a model: the journal has it, and the next `write`, `ask` or `apply` applies it.

        Returns:
            The version that will hold it.

        Raises:
            ValueError: an empty text, a source that has expired, or a key of another text.
        """
        memory, says = self._id(name), _said(text, source, role)
        with self._journal.transaction():
            return (self._known(name, memory, key, says) or self._append(name, memory, says, key)).seq

    def apply(self, llm: MemoryModel, name: str, progress: Progress | None = None) -> int:
        """Apply what was acknowledged and not applied yet, and forget what has expired.

        A write that the model refuses, or that was broken off three times, is marked as failed and passed over.

        Args:
            progress: called after each piece with (tokens done, tokens in all).

        Returns:
            The newest version.
        """
        with self._alone(name) as memory:
            self._advance(llm, name, memory, progress)
            return self._journal.head(memory).seq

    def pending_count(self, name: str) -> int:
        """How many writes are acknowledged and not applied yet."""
        return len(self._journal.pending(self._id(name)))

    def has_pending(self, name: str) -> bool:
        """Whether `apply` would change something: a write waits, or the time of a source is over."""
        memory = self._id(name)
        return bool(self._journal.pending(memory) or self._due(memory))

    def applied_version(self, name: str) -> int:
        """The newest version that can be opened without a model: nothing that it is made from waits."""
        row = self._journal.head(self._id(name))
        while row.base is not None and (row.state == "pending" or self._waits(row)):
            row = self._journal.row(row.base)
        return row.seq

    # --- reading ----------------------------------------------------------------------------------------------------

    def latest(self, name: str) -> tuple[int, Memory]:
        """The version of `applied_version` and its memory, also while `forget_by_replay` numbers the versions anew.

        Raises:
            ValueError: as `open`.
        """
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

    def open(self, name: str, version: int | None = None, *, llm: MemoryModel | None = None) -> Memory:
        """A version of a memory, by default the newest; sources whose time is over are forgotten before.

        Where somebody is writing, the newest version is the one that is being written, and is waited for.

        Args:
            llm: applies what was acknowledged and not applied yet.

        Raises:
            ValueError: no such memory or version, a missing or damaged object, or writes that wait for a model.
        """
        memory = self._id(name)
        row = self._row(name, memory, version)  # before the look at what waits: a write can be acknowledged meanwhile
        if version is None and (row.state == "pending" or self._journal.pending(memory) or self._due(memory)):
            with self._alone(name) as memory:
                self._advance(llm, name, memory)
                return self._state(self._done(name, self._journal.head(memory)))
        row = self._done(name, row)
        try:
            return self._state(row)
        except ValueError:
            if self._journal.exists(row.id):
                raise
            return self.open(name, version, llm=llm)  # a replay has put another in its place meanwhile

    def ask(
        self, llm: MemoryModel, name: str, question: str, *, version: int | None = None, **generate_kwargs: Any
    ) -> str:
        """Answer a question with a memory; `generate_kwargs` and errors as in `MemoryModel.ask`."""
        return llm.ask(self.open(name, version, llm=llm), question, **generate_kwargs)

    def diff(self, name: str, one: int, other: int | None = None) -> list[Change]:
        """What became of each source between two versions, by default up to the newest; sources that are as they were
        are left out."""
        found: dict[str, list[tuple[int, float]]] = {}
        for i, memory in enumerate((self.open(name, one), self.open(name, other))):
            for source, left in zip(memory.sources, memory.slots_left(), strict=True):
                found.setdefault(source.name, [(0, 0.0), (0, 0.0)])[i] = (source.tokens, left.double().mean().item())
        return [Change(source, (a[0], b[0]), (a[1], b[1])) for source, (a, b) in sorted(found.items()) if a != b]

    def stats(self, name: str, ahead: Sequence[int] = (1, 10, 100), *, version: int | None = None) -> list[SourceStats]:
        """How much is left of each source of a version, by default the newest, and the forecast.

        Args:
            ahead: numbers of further updates of K slots that the forecast is for.
        """
        memory, expiries = self.open(name, version), self._journal.expiries(self._id(name))
        survives = {t: source_ops.forecast(memory, t) for t in ahead}
        found, longterm = [], longterms.of(memory)
        kept = longterm.slots_left(len(memory.sources)) if longterm is not None else torch.zeros(len(memory.sources), 1)
        for source, slots, more in zip(memory.sources, memory.slots_left(), kept, strict=True):
            left = slots.double().mean().item() / source.slots
            at = expiries.get(source.name)
            found.append(
                SourceStats(
                    source.name,
                    source.tokens,
                    source.slots,
                    left,
                    more.double().mean().item() / source.slots,
                    source.pinned,
                    None if at is None else datetime.fromtimestamp(at).astimezone(),
                    {t: left if source.pinned else left * share for t, share in survives.items()},
                )
            )
        return found

    # --- sources ----------------------------------------------------------------------------------------------------

    def pin(self, name: str, source: str, pinned: bool = True) -> int:
        """Never drop a source's slots, within the memory's quota; or take the pin off.

        Returns:
            The new version.

        Raises:
            ValueError: no such source, or more than the quota.
        """
        with self._alone(name) as memory:
            return self._event(name, memory, "pin" if pinned else "unpin", source)

    def forget(self, name: str, source: str) -> int:
        """Drop all slots of a source from the newest version. Older versions, and the journal, keep it.

        Returns:
            The new version.

        Raises:
            ValueError: no such source.
        """
        with self._alone(name) as memory:
            return self._event(name, memory, "forget", source)

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
        with self._alone(name) as memory:
            held = _names(self._state(self._done(name, self._journal.head(memory))))
            if source not in held:
                raise ValueError(f"{name!r} has no source {source!r} (it has: {', '.join(held) or 'none'}).")
            self._journal.set_expiry(memory, source, at)

    def forget_by_replay(self, llm: MemoryModel, name: str, source: str, progress: Progress | None = None) -> list[str]:
        """Forget a source as if it had never been written: in this memory, in what it was forked from and in all forks.

        Every version that holds the source is computed anew without it, by the journal; rows and objects of the old
        ones are deleted from the disk, so no rollback brings it back. Versions are numbered anew. All or nothing: a
        crash before the end changes nothing, one behind it leaves nothing to be done but a sweep, which the next
        `Store` on this folder does. Turns of a conversation under this source that wait to be written go too.

        Args:
            progress: called after each piece with (tokens done, tokens in all).

        Returns:
            The memories that were rewritten.

        Raises:
            ValueError: the source was in a memory before its journal began, or `llm` is not the model that wrote it.
        """
        with contextlib.ExitStack() as locks:
            family = self._lock_family(locks, name)
            rows = self._journal.rows(family)
            for memory in family:
                self._journal.built(memory)  # of a replay that was broken off
            done = self._replay(llm, rows, source, progress)
            rewritten = self._exchange(family, done, source)
        if rewritten:
            self.sweep()
        return sorted(rewritten)

    def rebuild(self, llm: MemoryModel, name: str, new: str, progress: Progress | None = None) -> None:
        """Replay what led to the newest version of a memory into a new one, with another model or other adapters.

        Args:
            new: the name of the memory that is made; N, K, compression and seed are those of the old one.
            progress: called after each piece with (tokens done, tokens in all).

        Raises:
            ValueError: the memory held something before its journal began.
        """
        memory = self._id(name)
        row = self._done(name, self._journal.head(memory))
        path = [row]
        while row.base is not None:
            row = self._journal.row(row.base)
            path.append(row)
        start = self._state(row)
        if any(row.event in ("create", "import") for row in path[:-1]) or row.event != "create":
            raise ValueError(
                f"{name!r} began with a memory that held something already; its journal can not rebuild it."
            )
        self.create(new, llm.empty(settings=start.settings))
        path = [row for row in reversed(path[:-1]) if row.state != "failed"]
        writes = [row for row in path if row.event == "write"]
        told = _Told(progress, [_length(llm, row) for row in writes] if progress else [])
        try:
            for row in path:
                says = row.payload
                if row.event == "write":
                    if "ids" in says and start.tokenizer != llm.tokenizer_identity:
                        raise ValueError(f"version {row.seq} was written as token ids of another tokenizer.")
                    self.write(llm, new, _text(row), says["source"], role=says["role"], progress=told.next())
                elif row.event in ("pin", "unpin"):
                    self.pin(new, says["source"], row.event == "pin")
                elif row.event in ("forget", "expire"):
                    self.forget(new, says["source"])
        except BaseException:
            self.delete(new)
            raise

    # --- files ------------------------------------------------------------------------------------------------------

    def export(self, name: str, path: str | Path) -> None:
        """Write a memory with its history into one file; equal memories give equal bytes.

        A fork is exported as if it had begun with what it was forked from.
        """
        with self._alone(name) as memory:
            rows = self._versions(memory)
            first = rows[0]
            extra = {}
            if first.event == "fork":
                data = snapshot.to_bytes(self._state(first))
                hashed = hashlib.sha256(data).hexdigest()
                extra = {hashed: data}
                rows[0] = replace(first, event="import", base=None, kind="snapshot", object=hashed, bytes=len(data))
            archive.write(
                Path(path), rows, self._journal.expiries(memory), lambda n: extra.get(n) or self._objects.get(n)
            )

    def import_(self, path: str | Path, name: str) -> None:
        """Make a memory from an exported file, with its versions; everything in the file is verified.

        Raises:
            ValueError: a file that is damaged or was not made by `export`, or a name that is taken. Nothing changes.
        """
        check_name(name)
        try:
            with archive.Reader(Path(path)) as file, self._putting():
                self._take(file, name)
        except (ValueError, OSError, RuntimeError):
            self.sweep()  # of the objects that were put down before the fault was found
            raise

    def _take(self, file: archive.Reader, name: str) -> None:
        for row in file.rows:
            named = set((row.made or {}).get("blocks", ()))
            data = bytearray(file.read(row.object)) if row.kind == "snapshot" and row.object else None
            if named != (snapshot.blocks_of(data, f"version {row.seq}") if data else set()):
                raise ValueError(f"version {row.seq} in the file names other blocks than its snapshot.")
        for hashed in file.objects:
            self._objects.put(file.read(hashed))
        with self._journal.transaction():
            first = self._journal.add(name, file.rows[0])
            self._journal.change(replace(first, time=file.rows[0].time))
            ids = [first.id]
            for row in file.rows[1:]:
                ids.append(self._journal.insert(replace(row, memory=first.memory, base=ids[row.base or 0])).id)
            for source, at in file.expiries.items():
                self._journal.set_expiry(first.memory, source, at)
            for row in self._journal.rows([first.memory]):
                if row.state != "pending":
                    self._state(row, cached=False)

    def sweep(self) -> int:
        """Delete objects that no version refers to, and what was deleted from the database's log.

        Returns:
            How many objects.
        """
        for memory in self._journal.building():
            with contextlib.suppress(Timeout), FileLock(self._lock_path(memory), timeout=0):
                self._journal.built(memory)
        with self._putting():
            used, count = self._journal.objects(), 0
            for name in list(self._objects.names()):
                if name not in used:
                    self._objects.remove(name)
                    count += 1
            self._objects.tidy()
            locks = list((self.path / "locks").iterdir())  # before the names: a memory is there before its lock
            there = {str(memory) for memory in self._journal.names().values()} | {"objects"}
            for lock in locks:
                if lock.stem.partition("-")[0] not in there:
                    lock.unlink()
            self._journal.truncate()
            self._journal.keep_setting("sweep", "no")
        return count

    # --- inside: locks ----------------------------------------------------------------------------------------------

    def _lock_path(self, memory: int | str) -> Path:
        return self.path / "locks" / f"{memory}.lock"

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[int]:
        """Hold a memory alone while it is changed; gives its id."""
        memory = self._id(name)
        with self._locked(memory, f"the memory {name!r}"):
            if self._id(name) != memory:
                raise NotFoundError(f"the memory {name!r} was deleted meanwhile.")
            yield memory

    @contextlib.contextmanager
    def _talking(self, name: str) -> Iterator[int]:
        """Hold the turns of a conversation with a memory alone; gives the memory's id."""
        memory = self._id(name)
        with self._locked(f"{memory}-turns", f"a conversation with {name!r}"):
            yield memory

    @contextlib.contextmanager
    def _putting(self) -> Iterator[None]:
        """Hold the objects alone, from the writing of one to the row that refers to it."""
        with self._locked("objects", "the store"):
            yield

    @contextlib.contextmanager
    def _locked(self, what: int | str, called: str) -> Iterator[None]:
        owner = self._lock_path(what).with_suffix(".owner")
        try:
            with FileLock(self._lock_path(what), timeout=self.timeout):
                owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
                yield
        except Timeout:
            who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
            raise InUseError(
                f"{who} is changing {called}, and did so for {self.timeout:g} seconds; try again later.",
                "the memory is in use by another process; try again later.",
            ) from None

    def _lock_family(self, locks: contextlib.ExitStack, name: str) -> list[int]:
        """Lock a memory, all that forks connect with it, and their conversations; a fork takes the lock of its base."""
        held: list[int] = []
        while True:
            family = self._journal.family(self._id(name))
            if family == held:
                return family
            locks.close()
            names = {memory: name for name, memory in self._journal.names().items()}
            for memory in family:  # conversations first: who talks takes the memory's lock too
                locks.enter_context(self._locked(f"{memory}-turns", f"a conversation with {names.get(memory)!r}"))
            for memory in family:
                locks.enter_context(self._locked(memory, f"the memory {names.get(memory)!r}"))
            held = family

    # --- inside: versions -------------------------------------------------------------------------------------------

    def _id(self, name: str) -> int:
        memory = self._journal.id(name)
        if memory is None:
            raise NotFoundError.memory(name, self.names())
        return memory

    def _versions(self, memory: int) -> list[Row]:
        """All versions of a memory by number, which after a replay is not the order in which they were stored."""
        return sorted(self._journal.rows([memory]), key=lambda row: row.seq)

    def _row(self, name: str, memory: int, version: int | None) -> Row:
        row = self._journal.head(memory) if version is None else self._journal.version(memory, version)
        if row is None:
            newest = self._journal.head(memory).seq
            raise NotFoundError(f"{name!r} has no version {version}; it has 0 to {newest}.")
        return row

    def _done(self, name: str, row: Row) -> Row:
        """The row, if nothing that it is made from waits to be applied."""
        if row.state != "pending" and not self._waits(row):
            return row
        raise ValueError(
            f"version {row.seq} of {name!r} waits for writes that are acknowledged and not applied yet; "
            f"`apply` does it, or give the model to `open`."
        )

    def _waits(self, row: Row) -> bool:
        """Whether a version is made from one that is pending."""
        if not self._journal.pending(row.memory):
            return False
        here: Row | None = row
        while here is not None and here.kind != "snapshot":
            if here.state == "pending":
                return True
            here = None if here.base is None else self._journal.row(here.base)
        return False

    def _state(self, row: Row, *, cached: bool = True) -> Memory:
        """The memory at a version: the nearest one that is kept or a snapshot, and what came after it."""
        path: list[Row] = []
        found, mapped = None, False
        while found is None:
            found = self._cache.get(row.id) if cached else None
            if found is None and row.kind == "snapshot":
                data = self._objects.get(row.object or "")
                found = snapshot.from_bytes(data, f"the object {row.object}", verified=True, block=self._block)
                found, mapped = replace(found, births=found.births.clone(), origins=found.origins.clone()), True
                path.append(row)
            elif found is None:
                path.append(row)
                if row.base is None:
                    raise ValueError(f"version {row.seq} has no snapshot and nothing that it was made from.")
                row = self._journal.row(row.base)
        if path:
            chain = Chain(found, mapped)
            for row in reversed(path):
                self._follow(row, chain)
            found = _plain(chain.memory())
        if cached and path:
            self._cache.put(path[0].id, found)
        return found

    def _follow(self, row: Row, chain: Chain) -> None:
        """Go on from the state of a version's base to its own, which is applied."""
        if row.state == "failed" or row.kind == "snapshot":
            return
        if row.kind == "delta":
            for one in delta.from_bytes(self._objects.get(row.object or ""), f"the object {row.object}"):
                chain.update(one)
        else:
            chain.change(lambda memory: _bookkeeping(row, memory))

    def _deltas(self, row: Row | None) -> int:
        """Deltas between a version and the snapshot before it; no more than matter are counted."""
        count = 0
        while row is not None and row.kind != "snapshot" and count < self.snapshot_every:
            count += row.kind == "delta"
            row = None if row.base is None else self._journal.row(row.base)
        return count

    def _event(self, name: str, memory: int, event: str, source: str) -> int:
        """Add a version that needs no model, on top of the newest."""
        head = self._done(name, self._journal.head(memory))
        row = Row(memory, event, head.id, {"source": source})
        after = _plain(_bookkeeping(row, self._state(head)))
        with self._journal.transaction():
            if self._journal.head(memory).id != head.id:
                raise ValueError(f"a write into {name!r} was acknowledged meanwhile; `apply` it and try again.")
            row = self._journal.append(replace(row, made=_made(after)))
        self._cache.put(row.id, after)
        return row.seq

    # --- inside: writes ---------------------------------------------------------------------------------------------

    def _advance(self, llm: MemoryModel | None, name: str, memory: int, progress: Progress | None = None) -> None:
        """Apply what waits, then forget what has expired."""
        if llm is not None:
            self._settle(llm, memory, progress)
        for source in self._due(memory):
            self._event(name, memory, "expire", source)

    def _due(self, memory: int) -> list[str]:
        """Sources of the newest version whose time is over."""
        over = [source for source, at in self._journal.expiries(memory).items() if at <= time.time()]
        if not over:
            return []
        head = self._journal.head(memory)
        if self._waits(head):
            return over
        held = _names(self._state(head))
        return [source for source in over if source in held]

    def _known(self, name: str, memory: int, key: str | None, says: dict[str, Any]) -> Row | None:
        """The version of this key, if it is that of the same text."""
        row = None if key is None else self._journal.keyed(memory, key)
        if row is not None and row.payload.get("sha256") != says["sha256"]:
            raise ValueError(f"the key {key!r} belongs to another text, version {row.seq} of {name!r}; use a new key.")
        at = self._journal.expiries(memory).get(says["source"])
        if row is None and at is not None and at <= time.time():
            raise ValueError(
                f"the source {says['source']!r} of {name!r} has expired, so what is written would be forgotten at "
                f"once; give it another time with `expire`, or None."
            )
        return row

    def _append(self, name: str, memory: int, says: dict[str, Any], key: str | None) -> Row:
        """Acknowledge a write."""
        with self._journal.transaction():
            if self._journal.id(name) != memory:
                raise NotFoundError(f"the memory {name!r} was deleted meanwhile.")
            return self._journal.append(Row(memory, "write", self._journal.head(memory).id, says, key, state="pending"))

    def _settle(self, llm: MemoryModel, memory: int, progress: Progress | None = None) -> None:
        """Apply what waits, in order."""
        waiting = self._journal.pending(memory)
        told = _Told(progress, [_length(llm, row) for row in waiting] if progress else [])
        for row in waiting:
            base = self._journal.row(row.base or 0)
            before = self._state(base)
            llm.check(before)
            if row.attempts >= ATTEMPTS:
                self._fail(row, f"applying it was broken off {ATTEMPTS} times")
                continue
            begun = replace(row, attempts=row.attempts + 1)
            self._journal.change(begun)
            try:
                done, what, after = self._computed(llm, begun, before, self._deltas(base), told.next())
            except ValueError as error:
                self._fail(row, str(error))
                continue
            except (KeyboardInterrupt, torch.OutOfMemoryError, OSError):  # passes; it is not the text
                with contextlib.suppress(OSError):
                    self._journal.change(row)
                raise
            try:
                self._commit(done, what, after)
            except OSError:
                with contextlib.suppress(OSError):  # a disk that is full takes no note of it either
                    self._journal.change(row)
                raise

    def _computed(
        self, llm: MemoryModel, row: Row, before: Memory, deltas: int, progress: Progress | None = None
    ) -> tuple[Row, bytes | Memory, Memory]:
        """Compute a write.

        Args:
            before: the state of its base.
            deltas: between that and the snapshot before it.

        Returns:
            The row, applied but for its object; that object, or the memory where it is a snapshot; the next memory.
        """
        ids, role = _ids(llm, row.payload)
        after, updates = _written(llm, before, ids, row.payload["source"], progress)
        small = deltas + 1 < self.snapshot_every and delta.size(updates) < _size(after)
        what: bytes | Memory = delta.to_bytes(updates) if small else after
        says = row.payload | {"tokens": len(ids), "resolved": role}
        return replace(row, payload=says, state="applied", made=_made(after)), what, after

    def _commit(self, row: Row, what: bytes | Memory, after: Memory) -> Row:
        """Put the object of a write on disk, then its row."""
        with self._putting():
            row = self._with_object(row, what)
            self._journal.change(row)
        self._cache.put(row.id, after)
        return row

    def _with_object(self, row: Row, what: bytes | Memory) -> Row:
        """The row with a delta, or a snapshot of a memory; full blocks of a long-term memory are objects of their own.

        To be called where the objects are held.
        """
        if isinstance(what, bytes):
            return replace(row, kind="delta", object=self._objects.put(what), bytes=len(what))
        blocks: dict[str, int] = {}

        def apart(block: Block) -> str:
            name, size = self._block_names.get(block, ("", 0))
            if not name or name not in self._objects:
                data = snapshot.block_to_bytes(block)
                name, size = self._objects.put(data), len(data)
                self._block_names[block] = (name, size)
                self._blocks[name] = block
            blocks[name] = size
            return name

        data = snapshot.to_bytes(what, apart)
        made = (row.made or {}) | ({"blocks": blocks} if blocks else {})
        return replace(row, kind="snapshot", object=self._objects.put(data), bytes=len(data), made=made)

    def _block(self, name: str) -> Block:
        """A block of a long-term memory; its slots stay on the disk where the objects are on one."""
        block = self._blocks.get(name)
        if block is None:
            data = self._objects.get(name)
            block = snapshot.block_from_bytes(data, f"the object {name}")
            self._blocks[name], self._block_names[block] = block, (name, len(data))
        return block

    def _fail(self, row: Row, error: str) -> None:
        self._journal.change(replace(row, state="failed", error=error))

    def _withdraw(self, row: Row, error: BaseException) -> None:
        """Take back a write that could not be applied, so that nothing has changed."""
        try:
            with self._journal.transaction():
                if self._journal.row(row.id).state == "applied":
                    return
                if self._journal.has_children(row.id):
                    self._fail(row, str(error))
                else:
                    self._journal.remove([row.id])
        except OSError:
            error.add_note(f"It stays in the journal as version {row.seq}, and is applied when there is room again.")

    # --- inside: replay ---------------------------------------------------------------------------------------------

    def _replay(
        self, llm: MemoryModel, rows: list[Row], source: str, progress: Progress | None
    ) -> dict[int, Row | None]:
        """Compute all versions that hold a source as if it had never been written; what they refer to is kept on disk.

        Args:
            rows: all versions of a family, each behind its base.

        Returns:
            Id -> what takes its place (its base is still the old one), or None where nothing does.
        """
        if any(source in _names(self._state(row)) for row in rows if row.event in ("create", "import")):
            raise ValueError(
                f"the source {source!r} was in the memory before its journal began, so it can not be replayed without "
                f"it; `forget` drops its slots."
            )
        if not any(row.event == "write" and row.payload["source"] == source for row in rows):
            raise ValueError(f"the journal has no write of the source {source!r}.")
        gone = {row.id for row in rows if row.payload.get("source") == source}
        dirty = set(gone)
        children: dict[int, list[Row]] = {row.id: [] for row in rows}
        for row in rows:
            if row.base in dirty:
                dirty.add(row.id)
            if row.base is not None:
                children[row.base].append(row)
        again = [row for row in rows if row.id in dirty - gone and row.event == "write" and row.state != "failed"]
        told = _Told(progress, [_length(llm, row) for row in again if row.state == "applied"] if progress else [])
        done: dict[int, Row | None] = {}
        todo: list[tuple[Row, Memory | None, int]] = [(rows[0], None, 0)]
        while todo:
            row, after, deltas = todo.pop()  # what its base has become; None: its base is as it was
            if row.id in dirty:
                if after is None:
                    base = self._journal.row(row.base or 0)
                    after, deltas = self._state(base), self._deltas(base)
                if row.id in gone:
                    done[row.id] = None
                else:
                    new, after = self._again(llm, row, after, deltas, told)
                    done[row.id] = new
                    deltas = {"snapshot": 0, "delta": deltas + 1, "none": deltas}[new.kind]
            todo += [(child, after, deltas) for child in children[row.id]]
        return done

    def _again(self, llm: MemoryModel, row: Row, before: Memory, deltas: int, told: _Told) -> tuple[Row, Memory]:
        """A version as it is on top of another state of its base."""
        if row.state != "applied":
            return row, before
        made = {what: value for what, value in (row.made or {}).items() if what != "blocks"}
        bare = replace(row, kind="none", object=None, bytes=0, made=made)
        if row.event == "write":
            llm.check(before)
        try:
            if row.event != "write":
                after = _plain(_bookkeeping(row, before))
                return replace(bare, made=_made(after) if row.made else row.made), after
            again, what, after = self._computed(llm, bare, before, deltas, told.next())
        except ValueError as error:
            return replace(bare, state="failed", error=str(error)), before
        with self._putting():
            again = self._with_object(again, what)
            for made in [again.object or "", *(again.made or {}).get("blocks", ())]:
                self._journal.build(row.memory, made)
        return again, after

    def _exchange(self, family: list[int], done: dict[int, Row | None], source: str) -> set[str]:
        """Put replayed versions in the place of the old ones, in one transaction.

        Returns:
            The memories that have changed.
        """
        with self._journal.transaction():
            rows = self._journal.rows(family)
            for row in rows:
                if row.base in done and row.id not in done:
                    done[row.id] = row  # it was acknowledged while the others were computed, and waits
            seqs: dict[int, int] = {}
            for memory in family:
                stay = [row for row in rows if row.memory == memory and done.get(row.id, row) is not None]
                seqs |= {row.id: i for i, row in enumerate(sorted(stay, key=lambda row: row.seq))}
            self._journal.remove(sorted(done, reverse=True))
            image: dict[int | None, int | None] = {None: None}
            for row in sorted((row for row in rows if row.id not in done), key=lambda row: row.seq):
                self._journal.renumber(row.id, seqs[row.id])
            for row in rows:
                image[row.id] = row.id
                if row.id in done:
                    new = done[row.id]
                    base = image[row.base]
                    image[row.id] = (
                        base if new is None else self._journal.insert(replace(new, base=base, seq=seqs[row.id])).id
                    )
            for memory in family:
                self._journal.set_expiry(memory, source, None)
                if (self._journal.turns(memory) or {}).get("source") == source:
                    self._journal.keep_turns(memory, None)
                self._journal.built(memory)
            self._journal.keep_setting("sweep", "due")
        self._cache.clear()
        return {self._journal.name(row.memory) for row in rows if row.id in done}


def check_name(name: str) -> None:
    """A ValueError if this can not be a memory's name."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} can not be a memory's name: use letters, digits, '_' and '-', and no path.")


class _Cache:
    """The memories that were used last, up to a number of bytes; memories are immutable, so they can be shared."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes, self._lock = most, 0, threading.Lock()
        self._kept: OrderedDict[int, Memory] = OrderedDict()

    def get(self, version: int) -> Memory | None:
        with self._lock:
            if version in self._kept:
                self._kept.move_to_end(version)
            return self._kept.get(version)

    def put(self, version: int, memory: Memory) -> None:
        with self._lock:
            if version not in self._kept:
                self._bytes += _size(memory)
                self._kept[version] = memory
            while self._bytes > self._most:
                self._bytes -= _size(self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._bytes = 0


def _size(memory: Memory) -> int:
    """Bytes of a memory's tensors; of its long-term part what is not shared with others yet."""
    longterm = longterms.of(memory)
    spans = longterm.ranges[-1:] if longterm is not None else ()
    tail = sum(span.stored.slots.nbytes for span in spans if not span.sealed)
    return tail + sum(t.numel() * t.element_size() for t in (memory.slots, memory.births, memory.origins))


def _names(memory: Memory) -> list[str]:
    """The sources of a memory."""
    return [source.name for source in memory.sources]


def _plain(memory: Memory) -> Memory:
    """A memory as the store keeps it: its lineage is in the journal, not in the value."""
    return replace(memory, version="", parent="") if memory.version or memory.parent else memory


def _succeeded(row: Row) -> Row:
    """The row of a write that was applied; a ValueError says why it was not."""
    if row.state == "failed":
        raise ValueError(row.error)
    return row


def _said(text: Content, source: str, role: str | None) -> dict[str, Any]:
    """What the journal keeps of a write, before it is applied."""
    if isinstance(text, str):
        what: dict[str, Any] = {"text": text}
        empty = not text.strip()
    elif isinstance(text, Sequence) and text and isinstance(text[0], dict):
        if role:
            raise ValueError(f"turns of a conversation have roles of their own: got {role!r} besides.")
        what, empty = {"turns": [{"role": turn["role"], "content": turn["content"]} for turn in text]}, False  # type: ignore[index]
    else:
        ids = torch.as_tensor(text)
        empty = not ids.numel()
        if not empty and (ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool or role):
            raise ValueError(
                f"token ids must be one list of integers, without a role: got {list(ids.shape)}, {role!r}."
            )
        what = {"ids": ids.tolist()}
    if empty:
        raise ValueError("the text to be written is empty; give at least one character.")
    says = what | {"source": source, "role": role}
    try:
        json.dumps(says, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode; write UTF-8.") from None
    return says | {"sha256": hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()}


def _text(row: Row) -> Content:
    """What was written."""
    return next(row.payload[what] for what in CONTENTS if what in row.payload)


def _ids(llm: MemoryModel, says: dict[str, Any]) -> tuple[list[int], str | None]:
    """Token ids of a write, and the role under which they are written."""
    if "ids" in says:
        return says["ids"], None
    prompts = llm.prompts_or_raise()
    if "turns" in says:
        return [i for turn in says["turns"] for i in prompts.turn(turn)], None
    role = says.get("resolved") or says["role"] or (prompts.style.wrap if prompts.chats else None) or "raw"
    return prompts.written(says["text"], role), role


def _length(llm: MemoryModel, row: Row) -> int:
    """Tokens of a write; 0 where the model will refuse it."""
    try:
        return len(_ids(llm, row.payload)[0])
    except ValueError:
        return 0


class _Told:
    """One progress over several writes.

    Args:
        lengths: tokens of each.
    """

    def __init__(self, progress: Progress | None, lengths: list[int]) -> None:
        self._progress, self._lengths, self._begun = progress, lengths, 0

    def next(self) -> Progress | None:
        """The progress of the next write."""
        progress = self._progress
        if progress is None:
            return None
        before, total = sum(self._lengths[: self._begun]), sum(self._lengths)
        self._begun += 1
        return lambda done, _: progress(before + done, total)


def _written(
    llm: MemoryModel, memory: Memory, ids: list[int], source: str, progress: Progress | None
) -> tuple[Memory, list[Update]]:
    """`llm.write_ids`, and each of its updates."""
    updates = []
    for start in range(0, len(ids), memory.piece):
        piece = ids[start : start + memory.piece]
        following = llm.write_ids(memory, piece, source)
        k = sum(s.slots for s in following.sources) - sum(s.slots for s in memory.sources)
        new = following.slots[:, -k:].clone().cpu()
        dropped = memories.draw(memory, k)
        updates.append(Update(new, dropped, source, len(piece), llm.retriever.new_keys(memory, dropped)))
        memory = following
        if progress is not None:
            progress(start + len(piece), len(ids))
    return memory, updates


def _bookkeeping(row: Row, memory: Memory) -> Memory:
    """What an event without a text makes of a memory."""
    if row.event in ("pin", "unpin"):
        return source_ops.pin(memory, row.payload["source"], row.event == "pin")
    if row.event in ("forget", "expire"):
        return source_ops.forget(memory, row.payload["source"])
    return memory


def _made(memory: Memory) -> dict[str, Any]:
    """With what a version was computed, and how full it is."""
    return {
        "M": memory.M,
        "N": memory.N,
        "model": memory.model_name,
        "dtype": str(memory.slots.dtype)[6:],
        "device": memory.slots.device.type,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "latentmem": __version__,
    }
