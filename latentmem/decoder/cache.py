"""Memories as keys and values in front of a growing text: transformers' `Cache`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from latentmem.decoder import attention
from latentmem.decoder.attention import KV, Memories, left_padded
from latentmem.decoder.decoder import Decoder

ROOM = 64  # tokens by which a text's buffers are longer than the text
STACKED = 2 * 2**30  # bytes up to which the memories of a batch are stacked while it generates


@dataclass(frozen=True)
class KVPrefix:
    """What stands in front of a row of text: keys and values of P positions in every layer.

    Args:
        P: positions.
        layers: for each layer, what gives its rotated keys and values, [1, heads, P, head width] each.
    """

    P: int
    layers: Sequence[Callable[[], KV]]

    @staticmethod
    def from_pairs(pairs: Sequence[KV]) -> KVPrefix:
        """From keys and values that are there."""
        return KVPrefix(pairs[0][0].shape[2], [partial(_pair, *pair) for pair in pairs])


def _pair(keys: Tensor, values: Tensor) -> KV:
    return keys, values


def _rotated(rotate: Callable[[int, Tensor], Tensor], i: int, keys: Tensor, values: Tensor) -> KV:
    return rotate(i, keys), values


class MemoryCache(Cache):
    """A cache whose layers are `MemoryLayer`s.

    Args:
        fronts: what stands in front of its rows.
        layers: one for each layer of the model.
    """

    def __init__(self, fronts: Sequence[KVPrefix], layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.fronts = list(fronts)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KV:
        """As `Cache.update`.

        Raises:
            RuntimeError: the layer before did not read its memory, so this model's attention is not ours.
        """
        before = self.layers[layer_idx - 1] if layer_idx else None
        if isinstance(before, MemoryLayer) and before.unread:
            before.unread.clear()
            raise RuntimeError("a layer did not read its memory: its attention is not the one that was chosen for it.")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def changed(self) -> None:
        """Some front gives other keys and values than before, as many."""
        for layer in self.layers:
            layer.changed()


def memory_cache(
    fronts: Sequence[KVPrefix], decoder: Decoder, *, store: bool, stacked: int | None = None
) -> MemoryCache:
    """A fresh cache that shows each layer what stands in front of its text; see `MemoryLayer`.

    Args:
        fronts: one for any number of rows, or one for each row.
        store: as in `MemoryLayer`.
        stacked: bytes up to which several are handed over in one tensor, too; by default `STACKED`.
    """
    apart = attention.takes_memories(decoder.model)
    bytes_ = (STACKED if stacked is None else stacked) // decoder.L
    P = max(front.P for front in fronts)
    layers = [[front.layers[i] for front in fronts] for i in range(decoder.L)]
    return MemoryCache(fronts, [MemoryLayer(kv, P, store=store, apart=apart, stacked=bytes_) for kv in layers])


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of one memory in every layer, projected once: [first ; slots], P = s + M positions.

    Args:
        decoder: what rotates the keys.
        keys: of each layer, unrotated, [1, heads, P, head width].
        values: of each layer, [1, heads, P, head width].
        s: leading positions that are no slots (sink or bos); they are never dropped.

    Source: MemoryLLM section 3.1.1.
    """

    decoder: Decoder
    keys: list[Tensor]
    values: list[Tensor]
    s: int

    @property
    def P(self) -> int:
        return self.keys[0].shape[2]

    @property
    def rotated(self) -> list[Tensor]:
        """The keys of each layer at positions 0 .. P-1; made anew each time."""
        rotate = self._rotation(self.P)
        return [rotate(i, keys) for i, keys in enumerate(self.keys)]

    def _rotation(self, P: int) -> Callable[[int, Tensor], Tensor]:
        """Rotates keys of each layer to positions 0 .. P-1."""
        return self.decoder.rotation(torch.arange(P, device=self.keys[0].device)[None])

    @cached_property
    def first(self) -> list[KV]:
        """Rotated keys, and values, of the leading positions of each layer."""
        rotate, pairs = self._rotation(self.s), zip(self.keys, self.values, strict=True)
        return [(rotate(i, keys[:, :, : self.s]), values[:, :, : self.s]) for i, (keys, values) in enumerate(pairs)]

    def after(self, kept: Tensor, new: list[KV]) -> Prefix:
        """The prefix of the next memory: slots `kept` [L, m] stay, `new` keys and values come behind; no projection."""

        def move(old: Tensor, i: int, fresh: Tensor) -> Tensor:
            if kept.shape[1] == self.P - self.s:
                return torch.cat([old, fresh], dim=2)
            stays = old[:, :, self.s :].index_select(2, kept[i].to(old.device))
            return torch.cat([old[:, :, : self.s], stays, fresh], dim=2)

        keys = [move(old, i, new[i][0]) for i, old in enumerate(self.keys)]
        return Prefix(self.decoder, keys, [move(old, i, new[i][1]) for i, old in enumerate(self.values)], self.s)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and the values, and of the rotated keys where `front` keeps them."""
        keys = sum(tensor.nbytes for tensor in self.keys)
        return keys * (2 if self.keeps_front else 1) + sum(tensor.nbytes for tensor in self.values)

    @cached_property
    def front(self) -> KVPrefix:
        """This prefix as what stands in front of a row, made once; it keeps the rotated keys for the reads that follow.

        It holds no reference to the prefix, which would be a cycle.
        """
        return KVPrefix.from_pairs(list(zip(self.rotated, self.values, strict=True)))

    @property
    def keeps_front(self) -> bool:
        """Whether `front` was made, and the prefix so holds rotated keys."""
        return "front" in self.__dict__

    def passing(self) -> KVPrefix:
        """`front` for one pass: unless that is kept, each layer's keys are rotated when the layer reads them."""
        if self.keeps_front:
            return self.front
        rotate = self._rotation(self.P)
        pairs = enumerate(zip(self.keys, self.values, strict=True))
        return KVPrefix(self.P, [partial(_rotated, rotate, i, keys, values) for i, (keys, values) in pairs])

    def cache(self, *, store: bool = True) -> Cache:
        """A fresh cache over this prefix: for `generate` if it stores the text, else for one pass."""
        return memory_cache([self.front if store else self.passing()], self.decoder, store=store)


