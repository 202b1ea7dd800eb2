"""Writing again: to forget a source as if it had never been written, or to rebuild a memory with another model.

    versions            0 ── 1 write "a" ── 2 write "b" ── 3 pin "a" ── 4 write "c"      each made from the one before
    forget "a"          0 ───────────────── 1 write "b" ─────────────── 2 write "c"

1. plan: the versions of the source go; all that are made from them, in every fork, are computed again.
2. compute: each on top of the new state of its base. The objects are on disk, and `building` in the journal keeps them
   from being swept; the rows are still the old ones.
3. exchange: in one transaction, the new rows take the place of the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from latentmem.model.writing import Progress
from latentmem.store.journal import BEGINNINGS, Journal, Row
from latentmem.store.locks import Locks
from latentmem.store.states import State, States, after_event, facts, plain
from latentmem.store.writing import Tokens, Writer, WritingModel, content_of, in_all, payload, tokenised

New = dict[int, Row | None]  # id of an old row -> what takes its place, its base still the old one; None: nothing


class Replay:
    """Writes the versions of one store again."""

    def __init__(self, journal: Journal, states: States, locks: Locks, writer: Writer) -> None:
        self._journal, self._states, self._locks, self._writer = journal, states, locks, writer

    # --- forgetting -------------------------------------------------------------------------------------------------

    def forget(self, llm: WritingModel, name: str, source: str, progress: Progress | None = None) -> list[str]:
        """`Store.forget_by_replay`, without the sweep."""
        with self._locks.family(name) as family:
            for memory in family:
                self._journal.built(memory)  # of a replay that was broken off
            rows = self._journal.rows(family)
            new = self._compute(llm, rows, self._removed(rows, source), progress)
            return self._exchange(family, new, source)

    def _removed(self, rows: list[Row], source: str) -> set[int]:
        """The versions of a source; a ValueError if they can not be replayed without it."""
        for row in rows:
            if row.event in BEGINNINGS and source in (s.name for s in self._states.memory(row).sources):
                raise ValueError(
                    f"the source {source!r} was in the memory before its journal began, so it can not be replayed "
                    f"without it; `forget` drops its slots."
                )
        removed = [row for row in rows if row.payload.get("source") == source]
        if not any(row.event == "write" for row in removed):
            raise ValueError(f"the journal has no write of the source {source!r}.")
        return {row.id for row in removed}

    def _compute(self, llm: WritingModel, rows: list[Row], removed: set[int], progress: Progress | None) -> New:
        """Compute all versions anew that are made from removed ones.

        Args:
            rows: all versions of a family, each behind its base.
        """
        changed = set(removed)
        for row in rows:
            if row.base in changed:
                changed.add(row.id)
        again = [row for row in rows if row.id in changed]
        writes = [row for row in again if row.id not in removed and row.event == "write" and row.state == "applied"]
        texts = {row.id: tokenised(llm, row.payload) for row in writes}
        steps = in_all(progress, list(texts.values()))
        last_child = {row.base: row.id for row in again}
        new: New = {}
        states: dict[int, State] = {}  # new states of bases, until their last child
        for row in again:
            base = row.base or 0
            before = states.get(base) or self._states.state(self._journal.row(base))
            if row.id in removed:
                new[row.id], after = None, before
            elif row.id in texts:
                new[row.id], after = self._write(llm, row, before, texts[row.id], next(steps))
            else:
                new[row.id], after = self._repeat(row, before)
            if row.id in last_child:
                states[row.id] = after
            if last_child[base] == row.id:
                states.pop(base, None)
        return new

    def _repeat(self, row: Row, before: State) -> tuple[Row, State]:
        """A version without a text, or of a write that waits or has failed, on top of another state of its base."""
        if row.event == "write":
            return row, before
        try:
            after = plain(after_event(row, before.memory))
        except ValueError as error:
            return replace(row, state="failed", error=str(error)), before
        return replace(row, facts=facts(after) if row.facts else {}), State(after, before.deltas)

    def _write(
        self, llm: WritingModel, row: Row, before: State, tokens: Tokens, progress: Progress | None
    ) -> tuple[Row, State]:
        """The version of a write on top of another state of its base, its object on disk."""
        llm.check(before.memory)
        kept = {name: value for name, value in row.facts.items() if name != "blocks"}
        bare = replace(row, kind="none", object=None, bytes=0, facts=kept)
        try:
            computed, content, after = self._writer.compute(llm, bare, before, tokens, progress)
        except ValueError as error:
            return replace(bare, state="failed", error=str(error)), before
        with self._locks.objects():
            written = self._states.put(computed, content)
            for name in [written.object or "", *written.facts.get("blocks", ())]:
                self._journal.build(row.memory, name)
        return written, State(after, before.deltas + 1 if written.kind == "delta" else 0)

    def _exchange(self, family: list[int], new: New, source: str) -> list[str]:
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
                if (journal.turns(memory) or {}).get("source") == source:
                    journal.keep_turns(memory, None)
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
        path = list(self._journal.lineage(self._states.ready(self._journal.head(self._journal.id(name)))))
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


def _numbers(rows: list[Row]) -> dict[int, int]:
    """id -> number of the version among the rows of its memory that stay, in their order."""
    numbers: dict[int, int] = {}
    counts: dict[int, int] = {}
    for row in sorted(rows, key=lambda row: row.seq):
        numbers[row.id] = counts.get(row.memory, 0)
        counts[row.memory] = numbers[row.id] + 1
    return numbers
