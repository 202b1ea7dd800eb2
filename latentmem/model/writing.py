"""Memories to begin with, and text into memories: one update for each piece, several memories at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Cache

from latentmem import longterm as longterms
from latentmem.core import memory as memories
from latentmem.core.memory import Memory, Update
from latentmem.core.presets import WriteInputs
from latentmem.core.settings import OF_USE, LongTermSettings, MemorySettings, settings_of
from latentmem.decoder.adapters import READ, WRITE
from latentmem.decoder.cache import memory_cache
from latentmem.model.backbone import Backbone, Ids
from latentmem.model.context import by_tokens, placed

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)
Updates = Callable[[Update], object]  # takes each update of a write, in order


# --- memories to begin with -------------------------------------------------------------------------------------------


def empty(llm: Backbone, asked: MemorySettings) -> Memory:
    """`MemoryModel.empty`."""
    if llm.trained is not None:
        return _pool(llm.trained.pool, asked)
    memory = _sized(llm, asked)
    longterm = longterms.empty(memory.L, asked.longterm) if asked.longterm is not None and asked.longterm.R else None
    return replace(memory, longterm=longterm, **llm.identities, model_name=llm.name)  # type: ignore[arg-type]


def _sized(llm: Backbone, asked: MemorySettings) -> Memory:
    """An empty memory as the adapters were trained, with a capacity that fits the context.

    Raises:
        ValueError: a capacity that was asked for does not fit.
    """
    if llm.shape is not None and asked.preset in (None, llm.shape.preset):
        N = llm.shape.N if asked.N is None else asked.N
        asked = asked.filled(replace(llm.shape, N=N, K=min(llm.shape.K or 1, N or 1)))
    decoder, R = llm.decoder, asked.longterm.R if asked.longterm is not None else 0

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
        if one.name not in OF_USE and value not in (None, own):
            raise ValueError(f"this checkpoint's memory has {one.name}={own}, got {value}; leave {one.name} out.")
    if asked.longterm is not None:
        pool = _with_longterm(pool, asked.longterm)
    changes = {name: value for name in OF_USE if name != "longterm" and (value := getattr(asked, name)) is not None}
    same = all(getattr(pool.settings, name) == value for name, value in changes.items())
    return pool if same else pool.with_settings(**changes)


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


# --- text into memories -----------------------------------------------------------------------------------------------


def new_slots(llm: Backbone, memory: Memory, ids: Ids) -> Tensor:
    """`MemoryModel.new_slots`."""
    llm.check(memory)
    tokens = llm.ids(ids)
    if len(tokens) > memory.piece:
        raise ValueError(f"one update reads at most {memory.piece} tokens, got {len(tokens)}; `write_ids` cuts them.")

    def cache() -> Cache:
        return llm.functional(memory) or llm.prefix(memory).cache(store=False)

    slots = memory.slots.to(llm.decoder.device)
    with llm.using(WRITE):
        sizes = memory.K, memory.compression, memory.choice
        inputs = WriteInputs(llm.decoder, slots, llm.first, llm.mark, cache, *sizes)
        return memory.rules.write(inputs, tokens)


@torch.no_grad()
def write_all(
    llm: Backbone,
    before: Sequence[Memory],
    texts: Sequence[Tensor],
    source: str,
    progress: Progress | None,
    updates: Updates | None = None,
) -> list[Memory]:
    """Each memory after its text [n], piece by piece; see `MemoryModel.write_ids`."""
    if len(before) != len(texts):
        raise ValueError(f"give as many texts as memories: got {len(texts)} and {len(before)}.")
    after = list(before)
    for memory in after:
        llm.check(memory)
    pieces = [text.split(memory.piece) for memory, text in zip(after, texts, strict=True)]
    done, total = 0, sum(map(len, texts))
    for number in range(max(map(len, pieces), default=0)):
        waiting = [i for i, parts in enumerate(pieces) if number < len(parts)]
        for rows in _passes(after, waiting, [len(pieces[i][number]) for i in waiting], llm.tokens_at_once):
            read = [pieces[i][number] for i in rows]
            for i, new in zip(rows, _new_slots(llm, [after[i] for i in rows], read), strict=True):
                after[i], update = _following(llm, after[i], new, source, len(pieces[i][number]))
                if updates:
                    updates(update)
            done += sum(map(len, read))
            if progress:
                progress(done, total)
    return after


def _passes(memories: Sequence[Memory], rows: Sequence[int], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which rows are written in one pass: those of one preset that can write several, up to `most` tokens."""
    passes = []
    for rules in dict.fromkeys(memories[i].rules for i in rows):
        mine = [(i, n) for i, n in zip(rows, lengths, strict=True) if memories[i].rules is rules]
        together = by_tokens([i for i, _ in mine], [n for _, n in mine], most)
        passes += together if rules.write_many else [[i] for i, _ in mine]
    return passes


def _new_slots(llm: Backbone, before: Sequence[Memory], pieces: Sequence[Tensor]) -> list[Tensor]:
    """`new_slots` of several memories of one preset in one pass, without gradients."""
    write_many = before[0].rules.write_many
    if len(before) == 1 or write_many is None:
        return [new_slots(llm, memory, piece) for memory, piece in zip(before, pieces, strict=True)]
    fronts = [llm.prefix(memory).front for memory in before]
    tokens = torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
    with llm.using(WRITE):
        cache = memory_cache(fronts, llm.decoder, store=False)
        ways = [(memory.compression, memory.choice) for memory in before]
        at = placed([front.P for front in fronts], torch.ones_like(tokens))
        return write_many(llm.decoder, cache, pieces, ways, **at)


def _following(llm: Backbone, memory: Memory, new: Tensor, source: str, tokens: int) -> tuple[Memory, Update]:
    """The memory after an update, with its prefix derived from the one before, and the update."""
    change = Update.drawn(memory, new, source, tokens)
    on_device = replace(memory, slots=memory.slots.to(new.device))
    if memory.longterm is not None:
        change = replace(change, keys=llm.retriever.new_keys(on_device, change.dropped))
    following = memories.update(on_device, change)
    with llm.using(READ):
        fresh = llm.decoder.project_all(new)
    llm.prefixes.keep(following, llm.prefix(memory).after(memories.kept(change.dropped, memory.M), fresh))
    return following, change
