"""The addresses of OpenAI's interface: chat completions, completions and models, with a memory behind them."""

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

from latentmem.model.prompts import Message, Prompts
from latentmem.serve.engine.engine import Piece, Reading, Sampling
from latentmem.serve.engine.service import Missing
from latentmem.serve.http.schema import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    MemoryChoice,
    Model,
    Models,
    OpenAIRequest,
    Rights,
    Usage,
)
from latentmem.serve.http.shared import (
    Json,
    Record,
    Refused,
    fits,
    key_of,
    patient,
    record_of,
    refusal,
    shared,
    to_json,
    touch,
)
from latentmem.store import check_name

router = APIRouter(prefix="/v1", tags=["openai"])
STARTED = int(time.time())
STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


@router.post("/chat/completions", response_model=ChatCompletion, responses={200: {"content": STREAM}})
async def chat(request: Request, body: ChatRequest, x_memory_id: str | None = Header(None)) -> Response:
    """Go on with a conversation, behind a memory if one is chosen."""
    _supported(body, CHAT_ONLY_WITHOUT)
    limits = shared(request).limits
    if len(body.messages) > limits.messages:
        raise Refused(400, f"a conversation may have {limits.messages} messages, got {len(body.messages)}.", None)
    messages = [_message(i, one.role, one.content) for i, one in enumerate(body.messages)]
    fits(request, *(message["content"] for message in messages), param="messages")
    if not messages[-1]["content"].strip():
        raise Refused(400, "the last message is empty.", "invalid_value", "messages")
    chosen = await _choose(request, body, x_memory_id)
    turn = messages[-1] if chosen is not None and chosen.write else None
    if turn is not None and (turn["role"] != "user" or (body.n or 1) > 1):
        what = "to be written, a conversation must end with a user's message and have one answer: n=1."
        raise Refused(400, what, "invalid_value", "memory")

    def prompt(prompts: Prompts, bare: bool) -> list[int]:
        return prompts.chat(messages, bare=bare)

    talk = Talk(request, body, chosen, "chatcmpl", "chat.completion", turn)
    sampling = _sampling(request, body, body.max_completion_tokens or body.max_tokens)
    return await talk.answered(prompt, sampling)


@router.post("/completions", response_model=Completion, responses={200: {"content": STREAM}})
async def complete(request: Request, body: CompletionRequest, x_memory_id: str | None = Header(None)) -> Response:
    """Go on with a text as it is, without a template, behind a memory if one is chosen."""
    _supported(body, COMPLETION_ONLY_WITHOUT)
    text = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    fits(request, text, param="prompt")
    chosen = await _choose(request, body, x_memory_id)
    if chosen is not None and chosen.write:
        raise Refused(400, "only chats are written; use /v1/memories/{id}/write.", "unsupported", "memory")

    def prompt(prompts: Prompts, bare: bool) -> list[int]:
        return ([] if bare else prompts.opening) + prompts.text(text)

    talk = Talk(request, body, chosen, "cmpl", "text_completion", None)
    return await talk.answered(prompt, _sampling(request, body, body.max_tokens))


@router.get("/models")
async def models(request: Request) -> Models:
    """The model that is served."""
    return Models(data=[Model(id=shared(request).model, created=STARTED)])


@router.get("/key")
async def rights(request: Request) -> Rights:
    """What the key of this request may do."""
    return Rights(name=key_of(request).name, writes=key_of(request).writes)


@router.get("/models/{id}")
async def model(request: Request, id: str) -> Model:
    """One model; `NAME@MEMORY` stands for it with a memory."""
    memory = _at(request, id)
    if memory is not None:
        touch(request, memory)
        if not await run_in_threadpool(shared(request).service.store.__contains__, memory):
            raise Missing(f"there is no memory {memory!r}.")
    return Model(id=id, created=STARTED)


# --- what is asked ----------------------------------------------------------------------------------------------------

