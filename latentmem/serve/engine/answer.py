"""An answer as its reader sees it: how it is asked for, and its pieces as they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from latentmem.model.generating import MAX_NEW_TOKENS


@dataclass(frozen=True)
class Sampling:
    """How an answer is made; a ValueError names a value that makes no sense."""

    max_tokens: int = MAX_NEW_TOKENS  # new tokens at most
    temperature: float = 0.0  # 0 takes the most likely token; above, tokens are drawn
    top_p: float = 1.0  # drawn from the most likely tokens that have this probability together
    seed: int | None = None  # equal seeds give equal draws; None: every request another
    stop: tuple[str, ...] = ()  # strings that end the answer; they are not part of it
    n: int = 1  # answers
    repeats: bool = True  # an answer may say a sentence again; else it ends before it

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
    """A part of an answer."""

    choice: int  # which answer, from 0
    text: str  # what comes next of it; may be empty in the last piece
    finish: str | None = None  # in the last piece "stop" (it ended, or a stop string came) or "length"


class Answer:
    """The answer to one question, in one or more choices: iterate over its pieces, once, with `for` or `async for`.

    Args:
        ended: called when nothing more will come, just before the reader learns of it.

    Attributes:
        version: of the memory that is read; None without a memory.
        empty: the memory that is read holds nothing, so the model answers by itself.
        prompt_tokens, completion_tokens: tokens of the prompt, and of all choices so far.
        cancelled: nobody reads the rest.
        open: choices that have not ended.
    """

    def __init__(self, ended: Callable[[], object] = lambda: None) -> None:
        self.version: int | None = None
        self.empty = False
        self.prompt_tokens = self.completion_tokens = 0
        self.cancelled = False
        self.open = 1
        self._events: SimpleQueue[Piece | Exception | None] = SimpleQueue()
        self._wake: Callable[[], object] = lambda: None
        self._ended = ended

    def cancel(self) -> None:
        """Make no more of the answer."""
        self.cancelled = True

    def give(self, event: Piece | Exception | None) -> None:
        """Called by the engine: a piece, an error, or None at the end."""
        try:
            if not isinstance(event, Piece):
                self._ended()
        finally:
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

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        loop, more = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
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
