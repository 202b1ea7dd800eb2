"""Many updates of a memory: as a file, and one after another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from latentmem.core.memory import Memory, Update, update
from latentmem.files import container
from latentmem.files.container import Buffer

FORMAT = "latentmem delta 1"


def size(updates: list[Update]) -> int:
    """Bytes of the tensors of a delta."""
    return sum(u.slots.numel() * u.slots.element_size() + u.dropped.numel() * 4 for u in updates)


def to_bytes(updates: list[Update]) -> bytes:
    """A delta as a safetensors file; equal updates give equal bytes."""
    tensors = {}
    for i, one in enumerate(updates):
        tensors[f"new.{i}"] = one.slots.detach().cpu().contiguous()
        tensors[f"dropped.{i}"] = one.dropped.int()
        if one.keys is not None:
            tensors[f"keys.{i}"] = one.keys.contiguous()
    books = [{"source": one.source, "tokens": one.tokens} for one in updates]
    return container.to_bytes(tensors, {"format": FORMAT, "updates": json.dumps(books)})


def from_bytes(data: Buffer, name: str) -> list[Update]:
    """Read a delta back; `name` is what an error calls it, and new slots are views of `data`.

    Raises:
        ValueError: it is no delta.
    """
    tensors, metadata = container.from_bytes(data, name)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{name} is no delta of this version: expected the format {FORMAT!r}, got {metadata!r}.")
    try:
        books = json.loads(metadata["updates"])
        found = [
            Update(
                tensors.pop(f"new.{i}"),
                tensors.pop(f"dropped.{i}").to(torch.long),
                book["source"],
                book["tokens"],
                tensors.pop(f"keys.{i}", None),
            )
            for i, book in enumerate(books)
        ]
        if tensors or not all(type(one.source) is str and type(one.tokens) is int for one in found):
            raise ValueError(f"unknown tensors {sorted(tensors)} or accounts {books}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is a damaged delta ({error}). Restore it from a copy.") from error
    return found


class Chain:
    """Changes of a memory, one after another; every slot that is left at the end is copied once.

    Meanwhile the memory holds the numbers of its slots in their place, so that what is kept and dropped is decided by
    the very functions that decide it for a memory itself. One with a long-term part, which takes the slots that are
    dropped, goes on as it is.

    Args:
        memory: what the changes begin with.
        mapped: whether its slots lie in a file, so that they are copied even if nothing moves them.
    """

    def __init__(self, memory: Memory, mapped: bool = False) -> None:
        self._mapped = mapped
        self._begin(memory)

    def _begin(self, memory: Memory) -> None:
        self._whole = memory.longterm is not None
        self._parts, self._bytes = [memory.slots], 0
        if self._whole:
            self._books = memory
            return
        self._start = _numbers(memory.L, memory.M, 0)
        self._books = replace(memory, slots=self._start)

    def update(self, one: Update) -> None:
        """Apply an update; a ValueError if it does not fit."""
        like = self._parts[0]
        if one.slots.ndim != 3 or one.slots.shape[::2] != like.shape[::2] or one.slots.dtype != like.dtype:
            raise ValueError(
                f"new slots must be [{like.shape[0]}, k, {like.shape[2]}] in {like.dtype}, got "
                f"{list(one.slots.shape)} in {one.slots.dtype}."
            )
        if self._whole:
            self._books = update(self._books, replace(one, slots=one.slots.to(like.device)))
            return
        numbers = _numbers(like.shape[0], one.slots.shape[1], sum(part.shape[1] for part in self._parts))
        self._books = update(self._books, replace(one, slots=numbers))
        self._parts.append(one.slots.to(like.device))
        self._bytes += one.slots.nbytes
        if self._bytes > 2 * like.nbytes + (1 << 20):  # what comes from elsewhere than a disk is held until then
            memory, self._mapped = self.memory(), False
            self._begin(memory)

    def change(self, how: Callable[[Memory], Memory]) -> None:
        """Apply what only drops slots or keeps books, such as `core.memory.forget`."""
        self._books = how(self._books)

    def memory(self) -> Memory:
        """The memory after all changes."""
        if self._whole:
            untouched = self._mapped and self._books.slots is self._parts[0]
            return replace(self._books, slots=self._books.slots.clone()) if untouched else self._books
        if self._books.slots is self._start and not self._mapped:
            return replace(self._books, slots=self._parts[0])
        numbers = self._books.slots[:, :, 0]
        slots = self._parts[0].new_empty(*numbers.shape, self._parts[0].shape[2])
        starts = torch.tensor([0, *(part.shape[1] for part in self._parts)]).cumsum(0)
        for layer, mine in enumerate(numbers):
            edges = torch.searchsorted(mine, starts).tolist()  # the order is kept: each part's slots lie together
            for part, start, first, end in zip(self._parts, starts.tolist(), edges, edges[1:], strict=False):
                if first < end:
                    torch.index_select(part[layer], 0, mine[first:end] - start, out=slots[layer, first:end])
        return replace(self._books, slots=slots)


def _numbers(layers: int, count: int, start: int) -> Tensor:
    """The numbers of new slots in the place of the slots, [L, count, 1]."""
    return torch.arange(start, start + count)[None, :, None].expand(layers, count, 1)
