"""What all routes share: limits, errors in one shape, who may touch what, and waiting for work that others do."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from latentmem.errors import DamagedError, InUseError, NameTakenError, NotFoundError, OtherModelError, TooLongError
from latentmem.model.model import MemoryModel
from latentmem.serve.engine.service import Busy, Missing, Service, Taken
from latentmem.serve.http.keys import EVERYONE, Key
from latentmem.store import Store, check_name

Result = TypeVar("Result")
SOURCE = 256  # characters of the name of a source


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Args:
        body: bytes of a request.
        upload: bytes of an exported memory that is imported.
        text: characters of all texts of a request together.
        messages: turns of a conversation.
        n: answers.
        max_tokens: new tokens of an answer.
        seconds: until it is given up.
        requests: that run or wait at once.
    """

    body: int = 4 << 20
    upload: int = 1 << 30
    text: int = 1_000_000
    messages: int = 256
    n: int = 8
    max_tokens: int = 4096
    seconds: float = 300
    requests: int = 1024


@dataclass
class Record:
    """What is told of one request in logs and metrics; never a text, a question or a key.

    Args:
        id: of the request.
        key: name of the key.
        memory: that was chosen.
        prompt_tokens, completion_tokens, written_tokens: what it took and made.
    """

    id: str
    key: str = ""
    memory: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    written_tokens: int = 0


@dataclass
class Shared:
    """What all routes work with.

    Args:
        service: answers and writes.
        limits: of a request.
        model: the name under which the model is served.
        closing: whether the server is about to end.
    """

    service: Service
    limits: Limits
    model: str = field(default="")
    closing: bool = False

    def __post_init__(self) -> None:
        self.model = self.model or Path(self.service.llm.name).name.replace("@", "-") or "latentmem"

    @property
    def ready(self) -> bool:
        return self.service.ready and not self.closing


def shared(request: Request) -> Shared:
    return request.app.state.shared


def key_of(request: Request) -> Key:
    return request.scope.get("latentmem.key", EVERYONE)


def record_of(request: Request) -> Record:
    return request.scope["latentmem.record"]


# --- errors -----------------------------------------------------------------------------------------------------------


class Refused(HTTPException):
    """A request that is not done.

    Args:
        status: of HTTP.
        message: what was expected, what came and what to do; for the client.
        code: for programs.
        param: the field that is wrong.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {
            "error": {
                "message": self.detail,
                "type": TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else INVALID),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def response(self) -> Json:
        return Json(self.body, self.status_code, headers=self.headers)


def loading() -> Refused:
    return Refused(503, "the server is loading or closing.", "not_ready", headers={"retry-after": "2"})


INVALID = "invalid_request_error"
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Json(Response):
    """JSON in UTF-8, also where a client's text is not valid Unicode."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        "utf-8", "backslashreplace"
    )


def refusal(error: BaseException) -> Refused:
    """What a client is told of an error; of one of this program no more than that there was one."""
    match error:
        case Refused():
            return error
        case Busy():
            headers = {"retry-after": str(error.retry_after)}
            return Refused(429, str(error), "rate_limit_exceeded", headers=headers)
        case Missing():
            return Refused(404, str(error), "not_found")
        case Taken():
            return Refused(409, str(error), "taken")
        case TooLongError():
            return Refused(400, str(error), "context_length_exceeded")
        case OtherModelError():
            what = "this memory was written by another model, or in another precision, than this server runs."
            return Refused(400, what, "other_model")
        case NotFoundError():
            return Refused(404, error.public, "not_found")
        case NameTakenError():
            return Refused(409, error.public, "taken")
        case InUseError():
            return Refused(409, error.public, "in_use")
        case DamagedError():
            return Refused(500, "what this memory is kept in is damaged; restore the store from a copy.", "damaged")
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            known = {404: "there is nothing at this address.", 405: "this address does not take this method."}
            return Refused(error.status_code, known.get(error.status_code, error.detail), headers=error.headers)
        case ValueError():
            return Refused(400, str(error), "invalid_value")
        case OSError(errno=errno.ENOSPC):
            return Refused(503, "the disk of the server is full; nothing was changed.", "disk_full")
        case TimeoutError():
            return Refused(504, "the request took too long and was given up.", "timeout")
    return Refused(500, "the server made an error; its log has this request's id.", "internal_error")


