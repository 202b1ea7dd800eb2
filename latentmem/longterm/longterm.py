"""Long-term memory (M+): what is dropped stays, and is searched for what a question asks (letters: `latentmem.core`).

    update     the dropped slots of each layer go to its store, with birth, source and place (`LongTerm.after`)
    retrieve   each layer takes the R stored slots that fit a question best, oldest first, in front of its M slots
    evict      beyond `limit` bytes what came first goes first; or by the released rule, recall frequencies

A store is a value like the memory that it belongs to. Its slots lie in blocks that are only ever appended to, so the
next memory shares all blocks with the one before, and nothing is copied but what was dropped.

Source: M+ (arXiv 2502.00592) section 3.1 and the released `update_ltm`, `get_ltm`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from latentmem.core.memory import Memory, Update
from latentmem.core.settings import LongTermSettings
from latentmem.longterm.blocks import NO_SLOT, Block, BlockRange, StoredSlots, packed, unpacked

FREQUENCY = 10.0  # recall frequency of a slot that comes to the store (released `initial_rf_when_moving_stm_to_ltm`)
DEAD = 0.01  # recall frequency up to which a slot goes


@dataclass(frozen=True, eq=False)
class LongTerm:
    """What a memory has dropped: S slots of each layer, in the order in which they came.

    Args:
        settings: how it keeps and retrieves. With `keep` off the best updates that have no more slots than R together,
            and at least the best one, stand nearest to the question.
        places: of each of the memory's own M slots its place within the update that wrote it, [L, M] int32, on the CPU.
        ranges: the stored slots.
        clock: slots written to each layer so far; in "frequency" a stored slot's age is this less its order.
        frequencies: of "frequency", of the stored slots that it has counted in, [L, S - not yet counted in] float32.
        since: of "frequency", slots written since it last counted.

    Raises:
        ValueError: sizes that make no sense.
    """

    settings: LongTermSettings
    places: Tensor
    ranges: tuple[BlockRange, ...] = ()
    clock: int = 0
    frequencies: Tensor | None = None
    since: int = 0
    _cache: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_cache", {})
        if self.settings.R < 1:
            raise ValueError(f"a long-term memory retrieves at least one slot, got R={self.settings.R}.")

    # --- what is there ----------------------------------------------------------------------------------------------

    @property
    def S(self) -> int:
        """Places in each layer, those of slots that are gone included."""
        return sum(map(len, self.ranges))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored slots."""
        return self.S * self._each if self.ranges else 0

    @property
    def _each(self) -> int:
        """Bytes of a slot in all layers, with what belongs to it."""
        b = self.ranges[0].block
        return sum(t[:, :1].nbytes for t in (b.slots, b.births, b.origins, b.orders, b.keys) if t is not None)

    def column(self, name: str) -> Tensor:
        """`births`, `origins` or `orders` of all stored slots, [L, S]."""
        if name not in self._cache:
            none = torch.zeros(self.places.shape[0], 0, dtype=torch.int64 if name == "orders" else torch.int32)
            self._cache[name] = torch.cat([none, *(getattr(span.stored, name) for span in self.ranges)], dim=1)
        return self._cache[name]

    @property
    def occupied(self) -> Tensor:
        """Which places hold a slot, [L, S] bool."""
        if "occupied" not in self._cache:
            alive = self.column("origins") != NO_SLOT
            if self.frequencies is not None:
                alive[:, : self.frequencies.shape[1]] &= self.frequencies > DEAD
            self._cache["occupied"] = alive
        return self._cache["occupied"]

    @property
    def writers(self) -> Tensor:
        """The update that wrote each stored slot, -1 for a place that holds none, [L, S] int32."""
        if "writers" not in self._cache:
            self._cache["writers"] = self.column("births").where(self.occupied, -1)
        return self._cache["writers"]

    @property
    def most(self) -> int:
        """Slots that each layer retrieves: R, or as many as the layer with the fewest has."""
        if "most" not in self._cache:
            self._cache["most"] = self.occupied.sum(1).min() if self.ranges else torch.tensor(0)
        return min(self.settings.R, int(self._cache["most"]))

    def slots_left(self, sources: int) -> Tensor:
        """Stored slots of each source in each layer, [number of sources, L] int64."""
        origins = self.column("origins").where(self.occupied, NO_SLOT)
        counts = [row[row >= 0].bincount(minlength=sources) for row in origins]
        return torch.stack(counts, dim=1) if counts else torch.zeros(sources, 0, dtype=torch.long)

    # --- what changes it --------------------------------------------------------------------------------------------

    def after(self, memory: Memory, change: Update, stays: Tensor) -> LongTerm:
        """The store after an update of `memory`, of whose own slots `stays` [L, m], ascending, are left."""
        k, dropped = change.slots.shape[1], change.dropped
        places = torch.cat([self.places.gather(1, stays), torch.arange(k, dtype=torch.int32).expand(len(stays), k)], 1)
        clock, births, at = self.clock + k, memory.births.gather(1, dropped), self.places.gather(1, dropped)
        following = replace(self, places=places, clock=clock)
        if dropped.shape[1] and self.settings.keep:
            frequency = self.settings.rule == "frequency"  # in the released code a slot ages from when it is dropped
            orders = clock - (k - 1) + at.long() if frequency else written(births, at)
            index = dropped.to(memory.slots.device)[..., None].expand(-1, -1, memory.d)
            slots = self._packed(memory.slots.detach().gather(1, index)).cpu()
            following = following.appended(
                StoredSlots(slots, births, memory.origins.gather(1, dropped), orders, change.keys)
            )
        return (following._counted(k) if self.settings.rule == "frequency" else following)._within()

    def _packed(self, slots: Tensor) -> Tensor:
        return packed(slots) if self.settings.int8 else slots

    def slots(self, span: BlockRange, i: int, places: Tensor | slice, like: Tensor) -> Tensor:
        """Slots of layer i at places of a span's block, [s, d], in the type and on the device of `like`."""
        found = span.block.slots[i][places].to(like.device)
        return (unpacked(found, like.shape[-1]) if self.settings.int8 else found).to(like.dtype)

    def appended(self, some: StoredSlots) -> LongTerm:
        """The store with more slots behind; only these are copied."""
        spans, at = list(self.ranges), 0
        count = some.orders.shape[1]
        if spans and (spans[-1].block.keys is None) != (some.keys is None):
            raise ValueError("slots of this long-term memory are found by a trained retriever's keys: give `keys`.")
        while at < count:
            last = spans[-1] if spans else None
            if last is None or last.end == last.block.room:
                last = BlockRange(Block.like(some.slots, some.keys), 0, 0)
                spans.append(last)
            more = min(count - at, last.block.room - last.end)
            if not last.block.append(last.end, some.part(at, at + more)):  # another memory went on from here
                own = Block.like(some.slots, some.keys)
                own.append(0, last.stored)
                last = BlockRange(own, 0, len(last))
                spans[-1] = last
                continue
            spans[-1] = BlockRange(last.block, last.start, last.end + more)
            at += more
        return replace(self, ranges=tuple(spans))

    def kept(self, stays: Tensor) -> LongTerm:
        """The store where `stays` [L, m] of the memory's own slots are left, and the others are not stored."""
        return replace(self, places=self.places.gather(1, stays))

    def without(self, source: int) -> LongTerm:
        """The store without the slots of a source; the numbers of later sources are one less."""
        if not self.ranges:
            return self
        everything = StoredSlots.joined([span.stored for span in self.ranges])
        origins = everything.origins.where(self.occupied, NO_SLOT)
        alive = (origins != source) & (origins != NO_SLOT)
        m = int(alive.sum(1).max())
        order = alive.long().argsort(dim=1, stable=True)[:, origins.shape[1] - m :]  # what is gone stands in front
        origins = origins.where(alive, NO_SLOT).gather(1, order)
        wide = order[..., None].expand(-1, -1, everything.slots.shape[2])
        gone = (origins == NO_SLOT)[..., None]
        keys = None
        if everything.keys is not None:
            keys = everything.keys.gather(1, order[..., None].expand(-1, -1, everything.keys.shape[2]))
            keys = keys.masked_fill(gone, 0)
        some = StoredSlots(
            everything.slots.gather(1, wide).masked_fill(gone, 0),
            everything.births.gather(1, order),
            origins - (origins > source).int(),
            everything.orders.gather(1, order),
            keys,
        )
        frequencies = self.frequencies
        if frequencies is not None:
            own = torch.nn.functional.pad(frequencies, (0, self.S - frequencies.shape[1]), value=FREQUENCY)
            frequencies = own.gather(1, order)
        return replace(self, ranges=(), frequencies=frequencies).appended(some)

    def _within(self) -> LongTerm:
        """The store within its limit."""
        surplus = self.S - self.settings.limit // self._each if self.ranges else 0
        if surplus <= 0:
            return self
        frequencies = None if self.frequencies is None else self.frequencies[:, surplus:]
        return replace(self._from(surplus), frequencies=frequencies)

    def _from(self, start: int) -> LongTerm:
        """The store without the first places."""
        spans = []
        for span in self.ranges:
            cut = min(start, len(span))
            start -= cut
            if cut < len(span):
                spans.append(BlockRange(span.block, span.start + cut, span.end))
        return replace(self, ranges=tuple(spans))

    def _counted(self, k: int) -> LongTerm:
        """The released rule: once in a while every stored slot loses one of its frequency, and goes at 0.

        Those of a layer stay as they are where no more than R would be left.
        """
        since = self.since + k
        if since < self.settings.period:
            return replace(self, since=since)
        old = self.frequencies if self.frequencies is not None else torch.zeros(len(self.places), 0)
        all_ = torch.nn.functional.pad(old, (0, self.S - old.shape[1]), value=FREQUENCY)
        fewer = torch.where(all_ > DEAD, all_ - 1, all_)
        enough = ((fewer > DEAD).sum(1) > self.settings.R)[:, None]
        following = replace(self, frequencies=torch.where(enough, fewer, all_), since=0)
        first = following.occupied.any(0).long()
        start = int(first.argmax()) if first.any() else following.S
        if not start or following.frequencies is None:
            return following
        return replace(following._from(start), frequencies=following.frequencies[:, start:])


def empty(L: int, settings: LongTermSettings, M: int = 0) -> LongTerm:
    """A store that holds nothing, for a memory of M slots in each of L layers that one update has written."""
    return LongTerm(settings, torch.arange(M, dtype=torch.int32).expand(L, M))


def of(memory: Memory) -> LongTerm | None:
    """The long-term part of a memory, if there is one."""
    assert memory.longterm is None or isinstance(memory.longterm, LongTerm)
    return memory.longterm


def written(births: Tensor, places: Tensor) -> Tensor:
    """Numbers that put slots into the order in which they were written, int64."""
    return births.long() << 32 | places.long()
