"""The addresses of memories by name: make, list, show, delete, write, ask."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from latentmem import documents
from latentmem.errors import InUseError, NotFoundError, UnreadableError
from latentmem.model.provenance import DrawnOn
from latentmem.serve.http import schema
from latentmem.serve.http.errors import Json, Refused
from latentmem.serve.http.openai import collected, usage
from latentmem.serve.http.state import (
    app_state,
    authorize,
    carried_out,
    change_store,
    check_length,
    key_of,
    media_type,
    read_store,
    request_log,
    with_timeout,
)
from latentmem.store import Overview, Store
from latentmem.store.contents import Content
from latentmem.store.views import nothing_known

router = APIRouter(prefix="/v1/memories", tags=["memories"])
WORD = {"type": "string"}
FILE: dict[str, Any] = {"type": "object", "properties": {"file": WORD | {"format": "binary"}}, "required": ["file"]}
FORM = FILE | {"properties": FILE["properties"] | dict.fromkeys(("source", "role", "wait", "encoding"), WORD)}
LATER = (TimeoutError, OSError, InUseError, RuntimeError, MemoryError)  # errors after which a write waits


@router.post("", status_code=201)
async def create(request: Request, body: schema.Create) -> schema.MemoryInfo:
    """Make a memory; with `exist_ok` go on with one of this name, which keeps its settings."""
    authorize(request, body.id, write=True, new=True)
    service = app_state(request).service
    await with_timeout(request, carried_out(service.create(body.id, body.settings(), exist_ok=body.exist_ok)))
    return await info(request, body.id)


@router.get("")
async def list_(request: Request, limit: schema.Limit = 20, after: str | None = None) -> schema.MemoryList:
    """The memories that the key may touch, by name, those behind `after`."""
    key = key_of(request)

    def read(store: Store) -> schema.MemoryList:
        names = [name for name in store.names() if key.may_touch(name) and (after is None or name > after)]
        page = [_info(overview) for overview in store.overview(names[:limit])]
        return schema.MemoryList(data=page, has_more=len(names) > limit)

    return await read_store(request, read)


@router.get("/{id}")
async def get(request: Request, id: str) -> schema.MemoryInfo:
    """One memory."""
    return await info(request, authorize(request, id))


@router.delete("/{id}")
async def delete(request: Request, id: str) -> schema.Deleted:
    """Delete a memory with all its versions, for good."""
    authorize(request, id, write=True)
    await change_store(request, id, lambda store, llm: store.delete(id))
    return schema.Deleted(id=id)


async def info(request: Request, name: str) -> schema.MemoryInfo:
    """What `GET` says of a memory."""
    overviews = await read_store(request, lambda store: store.overview([name]))
    if not overviews:
        raise NotFoundError.memory(name)
    return _info(overviews[0])


def _info(overview: Overview) -> schema.MemoryInfo:
    facts = asdict(overview)
    return schema.MemoryInfo(**facts | {"id": facts.pop("name"), "model": Path(overview.model).name})


# --- write and ask ----------------------------------------------------------------------------------------------------


def body_of(kinds: dict[str, Any]) -> dict[str, Any]:
    """What a body may be, media type -> schema, for the OpenAPI document, where a route reads it itself."""
    return {"requestBody": {"content": {kind: {"schema": what} for kind, what in kinds.items()}, "required": True}}


@router.post(
    "/{id}/write",
    response_model=schema.Written,
    responses={202: {"model": schema.Written}},
    openapi_extra=body_of(
        {"application/json": {"$ref": "#/components/schemas/Write"}, "multipart/form-data": FORM},
    ),
)
async def write(
    request: Request, id: str, idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None
) -> Response:
    """Write a text, turns of a conversation or an uploaded file; the response says that no crash loses it.

    A file may be text in any encoding (`encoding` names it), PDF, Word, PowerPoint, Excel, HTML, EPUB, CSV, Markdown or
    e-mail.
    With `wait: false`, or where it takes longer than a request may, the memory has it later.
    """
    authorize(request, id, write=True)
    body = await _read_body(request)
    content, service = _content(request, body), app_state(request).service
    writing = await run_in_threadpool(service.write, id, content, body.source, role=body.role, key=idempotency_key)
    request_log(request).written_tokens = writing.tokens
    if body.wait:
        with contextlib.suppress(*LATER):  # the write is in the journal: who reads or writes the memory next applies it
            version = await with_timeout(request, carried_out(writing.done))
            state = "applied" if version.pruned else version.state  # pruned is a version, not the write that made it
            return _written(id, version.version, version.tokens or writing.tokens, state, version.facts)
    return _written(id, writing.version, writing.tokens, "pending", {})


def _written(name: str, version: int, tokens: int, state: Any, facts: dict[str, Any]) -> Json:
    sizes = {what: facts.get(what) for what in ("M", "N")} | {"lost": facts.get("lost", 0) if facts else None}
    body = schema.Written(id=name, version=version, tokens=tokens, state=state, **sizes)
    return Json(body.model_dump(), 202 if state == "pending" else 200)


def _content(request: Request, body: schema.Write) -> Content:
    """What is written; a refusal if it is longer than allowed."""
    if body.text:
        check_length(request, body.text)
        return body.text
    turns, most = body.messages or [], app_state(request).limits.messages
    if len(turns) > most:
        raise Refused(400, f"a conversation may have {most} messages, got {len(turns)}; split it.", "invalid_value")
    check_length(request, *(turn.content for turn in turns))
    return [turn.model_dump() for turn in turns]


async def _read_body(request: Request) -> schema.Write:
    kind = media_type(request.headers)
    if kind == "multipart/form-data":
        return await _uploaded(request)
    if kind != "application/json":
        raise Refused(415, "a body must be application/json or multipart/form-data.", "unsupported_media_type")
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not valid JSON.", "invalid_json") from None
    write = _validated(body)
    if (write.text is None) == (write.messages is None):
        raise Refused(400, "give either text or messages.", "invalid_value", "text")
    if write.messages is not None and write.role is not None:
        raise Refused(400, "messages have roles of their own; leave role out.", "invalid_value", "role")
    return write


def _validated(body: Any) -> schema.Write:
    try:
        return schema.Write.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None


async def _uploaded(request: Request) -> schema.Write:
    """The text of a file; its name without any path is the source, unless another is given."""
    async with request.form(max_files=1, max_fields=8) as form:
        file = file_of(form)
        name = PurePosixPath((file.filename or "").replace("\\", "/")).name
        name = "".join(c for c in name if c.isprintable())[-schema.SOURCE_LENGTH :] or "file"
        text = await with_timeout(request, _text_of(request, file, name, str(form.get("encoding") or "") or None))
        fields: dict[str, Any] = {"text": text, "source": name, "wait": form.get("wait", "true") != "false"}
        return _validated(fields | {what: form[what] for what in ("source", "role") if form.get(what)})


async def _text_of(request: Request, file: UploadFile, name: str, encoding: str | None) -> str:
    """The plain text of a file; few are read at once, because each may take much memory."""
    async with app_state(request).readers:
        data = await file.read()
        try:
            return (await run_in_threadpool(documents.from_bytes, data, name, encoding)).text
        except UnreadableError as error:
            message = str(error).removeprefix(f"{name} ")
            raise Refused(400, f"the file {message}", "invalid_value", "file") from None


def file_of(form: FormData) -> UploadFile:
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise Refused(400, "the form needs a field `file` with a file.", "invalid_value", "file")
    return file


@router.post("/{id}/ask", response_model_exclude_unset=True)
async def ask(request: Request, id: str, body: schema.Ask) -> schema.Asked:
    """Answer a question; with `sources` also what the answer drew on."""
    authorize(request, id)
    check_length(request, body.question)
    service, limits = app_state(request).service, app_state(request).limits
    if body.max_tokens is not None and body.max_tokens > limits.max_tokens:
        raise Refused(400, f"max_tokens may be {limits.max_tokens} at most, got {body.max_tokens}.", None, "max_tokens")
    answer = service.ask(id, body.question, body.sampling(), body.version)

    async def answered() -> schema.Asked:
        ((text, finish),) = await collected(answer, request_log(request))
        text, version = text.strip(), answer.version
        facts: dict[str, Any] = {"notice": f"{nothing_known(id)} The model answered by itself."} if answer.empty else {}
        if body.sources:

            def drawn_on(store: Store) -> DrawnOn:
                return service.drawn_on(store.open(id, version), body.question, text)

            facts |= asdict(await read_store(request, drawn_on) if text else DrawnOn({}))
        return schema.Asked(id=id, answer=text, version=version, finish_reason=finish, usage=usage(answer), **facts)

    return await with_timeout(request, answered())
