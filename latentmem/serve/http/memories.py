"""The addresses of memories: make, write, ask, look into, go back, forget, take out and in."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, Literal

import torch
from fastapi import APIRouter, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from torch import Tensor

from latentmem.core.memory import Memory
from latentmem.errors import InUseError
from latentmem.longterm import longterm
from latentmem.model.model import MemoryModel
from latentmem.model.streaming import release_threads
from latentmem.serve.engine.service import OWN_KEY, Missing, Taken
from latentmem.serve.http import schema
from latentmem.serve.http.openai import collected, usage
from latentmem.serve.http.shared import (
    SOURCE,
    Json,
    Refused,
    carried_out,
    change,
    fits,
    key_of,
    look,
    patient,
    record_of,
    shared,
    touch,
)
from latentmem.store import Overview, Store, Version
from latentmem.store.store import Content

router = APIRouter(prefix="/v1/memories", tags=["memories"])
Limit = Annotated[int, Query(ge=1, le=100)]
WORD = {"type": "string"}
FILE: dict[str, Any] = {"type": "object", "properties": {"file": WORD | {"format": "binary"}}, "required": ["file"]}


def _body(**kinds: Any) -> dict[str, Any]:
    """What a body may be, for the OpenAPI document, where a route reads it itself."""
    content = {kind.replace("_", "/", 1).replace("_", "-"): {"schema": schema} for kind, schema in kinds.items()}
    return {"requestBody": {"content": content, "required": True}}


# --- making and listing -----------------------------------------------------------------------------------------------


@router.post("", status_code=201)
async def create(request: Request, body: schema.Create) -> schema.MemoryInfo:
    """Make a memory."""
    touch(request, body.id, write=True, new=True)
    ways = {what: value for what, value in body.model_dump(exclude={"id"}).items() if value is not None}
    await patient(request, carried_out(shared(request).service.create(body.id, **ways)))
    return await _info(request, body.id)


@router.get("")
async def list_(request: Request, limit: Limit = 20, after: str | None = None) -> schema.MemoryList:
    """The memories that the key may touch, by name, those behind `after`."""
    store, key = shared(request).service.store, key_of(request)

    def found() -> schema.MemoryList:
        names = [name for name in store.names() if key.may_touch(name) and (after is None or name > after)]
        page = [_shown(one) for one in store.overview(names[:limit])]
        return schema.MemoryList(data=page, has_more=len(names) > limit)

    return await run_in_threadpool(found)


@router.get("/{id}")
async def get(request: Request, id: str) -> schema.MemoryInfo:
    """One memory."""
    return await _info(request, touch(request, id))


@router.delete("/{id}")
async def delete(request: Request, id: str) -> schema.Deleted:
    """Delete a memory with all its versions, for good."""
    touch(request, id, write=True)
    await change(request, id, lambda store, llm: store.delete(id))
    return schema.Deleted(id=id)


async def _info(request: Request, name: str) -> schema.MemoryInfo:
    found = await look(request, name, lambda store: store.overview([name]))
    if not found:
        raise Missing(f"there is no memory {name!r}.")
    return _shown(found[0])


def _shown(one: Overview) -> schema.MemoryInfo:
    facts = asdict(one)
    return schema.MemoryInfo(**facts | {"id": facts.pop("name"), "model": Path(one.model).name})


# --- writing and asking -----------------------------------------------------------------------------------------------


@router.post(
    "/{id}/write",
    response_model=schema.Written,
    responses={202: {"model": schema.Written}},
    openapi_extra=_body(
        application_json={"$ref": "#/components/schemas/Write"},
        multipart_form_data=FILE | {"properties": FILE["properties"] | dict.fromkeys(("source", "role", "wait"), WORD)},
    ),
)
async def write(
    request: Request, id: str, idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None
) -> Response:
    """Write a text, turns of a conversation or an uploaded text file; the response says that no crash loses it.

    With `wait: false`, or where it takes longer than a request may, the memory has it later.
    """
    touch(request, id, write=True)
    body = await _what_is_written(request)
    content: Content = body.text or [turn.model_dump() for turn in body.messages or []]
    most = shared(request).limits.messages
    if len(body.messages or ()) > most:
        raise Refused(400, f"a conversation may have {most} messages, got {len(content)}; split it.", "invalid_value")
    fits(request, *([body.text] if body.text else [turn.content for turn in body.messages or []]))
    service = shared(request).service

    def accept() -> Any:
        return service.write(id, content, body.source, role=body.role, key=idempotency_key)

    writing = await run_in_threadpool(accept)
    record_of(request).written_tokens = count = writing.tokens
    if body.wait:
        # what fails here stays in the journal: whoever reads or writes the memory next applies it
        with contextlib.suppress(TimeoutError, OSError, InUseError, RuntimeError, MemoryError):
            return _written(id, await patient(request, carried_out(writing.done)), count)
    pending = schema.Written(id=id, version=writing.version, tokens=count, M=None, N=None, state="pending")
    return Json(pending.model_dump(), 202)


def _written(name: str, version: Version, count: int) -> Json:
    facts: dict[str, Any] = {"version": version.version, "tokens": version.tokens or count, "state": version.state}
    facts |= {what: version.made.get(what) for what in ("M", "N")}
    return Json(schema.Written(id=name, **facts).model_dump())


@router.post("/{id}/ask", response_model_exclude_unset=True)
async def ask(request: Request, id: str, body: schema.Ask) -> schema.Asked:
    """Answer a question; with `sources` also what the answer drew on."""
    touch(request, id)
    fits(request, body.question)
    service, limits = shared(request).service, shared(request).limits
    if body.max_tokens is not None and body.max_tokens > limits.max_tokens:
        raise Refused(400, f"max_tokens may be {limits.max_tokens} at most, got {body.max_tokens}.", None, "max_tokens")
    reading = service.ask(id, body.question, body.sampling(), body.version)

    async def answered() -> schema.Asked:
        ((text, finish),) = await collected(reading, record_of(request))
        answer, version = text.strip(), reading.version
        facts: dict[str, Any] = {}
        if body.sources:

            def drawn(store: Store) -> dict[str, float]:
                return service.sources_of(store.open(id, version), body.question, answer)

            facts["sources"] = await look(request, id, drawn) if answer else {}
        return schema.Asked(id=id, answer=answer, version=version, finish_reason=finish, usage=usage(reading), **facts)

    return await patient(request, answered())


async def _what_is_written(request: Request) -> schema.Write:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _uploaded(request)
    if kind != "application/json":
        raise Refused(415, "a body must be application/json or multipart/form-data.", "unsupported_media_type")
    try:
        body = schema.Write.model_validate(json.loads(await request.body()))
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not valid JSON.", "invalid_json") from None
    if (body.text is None) == (body.messages is None):
        raise Refused(400, "give either text or messages.", "invalid_value", "text")
    if body.messages is not None and body.role is not None:
        raise Refused(400, "messages have roles of their own; leave role out.", "invalid_value", "role")
    return body


async def _uploaded(request: Request) -> schema.Write:
    """A file of text; its name without any path is the source, unless another is given."""
    async with request.form(max_files=1, max_fields=8) as form:
        file = _file(form)
        data = await file.read()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text or not text.strip():
            raise Refused(400, "the file is empty or no UTF-8 text.", "invalid_value", "file")
        name = PurePosixPath((file.filename or "").replace("\\", "/")).name
        name = "".join(c for c in name if c.isprintable())[-SOURCE:]
        given: dict[str, Any] = {"text": text, "source": name or "file"}
        given |= {what: form[what] for what in ("source", "role") if form.get(what)}
        given |= {"wait": form.get("wait", "true") != "false"}
    try:
        return schema.Write.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None


def _file(form: FormData) -> UploadFile:
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise Refused(400, "the form needs a field `file` with a file.", "invalid_value", "file")
    return file


# --- looking into it --------------------------------------------------------------------------------------------------


@router.get("/{id}/history")
async def history(
    request: Request,
    id: str,
    limit: Limit = 20,
    after: Annotated[int | None, Query(ge=-1, le=1 << 31)] = None,
    order: Literal["asc", "desc"] = "asc",
    text: bool = False,
) -> schema.History:
    """The versions of a memory, oldest or newest first, those behind `after`; what was written only with `text`."""
    touch(request, id)
    key = key_of(request)
    ways: dict[str, Any] = {"after": after, "limit": limit + 1, "newest_first": order == "desc"}
    found = await look(request, id, lambda store: store.history(id, **ways))

    def line(one: Version) -> schema.HistoryLine:
        facts = {what: getattr(one, what) for what in schema.HistoryLine.model_fields if hasattr(one, what)}
        known = one.base is not None and key.may_touch(one.base[0])
        facts["base"] = schema.VersionOf(id=one.base[0], version=one.base[1]) if known and one.base else None
        facts["text"] = one.text if text else None
        facts["key"] = None if (one.key or "").startswith(OWN_KEY) else one.key
        return schema.HistoryLine(**facts, M=one.made.get("M"), N=one.made.get("N"))

    return schema.History(data=[line(one) for one in found[:limit]], has_more=len(found) > limit)


@router.get("/{id}/stats")
async def stats(
    request: Request, id: str, version: Annotated[int | None, Query(ge=0, le=1 << 31)] = None
) -> schema.Stats:
    """How much of each source is left, and will be after 1, 10 and 100 more updates."""
    touch(request, id)
    if version is None and await look(request, id, lambda store: store.has_pending(id)):
        await change(request, id, lambda store, llm: None)

    def found(store: Store) -> schema.Stats:
        at, memory = _opened(store, id, version)
        sources = store.stats(id, version=at)
        half_life = memory.half_life if memory.half_life < float("inf") else None
        left = [schema.SourceLeft(**asdict(source)) for source in sources]
        facts = {"M": memory.M, "N": memory.N, "K": memory.K}
        return schema.Stats(id=id, version=at, half_life=half_life, sources=left, **facts)

    return await look(request, id, found)


@router.get("/{id}/slots")
async def slots(
    request: Request, id: str, version: Annotated[int | None, Query(ge=0, le=1 << 31)] = None
) -> schema.Slots:
    """Where the slots of each layer came from; of a memory that is being written, as far as that has come."""
    touch(request, id)
    service = shared(request).service

    def found(store: Store) -> schema.Slots:
        release_threads()
        now = service.underway(id) if version is None else None
        if now is None:
            return _picture(id, *_opened(store, id, version), None)
        writing = schema.Underway(done=now.done, total=now.total)
        return _picture(id, store.applied_version(id), now.memory, writing)

    return await look(request, id, found)


def _picture(name: str, version: int, memory: Memory, writing: schema.Underway | None) -> schema.Slots:
    store = longterm.of(memory)
    return schema.Slots(
        id=name,
        version=version,
        **{what: getattr(memory, what) for what in ("L", "M", "N", "K", "R", "updates")},
        stored=int(store.occupied.sum(1).max()) if store is not None else 0,
        sources=[source.name for source in memory.sources],
        layers=[_runs(*rows) for rows in zip(memory.origins, memory.births, strict=True)],
        writing=writing,
    )


def _runs(origins: Tensor, births: Tensor) -> list[int]:
    """Source, update and length of each run of slots of a layer, one after the other."""
    both, lengths = torch.unique_consecutive(torch.stack([origins, births], 1), dim=0, return_counts=True)
    return torch.cat([both.long(), lengths[:, None]], 1).flatten().tolist()


@router.post("/{id}/sources")
async def sources(request: Request, id: str, body: schema.Drawn) -> schema.DrawnOn:
    """Which sources an answer drew on: the share of its attention to the memory that went to each."""
    touch(request, id)
    if (body.question is None) == (body.messages is None):
        raise Refused(400, "give either question or messages.", "invalid_value", "question")
    asked = body.question or [turn.model_dump() for turn in body.messages or []]
    fits(request, body.answer, *([asked] if isinstance(asked, str) else [turn["content"] for turn in asked]))
    service = shared(request).service

    def found(store: Store) -> schema.DrawnOn:
        version, memory = _opened(store, id, body.version)
        shares = service.sources_of(memory, asked, body.answer)
        return schema.DrawnOn(id=id, version=version, sources=shares)

    return await look(request, id, found)


# --- going back and forgetting ----------------------------------------------------------------------------------------


@router.post("/{id}/rollback")
async def rollback(request: Request, id: str, body: schema.Rollback) -> schema.VersionOf:
    """Go to any version, older or newer; that is a new version."""
    touch(request, id, write=True)

    def act(store: Store, llm: MemoryModel) -> int:
        _has(store, id, body.version)
        return store.rollback(id, body.version)

    return schema.VersionOf(id=id, version=await change(request, id, act))


@router.post("/{id}/undo")
async def undo(request: Request, id: str) -> schema.VersionOf:
    """Go back to what the newest version was made from."""
    touch(request, id, write=True)
    return schema.VersionOf(id=id, version=await change(request, id, lambda store, llm: store.undo(id)))


@router.post("/{id}/fork", status_code=201)
async def fork(request: Request, id: str, body: schema.Fork) -> schema.MemoryInfo:
    """Make a memory that goes on from a version of this one."""
    touch(request, body.id, write=True, new=True)
    touch(request, id, write=True)

    def act(store: Store, llm: MemoryModel) -> None:
        if body.id in store:
            raise Taken(f"there is a memory {body.id!r} already.")
        _has(store, id, body.version)
        store.fork(id, body.id, body.version)

    await change(request, id, act)
    return await _info(request, body.id)


@router.post("/{id}/forget", response_model_exclude_unset=True)
async def forget(request: Request, id: str, body: schema.Forget) -> schema.Forgotten:
    """Drop what is left of a source; with `exact` as if it had never been written, in every version and every fork."""
    touch(request, id, write=True)
    key = key_of(request)

    def act(store: Store, llm: MemoryModel) -> schema.Forgotten:
        if not body.exact:
            return schema.Forgotten(id=id, version=store.forget(id, body.source))
        if not all(key.may_touch(name) for name in store.family(id)):
            what = "this would rewrite memories that are connected by forks and that this key may not touch."
            raise Refused(403, what, "no_rights")
        rewritten = store.forget_by_replay(llm, id, body.source)
        return schema.Forgotten(id=id, version=store.version(id).version, rewritten=rewritten)

    return await change(request, id, act)


@router.post("/{id}/pin")
async def pin(request: Request, id: str, body: schema.Pin) -> schema.VersionOf:
    """Never drop a source's slots, or take the pin off."""
    touch(request, id, write=True)
    version = await change(request, id, lambda store, llm: store.pin(id, body.source, body.pinned))
    return schema.VersionOf(id=id, version=version)


