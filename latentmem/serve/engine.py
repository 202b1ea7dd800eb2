"""Answers of one model for many memories at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from latentmem.core.memory import Memory
from latentmem.model import MAX_NEW_TOKENS, MemoryModel


@dataclass(frozen=True)
class Sampling:
    """How an answer is made.

    Args:
        max_tokens: new tokens at most.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_p: drawn from the most likely tokens that have this probability together.
        seed: equal seeds give equal draws; None: every request another.
        stop: strings that end the answer; they are not part of it.
        n: answers.

    Raises:
        ValueError: a value that makes no sense, named.
    """

    max_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1

    def __post_init__(self) -> None:
        rules = [
            (self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}."),
            (0 <= self.temperature <= 2, f"temperature must lie between 0 and 2, got {self.temperature}."),
            (0 < self.top_p <= 1, f"top_p must lie above 0 and not above 1, got {self.top_p}."),
            (self.n >= 1, f"n must be at least 1, got {self.n}."),
            (all(self.stop), "stop must not hold an empty string."),
        ]
        for right, message in rules:
            if not right:
                raise ValueError(message)


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Args:
        choice: which answer, from 0.
        text: what comes next of it; may be empty in the last piece.
        finish: "stop" (it ended, or a stop string came) or "length" in the last piece of an answer, else None.
    """

    choice: int
    text: str
    finish: str | None = None


class Reading:
    """A question that is being answered: iterate over its pieces, once, with `for` or `async for`.

    Args:
        ended: called when nothing more will come.

    Attributes:
        version: of the memory that is read; None without a memory.
        prompt_tokens, completion_tokens: tokens of the prompt, and of all answers so far.
    """

    def __init__(self, ended: Callable[[], object] = lambda: None) -> None:
        self.version: int | None = None
        self.prompt_tokens = self.completion_tokens = 0
        self.cancelled = False
        self._events: SimpleQueue[Piece | Exception | None] = SimpleQueue()
        self._wake: Callable[[], object] = lambda: None
        self._ended = ended

    def cancel(self) -> None:
        """Make no more of it."""
        self.cancelled = True

    def give(self, event: Piece | Exception | None) -> None:
        """Of the engine: a piece, why there is none, or None: that was all."""
        if not isinstance(event, Piece):
            self._ended()
        self._events.put(event)
        self._wake()

    def __iter__(self) -> Iterator[Piece]:
        try:
            while (event := self._events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, more = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(more.set)

        self._wake = wake
        try:
            while True:
                more.clear()
                try:
                    event = self._events.get_nowait()
                except Empty:
                    await more.wait()
                    continue
                if event is None:
                    return
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.cancel()


class Engine:
    """Answers the questions that are submitted, in a thread of its own.

    Args:
        llm: the model.
        lock: held while the model computes.
    """

    def __init__(self, llm: MemoryModel, lock: AbstractContextManager[None]) -> None:
        self.llm, self.lock = llm, lock
        self._jobs: SimpleQueue[tuple[Reading, Memory, Sequence[int], Sampling] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End when everything that was submitted is answered."""
        self._jobs.put(None)
        self._thread.join()

    def stats(self) -> dict[str, float]:
        """What it does now: name -> number."""
        return {}

    def submit(self, reading: Reading, memory: Memory, ids: Sequence[int], sampling: Sampling) -> None:
        """Answer a prompt behind a memory."""
        self._jobs.put((reading, memory, ids, sampling))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            reading, memory, ids, sampling = job
            try:
                with self.lock:
                    for choice in range(sampling.n):
                        count = 0
                        for text in self.llm.stream_ids(memory, ids, max_new_tokens=sampling.max_tokens):
                            count += 1
                            reading.completion_tokens += 1
                            reading.give(Piece(choice, text))
                        reading.give(Piece(choice, "", "length" if count >= sampling.max_tokens else "stop"))
                reading.give(None)
            except Exception as error:  # noqa: BLE001 - told to who asked
                reading.give(error)
