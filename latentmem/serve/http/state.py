"""What a route works with: the service, the limits, the request's key and line in the log, and waiting for work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from latentmem.errors import NotFoundError
from latentmem.serve.engine.service import BusyError, Service
from latentmem.serve.http.errors import Refused
from latentmem.serve.http.keys import EVERYONE, Key
from latentmem.serve.settings import Limits
from latentmem.store import Store, check_name
from latentmem.store.writing import WritingModel

Result = TypeVar("Result")
TRIES = 8  # of a change, while writes are accepted that it has to wait for


@dataclass
class AppState:
    """What all requests share."""

    service: Service
    limits: Limits
    closing: bool = False  # whether the server is about to end
    readers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))  # files that are read at once

    def __post_init__(self) -> None:
        self.model = Path(self.service.llm.name).name.replace("@", "-") or "latentmem"  # the name that clients know

    @property
    def ready(self) -> bool:
        return self.service.ready and not self.closing

    def numbers(self) -> dict[str, float]:
        """What the server does now: name -> number."""
        return {"ready": float(self.ready), **self.service.stats()}


@dataclass
class RequestLog:
    """What the log gets of one request: names and numbers, never a text, a question or a key."""

    id: str
    key: str = ""  # its name
    memory: str = ""
    prompt_tokens: int = 0  # that were read
    completion_tokens: int = 0  # that were made
    written_tokens: int = 0


def app_state(request: Request) -> AppState:
    return request.app.state.latentmem


def key_of(request: Request) -> Key:
    return request.scope.get("latentmem.key", EVERYONE)


def request_log(request: Request) -> RequestLog:
    return request.scope["latentmem.log"]


def media_type(headers: Mapping[str, str]) -> str:
    """The type of a body, such as "application/json"; "" where none is named."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


# --- what a request may do --------------------------------------------------------------------------------------------


def authorize(request: Request, name: str, *, write: bool = False, new: bool = False) -> str:
    """The name of a memory that the request may read, or write.

    Nothing is looked up: neither the answer nor its time tells whether there is a memory that the key may not touch.

    Args:
        new: the memory is about to be made, so a name that the key may not use is no secret.

    Raises:
        ValueError: no name of a memory.
        NotFoundError: the key may not touch the memory.
        Refused: the key may not write.
    """
    check_name(name)
    key = key_of(request)
    if not key.may_touch(name):
        if new:
            raise Refused(403, f"this key may not make a memory {name!r}.", "no_rights")
        raise NotFoundError.memory(name)  # as the store says it
    if write and not key.writes:
        raise Refused(403, "this key may read only.", "no_rights")
    request_log(request).memory = name
    return name


def check_length(request: Request, *texts: str, param: str | None = None) -> None:
    """Refuse texts that are longer than allowed, together."""
    most, length = app_state(request).limits.text, sum(map(len, texts))
    if length > most:
        message = f"a request may hold {most} characters of text, got {length}; split it."
        raise Refused(400, message, "string_above_max_length", param)


# --- waiting for the engine and the store -----------------------------------------------------------------------------


class ClientLeft(Refused):
    """Nobody waits for the response any more."""

    def __init__(self) -> None:
        super().__init__(499, "the client has left.")


async def with_timeout(request: Request, work: Awaitable[Result]) -> Result:
    """Wait for work while the client does, and no longer than a request may take; then the work is cancelled.

    Raises:
        TimeoutError: the work took too long.
        ClientLeft: the client has left.
    """
    task, disconnect = asyncio.ensure_future(work), asyncio.create_task(_disconnected(request))
    seconds = app_state(request).limits.seconds
    try:
        done, _ = await asyncio.wait({task, disconnect}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise ClientLeft if disconnect in done else TimeoutError
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def carried_out(done: Future[Result]) -> Result:
    """Wait for a change, which is made even where nobody waits any more."""
    future = asyncio.wrap_future(done)
    future.add_done_callback(lambda f: f.cancelled() or f.exception())
    return await asyncio.shield(future)


async def change_store(request: Request, name: str, action: Callable[[Store, WritingModel], Result]) -> Result:
    """Change a memory, behind everything that was accepted before.

    Raises:
        NotFoundError: no such memory.
    """

    def act(store: Store, llm: WritingModel) -> Result:
        for _ in range(TRIES):
            store.apply(llm, name)
            try:
                return action(store, llm)
            except ValueError:
                if not store.pending_count(name):  # else a write was accepted meanwhile
                    raise
        raise BusyError(1)

    return await with_timeout(request, carried_out(app_state(request).service.change(act)))


async def read_store(request: Request, action: Callable[[Store], Result]) -> Result:
    """Read in the store."""
    return await run_in_threadpool(action, app_state(request).service.store)
