"""The addresses of OpenAI's interface: chat completions, completions and models, with a memory behind them."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from latentmem.model.prompts import Message, Prompts
from latentmem.serve.engine.answer import Sampling
from latentmem.serve.http import schema
from latentmem.serve.http.errors import Refused
from latentmem.serve.http.memories import info
from latentmem.serve.http.responder import ChatResponder
from latentmem.serve.http.schema import ChatRequest, CompletionRequest, MemoryChoice, OpenAIRequest
from latentmem.serve.http.state import app_state, authorize, check_length, key_of
from latentmem.store import check_name

router = APIRouter(prefix="/v1", tags=["openai"])
STARTED = int(time.time())
STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


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
    turn = messages[-1] if choice is not None and choice.write else None
    if turn is not None and (turn["role"] != "user" or (body.n or 1) > 1):
        what = "to be written, a conversation must end with a user's message and have one answer: n=1."
        raise Refused(400, what, "invalid_value", "memory")

    def prompt(prompts: Prompts, bare: bool) -> list[int]:
        return prompts.chat(messages, bare=bare)

    responder = ChatResponder(request, body, choice, "chatcmpl", "chat.completion", turn)
    return await responder.respond(prompt, _sampling(request, body, body.max_completion_tokens or body.max_tokens))


@router.post("/completions", response_model=schema.Completion, responses={200: {"content": STREAM}})
async def complete(request: Request, body: CompletionRequest, x_memory_id: str | None = Header(None)) -> Response:
    """Go on with a text as it is, without a template, behind a memory if one is chosen."""
    _supported(body, COMPLETION_ONLY_WITHOUT)
    text = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    check_length(request, text, param="prompt")
    choice = await _choose(request, body, x_memory_id)
    if choice is not None and choice.write:
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
        await info(request, authorize(request, memory))  # refuses a memory that is not there
    return schema.Model(id=id, created=STARTED)


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
        authorize(request, choice.id, write=choice.write)
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
