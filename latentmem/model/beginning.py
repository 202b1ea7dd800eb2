"""Memories to begin with."""

from __future__ import annotations

from dataclasses import replace

from latentmem import longterm as longterms
from latentmem.core import memory as memories
from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings, MemorySettings, settings_of
from latentmem.model.backbone import Backbone


def empty(llm: Backbone, asked: MemorySettings) -> Memory:
    """`MemoryModel.empty`."""
    if llm.trained is not None:
        return _pool(llm.trained.pool, asked)
    memory = _sized(llm, asked)
    longterm = longterms.empty(memory.L, asked.longterm) if asked.longterm is not None and asked.longterm.R else None
    return replace(memory, longterm=longterm, **llm.identities, model_name=llm.name)  # type: ignore[arg-type]


def blank(memory: Memory) -> Memory:
    """A memory without its slots and without its long-term part."""
    slots, births, origins = memory.slots[:, :0], memory.births[:, :0], memory.origins[:, :0]
    return replace(memory, slots=slots, births=births, origins=origins, longterm=None)


def _sized(llm: Backbone, asked: MemorySettings) -> Memory:
    """An empty memory as the adapters were trained, with a capacity that fits the context.

    Raises:
        ValueError: a capacity that was asked for does not fit.
    """
    if llm.shape is not None and asked.preset in (None, llm.shape.preset):
        N = llm.shape.N if asked.N is None else asked.N
        asked = asked.filled(replace(llm.shape, N=N, K=min(llm.shape.K or 1, N or 1)))
    decoder, R = llm.decoder, asked.longterm.takes if asked.longterm is not None else 0

    def memory_of(settings: MemorySettings) -> Memory:
        return memories.empty(decoder.L, decoder.d, settings, dtype=decoder.dtype, device=decoder.device)

    memory = memory_of(asked)
    while asked.N is None and memory.N > 8 and _positions_needed(memory, R) > llm.limit:
        memory = memory_of(replace(asked, N=memory.N // 2))
    need = _positions_needed(memory, R)
    if need > llm.limit:
        more = f", {R} retrieved ones" if R else ""
        raise ValueError(
            f"a memory of N={memory.N} slots{more} and a text of {memory.piece} tokens need {need} positions, "
            f"and this model has {llm.limit}. Choose a smaller N{', R' if R else ''} or K."
        )
    return memory


def _pool(pool: Memory, asked: MemorySettings) -> Memory:
    """A checkpoint's pool with the seed, the quota and the long-term memory that are asked for.

    Raises:
        ValueError: other settings than the pool's are asked for.
    """
    for one in settings_of(MemorySettings):
        value, own = getattr(asked, one.name), getattr(pool.settings, one.name)
        if one.name not in ("seed", "quota", "longterm") and value not in (None, own):
            raise ValueError(f"this checkpoint's memory has {one.name}={own}, got {value}; leave {one.name} out.")
    if asked.longterm is not None:
        pool = _with_longterm(pool, asked.longterm)
    same = (asked.seed, asked.quota) == (pool.seed, pool.quota)
    return pool if same else pool.with_settings(seed=asked.seed, quota=asked.quota)


def _with_longterm(pool: Memory, asked: LongTermSettings) -> Memory:
    """A checkpoint's pool with a long-term memory, or without; one that has its own keeps it."""
    if not asked.R:
        return replace(pool, longterm=None)
    if pool.longterm is None:
        return replace(pool, longterm=longterms.empty(pool.L, asked, pool.M))
    for one in settings_of(LongTermSettings):
        value, own = getattr(asked, one.name), getattr(pool.longterm.settings, one.name)
        if value not in (one.default, own):
            raise ValueError(
                f"this checkpoint's long-term memory has {one.name}={own}, got {value}; leave {one.name} out."
            )
    return pool


def _positions_needed(memory: Memory, R: int) -> int:
    """Positions of the longest pass: a question behind all slots, or one piece behind what a write sees."""
    return 1 + max(R + memory.N + 1, memory.rules.slots_seen(memory.N, memory.K) + memory.piece)
