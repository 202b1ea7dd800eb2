"""Coded updates in a file, and which of their slots stand in a memory (letters: `latentmem.core`).

    NAME        one tensor of all updates of a file, one behind the other ("ids", "sketch", and those of the form)
    stands      which slots of a memory's updates stand in each layer, [L, T / 8] uint8: one bit for each of T slots

A bit is enough: a layer holds its slots in the order in which they were written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentmem.coding.codec import rows_of
from latentmem.core.memory import Memory, Source
from latentmem.written import Written, numbered


def joined(written: Sequence[Written]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors of updates in one of each kind, and `accounts`."""
    names = list(written[0].tensors) if written else []
    tensors = {name: torch.cat([one.tensors[name] for one in written]).contiguous() for name in names}
    return tensors, accounts(written)


def accounts(written: Sequence[Written]) -> list[dict[str, Any]]:
    """Of each update its source and its part of each tensor."""
    return [{"source": one.source, "sizes": {name: len(t) for name, t in one.tensors.items()}} for one in written]


def parted(tensors: Mapping[str, Tensor], accounts: Iterable[Mapping[str, Any]]) -> list[Written]:
    """The inverse of `joined`; a ValueError where tensors and sizes do not fit."""
    updates, at = [], dict.fromkeys(tensors, 0)
    rows = rows_of(tensors) if tensors else set()
    for account in accounts:
        source, sizes = account["source"], account["sizes"]
        if type(source) is not str or set(sizes) != set(tensors) or not all(type(n) is int for n in sizes.values()):
            raise ValueError(f"an update has the tensors {sorted(sizes)}, and the file {sorted(tensors)}")
        if not tensors or {sizes[name] for name in rows} != {max(1, sizes["ids"])} or min(sizes.values()) < 0:
            raise ValueError(f"the slots of an update are not all there in each tensor, {sizes}")
        parts = {name: tensor[at[name] : at[name] + sizes[name]] for name, tensor in tensors.items()}
        updates.append(Written(source, parts))
        at = {name: start + sizes[name] for name, start in at.items()}
    if any(at[name] != len(tensor) for name, tensor in tensors.items()):
        raise ValueError("its updates are not all there")
    return updates


def standing(memory: Memory) -> Tensor:
    """`stands` of a memory."""
    numbers = _numbers(memory.written)
    rows = [torch.isin(numbers, layer) for layer in memory.slots[:, :, 0]]
    bits = torch.stack(rows) if rows else torch.zeros(0, len(numbers), dtype=torch.bool)
    return torch.from_numpy(np.packbits(bits.numpy(), axis=1))


def columns(stands: Tensor, written: Mapping[int, Written], sources: Sequence[Source]) -> dict[str, Tensor]:
    """Slots, births and origins of the memory in which these slots stand.

    Raises:
        ValueError: layers hold different numbers of slots, or a slot is of no source.
    """
    numbers, index = _numbers(written), {source.name: i for i, source in enumerate(sources)}
    if stands.dtype != torch.uint8 or stands.ndim != 2 or stands.shape[1] != -(-len(numbers) // 8):
        raise ValueError(f"`stands` is {stands.dtype} {list(stands.shape)}, and there are {len(numbers)} slots")
    bits = np.unpackbits(stands.numpy(), axis=1)
    if bits[:, len(numbers) :].any() or len(set(bits.sum(1).tolist())) > 1:
        raise ValueError("its layers hold different numbers of slots")
    if unknown := {one.source for one in written.values()} - set(index):
        raise ValueError(f"an update is of the unknown source {min(unknown)!r}")
    of_slot = torch.tensor([index[one.source] for one in written.values() for _ in range(len(one))], dtype=torch.int32)
    at = [torch.from_numpy(row.nonzero()[0]) for row in bits]
    slots = torch.stack([numbers[i] for i in at])
    return {"slots": slots[..., None], "births": (slots >> 32).int(), "origins": torch.stack([of_slot[i] for i in at])}


def _numbers(written: Mapping[int, Written]) -> Tensor:
    """Numbers of all slots of some updates, ascending, [T]."""
    sizes = torch.tensor([len(one) for one in written.values()], dtype=torch.long)
    births = torch.tensor(list(written), dtype=torch.long).repeat_interleave(sizes)
    places = torch.cat([torch.zeros(0, dtype=torch.long), *(torch.arange(int(n)) for n in sizes)])
    return numbered(births[None], places[None])[0, :, 0]
