"""What one write changed: the new slots of each of its updates, and which old ones were dropped."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from latentmem.core import snapshot
from latentmem.core.memory import Memory, update

FORMAT = "latentmem delta 1"


@dataclass(frozen=True)
class Update:
    """One update of a memory.

    Args:
        new: new slots, [L, k, d].
        dropped: old slots that went, [L, count] indices.
        source: the name under which they are accounted.
        tokens: tokens of text behind them.
    """

    new: Tensor
    dropped: Tensor
    source: str
    tokens: int

    def apply(self, memory: Memory) -> Memory:
        """The next memory; a ValueError if it does not fit this one."""
        return update(memory, self.new, dropped=self.dropped, source=self.source, tokens=self.tokens)


def size(updates: list[Update]) -> int:
    """Bytes of the tensors of a delta."""
    return sum(u.new.numel() * u.new.element_size() + u.dropped.numel() * 4 for u in updates)


def to_bytes(updates: list[Update]) -> bytes:
    """A delta as a safetensors file; equal updates give equal bytes."""
    tensors = {}
    for i, one in enumerate(updates):
        tensors[f"new.{i}"] = one.new.detach().cpu().contiguous()
        tensors[f"dropped.{i}"] = one.dropped.int()
    books = [{"source": one.source, "tokens": one.tokens} for one in updates]
    return snapshot.canonical(tensors, {"format": FORMAT, "updates": json.dumps(books)})


def from_bytes(data: bytes, name: str) -> list[Update]:
    """Read a delta back; `name` is what an error calls it.

    Raises:
        ValueError: it is no delta.
    """
    tensors, metadata = snapshot.opened_bytes(data, name)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{name} is no delta of this version: expected the format {FORMAT!r}, got {metadata!r}.")
    try:
        books = json.loads(metadata["updates"])
        found = [
            Update(tensors.pop(f"new.{i}"), tensors.pop(f"dropped.{i}").to(torch.long), book["source"], book["tokens"])
            for i, book in enumerate(books)
        ]
        if tensors or not all(type(one.source) is str and type(one.tokens) is int for one in found):
            raise ValueError(f"unknown tensors {sorted(tensors)} or accounts {books}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is a damaged delta ({error}). Restore it from a copy.") from error
    return found
