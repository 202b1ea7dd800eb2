"""Sources of a memory: pin one, forget one, forecast what stays (letters: `latentmem.core`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from latentmem.core.memory import Memory, _first, _moved, _within_quota, kept


def pin(memory: Memory, name: str, pinned: bool = True) -> Memory:
    """Keep the slots of a source, and those that it will write, from every random drop; or no longer.

    Args:
        name: the source.
        pinned: False takes the pin off.

    Returns:
        The same slots, with another account of the source.

    Raises:
        ValueError: no such source, or pinned slots would take more than the share `quota` of N.
    """
    i = _index(memory, name)
    sources = (*memory.sources[:i], replace(memory.sources[i], pinned=pinned), *memory.sources[i + 1 :])
    following = replace(memory, sources=sources, version="", parent=memory.version or memory.parent)
    return _within_quota(following) if pinned else following


def forget(memory: Memory, name: str) -> Memory:
    """Drop all slots of a source and its account.

    Layers have lost different numbers of its slots. A memory is rectangular, so where fewer are left as many others go
    in their stead as the layer with the most of them has more: drawn as in `draw`, pinned ones last.

    Args:
        name: the source.

    What is long-term of it goes, too.

    Returns:
        The next memory, [L, M - most slots of the source in a layer, d]; updates and tokens are counted as before.

    Raises:
        ValueError: no such source.
    """
    i = _index(memory, name)
    mine = memory.origins == i
    count = int(mine.sum(1).max()) if memory.M else 0
    rank = torch.where(mine, 0, 1 + memory.pinned().long())
    stays = kept(_first(memory, -1 - torch.arange(memory.L), rank, count), memory.M)
    origins = memory.origins.gather(1, stays)
    return replace(
        memory,
        longterm=memory.longterm.kept(stays).without(i) if memory.longterm is not None else None,
        slots=_moved(memory.slots, stays.to(memory.slots.device), memory.slots[:, :0]),
        births=memory.births.gather(1, stays),
        origins=origins - (origins > i).int(),
        sources=(*memory.sources[:i], *memory.sources[i + 1 :]),
        version="",
        parent=memory.version or memory.parent,
    )


def _index(memory: Memory, name: str) -> int:
    names = [source.name for source in memory.sources]
    if name not in names:
        raise ValueError(f"this memory has no source {name!r} (it has: {', '.join(names) or 'none'}).")
    return names.index(name)


def forecast(memory: Memory, t: int) -> float:
    """The share of the unpinned slots of a memory that is expected to be left after t further updates of K slots.

    Exactly 1 as long as the memory will not be full; then `survival` among the slots that are not pinned.
    """
    held = memory.pinned().sum(1).double()  # [L]
    left, M = torch.ones(memory.L, dtype=torch.float64), memory.M
    while t > 0 and memory.N > M:
        drop = max(0, M + memory.K - memory.N)
        left, M, t = left * (1 - drop / (M - held).clamp(min=1)).clamp(min=0), min(M + memory.K, memory.N), t - 1
    return float((left * (1 - memory.K / (memory.N - held).clamp(min=1)).clamp(min=0) ** t).mean())
