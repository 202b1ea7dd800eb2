"""What a memory has lost for good, and the setting that would have kept it (letters: `latentmem.core`)."""

from __future__ import annotations

from typing import cast

from latentmem.core.memory import Memory
from latentmem.longterm.longterm import LongTerm
from latentmem.longterm.updates import UpdateArchive

R = 512  # slots that a question takes, where a long-term part is proposed


def slots_given(memory: Memory) -> int:
    """Slots of each layer that were written, forgotten sources left out."""
    return sum(source.slots for source in memory.sources)


def lost(memory: Memory) -> float:
    """Slots of each layer, the mean over layers, that were written and are neither in the memory nor in its archive.

    Sources that were forgotten do not count, nor does what is older than the memory.
    """
    if not memory.L:
        return 0.0
    own = int((memory.origins >= 0).sum())
    archive = _archive(memory)
    if isinstance(archive, UpdateArchive):
        archived = memory.L * archive.slots - int((memory.births >= archive.first).sum())
    else:
        archived = int(((archive.origins >= 0) & archive.occupied).sum()) if archive is not None else 0
    return slots_given(memory) - (own + archived) / memory.L


def _archive(memory: Memory) -> LongTerm | UpdateArchive | None:
    return cast("LongTerm | UpdateArchive | None", memory.longterm)


def lost_between(before: Memory, after: Memory) -> float:
    """Slots of each layer that the writes between two memories have lost, to a thousandth."""
    return round(max(0.0, lost(after) - lost(before)), 3)


def sentence(memory: Memory, slots: float, name: str) -> str:
    """What a write lost, and how the same would be kept; "" if it lost nothing.

    Args:
        memory: after the write.
        slots: of each layer, that the write lost.
        name: of the memory.
    """
    if not slots:
        return ""
    number = f"{slots:,.1f}".removesuffix(".0") if slots >= 0.1 else "less than 0.1"
    share = slots / max(1, slots_given(memory))
    percent = f"{share:.0%}" if share >= 0.01 else "less than 1%"
    return (
        f"Lost for good by this write: {number} slots of each layer, {percent} of what the memory was given. "
        f"{_remedy(memory, name)}"
    )


def _remedy(memory: Memory, name: str) -> str:
    archive = _archive(memory)
    if archive is not None and archive.settings.rule != "oldest":
        rule = archive.settings.rule
        return f"The checkpoint's own long-term part drops by the rule {rule!r}, which can not be changed."
    if archive is None:
        cause, option = "The memory has no long-term part", f"--longterm {min(R, max(1, memory.N // 3))}"
    else:
        cause, option = f"Its long-term part is full ({archive.limit} bytes)", f"--longterm-limit {2 * archive.limit}"
    rebuild = f"latentmem rebuild NEW --memory {name} {option}"
    return f"{cause}: `{rebuild}` writes all its texts into a new memory that keeps more."
