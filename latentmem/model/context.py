"""What stands in front of rows: memories with the long-term slots that a question takes, or text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from latentmem.core.memory import Memory
from latentmem.decoder.adapters import READ
from latentmem.decoder.cache import KVPrefix, MemoryCache, memory_cache
from latentmem.decoder.decoder import Decoder
from latentmem.errors import TooLongError
from latentmem.longterm.search import Retrieval, RetrievedPrefix
from latentmem.model.backbone import Backbone, Ids
from latentmem.model.passes import alike


@dataclass(frozen=True)
class Context:
    """What stands in front of rows: memories (`Reader.context`) or text (`Reader.text_context`).

    Args:
        fronts: one for any number of rows, or one for each row; None where nothing stands in front.
        rooms: tokens that fit behind each.
        adapter: which adapter reads them, if any.
        searched: the memories whose long-term part is still to be searched for what a row asks; () or one for each.
    """

    fronts: tuple[KVPrefix | None, ...]
    rooms: tuple[int, ...]
    adapter: str | None
    searched: tuple[Memory | None, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Positions of each front, with what will be retrieved."""
        searched = self.searched or (None,) * len(self.fronts)
        both = zip(self.fronts, searched, strict=True)
        return [(front.P if front else 0) + (memory.R if memory else 0) for front, memory in both]

    @property
    def length(self) -> int:
        """Positions of the longest front."""
        return max(self.lengths)

    @property
    def room(self) -> int:
        """Tokens that fit behind every front."""
        return min(self.rooms)

    @property
    def reader(self) -> str | None:
        """The adapter of a pass; where nothing stands in front the plain model answers."""
        return self.adapter if any(self.fronts) else None

    def of(self, rows: Sequence[int]) -> Context:
        """The context of these rows."""
        if len(self.fronts) == 1:
            return self
        searched = tuple(self.searched[i] for i in rows) if self.searched else ()
        return Context(tuple(self.fronts[i] for i in rows), tuple(self.rooms[i] for i in rows), self.adapter, searched)

    def rooms_of(self, rows: int) -> tuple[int, ...]:
        """Tokens that fit behind the front of each of so many rows."""
        return self.rooms * (rows // len(self.rooms))

    def cache(self, decoder: Decoder, *, store: bool) -> Cache | None:
        """A fresh cache over the fronts; None where there are none."""
        fronts = [front for front in self.fronts if front]
        return memory_cache(fronts, decoder, store=store) if fronts else None

    def mask(self, text: Tensor) -> Tensor:
        """The mask over memories and text, [B, P + n]: shorter memories are padded on the left.

        Args:
            text: 1 where a row has a token, [B, n].
        """
        P = self.length
        lengths = torch.tensor(self.lengths, device=text.device)[:, None]
        there = torch.arange(P, device=text.device)[None] >= P - lengths
        return torch.cat([there.long().expand(len(text), -1), text], dim=1)

    def placed(self, tokens: Tensor) -> dict[str, Tensor]:
        """Mask and, where memories differ in length, positions of tokens [B, n] without padding on the left."""
        mask = self.mask(torch.ones_like(tokens))
        if len(set(self.lengths)) == 1:
            return {"attention_mask": mask}
        start = torch.tensor(self.lengths, device=tokens.device)[:, None]
        return {"attention_mask": mask, "position_ids": start + torch.arange(tokens.shape[1], device=tokens.device)}

    def passes(
        self, lengths: Sequence[int], most: int | None = None, *, slides: bool, exact: bool = False
    ) -> list[list[int]]:
        """Which rows go in one pass; arguments as in `passes.alike`.

        Raises:
            ValueError: another number of rows than of memories.
        """
        if len(self.fronts) not in (1, len(lengths)):
            raise ValueError(f"give as many rows as memories: got {len(lengths)} and {len(self.fronts)}.")
        prefixes = self.lengths * len(lengths) if len(self.fronts) == 1 else self.lengths
        return alike(prefixes, lengths, most, slides=slides, exact=exact)


def of_memories(llm: Backbone, memory: Memory | Sequence[Memory]) -> Context:
    """`Reader.context`."""
    memories = [memory] if isinstance(memory, Memory) else list(memory)
    if not memories:
        raise ValueError("no memory was given; give at least one.")
    for one in memories:
        llm.check(one)
    fronts = tuple(None if one.is_empty else llm.prefix(one).front for one in memories)
    searched = tuple(one if one.needs_search else None for one in memories)
    return Context(fronts, tuple(llm.room(one) for one in memories), READ, searched if any(searched) else ())


@torch.no_grad()
def of_text(llm: Backbone, ids: Sequence[int]) -> Context:
    """`Reader.text_context`."""
    if not len(ids):
        return Context((None,), (llm.limit,), None)
    tokens = llm.ids(ids)[None]
    n = tokens.shape[1]
    fits_behind(llm, llm.limit, n)
    cache = DynamicCache()
    with llm.using(None):
        llm.decoder.body(input_ids=tokens, past_key_values=cache, use_cache=True)
    front = KVPrefix.from_pairs([(layer.keys, layer.values) for layer in cache.layers])
    return Context((front,), (llm.limit - n,), None)


def fits_behind(llm: Backbone, room: int, n: int, new: int = 0) -> None:
    """Refuse a text of n tokens and `new` more where there is too little room.

    Raises:
        TooLongError: the room that there is.
    """
    if room < n + new:
        raise TooLongError(
            f"the text takes {n} tokens and the answer up to {new}, and behind this context of "
            f"{llm.limit - room} positions there is room for {room}. Shorten the text, or use a smaller memory."
        )


# --- the long-term slots that a question takes ------------------------------------------------------------------------


def retrieved(llm: Backbone, context: Context, prompts: Sequence[Ids]) -> Context:
    """`Reader.retrieved`."""
    if not any(context.searched):
        return context
    times = len(prompts) // len(context.fronts)
    rows = zip(prompts, context.searched * times, context.fronts * times, strict=True)
    fronts = tuple(front if memory is None else front_of(llm, memory, ids) for ids, memory, front in rows)
    return Context(fronts, context.rooms * times, context.adapter)


def front_of(llm: Backbone, memory: Memory, ids: Ids) -> KVPrefix | None:
    """`Reader.front`."""
    asked = llm.ids(ids)
    chosen = retrieve(llm, memory, asked)
    return None if memory.is_empty else front_with(llm, memory, chosen, asked)


def front_with(llm: Backbone, memory: Memory, chosen: Retrieval | None, asked: Tensor) -> KVPrefix:
    """A memory that holds something, with the long-term slots that tokens `asked` [n] have chosen."""
    prefix = llm.prefix(memory)
    return RetrievedPrefix.of(llm.retriever, memory, prefix, chosen, asked) if chosen else prefix.front


def retrieve(llm: Backbone, memory: Memory, tokens: Tensor) -> Retrieval | None:
    """What tokens [n] take of the long-term memory; None: there is nothing to take."""
    llm.check(memory)
    if not memory.needs_search:
        return None
    prefix = llm.prefix(memory)
    with torch.no_grad(), llm.using(READ):
        return llm.retriever.retrieve(memory, prefix, tokens, question_mask(llm, tokens))


def question_mask(llm: Backbone, prompt: Tensor) -> Tensor:
    """Which tokens of a prompt [n] are no part of what the model's template puts around a question, [n] bool."""
    asks = torch.ones(len(prompt), dtype=torch.bool)
    ids = prompt.tolist()
    before, after = llm.prompts.frame if llm.prompts is not None else ([], [])
    if len(ids) > len(before) + len(after):
        asks[: len(before)] = ids[: len(before)] != before
        asks[len(ids) - len(after) :] = ids[len(ids) - len(after) :] != after
    return asks


@torch.no_grad()
def search_again(llm: Backbone, front: RetrievedPrefix, said: Ids) -> bool:
    """Let a prompt and the last tokens of its answer take other long-term slots; True if the slots are others."""
    answered = llm.ids(said)
    asks = torch.cat([question_mask(llm, front.asked), torch.ones(len(answered), dtype=torch.bool)])
    with llm.using(READ):
        ids = torch.cat([front.asked, answered])
        return front.take(llm.retriever.retrieve(front.memory, front.prefix, ids, asks))


def text_cache(llm: Backbone, memory: Memory, ids: Ids | None, old: Cache | None) -> Cache | None:
    """`Reader.text_cache`."""
    if memory.is_empty:
        return None
    if ids is None and memory.needs_search:
        raise ValueError("this memory has a long-term part, which is searched for what is asked: give `ids`.")
    front = llm.prefix(memory).front if ids is None else front_of(llm, memory, ids)
    assert front is not None
    if isinstance(old, MemoryCache):
        there = old.fronts[0]
        if there is front:
            return old
        if isinstance(there, RetrievedPrefix) and there.reads_like(front):
            if there.take(there.first_retrieval):
                old.changed()
            return old
    return memory_cache([front], llm.decoder, store=True)