def joined(parts: Sequence[tuple[Cache, Sequence[int], Sequence[int]]], fronts: Sequence[KVPrefix], L: int) -> Cache:
    """Some rows of several caches in one, so that they go on together: shorter texts are padded on the left.

    Args:
        parts: of each cache the rows that are taken, and how many of the last positions of each row's text.
        fronts: what stands in front of each row taken, the same object where it is shared; none: caches of plain text.
        L: layers.
    """
    own = list({id(front): front for front in fronts}.values())
    P, apart = max((front.P for front in own), default=0), getattr(parts[0][0].layers[0], "apart", False)
    layers = [MemoryLayer([f.layers[i] for f in own], P, apart=apart) if own else DynamicLayer() for i in range(L)]
    cache = MemoryCache(own, layers)
    for i, layer in enumerate(cache.layers):
        rows = [(old.layers[i], row, n) for old, rows, ns in parts for row, n in zip(rows, ns, strict=True)]
        keys = left_padded([old.keys[row, :, old.keys.shape[2] - n :] for old, row, n in rows])
        values = left_padded([old.values[row, :, old.values.shape[2] - n :] for old, row, n in rows])
        if isinstance(layer, MemoryLayer):
            layer.begin(keys, values, [own.index(front) for front in fronts])
        else:
            layer.update(keys, values)
    return cache


def functional_cache(
    decoder: Decoder, hidden: Tensor, around: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Cache:
    """The same prefix, projected inside each layer's forward at every call, so that gradients flow into it.

    Args:
        hidden: [first ; slots] at the input of each layer, [L, P, d].
        around: gives what each projection runs under, an adapter for example; by default the active one is used.
    """
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]

    def make(i: int) -> Callable[[], KV]:
        def kv() -> KV:
            with around():
                keys, values = decoder.keys_values(i, hidden[i][None])
                return decoder.rotate(i, keys, positions), values

        return kv

    return memory_cache([KVPrefix(hidden.shape[1], [make(i) for i in range(decoder.L)])], decoder, store=False)


