"""A conversation: turns stay in the context while they fit; what leaves it is written into the memory, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from transformers import Cache

from latentmem.core.memory import Memory
from latentmem.decoder.cache import MemoryCache
from latentmem.model.generating import MAX_NEW_TOKENS
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Message, shared_length


class Journal(Protocol):
    """What keeps a conversation safe from a crash; `latentmem.store.Turns` is one."""

    def keep_turns(self, messages: list[Message], source: str) -> None:
        """These turns are in the context and not in the memory."""

    def write(self, llm: MemoryModel, messages: list[Message], count: int, source: str) -> Memory:
        """Write the first `count` of these turns, so that none is lost or written twice; the memory with them."""


class Conversation:
    """Turns between a user and a model with a memory.

    Args:
        llm: the model.
        memory: what it remembers at the start.
        messages: turns that are still in the context, for example of a run that was cut off.
        source: the name under which turns are written.
        window: tokens of turns that are kept in the context; by default all that the model's context holds.
        journal: is told of every turn before it can be lost.

    Attributes:
        memory: the memory so far; it changes when turns leave the context, and at `close`.
        messages: the turns that are still in the context, a user's and the model's in turn.
    """

    def __init__(
        self,
        llm: MemoryModel,
        memory: Memory,
        messages: Sequence[Message] = (),
        *,
        source: str = "chat",
        window: int | None = None,
        journal: Journal | None = None,
    ) -> None:
        llm.check(memory)
        self.llm, self.memory, self.messages, self.source = llm, memory, list(messages), source
        self.window, self.journal = window, journal
        if self.messages and self.messages[-1]["role"] == "user":  # it was cut off before the answer
            self.messages.append({"role": "assistant", "content": ""})
        self._cache: Cache | None = None
        self._read: list[int] = []  # the ids that `_cache` holds behind the memory

    def say(self, text: str, **generate_kwargs: Any) -> str:
        """Add a user's turn and return the answer."""
        return "".join(self.stream(text, **generate_kwargs)).strip()

    def stream(self, text: str, **generate_kwargs: Any) -> Iterator[str]:
        """Add a user's turn and give the answer piece by piece; what was given so far is kept if the caller leaves.

        Raises:
            ValueError: an empty turn, or one that does not fit into the context alone; nothing is changed then.
        """
        if not text.strip():
            raise ValueError("the message is empty.")
        new = generate_kwargs.setdefault("max_new_tokens", MAX_NEW_TOKENS)
        asked = {"role": "user", "content": text}
        ids = self._make_room(asked, new)
        if self.journal:
            self.journal.keep_turns([*self.messages, asked], self.source)
        return self._answer(asked, ids, generate_kwargs)

    def close(self) -> Memory:
        """Write the turns that are still in the context and return the memory."""
        self._write(len(self.messages))
        return self.memory

    def _answer(self, asked: Message, ids: list[int], generate_kwargs: dict[str, Any]) -> Iterator[str]:
        answer, whole = "", True
        cache, known = self._read_before(asked, ids)
        try:
            for part in self.llm.stream_ids(self.memory, ids[known:], cache=cache, **generate_kwargs):
                answer += part
                yield part
        except Exception:
            whole = False  # some layers may have read more than others
            raise
        finally:
            self.messages += [asked, {"role": "assistant", "content": answer.strip()}]
            self._cache, self._read = (cache, ids) if whole else (None, [])
            self._crop(self._cache, len(ids))  # the answer is read again as a whole turn, behind its end marker
            if self.journal:
                self.journal.keep_turns(self.messages, self.source)

    def _read_before(self, asked: Message, ids: list[int]) -> tuple[Cache | None, int]:
        """The cache behind which an answer begins, and how many ids of the prompt the cache holds already."""
        question = self.llm.prompts_or_raise().chat([asked], bare=not self.memory.is_empty)
        cache = self.llm.text_cache(self.memory, question, self._cache)
        if cache is None:
            return None, 0
        known = 0
        if cache is self._cache:  # the long-term memory gives the same as for the last question
            known = min(shared_length(self._read, ids), len(ids) - 1)  # at least one token is left to read
        self._crop(cache, known)
        return cache, known

    def _crop(self, cache: Cache | None, text: int) -> None:
        """Cut a cache back to its first `text` tokens behind the memory."""
        if cache is not None:
            front = cache.fronts[0].P if isinstance(cache, MemoryCache) else 0
            surplus = cache.get_seq_length() - front - text
            if surplus > 0:
                cache.crop(-surplus)

    def _slots_of_turns(self) -> int:
        """The most slots that writing all turns may take; a preset may fill up what a short text writes."""
        if self.memory.rules.slots_of(1, self.memory.K, 1) > 1:
            return self.memory.N
        tokens = len(self.llm.tokens(self.messages)) if self.messages else 0
        return tokens // self.memory.compression + len(self.messages) + tokens // self.memory.piece

    def _room(self, new: int, more: int = 0) -> int:
        """Tokens of turns that fit in front of `new` tokens of answer, once `more` slots are written."""
        room = self.llm.room(self.memory, more) - new
        return room if self.window is None else min(room, self.window)

    def _make_room(self, asked: Message, new: int) -> list[int]:
        """The prompt of the next answer; the oldest turns leave until it fits."""
        prompts, bare = self.llm.prompts_or_raise(), not self.memory.is_empty
        ids = prompts.chat([*self.messages, asked], bare=bare)
        if len(ids) > self._room(new):
            alone, room = len(prompts.chat([asked], bare=bare)), self._room(new, self._slots_of_turns())
            if alone > room:
                raise ValueError(
                    f"the message takes {alone} tokens and there is room for {room}; shorten it, "
                    f"or write it into the memory as a text."
                )
        while self.messages and len(ids) > self._room(new):
            self._write(min(2, len(self.messages)))
            ids = prompts.chat([*self.messages, asked], bare=True)
        return ids

    def _write(self, count: int) -> None:
        """Write the oldest `count` turns into the memory, with their roles, and take them out of the context."""
        if not count:
            return
        if self.journal:
            self.memory = self.journal.write(self.llm, self.messages, count, self.source)
        else:
            ids = self.llm.tokens(self.messages[:count])
            self.memory = self.llm.write_ids(self.memory, ids, self.source)
        self.messages = self.messages[count:]
        self._cache, self._read = None, []