# field -> values that change nothing
WITHOUT: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
CHAT_ONLY_WITHOUT: dict[str, tuple[Any, ...]] = {
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
COMPLETION_ONLY_WITHOUT: dict[str, tuple[Any, ...]] = {
    **WITHOUT,
    "logprobs": (0, False),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}


def _supported(body: OpenAIRequest, without: dict[str, tuple[Any, ...]]) -> None:
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
    limits = shared(request).limits
    for name, value, most in (("max_tokens", max_tokens, limits.max_tokens), ("n", body.n, limits.n)):
        if value is not None and value > most:
            raise Refused(400, f"{name} may be {most} at most, got {value}.", "invalid_value", name)
    return body.sampling(max_tokens=max_tokens, n=body.n)


async def _choose(request: Request, body: OpenAIRequest, header: str | None) -> MemoryChoice | None:
    """The memory that a request names: in its body, its header, its user or its model, in this order."""
    in_model = _at(request, body.model)
    chosen = MemoryChoice(id=body.memory) if isinstance(body.memory, str) else body.memory
    if chosen is None and header is not None:
        check_name(header)
        chosen = MemoryChoice(id=header)
    if chosen is None and body.user:
        chosen = await _of_user(request, body.user)
    if chosen is None and in_model is not None:
        check_name(in_model)
        chosen = MemoryChoice(id=in_model)
    if chosen is not None:
        touch(request, chosen.id, write=chosen.write)
    return chosen


def _at(request: Request, model: str) -> str | None:
    """The memory in `NAME@MEMORY`; a refusal if it is not the model that is served."""
    name, at, memory = model.partition("@")
    served = shared(request).model
    if name != served:
        raise Refused(404, f"there is no model {name!r}; this server runs {served!r}.", "model_not_found", "model")
    return memory if at else None


async def _of_user(request: Request, user: str) -> MemoryChoice | None:
    """The memory of a user, if there is one that the key may touch: clients send any text here."""
    with contextlib.suppress(ValueError):
        check_name(user)
        store = shared(request).service.store
        if key_of(request).may_touch(user) and await run_in_threadpool(store.__contains__, user):
            return MemoryChoice(id=user)
    return None


# --- what is answered -------------------------------------------------------------------------------------------------


async def collected(reading: Reading, record: Record, n: int = 1) -> list[tuple[str, str]]:
    """All n answers of a reading: (text, why it ended) each.

    Raises:
        Refused: they were cut off.
    """
    texts: dict[int, list[str]] = {}
    ends: dict[int, str] = {}
    try:
        async with contextlib.aclosing(_pieces(reading)) as pieces:
            async for piece in pieces:
                texts.setdefault(piece.choice, []).append(piece.text)
                if piece.finish:
                    ends[piece.choice] = piece.finish
    finally:
        count(reading, record)
    _have_ended(ends, n)
    return [("".join(texts[i]), ends[i]) for i in sorted(ends)]


def _have_ended(ends: dict[int, str], n: int) -> None:
    """Refuse answers of which the end is missing, so that none is taken for whole, or written."""
    if len(ends) < n:
        raise Refused(503, "the answer was cut off, because the server is closing.", "cut_off")


async def _pieces(reading: Reading) -> AsyncGenerator[Piece, None]:
    try:
        async for piece in reading:
            yield piece
    finally:
        reading.cancel()


def count(reading: Reading, record: Record) -> None:
    record.prompt_tokens, record.completion_tokens = reading.prompt_tokens, reading.completion_tokens


def usage(reading: Reading) -> Usage:
    prompt, completion = reading.prompt_tokens, reading.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


@dataclass
class Talk:
    """One request for an answer, in the shape of OpenAI's responses.

    Args:
        chosen: the memory.
        prefix: of the id of the response.
        kind: its `object`.
        turn: what is written with the answer, if anything.
    """

    request: Request
    body: OpenAIRequest
    chosen: MemoryChoice | None
    prefix: str
    kind: str
    turn: Message | None
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.record = record_of(self.request)
        self.chats = self.kind == "chat.completion"

    async def answered(self, prompt: Callable[[Prompts, bool], list[int]], sampling: Sampling) -> Response:
        """The response, as a whole or as a stream."""
        name, version = (self.chosen.id, self.chosen.version) if self.chosen is not None else (None, None)
        reading = shared(self.request).service.read(name, prompt, sampling, version)
        if not self.body.stream:
            return Json(await patient(self.request, self._whole(reading)))
        pieces = _pieces(reading)
        first = await patient(self.request, _first(pieces, reading))  # what is refused has a status of its own
        return Events(self._events(reading, first, pieces))

    async def _whole(self, reading: Reading) -> dict[str, Any]:
        answers = await collected(reading, self.record, self.body.n or 1)
        written = await self._write(answers[0][0]) if self.turn is not None else None
        choices = [self._choice(i, text, finish) for i, (text, finish) in enumerate(answers)]
        return self._shell(self.kind, choices) | {"usage": usage(reading).model_dump()} | self._memory(reading, written)

    async def _events(
        self, reading: Reading, first: Piece | None, pieces: AsyncIterator[Piece]
    ) -> AsyncGenerator[bytes, None]:
        """The answers as server-sent events; the ends come when everything is written that is to be written."""
        kind = "chat.completion.chunk" if self.chats else self.kind
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        usual: dict[str, Any] = {"usage": None} if with_usage else {}
        until = asyncio.get_running_loop().time() + shared(self.request).limits.seconds
        answer, begun, ends, piece = [], set(), {}, first
        try:
            while piece is not None:
                if piece.choice == 0:
                    answer.append(piece.text)
                if piece.finish:
                    ends[piece.choice] = piece.finish
                if piece.text or piece.choice not in begun:
                    new = piece.choice not in begun
                    begun.add(piece.choice)
                    yield _event(self._shell(kind, [self._delta(piece.choice, piece.text, None, new)]) | usual)
                async with asyncio.timeout_at(until):
                    piece = await anext(pieces, None)
            _have_ended(ends, self.body.n or 1)
            written = await self._write("".join(answer)) if self.turn is not None else None
            memory = self._memory(reading, written)
            for i, (choice, finish) in enumerate(sorted(ends.items())):
                last = memory if i == len(ends) - 1 else {}
                yield _event(self._shell(kind, [self._delta(choice, "", finish, False)]) | usual | last)
            if with_usage:
                yield _event(self._shell(kind, []) | {"usage": usage(reading).model_dump()} | memory)
            yield b"data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the status is sent already
            refused = refusal(error)
            if refused.status_code == 500:
                self.request.app.state.log.error(self.record, error)
            yield _event(refused.body)
        finally:
            reading.cancel()
            count(reading, self.record)

    async def _write(self, answer: str) -> int:
        """Write the last turn and its answer, as `latentmem.model.chat` does; the version, once no crash loses it."""
        assert self.turn is not None and self.chosen is not None
        service, turns = shared(self.request).service, [self.turn, {"role": "assistant", "content": answer.strip()}]
        return (await run_in_threadpool(service.write, self.chosen.id, turns, "chat")).version

    def _shell(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        facts = {"id": self.id, "object": kind, "created": int(self.started), "model": self.body.model}
        return {**facts, "choices": list(choices)}

    def _choice(self, i: int, text: str, finish: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chats else {"text": text}
        return {"index": i, **said, "finish_reason": finish, "logprobs": None}

    def _delta(self, i: int, text: str, finish: str | None, new: bool) -> dict[str, Any]:
        delta = ({"role": "assistant"} if new else {}) | ({"content": text} if finish is None else {})
        return {
            "index": i,
            **({"delta": delta} if self.chats else {"text": text}),
            "finish_reason": finish,
            "logprobs": None,
        }

    def _memory(self, reading: Reading, written: int | None) -> dict[str, Any]:
        if self.chosen is None:
            return {}
        return {"memory": {"id": self.chosen.id, "version": reading.version, "written": written}}


async def _first(pieces: AsyncIterator[Piece], reading: Reading) -> Piece | None:
    """The first piece; None if there is none."""
    try:
        return await anext(pieces, None)
    except BaseException:
        reading.cancel()
        raise


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


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"
