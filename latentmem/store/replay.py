"""Writing again: to forget a source as if it had never been written, or to rebuild a memory with another model.

    versions            0 ── 1 write "a" ── 2 write "b" ── 3 pin "a" ── 4 write "c"      each made from the one before
    forget "a"          0 ───────────────── 1 write "b" ─────────────── 2 write "c"

1. plan: the versions of the source go; all that are made from them, in every fork, are computed again. So are pruned
   ones that these are made from, which have to become what they were: nothing of them is stored. A pruned version
   comes back, in its place, where one that goes was the first behind it.
2. compute: each on top of the new state of its base. The objects are on disk, and `building` in the journal keeps them
   from being swept; the rows are still the old ones.
3. exchange: in one transaction, the new rows take the place of the old ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from latentmem.core.memory import Memory, Update
from latentmem.model.writing import Progress
from latentmem.store.books import Books, of_source
from latentmem.store.contents import content_of, payload
from latentmem.store.journal import BEGINNINGS, Journal, Row
from latentmem.store.locks import Locks
from latentmem.store.states import State, States, after_event, facts, plain
from latentmem.store.writing import Tokens, Writer, WritingModel, in_all, tokenised

GONE = sys.maxsize  # the deltas of a state that no object holds: a snapshot comes next
New = dict[int, Row | None]  # id of an old row -> what takes its place, its base still the old one; None: nothing


class Replay:
    """Writes the versions of one store again."""

    def __init__(self, journal: Journal, books: Books, states: States, locks: Locks, writer: Writer) -> None:
        self._journal, self._books, self._states = journal, books, states
        self._locks, self._writer = locks, writer

    # --- forgetting -------------------------------------------------------------------------------------------------

    def forget(self, llm: WritingModel, name: str, source: str, progress: Progress | None = None) -> list[str]:
        """`Store.forget_by_replay`, without the sweep."""
        with self._locks.family(name) as family:
            for memory in family:
                self._journal.built(memory)  # of a replay that was broken off
            rows = self._journal.rows(family)
            new, back = self._compute(llm, rows, self._removed(rows, source), progress)
            return self._exchange(family, new, back, source)

    def _removed(self, rows: list[Row], source: str) -> set[int]:
        """The versions of a source; a ValueError if they can not be replayed without it."""
        for row in rows:
            if row.event in BEGINNINGS and source in (s.name for s in self._states.memory(row).sources):
                raise ValueError(
                    f"the source {source!r} was in the memory before its journal began, so it can not be replayed "
                    f"without it; `forget` drops its slots."
                )
        return of_source(rows, source)

    def _compute(
        self, llm: WritingModel, rows: list[Row], removed: set[int], progress: Progress | None
    ) -> tuple[New, dict[int, Row]]:
        """Compute all versions anew that are made from removed ones, and pruned ones that come back in their places.

        Args:
            rows: all versions of a family, each behind its base.
        """
        plan = _Plan(rows, removed)
        again = [row for row in rows if row.id in plan.computed]
        texts = {row.id: tokenised(llm, row.payload) for row in again if plan.has_text(row)}
        steps = in_all(progress, list(texts.values()))
        last_child = {row.base: row.id for row in again}
        new: New = {}
        back: dict[int, Row] = {}
        states: dict[int, State] = {}  # new states of bases, until their last child
        for row in again:
            base = row.base or 0
            following, after = self._again(llm, plan, row, states.get(base), texts.get(row.id), steps)
            if row.id in plan.changed:
                new[row.id] = following
            elif following is not None:
                self._check_same(row, following)
                back |= {row.id: following} if row.id in plan.revived else {}
            if row.id in last_child:
                states[row.id] = after
            if last_child[base] == row.id:
                states.pop(base, None)
        return new, back

    def _again(
        self,
        llm: WritingModel,
        plan: _Plan,
        row: Row,
        before: State | None,
        tokens: Tokens | None,
        steps: Iterator[Progress | None],
    ) -> tuple[Row | None, State]:
        """One version that is computed again.

        Args:
            before: new state of its base, if that is computed again too.
            tokens: of its text, if it is a write that was applied.

        Returns:
            What takes its place, or None where it goes; and the new state.
        """
        bare, closed = plan.bare(row), row.base in plan.closed
        if plan.has_object(row):
            return self._placed(bare, *self._states.state(row), closed)
        before = before or self._states.state(self._journal.row(row.base or 0))
        if plan.goes(row):
            return None, before
        if tokens is not None:
            return self._write(llm, bare, before, closed, tokens, next(steps))
        return self._repeat(bare, before, closed)

    def _check_same(self, row: Row, following: Row) -> None:
        """A ValueError if a pruned version, which forgetting does not change, has not become what it was."""
        tokens = [one.payload.get("tokens") for one in (row, following)]
        ids = [one.facts.get("ids") for one in (row, following)]  # older rows have none
        if (row.state, row.error) != (following.state, following.error):
            reason = following.error or f"it is {following.state} now, and was {row.state}"
        elif tokens[0] is not None and tokens[0] != tokens[1]:
            reason = f"its text is {tokens[1]} tokens now, and was {tokens[0]}"
        elif ids[0] is not None and ids[0] != ids[1]:
            reason = "its text is other tokens now"
        else:
            return
        raise ValueError(
            f"version {row.seq} of {self._journal.name(row.memory)!r} can not be written again: it was pruned, and "
            f"{reason.rstrip('.')}; nothing has changed. Give the model, the tokenizer and the chat template that "
            f"wrote it."
        )

    def _repeat(self, row: Row, before: State, closed: bool) -> tuple[Row, State]:
        """A version without a text, or of a write that waits or has failed, on top of another state of its base."""
        bare, memory = _without_object(row), before.memory
        if row.event != "write":
            try:
                memory = plain(after_event(row, memory))
                new_facts = _facts(row, facts(memory)) if row.facts else {}
                bare = replace(bare, state="applied", error=None, facts=new_facts)
            except ValueError as error:
                bare = replace(bare, state="failed", error=str(error))
        return self._placed(bare, memory, before.deltas, closed)

    def _write(
        self, llm: WritingModel, row: Row, before: State, closed: bool, tokens: Tokens, progress: Progress | None
    ) -> tuple[Row, State]:
        """The version of a write on top of another state of its base, its object on disk."""
        llm.check(before.memory)
        bare = _without_object(row)
        try:
            computed, content, after = self._writer.compute(llm, bare, before, tokens, progress)
        except ValueError as error:
            failed = replace(bare, state="failed", error=str(error))
            return self._placed(failed, before.memory, before.deltas, closed)
        computed = replace(computed, facts=_facts(row, computed.facts))
        if computed.kind == "pruned":
            return computed, State(after, GONE)
        written = self._put(computed, content)
        return written, State(after, before.deltas + 1 if written.kind == "delta" else 0)

    def _placed(self, row: Row, memory: Memory, deltas: int, closed: bool) -> tuple[Row, State]:
        """A row that needs no object, but where its base has none any more, or can not be opened while the row can.

        Args:
            deltas: of the base.
            closed: whether the base can not be opened.
        """
        if row.kind == "pruned":
            return row, State(memory, GONE)
        if row.kind != "none" or (deltas < GONE and (row.pruned or not closed)):
            return row, State(memory, deltas)
        return self._put(row, memory), State(memory, 0)

    def _put(self, row: Row, content: Sequence[Update] | Memory) -> Row:
        with self._locks.objects():
            return self._states.build(row, content)

    def _exchange(self, family: list[int], new: New, back: dict[int, Row], source: str) -> list[str]:
        """Put the new rows in the place of the old ones, in one transaction; gives the names of changed memories."""
        journal = self._journal
        with journal.transaction():
            rows = journal.rows(family)
            for row in rows:
                if row.base in new and row.id not in new:
                    new[row.id] = row  # it was acknowledged while the others were computed, and waits
            numbers = _numbers([row for row in rows if new.get(row.id, row) is not None])
            journal.remove(sorted(new, reverse=True))
            for row in sorted((row for row in rows if row.id not in new), key=lambda row: row.seq):
                journal.renumber(row.id, numbers[row.id])
            for id, row in back.items():
                journal.change(replace(row, seq=numbers[id]))
            ids: dict[int | None, int | None] = {None: None}  # id of an old row -> of what stands there now
            for row in rows:
                following = new.get(row.id, row)
                if following is None:
                    ids[row.id] = ids[row.base]
                elif row.id not in new:
                    ids[row.id] = row.id
                else:
                    ids[row.id] = journal.insert(replace(following, base=ids[row.base], seq=numbers[row.id])).id
            for memory in family:
                journal.set_expiry(memory, source, None)
                journal.built(memory)
            journal.keep_setting("sweep", "due")
        self._states.cache.clear()
        return sorted({journal.name(row.memory) for row in rows if row.id in new})

    # --- rebuilding -------------------------------------------------------------------------------------------------

    def path(self, llm: WritingModel, name: str) -> list[Row]:
        """What led to the newest version of a memory, its beginning first.

        Raises:
            ValueError: a version waits, the memory held something before its journal began, or a version was written
                as token ids of another tokenizer than the model's.
        """
        path = list(self._journal.lineage(self._books.ready(self._journal.head(self._journal.id(name)))))
        first = path[-1]
        if first.event != "create" or any(row.event in BEGINNINGS for row in path[:-1]):
            raise ValueError(
                f"{name!r} began with a memory that held something already; its journal can not rebuild it."
            )
        ids = [row.seq for row in path if "ids" in row.payload]
        if ids and self._states.memory(first).tokenizer != llm.tokenizer_identity:
            raise ValueError(f"version {ids[-1]} was written as token ids of another tokenizer.")
        return path[::-1]

    def repeat(self, llm: WritingModel, path: Sequence[Row], name: str, progress: Progress | None) -> None:
        """Write into a memory what a path holds, and repeat the events between."""
        texts = {
            row.id: payload(content_of(row) or "", row.payload["source"], row.payload["role"])
            for row in path
            if row.event == "write" and row.state != "failed"
        }
        tokens = {id: tokenised(llm, text) for id, text in texts.items()}
        steps = in_all(progress, list(tokens.values()))
        with self._locks.memory(name) as memory:
            for row in path:
                if row.id in texts:
                    self._writer.write(llm, memory, texts[row.id], None, next(steps), tokens[row.id])
                elif row.event in ("pin", "unpin", "forget", "expire"):
                    event = "forget" if row.event == "expire" else row.event
                    self._writer.event(memory, event, row.payload["source"])


class _Plan:
    """What becomes of the versions of a family.

    Args:
        rows: all of them, each behind its base.
        removed: ids of those that go.

    Attributes:
        changed: ids of those that go and of all that are made from them.
        revived: ids of pruned ones in whose state one that goes leaves the memory.
        closed: ids of those that can not be opened afterwards; one that goes is as the version before it.
        computed: ids of all that are computed again.
    """

    def __init__(self, rows: list[Row], removed: set[int]) -> None:
        by_id = {row.id: row for row in rows}
        self._removed, self.changed, self.closed = removed, set(removed), set[int]()
        self.revived = _revived(by_id, removed)
        for row in rows:
            if row.base in self.changed:
                self.changed.add(row.id)
            if row.base in self.closed if row.id in removed else row.pruned and row.id not in self.revived:
                self.closed.add(row.id)
        self.computed = self.changed | self.revived | self._pruned_bases(by_id)

    def _pruned_bases(self, by_id: dict[int, Row]) -> set[int]:
        """Versions without an object from which computed ones are made."""
        bases: set[int] = set()
        for start in (*(by_id[id].base for id in self.changed), *self.revived):
            id = start
            while id is not None and id not in self.changed and id not in bases and by_id[id].kind == "pruned":
                bases.add(id)
                id = by_id[id].base
        return bases

    def has_object(self, row: Row) -> bool:
        """Whether a version is only to be opened again: its object has stayed, or that of its base."""
        return row.id not in self.changed and row.kind != "pruned"

    def goes(self, row: Row) -> bool:
        """Whether a version is one of the forgotten source."""
        return row.id in self._removed

    def has_text(self, row: Row) -> bool:
        """Whether a computed version is a text that is to be written again."""
        is_text = row.event == "write" and row.state == "applied"
        return is_text and not self.goes(row) and not self.has_object(row)

    def bare(self, row: Row) -> Row:
        return _unpruned(row) if row.id in self.revived else row


def _revived(by_id: dict[int, Row], removed: set[int]) -> set[int]:
    """Pruned versions in whose state one that goes leaves the memory."""
    revived = set()
    for id in removed:
        row = by_id[id]
        if not row.pruned:
            while row.id in removed:
                row = by_id[row.base or 0]
            if row.pruned:
                revived.add(row.id)
    return revived


def _unpruned(row: Row) -> Row:
    """A pruned version that is to be opened again."""
    kind = "none" if row.kind == "pruned" else row.kind
    return replace(row, kind=kind, facts={name: fact for name, fact in row.facts.items() if name != "pruned"})


def _without_object(row: Row) -> Row:
    kept = {name: fact for name, fact in row.facts.items() if name != "blocks"}
    return replace(row, kind="pruned" if row.kind == "pruned" else "none", object=None, bytes=0, facts=kept)


def _facts(row: Row, facts: dict[str, Any]) -> dict[str, Any]:
    """New facts of a version, which stays pruned if it was."""
    return facts | ({"pruned": True} if row.pruned else {})


def _numbers(rows: list[Row]) -> dict[int, int]:
    """id -> number of the version among the rows of its memory that stay, in their order."""
    numbers: dict[int, int] = {}
    counts: dict[int, int] = {}
    for row in sorted(rows, key=lambda row: row.seq):
        numbers[row.id] = counts.get(row.memory, 0)
        counts[row.memory] = numbers[row.id] + 1
    return numbers
