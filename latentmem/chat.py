"""A conversation: turns stay in the context while they fit; what leaves it is written into the memory, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from latentmem.core.memory import Memory
from latentmem.model import MAX_NEW_TOKENS, MemoryModel
from latentmem.prompts import Message


class Conversation:
    """Turns between a user and a model with a memory.

    Args:
        llm: the model.
        memory: what it remembers at the start.
        messages: turns that are still in the context, for example of a run that was cut off.
        source: the name under which turns are written.
        window: tokens of turns that are kept in the context; by default all that the model's context holds.

    Attributes:
        memory: the memory so far; it changes when turns leave the context, and at `close`.
        messages: the turns that are still in the context.
    """

    def __init__(
        self,
        llm: MemoryModel,
        memory: Memory,
        messages: Sequence[Message] = (),
        *,
        source: str = "chat",
        window: int | None = None,
    ) -> None:
        llm.check(memory)
        self.llm, self.memory, self.messages, self.source = llm, memory, list(messages), source
        self.window = window
        self._cache: Any = None
        self._read: list[int] = []  # the ids that `_cache` holds behind the memory

    def say(self, text: str, **generate_kwargs: Any) -> str:
        """Add a user's turn and return the answer."""
        return "".join(self.stream(text, **generate_kwargs)).strip()

    def stream(self, text: str, **generate_kwargs: Any) -> Iterator[str]:
        """Add a user's turn and give the answer piece by piece; what was given so far is kept if the caller leaves.

        Raises:
            ValueError: an empty turn, or one that does not fit into the context alone.
        """
        if not text.strip():
            raise ValueError("the message is empty.")
        new = generate_kwargs.setdefault("max_new_tokens", MAX_NEW_TOKENS)
        ids = self._make_room([*self.messages, {"role": "user", "content": text}], new)
        return self._answer(text, ids, generate_kwargs)

    def close(self) -> Memory:
        """Write the turns that are still in the context and return the memory."""
        self._write(len(self.messages))
        return self.memory

    def _answer(self, text: str, ids: list[int], generate_kwargs: dict[str, Any]) -> Iterator[str]:
        answer = ""
        prefix = self.llm.text_cache(self.memory) if self._cache is None else self._cache
        known = next((i for i, (a, b) in enumerate(zip(self._read, ids, strict=False)) if a != b), len(self._read))
        known = min(known, len(ids) - 1)  # `generate` needs at least one token to read
        self._crop(prefix, known)
        try:
            for part in self.llm.stream_ids(self.memory, ids[known:], cache=prefix, **generate_kwargs):
                answer += part
                yield part
        finally:
            if answer:
                self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.strip()}]
                self._cache, self._read = prefix, ids
                self._crop(prefix, len(ids))  # the answer is read again as a whole turn, behind its end marker
            else:
                self._cache, self._read = None, []

    def _crop(self, cache: Any, text: int) -> None:
        """Cut a cache back to its first `text` tokens behind the memory."""
        if cache is not None:
            surplus = cache.get_seq_length() - self.llm.positions(self.memory) - text
            if surplus > 0:
                cache.crop(-surplus)

    def _make_room(self, messages: list[Message], new: int) -> list[int]:
        """The prompt of the next answer; the oldest turns leave until it fits."""
        while True:
            ids = self.llm.prompts_or_raise().chat(messages, bare=self.memory.M > 0)
            room = self.llm.room(self.memory) - new
            if self.window is not None:
                room = min(room, self.window)
            if len(ids) <= room:
                return ids
            if not self.messages:
                raise ValueError(
                    f"the message takes {len(ids)} tokens and there is room for {room}; shorten it, "
                    f"or write it into the memory as a text."
                )
            leaving = min(2, len(self.messages))
            self._write(leaving)
            messages = messages[leaving:]

    def _write(self, count: int) -> None:
        """Write the oldest `count` turns into the memory, with their roles, and take them out of the context."""
        if count:
            prompts = self.llm.prompts_or_raise()
            ids = [i for message in self.messages[:count] for i in prompts.turn(message)]
            self.memory = self.llm.write_ids(self.memory, ids, self.source)
            del self.messages[:count]
            self._cache, self._read = None, []
