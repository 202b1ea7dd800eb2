"""A conversation with a named memory: its turns are safe before they are in the memory."""

from __future__ import annotations

import contextlib
import signal
import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from latentmem.store.journal import Row
from latentmem.store.store import Store

if TYPE_CHECKING:
    from latentmem.core.memory import Memory
    from latentmem.model.prompts import Message
    from latentmem.store.writing import WritingModel


class Turns:
    """The turns of a conversation with a named memory that are not in it yet: a `latentmem.model.chat.Journal`.

    They lie in the store's database. Turns on their way into the memory are kept with the idempotency key of that
    write, so whoever opens them next knows whether they are there. Use it with `with`: a memory has one conversation
    at a time.

    Args:
        store: where the memory is.
        name: its name.

    Raises:
        ValueError: no such memory.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self._journal = store, name, store._journal
        self._memory = self._journal.id(name)
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Turns:
        """Wait for another conversation with this memory; a ValueError says whose it is."""
        self._held.enter_context(self._store._locks.turns(self._name))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def pending(self) -> list[Message]:
        """Turns of a conversation that ended without being written.

        Raises:
            ValueError: they wait in the journal; `Store.apply` comes first.
        """
        kept, row = self._kept()
        if row is not None and row.state == "pending":
            raise ValueError(f"version {row.seq} of {self._name!r} waits to be applied; `apply` does it.")
        return self._not_written(kept, row)

    def count(self) -> int:
        """How many turns are in no version yet."""
        return len(self._not_written(*self._kept()))

    def settle(self, llm: WritingModel) -> int:
        """Write the turns of a conversation that was cut off; gives how many. One that goes on keeps its turns.

        Raises:
            ValueError, OSError: as `Store.write`; all turns are kept.
        """
        if not self.count():
            return 0
        with self._store._locks.if_free(f"{self._memory}-turns") as free:
            kept, _ = self._kept()
            messages = self.pending() if free else []
            if kept is not None and messages:
                self.write(llm, messages, len(messages), kept["source"])
            return len(messages)

    def _kept(self) -> tuple[dict[str, Any] | None, Row | None]:
        """What was kept, and the version into which some of the turns were on their way, if there is one."""
        kept = self._journal.turns(self._memory)
        on_their_way = kept is not None and kept["leaving"]
        return kept, self._journal.keyed(self._memory, kept["key"]) if kept and on_their_way else None

    def _not_written(self, kept: dict[str, Any] | None, row: Row | None) -> list[Message]:
        if kept is None:
            return []
        there = row is not None and row.state in ("applied", "pending")
        return kept["messages"][kept["leaving"] :] if there else kept["messages"]

    def keep_turns(self, messages: Sequence[Message], source: str) -> None:
        """Keep turns that are not in the memory, so that a crash loses none."""
        self._keep(messages, source)

    def write(self, llm: WritingModel, messages: Sequence[Message], count: int, source: str) -> Memory:
        """Write the first `count` of these turns and keep the others; returns the memory with them.

        Raises:
            ValueError, OSError: as `Store.write`; all turns are kept.
        """
        key = f"turns {uuid.uuid4().hex}"
        self._keep(messages, source, count, key)
        try:
            self._store.write(llm, self._name, messages[:count], source, key=key)
        except KeyboardInterrupt:  # it may have come behind the commit
            row = self._journal.keyed(self._memory, key)
            if row is None or row.state != "applied":
                raise
        with _no_interrupt():
            self._keep(messages[count:], source)
            return self._store.open(self._name)

    def _keep(self, messages: Sequence[Message], source: str, leaving: int = 0, key: str = "") -> None:
        kept = {"source": source, "messages": list(messages), "leaving": leaving, "key": key}
        self._journal.keep_turns(self._memory, kept if messages else None)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Let no Ctrl-C come between steps that belong together; they take milliseconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