def _invalid(error: RequestValidationError) -> Refused:
    first = next(iter(error.errors()), {"loc": (), "msg": "it is not valid", "type": ""})
    if first["type"] == "json_invalid":
        return Refused(400, "the body is not valid JSON.", "invalid_json")
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
    return Refused(400, f"{where or 'the body'}: {first['msg']}.", "invalid_value", where or None)


def add_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        refused = refusal(error)
        if refused.status_code == 405:  # the router names the methods of one route alone
            at = request.app.openapi()["paths"].get(request.scope["route"].path, {})
            refused.headers = {"allow": ", ".join(sorted(method.upper() for method in at))}
        return refused.response

    for kind in (HTTPException, RequestValidationError, Busy, Missing, Taken, ValueError, TimeoutError):
        app.add_exception_handler(kind, handle)


# --- who may --------------------------------------------------------------------------------------------------------


def touch(request: Request, name: str, *, write: bool = False, new: bool = False) -> str:
    """The name of a memory that the request may read, or write.

    Nothing is looked up, so neither the answer nor its time tells whether there is a memory that the key may not touch.

    Args:
        new: the memory is about to be made, so a name that the key may not use is no secret.

    Raises:
        ValueError: it can not be a memory's name.
        Missing: the key may not touch it.
        Refused: the key may not write.
    """
    check_name(name)
    key = key_of(request)
    if not key.may_touch(name):
        if new:
            raise Refused(403, f"this key may not make a memory {name!r}.", "no_rights")
        raise Missing(f"there is no memory {name!r}.")  # as Service says it
    if write:
        may_write(request)
    record_of(request).memory = name
    return name


def may_write(request: Request) -> None:
    """Refuse a key that may only read."""
    if not key_of(request).writes:
        raise Refused(403, "this key may read only.", "no_rights")


def fits(request: Request, *texts: str, param: str | None = None) -> None:
    """Refuse texts that are longer than allowed, together."""
    most, got = shared(request).limits.text, sum(map(len, texts))
    if got > most:
        message = f"a request may hold {most} characters of text, got {got}; split it."
        raise Refused(400, message, "string_above_max_length", param)


# --- waiting ----------------------------------------------------------------------------------------------------------


class Gone(Refused):
    """The client has left."""

    def __init__(self) -> None:
        super().__init__(499, "the client has left.")


async def patient(request: Request, work: Awaitable[Result], seconds: float | None = None) -> Result:
    """Wait for work while the client does, and no longer than a request may take; then it is cancelled.

    Raises:
        TimeoutError: it took too long.
        Gone: the client has left.
    """
    seconds = shared(request).limits.seconds if seconds is None else seconds
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_gone(request))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise Gone if gone in done else TimeoutError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def carried_out(done: Future[Result]) -> Result:
    """Wait for a change; it is made even where nobody waits any more."""
    future = asyncio.wrap_future(done)
    future.add_done_callback(lambda f: f.cancelled() or f.exception())
    return await asyncio.shield(future)


async def change(request: Request, name: str, action: Callable[[Store, MemoryModel], Result]) -> Result:
    """Change a memory that is there, behind everything that was accepted before.

    Raises:
        Missing: it is not there.
    """

    def act(store: Store, llm: MemoryModel) -> Result:
        if name not in store:
            raise Missing(f"there is no memory {name!r}.")
        for _ in range(8):
            store.apply(llm, name)
            try:
                return action(store, llm)
            except ValueError:
                if not store.pending_count(name):  # else a write was accepted meanwhile
                    raise
        raise Busy(1)

    return await patient(request, carried_out(shared(request).service.change(act)))


async def look(request: Request, name: str, action: Callable[[Store], Result]) -> Result:
    """Read in the store's books of a memory that is there.

    Raises:
        Missing: it is not there.
    """
    store = shared(request).service.store

    def act() -> Result:
        if name not in store:
            raise Missing(f"there is no memory {name!r}.")
        return action(store)

    return await run_in_threadpool(act)
