"""What was written into memories: sources and, where updates are kept coded, the one copy of what each wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Source:
    """Where slots came from.

    Args:
        name: what the caller called it, for example a file name.
        tokens: tokens written under this name, over all writes.
        slots: slots written per layer under this name, over all writes.
        pinned: whether its slots are kept from every random drop; see `pin`.
    """

    name: str
    tokens: int
    slots: int
    pinned: bool = False


@dataclass(frozen=True, eq=False)
class Written:
    """The slots of one update, coded; see `latentmem.coding`.

    Args:
        source: the name under which they are accounted.
        tensors: "ids", the token of each of k slots, and what the form adds, each [k, ...] or of any length.
    """

    source: str
    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return self.tensors["ids"].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def place(names: Sequence[str], name: str) -> int:
    """The place of a source among a memory's sources; a ValueError if there is none of this name."""
    if name not in names:
        raise ValueError(f"this memory has no source {name!r} (it has: {', '.join(names) or 'none'}).")
    return names.index(name)


def check_quota(held: int, N: int, quota: float) -> None:
    """A ValueError if pinned sources hold more slots of a layer than their share of N."""
    if held > quota * N:
        raise ValueError(
            f"pinned sources would take {held} of N={N} slots, and the quota is {quota:g} of them, {int(quota * N)}. "
            f"Unpin a source, or use a larger memory."
        )


def numbered(births: Tensor, places: Tensor) -> Tensor:
    """Slots by number, [L, k, 1] int64: the update that wrote each, and its place there, [L, k]; ascending."""
    return (births.long() << 32 | places.long())[..., None]


def needed(written: Mapping[int, Written], births: Tensor, first: int) -> Mapping[int, Written]:
    """The updates of which a slot is there, and those from number `first` on, which a long-term part keeps.

    Args:
        written: by number, ascending.
        births: the update of each slot, [L, M].
    """
    old = list(takewhile(lambda number: number < first, written))
    if not old:
        return written
    there = set(births.unique().tolist())
    needed = dict(written)
    for number in old:
        if number not in there:
            del needed[number]
    return needed
