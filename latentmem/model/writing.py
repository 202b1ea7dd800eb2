"""Memories to begin with, and text into memories: one update for each piece, several memories at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Cache

from latentmem import longterm as longterms
from latentmem.coding.codec import EIGHT_BITS, codec_of, directions
from latentmem.core import memory as memories
from latentmem.core.memory import Memory, Update
from latentmem.core.presets import PRESETS, WriteInputs
from latentmem.core.settings import OF_USE, LongTermSettings, MemorySettings, settings_of
from latentmem.decoder.adapters import READ, WRITE
from latentmem.decoder.attention import KV
from latentmem.decoder.cache import memory_cache
from latentmem.decoder.hooks import first_inputs
from latentmem.model.backbone import Backbone, Ids
from latentmem.model.context import by_tokens, placed
from latentmem.written import Written

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)
Updates = Callable[[Update], object]  # takes each update of a write, in order


# --- memories to begin with -------------------------------------------------------------------------------------------


def empty(llm: Backbone, asked: MemorySettings) -> Memory:
    """`MemoryModel.empty`."""
    if llm.trained is not None:
        return _pool(llm.trained.pool, asked)
    asked = _with_defaults(llm, asked)
    memory = _sized(llm, asked)
    about = llm.identities | {"coder": _coder(llm, memory), "dtype": str(llm.decoder.dtype)[6:]}
    part, by_update = asked.longterm, memory.settings.by_update
    longterm = longterms.empty(memory.L, part, by_update=by_update) if part is not None and part.R else None
    return replace(memory, longterm=longterm, **about, model_name=llm.name)  # type: ignore[arg-type]


def _with_defaults(llm: Backbone, asked: MemorySettings) -> MemorySettings:
    """What is asked for, and for what is not given the model's own defaults: those of a memory that remembers.

    They are for updates that are kept coded. Whoever asks for hidden states, or for what only these can do, gets the
    paper's memory with what they ask for.
    """
    own, part = llm.defaults, asked.longterm
    preset = asked.preset or (llm.shape.preset if llm.shape is not None else None) or "exact"
    needs_states = part is not None and (part.int8 or part.group == "slot" or part.rule != "oldest")
    if own is None or asked.form == "exact" or not PRESETS[preset].holds_inputs or (needs_states and not asked.form):
        return asked
    N, K = asked.N or own.N or 1, asked.K or (llm.shape.K if llm.shape is not None else None) or 256
    most = own.longterm.R if own.longterm is not None else 0

    def R(N: int) -> int:
        return part.R if part is not None else min(most, N // 3)

    while asked.N is None and N > 8 and 2 + N + max(R(N), min(K, N) * (asked.compression or 1)) > llm.limit:
        N //= 2
    if part is None and own.longterm is not None:
        part = replace(own.longterm, R=R(N))
    return replace(asked, N=N, longterm=part, form=asked.form or own.form)


def _coder(llm: Backbone, memory: Memory) -> str:
    """What codes the updates of a new memory; a ValueError if the model has no coder and the form needs one."""
    if memory.settings.form == "coded" and not llm.coder:
        raise ValueError(
            f"{llm.name or 'this model'} has no coder for the form 'coded': make one with `latentmem calibrate` and "
            f"give it to `latentmem.load(coder=...)`, or take form='int8', which needs none."
        )
    return {"exact": "", "int8": EIGHT_BITS}.get(memory.settings.form or "exact", llm.coder)


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
    if changes.get("form") == "exact":  # a pool holds hidden states
        del changes["form"]
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
                after[i], update = _following(llm, after[i], new, source, pieces[i][number])
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
    fronts = [llm.prefix(memory).passing() for memory in before]
    tokens = torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
    with llm.using(WRITE):
        cache = memory_cache(fronts, llm.decoder, store=False)
        ways = [(memory.compression, memory.choice) for memory in before]
        at = placed([front.P for front in fronts], torch.ones_like(tokens))
        return write_many(llm.decoder, cache, pieces, ways, **at)


def _following(llm: Backbone, memory: Memory, new: Tensor, source: str, ids: Tensor) -> tuple[Memory, Update]:
    """The memory after an update by new slots of a piece of text [n], with its prefix, and the update."""
    before = llm.prefix(memory)
    with llm.using(READ):
        fresh = llm.decoder.project_all(new)
        if memory.settings.by_update:
            written, decoded = _written(llm, memory, new, fresh, source, ids)
            change = Update.drawn(memory, written, source, len(ids))
            fresh = [fresh[0], *decoded[1:]]
        else:
            memory = replace(memory, slots=memory.slots.to(new.device))
            change = Update.drawn(memory, new, source, len(ids))
            change = replace(change, keys=llm.retriever.new_keys(memory, change.dropped))
        following = memories.update(memory, change)
    llm.prefixes.keep(following, before.after(memories.kept(change.dropped, memory.M), fresh))
    return following, change


def _written(
    llm: Backbone, memory: Memory, new: Tensor, kv: Sequence[KV], source: str, ids: Tensor
) -> tuple[Written, list[KV]]:
    """New slots [L, k, d] of a piece of text as the memory keeps them, and their decoded keys and values."""
    if len(ids) > new.shape[1]:  # some of the tokens became slots
        inputs = first_inputs(llm.decoder, ids)
        equal = torch.stack([(inputs == slot).all(1) for slot in new[0]])  # the same embedding: the same token
        if not bool(equal.any(1).all()):
            raise ValueError(
                f"the input of layer 0 of {llm.name or 'the model'} is no embedding of a token, so no token stands for "
                f"a slot: take compression=1, or form='exact'."
            )
        ids = ids[equal.int().argmax(1)]
    layer = llm.retriever.layer_sketched
    seen = directions(llm.decoder.normed(layer, new[layer]))
    tensors, decoded = codec_of(memory.coder).encode(ids, kv, seen)
    return Written(source, tensors), decoded
