"""Waiting for work that others do: the engine's, the store's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from latentmem.serve.engine.service import BusyError
from latentmem.serve.http.errors import Refused
from latentmem.serve.http.state import app_state
from latentmem.store import Store
from latentmem.store.writing import WritingModel

Result = TypeVar("Result")
TRIES = 8  # of a change, while writes are accepted that it has to wait for


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
