"""An archive of what a memory has dropped (M+), a value like the memory that it belongs to (letters: `latentmem.core`).

    update     the dropped slots of each layer go to the archive, with birth, source and order (`LongTerm.after`)
    retrieve   each layer takes the R archived slots that fit a question best (`latentmem.longterm.search`)
    evict      beyond `limit` bytes the slots that came first go first

Source: M+ (arXiv 2502.00592) section 3.1 and the released `update_ltm`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from latentmem.core.memory import Memory, Update
from latentmem.core.settings import LongTermSettings
from latentmem.longterm.blocks import NO_SLOT, BlockRange, StoredSlots, extended, packed, unpacked, without_first

FREQUENCY = 10.0  # of a slot that comes to the archive (released `initial_rf_when_moving_stm_to_ltm`)
DEAD = 0.01  # recall frequency up to which a slot is gone


@dataclass(frozen=True, eq=False)
class LongTerm:
    """What a memory has dropped: S slots of each layer, in the order in which they came.

    Args:
        settings: how it keeps and retrieves.
        places: of each of the memory's own M slots its place within the update that wrote it, [L, M] int32, on the CPU.
        ranges: where the stored slots are.

    Raises:
        ValueError: R is 0.
    """

    settings: LongTermSettings
    places: Tensor
    ranges: tuple[BlockRange, ...] = ()
    first: ClassVar[int] = 0  # what earlier updates wrote is not here
    LIMIT: ClassVar[int] = 1 << 30  # bytes, where the settings have none

    def __post_init__(self) -> None:
        if self.settings.limit is None:
            object.__setattr__(self, "settings", replace(self.settings, limit=self.limit))
        if self.settings.R < 1:
            raise ValueError(f"a long-term memory retrieves at least one slot, got R={self.settings.R}.")

    def check(self, memory: Memory) -> None:
        """A ValueError where it belongs to another memory."""
        if tuple(self.places.shape) != (memory.L, memory.M):
            raise ValueError(
                f"longterm must be [L, M] = {[memory.L, memory.M]}, got places of {list(self.places.shape)}."
            )

    # --- what is there ----------------------------------------------------------------------------------------------

    @property
    def S(self) -> int:
        """Places in each layer, empty ones included."""
        return sum(map(len, self.ranges))

    @property
    def limit(self) -> int:
        """Bytes beyond which the oldest slots go."""
        return self.settings.limit or self.LIMIT

    @property
    def nbytes(self) -> int:
        """Bytes of the stored slots."""
        return self.S * self._slot_bytes if self.ranges else 0

    @property
    def _slot_bytes(self) -> int:
        """Bytes of a slot in all layers, with what belongs to it."""
        return sum(tensor[:, :1].nbytes for tensor in self.ranges[0].block.stored.tensors)

    @cached_property
    def births(self) -> Tensor:
        """The update that wrote each stored slot, [L, S] int32."""
        return self._column("births", torch.int32)

    @cached_property
    def origins(self) -> Tensor:
        """The source of each stored slot, `NO_SLOT` of an empty place, [L, S] int32."""
        return self._column("origins", torch.int32)

    @cached_property
    def orders(self) -> Tensor:
        """The lower, the older, [L, S] int64."""
        return self._column("orders", torch.int64)

    def _column(self, name: str, dtype: torch.dtype) -> Tensor:
        none = torch.zeros(len(self.places), 0, dtype=dtype)
        return torch.cat([none, *(getattr(one.stored, name) for one in self.ranges)], dim=1)

    @cached_property
    def occupied(self) -> Tensor:
        """Which places hold a slot, [L, S] bool."""
        return self.origins != NO_SLOT

    @cached_property
    def writers(self) -> Tensor:
        """The update that wrote each stored slot, -1 of an empty place, [L, S] int32."""
        return self.births.where(self.occupied, -1)

    @cached_property
    def most(self) -> int:
        """Slots that each layer retrieves: R, or as many as the layer with the fewest has."""
        return min(self.settings.R, int(self.occupied.sum(1).min())) if self.ranges else 0

    def slots_left(self, sources: int) -> Tensor:
        """Stored slots of each source in each layer, [number of sources, L] int64."""
        origins = self.origins.where(self.occupied, NO_SLOT)
        counts = [row[row >= 0].bincount(minlength=sources) for row in origins]
        return torch.stack(counts, dim=1) if counts else torch.zeros(sources, 0, dtype=torch.long)

    def slots(self, one: BlockRange, i: int, places: Tensor | slice, like: Tensor) -> Tensor:
        """Slots of layer i at places of a range's block, [s, d], in the type and on the device of `like`."""
        stored = one.block.stored.slots[i][places].to(like.device)
        return (unpacked(stored, like.shape[-1]) if self.settings.int8 else stored).to(like.dtype)

    def reading_order(self, memory: Memory, i: int, places: Tensor) -> Tensor:
        """Which of [stored slots at `places` [R] ; the memory's M slots] of layer i stands where, [R + M] indices."""
        own = written(memory.births[i], self.places[i])
        return torch.cat([self.orders[i][places], own]).argsort(stable=True)

    # --- what changes it --------------------------------------------------------------------------------------------

    def after(self, memory: Memory, change: Update, stays: Tensor) -> LongTerm:
        """The archive after an update of `memory`, of whose own slots `stays` [L, m], ascending, are left."""
        k, dropped = change.slots.shape[1], change.dropped
        new_places = torch.arange(k, dtype=torch.int32).expand(len(stays), k)
        following = replace(self, places=torch.cat([self.places.gather(1, stays), new_places], 1))
        if dropped.shape[1]:
            index = dropped.to(memory.slots.device)[..., None].expand(-1, -1, memory.d)
            slots = memory.slots.detach().gather(1, index)
            slots = (packed(slots) if self.settings.int8 else slots).cpu()
            births = memory.births.gather(1, dropped)
            orders = self._orders(births, self.places.gather(1, dropped))
            stored = StoredSlots(slots, births, memory.origins.gather(1, dropped), orders, change.keys)
            following = replace(following, ranges=extended(self.ranges, stored))
        return following._evicted(k)

    def _orders(self, births: Tensor, places: Tensor) -> Tensor:
        """Orders of slots that come to the archive, [L, count] int64."""
        return written(births, places)

    def _evicted(self, k: int) -> LongTerm:
        """The archive without the slots that have to go after an update of k slots."""
        return self._within_limit()

    def _within_limit(self) -> LongTerm:
        surplus = self.S - self.limit // self._slot_bytes if self.ranges else 0
        return self._without_first(surplus) if surplus > 0 else self

    def _without_first(self, count: int) -> LongTerm:
        return replace(self, ranges=without_first(self.ranges, count))

    def without(self, memory: Memory, stays: Tensor, source: int) -> LongTerm:
        """The archive without the slots of a source; of the memory's own slots `stays` [L, m] are left.

        The numbers of later sources are one less. Own slots of other sources that go with them are lost.
        Layers hold different numbers of its slots, and an archive is rectangular: empty places (_) come first.

            origins of two layers   without source 1   places that no layer needs go   numbers
            0 1 2 1 0               _ _ 0 2 0          _ 0 2 0                         _ 0 1 0
            0 2 1 0 2               _ 0 2 0 2          0 2 0 2                         0 1 0 1
        """
        following = replace(self, places=self.places.gather(1, stays))
        if not self.ranges:
            return following
        order, empty = self._order_without(source)
        stored = StoredSlots.joined([one.stored for one in self.ranges]).gathered(order)
        stored = replace(
            stored,
            slots=stored.slots.masked_fill(empty[..., None], 0),
            origins=(stored.origins - (stored.origins > source).int()).masked_fill(empty, NO_SLOT),
            keys=None if stored.keys is None else stored.keys.masked_fill(empty[..., None], 0),
        )
        return replace(following, ranges=extended((), stored))

    def _order_without(self, source: int) -> tuple[Tensor, Tensor]:
        """Where the slots of other sources are, empty places first, and which places are empty: [L, m] each."""
        stays = self.occupied & (self.origins != source)
        m = int(stays.sum(1).max())
        order = stays.long().argsort(dim=1, stable=True)[:, self.S - m :]
        return order, ~stays.gather(1, order)


