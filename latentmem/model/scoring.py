"""How likely texts are behind memories: logits, and scores of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentmem.core.memory import Memory
from latentmem.decoder.adapters import READ
from latentmem.decoder.cache import attention_mask, memory_cache
from latentmem.longterm.search import Retrieval
from latentmem.model.backbone import Backbone, Ids
from latentmem.model.context import Context, fits_behind, front_with, retrieved


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


def logits(llm: Backbone, memory: Memory, tokens: Tensor, chosen: Retrieval | None) -> Tensor:
    """Logits of tokens [1, n] behind a memory and the long-term slots `chosen`, [n, vocab]."""
    llm.fits(memory, tokens.shape[1])
    if memory.is_empty:
        with llm.using(None):
            return llm.base(input_ids=tokens, use_cache=False).logits[0]
    with llm.using(READ):
        cache = llm.functional(memory, chosen)
        if cache is None:
            cache = memory_cache([front_with(llm, memory, chosen, tokens[0])], llm.decoder, store=False)
        mask = attention_mask(cache, tokens)
        return llm.base(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=False).logits[0]


@torch.no_grad()
def score_rows(llm: Backbone, context: Context, ids: Sequence[Ids], answers: Sequence[Ids]) -> list[Score]:
    """`Reader.score_rows`."""
    pairs = [(llm.ids(i), llm.ids(a)) for i, a in zip(ids, answers, strict=True)]
    scores: dict[int, Score] = {}
    for rows in context.passes([0] * len(pairs), slides=llm.decoder.slides):
        scores |= zip(rows, _scores(llm, context.of(rows), [pairs[i] for i in rows]), strict=True)
    return [scores[i] for i in range(len(pairs))]


def _scores(llm: Backbone, context: Context, pairs: list[tuple[Tensor, Tensor]]) -> list[Score]:
    """`score_rows` in one pass."""
    context = retrieved(llm, context, [prompt for prompt, _ in pairs])
    rows = [torch.cat(pair) for pair in pairs]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # right: no row looks at its padding
    for row, room in zip(rows, context.rooms_of(len(rows)), strict=True):
        fits_behind(llm, room, len(row))
    keep = tokens.shape[1] - min(len(prompt) for prompt, _ in pairs) + 1
    with llm.using(context.reader):
        logits = llm.base(
            input_ids=tokens,
            **context.placed(tokens),
            past_key_values=context.cache(llm.decoder, store=False),
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
