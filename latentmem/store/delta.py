"""Many updates of a memory: as a file, and one after another."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latentmem import container
from latentmem.coding.codec import form_of
from latentmem.container import Buffer
from latentmem.core import memory as memories
from latentmem.core.memory import Memory, Update
from latentmem.errors import DamagedError
from latentmem.files import updates as updates_file
from latentmem.written import Written

FORMAT, WRITTEN = "latentmem delta 1", "latentmem updates 1"
_NOTHING = torch.zeros(0, 0, 1, dtype=torch.long)


def size(update: Update) -> int:
    """Bytes that the tensors of an update take in a delta."""
    return update.written.nbytes if update.written else update.slots.nbytes + update.dropped.numel() * 4


def kept(update: Update) -> Update:
    """What a delta holds of an update: of a coded one what it wrote, and no numbers of slots."""
    return update if update.written is None else replace(update, slots=_NOTHING, dropped=_NOTHING[:, :, 0])


def to_bytes(updates: list[Update]) -> bytes:
    """A delta as a safetensors file; equal updates give equal bytes.

    Of coded updates it holds what they wrote: which slots they drop follows from the memory before them.
    """
    written = [update.written for update in updates if update.written is not None]
    if written:
        return written_to_bytes(written, [update.tokens for update in updates])
    tensors: dict[str, Tensor] = {}
    for i, update in enumerate(updates):
        tensors |= {f"new.{i}": update.slots, f"dropped.{i}": update.dropped.int()}
        if update.keys is not None:
            tensors[f"keys.{i}"] = update.keys
    accounts = [{"source": update.source, "tokens": update.tokens} for update in updates]
    return container.to_bytes(tensors, {"format": FORMAT, "updates": json.dumps(accounts)})


def from_bytes(data: Buffer, name: str) -> list[Update]:
    """Read a delta back, new slots as views of `data`; a DamagedError, which calls it `name`, if it is none."""
    tensors, header = container.from_bytes(data, name)
    if header.get("format") == WRITTEN:
        return [
            Update(_NOTHING, _NOTHING[:, :, 0], one.source, tokens, written=one)
            for one, tokens in _written(tensors, header, name)
        ]
    if header.get("format") != FORMAT:
        raise DamagedError(f"{name} is no delta of this version: expected the format {FORMAT!r}, got {header!r}.")
    try:
        updates = []
        for i, account in enumerate(json.loads(header["updates"])):
            slots, dropped, keys = tensors.pop(f"new.{i}"), tensors.pop(f"dropped.{i}"), tensors.pop(f"keys.{i}", None)
            updates.append(Update(slots, dropped.long(), account["source"], account["tokens"], keys))
        if tensors or not all(type(update.source) is str and type(update.tokens) is int for update in updates):
            raise ValueError(f"unknown tensors {sorted(tensors)} or accounts {header['updates']}")
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{name} is a damaged delta ({error}). Restore it from a copy.") from error
    return updates


def written_to_bytes(written: Sequence[Written], tokens: Sequence[int]) -> bytes:
    """Coded updates as a safetensors file, with the tokens of text behind each."""
    tensors, accounts = updates_file.joined(written)
    table = [account | {"tokens": n} for account, n in zip(accounts, tokens, strict=True)]
    return container.to_bytes(tensors, {"format": WRITTEN, "updates": json.dumps(table, sort_keys=True)})


def written_from_bytes(data: Buffer, name: str) -> list[Written]:
    """Read coded updates back, their tensors views of `data`; errors as `from_bytes`."""
    tensors, header = container.from_bytes(data, name)
    if header.get("format") != WRITTEN:
        raise DamagedError(f"{name} holds no coded updates: expected the format {WRITTEN!r}, got {header!r}.")
    return [one for one, _ in _written(tensors, header, name)]


def _written(tensors: dict[str, Tensor], header: dict[str, str], name: str) -> list[tuple[Written, int]]:
    try:
        table = json.loads(header["updates"])
        tokens = [account["tokens"] for account in table]
        if not all(type(n) is int for n in tokens):
            raise ValueError(f"its updates have {tokens} tokens")
        return list(zip(updates_file.parted(tensors, table), tokens, strict=True))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedError(f"{name} is a damaged delta ({error}). Restore it from a copy.") from error


class Chain:
    """Changes of a memory, one after another; every slot that is left at the end is copied once.

    parts    [the memory's slots] [new slots of an update] [new slots of the next] ...    numbered 0, 1, 2, ... through
    books    the memory with these numbers in the place of its slots

    So what is kept and dropped is decided by the very functions that decide it for a memory. A memory with a long-term
    part, which takes the slots that are dropped, goes on as it is.

    Args:
        memory: the memory before all changes.
        mapped: whether its slots lie in a file, so that they are copied even if nothing moves them.
    """

    def __init__(self, memory: Memory, mapped: bool = False) -> None:
        self._mapped = mapped
        self._begin(memory)

    def _begin(self, memory: Memory) -> None:
        self._numbered = memory.longterm is None and not memory.settings.by_update
        self._parts, self._bytes = [memory.slots], 0
        self._start = _numbers(memory.L, memory.M, 0) if self._numbered else memory.slots
        self._books = replace(memory, slots=self._start)

    def update(self, change: Update) -> None:
        """Apply an update; a ValueError if it does not fit."""
        form = None if change.written is None else form_of(change.written.tensors)
        if (form or "exact") != (self._books.settings.form or "exact"):
            raise DamagedError(
                f"an update of the form {form} is damaged: its memory is of another form. Restore a copy."
            )
        if change.written is not None:
            change = Update.drawn(self._books, change.written, change.source, change.tokens)
            self._books = memories.update(self._books, change)
            return
        first, slots = self._parts[0], change.slots
        if slots.ndim != 3 or slots.shape[::2] != first.shape[::2] or slots.dtype != first.dtype:
            raise ValueError(
                f"new slots must be [{first.shape[0]}, k, {first.shape[2]}] in {first.dtype}, got {list(slots.shape)} "
                f"in {slots.dtype}."
            )
        slots = slots.to(first.device)
        if not self._numbered:
            self._books = memories.update(self._books, replace(change, slots=slots))
            return
        numbers = _numbers(first.shape[0], slots.shape[1], sum(part.shape[1] for part in self._parts))
        self._books = memories.update(self._books, replace(change, slots=numbers))
        self._parts.append(slots)
        self._bytes += slots.nbytes
        if self._bytes > 2 * first.nbytes + (1 << 20):  # parts that come from elsewhere than a disk are held until then
            memory, self._mapped = self.memory(), False
            self._begin(memory)

    def change(self, how: Callable[[Memory], Memory]) -> None:
        """Apply a change that only drops slots or keeps books, such as `core.memory.forget`."""
        self._books = how(self._books)

    def memory(self) -> Memory:
        """The memory after all changes."""
        first, untouched = self._parts[0], self._books.slots is self._start
        if untouched or not self._numbered:
            whole = first if untouched else self._books.slots
            return replace(self._books, slots=whole.clone() if untouched and self._mapped else whole)
        numbers = self._books.slots[:, :, 0]
        slots = first.new_empty(*numbers.shape, first.shape[2])
        starts = torch.tensor([0, *(part.shape[1] for part in self._parts)]).cumsum(0)
        for layer, mine in enumerate(numbers):
            edges = torch.searchsorted(mine, starts).tolist()  # the order is kept: each part's slots lie together
            for part, start, begin, end in zip(self._parts, starts.tolist(), edges, edges[1:], strict=False):
                if begin < end:
                    torch.index_select(part[layer], 0, mine[begin:end] - start, out=slots[layer, begin:end])
        return replace(self._books, slots=slots)


def _numbers(layers: int, count: int, start: int) -> Tensor:
    """The numbers of slots in their place, [L, count, 1]."""
    return torch.arange(start, start + count)[None, :, None].expand(layers, count, 1)