@dataclass(frozen=True, eq=False)
class FrequencyLongTerm(LongTerm):
    """The archive of released M+ checkpoints: every `period` slots a slot loses one of its frequency, and goes at 0.

    Frequencies only ever fall, as the authors of the released `update_ltm` left them.

    Args:
        clock: slots written to each layer so far; a stored slot's age is this less its order.
        since: slots written since frequencies were last counted.
        frequencies: of the first stored slots, those that were counted, [L, at most S] float32.
    """

    clock: int = 0
    since: int = 0
    frequencies: Tensor | None = None

    @cached_property
    def occupied(self) -> Tensor:
        return (self.origins != NO_SLOT) & (self._all_frequencies > DEAD)

    @property
    def _all_frequencies(self) -> Tensor:
        """[L, S]."""
        counted = torch.zeros(len(self.places), 0) if self.frequencies is None else self.frequencies
        return torch.nn.functional.pad(counted, (0, self.S - counted.shape[1]), value=FREQUENCY)

    def reading_order(self, memory: Memory, i: int, places: Tensor) -> Tensor:
        """Retrieved slots stand in front: their orders are ages, which the memory's own slots do not have."""
        return torch.arange(len(places) + memory.M)

    def _orders(self, births: Tensor, places: Tensor) -> Tensor:
        return self.clock + 1 + places.long()  # a slot ages from when it is dropped

    def _evicted(self, k: int) -> LongTerm:
        following = replace(self, clock=self.clock + k, since=self.since + k)
        due = following.since >= self.settings.period
        return (following._counted() if due else following)._within_limit()

    def _counted(self) -> FrequencyLongTerm:
        """Every frequency is one less, but in layers where no more than R slots would be left."""
        before = self._all_frequencies
        fewer = torch.where(before > DEAD, before - 1, before)
        enough = ((fewer > DEAD).sum(1) > self.settings.R)[:, None]
        following = replace(self, frequencies=torch.where(enough, fewer, before), since=0)
        held = following.occupied.any(0)
        return following._without_first(int(held.long().argmax()) if held.any() else following.S)

    def _without_first(self, count: int) -> FrequencyLongTerm:
        frequencies = None if self.frequencies is None else self.frequencies[:, count:]
        following = super()._without_first(count)
        assert isinstance(following, FrequencyLongTerm)
        return replace(following, frequencies=frequencies)

    def without(self, memory: Memory, stays: Tensor, source: int) -> LongTerm:
        following = super().without(memory, stays, source)
        if self.frequencies is None or not self.ranges:
            return following
        order, _ = self._order_without(source)
        return replace(following, frequencies=self._all_frequencies.gather(1, order))  # type: ignore[call-arg]


def written(births: Tensor, places: Tensor) -> Tensor:
    """Numbers that put slots into the order in which they were written, int64."""
    return births.long() << 32 | places.long()
