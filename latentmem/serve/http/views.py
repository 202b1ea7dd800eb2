"""The addresses that show what is in a memory: history, stats, slots, and the sources of an answer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Query, Request
from torch import Tensor

from latentmem import longterm
from latentmem.core.memory import Memory
from latentmem.serve.engine.engine import release_threads
from latentmem.serve.engine.service import OWN_KEY
from latentmem.serve.http import schema
from latentmem.serve.http.errors import Refused
from latentmem.serve.http.keys import Key
from latentmem.serve.http.state import app_state, authorize, check_length, key_of
from latentmem.serve.http.waiting import change_store, read_store
from latentmem.store import Store, Version

router = APIRouter(prefix="/v1/memories", tags=["memories"])
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
    facts = {what: getattr(version, what) for what in schema.HistoryLine.model_fields if hasattr(version, what)}
    base = version.base if version.base is not None and key.may_touch(version.base[0]) else None
    facts["base"] = schema.VersionOf(id=base[0], version=base[1]) if base is not None else None
    facts["text"] = version.text if text else None
    facts["key"] = None if (version.key or "").startswith(OWN_KEY) else version.key
    return schema.HistoryLine(**facts, M=version.facts.get("M"), N=version.facts.get("N"))


@router.get("/{id}/stats")
async def stats(request: Request, id: str, version: VersionQuery = None) -> schema.Stats:
    """How much of each source is left, and will be after 1, 10 and 100 more updates."""
    authorize(request, id)
    if version is None and await read_store(request, lambda store: store.has_pending(id)):
        await change_store(request, id, lambda store, llm: None)

    def read(store: Store) -> schema.Stats:
        number, memory = _opened(store, id, version)
        half_life = memory.half_life if memory.half_life < float("inf") else None
        lines = [asdict(source) for source in store.stats(id, version=number)]
        sources = [schema.SourceLeft(left=line.pop("share_left"), **line) for line in lines]
        facts = {what: getattr(memory, what) for what in ("M", "N", "K")}
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
    archive = longterm.of(memory)
    return schema.Slots(
        id=name,
        version=version,
        **{what: getattr(memory, what) for what in ("L", "M", "N", "K", "R", "updates")},
        stored=int(archive.occupied.sum(1).max()) if archive is not None else 0,
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
    authorize(request, id)
    if (body.question is None) == (body.messages is None):
        raise Refused(400, "give either question or messages.", "invalid_value", "question")
    asked = body.question or [turn.model_dump() for turn in body.messages or []]
    check_length(request, body.answer, *([asked] if isinstance(asked, str) else [turn["content"] for turn in asked]))
    service = app_state(request).service

    def read(store: Store) -> schema.DrawnOn:
        version, memory = _opened(store, id, body.version)
        shares = service.sources_of(memory, asked, body.answer)
        return schema.DrawnOn(id=id, version=version, sources=shares)

    return await read_store(request, read)


def _opened(store: Store, name: str, version: int | None) -> tuple[int, Memory]:
    """A version that is there, by default the newest one, and its memory."""
    return store.latest(name) if version is None else (version, store.open(name, version))
