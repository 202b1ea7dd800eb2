"""Writes: acknowledged in the journal first, then computed, then kept as an object and named by their row.

acknowledge   the row is committed, `pending`; no model is needed, and no crash loses it
settle        each pending row in order: compute, put the object on disk, commit the row as `applied` or `failed`
event         pin, unpin, forget, expire: a row alone, on top of the newest version
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from latentmem.core.memory import Memory, Update
from latentmem.longterm.losses import lost_between
from latentmem.model.prompts import Message, Prompts
from latentmem.model.writing import Progress, Updates
from latentmem.store import delta
from latentmem.store.books import Books
from latentmem.store.contents import Payload
from latentmem.store.journal import Journal, Row
from latentmem.store.locks import Locks
from latentmem.store.states import State, States, account_of, after_event, facts, largest, plain, size

ATTEMPTS = 3  # broken-off attempts to apply a write before it is given up
WAITING = 1024  # writes that wait whose tokens are kept


class WritingModel(Protocol):
    """What a store needs of a model to write with it; `MemoryModel` has all of it."""

    tokenizer_identity: str

    def check(self, memory: Memory) -> None: ...
    def prompts_or_raise(self) -> Prompts: ...
    def tokens(self, content: str | Sequence[Message], role: str | None = None) -> list[int]: ...
    def write_ids(
        self, memory: Memory, ids: list[int], source: str, progress: Progress | None, updates: Updates | None
    ) -> Memory: ...


@dataclass(frozen=True)
class Tokens:
    """A text as a model reads it: ids, the role under which they are written, the tokenizer; or the model's refusal."""

    ids: Sequence[int] = ()
    role: str | None = None
    tokenizer: str = ""
    refusal: ValueError | None = None

    def checked(self) -> Tokens:
        """These tokens; raises the refusal."""
        if self.refusal is not None:
            raise self.refusal
        return self