@router.post("/{id}/expire")
async def expire(request: Request, id: str, body: schema.Expire) -> schema.Expiring:
    """Forget a source `after` so many seconds; null: never."""
    touch(request, id, write=True)

    def act(store: Store, llm: MemoryModel) -> schema.Expiring:
        store.expire(id, body.source, body.after)
        left = next((one for one in store.stats(id, ()) if one.source == body.source), None)
        return schema.Expiring(id=id, source=body.source, expires=left.expires if left is not None else None)

    return await change(request, id, act)


def _opened(store: Store, name: str, version: int | None) -> tuple[int, Memory]:
    """A version that is there, by default the newest one, and its memory."""
    if version is None:
        return store.latest(name)
    _has(store, name, version)
    return version, store.open(name, version)


def _has(store: Store, name: str, version: int | None) -> None:
    newest = store.version(name).version
    if version is not None and version > newest:
        raise Missing(f"{name!r} has no version {version}; it has 0 to {newest}.")


# --- files ------------------------------------------------------------------------------------------------------------


@router.get(
    "/{id}/export",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def export(request: Request, id: str) -> StreamingResponse:
    """A memory with its history as one file; it holds the texts."""
    touch(request, id)

    def made(store: Store) -> IO[bytes]:
        folder = tempfile.mkdtemp(prefix="latentmem-")
        try:
            store.export(id, Path(folder) / "memory.zip")
            return (Path(folder) / "memory.zip").open("rb")
        finally:
            shutil.rmtree(folder)  # an open file stays until it is closed

    file = await look(request, id, made)
    headers = {"content-disposition": f'attachment; filename="{id}.zip"'}
    return StreamingResponse(_parts(file), media_type="application/zip", headers=headers)


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while part := file.read(1 << 18):
            yield part


@router.post(
    "/{id}/import",
    status_code=201,
    openapi_extra=_body(application_zip={"type": "string", "format": "binary"}, multipart_form_data=FILE),
)
async def import_(request: Request, id: str) -> schema.MemoryInfo:
    """Make a memory from an exported file; all of it is verified, and it must be of the model that is served."""
    touch(request, id, write=True, new=True)
    service = shared(request).service
    with tempfile.NamedTemporaryFile(prefix="latentmem-", suffix=".zip") as file:
        await _receive(request, file)
        path = Path(file.name)

        def act(store: Store, llm: MemoryModel) -> None:
            if id in store:
                raise Taken(f"there is a memory {id!r} already.")
            try:
                store.import_(path, id)
            except ValueError as error:
                raise ValueError(str(error).replace(str(path), "the file")) from None
            try:
                llm.check(store.open(id, store.applied_version(id)))
            except BaseException:
                store.delete(id)
                raise

        await carried_out(service.change(act))  # the file is needed until the end
    return await _info(request, id)


async def _receive(request: Request, to: IO[bytes]) -> None:
    """Keep an uploaded file."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=8) as form:
            file = _file(form)
            while part := await file.read(1 << 20):
                await run_in_threadpool(to.write, part)
    elif kind in ("application/zip", "application/octet-stream"):
        async for part in request.stream():
            await run_in_threadpool(to.write, part)
    else:
        raise Refused(415, "send the file as application/zip, or as multipart/form-data.", "unsupported_media_type")
    to.flush()
