"""Sources of a memory: pin one, forget one (letters: `latentmem.core`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from latentmem.core.memory import Memory, gathered, kept, lowest, within_quota
from latentmem.written import place


def pin(memory: Memory, name: str, pinned: bool = True) -> Memory:
    """Keep the slots of a source, and those that it will write, from every random drop; `pinned=False`: no longer.

    Raises:
        ValueError: no such source, or pinned slots would take more than the share `quota` of N.
    """
    i = _index(memory, name)
    sources = (*memory.sources[:i], replace(memory.sources[i], pinned=pinned), *memory.sources[i + 1 :])
    following = memory.following(sources=sources)
    return within_quota(following) if pinned else following


def forget(memory: Memory, name: str) -> Memory:
    """Drop all slots of a source and its account.

    Layers have lost different numbers of its slots, and a memory is rectangular. So a layer that has fewer of them left
    than another one loses as many other slots instead: drawn as in `draw`, pinned ones last. The long-term part loses
    its slots of the source, too.

    Returns:
        The next memory, [L, M - most slots of the source in a layer, d]; updates and tokens are counted as before.

    Raises:
        ValueError: no such source.
    """
    i = _index(memory, name)
    mine = memory.origins == i
    count = int(mine.sum(1).max()) if memory.M else 0
    ranks = torch.where(mine, 0, 1 + memory.pinned().long())
    stays = kept(lowest(memory, ranks, count, -1 - torch.arange(memory.L)), memory.M)
    origins = memory.origins.gather(1, stays)
    return memory.following(
        slots=gathered(memory.slots, stays, memory.slots[:, :0]),
        births=memory.births.gather(1, stays),
        origins=origins - (origins > i).int(),
        sources=(*memory.sources[:i], *memory.sources[i + 1 :]),
        longterm=memory.longterm.without(memory, stays, i) if memory.longterm is not None else None,
        written={n: written for n, written in memory.written.items() if written.source != name},
    )


def _index(memory: Memory, name: str) -> int:
    return place([source.name for source in memory.sources], name)
