"""What is read behind memories and texts: answers of many rows, probabilities, and where an answer came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor
from transformers import Cache

from latentmem.core.memory import Memory
from latentmem.decoder.cache import KVPrefix
from latentmem.model import context as contexts
from latentmem.model import generating, provenance, scoring
from latentmem.model.backbone import Backbone, Ids
from latentmem.model.context import Context
from latentmem.model.generating import Options
from latentmem.model.prompts import Message
from latentmem.model.scoring import Score


class Reader(Backbone):
    """The verbs of `MemoryModel` that only read, in token ids."""

    # --- many rows behind one context -------------------------------------------------------------------------------

    def context(self, memory: Memory | Sequence[Memory]) -> Context:
        """A memory as the context of many rows, or several as the contexts of as many rows.

        Raises:
            ValueError: a memory of another model.
        """
        return contexts.of_memories(self, memory)

    def text_context(self, ids: Sequence[int]) -> Context:
        """Text as the context of many rows, read by the plain model: no memory, no adapter; `ids` may be empty."""
        return contexts.of_text(self, ids)

    def retrieved(self, context: Context, prompts: Sequence[Ids]) -> Context:
        """The contexts of B prompts, each with what it takes of the long-term memory: searched once for many passes."""
        return contexts.retrieved(self, context, prompts)

    def front(self, memory: Memory, ids: Ids) -> KVPrefix | None:
        """What stands in front of a prompt: a memory with the long-term slots that the prompt takes; None: nothing."""
        return contexts.front_of(self, memory, ids)

    def text_cache(self, memory: Memory, ids: Ids | None = None, old: Cache | None = None) -> Cache | None:
        """A cache with the memory and no text in it; None for an empty memory: the plain model makes its own.

        Args:
            ids: what will be asked, and the long-term memory is searched for.
            old: one of this memory with text in it, which is given back where the same stands in front.

        Raises:
            ValueError: no ids for a memory that has a long-term part.
        """
        return contexts.text_cache(self, memory, ids, old)

    def generate_rows(self, context: Context, ids: Sequence[Ids], max_new_tokens: int) -> list[Tensor]:
        """Greedy continuations of B prompts behind one context, or each behind its own, at once.

        Args:
            ids: B prompts, [n] each; they are padded on the left.
            max_new_tokens: at most so many tokens are made for each.

        Returns:
            B tensors of new ids, [at most max_new_tokens] each, up to an end token and with it.

        Raises:
            ValueError: empty rows, or prompt and answer do not fit into the model's context.
        """
        options = Options(self, {"do_sample": False, "max_new_tokens": max_new_tokens})
        outputs = generating.generate(self, context, ids, options)
        return [output[0, len(row) :] for output, row in zip(outputs, ids, strict=True)]

    def score_rows(self, context: Context, ids: Sequence[Ids], answers: Sequence[Ids]) -> list[Score]:
        """How likely each of B answers is after its own prompt behind one context, or each behind its own.

        Args:
            ids: B prompts, [n] each.
            answers: B answers, [n] each.

        Raises:
            ValueError: empty rows, or prompt and answer do not fit into the model's context.
        """
        return scoring.score_rows(self, context, ids, answers)

    # --- probabilities and sources ----------------------------------------------------------------------------------

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
        chosen = contexts.retrieve(self, memory, tokens)
        logits = scoring.logits(self, memory, tokens[None], chosen)
        if not return_retrieved:
            return logits
        return logits, chosen.places if chosen else [torch.zeros(0, dtype=torch.long)] * self.decoder.L

    def score(self, memory: Memory, ids: Ids, answer: Ids) -> Score:
        """How likely `answer` is after `ids` behind the memory."""
        return self.score_rows(self.context(memory), [ids], [answer])[0]

    def attended(self, memory: Memory, ids: Ids, answer: Ids) -> Tensor:
        """Which slots an answer was drawn from: the share of attention that each gets while the answer is said.

        Args:
            ids: what was asked.
            answer: what was said.

        Returns:
            [L, R + M] float32 on the CPU, the R long-term slots first that the question takes; the mean over heads and
            over the answer's tokens. What is missing to 1 in a layer went to the first position and to the text itself.

        Raises:
            ValueError: no ids, a memory of another model, or an attention that shows no weights.
        """
        return provenance.attended(self, memory, ids, answer)[0]

    def sources_of(self, memory: Memory, question: str | list[Message], answer: str) -> dict[str, float]:
        """Which sources an answer drew on: the share of the attention to the memory that went to each.

        Args:
            question: as `ask` puts it; or the messages of a chat, of which the last was answered.
            answer: what was said.

        Returns:
            Name of each source -> share, the mean over layers; "" is what is older than the memory. They add up to 1,
            and an empty memory has none.

        Raises:
            ValueError: as `attended`.
        """
        return provenance.sources_of(self, memory, question, answer)

    def text_of(self, memory: Memory) -> Tensor:
        """The tokens that layer 0 still holds, [M] ids, oldest first; -1 for a slot that is no embedding.

        A slot of layer 0 in the preset "exact" is the embedding of its token: a memory gives its text away.
        """
        return provenance.text_of(self, memory)
