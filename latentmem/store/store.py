"""Named memories with versions: one folder with a journal (SQLite) and tensors (safetensors).

Every change of a memory is one row of its journal and one version of it: state = event applied to the state of its
base. The base of most is the version before; a rollback goes on from an older one, a fork from another memory's.
Tensors are objects: a snapshot of the whole memory now and then, and deltas in between. A delta of coded updates is
what they wrote, and a snapshot refers to these objects and to their coder. An object is on disk before the row that
names it, so whatever a crash leaves behind, every row can be read.

    store.py     the public face            catalog.py   its part that opens no memory
    books.py     what the journal knows     account.py   a memory in numbers
    locks.py     who may change what        contents.py  what can be written
    writing.py   acknowledge, compute       journal.py   the database, with the tables of schema.py
    replay.py    forget and rebuild         objects.py   tensors by the hash of their bytes
    states.py    the memory at a version    delta.py     updates as a file, and one after another
    pruning.py   which old versions go      sweeping.py  objects that no version refers to

Looking at memories and the changes that need the journal alone import no torch, so the command line answers at once:
`Store` makes what opens memories when it is needed first.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.disk import check_folder
from latentmem.errors import InUseError
from latentmem.store.account import Account
from latentmem.store.catalog import TRIES, Catalog
from latentmem.store.contents import Content, payload, source_of
from latentmem.store.journal import Row
from latentmem.store.locks import check_name
from latentmem.written import place

if TYPE_CHECKING:
    from latentmem.core.memory import Memory
    from latentmem.model.model import MemoryModel
    from latentmem.model.writing import Progress
    from latentmem.store.replay import Replay
    from latentmem.store.states import States
    from latentmem.store.writing import Writer, WritingModel


class Store(Catalog):
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

    _parts: tuple[States, Writer, Replay] | None = None

    def _made(self) -> tuple[States, Writer, Replay]:
        """What opens and computes memories; made, and torch imported, when it is needed first."""
        with self._making:
            if self._parts is None:
                from latentmem.store.replay import Replay
                from latentmem.store.states import States
                from latentmem.store.writing import Writer

                states = States(self._journal, self._objects, self._books, self._cache, self.snapshot_every)
                writer = Writer(self._journal, self._books, states, self._locks)
                replay = Replay(self._journal, self._books, states, self._locks, writer)
                self._parts = states, writer, replay
            return self._parts

    @property
    def _states(self) -> States:
        return self._made()[0]

    @property
    def _writer(self) -> Writer:
        return self._made()[1]

    @property
    def _replay(self) -> Replay:
        return self._made()[2]

    def _computed(self, row: Row) -> Account:
        """The account of a version whose memory is opened for it."""
        from latentmem.store.states import account_of

        return account_of(self._states.memory(row))

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the memories that are open, and of the objects that versions refer to, each counted once."""
        return self._states.nbytes, self._journal.bytes()

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self, name: str, memory: Memory) -> None:
        """Begin a named memory with one that there is, usually `llm.empty(...)`.

        A memory into which something was written is taken as it is; its texts are not in the journal, so it can not be
        replayed.

        Raises:
            NameTakenError: there is a memory of this name.
            ValueError: the name is none: letters, digits, "_" and "-", at most 64.
        """
        check_name(name)
        from latentmem.store.states import account_of, facts, plain

        with self._locks.objects():
            first = Row(0, "import" if memory.updates else "create", None, {}, facts=facts(memory))
            put = self._states.put(first, plain(memory))
            with self._journal.transaction():
                self._journal.keep_account(self._journal.add(name, put), account_of(memory).to_json())

    def write(
        self,
        llm: WritingModel,
        name: str,
        text: Content,
        source: str | None = None,
        *,
        role: str | None = None,
        key: str | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Write a text, turns of a conversation or token ids into a memory; when this returns, no crash loses it.

        Args:
            text: or the path of a file of UTF-8 text.
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
        body = payload(text, source_of(text, source), role)
        with self._locks.memory(name) as memory:
            return self._writer.write(llm, memory, body, key, progress).seq

    def append(
        self,
        name: str,
        text: Content,
        source: str | Callable[[int], str] | None = None,
        *,
        role: str | None = None,
        key: str | None = None,
        llm: WritingModel | None = None,
    ) -> int:
        """Acknowledge a write: the journal has it, and the next `write`, `ask` or `apply` applies it.

        Args:
            source: as in `write`, or what makes the name of the version that will hold the text.
            llm: refuses now what it would refuse then, and says how many tokens the write takes. It computes nothing.

        Returns:
            The version that will hold it.

        Raises:
            ValueError: an empty text, a source that has expired, a key of another text, or what `llm` refuses.
        """
        if callable(source):
            with self._journal.transaction():  # no other write takes the number
                named = source(self._journal.head(self._journal.id(name)).seq + 1)
                return self.append(name, text, named, role=role, key=key, llm=llm)
        body = payload(text, source_of(text, source), role)
        return self._writer.append(name, body, key, llm).seq

    def apply(self, llm: WritingModel, name: str, progress: Progress | None = None) -> int:
        """Apply the writes that wait, forget the sources that have expired, and give the newest version.

        A write that the model refuses, or that was broken off three times, is marked as failed and passed over.
        """
        with self._locks.memory(name) as memory:
            self._writer.advance(llm, memory, progress)
            return self._journal.head(memory).seq

    # --- reading ------------------------------------------------------------------------------------------------------

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
                    return self._states.memory(self._books.ready(self._journal.head(memory)))
            try:
                return self._states.memory(self._books.ready(row))
            except ValueError:
                if self._stays(row, version):
                    raise

    def latest(self, name: str) -> tuple[int, Memory]:
        """`applied_version` and its memory, also while `forget_by_replay` numbers versions anew; errors as `open`."""
        for _ in range(TRIES):
            with self._journal.one_look():
                version = self.applied_version(name)
            try:
                return version, self.open(name, version)
            except ValueError:
                with self._journal.one_look():
                    if self.applied_version(name) == version:
                        raise
        raise InUseError(f"the versions of {name!r} are numbered anew; try again later.")

    def ask(
        self, llm: MemoryModel, name: str, question: str, *, version: int | None = None, **generate_kwargs: Any
    ) -> str:
        """Answer a question with a memory; `generate_kwargs` and errors as in `MemoryModel.ask`."""
        return llm.ask(self.open(name, version, llm=llm), question, **generate_kwargs)

    # --- sources and files --------------------------------------------------------------------------------------------

    def forget(self, name: str, source: str) -> int:
        """Drop all slots of a source from the newest version and give the new one; older ones and the journal keep it.

        Raises:
            ValueError: no such source.
        """
        with self._locks.memory(name) as memory:
            place(self._books.account(self._books.ready(self._journal.head(memory))).names, source)  # refuses at once
            return self._writer.event(memory, "forget", source).seq

    def forget_by_replay(
        self, llm: WritingModel, name: str, source: str, progress: Progress | None = None
    ) -> list[str]:
        """Forget a source as if it had never been written: in this memory, in the one it was forked from, in all forks.

        Every version that holds the source is computed anew without it, by the journal; rows and objects of the old
        ones are deleted from the disk, so no rollback brings it back. Versions are numbered anew. All or nothing: a
        crash before the end changes nothing, one behind it leaves nothing to be done but a sweep, which the next
        `Store` on this folder does. Gives the names of the memories that were rewritten.

        Raises:
            ValueError: the source was in a memory before its journal began, or `llm` is not the model that wrote it.
        """
        try:
            rewritten = self._replay.forget(llm, name, source, progress)
        except BaseException:
            self._sweeper.sweep_objects(due=True)  # the objects of new versions, which take no place
            raise
        self.sweep()
        for changed in rewritten:
            self._account_at_hand(changed)
        return rewritten

    def _account_at_hand(self, name: str) -> None:
        """Compute the account of the newest version now, so that who looks at it next opens nothing."""
        if not self.has_pending(name):
            self.account(name)

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
        self.check_free(new)
        path = self._replay.path(llm, name)
        asked = settings or self._states.memory(path[0]).settings
        asked = replace(asked, form=asked.form or "exact", longterm=asked.longterm or LongTermSettings(0))
        self.create(new, llm.empty(settings=asked))
        try:
            self._replay.repeat(llm, path, new, progress)
        except BaseException:
            self.delete(new)
            raise

    def export(self, name: str, path: str | Path) -> None:
        """Write a memory with its history into one file; equal memories give equal bytes.

        A fork is exported as if it had begun with the version that it was forked from.
        """
        check_folder(Path(path))  # before the work
        with self._locks.memory(name) as memory:
            from latentmem.store import archive

            archive.export(self._journal, self._objects, self._states, memory, Path(path))

    def import_(self, path: str | Path, name: str) -> None:
        """Make a memory from an exported file, with its versions; everything in the file is verified.

        Raises:
            ValueError: a file that is damaged or was not made by `export`, or a name that is taken. Nothing changes.
        """
        self.check_free(name)
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file.")
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is no exported memory: it is no zip file.")
        from latentmem.store import archive

        try:
            with archive.Reader(Path(path)) as file, self._locks.objects():
                archive.add(self._journal, self._objects, self._states, file, name)
        except BaseException:
            self.sweep()  # of the objects that were put down before the fault was found
            raise
        self._account_at_hand(name)
