"""Answers of one model for many memories at once: what waits, what runs, and what was given."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from latentmem.core.memory import Memory
from latentmem.model.generating import MAX_NEW_TOKENS
from latentmem.model.model import MemoryModel
from latentmem.serve.engine.batch import Batch, Row

Result = TypeVar("Result")


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
        ended: called when nothing more will come, just before the reader is told.

    Attributes:
        version: of the memory that is read; None without a memory.
        prompt_tokens, completion_tokens: tokens of the prompt, and of all answers so far.
    """

    def __init__(self, ended: Callable[[], object] = lambda: None) -> None:
        self.version: int | None = None
        self.prompt_tokens = self.completion_tokens = 0
        self.cancelled = False
        self.open = 1  # answers that have not ended
        self._events: SimpleQueue[Piece | Exception | None] = SimpleQueue()
        self._wake: Callable[[], object] = lambda: None
        self._ended = ended

    def cancel(self) -> None:
        """Make no more of it."""
        self.cancelled = True

    def give(self, event: Piece | Exception | None) -> None:
        """Of the engine: a piece, why there is none, or None: that was all."""
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

    async def __aiter__(self) -> AsyncIterator[Piece]:
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


class Words:
    """Tokens -> text, given as soon as it can not change any more, up to a stop string.

    Args:
        tokenizer: its special tokens are left out.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._from = self._to = 0  # ids[from:to] were given, and are decoded again with what follows
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What is new with this token."""
        self._ids.append(token)
        before = self._decoded(self._from, self._to)
        text = self._decoded(self._from, len(self._ids))
        if len(text) <= len(before) or text.endswith("\ufffd"):  # the rest of a character comes with the next token
            return ""
        self._from, self._to = self._to, len(self._ids)
        return self._given(text[len(before) :])

    def rest(self) -> str:
        """What was held back, at the end."""
        text = self._decoded(self._from, len(self._ids))[len(self._decoded(self._from, self._to)) :]
        given = self._given(text) + self._held
        self._held = ""
        return given

    def _decoded(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _given(self, text: str) -> str:
        """As much of the text as is no stop string and can not become one."""
        text, self._held = self._held + text, ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max((n for stop in self._stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


@dataclass(eq=False)
class _Answer:
    """One answer of a reading, from when it waits to when it ends."""

    reading: Reading
    choice: int
    memory: Memory
    ids: Sequence[int]
    sampling: Sampling
    words: Words
    most: int
    made: int = 0
    row: Row | None = None


class Engine:
    """Answers all questions together, in a thread of its own; whatever else the model is to do runs there, too.

    Between two tokens it takes in answers that wait, and makes `call`s, such as the write of a piece of text: one, or
    as many as take no longer than the answers' last round. So everything comes to its turn, and no two threads compute
    at the same time.

    Args:
        llm: the model.
        batch: answers that are made together at most.
    """

    def __init__(self, llm: MemoryModel, batch: int = 32) -> None:
        self.llm, self.batch = llm, batch
        self._changed = threading.Condition()
        self._waiting: deque[_Answer] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._stopping = self._ended = False
        self._batches: dict[object, Batch] = {}  # those whose prompts are read, by their kind
        self._joining: tuple[object, Batch] | None = None
        self._answers: dict[Row, _Answer] = {}
        self._tokens = 0
        self._round = 0.0  # seconds that the last round of all answers took
        self._cuda = llm.decoder.device.type == "cuda"
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        settings = llm.base.generation_config.eos_token_id
        self._ends = {settings} if isinstance(settings, int) else set(settings or ())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End when everything that was submitted is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, reading: Reading, memory: Memory, ids: Sequence[int], sampling: Sampling) -> None:
        """Answer a prompt behind a memory; an empty one leaves the answer to the plain model.

        Raises:
            ValueError: the prompt is empty, or does not fit into the model's context with one token more.
            RuntimeError: the engine has ended.
        """
        if not len(ids):
            raise ValueError("the prompt is empty; give at least one token.")
        room = self.llm.room(memory) - len(ids)
        if room < 1:
            raise ValueError(
                f"the prompt takes {len(ids)} tokens, and behind this memory of {memory.M} slots there is room for "
                f"{room + len(ids)} with the answer. Shorten it, or use a smaller memory."
            )
        reading.prompt_tokens = len(ids)
        reading.open = sampling.n
        most, tokenizer = min(sampling.max_tokens, room), self.llm.tokenizer
        some = [
            _Answer(reading, i, memory, ids, sampling, Words(tokenizer, sampling.stop), most) for i in range(sampling.n)
        ]
        with self._changed:
            self._there()
            self._waiting.extend(some)
            self._changed.notify_all()

    def call(self, action: Callable[[], Result]) -> Result:
        """Do something with the model in this thread; waits for its result.

        Raises:
            RuntimeError: the engine has ended.
        """
        done: Future[Result] = Future()
        with self._changed:
            self._there()
            self._calls.append((action, done))
            self._changed.notify_all()
        return done.result()

    def stats(self) -> dict[str, float]:
        """What it does now: name -> number."""
        return {
            "answers_waiting": len(self._waiting),
            "answers_running": len(self._answers),
            "tokens_generated": self._tokens,
        }

    def _there(self) -> None:
        if self._ended:
            raise RuntimeError("the engine has ended.")

    # --- its thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._busy or self._stopping)
                if not self._busy:
                    self._ended = True
                    return
            start = time.monotonic()
            while self._calls:
                _done(*self._calls.popleft())
                if self._cuda:
                    torch.cuda.synchronize()  # so that its time is its own
                if time.monotonic() - start >= self._round:
                    break
            start = time.monotonic()
            try:
                self._join()
                for kind in list(self._batches):
                    self._advance(kind)
            except Exception as error:  # noqa: BLE001 - told to all who wait for an answer
                self._batches, self._joining = {}, None
                self._fail(list(self._answers), error)
            self._round = time.monotonic() - start

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._calls or self._batches or self._joining)

    def _join(self) -> None:
        """Read a chunk of the prompts of those that wait, and let them in when they are read."""
        if self._joining is None:
            self._joining = self._admitted()
        if self._joining is None:
            return
        kind, batch = self._joining
        if all(self._answers[row].reading.cancelled for row in batch.rows):
            self._joining = None
            for row in batch.rows:
                self._end(self._answers[row], None)
            return
        try:
            read = batch.advance()
        except Exception as error:  # noqa: BLE001 - told to who asked
            self._joining = None
            return self._fail(batch.rows, error)
        if not read:
            return
        self._joining = None
        live = self._taken(batch.rows)
        if not live:
            return
        there = self._batches.get(kind)
        try:
            others = [row for row in there.rows if row in self._answers] if there else []
            if there or len(live) < len(batch.rows):
                batch.keep([*live, *others], there)
            self._batches[kind] = batch
        except Exception as error:  # noqa: BLE001 - told to who asked
            self._fail(batch.rows + (self._batches.pop(kind).rows if there else []), error)

    def _admitted(self) -> tuple[object, Batch] | None:
        """The next ones that wait and can go through the model together, with their memories."""
        chosen: list[_Answer] = []
        room = self.batch - len(self._answers)
        with self._changed:
            left = [answer for answer in self._waiting if answer.reading.cancelled]
            self._waiting = deque(answer for answer in self._waiting if not answer.reading.cancelled)
            for answer in self._waiting:
                if len(chosen) == room or not self._fits(answer, chosen):
                    break
                chosen.append(answer)
            for _ in chosen:
                self._waiting.popleft()
        for answer in left:
            self._end(answer, None)
        rows = []
        for answer in chosen:
            try:
                front = self.llm.front(answer.memory, answer.ids)
            except Exception as error:  # noqa: BLE001 - told to who asked
                self._fail_answer(answer, error)
                continue
            s = answer.sampling
            seed = None if s.seed is None else s.seed + answer.choice
            answer.row = Row(answer.ids, front, s.temperature, s.top_p, _generator(seed))
            self._answers[answer.row] = answer
            rows.append(answer.row)
        try:
            return (self._kind(chosen[0]), Batch(self.llm, rows)) if rows else None
        except Exception as error:  # noqa: BLE001 - told to who asked
            self._fail(rows, error)
            return None

    def _fits(self, answer: _Answer, chosen: Sequence[_Answer]) -> bool:
        """Whether an answer's prompt can be read with those of others in one pass."""
        if not chosen:
            return True
        longest = max(len(one.ids) for one in (answer, *chosen))
        alike = self._kind(answer) == self._kind(chosen[0])
        return alike and longest * (len(chosen) + 1) <= self.llm.tokens_at_once

    def _kind(self, answer: _Answer) -> object:
        """What answers must have in common to be made together: a window is counted in columns, padded or not."""
        if answer.memory.holds and self.llm.decoder.slides:
            return answer
        return answer.memory.holds

    def _advance(self, kind: object) -> None:
        """One more token for each answer of a batch."""
        batch = self._batches[kind]
        try:
            batch.advance()
            live = self._taken(batch.rows)
            if not live:
                del self._batches[kind]
            elif batch.sparse(live):
                batch.keep(live)
        except Exception as error:  # noqa: BLE001 - told to who asked
            del self._batches[kind]
            self._fail(batch.rows, error)

    def _taken(self, rows: Sequence[Row]) -> list[Row]:
        """Give the new token of each row to who asked for it; those that go on."""
        live = []
        for row in rows:
            answer = self._answers.get(row)
            if answer is None:
                continue  # it has ended, and is still in the batch
            if answer.reading.cancelled:
                self._end(answer, None)
                continue
            answer.made += 1
            answer.reading.completion_tokens += 1
            self._tokens += 1
            text = "" if row.token in self._ends else answer.words.add(row.token)
            if row.token in self._ends or answer.words.stopped:
                self._end(answer, Piece(answer.choice, text or answer.words.rest(), "stop"))
            elif answer.made >= answer.most:
                self._end(answer, Piece(answer.choice, text + answer.words.rest(), "length"))
            else:
                if text:
                    answer.reading.give(Piece(answer.choice, text))
                live.append(row)
        return live

    def _end(self, answer: _Answer, last: Piece | None) -> None:
        if answer.row is not None:
            self._answers.pop(answer.row, None)
        if last is not None:
            answer.reading.give(last)
        answer.reading.open -= 1
        if not answer.reading.open:
            answer.reading.give(None)

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        for row in rows:
            answer = self._answers.get(row)
            if answer is not None:
                self._fail_answer(answer, error)

    def _fail_answer(self, answer: _Answer, error: Exception) -> None:
        """Tell why there is no answer, once for all choices."""
        if answer.reading.cancelled:
            return self._end(answer, None)
        if answer.row is not None:
            self._answers.pop(answer.row, None)
        answer.reading.cancelled = True
        answer.reading.give(error)


def _done(action: Callable[[], Any], done: Future[Any]) -> None:
    try:
        done.set_result(action())
    except BaseException as error:  # noqa: BLE001 - raised where it was asked for
        done.set_exception(error)


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % (1 << 63))
    return generator
