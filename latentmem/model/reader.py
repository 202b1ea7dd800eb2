"""What is read behind memories and texts: contexts of many rows, and probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache

from latentmem.core.memory import Memory
from latentmem.decoder.adapters import READ
from latentmem.decoder.cache import KVPrefix, MemoryCache, attention_mask, memory_cache
from latentmem.longterm.search import Retrieval, RetrievedPrefix
from latentmem.model.backbone import Backbone, Ids
from latentmem.model.context import Context, placed


@dataclass(frozen=True)
class Score:
    """How likely given tokens are as a continuation.

    Args:
        logprobs: natural log of the probability of each token given all before it, [n].
        hits: whether the token was the most likely one, [n] bool.
        likeliest: the token that was the most likely one, [n].
    """

    logprobs: Tensor
    hits: Tensor
    likeliest: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


class Reader(Backbone):
    """The verbs of `MemoryModel` that only read, in token ids."""

    # --- what stands in front of rows -------------------------------------------------------------------------------

    def context(self, memory: Memory | Sequence[Memory]) -> Context:
        """A memory as the context of many rows, or several as the contexts of as many rows.

        Raises:
            ValueError: a memory of another model.
        """
        memories = [memory] if isinstance(memory, Memory) else list(memory)
        if not memories:
            raise ValueError("no memory was given; give at least one.")
        for one in memories:
            self.check(one)
        fronts = tuple(None if one.is_empty else self._unsearched(one) for one in memories)
        searched = tuple(one if one.needs_search else None for one in memories)
        return Context(fronts, tuple(map(self.room, memories)), READ, searched if any(searched) else ())

    def _unsearched(self, memory: Memory) -> KVPrefix:
        """A memory without its long-term part; where a question will be searched for, no rotated keys are kept."""
        return self.prefix(memory).passing() if memory.needs_search else self.plain_front(memory)

    @torch.no_grad()
    def text_context(self, ids: Sequence[int]) -> Context:
        """Text as the context of many rows, read by the plain model: no memory, no adapter; `ids` may be empty."""
        if not len(ids):
            return Context((None,), (self.limit,), None)
        tokens = self.ids(ids)[None]
        n = tokens.shape[1]
        self.check_room(self.limit, n)
        cache = DynamicCache()
        with self.using(None):
            self.decoder.body(input_ids=tokens, past_key_values=cache, use_cache=True)
        front = KVPrefix.from_pairs([(layer.keys, layer.values) for layer in cache.layers])
        return Context((front,), (self.limit - n,), None)

    def text_cache(self, memory: Memory, ids: Ids | None = None, old: Cache | None = None) -> Cache | None:
        """A cache with the memory and no text in it; None for an empty memory: the plain model makes its own.

        Args:
            ids: what will be asked, and the long-term memory is searched for.
            old: one of this memory with text in it, which is given back where the same stands in front.

        Raises:
            ValueError: no ids for a memory that has a long-term part.
        """
        if memory.is_empty:
            return None
        if ids is None and memory.needs_search:
            raise ValueError("this memory has a long-term part, which is searched for what is asked: give `ids`.")
        front = self.plain_front(memory) if ids is None else self.front(memory, ids)
        assert front is not None
        if isinstance(old, MemoryCache):
            there = old.fronts[0]
            if there is front:
                return old
            if isinstance(there, RetrievedPrefix) and there.reads_like(front):
                if there.take(there.first_retrieval):
                    old.changed()
                return old
        return memory_cache([front], self.decoder, store=True)

    # --- the long-term slots that a question takes ------------------------------------------------------------------

    def retrieved(self, context: Context, prompts: Sequence[Ids]) -> Context:
        """The contexts of B prompts, each with what it takes of the long-term memory: searched once for many passes."""
        if not any(context.searched):
            return context
        times = len(prompts) // len(context.fronts)
        rows = zip(prompts, context.searched * times, context.fronts * times, strict=True)
        fronts = tuple(front if memory is None else self.front(memory, ids) for ids, memory, front in rows)
        return Context(fronts, context.rooms * times, context.adapter)

    def front(self, memory: Memory, ids: Ids) -> KVPrefix | None:
        """What stands in front of a prompt: a memory with the long-term slots that the prompt takes; None: nothing."""
        asked = self.ids(ids)
        chosen = self.retrieve(memory, asked)
        return None if memory.is_empty else self.front_with(memory, chosen, asked)

    def front_with(self, memory: Memory, chosen: Retrieval | None, asked: Tensor) -> KVPrefix:
        """A memory that holds something, with the long-term slots that tokens `asked` [n] have chosen."""
        if chosen is None:
            return self.plain_front(memory)
        prefix = self.prefixes.get(memory) or self.prefix(memory)  # the search has looked whether weights changed
        return RetrievedPrefix.of(self.retriever, memory, prefix, chosen, asked)

    def retrieve(self, memory: Memory, tokens: Tensor) -> Retrieval | None:
        """What tokens [n] take of the long-term memory; None: there is nothing to take."""
        self.check(memory)
        if not memory.needs_search:
            return None
        prefix = self.prefix(memory)
        with torch.no_grad(), self.using(READ):
            return self.retriever.retrieve(memory, prefix, tokens, self.question_mask(tokens))

    @torch.no_grad()
    def search_again(self, front: RetrievedPrefix, said: Ids) -> bool:
        """Let a prompt and the last tokens of its answer take other long-term slots; True if the slots are others."""
        answered = self.ids(said)
        asks = torch.cat([self.question_mask(front.asked), torch.ones(len(answered), dtype=torch.bool)])
        with self.using(READ):
            ids = torch.cat([front.asked, answered])
            return front.take(self.retriever.retrieve(front.memory, front.prefix, ids, asks))

    def question_mask(self, prompt: Tensor) -> Tensor:
        """Which tokens of a prompt [n] are no part of what the model's template puts around a question, [n] bool."""
        asks = torch.ones(len(prompt), dtype=torch.bool)
        ids = prompt.tolist()
        before, after = self.prompts.frame if self.prompts is not None else ([], [])
        if len(ids) > len(before) + len(after):
            asks[: len(before)] = ids[: len(before)] != before
            asks[len(ids) - len(after) :] = ids[len(ids) - len(after) :] != after
        return asks

    # --- probabilities ----------------------------------------------------------------------------------------------

    @overload
    def logits(self, memory: Memory, ids: Ids, *, return_retrieved: Literal[False] = ...) -> Tensor: ...

    @overload
    def logits(self, memory: Memory, ids: Ids, *, return_retrieved: Literal[True]) -> tuple[Tensor, list[Tensor]]: ...

    def logits(
        self, memory: Memory, ids: Ids, *, return_retrieved: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits of the next token at every position of `ids` read behind the memory, [n, vocab].

        Differentiable in the memory's slots and in whatever weights have gradients on.

        Args:
            return_retrieved: give the long-term slots that `ids` take, too: for each layer the places in its store,
                [R] int64, oldest first.
        """
        tokens = self.ids(ids)
        chosen = self.retrieve(memory, tokens)
        logits = self._logits(memory, tokens, chosen)
        if not return_retrieved:
            return logits
        return logits, chosen.places if chosen else [torch.zeros(0, dtype=torch.long)] * self.decoder.L

    def _logits(self, memory: Memory, tokens: Tensor, chosen: Retrieval | None) -> Tensor:
        """Logits of tokens [n] behind a memory and the long-term slots `chosen`, [n, vocab]."""
        self.check_room(self.room(memory), len(tokens), front=f"this memory of {memory.M} slots")
        ids = tokens[None]
        if memory.is_empty:
            with self.using(None):
                return self.base(input_ids=ids, use_cache=False).logits[0]
        with self.using(READ):
            cache = self.functional(memory, chosen)
            if cache is None:
                cache = memory_cache([self.front_with(memory, chosen, tokens)], self.decoder, store=False)
            mask = attention_mask(cache, ids)
            return self.base(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=False).logits[0]

    def score(self, memory: Memory, ids: Ids, answer: Ids) -> Score:
        """How likely `answer` is after `ids` behind the memory."""
        return self.score_rows(self.context(memory), [ids], [answer])[0]

    @torch.no_grad()
    def score_rows(self, context: Context, ids: Sequence[Ids], answers: Sequence[Ids]) -> list[Score]:
        """How likely each of B answers is after its own prompt behind one context, or each behind its own.

        Args:
            ids: B prompts, [n] each.
            answers: B answers, [n] each.

        Raises:
            ValueError: empty rows, or prompt and answer do not fit into the model's context.
        """
        pairs = [(self.ids(i), self.ids(a)) for i, a in zip(ids, answers, strict=True)]
        scores: dict[int, Score] = {}
        for rows in context.passes([0] * len(pairs), slides=self.decoder.slides):
            scores |= zip(rows, self._scores(context.of(rows), [pairs[i] for i in rows]), strict=True)
        return [scores[i] for i in range(len(pairs))]

    def _scores(self, context: Context, pairs: list[tuple[Tensor, Tensor]]) -> list[Score]:
        """`score_rows` in one pass."""
        context = self.retrieved(context, [prompt for prompt, _ in pairs])
        rows = [torch.cat(pair) for pair in pairs]
        tokens = pad_sequence(rows, batch_first=True)  # right: no row looks at its padding
        for row, room in zip(rows, context.rooms_of(len(rows)), strict=True):
            self.check_room(room, len(row))
        keep = tokens.shape[1] - min(len(prompt) for prompt, _ in pairs) + 1
        with self.using(context.reader):
            logits = self.base(
                input_ids=tokens,
                **placed(context.lengths, torch.ones_like(tokens)),
                past_key_values=context.cache(self.decoder, store=False),
                use_cache=False,
                logits_to_keep=keep,
            ).logits
        scores = []
        for row, (prompt, target) in zip(logits, pairs, strict=True):
            start = len(prompt) - 1 - (tokens.shape[1] - keep)
            answer = row[start : start + len(target)].float()
            logprobs = answer.log_softmax(-1).gather(1, target[:, None])[:, 0]
            likeliest = answer.argmax(-1)
            scores.append(Score(logprobs, likeliest == target, likeliest))
        return scores
