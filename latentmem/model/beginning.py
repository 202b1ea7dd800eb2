"""Memories to begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from latentmem.core import memory as memories
from latentmem.core.memory import Memory
from latentmem.longterm import longterm as longterms
from latentmem.model.backbone import Backbone


def empty(
    llm: Backbone,
    N: int | None,
    K: int | None,
    preset: str | None,
    compression: int | None,
    seed: int,
    choice: str | None,
    longterm: int | Mapping[str, Any] | None,
) -> Memory:
    """`MemoryModel.empty`."""
    settings = _longterm(longterm)
    if llm.trained is not None:
        pool = llm.trained.pool
        if settings:
            pool = _with_longterm(pool, settings)
        elif longterm == 0:
            pool = replace(pool, longterm=None)
        asked = {"N": N, "K": K, "preset": preset, "compression": compression, "choice": choice}
        for what, value in asked.items():
            if value is not None and value != getattr(pool, what):
                raise ValueError(
                    f"this checkpoint's memory has {what}={getattr(pool, what)}, got {value}; leave {what} out."
                )
        return pool if seed == pool.seed else replace(pool, seed=seed)
    preset = preset or "exact"
    if llm.shape is not None and preset == "exact":
        N = llm.shape.N if N is None else N
        K = min(llm.shape.K, N) if K is None else K
        compression = llm.shape.compression if compression is None else compression
        choice = llm.shape.choice if choice is None else choice
    compression = 1 if compression is None else compression
    store = longterms.empty(llm.decoder.L, **settings) if settings else None
    R = store.takes if store is not None else 0
    if N is None:
        N = 2048
        while N > 8 and _positions_needed(N, K or min(256, N // 8), preset, compression, R) > llm.limit:
            N //= 2
    K = min(256, max(1, N // 8)) if K is None else K
    memory = memories.empty(
        llm.decoder.L,
        llm.decoder.d,
        dtype=llm.decoder.dtype,
        device=llm.decoder.device,
        N=N,
        K=K,
        preset=preset,
        compression=compression,
        choice=choice or "last",
        seed=seed,
    )
    if store is not None:
        memory = replace(memory, longterm=store)
    need = _positions_needed(N, K, preset, compression, R)
    if need > llm.limit:
        more = f", {R} retrieved ones" if R else ""
        raise ValueError(
            f"a memory of N={N} slots{more} and a text of {memory.piece} tokens need {need} positions, "
            f"and this model has {llm.limit}. Choose a smaller N{', R' if R else ''} or K."
        )
    return replace(memory, **llm.identities, model_name=llm.name)  # type: ignore[arg-type]


def blank(memory: Memory) -> Memory:
    """A memory without its slots and without its long-term part."""
    slots, births, origins = memory.slots[:, :0], memory.births[:, :0], memory.origins[:, :0]
    return replace(memory, slots=slots, births=births, origins=origins, longterm=None)


def _with_longterm(pool: Memory, settings: dict[str, Any]) -> Memory:
    """A checkpoint's pool with a long-term memory; one that has its own keeps it."""
    if pool.longterm is None:
        places = torch.arange(pool.M, dtype=torch.int32).expand(pool.L, -1)
        return replace(pool, longterm=replace(longterms.empty(pool.L, **settings), places=places))
    for what, value in settings.items():
        if value != getattr(pool.longterm, what):
            raise ValueError(
                f"this checkpoint's long-term memory has {what}={getattr(pool.longterm, what)}, got {value}; "
                f"leave it out."
            )
    return pool


def _longterm(asked: int | Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of a long-term memory; {}: none."""
    known = longterms.CHOSEN
    if asked is None or asked == 0:
        return {}
    settings = dict(asked) if isinstance(asked, Mapping) else {"R": asked}
    if set(settings) - set(known) or type(settings.get("R")) is not int:
        raise ValueError(f"a long-term memory is R slots, or a mapping of {', '.join(known)} with R: got {asked!r}.")
    return settings


def _positions_needed(N: int, K: int, preset: str, compression: int, R: int = 0) -> int:
    """Positions of the longest pass: a question behind all slots, or one piece behind what a write sees."""
    seen, piece = (K, memories.PAPER_PIECE) if preset == "paper" else (N, K * compression)
    return 1 + max(R + N + 1, seen + piece)
