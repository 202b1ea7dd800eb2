"""A conversation: what is said is written at once; the newest turns stand in the context, all are in the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, get_args

from latentmem.core.memory import Memory
from latentmem.model.generating import MAX_NEW_TOKENS
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Message, Prompts, TurnSource, Write, content_of


class Journal(Protocol):
    """What keeps the turns of a conversation from a crash; `latentmem.store.Turns` is one."""

    def keep(self, llm: MemoryModel, turn: Message, source: str | None = None) -> str:
        """Keep a turn under the source of the turn that it answers, or under a new one; gives the source."""

    def memory(self, llm: MemoryModel) -> Memory:
        """The memory with all turns that were kept."""


class Conversation:
    """Turns between a user and a model with a memory.

    A turn of the user is kept before it is answered, and in the memory once it is: its answer is made of the memory
    before it. Each is a source of its own, such as "chat 2026-12-01 12:30 #3", so `forget` can take back one.

    Args:
        llm: the model.
        memory: what it remembers at the start.
        messages: turns that were said before and are in the memory; they stand in the context.
        write: whose turns are written: "user", "both", "none".
        source: how the names of the turns' sources begin.
        window: tokens of earlier turns that are kept in the context; by default what suits the model (`Style.window`).
        journal: keeps each turn; by default a turn is in `memory` alone.

    Attributes:
        memory: the memory so far; it changes after each answer.
        messages: the turns that are in the context, a user's and the model's in turn.
        sources: of the turns that were kept, in order.
    """

    def __init__(
        self,
        llm: MemoryModel,
        memory: Memory,
        messages: Sequence[Message] = (),
        *,
        write: Write = "user",
        source: str = "chat",
        window: int | None = None,
        journal: Journal | None = None,
    ) -> None:
        llm.check(memory)
        check_write(write)
        self.llm, self.memory, self.messages = llm, memory, list(messages)
        self.write, self.source, self.sources = write, source, list[str]()
        self.window = llm.prompts_or_raise().style.window if window is None else window
        self._journal = journal or _Unsaved(memory, source)

    def say(self, text: str, **generate_kwargs: Any) -> str:
        """Add a user's turn and return the answer."""
        return "".join(self.stream(text, **generate_kwargs)).strip()

    def stream(self, text: str, **generate_kwargs: Any) -> Iterator[str]:
        """Add a user's turn and give the answer piece by piece; what was given so far is kept if the caller leaves.

        Greedy, at most 128 new tokens, ended before a sentence that it has said already (`repeats=False`), unless
        `generate_kwargs` says otherwise.

        Raises:
            ValueError: an empty turn, or one that does not fit into the context alone; nothing is changed then.
        """
        if not text.strip():
            raise ValueError("the message is empty.")
        kwargs = {"max_new_tokens": MAX_NEW_TOKENS, "repeats": False} | generate_kwargs
        asked = {"role": "user", "content": text}
        ids = self._prompt(asked, kwargs["max_new_tokens"])
        source = None
        if self.write != "none":
            source = self._journal.keep(self.llm, asked)
            self.sources.append(source)
        return self._answer(asked, ids, source, kwargs)

    def close(self) -> Memory:
        """The memory with all turns, also with one whose answer nobody has read."""
        self.memory = self._journal.memory(self.llm)
        return self.memory

    def _answer(self, asked: Message, ids: list[int], source: str | None, kwargs: dict[str, Any]) -> Iterator[str]:
        answer = ""
        try:
            for part in self.llm.stream_ids(self.memory, ids, **kwargs):
                answer += part
                yield part
        finally:
            said = {"role": "assistant", "content": answer.strip()}
            self.messages += [asked, said]
            if source is not None:
                if self.write == "both" and said["content"]:
                    self._journal.keep(self.llm, said, source)
                self.close()

    def _prompt(self, asked: Message, new: int) -> list[int]:
        """The prompt of the next answer; the oldest turns leave the context until it fits."""
        prompts, room, bare = self.llm.prompts_or_raise(), self.llm.room(self.memory) - new, not self.memory.is_empty
        ids = alone = prompts.chat([asked], bare=bare)
        if len(alone) > room:
            raise ValueError(
                f"the message takes {len(alone)} tokens and there is room for {room}; shorten it, or write it into "
                f"the memory as a text."
            )
        messages = recent(prompts, self.messages, self.window)
        while messages and len(ids := prompts.chat([*messages, asked], bare=bare)) > room:
            messages = recent(prompts, messages[1:], self.window)
        self.messages = messages
        return ids if messages else alone


class _Unsaved:
    """Turns that are in a memory value alone."""

    def __init__(self, memory: Memory, source: str) -> None:
        self._memory, self._name, self._waiting = memory, source, list[tuple[list[int], str]]()

    def keep(self, llm: MemoryModel, turn: Message, source: str | None = None) -> str:
        source = TurnSource(self._name, source)(self._memory.updates + len(self._waiting) + 1)
        self._waiting.append((llm.tokens(*content_of(turn)), source))
        return source

    def memory(self, llm: MemoryModel) -> Memory:
        while self._waiting:
            self._memory = llm.write_ids(self._memory, *self._waiting[0])
            del self._waiting[0]
        return self._memory


def check_write(write: str) -> None:
    """A ValueError if this is nothing that a conversation can write."""
    if write not in get_args(Write):
        raise ValueError(f"write must be one of {', '.join(get_args(Write))}, got {write!r}.")


def recent(prompts: Prompts, messages: Sequence[Message], window: int) -> list[Message]:
    """The newest turns that take no more tokens than a window: whole exchanges, each with the user's turn first."""
    kept = len(messages)
    for i in range(len(messages) - 1, -1, -1):
        window -= len(prompts.turn(messages[i]))
        if window < 0:
            break
        if messages[i]["role"] == "user":
            kept = i
    return list(messages[kept:])


def in_context(prompts: Prompts, messages: Sequence[Message], window: int | None = None) -> list[Message]:
    """The last of some messages, behind those of the system and as many earlier ones as a window takes."""
    *earlier, last = messages
    window = prompts.style.window if window is None else window
    system = [message for message in earlier if message["role"] == "system"]
    return [*system, *recent(prompts, [m for m in earlier if m["role"] != "system"], window), last]
