"""Stored slots in blocks that are only appended to, shared by all memories that go on from each other."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024  # slots of a block
NO_SLOT = -2  # origin of a place in a block that holds nothing (any more)
GROUP = 32  # neighbouring numbers of a slot that share a scale in 8 bits


class Block:
    """Up to `BLOCK` stored slots of each layer, in the order in which they came; what is in it never changes.

    Args:
        slots: [L, room, d].
        births, origins: as in `Memory`, [L, room] int32; an origin of `NO_SLOT` is an empty place.
        orders: the lower, the older, [L, room] int64.
        keys: of a trained retriever, [L, room, width]; None: it has none.
        filled: places that are taken.
    """

    def __init__(
        self, slots: Tensor, births: Tensor, origins: Tensor, orders: Tensor, keys: Tensor | None, filled: int
    ) -> None:
        self.slots, self.births, self.origins, self.orders, self.keys = slots, births, origins, orders, keys
        self.filled, self._lock = filled, threading.Lock()

    @staticmethod
    def of(some: StoredSlots) -> Block:
        """A block that holds just these slots, which are not copied."""
        return Block(some.slots, some.births, some.origins, some.orders, some.keys, some.orders.shape[1])

    @property
    def stored(self) -> StoredSlots:
        """All its places."""
        return StoredSlots(self.slots, self.births, self.origins, self.orders, self.keys)

    @staticmethod
    def like(slots: Tensor, keys: Tensor | None) -> Block:
        """An empty block for such slots, [L, any, d], and such keys, [L, any, width]."""
        L, _, d = slots.shape
        with torch.inference_mode(False):  # others will append to it
            births, origins = (torch.empty(L, BLOCK, dtype=torch.int32) for _ in range(2))
            orders = torch.empty(L, BLOCK, dtype=torch.int64)
            wide = None if keys is None else torch.empty(L, BLOCK, keys.shape[2], dtype=keys.dtype)
            return Block(torch.empty(L, BLOCK, d, dtype=slots.dtype), births, origins, orders, wide, 0)

    @property
    def room(self) -> int:
        return self.slots.shape[1]

    def append(self, at: int, some: StoredSlots) -> bool:
        """Put slots at the places from `at` on, if nobody was there before."""
        count = some.orders.shape[1]
        with self._lock:
            if self.filled != at or at + count > self.room:
                return False
            self.filled += count
        self.slots[:, at : at + count] = some.slots
        self.births[:, at : at + count] = some.births
        self.origins[:, at : at + count] = some.origins
        self.orders[:, at : at + count] = some.orders
        if self.keys is not None and some.keys is not None:
            self.keys[:, at : at + count] = some.keys
        return True


@dataclass(frozen=True)
class StoredSlots:
    """Slots with what belongs to them: fields as in `Block`, s of them in each layer."""

    slots: Tensor
    births: Tensor
    origins: Tensor
    orders: Tensor
    keys: Tensor | None

    def part(self, start: int, end: int) -> StoredSlots:
        keys = None if self.keys is None else self.keys[:, start:end]
        slots, births, origins, orders = (t[:, start:end] for t in (self.slots, self.births, self.origins, self.orders))
        return StoredSlots(slots, births, origins, orders, keys)

    @staticmethod
    def joined(parts: Sequence[StoredSlots]) -> StoredSlots:
        keys = None if parts[0].keys is None else torch.cat([part.keys for part in parts if part.keys is not None], 1)
        names = ("slots", "births", "origins", "orders")
        slots, births, origins, orders = (torch.cat([getattr(part, name) for part in parts], 1) for name in names)
        return StoredSlots(slots, births, origins, orders, keys)


@dataclass(frozen=True)
class BlockRange:
    """The places `start` .. `end` of a block that belong to a store."""

    block: Block
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def stored(self) -> StoredSlots:
        return self.block.stored.part(self.start, self.end)

    @property
    def sealed(self) -> bool:
        """Whether nothing will come to its block any more."""
        return self.end == self.block.room


def packed(slots: Tensor) -> Tensor:
    """Slots [..., d] in 8 bits, [..., d padded to groups + 2 bytes for the scale of each group] int8."""
    grouped = torch.nn.functional.pad(slots.float(), (0, -slots.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scale = (grouped.abs().amax(-1, keepdim=True) / 127).half()  # what is not 0 may round to a scale of 0, and to 0
    whole = (grouped / scale.float().where(scale > 0, 1)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([whole.flatten(-2), scale[..., 0].contiguous().view(torch.int8)], dim=-1)


def unpacked(slots: Tensor, d: int) -> Tensor:
    """The other way of `packed`, [..., d] float32."""
    groups = -(-d // GROUP)
    whole, scale = slots.split([groups * GROUP, 2 * groups], dim=-1)
    grouped = whole.float().unflatten(-1, (groups, GROUP)) * scale.contiguous().view(torch.float16).float()[..., None]
    return grouped.flatten(-2)[..., :d]
