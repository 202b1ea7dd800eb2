"""The archive of a memory whose updates are kept coded: nothing is moved to it (letters: `latentmem.core`).

    written    1  2  3  4  5  6  7      every update, each once
    archive       2  3  4  5  6  7      from `first` on, less the slots that still stand in the memory, layer by layer

So a drop costs nothing, versions share all that they have in common, and a layer finds in the archive just what it has
lost. Beyond `limit` bytes the oldest update goes first, with all its slots that stand in no layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from latentmem.core.memory import Memory, Update
from latentmem.core.settings import LongTermSettings
from latentmem.written import Written


@dataclass(frozen=True, eq=False)
class UpdateArchive:
    """What a memory of coded updates has dropped.

    Args:
        settings: how it keeps and retrieves.
        first: number of the oldest update of which it keeps slots.
        slots: slots of these updates, those that stand in the memory among them.
        nbytes: bytes of these updates.
        most: slots that each layer retrieves: R, or as many as the layer with the fewest archived ones has.
    """

    settings: LongTermSettings
    first: int = 1
    slots: int = 0
    nbytes: int = 0
    most: int = 0
    LIMIT: ClassVar[int] = 256 << 20  # bytes, where the settings have none

    def __post_init__(self) -> None:
        if self.settings.limit is None:
            object.__setattr__(self, "settings", replace(self.settings, limit=self.limit))
        if (self.settings.int8, self.settings.group, self.settings.rule) != (False, "update", "oldest"):
            raise ValueError(
                "where updates are kept coded, a long-term part keeps and finds whole updates: leave out int8, group "
                "and rule, or choose form='exact'."
            )

    @property
    def limit(self) -> int:
        """Bytes beyond which the oldest updates go."""
        return self.settings.limit or self.LIMIT

    def check(self, memory: Memory) -> None:
        """A ValueError where it belongs to a memory of hidden states."""
        if not memory.settings.by_update:
            raise ValueError("this long-term part is of coded updates, and the memory holds hidden states.")

    def after(self, memory: Memory, change: Update, stays: Tensor) -> UpdateArchive:
        """The archive after an update of `memory`, of whose own slots `stays` [L, m] are left."""
        new, number, first = change.written, memory.updates + 1, self.first
        assert new is not None
        slots, nbytes = self.slots + len(new), self.nbytes + new.nbytes
        while nbytes > self.limit and first < number:
            if (oldest := memory.written.get(first)) is not None:
                slots, nbytes = slots - len(oldest), nbytes - oldest.nbytes
            first += 1
        return self._of(first, slots, nbytes, memory.births.gather(1, stays), len(new))

    def _of(self, first: int, slots: int, nbytes: int, births: Tensor, new: int = 0) -> UpdateArchive:
        """With the memory's own slots by the updates that wrote them, [L, m], and those that have just come."""
        standing = (births >= first).sum(1) + new
        most = min(self.settings.R, slots - int(standing.max()))
        return replace(self, first=first, slots=slots, nbytes=nbytes, most=most)

    def without(self, memory: Memory, stays: Tensor, source: int) -> UpdateArchive:
        """The archive where `stays` [L, m] of the memory's own slots are left, and nothing of a source."""
        name = memory.sources[source].name
        others = [one for n, one in memory.written.items() if n >= self.first and one.source != name]
        sizes = sum(map(len, others)), sum(one.nbytes for one in others)
        return self._of(self.first, *sizes, memory.births.gather(1, stays))

    @staticmethod
    def restored(
        settings: LongTermSettings, first: int, written: Mapping[int, Written], births: Tensor
    ) -> UpdateArchive:
        """The archive of a memory that was read from a file."""
        those = [one for n, one in written.items() if n >= first]
        archive = UpdateArchive(settings, first)
        return archive._of(first, sum(map(len, those)), sum(one.nbytes for one in those), births)

    def kept(self, memory: Memory) -> dict[int, Written]:
        """The updates of which it keeps slots, by number."""
        return {n: one for n, one in memory.written.items() if n >= self.first}

    def best(self, memory: Memory, best_first: Sequence[int]) -> Tensor:
        """In each layer the slots that are archived of the best updates, [L, most] numbers as in `Memory.slots`.

        Args:
            best_first: numbers of the memory's updates.
        """
        starts, count = torch.full((memory.updates + 2,), -1), 0  # where each update begins among the candidates
        candidates = [torch.zeros(0, dtype=torch.long)]
        for n in best_first:
            if count >= self.most + memory.M:  # enough, even if all that stand were among them
                break
            if n >= self.first:
                starts[n] = count
                candidates.append((n << 32) + torch.arange(len(memory.written[n])))
                count += len(candidates[-1])
        own = memory.slots[:, :, 0]
        first = starts[own >> 32]
        archived = torch.ones(memory.L, count + 1, dtype=torch.bool)
        archived.scatter_(1, torch.where(first < 0, count, first + (own & 0xFFFFFFFF)), False)
        taken = archived[:, :count] & (archived[:, :count].cumsum(1) <= self.most)
        return torch.cat(candidates).expand(memory.L, -1)[taken].view(memory.L, self.most).sort(dim=1).values


def sources_of(memory: Memory, numbers: Tensor) -> Tensor:
    """Index into the memory's sources of slots by number, [...] int32."""
    index = {source.name: i for i, source in enumerate(memory.sources)}
    births = torch.tensor(list(memory.written) or [0])
    sources = torch.tensor([index[one.source] for one in memory.written.values()] or [-1], dtype=torch.int32)
    return sources[torch.searchsorted(births, numbers >> 32).clamp(max=len(sources) - 1)]


def stored(memory: Memory, archive: UpdateArchive) -> Tensor:
    """Archived slots of each source in each layer, [number of sources, L]."""
    index = {source.name: i for i, source in enumerate(memory.sources)}
    counts = torch.zeros(len(index), memory.L, dtype=torch.long)
    for one in archive.kept(memory).values():
        counts[index[one.source]] += len(one)
    standing = [((memory.origins == i) & (memory.births >= archive.first)).sum(1) for i in range(len(index))]
    return counts - torch.stack(standing) if standing else counts
