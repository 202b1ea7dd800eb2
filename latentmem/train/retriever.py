"""The retriever of a long-term memory, as it is trained: which slots are of the text that is asked about.

In each layer two matrices make a query of what the layer sees of a token, two others a key of what it sees of a slot.
A slot of the right text is to fit, sigmoid(query . key) on average over the tokens that ask, and any other is not.
Nothing of it flows back into what the layers see.

Source: M+ (arXiv 2502.00592) section 3.1.2; the released `get_selector_loss`, and `get_projector` for the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from latentmem.longterm.search import Projectors

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Search:
    """A row that is about a text.

    Args:
        row: its number in the episode.
        tokens: that ask, the first ones of the row.
        text: number of the text, as slots are numbered.
    """

    row: int
    tokens: int
    text: int


@dataclass(frozen=True)
class Seen:
    """What the layers see of tokens and slots while rows are read, without gradient.

    Args:
        searches: rows that are about a text.
        slots: all that are read, [L, any, d] each.
        texts: number of the text that each slot is of, [L, P].
        asked: of each layer, the tokens of all searches, [T, d].
        keys: of each layer, the slots, [P, d].
    """

    searches: Sequence[Search]
    slots: Sequence[Tensor]
    texts: Tensor
    asked: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)


class Retriever(nn.Module):
    """The trainable form of `Projectors`, in float32.

    Args:
        query, key: of each layer, as in `Projectors`.
    """

    def __init__(self, query: Sequence[Pair], key: Sequence[Pair]) -> None:
        super().__init__()
        self.query, self.key = (
            nn.ModuleList([nn.ParameterList([part.detach().float().clone() for part in pair]) for pair in pairs])
            for pairs in (query, key)
        )

    @staticmethod
    def fresh(L: int, d: int, hidden: int, width: int, seed: int, device: torch.device) -> Retriever:
        """One that has learned nothing, the same for the same seed; as `nn.Linear` begins."""
        generator = torch.Generator().manual_seed(seed)

        def pairs() -> Iterator[Pair]:
            for _ in range(L):
                first, second = ((2 * torch.rand(b, a, generator=generator) - 1) / a**0.5 for a, b in shapes)
                yield first.to(device), second.to(device)

        shapes = ((d, hidden), (hidden, width))
        return Retriever(list(pairs()), list(pairs()))

    @property
    def projectors(self) -> Projectors:
        """As it is used; a writer has no queries of its own."""
        query, key = ([(pair[0], pair[1]) for pair in pairs] for pairs in (self.query, self.key))  # type: ignore[index]
        return Projectors(query, key)

    def forward(self, seen: Seen) -> tuple[Tensor, float] | None:
        """How badly it tells texts apart, and how much of what it finds is right.

        The loss is the binary cross-entropy of how each slot fits, its means over the slots of the right text and over
        all others taken alike, averaged over rows and layers; without those in which there is nothing to tell apart.

        Returns:
            The loss with gradient, and of as many slots that fit best as there are right ones the share of right ones;
            None where there is nothing to tell apart.
        """
        used, tokens = self.projectors, [search.tokens for search in seen.searches]
        losses, shares = [], []
        for i, (asked, slots) in enumerate(zip(seen.asked, seen.keys, strict=True)):
            query, key = used.project(used.query[i], asked.float()), used.project(used.key[i], slots.float())
            texts = seen.texts[i].to(key.device)
            for row, search in zip((query @ key.T).split(tokens), seen.searches, strict=True):
                right = texts == search.text
                if right.any() and not right.all():
                    losses.append((_unlikely(row[:, right]) + _unlikely(-row[:, ~right])) / 2)
                    best = row.detach().sigmoid().mean(0).topk(int(right.sum())).indices
                    shares.append(right[best].float().mean())
        return (torch.stack(losses).mean(), float(torch.stack(shares).mean())) if losses else None


def _unlikely(scores: Tensor) -> Tensor:
    """-log of the mean of sigmoid over n of scores [n, k], the mean over k; exact however large they are."""
    return (math.log(len(scores)) - logsigmoid(scores).logsumexp(0)).mean()
