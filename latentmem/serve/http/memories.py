"""The addresses of memories by name: make, list, show, delete."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fastapi import APIRouter, Request

from latentmem.errors import NotFoundError
from latentmem.serve.http import schema
from latentmem.serve.http.state import app_state, authorize, key_of
from latentmem.serve.http.waiting import carried_out, change_store, read_store, with_timeout
from latentmem.store import Overview, Store

router = APIRouter(prefix="/v1/memories", tags=["memories"])


@router.post("", status_code=201)
async def create(request: Request, body: schema.Create) -> schema.MemoryInfo:
    """Make a memory."""
    authorize(request, body.id, write=True, new=True)
    await with_timeout(request, carried_out(app_state(request).service.create(body.id, body.settings())))
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
