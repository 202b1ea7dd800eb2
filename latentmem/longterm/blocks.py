"""Stored slots in blocks that are only appended to, shared by all memories that go on from each other.

block        [ s s s s s s s s s . . . ]    room for BLOCK slots of each layer; a slot that is in it never changes
one memory   [ range ----> ]
the next     [ range ----------> ]          what the first has dropped since stands behind; nothing is copied
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024  # slots of a block
NO_SLOT = -2  # origin of a place in a block that holds no slot (any more)
GROUP = 32  # neighbouring numbers of a slot that share a scale in 8 bits


@dataclass(frozen=True)
class StoredSlots:
    """s slots of each layer, with what belongs to them.

    Args:
        slots: [L, s, d]; in 8 bits as `packed` makes them.
        births: as in `Memory`, [L, s] int32.
        origins: as in `Memory`, [L, s] int32; `NO_SLOT` is an empty place.
        orders: the lower, the older, [L, s] int64.
        keys: of a trained retriever, [L, s, width]; None: it has none.
    """

    slots: Tensor
    births: Tensor
    origins: Tensor
    orders: Tensor
    keys: Tensor | None

    def __len__(self) -> int:
        return self.orders.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        columns = [self.slots, self.births, self.origins, self.orders]
        return columns if self.keys is None else [*columns, self.keys]

    def map(self, change: Callable[[Tensor], Tensor]) -> StoredSlots:
        """The same change to every tensor."""
        return StoredSlots.of([change(tensor) for tensor in self.tensors])

    def part(self, start: int, end: int) -> StoredSlots:
        return self.map(lambda tensor: tensor[:, start:end])

    def gathered(self, index: Tensor) -> StoredSlots:
        """The slots at `index` [L, m] of each layer."""
        wide = index[..., None]
        return self.map(lambda t: t.gather(1, index if t.ndim == 2 else wide.expand(-1, -1, t.shape[2])))

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> StoredSlots:
        """From what `tensors` gives."""
        slots, births, origins, orders, *keys = tensors
        return StoredSlots(slots, births, origins, orders, keys[0] if keys else None)

    @staticmethod
    def joined(parts: Sequence[StoredSlots]) -> StoredSlots:
        return StoredSlots.of([torch.cat(pieces, 1) for pieces in zip(*(p.tensors for p in parts), strict=True)])


class Block:
    """Room for stored slots of each layer, in the order in which they came.

    Args:
        stored: all its places, taken or not.
        filled: places that are taken.
    """

    def __init__(self, stored: StoredSlots, filled: int) -> None:
        self.stored, self.filled, self._lock = stored, filled, threading.Lock()

    @staticmethod
    def of(slots: StoredSlots) -> Block:
        """A block that holds just these slots, which are not copied."""
        return Block(slots, len(slots))

    @staticmethod
    def like(slots: StoredSlots) -> Block:
        """An empty block for slots of this width and type."""
        with torch.inference_mode(False):  # others will append to it
            return Block(slots.map(lambda t: torch.empty(len(t), BLOCK, *t.shape[2:], dtype=t.dtype)), 0)

    @property
    def room(self) -> int:
        return len(self.stored)

    def append(self, at: int, slots: StoredSlots) -> bool:
        """Put slots at the places from `at` on; False if another memory was there before."""
        with self._lock:
            if self.filled != at or at + len(slots) > self.room:
                return False
            self.filled += len(slots)
        for mine, new in zip(self.stored.tensors, slots.tensors, strict=True):
            mine[:, at : at + len(slots)] = new
        return True


@dataclass(frozen=True)
class BlockRange:
    """The places `start` .. `end` of a block that belong to a memory."""

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


def extended(ranges: Sequence[BlockRange], slots: StoredSlots) -> tuple[BlockRange, ...]:
    """The ranges with more slots behind; only these are copied, and the last range where its block went on elsewhere.

    Raises:
        ValueError: some slots have keys of a trained retriever and others have none.
    """
    after, at = list(ranges), 0
    if after and (after[-1].block.stored.keys is None) != (slots.keys is None):
        raise ValueError("slots of this long-term memory are found by a trained retriever's keys: give `keys`.")
    while at < len(slots):
        if not after or after[-1].sealed:
            after.append(BlockRange(Block.like(slots), 0, 0))
        last = after[-1]
        count = min(len(slots) - at, last.block.room - last.end)
        if last.block.append(last.end, slots.part(at, at + count)):
            after[-1] = BlockRange(last.block, last.start, last.end + count)
            at += count
        else:
            own = Block.like(slots)
            own.append(0, last.stored)
            after[-1] = BlockRange(own, 0, len(last))
    return tuple(after)


def without_first(ranges: Sequence[BlockRange], count: int) -> tuple[BlockRange, ...]:
    """The ranges without their first `count` places."""
    after = []
    for one in ranges:
        cut = min(count, len(one))
        count -= cut
        if cut < len(one):
            after.append(BlockRange(one.block, one.start + cut, one.end))
    return tuple(after)


def packed(slots: Tensor) -> Tensor:
    """Slots [..., d] in 8 bits, [..., d padded to groups + 2 bytes for the scale of each group] int8."""
    grouped = torch.nn.functional.pad(slots.float(), (0, -slots.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scale = (grouped.abs().amax(-1, keepdim=True) / 127).half()  # of tiny numbers the scale rounds to 0, and so do they
    whole = (grouped / scale.float().where(scale > 0, 1)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([whole.flatten(-2), scale[..., 0].contiguous().view(torch.int8)], dim=-1)


def unpacked(slots: Tensor, d: int) -> Tensor:
    """The inverse of `packed` up to rounding, [..., d] float32."""
    groups = -(-d // GROUP)
    whole, scale = slots.split([groups * GROUP, 2 * groups], dim=-1)
    grouped = whole.float().unflatten(-1, (groups, GROUP)) * scale.contiguous().view(torch.float16).float()[..., None]
    return grouped.flatten(-2)[..., :d]
