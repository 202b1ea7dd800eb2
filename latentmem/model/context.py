"""What stands in front of rows, and which rows go through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from latentmem.core.memory import Memory
from latentmem.decoder.cache import KVPrefix, memory_cache
from latentmem.decoder.decoder import Decoder

ROWS = 32  # that go through the model at once


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

    def passes(self, lengths: Sequence[int], *, slides: bool, exact: bool = False) -> list[list[int]]:
        """Rows in passes of at most `ROWS` rows; those behind nothing go apart, for the plain model.

        Transformers counts a sliding window in columns, so padding between memory and text would hide a part of the
        memory: then only texts of one length go together.

        Args:
            lengths: of each row's text, as far as it is padded on the left.
            slides: whether the model has sliding windows.
            exact: nothing may be padded, neither texts nor memories.

        Raises:
            ValueError: another number of rows than of memories.
        """
        if len(self.fronts) not in (1, len(lengths)):
            raise ValueError(f"give as many rows as memories: got {len(lengths)} and {len(self.fronts)}.")
        prefixes = self.lengths * len(lengths) if len(self.fronts) == 1 else self.lengths
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (P, length) in enumerate(zip(prefixes, lengths, strict=True)):
            kind = (P if exact else min(P, 1), length if exact or (slides and P) else 0)
            groups.setdefault(kind, []).append(i)
        return [rows[i : i + ROWS] for rows in groups.values() for i in range(0, len(rows), ROWS)]


def placed(fronts: Sequence[int], text: Tensor, n: int = 0) -> dict[str, Tensor]:
    """Mask and positions of texts behind fronts; shorter fronts are padded on the left, as the texts may be.

    Args:
        fronts: positions in front of each row, or of all.
        text: 1 where a row has a token, [B, t].
        n: columns of the text that are read; 0: all.

    Returns:
        The mask [B, P + t] and the positions [B, n] of tokens.
    """
    P, starts = max(fronts), torch.tensor(fronts, device=text.device)[:, None]
    there = (torch.arange(P, device=text.device)[None] >= P - starts).long().expand(len(text), -1)
    positions = (starts + text.cumsum(1) - 1).clamp(min=0)[:, -n:]
    return {"attention_mask": torch.cat([there, text], dim=1), "position_ids": positions}


def by_tokens(rows: Sequence[int], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows in order, cut into passes of at most `ROWS` rows and `most` tokens when padded; at least one row each."""
    passes: list[list[int]] = []
    longest = 0
    for row, length in zip(rows, lengths, strict=True):
        longest = max(longest, length)
        if not passes or len(passes[-1]) == ROWS or longest * (len(passes[-1]) + 1) > most:
            passes.append([])
            longest = length
        passes[-1].append(row)
    return passes
