"""OpenAI's interface with a memory behind it: chat completions, completions, models; and how they are answered."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from latentmem.model.chat import in_context
from latentmem.model.prompts import Message, Prompts, TurnSource, content_of
from latentmem.serve.engine.answer import Answer, Piece, Sampling
from latentmem.serve.http import schema
from latentmem.serve.http.errors import Json, Refused, refusal, to_json
from latentmem.serve.http.schema import ChatRequest, CompletionRequest, MemoryChoice, OpenAIRequest, Usage
from latentmem.serve.http.state import (
    RequestLog,
    app_state,
    authorize,
    check_length,
    key_of,
    read_store,
    request_log,
    with_timeout,
)
from latentmem.store import check_name

router = APIRouter(prefix="/v1", tags=["openai"])
STARTED = int(time.time())
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # a chunk, or [DONE]
STREAM = {"text/event-stream": {"schema": EVENT}}


@router.post("/chat/completions", response_model=schema.ChatCompletion, responses={200: {"content": STREAM}})
async def chat(request: Request, body: ChatRequest, x_memory_id: str | None = Header(None)) -> Response:
    """Go on with a conversation, behind a memory if one is chosen."""
    _supported(body, CHAT_ONLY_WITHOUT)
    limits = app_state(request).limits
    if len(body.messages) > limits.messages:
        raise Refused(400, f"a conversation may have {limits.messages} messages, got {len(body.messages)}.", None)
    messages = [_message(i, one.role, one.content) for i, one in enumerate(body.messages)]
    check_length(request, *(message["content"] for message in messages), param="messages")
    if not messages[-1]["content"].strip():
        raise Refused(400, "the last message is empty.", "invalid_value", "messages")
    choice = await _choose(request, body, x_memory_id)
    turn = messages[-1] if choice is not None and choice.written != "none" else None
    if turn is not None and (turn["role"] != "user" or (body.n or 1) > 1):
        what = "to be written, a conversation must end with a user's message and have one answer: n=1."
        raise Refused(400, what, "invalid_value", "memory")

    def prompt(prompts: Prompts, bare: bool) -> list[int]:
        said = messages if turn is None or choice is None else in_context(prompts, messages, choice.window)
        return prompts.chat(said, bare=bare)

    if turn is not None and body.repeats is None:
        body.repeats = False
    responder = ChatResponder(request, body, choice, "chatcmpl", "chat.completion", turn)
    return await responder.respond(prompt, _sampling(request, body, body.max_completion_tokens or body.max_tokens))


@router.post("/completions", response_model=schema.Completion, responses={200: {"content": STREAM}})
async def complete(request: Request, body: CompletionRequest, x_memory_id: str | None = Header(None)) -> Response:
    """Go on with a text as it is, without a template, behind a memory if one is chosen."""
    _supported(body, COMPLETION_ONLY_WITHOUT)
    text = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    check_length(request, text, param="prompt")
    choice = await _choose(request, body, x_memory_id)
    if choice is not None and choice.written != "none":
        raise Refused(400, "only chats are written; use /v1/memories/{id}/write.", "unsupported", "memory")

    def prompt(prompts: Prompts, bare: bool) -> list[int]:
        return ([] if bare else prompts.opening) + prompts.text(text)

    responder = ChatResponder(request, body, choice, "cmpl", "text_completion")
    return await responder.respond(prompt, _sampling(request, body, body.max_tokens))


@router.get("/models")
async def models(request: Request) -> schema.Models:
    """The model that is served."""
    return schema.Models(data=[schema.Model(id=app_state(request).model, created=STARTED)])


@router.get("/key")
async def rights(request: Request) -> schema.Rights:
    """What the key of this request may do."""
    return schema.Rights(name=key_of(request).name, writes=key_of(request).writes)


@router.get("/models/{id}")
async def model(request: Request, id: str) -> schema.Model:
    """One model; `NAME@MEMORY` stands for it with a memory."""
    memory = _at(request, id)
    if memory is not None:
        authorize(request, memory)
        await read_store(request, lambda store: store.version(memory))  # refuses a memory that is not there
    return schema.Model(id=id, created=STARTED)


# --- what is asked ----------------------------------------------------------------------------------------------------

Harmless = dict[str, tuple[Any, ...]]  # field -> values that change nothing
WITHOUT: Harmless = {"logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,)}
CHAT_ONLY_WITHOUT: Harmless = {
    **WITHOUT,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
COMPLETION_ONLY_WITHOUT: Harmless = {
    **WITHOUT,
    "logprobs": (0, False),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}


def _supported(body: OpenAIRequest, without: Harmless) -> None:
    """Refuse fields that would change the answer and are not known here."""
    extra = body.model_extra or {}
    for name, harmless in without.items():
        value = extra.get(name)
        if value is not None and value not in harmless:
            raise Refused(400, f"{name} is not supported by this server; leave it out.", "unsupported", name)


def _message(i: int, role: str, content: Any) -> Message:
    """A message as the template takes it."""
    where = f"messages.{i}.content"
    if not isinstance(content, str):
        for part in content:
            if part.type != "text" or part.text is None:
                raise Refused(400, f"{where}: only parts of type text are taken, got {part.type!r}.", None, where)
        content = "".join(part.text for part in content)
    return {"role": "system" if role == "developer" else role, "content": content}


def _sampling(request: Request, body: OpenAIRequest, max_tokens: int | None) -> Sampling:
    limits = app_state(request).limits
    for name, value, most in (("max_tokens", max_tokens, limits.max_tokens), ("n", body.n, limits.n)):
        if value is not None and value > most:
            raise Refused(400, f"{name} may be {most} at most, got {value}.", "invalid_value", name)
    return body.sampling(max_tokens=max_tokens, n=body.n)


async def _choose(request: Request, body: OpenAIRequest, header: str | None) -> MemoryChoice | None:
    """The memory that a request names: in its body, its header, its user or its model, in this order."""
    in_model = _at(request, body.model)
    choice = MemoryChoice(id=body.memory) if isinstance(body.memory, str) else body.memory
    if choice is None and header is not None:
        choice = _choice(header)
    if choice is None and body.user:
        choice = await _of_user(request, body.user)
    if choice is None and in_model is not None:
        choice = _choice(in_model)
    if choice is not None:
        authorize(request, choice.id, write=choice.written != "none")
    return choice


def _choice(name: str) -> MemoryChoice:
    check_name(name)
    return MemoryChoice(id=name)


def _at(request: Request, model: str) -> str | None:
    """The memory in `NAME@MEMORY`; a refusal if it is not the model that is served."""
    name, at, memory = model.partition("@")
    served = app_state(request).model
    if name != served:
        raise Refused(404, f"there is no model {name!r}; this server runs {served!r}.", "model_not_found", "model")
    return memory if at else None


async def _of_user(request: Request, user: str) -> MemoryChoice | None:
    """The memory of a user, if there is one that the key may touch: clients send any text here."""
    with contextlib.suppress(ValueError):
        choice, store = _choice(user), app_state(request).service.store
        if key_of(request).may_touch(user) and await run_in_threadpool(store.__contains__, user):
            return choice
    return None


# --- the answer: as a whole, or as server-sent events -----------------------------------------------------------------


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
    turn: Message | None = None  # the message that is written, if any
    started: float = field(default_factory=time.time)
    source: TurnSource = field(default_factory=TurnSource)  # of the message and its answer
    written: int | None = None  # the version that holds what was written last

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
        if first is not None and self.choice is not None and self.choice.written == "user":
            await self._keep(self.turn)  # whoever leaves now has said it
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
        """What the response says of the memory, once no crash loses what is written into it."""
        if self.choice is None:
            return {}
        if self.written is None:
            await self._keep(self.turn)
        if self.choice.written == "both" and text.strip():
            await self._keep({"role": "assistant", "content": text.strip()})
        memory = {"id": self.choice.id, "version": answer.version, "written": self.written}
        if self.source.name:
            memory["source"] = self.source.name
        return {"memory": memory | ({"empty": True} if answer.empty else {})}

    async def _keep(self, turn: Message | None) -> None:
        """Write a turn, of which the answer that has begun knows nothing."""
        if self.choice is not None and turn is not None:
            write, (content, role) = app_state(self.request).service.write, content_of(turn)
            writing = await run_in_threadpool(write, self.choice.id, content, self.source, role=role)
            self.written = writing.version

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
