"""Long-term memory (M+): dropped slots are kept, and a question searches them (letters: `latentmem.core`).

longterm.py, blocks.py    the archive of a memory of hidden states: dropped slots are copied into blocks
updates.py                the archive of a memory of coded updates: nothing is moved
search.py, ranking.py     which archived slots a question takes, and in which order it reads
losses.py                 what a write lost for good, with a long-term part or without one, and how it is said
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings
from latentmem.longterm import losses, updates
from latentmem.longterm.longterm import FrequencyLongTerm, LongTerm
from latentmem.longterm.updates import UpdateArchive

Archive = LongTerm | UpdateArchive
lost = losses.lost


def kind(settings: LongTermSettings) -> type[LongTerm]:
    """The class of archives of hidden states under these settings."""
    return FrequencyLongTerm if settings.rule == "frequency" else LongTerm


def empty(L: int, settings: LongTermSettings, M: int = 0, *, by_update: bool = False) -> Archive:
    """An archive that holds nothing, for a memory of M slots in each of L layers that one update has written.

    Args:
        by_update: of a memory whose updates are kept coded.
    """
    if by_update:
        return UpdateArchive(settings)
    return kind(settings)(settings, torch.arange(M, dtype=torch.int32).expand(L, M))


def of(memory: Memory) -> Archive | None:
    """The archive of a memory, if there is one."""
    assert memory.longterm is None or isinstance(memory.longterm, Archive)
    return memory.longterm


def searched(memory: Memory) -> LongTerm:
    """What a question to a memory of hidden states searches: its archive, or an empty one."""
    archive = of(memory)
    assert not isinstance(archive, UpdateArchive)
    return archive or LongTerm(LongTermSettings(1), torch.zeros_like(memory.births))


def searched_updates(memory: Memory) -> UpdateArchive:
    """The same of a memory whose updates are kept coded."""
    archive = of(memory)
    return archive if isinstance(archive, UpdateArchive) else UpdateArchive(LongTermSettings(1), memory.updates + 1)


def every(memory: Memory) -> int:
    """Tokens of an answer after which is searched again; 0: never."""
    return (memory.longterm.settings if memory.longterm is not None else LongTermSettings(1)).every


def stored(memory: Memory) -> Tensor:
    """Archived slots of each source in each layer, [number of sources, L]."""
    archive = of(memory)
    if archive is None:
        return torch.zeros(len(memory.sources), memory.L, dtype=torch.long)
    return archive.slots_left(len(memory.sources)) if isinstance(archive, LongTerm) else updates.stored(memory, archive)


def stored_most(memory: Memory) -> int:
    """Archived slots of the layer that has most of them."""
    archive = of(memory)
    if isinstance(archive, LongTerm):
        return int(archive.occupied.sum(1).max()) if archive.S else 0
    return int(stored(memory).sum(0).max()) if archive is not None and memory.L else 0


def sources_of(memory: Memory, places: Tensor) -> Tensor:
    """The source of archived slots that a question takes, [L, R] indices into the memory's sources."""
    archive = of(memory)
    return archive.origins.gather(1, places) if isinstance(archive, LongTerm) else updates.sources_of(memory, places)


def births_of(memory: Memory, places: Tensor) -> Tensor:
    """The update that wrote archived slots that a question takes, [L, R] int32."""
    archive = of(memory)
    return archive.births.gather(1, places) if isinstance(archive, LongTerm) else (places >> 32).int()
