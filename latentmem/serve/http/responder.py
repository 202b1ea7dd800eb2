"""Answers of the engine as responses: as a whole, or as server-sent events; both in OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from latentmem.model.prompts import Message, Prompts
from latentmem.serve.engine.answer import Answer, Piece, Sampling
from latentmem.serve.http.errors import Json, Refused, refusal, to_json
from latentmem.serve.http.schema import MemoryChoice, OpenAIRequest, Usage
from latentmem.serve.http.state import RequestLog, app_state, request_log, with_timeout


async def collected(answer: Answer, log: RequestLog, n: int = 1) -> list[tuple[str, str]]:
    """All n texts of an answer: (text, why it ended) each.

    Raises:
        Refused: the answer was cut off.
    """
    texts: dict[int, list[str]] = {}
    ends: dict[int, str] = {}
    try:
        async with contextlib.aclosing(aiter(answer)) as pieces:
            async for piece in pieces:
                texts.setdefault(piece.choice, []).append(piece.text)
                if piece.finish:
                    ends[piece.choice] = piece.finish
    finally:
        _count(answer, log)
    _require_ends(ends, n)
    return [("".join(texts[i]), ends[i]) for i in sorted(ends)]


def usage(answer: Answer) -> Usage:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _count(answer: Answer, log: RequestLog) -> None:
    log.prompt_tokens, log.completion_tokens = answer.prompt_tokens, answer.completion_tokens


def _require_ends(ends: dict[int, str], n: int) -> None:
    """Refuse texts of which the end is missing, so that none is taken for whole, or written."""
    if len(ends) < n:
        raise Refused(503, "the answer was cut off, because the server is closing.", "cut_off")


@dataclass
class ChatResponder:
    """Answers one request of OpenAI's interface."""

    request: Request
    body: OpenAIRequest
    choice: MemoryChoice | None  # the memory
    prefix: str  # of the id of the response
    kind: str  # its `object`
    turn: Message | None = None  # the message that is written with its answer, if any
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.log = request_log(self.request)
        self.chats = self.kind == "chat.completion"
        self.n = self.body.n or 1

    async def respond(self, prompt: Callable[[Prompts, bool], list[int]], sampling: Sampling) -> Response:
        """The response, as a whole or as a stream."""
        name, version = (self.choice.id, self.choice.version) if self.choice is not None else (None, None)
        answer = app_state(self.request).service.read(name, prompt, sampling, version)
        if not self.body.stream:
            return Json(await with_timeout(self.request, self._whole(answer)))
        pieces = aiter(answer)
        first = await with_timeout(self.request, anext(pieces, None))  # what is refused has a status of its own
        return Events(self._events(answer, first, pieces))

    async def _whole(self, answer: Answer) -> dict[str, Any]:
        texts = await collected(answer, self.log, self.n)
        memory = await self._written(answer, texts[0][0])
        choices = [self._choice(i, text, finish) for i, (text, finish) in enumerate(texts)]
        return self._shell(self.kind, choices) | {"usage": usage(answer).model_dump()} | memory

    async def _events(
        self, answer: Answer, first: Piece | None, pieces: AsyncIterator[Piece]
    ) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; an error is one, too, because the status is sent already."""
        try:
            async with contextlib.aclosing(self._chunks(answer, first, pieces)) as chunks:
                async for chunk in chunks:
                    yield b"data: " + to_json(chunk) + b"\n\n"
            yield b"data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the client gets its status and no more
            refused = refusal(error)
            if refused.status_code == 500:
                self.request.app.state.log.error(self.log, error)
            yield b"data: " + to_json(refused.body) + b"\n\n"
        finally:
            answer.cancel()
            _count(answer, self.log)

    async def _chunks(
        self, answer: Answer, first: Piece | None, pieces: AsyncIterator[Piece]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks of text as they come; the ends come when everything is written that is to be written."""
        kind = "chat.completion.chunk" if self.chats else self.kind
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        blank: dict[str, Any] = {"usage": None} if with_usage else {}
        until = asyncio.get_running_loop().time() + app_state(self.request).limits.seconds
        written, begun, ends, piece = [], set(), {}, first
        while piece is not None:
            if piece.choice == 0:
                written.append(piece.text)
            if piece.finish:
                ends[piece.choice] = piece.finish
            if piece.text or piece.choice not in begun:
                new = piece.choice not in begun
                begun.add(piece.choice)
                yield self._shell(kind, [self._delta(piece.choice, piece.text, None, new)]) | blank
            async with asyncio.timeout_at(until):
                piece = await anext(pieces, None)
        _require_ends(ends, self.n)
        memory = await self._written(answer, "".join(written))
        for i, (choice, finish) in enumerate(sorted(ends.items())):
            last = memory if i == len(ends) - 1 else {}
            yield self._shell(kind, [self._delta(choice, "", finish, False)]) | blank | last
        if with_usage:
            yield self._shell(kind, []) | {"usage": usage(answer).model_dump()} | memory

    async def _written(self, answer: Answer, text: str) -> dict[str, Any]:
        """What the response says of the memory, once no crash loses what is written into it.

        The last turn and its answer are written as `latentmem.model.chat` does.
        """
        if self.choice is None:
            return {}
        version = None
        if self.turn is not None:
            turns = [self.turn, {"role": "assistant", "content": text.strip()}]
            service = app_state(self.request).service
            version = (await run_in_threadpool(service.write, self.choice.id, turns, "chat")).version
        return {"memory": {"id": self.choice.id, "version": answer.version, "written": version}}

    def _shell(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        facts = {"id": self.id, "object": kind, "created": int(self.started), "model": self.body.model}
        return {**facts, "choices": list(choices)}

    def _choice(self, i: int, text: str, finish: str) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.chats else {"text": text}
        return {"index": i, **content, "finish_reason": finish, "logprobs": None}

    def _delta(self, i: int, text: str, finish: str | None, new: bool) -> dict[str, Any]:
        delta = ({"role": "assistant"} if new else {}) | ({"content": text} if finish is None else {})
        content = {"delta": delta} if self.chats else {"text": text}
        return {"index": i, **content, "finish_reason": finish, "logprobs": None}


class Events(StreamingResponse):
    """Server-sent events, whose source is closed at once when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, headers={"x-accel-buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
