"""The archive of the released M+ checkpoints: which slots go is decided by how often they were of use.

Source: the released `update_ltm`; its recall frequencies only ever fall, as its authors left them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentmem.core.memory import Memory
from latentmem.longterm.longterm import LongTerm

FREQUENCY = 10.0  # of a slot that comes to the archive (released `initial_rf_when_moving_stm_to_ltm`)
DEAD = 0.01  # recall frequency up to which a slot is gone


@dataclass(frozen=True, eq=False)
class FrequencyLongTerm(LongTerm):
    """An archive under the rule "frequency": every `period` slots each slot loses one of its frequency, and goes at 0.

    Args:
        clock: slots written to each layer so far; a stored slot's age is this less its order.
        since: slots written since frequencies were last counted.
        frequencies: of the first stored slots, those that were counted, [L, at most S] float32.
    """

    clock: int = 0
    since: int = 0
    frequencies: Tensor | None = None

    def _occupied(self) -> Tensor:
        return super()._occupied() & (self._all_frequencies > DEAD)

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

    def without(self, source: int) -> LongTerm:
        following = super().without(source)
        if self.frequencies is None or not self.ranges:
            return following
        order, _ = self._order_without(source)
        return replace(following, frequencies=self._all_frequencies.gather(1, order))  # type: ignore[call-arg]
