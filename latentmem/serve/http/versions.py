"""The addresses of what is in a memory: look at its versions and slots, change them, take them out and in again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import torch
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from latentmem import longterm
from latentmem.core.memory import Memory
from latentmem.errors import NameTakenError
from latentmem.serve.engine.engine import release_threads
from latentmem.serve.engine.service import OWN_KEY
from latentmem.serve.http import schema
from latentmem.serve.http.errors import Refused
from latentmem.serve.http.keys import Key
from latentmem.serve.http.memories import FILE, body_of, file_of, info
from latentmem.serve.http.state import (
    app_state,
    authorize,
    carried_out,
    change_store,
    check_length,
    key_of,
    media_type,
    read_store,
)
from latentmem.store import Store, Version
from latentmem.store.writing import WritingModel

router = APIRouter(prefix="/v1/memories", tags=["memories"])
BINARY = {"type": "string", "format": "binary"}
VersionQuery = Annotated[int | None, Query(ge=0, le=1 << 31)]


@router.get("/{id}/history")
async def history(
    request: Request,
    id: str,
    limit: schema.Limit = 20,
    after: Annotated[int | None, Query(ge=-1, le=1 << 31)] = None,
    order: Literal["asc", "desc"] = "asc",
    text: bool = False,
) -> schema.History:
    """The versions of a memory, oldest or newest first, those behind `after`; what was written only with `text`."""
    authorize(request, id)
    page: dict[str, Any] = {"after": after, "limit": limit + 1, "newest_first": order == "desc"}
    versions = await read_store(request, lambda store: store.history(id, **page))
    lines = [_line(version, key_of(request), text) for version in versions[:limit]]
    return schema.History(data=lines, has_more=len(versions) > limit)


def _line(version: Version, key: Key, text: bool) -> schema.HistoryLine:
    """What a key may know of a version."""
    names = [what for what in schema.HistoryLine.model_fields if hasattr(version, what)]
    facts: dict[str, Any] = {what: getattr(version, what) for what in names}
    base = version.base if version.base is not None and key.may_touch(version.base[0]) else None
    facts["base"] = schema.VersionOf(id=base[0], version=base[1]) if base is not None else None
    facts["text"] = version.text if text else None
    facts["key"] = None if (version.key or "").startswith(OWN_KEY) else version.key
    facts |= {what: version.facts.get(what) for what in ("M", "N")}
    return schema.HistoryLine(**facts, lost=version.facts.get("lost", 0))


@router.get("/{id}/stats")
async def stats(request: Request, id: str, version: VersionQuery = None) -> schema.Stats:
    """How much of each source is left, and will be after 1, 10 and 100 more updates; bytes of all versions on disk."""
    authorize(request, id)
    if version is None and await read_store(request, lambda store: store.has_pending(id)):
        await change_store(request, id, lambda store, llm: None)

    def read(store: Store) -> schema.Stats:
        number, account = store.applied(id) if version is None else (version, store.account(id, version))
        half_life = account.half_life if account.half_life < float("inf") else None
        sources = [schema.SourceLeft(**asdict(source)) for source in store.stats_of(id, account)]
        facts = {what: getattr(account, what) for what in ("M", "N", "K")}
        for overview in store.overview([id]):
            facts |= {what: getattr(overview, what) for what in ("bytes", "prunable")}
        return schema.Stats(id=id, version=number, half_life=half_life, sources=sources, **facts)

    return await read_store(request, read)


@router.get("/{id}/slots")
async def slots(request: Request, id: str, version: VersionQuery = None) -> schema.Slots:
    """Where the slots of each layer came from; of a memory that is being written, as far as that has come."""
    authorize(request, id)
    service = app_state(request).service

    def read(store: Store) -> schema.Slots:
        release_threads()
        underway = service.underway(id) if version is None else None
        if underway is None:
            return _slots(id, *_opened(store, id, version), None)
        writing = schema.Underway(done=underway.done, total=underway.total)
        return _slots(id, store.applied_version(id), underway.memory, writing)

    return await read_store(request, read)


def _slots(name: str, version: int, memory: Memory, writing: schema.Underway | None) -> schema.Slots:
    return schema.Slots(
        id=name,
        version=version,
        **{what: getattr(memory, what) for what in ("L", "M", "N", "K", "R", "updates")},
        stored=longterm.stored_most(memory),
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
    """Which sources and passages an answer drew on: what it attended to more than a neutral question does."""
    authorize(request, id)
    if (body.question is None) == (body.messages is None):
        raise Refused(400, "give either question or messages.", "invalid_value", "question")
    asked = body.question or [turn.model_dump() for turn in body.messages or []]
    check_length(request, body.answer, *([asked] if isinstance(asked, str) else [turn["content"] for turn in asked]))
    service = app_state(request).service

    def read(store: Store) -> schema.DrawnOn:
        version, memory = _opened(store, id, body.version)
        drawn = service.drawn_on(memory, asked, body.answer)
        return schema.DrawnOn(id=id, version=version, **asdict(drawn))

    return await read_store(request, read)


def _opened(store: Store, name: str, version: int | None) -> tuple[int, Memory]:
    """A version that is there, by default the newest one, and its memory."""
    return store.latest(name) if version is None else (version, store.open(name, version))


# --- changes ----------------------------------------------------------------------------------------------------------


@router.post("/{id}/rollback")
async def rollback(request: Request, id: str, body: schema.Rollback) -> schema.VersionOf:
    """Go to any version, older or newer; that is a new version."""
    return await _changed(request, id, lambda store: store.rollback(id, body.version))


@router.post("/{id}/undo")
async def undo(request: Request, id: str) -> schema.VersionOf:
    """Go back to what the newest version was made from."""
    return await _changed(request, id, lambda store: store.undo(id))


async def _changed(request: Request, name: str, action: Callable[[Store], int]) -> schema.VersionOf:
    """The version that a change has made."""
    authorize(request, name, write=True)
    return schema.VersionOf(id=name, version=await change_store(request, name, lambda store, llm: action(store)))


@router.post("/{id}/fork", status_code=201)
async def fork(request: Request, id: str, body: schema.Fork) -> schema.MemoryInfo:
    """Make a memory that goes on from a version of this one."""
    authorize(request, body.id, write=True, new=True)
    authorize(request, id, write=True)
    await change_store(request, id, lambda store, llm: store.fork(id, body.id, body.version))
    return await info(request, body.id)


@router.post("/{id}/prune")
async def prune(request: Request, id: str, body: schema.Prune) -> schema.Pruned:
    """Remove old versions from the disk; their texts stay in the history, and what later ones need stays readable."""
    authorize(request, id, write=True)
    pruned = await change_store(request, id, lambda store, llm: store.prune(id, **body.model_dump()))
    return schema.Pruned(id=id, versions=pruned.versions, bytes=pruned.bytes)


@router.post("/{id}/forget", response_model_exclude_unset=True)
async def forget(request: Request, id: str, body: schema.Forget) -> schema.Forgotten:
    """Drop what is left of a source; with `exact` as if it had never been written, in every version and every fork."""
    authorize(request, id, write=True)
    key = key_of(request)

    def act(store: Store, llm: WritingModel) -> schema.Forgotten:
        if not body.exact:
            return schema.Forgotten(id=id, version=store.forget(id, body.source))
        if not all(key.may_touch(name) for name in store.family(id)):
            what = "this would rewrite memories that are connected by forks and that this key may not touch."
            raise Refused(403, what, "no_rights")
        rewritten = store.forget_by_replay(llm, id, body.source)
        return schema.Forgotten(id=id, version=store.version(id).version, rewritten=rewritten)

    return await change_store(request, id, act)


@router.post("/{id}/pin")
async def pin(request: Request, id: str, body: schema.Pin) -> schema.VersionOf:
    """Never drop a source's slots, or take the pin off."""
    return await _changed(request, id, lambda store: store.pin(id, body.source, body.pinned))


