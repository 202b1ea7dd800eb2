"""The addresses that change what is in a memory: back and forth, fork, forget, pin, expire."""

from __future__ import annotations

from fastapi import APIRouter, Request

from latentmem.serve.http import schema
from latentmem.serve.http.errors import Refused
from latentmem.serve.http.memories import info
from latentmem.serve.http.state import authorize, key_of
from latentmem.serve.http.waiting import change_store
from latentmem.store import Store
from latentmem.store.writing import WritingModel

router = APIRouter(prefix="/v1/memories", tags=["memories"])


@router.post("/{id}/rollback")
async def rollback(request: Request, id: str, body: schema.Rollback) -> schema.VersionOf:
    """Go to any version, older or newer; that is a new version."""
    authorize(request, id, write=True)
    version = await change_store(request, id, lambda store, llm: store.rollback(id, body.version))
    return schema.VersionOf(id=id, version=version)


@router.post("/{id}/undo")
async def undo(request: Request, id: str) -> schema.VersionOf:
    """Go back to what the newest version was made from."""
    authorize(request, id, write=True)
    return schema.VersionOf(id=id, version=await change_store(request, id, lambda store, llm: store.undo(id)))


@router.post("/{id}/fork", status_code=201)
async def fork(request: Request, id: str, body: schema.Fork) -> schema.MemoryInfo:
    """Make a memory that goes on from a version of this one."""
    authorize(request, body.id, write=True, new=True)
    authorize(request, id, write=True)
    await change_store(request, id, lambda store, llm: store.fork(id, body.id, body.version))
    return await info(request, body.id)


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
    authorize(request, id, write=True)
    version = await change_store(request, id, lambda store, llm: store.pin(id, body.source, body.pinned))
    return schema.VersionOf(id=id, version=version)


@router.post("/{id}/expire")
async def expire(request: Request, id: str, body: schema.Expire) -> schema.Expiring:
    """Forget a source `after` so many seconds; null: never."""
    authorize(request, id, write=True)

    def act(store: Store, llm: WritingModel) -> schema.Expiring:
        store.expire(id, body.source, body.after)
        stats = next((one for one in store.stats(id, ()) if one.source == body.source), None)
        return schema.Expiring(id=id, source=body.source, expires=stats.expires if stats is not None else None)

    return await change_store(request, id, act)
