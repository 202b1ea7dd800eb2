"""A conversation with a named memory: each turn is acknowledged before it is answered, as any other write is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentmem.model.prompts import TurnSource, content_of
from latentmem.store.store import Store

if TYPE_CHECKING:
    from latentmem.core.memory import Memory
    from latentmem.model.prompts import Message
    from latentmem.store.writing import WritingModel


class Turns:
    """The turns of a conversation with a named memory: a `latentmem.model.chat.Journal`.

    Any number of conversations with one memory may go on at once.

    Args:
        store: where the memory is.
        name: its name.
        source: how the names of the turns' sources begin.
    """

    def __init__(self, store: Store, name: str, source: str = "chat") -> None:
        self._store, self._name, self._source = store, name, source

    def keep(self, llm: WritingModel, turn: Message, source: str | None = None) -> str:
        """Acknowledge a turn; the next that reads the memory applies it. Errors as of `Store.append`."""
        named = TurnSource(self._source, source)
        content, role = content_of(turn)
        self._store.append(self._name, content, named, role=role, llm=llm)
        return named.name

    def memory(self, llm: WritingModel) -> Memory:
        """The memory with all that was acknowledged."""
        return self._store.open(self._name, llm=llm)
