"""What a request works with: the service, the limits, its key and its line in the log; and what its key may touch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request

from latentmem.errors import NotFoundError
from latentmem.serve.engine.service import Service
from latentmem.serve.http.errors import Refused
from latentmem.serve.http.keys import EVERYONE, Key
from latentmem.serve.http.logs import RequestLog
from latentmem.store import check_name


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
        seconds: until the request is given up.
        requests: requests that run or wait at once.
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
class AppState:
    """What all requests share.

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

    def numbers(self) -> dict[str, float]:
        """What the server does now: name -> number."""
        return {"ready": float(self.ready), **self.service.stats()}


def app_state(request: Request) -> AppState:
    return request.app.state.latentmem


def key_of(request: Request) -> Key:
    return request.scope.get("latentmem.key", EVERYONE)


def request_log(request: Request) -> RequestLog:
    return request.scope["latentmem.log"]


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
