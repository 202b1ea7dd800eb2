"""What a server does for its clients, without a network: reads in batches, changes in order, and no more than fits.

Reads are opened and handed to the engine, which answers all of them together. Changes of memories go through one queue,
in the order in which they were accepted; a write is in the journal before it is accepted, so no crash loses it. A read
of a memory for which writes wait comes after them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from latentmem.core.memory import Memory
from latentmem.core.settings import MemorySettings
from latentmem.errors import NameTakenError
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Message, Prompts
from latentmem.model.provenance import DrawnOn
from latentmem.serve.engine.answer import Answer, Sampling
from latentmem.serve.engine.engine import Engine, EngineModel, release_threads
from latentmem.serve.settings import Sizes
from latentmem.store import Store, Version
from latentmem.store.contents import Content
from latentmem.store.writing import WritingModel

Result = TypeVar("Result")
OWN_KEY = "request "  # begins the idempotency keys that the service makes itself
Prompt = Callable[[Prompts, bool], list[int]]  # (how text is put, whether a memory stands in front) -> token ids


class BusyError(Exception):
    """More waits than is allowed to; it is worth to try again after `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after} seconds.")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Writing:
    """A write that is accepted: no crash loses it from here on.

    `done` is its version, once it is in the memory. A ValueError says why it can not be; any other error, such as a
    full disk, leaves it accepted, and it is applied by who reads or writes the memory next.
    """

    version: int  # the one that will hold it
    tokens: int
    done: Future[Version]


@dataclass(frozen=True)
class Underway:
    """A memory into which something is being written at this moment."""

    name: str
    memory: Memory  # with what was written so far; no version of the store holds it
    done: int  # tokens
    total: int  # tokens of all that waits for this memory


@dataclass(frozen=True)
class _Request:
    """A question until the engine has it; fields as in `Service.read`."""

    answer: Answer
    name: str | None
    prompt: Prompt
    sampling: Sampling
    version: int | None


class Service:
    """One model and one store, for many clients at once; every method can be called from any thread.

    The store keeps opened memories up to its `cache_bytes`, the device keys and values up to `sizes.prefix_bytes`; all
    other memories lie on the disk. An `engine` that is given computes in the place of its own.
    """

    def __init__(
        self, llm: MemoryModel, store: Store, sizes: Sizes | None = None, *, engine: Engine | None = None
    ) -> None:
        self.llm, self.store, self.sizes = llm, store, sizes or Sizes()
        kept = self.sizes.prefix_bytes
        llm.prefixes.limit = quarter(llm.decoder.device) if kept is None else kept
        self._engine = engine or Engine(llm, self.sizes.batch)
        self._model = EngineModel(llm, self._engine)
        self._openers, self._writer = ThreadPoolExecutor(2, "open"), ThreadPoolExecutor(1, "write")
        self._count = threading.Condition()
        self._answers: set[Answer] = set()
        self._changes = 0  # that were accepted and are not done
        self._underway: Underway | None = None
        self._seconds = 1.0  # that an answer takes, a running mean
        self.ready = False

    def start(self) -> None:
        """Apply what was accepted before a crash, then answer."""
        self._engine.start()
        for one in self.store.overview():
            if one.pending:
                with contextlib.suppress(ValueError, OSError):  # of another model, damaged, in use: it goes on waiting
                    self.llm.check(self.store.latest(one.name)[1])
                    self.store.apply(self._model, one.name)
        self.ready = True

    def close(self, grace: float | None = None) -> None:
        """Refuse what is new, finish what was accepted, and end.

        Args:
            grace: seconds after which answers are cut off; None: never. Writes are always finished.
        """
        self.ready = False
        with self._count:
            if not self._count.wait_for(lambda: not self._answers, grace):
                for answer in self._answers:
                    answer.cancel()
            self._count.wait_for(lambda: not self._answers and not self._changes)
        self._writer.shutdown()
        self._openers.shutdown()
        self._engine.stop()

    # --- reads ------------------------------------------------------------------------------------------------------

    def read(self, name: str | None, prompt: Prompt, sampling: Sampling, version: int | None = None) -> Answer:
        """Answer a prompt behind a memory; without a `name` the plain model answers.

        Args:
            prompt: makes the token ids.
            version: of the memory, by default the newest, with all that was accepted before.

        Returns:
            The answer, whose pieces come when they are made. In place of a piece may come a ValueError: no
            such memory or version, the prompt does not fit, or another model wrote the memory.

        Raises:
            BusyError: too many wait.
        """
        start = time.monotonic()

        def ended() -> None:
            self._seconds += 0.1 * (time.monotonic() - start - self._seconds)
            with self._count:
                self._answers.discard(answer)
                self._count.notify_all()

        answer = Answer(ended)
        with self._count:
            self._admit(len(self._answers), self.sizes.waiting)
            self._answers.add(answer)
        self._openers.submit(self._open, _Request(answer, name, prompt, sampling, version))
        return answer

    def ask(self, name: str, question: str, sampling: Sampling, version: int | None = None) -> Answer:
        """Answer a question as `MemoryModel.ask` puts it; else as `read`."""
        return self.read(name, lambda prompts, bare: prompts.question(question, bare=bare), sampling, version)

    def _open(self, request: _Request, settled: bool = False) -> None:
        """Open the memory of a request and hand both to the engine, behind the writes that wait unless `settled`."""
        try:
            if request.answer.cancelled:
                return request.answer.give(None)
            if request.name is not None and not settled and self._comes_behind_writes(request.name, request.version):
                return self._open_later(request.name, request)
            memory = self._memory(request)
            ids = request.prompt(self.llm.prompts_or_raise(), not memory.is_empty)
            release_threads()
            self._engine.submit(request.answer, memory, ids, request.sampling)
        except Exception as error:  # noqa: BLE001 - told to who asked
            request.answer.give(error)

    def _comes_behind_writes(self, name: str, version: int | None) -> bool:
        newer = version is None or version > self.store.applied_version(name)
        return newer and self.store.has_pending(name)

    def _open_later(self, name: str, request: _Request) -> None:
        """Open a request once all that waits for its memory is applied."""

        def go_on(settled: Future[int]) -> None:
            error = settled.exception()
            if error is None:
                self._openers.submit(self._open, request, True)
            else:
                request.answer.give(error if isinstance(error, Exception) else RuntimeError(str(error)))

        self._change(lambda: self._settle(name)).add_done_callback(go_on)

    def _memory(self, request: _Request) -> Memory:
        """The memory of a request, which this model can read."""
        name, version = request.name, request.version
        if name is None:
            return self.llm.blank()
        if version is None:
            request.answer.version, memory = self.store.latest(name)
        else:
            request.answer.version, memory = version, self.store.open(name, version)
        self.llm.check(memory)
        request.answer.empty = memory.is_empty
        return memory

    def drawn_on(self, memory: Memory, question: str | list[Message], answer: str) -> DrawnOn:
        """What an answer drew on, as `MemoryModel.drawn_on`.

        Raises:
            BusyError: too many wait.
        """
        self._accept()
        try:
            release_threads()
            return self._engine.call(lambda: self.llm.drawn_on(memory, question, answer))
        finally:
            self._changed()

    # --- changes ----------------------------------------------------------------------------------------------------

    def write(
        self,
        name: str,
        content: Content,
        source: str | Callable[[int], str] = "text",
        *,
        role: str | None = None,
        key: str | None = None,
    ) -> Writing:
        """Accept a write and have it applied; arguments as in `Store.append`.

        Raises:
            BusyError: too many wait.
            ValueError: no such memory, or what `Store.write` refuses; nothing has changed.
        """
        self._accept()
        try:
            key = key or f"{OWN_KEY}{uuid.uuid4().hex}"  # versions can be numbered anew before it is applied
            version = self.store.append(name, content, source, role=role, key=key, llm=self.llm)
            count = self.store.version(name, key=key).tokens
            done = self._change(lambda: self._apply(name, key))
        except BaseException:
            self._changed()
            raise
        done.add_done_callback(self._changed)
        return Writing(version, count, done)

    def create(self, name: str, settings: MemorySettings | None = None, *, exist_ok: bool = False) -> Future[Version]:
        """Begin a memory, by default with the settings with which the adapters were trained, or of the model.

        Args:
            exist_ok: go on with a memory of this name, whatever its settings.

        Raises:
            BusyError: too many wait. The result may be a `NameTakenError`.
        """

        def act(store: Store, llm: WritingModel) -> Version:
            try:
                store.create(name, self.llm.empty(settings=settings))
            except NameTakenError:
                if not exist_ok:
                    raise
            return store.version(name)

        return self.change(act)

    def change(self, action: Callable[[Store, WritingModel], Result]) -> Future[Result]:
        """Do anything else with the store, behind all changes that were accepted before.

        Raises:
            BusyError: too many wait.
        """
        self._accept()
        done = self._change(lambda: action(self.store, self._model))
        done.add_done_callback(self._changed)
        return done

    def underway(self, name: str) -> Underway | None:
        """What is being written into a memory now; None before its first update is made, and afterwards."""
        now = self._underway
        return now if now is not None and now.name == name else None

    def _settle(self, name: str) -> int:
        """Apply what waits for a memory, and let others look on."""

        def progress(done: int, total: int) -> None:
            if self._model.newest is not None:
                self._underway = Underway(name, self._model.newest, done, total)

        return self.store.apply(self._model, name, progress)

    def _apply(self, name: str, key: str) -> Version:
        self._settle(name)
        version = self.store.version(name, key=key)
        if version.state == "failed":
            raise ValueError(version.error)
        return version

    def _change(self, action: Callable[[], Result]) -> Future[Result]:
        """Do something behind all changes that were accepted before."""

        def act() -> Result:
            try:
                return action()
            finally:
                self._underway = None
                self._model.clear()

        return self._writer.submit(act)

    # --- numbers ----------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """What the server does now, for its metrics: name -> number."""
        hot, (warm, cold) = self.llm.prefixes.nbytes, self.store.nbytes()
        return {
            "reads": len(self._answers),
            "changes": self._changes,
            "tokens_written": self._model.tokens_written,
            "prefix_bytes": hot,
            "hot_bytes": hot + self.llm.retriever.decoding.nbytes,
            "warm_bytes": warm,
            "cold_bytes": cold,
            **self._engine.stats(),
        }

    # --- inside -----------------------------------------------------------------------------------------------------

    def _admit(self, there: int, most: int) -> None:
        if not self.ready or there >= most:
            raise BusyError(min(60, max(1, round(self._seconds))))

    def _accept(self) -> None:
        """Count one more change, or refuse it."""
        with self._count:
            self._admit(self._changes, self.sizes.changes)
            self._changes += 1

    def _changed(self, _: object = None) -> None:
        with self._count:
            self._changes -= 1
            self._count.notify_all()


def quarter(device: torch.device) -> int:
    """A quarter of the memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    most = [8 << 30]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        most = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a bound
        most.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(most) // 4
