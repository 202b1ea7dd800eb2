"""Answers of one model for many memories at once: what waits, what runs, and what else the model computes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from latentmem.core.memory import Memory
from latentmem.errors import TooLongError
from latentmem.model.batch import Batch, Detokenizer, Row
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Message, Prompts
from latentmem.model.writing import Progress, Updates
from latentmem.serve.engine.answer import Answer, Piece, Sampling

CHUNK = 512  # positions of a prompt that are read between two tokens of other answers
Result = TypeVar("Result")


@dataclass(eq=False)
class _Choice:
    """One choice of an answer, from when it waits to when it ends."""

    answer: Answer
    number: int
    memory: Memory
    ids: Sequence[int]
    sampling: Sampling
    words: Detokenizer
    limit: int  # of its tokens
    count: int = 0  # its tokens so far
    row: Row | None = None  # its place in a batch, once it has one


class Engine:
    """Answers all questions together, in a thread of its own; whatever else the model is to do runs there, too.

    Between two tokens the engine takes in choices that wait, and makes `call`s, such as the write of a piece of text:
    one, or as many as take no longer than the last round of all choices. So everything comes to its turn, and no two
    threads compute at the same time. At most `batch` choices are made together.
    """

    def __init__(self, llm: MemoryModel, batch: int = 32) -> None:
        self.llm, self.batch = llm, batch
        self._changed = threading.Condition()
        self._waiting: deque[_Choice] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._stopping = self._ended = False
        self._batches: dict[object, Batch] = {}  # those whose prompts are read, by their kind
        self._joining: tuple[object, Batch] | None = None  # the one whose prompts are being read
        self._running: dict[Row, _Choice] = {}
        self._tokens = 0
        self._round = 0.0  # seconds that the last round of all choices took
        self._cuda = llm.decoder.device.type == "cuda"
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        ends = llm.base.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End when everything that was submitted is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, answer: Answer, memory: Memory, ids: Sequence[int], sampling: Sampling) -> None:
        """Answer a prompt behind a memory; an empty one leaves the answer to the plain model.

        Raises:
            ValueError: the prompt is empty.
            TooLongError: the prompt does not fit into the model's context with one token more.
            RuntimeError: the engine has ended.
        """
        if not len(ids):
            raise ValueError("the prompt is empty; give at least one token.")
        room = self.llm.room(memory) - len(ids)
        if room < 1:
            raise TooLongError(
                f"the prompt takes {len(ids)} tokens, and behind this memory of {memory.M} slots there is room for "
                f"{room + len(ids)} with the answer. Shorten it, or use a smaller memory."
            )
        answer.prompt_tokens, answer.open = len(ids), sampling.n
        limit, tokenizer = min(sampling.max_tokens, room), self.llm.tokenizer
        choices = [
            _Choice(answer, i, memory, ids, sampling, Detokenizer(tokenizer, sampling.stop, sampling.repeats), limit)
            for i in range(sampling.n)
        ]
        with self._changed:
            self._require_running()
            self._waiting.extend(choices)
            self._changed.notify_all()

    def call(self, action: Callable[[], Result]) -> Result:
        """Do something with the model in the engine's thread; waits for the result.

        Raises:
            RuntimeError: the engine has ended.
        """
        done: Future[Result] = Future()
        with self._changed:
            self._require_running()
            self._calls.append((action, done))
            self._changed.notify_all()
        return done.result()

    def stats(self) -> dict[str, float]:
        """What the engine does now: name -> number."""
        return {
            "answers_waiting": len(self._waiting),
            "answers_running": len(self._running),
            "tokens_generated": self._tokens,
        }

    def _require_running(self) -> None:
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
            self._make_calls()
            start = time.monotonic()
            try:
                self._join()
                for kind in list(self._batches):
                    self._advance(kind)
            except Exception as error:  # noqa: BLE001 - told to all who wait for an answer
                self._batches, self._joining = {}, None
                self._fail(list(self._running), error)
            self._round = time.monotonic() - start

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._calls or self._batches or self._joining)

    def _make_calls(self) -> None:
        start = time.monotonic()
        while self._calls:
            action, done = self._calls.popleft()
            try:
                done.set_result(action())
            except BaseException as error:  # noqa: BLE001 - raised where it was asked for
                done.set_exception(error)
            if self._cuda:
                torch.cuda.synchronize()  # so that its time is its own
            if time.monotonic() - start >= self._round:
                return

    # --- choices that come ------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Read a chunk of the prompts of choices that wait, and let them in when they are read."""
        joining, self._joining = self._joining or self._admitted(), None
        if joining is None:
            return
        kind, batch = joining
        if all(self._running[row].answer.cancelled for row in batch.rows):
            for row in batch.rows:
                self._end(self._running[row], None)
            return
        with self._told_to(batch.rows):
            if batch.advance():
                self._merge(kind, batch)
            else:
                self._joining = joining

    def _merge(self, kind: object, batch: Batch) -> None:
        """Go on with a batch whose prompts are read, together with the one of its kind that runs."""
        live = self._give_tokens(batch.rows)
        if not live:
            return
        running = self._batches.pop(kind, None)
        with self._told_to(batch.rows + (running.rows if running else [])):
            others = [row for row in running.rows if row in self._running] if running else []
            if running or len(live) < len(batch.rows):
                batch.keep([*live, *others], running)
            self._batches[kind] = batch

    def _admitted(self) -> tuple[object, Batch] | None:
        """The next choices that wait and can go through the model together, with their memories."""
        choices = self._next_choices()
        rows = []
        for choice in choices:
            try:
                choice.row = self._row(choice)
            except Exception as error:  # noqa: BLE001 - told to who asked
                self._fail_choice(choice, error)
                continue
            self._running[choice.row] = choice
            rows.append(choice.row)
        with self._told_to(rows):
            return (self._kind(choices[0]), Batch(self.llm, rows, chunk=CHUNK)) if rows else None
        return None

    def _next_choices(self) -> list[_Choice]:
        """Take choices off the queue, as many as have room; those that nobody reads end."""
        choices: list[_Choice] = []
        room = self.batch - len(self._running)
        with self._changed:
            cancelled = [choice for choice in self._waiting if choice.answer.cancelled]
            self._waiting = deque(choice for choice in self._waiting if not choice.answer.cancelled)
            for choice in self._waiting:
                if len(choices) == room or not self._fits(choice, choices):
                    break
                choices.append(choice)
            for _ in choices:
                self._waiting.popleft()
        for choice in cancelled:
            self._end(choice, None)
        return choices

    def _row(self, choice: _Choice) -> Row:
        front, sampling = self.llm.front(choice.memory, choice.ids), choice.sampling
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed((sampling.seed + choice.number) % (1 << 63))
        return Row(choice.ids, front, sampling.temperature, sampling.top_p, generator)

    def _fits(self, choice: _Choice, choices: Sequence[_Choice]) -> bool:
        """Whether a choice's prompt can be read with those of others in one pass."""
        if not choices:
            return True
        longest = max(len(one.ids) for one in (choice, *choices))
        alike = self._kind(choice) == self._kind(choices[0])
        return alike and longest * (len(choices) + 1) <= self.llm.tokens_at_once

    def _kind(self, choice: _Choice) -> object:
        """What choices must have in common to be made together: a window is counted in columns, padded or not."""
        if not choice.memory.is_empty and self.llm.decoder.slides:
            return choice
        return not choice.memory.is_empty

    # --- choices that run -------------------------------------------------------------------------------------------

    def _advance(self, kind: object) -> None:
        """One more token for each choice of a batch."""
        batch = self._batches.pop(kind)
        with self._told_to(batch.rows):
            batch.advance()
            live = self._give_tokens(batch.rows)
            if live and batch.sparse(live):
                batch.keep(live)
            if live:
                self._batches[kind] = batch

    def _give_tokens(self, rows: Sequence[Row]) -> list[Row]:
        """Give the new token of each row to who asked for it; the rows that go on."""
        choices = [(row, self._running[row]) for row in rows if row in self._running]  # others have ended
        return [row for row, choice in choices if self._give_token(choice, row.token)]

    def _give_token(self, choice: _Choice, token: int) -> bool:
        """Whether the choice goes on."""
        if choice.answer.cancelled:
            self._end(choice, None)
            return False
        choice.count += 1
        choice.answer.completion_tokens += 1
        self._tokens += 1
        text = "" if token in self._ends else choice.words.add(token)
        if token in self._ends or choice.words.stopped:
            self._end(choice, Piece(choice.number, text + choice.words.rest(), "stop"))
            return False
        if choice.count >= choice.limit:
            self._end(choice, Piece(choice.number, text + choice.words.rest(), "length"))
            return False
        if text:
            choice.answer.give(Piece(choice.number, text))
        return True

    def _end(self, choice: _Choice, last: Piece | None) -> None:
        if choice.row is not None:
            choice.row.ended = True
            self._running.pop(choice.row, None)
        if last is not None:
            choice.answer.give(last)
        choice.answer.open -= 1
        if not choice.answer.open:
            choice.answer.give(None)

    @contextlib.contextmanager
    def _told_to(self, rows: Sequence[Row]) -> Iterator[None]:
        """Tell an error to who asked for these rows; all others go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised by the answers
            self._fail(rows, error)

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        for choice in [self._running[row] for row in rows if row in self._running]:
            self._fail_choice(choice, error)

    def _fail_choice(self, choice: _Choice, error: Exception) -> None:
        """Tell why there is no answer, once for all choices."""
        if choice.answer.cancelled:
            return self._end(choice, None)
        if choice.row is not None:
            self._running.pop(choice.row, None)
        choice.answer.cancelled = True
        choice.answer.give(error)


class EngineModel:
    """The model as a store writes with it (`WritingModel`): the caller waits while the engine's thread computes.

    A text is computed piece by piece, so answers get their tokens between two pieces.

    Attributes:
        newest: the memory after the newest piece, until `clear`.
        tokens_written: tokens of all pieces.
    """

    def __init__(self, llm: MemoryModel, engine: Engine) -> None:
        self._llm, self._engine, self.tokenizer_identity = llm, engine, llm.tokenizer_identity
        self.newest: Memory | None = None
        self.tokens_written = 0

    def clear(self) -> None:
        """Keep the memory of the newest piece no longer."""
        self.newest = None

    def check(self, memory: Memory) -> None:
        self._llm.check(memory)

    def prompts_or_raise(self) -> Prompts:
        return self._llm.prompts_or_raise()

    def tokens(self, content: str | Sequence[Message], role: str | None = None) -> list[int]:
        return self._llm.tokens(content, role)

    def write_ids(
        self, memory: Memory, ids: list[int], source: str, progress: Progress | None, updates: Updates | None
    ) -> Memory:
        for start in range(0, len(ids), memory.piece):
            piece = ids[start : start + memory.piece]
            release_threads()
            memory = self._engine.call(partial(self._llm.write_ids, memory, piece, source, updates=updates))
            self.newest = memory
            self.tokens_written += len(piece)
            if progress is not None:
                progress(start + len(piece), len(ids))
        return memory


# --- threads that wait take no cores from the one that computes -------------------------------------------------------


def release_threads() -> None:
    """End the helpers with which this thread computes; they come back when it computes again.

    Each thread that computes has helpers of its own. If there are more of them than cores, GNU OpenMP puts them to
    sleep after every loop, and a thread that generates beside one that only waits is much slower.
    """
    for pause in _pauses():
        pause(2)  # omp_pause_hard; it changes nothing if this thread has no helpers


@cache
def _pauses() -> list[Any]:
    """Of each GNU OpenMP that torch computes with on a CPU under Linux: what ends a thread's helpers."""
    torch_folder, pauses = Path(torch.__file__).parent, []
    for path in (*torch_folder.glob("lib/libgomp*.so*"), *torch_folder.parent.glob("torch.libs/libgomp*.so*")):
        with contextlib.suppress(OSError, AttributeError):  # not Linux, not loaded, or older than OpenMP 5
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            pauses.append(library.omp_pause_resource_all)
    return pauses
