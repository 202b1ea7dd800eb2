"""Keys and values of a memory, projected once: they follow its updates without another projection."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import Cache

from latentmem.decoder.attention import KV
from latentmem.decoder.cache import KVPrefix, memory_cache
from latentmem.decoder.decoder import Decoder


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of one memory in every layer, projected once: [first ; slots], P = s + M positions.

    Args:
        decoder: what rotates the keys.
        keys: of each layer, unrotated, [1, heads, P, head width].
        values: of each layer, [1, heads, P, head width].
        s: leading positions that are no slots (sink or bos); they are never dropped.

    Source: MemoryLLM section 3.1.1.
    """

    decoder: Decoder
    keys: list[Tensor]
    values: list[Tensor]
    s: int

    @property
    def P(self) -> int:
        return self.keys[0].shape[2]

    @cached_property
    def rotated(self) -> list[Tensor]:
        """The keys of each layer at positions 0 .. P-1."""
        positions = torch.arange(self.P, device=self.keys[0].device)[None]
        return [self.decoder.rotate(i, k, positions) for i, k in enumerate(self.keys)]

    @cached_property
    def first(self) -> list[KV]:
        """Rotated keys, and values, of the leading positions of each layer."""
        at = torch.arange(self.s, device=self.keys[0].device)[None]
        pairs = zip(self.keys, self.values, strict=True)
        return [(self.decoder.rotate(i, k[:, :, : self.s], at), v[:, :, : self.s]) for i, (k, v) in enumerate(pairs)]

    def after(self, kept: Tensor, new: list[KV]) -> Prefix:
        """The prefix of the next memory: slots `kept` [L, m] stay, `new` keys and values come behind; no projection."""

        def move(old: Tensor, i: int, fresh: Tensor) -> Tensor:
            if kept.shape[1] == self.P - self.s:
                return torch.cat([old, fresh], dim=2)
            stays = old[:, :, self.s :].index_select(2, kept[i].to(old.device))
            return torch.cat([old[:, :, : self.s], stays, fresh], dim=2)

        keys = [move(old, i, new[i][0]) for i, old in enumerate(self.keys)]
        return Prefix(self.decoder, keys, [move(old, i, new[i][1]) for i, old in enumerate(self.values)], self.s)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the keys, the rotated keys and the values, once all are made."""
        return sum(2 * keys.nbytes + values.nbytes for keys, values in zip(self.keys, self.values, strict=True))

    @cached_property
    def front(self) -> KVPrefix:
        """This prefix as what stands in front of a row; it holds no reference to the prefix, which would be a cycle."""
        return KVPrefix.from_pairs(list(zip(self.rotated, self.values, strict=True)))

    def cache(self, *, store: bool = True) -> Cache:
        """A fresh cache over this prefix, for `forward` or `generate`; see `MemoryLayer`."""
        return memory_cache([self.front], self.decoder, store=store)
