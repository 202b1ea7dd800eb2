"""Answers that are made together, token by token: each behind its own memory, joining and leaving at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from latentmem.decoder.adapters import READ
from latentmem.decoder.cache import KVPrefix, joined, memory_cache
from latentmem.longterm.search import RetrievedPrefix
from latentmem.model.context import search_again
from latentmem.model.model import MemoryModel

CHUNK = 512  # positions of a prompt that are read between two tokens of other answers
COLDEST = 1e-4  # temperature, below which the most likely token is drawn anyway
SPARE = 64  # columns that may be padding in all rows before the texts are moved together


@dataclass(eq=False)
class Row:
    """One answer.

    Args:
        ids: the prompt.
        front: the memory in front of it, if any.
        temperature, top_p: as in `Sampling`.
        generator: what tokens are drawn with.
        token: the last token of the answer, which is not read yet.
        said: all of them.
    """

    ids: Sequence[int]
    front: KVPrefix | None
    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None
    token: int = -1
    said: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Batch:
    """Rows that go through the model together: all behind memories, or all behind none.

    A batch begins with its prompts. `advance` reads a chunk of them or, when they are read, the last token of each
    answer, and chooses the next ones.

    Args:
        rows: of equally long prompts, if the model sees a window of the last positions only.
    """

    llm: MemoryModel
    rows: list[Row]
    cache: Any = field(init=False)

    def __post_init__(self) -> None:
        fronts = self._fronts
        self.cache = memory_cache(fronts, self.llm.decoder, store=True, stacked=0) if fronts else DynamicCache()
        longest = max(len(row.ids) for row in self.rows)
        device = self.llm.decoder.device
        self._unread = torch.zeros(len(self.rows), longest, dtype=torch.long)
        self._text = torch.zeros(len(self.rows), longest, dtype=torch.long)  # 1 where a row has a token
        for i, row in enumerate(self.rows):
            self._unread[i, longest - len(row.ids) :] = torch.as_tensor(row.ids)
            self._text[i, longest - len(row.ids) :] = 1
        self._unread, self._text = self._unread.to(device), self._text.to(device)

    @property
    def reads(self) -> bool:
        """Whether prompts are still being read."""
        return bool(self._unread.shape[1])

    @torch.no_grad()
    def advance(self) -> bool:
        """Read on; True if each row has a new `token`."""
        tokens = self._unread[:, :CHUNK]
        if tokens.shape[1]:
            self._unread = self._unread[:, CHUNK:]
        else:
            tokens = torch.tensor([[row.token] for row in self.rows], device=self._text.device)
            self._text = torch.cat([self._text, torch.ones_like(tokens)], dim=1)
        logits = self._read(tokens)
        if self.reads:
            return False
        for row, scores, best in zip(self.rows, logits, logits.argmax(-1).tolist(), strict=True):
            row.token = best if row.temperature == 0 else draw(scores, row.temperature, row.top_p, row.generator)
            row.said.append(row.token)
        self._search_again()
        return True

    def _search_again(self) -> None:
        """Rows whose answers have grown enough take other slots of their long-term memories."""
        changed = False
        for row in self.rows:
            every = row.front.every if isinstance(row.front, RetrievedPrefix) else 0
            if every and len(row.said) % every == 0:
                changed |= search_again(self.llm, row.front, row.said[-every:])
        if changed:
            self.cache.changed()

    def keep(self, rows: Sequence[Row], others: Batch | None = None) -> None:
        """Go on with these rows, of this batch and of another; the prompts of both are read."""
        batches = [batch for batch in (self, others) if batch is not None]
        there = set(rows)
        taken = [[i for i, row in enumerate(batch.rows) if row in there] for batch in batches]
        parts, texts = [], []
        for batch, some in zip(batches, taken, strict=True):
            if some:
                lengths = batch._text[some].sum(1).tolist()
                parts.append((batch.cache, some, lengths))
                texts += lengths
        self.rows = [batch.rows[i] for batch, some in zip(batches, taken, strict=True) for i in some]
        self.cache = joined(parts, self._fronts, self.llm.decoder.L)
        longest = max(texts)
        beyond = longest - torch.tensor(texts, device=self._text.device)[:, None]
        self._text = (torch.arange(longest, device=self._text.device)[None] >= beyond).long()
        self._unread = self._unread.new_zeros(len(self.rows), 0)

    def sparse(self, live: Sequence[Row]) -> bool:
        """Whether so much of it is padding or has ended that it should be moved together."""
        lengths, there = self._text.sum(1).tolist(), set(live)
        longest = max(n for row, n in zip(self.rows, lengths, strict=True) if row in there)
        return 2 * len(live) <= len(self.rows) or self._text.shape[1] > 2 * longest + SPARE

    @property
    def _fronts(self) -> list[KVPrefix]:
        return [row.front for row in self.rows if row.front is not None]

    def _read(self, tokens: Tensor) -> Tensor:
        """Logits behind these tokens [B, n], of the next one, [B, vocab] float32."""
        device, n = tokens.device, tokens.shape[1]
        text = self._text[:, : self._text.shape[1] - self._unread.shape[1]]
        memories = torch.tensor([row.front.P if row.front else 0 for row in self.rows], device=device)[:, None]
        longest = int(memories.max())
        there = (torch.arange(longest, device=device)[None] >= longest - memories).long()
        with self.llm.using(READ if self._fronts else None):
            return (
                self.llm.base(
                    input_ids=tokens,
                    attention_mask=torch.cat([there, text], dim=1),
                    position_ids=(memories + text.cumsum(1) - 1).clamp(min=0)[:, -n:],
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                .logits[:, -1]
                .float()
            )


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """A token drawn by its probability, among the most likely ones that have `top_p` together.

    Args:
        logits: [vocab].
    """
    scores = logits.double().cpu()
    shares = ((scores - scores.max()) / max(temperature, COLDEST)).softmax(-1)
    if top_p == 1:
        return int(torch.multinomial(shares, 1, generator=generator))
    shares, tokens = shares.sort(descending=True)
    shares[1:] = shares[1:].where(shares.cumsum(0)[:-1] < top_p, 0)
    return int(tokens[torch.multinomial(shares, 1, generator=generator)])