class Writer:
    """Changes the memories of one store; whoever calls holds the memory, except for `append`."""

    def __init__(self, journal: Journal, books: Books, states: States, locks: Locks) -> None:
        self._journal, self._books, self._states, self._locks = journal, books, states, locks
        self._tokens: OrderedDict[int, Tokens] = OrderedDict()  # of rows that wait

    # --- acknowledging ----------------------------------------------------------------------------------------------

    def append(self, name: str, payload: Payload, key: str | None, llm: WritingModel | None) -> Row:
        """The row of a write, pending, or the row that has this key already."""
        tokens = None if llm is None else tokenised(llm, payload)
        with self._journal.transaction():
            memory = self._journal.id(name)
            return self._keyed(memory, payload, key) or self._acknowledge(memory, payload, key, tokens)

    def write(
        self,
        llm: WritingModel,
        memory: int,
        payload: Payload,
        key: str | None = None,
        progress: Progress | None = None,
        tokens: Tokens | None = None,
    ) -> Row:
        """Acknowledge a write and apply it; where that fails, nothing has changed."""
        self.advance(llm, memory)
        known = self._keyed(memory, payload, key)
        if known is not None:
            return _succeeded(known)
        pending = self._acknowledge(memory, payload, key, tokens or tokenised(llm, payload))
        try:
            self.settle(llm, memory, progress, pending.seq)
            return _succeeded(self._journal.row(pending.id))
        except BaseException as error:
            self._withdraw(pending, error)
            raise

    def _keyed(self, memory: int, payload: Payload, key: str | None) -> Row | None:
        """The version of this key, if it is that of the same text."""
        row, name = None if key is None else self._journal.keyed(memory, key), self._journal.name(memory)
        if row is not None and row.payload.get("sha256") != payload["sha256"]:
            raise ValueError(f"the key {key!r} belongs to another text, version {row.seq} of {name!r}; use a new key.")
        at = self._journal.expiries(memory).get(payload["source"])
        if row is None and at is not None and at <= time.time():
            raise ValueError(
                f"the source {payload['source']!r} of {name!r} has expired, so what is written would be forgotten at "
                f"once; give it another time with `expire`, or None."
            )
        return row

    def _acknowledge(self, memory: int, payload: Payload, key: str | None, tokens: Tokens | None) -> Row:
        if tokens is not None:  # what the model refuses is not acknowledged
            payload = payload | {"tokens": len(tokens.checked().ids)}
        with self._journal.transaction():
            base = self._journal.head(memory).id
            row = self._journal.append(Row(memory, "write", base, payload, key, state="pending"))
        if tokens is not None:
            self._tokens[row.id] = tokens
            while len(self._tokens) > WAITING:  # others may have applied the oldest
                self._tokens.popitem(last=False)
        return row

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

    def _fail(self, row: Row, reason: str) -> None:
        self._journal.change(replace(row, state="failed", error=reason))

    # --- applying ---------------------------------------------------------------------------------------------------

    def advance(self, llm: WritingModel | None, memory: int, progress: Progress | None = None) -> None:
        """Apply the writes that wait, then forget the sources that have expired."""
        if llm is not None:
            self.settle(llm, memory, progress)
        for source in self._books.expired(memory):
            self.event(memory, "expire", source)

    def settle(self, llm: WritingModel, memory: int, progress: Progress | None = None, last: int | None = None) -> None:
        """Apply the writes that wait, in order, up to version `last`; one behind it would fail for the one before."""
        rows = [row for row in self._journal.pending(memory) if last is None or row.seq <= last]
        texts = [self._tokens_of(llm, row) for row in rows]
        for row, tokens, step in zip(rows, texts, in_all(progress, texts), strict=True):
            self._apply(llm, row, tokens, step)

    def _tokens_of(self, llm: WritingModel, row: Row) -> Tokens:
        """The tokens of a row that waits, from its acknowledgement if this process made it with the same tokenizer."""
        tokens = self._tokens.pop(row.id, None)
        return tokens if tokens and tokens.tokenizer == llm.tokenizer_identity else tokenised(llm, row.payload)

    def _apply(self, llm: WritingModel, row: Row, tokens: Tokens, progress: Progress | None) -> None:
        before = self._states.state(self._journal.row(row.base or 0))
        llm.check(before.memory)
        if row.attempts >= ATTEMPTS:
            return self._fail(row, f"applying it was broken off {ATTEMPTS} times")
        begun = replace(row, attempts=row.attempts + 1)
        self._journal.change(begun)
        try:
            with self._not_counted(row, KeyboardInterrupt, torch.OutOfMemoryError, OSError):
                computed = self.compute(llm, begun, before, tokens, progress)
        except ValueError as error:
            return self._fail(row, str(error))
        with self._not_counted(row, OSError):
            return self._commit(*computed)

    def _commit(self, row: Row, content: Sequence[Update] | Memory, after: Memory) -> None:
        """Put the object of a write on disk, then its row."""
        with self._locks.objects():
            put = self._states.put(row, content)
            with self._journal.transaction():
                self._journal.change(put)
                self._journal.keep_account(put, account_of(after).to_json())
        self._states.keep(row.id, after)

    @contextlib.contextmanager
    def _not_counted(self, row: Row, *errors: type[BaseException]) -> Iterator[None]:
        """Take an attempt off the row that ends with one of these errors: they pass, and the text is not the reason."""
        try:
            yield
        except errors:
            with contextlib.suppress(OSError):  # a full disk takes no note of it either
                self._journal.change(row)
            raise

    def compute(
        self, llm: WritingModel, row: Row, before: State, tokens: Tokens, progress: Progress | None
    ) -> tuple[Row, Sequence[Update] | Memory, Memory]:
        """Compute a write.

        Returns:
            The row, applied, but for its object; the content of that, a delta, or the memory where it is a snapshot;
            the memory with the write.
        """
        ids, limit = list(tokens.checked().ids), largest(before.memory)
        updates, nbytes = list[Update](), 0

        def keep(update: Update) -> None:  # a delta that is larger than the memory gives way to a snapshot
            nonlocal nbytes
            if nbytes < limit:
                updates.append(delta.kept(update))
                nbytes += delta.size(update)

        after = llm.write_ids(before.memory, ids, row.payload["source"], progress, keep)
        small = before.deltas + 1 < self._states.due(after)
        small &= after.settings.by_update or nbytes < size(after)
        payload = row.payload | {"tokens": len(ids), "resolved": tokens.role}
        own = {"ids": _digest(ids), "lost": lost_between(before.memory, after)}
        row = replace(row, payload=payload, state="applied", facts=facts(after) | own)
        return row, updates if small else after, after

    # --- without a text ---------------------------------------------------------------------------------------------

    def event(self, memory: int, event: str, source: str) -> Row:
        """Add a version that drops slots, or is computed from them, on top of the newest."""
        head = self._books.ready(self._journal.head(memory))
        row = Row(memory, event, head.id, {"source": source})
        after = plain(after_event(row, self._states.memory(head)))
        with self._journal.transaction():
            row = self._books.append(row, facts(after))
            self._journal.keep_account(row, account_of(after).to_json())
        self._states.keep(row.id, after)
        return row


def _succeeded(row: Row) -> Row:
    """The row of a write that was applied; a ValueError says why it was not."""
    if row.state == "failed":
        raise ValueError(row.error)
    return row


def tokenised(llm: WritingModel, payload: Payload) -> Tokens:
    """The tokens of a write, or the model's refusal."""
    if "ids" in payload:
        return Tokens(payload["ids"], tokenizer=llm.tokenizer_identity)
    role = None
    try:
        prompts = llm.prompts_or_raise()
        if "text" in payload:
            default = prompts.style.wrap if prompts.chats else None
            role = payload.get("resolved") or payload["role"] or default or "raw"
        content = payload["turns"] if "turns" in payload else payload["text"]
        return Tokens(llm.tokens(content, role), role, llm.tokenizer_identity)
    except ValueError as error:
        return Tokens(refusal=error)


def in_all(progress: Progress | None, texts: Sequence[Tokens]) -> Iterator[Progress | None]:
    """The progress of each of several writes, which counts the tokens of all of them."""
    done, total = 0, sum(len(text.ids) for text in texts)
    for text in texts:
        yield None if progress is None else partial(_share, progress, done, total)
        done += len(text.ids)


def _digest(ids: Sequence[int]) -> str:
    """A hash of token ids, by which a replay sees whether it writes the same ones."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _share(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)
