"""Text into memories: one update for each piece, several memories at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Cache

from latentmem.core import memory as memories
from latentmem.core.memory import Memory, Update
from latentmem.core.presets import WriteInputs
from latentmem.core.write import write_exact
from latentmem.decoder.adapters import READ, WRITE
from latentmem.decoder.cache import memory_cache
from latentmem.model.backbone import Backbone, Ids
from latentmem.model.context import Context
from latentmem.model.passes import by_tokens

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)
Updates = Callable[[Update], object]  # takes each update of a write, in order


def new_slots(llm: Backbone, memory: Memory, ids: Ids) -> Tensor:
    """`MemoryModel.new_slots`."""
    llm.check(memory)
    tokens = llm.ids(ids)
    if len(tokens) > memory.piece:
        raise ValueError(f"one update reads at most {memory.piece} tokens, got {len(tokens)}; `write_ids` cuts them.")
    slots = memory.slots.to(llm.decoder.device)
    with llm.using(WRITE):
        sizes = memory.K, memory.compression, memory.choice
        inputs = WriteInputs(llm.decoder, slots, llm.first, llm.mark, lambda: _cache(llm, memory), *sizes)
        return memory.rules.write(inputs, tokens)


def _cache(llm: Backbone, memory: Memory) -> Cache:
    return llm.functional(memory) or llm.prefix(memory).cache(store=False)


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
        together = [i for i in waiting if after[i].rules.sees_all]
        passes = by_tokens(together, [len(pieces[i][number]) for i in together], llm.tokens_at_once)
        for rows in [*passes, *([i] for i in waiting if not after[i].rules.sees_all)]:
            read = [pieces[i][number] for i in rows]
            for i, new in zip(rows, _new_slots(llm, [after[i] for i in rows], read), strict=True):
                after[i], update = _following(llm, after[i], new, source, len(pieces[i][number]))
                if updates:
                    updates(update)
            done += sum(map(len, read))
            if progress:
                progress(done, total)
    return after


def _new_slots(llm: Backbone, before: Sequence[Memory], pieces: Sequence[Tensor]) -> list[Tensor]:
    """`new_slots` of several memories, whose presets see all slots, in one pass, without gradients."""
    if len(before) == 1:
        return [new_slots(llm, before[0], pieces[0])]
    context = Context(tuple(llm.prefix(memory).front for memory in before), (), WRITE)
    tokens = torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
    with llm.using(WRITE):
        cache = memory_cache([front for front in context.fronts if front], llm.decoder, store=False)
        ways = [(memory.compression, memory.choice) for memory in before]
        return write_exact(llm.decoder, cache, pieces, ways, **context.placed(tokens))


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