@router.post("/{id}/expire")
async def expire(request: Request, id: str, body: schema.Expire) -> schema.Expiring:
    """Forget a source `after` so many seconds; null: never."""
    authorize(request, id, write=True)

    def act(store: Store, llm: WritingModel) -> schema.Expiring:
        store.expire(id, body.source, body.after)
        stats = next((one for one in store.stats(id, ()) if one.source == body.source), None)
        return schema.Expiring(id=id, source=body.source, expires=stats.expires if stats is not None else None)

    return await change_store(request, id, act)


# --- files ------------------------------------------------------------------------------------------------------------


@router.get(
    "/{id}/export",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/zip": {"schema": BINARY}}}},
)
async def export(request: Request, id: str) -> StreamingResponse:
    """A memory with its history as one file; it holds the texts."""
    authorize(request, id)

    def write(store: Store) -> IO[bytes]:
        folder = tempfile.mkdtemp(prefix="latentmem-")
        try:
            store.export(id, Path(folder) / "memory.zip")
            return (Path(folder) / "memory.zip").open("rb")
        finally:
            shutil.rmtree(folder)  # an open file stays until it is closed

    file = await read_store(request, write)
    headers = {"content-disposition": f'attachment; filename="{id}.zip"'}
    return StreamingResponse(_parts(file), media_type="application/zip", headers=headers)


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while part := file.read(1 << 18):
            yield part


@router.post(
    "/{id}/import",
    status_code=201,
    openapi_extra=body_of({"application/zip": BINARY, "multipart/form-data": FILE}),
)
async def import_(request: Request, id: str) -> schema.MemoryInfo:
    """Make a memory from an exported file; all of it is verified, and it must be of the model that is served."""
    authorize(request, id, write=True, new=True)
    service = app_state(request).service
    with tempfile.NamedTemporaryFile(prefix="latentmem-", suffix=".zip") as file:
        await _receive(request, file)
        path = Path(file.name)

        def act(store: Store, llm: WritingModel) -> None:
            if id in store:
                raise NameTakenError(f"there is a memory {id!r} already.")
            try:
                store.import_(path, id)
            except ValueError as error:
                raise ValueError(str(error).replace(str(path), "the file")) from None
            try:
                llm.check(store.latest(id)[1])
            except BaseException:
                store.delete(id)
                raise

        await carried_out(service.change(act))  # the file is needed until the end
    return await info(request, id)


async def _receive(request: Request, to: IO[bytes]) -> None:
    """Keep an uploaded file."""
    kind = media_type(request.headers)
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=8) as form:
            file = file_of(form)
            while part := await file.read(1 << 20):
                await run_in_threadpool(to.write, part)
    elif kind in ("application/zip", "application/octet-stream"):
        async for part in request.stream():
            await run_in_threadpool(to.write, part)
    else:
        raise Refused(415, "send the file as application/zip, or as multipart/form-data.", "unsupported_media_type")
    to.flush()