class MemoryLayer(DynamicLayer):
    """One layer's cache: the keys and values of memories in front of a growing text.

    One memory serves any number of rows (beams, samples, questions); several serve as many rows, or each of them as
    many as there are rows for each, side by side. Shorter ones are padded on the left, so the attention mask that goes
    with this covers the longest and the text. Only the text is stored per row, in buffers that are grown in advance;
    beams move it and `crop` cuts it.

    Args:
        kv: of each memory, gives its rotated keys and values, [1, heads, its P, head width] each.
        length: P of the longest.
        store: keep the text that passes through (`generate`), or not (`forward` with gradients, replayed at will).
        apart: hand the memories to `decoder.attention` instead of copying them in front of every row's text.
        stacked: bytes up to which several memories are handed over in one tensor, too, where each row stores its text.
    """

    keys: Any
    values: Any

    def __init__(
        self,
        kv: Sequence[Callable[[], KV]],
        length: int,
        *,
        store: bool = True,
        apart: bool = False,
        stacked: int = 0,
    ) -> None:
        super().__init__()
        self.kv, self.length, self.store, self.apart, self._stacked = kv, length, store, apart, stacked
        self.rows = list(range(len(kv)))  # which memory each row reads
        self.unread: list[Memories] = []  # handed over, until the attention has taken them
        self._buffers: KV | None = None
        self._stack: attention.Stack | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> KV:
        rows = self._rows_of(key_states.shape[0])
        if self.store:
            key_states, value_states = self._append(key_states, value_states, rows)
        if self.store and not self.apart:
            return key_states, value_states
        kv = [make() for make in self.kv]
        own = self.store and len(kv) > 1 and rows == list(range(len(kv)))  # each row reads its own
        memories = Memories(kv, rows, partial(self._stack_of, kv) if own else None)
        if not self.apart:
            return memories.in_front_of(key_states, value_states)
        self.unread = attention.hand_over(key_states, value_states, memories)
        return key_states, value_states

    def begin(self, keys: Tensor, values: Tensor, rows: Sequence[int]) -> None:
        """Store a text that was read before, [B, heads, n, head width], with the memory that each row reads."""
        self.rows = list(rows)
        self._append(keys, values, rows)

    def changed(self) -> None:
        """What stands in front has changed, as long as before: what was made of it goes."""
        self._stack = None
        if not self.apart:
            self._buffers = None

    def _stack_of(self, memories: Sequence[KV]) -> attention.Stack | None:
        """The memories in one tensor, made once, if they are not too large together."""
        if self._stack is None:
            keys, values = memories[0]
            bytes_ = len(memories) * self.length * (keys[0, :, 0].nbytes + values[0, :, 0].nbytes)
            self._stack = attention.Stack.of(memories) if bytes_ <= self._stacked else None
        return self._stack

    def _rows_of(self, B: int) -> list[int]:
        """The memory of each of B rows; `generate` makes several rows of one without telling its cache."""
        rows = [0] * B if len(self.kv) == 1 else [i for i in self.rows for _ in range(B // len(self.rows))]
        if len(rows) != B:
            raise ValueError(f"a cache over {len(self.rows)} memories takes as many rows or a multiple, got {B}.")
        self.rows = rows
        return rows

    def _append(self, key_states: Tensor, value_states: Tensor, rows: Sequence[int]) -> KV:
        """Store more text and give all of it, behind the memories if they are not handed over apart."""
        lead, t = (0 if self.apart else self.length), self._text
        end = t + key_states.shape[2]
        buffers = self._buffers
        if buffers is None or not self._fits(buffers[0], key_states.shape[0], lead, lead + end):
            room = lead + end + max(ROOM, end // 2)
            keys, values = (s.new_empty(*s.shape[:2], room, s.shape[3]) for s in (key_states, value_states))
            if lead:
                keys[:, :, :lead], values[:, :, :lead] = attention.stacked([kv() for kv in self.kv], rows)
            if t:
                keys[:, :, lead : lead + t], values[:, :, lead : lead + t] = self.keys, self.values
            self._buffers = buffers = keys, values
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, lead + t : lead + end] = new
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = buffers[0][:, :, lead : lead + end], buffers[1][:, :, lead : lead + end]
        return buffers[0][:, :, : lead + end], buffers[1][:, :, : lead + end]

    def _fits(self, buffer: Tensor, B: int, lead: int, end: int) -> bool:
        """Whether the text stands in this buffer (and not in a tensor that beams made of it), with room to `end`."""
        stands = not self._text or self.keys.data_ptr() == buffer[:, :, lead:].data_ptr()
        return stands and buffer.shape[0] == B and end <= buffer.shape[2]

    @property
    def _text(self) -> int:
        return self.keys.shape[2] if self.is_initialized and self.keys is not None else 0

    def get_seq_length(self) -> int:
        return self.length + self._text

    def reset(self) -> None:
        self._buffers = self._stack = None
        super().reset()

    def batch_select_indices(self, indices: Tensor) -> None:
        if len(self.kv) > 1:
            self.rows = [self.rows[i] for i in indices.tolist()]
        if self._text:
            super().batch_select_indices(indices.to(self.keys.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self.keys.shape[0] if self._text else len(self.rows)
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))


def attention_mask(cache: Cache | None, ids: Tensor) -> Tensor:
    """The mask that goes with a memory cache, [B, P + n] of ones; with a mask of the text alone, garbage is read."""
    past = cache.get_seq_length() if cache is not None else 0
    return torch.ones(ids.shape[0], past + ids.shape[1], dtype=torch.long, device=ids.device)
