"""Reading: slots as keys and values in front of the text, through transformers' `Cache` (letters: `latentmem.core`).

Slots never ask, so per layer a memory is a prefix of keys and values: [first ; slots], at positions 0 .. P-1, with the
text behind it. Two forms of the same prefix:

    inference   `Prefix` holds keys and values that were projected once, when the slots were written. Keys are kept
                unrotated: after a drop they are gathered and rotated to their new positions, never projected again.
    training    `functional_cache` projects inside each layer's own forward, so gradients reach slots and weights.

How a layer makes keys and values out of hidden states is asked of the layer itself; `Decoder` learns it once per model
and proves on random vectors that it has understood, so an unfamiliar architecture is refused instead of misread.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from latentmem.core import attention
from latentmem.core.attention import KV

ROOM = 64  # tokens by which a text's buffers are made longer than the text
STACKED = 2 * 2**30  # bytes up to which the memories of a batch are stacked while it generates
BLOCK = 128  # rows of one projection; a fixed shape makes a row's bits independent of how many are projected


class _Stop(Exception):  # noqa: N818 - no error
    """Ends an attention module's forward once it has handed over its keys and values."""


class _Grab:
    """A cache that takes the keys and values of one attention module and stops it."""

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> KV:
        self.kv = (keys, values)
        raise _Stop

    def get_seq_length(self, *_: object) -> int:
        return 0


class Decoder:
    """What the algorithm needs of a transformers decoder: its layers, and the keys and values that each makes.

    Args:
        model: a decoder with `get_decoder().layers`, rotary positions and one self-attention per layer.

    Raises:
        ValueError: the model is built in another way, with what was missing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.body = model.get_decoder()
        if not hasattr(self.body, "layers") or not hasattr(self.body, "rotary_emb"):
            raise ValueError(f"{self._name}: a decoder with `layers` and `rotary_emb` was expected.")
        self.layers: torch.nn.ModuleList = self.body.layers
        self.L = len(self.layers)
        self.d: int = model.get_input_embeddings().weight.shape[1]
        self._by_layer_type = "layer_type" in inspect.signature(self.body.rotary_emb.forward).parameters
        kinds = [self._kind(i) for i in range(self.L)]
        known = {kind: self._understand(kinds.index(kind)) for kind in set(kinds)}
        self._turned = [known[kind][0] for kind in kinds]  # how much of a head's width each layer rotates
        self._direct = [known[kind][1] for kind in kinds]

    @property
    def _name(self) -> str:
        return f"{type(self.model).__name__} is not supported"

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def keys_values(self, i: int, hidden: Tensor) -> KV:
        """Keys without rotation, and values, of hidden states at the input of layer i.

        Args:
            hidden: [B, m, d].

        Returns:
            Two tensors [B, heads, m, head width].
        """
        return self._project(i, hidden) if self._direct[i] else self._grab_plain(i, hidden)

    @property
    def slides(self) -> bool:
        """Whether some layer sees a window of the last positions only."""
        config: Any = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ()
        return "sliding_attention" in kinds or bool(getattr(config, "sliding_window", None))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token from what the body gives, [..., d] -> [..., vocab], scaled and capped."""
        head: Any = self.model.get_output_embeddings()
        config: Any = self.model.config.get_text_config()
        logits = head(hidden)
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def rotate(self, i: int, keys: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys of layer i to positions [B or 1, m], as far as the model rotates them."""
        return self._rotate(i, keys, positions, self._turned[i]) if self._turned[i] else keys

    def _rotate(self, i: int, keys: Tensor, positions: Tensor, r: int) -> Tensor:
        cos, sin = self._cos_sin(i, keys, positions)
        apply = sys.modules[type(self.layers[i].self_attn).__module__].apply_rotary_pos_emb
        turned = apply(keys[:, :0, :, :r], keys[..., :r], cos, sin)[1]  # of no queries
        return turned if r == keys.shape[-1] else torch.cat([turned, keys[..., r:]], dim=-1)

    def project(self, i: int, hidden: Tensor) -> KV:
        """`keys_values` of [m, d] in zero-padded blocks of 128 rows, so that equal rows give equal bits."""
        m = hidden.shape[0]
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, -m % BLOCK))
        parts = [self.keys_values(i, block[None]) for block in padded.split(BLOCK)]
        keys, values = (torch.cat(tensors, dim=2)[:, :, :m] for tensors in zip(*parts, strict=True))
        return keys, values

    def project_all(self, slots: Tensor) -> list[KV]:
        """`project` for every layer of [L, m, d]."""
        return [self.project(i, slots[i]) for i in range(self.L)]

    def _project(self, i: int, hidden: Tensor) -> KV:
        """The usual layout: norm, `k_proj`, maybe `k_norm`, `v_proj`; no queries are made in vain, as in `_grab`."""
        layer: Any = self.layers[i]
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        keys, values = (f(x).unflatten(-1, (-1, attention.head_dim)) for f in (attention.k_proj, attention.v_proj))
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _grab_plain(self, i: int, hidden: Tensor) -> KV:
        """Any layout: what the layer's own attention hands to its cache when no position turns the keys."""
        cos, sin = self._cos_sin(i, hidden, torch.zeros(1, 1, dtype=torch.long, device=hidden.device))
        shape = (1, hidden.shape[1], cos.shape[-1])
        return self._grab(i, hidden, (torch.ones_like(cos).expand(shape), torch.zeros_like(sin).expand(shape)))

    def _grab(self, i: int, hidden: Tensor, cos_sin: KV) -> KV:
        layer: Any = self.layers[i]
        x = layer.input_layernorm(hidden) if hasattr(layer, "input_layernorm") else hidden
        grab = _Grab()
        with contextlib.suppress(_Stop):
            at = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)  # some scale their queries by it
            layer.self_attn(x, position_embeddings=cos_sin, position_ids=at, attention_mask=None, past_key_values=grab)
        return grab.kv

    def _cos_sin(self, i: int, like: Tensor, positions: Tensor) -> KV:
        rest = (self._layer_type(i),) if self._by_layer_type else ()
        return self.body.rotary_emb(like, positions, *rest)

    def _layer_type(self, i: int) -> str | None:
        kinds = getattr(self.body.config, "layer_types", None)
        return kinds[i] if kinds else None

    def _kind(self, i: int) -> str:
        """What tells layer i from others: its classes, and its attention's settings, such as a window."""
        layer: Any = self.layers[i]
        if not hasattr(layer, "self_attn"):
            raise ValueError(f"{self._name}: its layers have no `self_attn`.")
        settings = {
            k: v for k, v in vars(layer.self_attn).items() if isinstance(v, (bool, int, float, str, type(None)))
        }
        settings.pop("layer_idx", None)
        parts = [(name, type(part).__name__) for name, part in layer.named_modules()]
        return f"{parts} {sorted(settings.items())} {self._layer_type(i)}"

    @torch.no_grad()
    def _understand(self, i: int) -> tuple[int, bool]:
        """How much of its keys' width layer i rotates, and whether it has the usual layout.

        Raises:
            ValueError: its unrotated keys and their rotation together do not give the keys that it makes itself.
        """
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(1, 3, self.d, generator=generator).to(self.device, self.dtype)
        positions = torch.tensor([[1, 5, 11]], device=self.device)
        try:
            keys = self._grab(i, x, self._cos_sin(i, x, positions))[0]
            plain, values = self._grab_plain(i, x)
            direct = False
            with contextlib.suppress(AttributeError, RuntimeError):
                mine = self._project(i, x)
                direct = torch.equal(mine[0], plain) and torch.equal(mine[1], values)
            tolerance = 1e-2 * keys.abs().max()
            if (keys - plain).abs().max() <= 1e-3 * tolerance:
                return 0, direct
            width = self._cos_sin(i, x, positions)[0].shape[-1]
            for r in (width, 2 * width):  # most repeat their angles for both halves, some (gpt-oss) do not
                with contextlib.suppress(RuntimeError):
                    if (keys - self._rotate(i, plain, positions, r)).abs().max() <= tolerance:
                        return r, direct
            reason = "its keys are not rotated in a known way"
        except (AttributeError, TypeError, RuntimeError, ValueError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{self._name}: the keys and values of layer {i} can not be taken ({reason}).")


@dataclass(frozen=True)
class Front:
    """What stands in front of a row of text: keys and values of P positions in every layer.

    Args:
        P: positions.
        layers: for each layer, what gives its rotated keys and values, [1, heads, P, head width] each.
    """

    P: int
    layers: Sequence[Callable[[], KV]]


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

    @cached_property
    def rotated(self) -> list[Tensor]:
        """The keys of each layer at positions 0 .. P-1."""
        positions = torch.arange(self.P, device=self.keys[0].device)[None]
        return [self.decoder.rotate(i, k, positions) for i, k in enumerate(self.keys)]

    @cached_property
    def first(self) -> list[KV]:
        """Rotated keys, and values, of the leading positions of each layer."""
        at = torch.arange(self.s, device=self.keys[0].device)[None]
        pairs = zip(self.keys, self.values, strict=True)
        return [(self.decoder.rotate(i, k[:, :, : self.s], at), v[:, :, : self.s]) for i, (k, v) in enumerate(pairs)]

    def after(self, kept: Tensor, new: list[KV]) -> Prefix:
        """The prefix of the next memory: slots `kept` [L, m] stay, `new` keys and values come behind; no projection."""

        def move(old: Tensor, i: int, fresh: Tensor) -> Tensor:
            if kept.shape[1] == self.P - self.s:
                return torch.cat([old, fresh], dim=2)
            stays = old[:, :, self.s :].index_select(2, kept[i].to(old.device))
            return torch.cat([old[:, :, : self.s], stays, fresh], dim=2)

        keys = [move(old, i, new[i][0]) for i, old in enumerate(self.keys)]
        return Prefix(self.decoder, keys, [move(old, i, new[i][1]) for i, old in enumerate(self.values)], self.s)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the keys, the rotated keys and the values, once all are made."""
        return sum(2 * keys.nbytes + values.nbytes for keys, values in zip(self.keys, self.values, strict=True))

    @cached_property
    def front(self) -> Front:
        """This prefix as what stands in front of a row; it holds no reference to the prefix, which would be a cycle."""
        return Front(self.P, tuple(partial(_pair, k, v) for k, v in zip(self.rotated, self.values, strict=True)))

    def cache(self, *, store: bool = True) -> Cache:
        """A fresh cache over this prefix, for `forward` or `generate`; see `MemoryLayer`."""
        return memory_cache([self.front], self.decoder, store=store)


def _pair(keys: Tensor, values: Tensor) -> KV:
    return keys, values


def read(decoder: Decoder, first: Tensor, slots: Tensor) -> Prefix:
    """Project a memory's prefix from nothing: [first ; slots], with whichever adapter is active.

    Args:
        first: hidden states of sink or bos at the input of each layer, [L, s, d].
        slots: [L, M, d].
    """
    heads, bodies = decoder.project_all(first), decoder.project_all(slots) if slots.shape[1] else None
    none = torch.zeros(decoder.L, 0, dtype=torch.long)
    prefix = Prefix(decoder, [k for k, _ in heads], [v for _, v in heads], first.shape[1])
    return prefix.after(none, bodies) if bodies else prefix


class MemoryCache(Cache):
    """A cache whose layers are `MemoryLayer`s.

    Args:
        fronts: what stands in front of its rows.
        layers: one for each layer of the model.
    """

    def __init__(self, fronts: Sequence[Front], layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.fronts = list(fronts)

    def changed(self) -> None:
        """Some front gives other keys and values than before, as many."""
        for layer in self.layers:
            layer.changed()

    def rows(self, B: int) -> list[int]:
        """The front of each of B rows; there may be several of each row that is read, as of hypotheses of beams."""
        layer: Any = self.layers[0]
        own = layer._rows if len(self.fronts) > 1 else [0]
        return [front for front in own for _ in range(B // len(own))]


def memory_cache(fronts: Sequence[Front], decoder: Decoder, *, store: bool, stacked: int | None = None) -> MemoryCache:
    """A fresh cache that shows each layer what stands in front of its text; see `MemoryLayer`.

    Args:
        fronts: one for any number of rows, or one for each row.
        stacked: bytes up to which several are handed over in one tensor, too; by default `STACKED`.
    """
    apart = decoder.model.config._attn_implementation == attention.NAME
    return MemoryCache(
        fronts,
        [
            MemoryLayer(
                [front.layers[i] for front in fronts],
                max(front.P for front in fronts),
                store=store,
                apart=apart,
                stacked=(STACKED if stacked is None else stacked) // decoder.L,
            )
            for i in range(decoder.L)
        ],
    )


def joined(parts: Sequence[tuple[Cache, Sequence[int], Sequence[int]]], fronts: Sequence[Front], L: int) -> Cache:
    """Some rows of several caches in one, so that they go on together: shorter texts are padded on the left.

    Args:
        parts: of each cache the rows that are taken, and how many of the last positions of each row's text.
        fronts: what stands in front of each row taken, the same object where it is shared; none: caches of plain text.
        L: layers.
    """
    longest = max(n for _, _, lengths in parts for n in lengths)
    own = list({id(front): front for front in fronts}.values())
    P, apart = max((front.P for front in own), default=0), getattr(parts[0][0].layers[0], "apart", False)
    layers = [MemoryLayer([f.layers[i] for f in own], P, apart=apart) if own else DynamicLayer() for i in range(L)]
    cache = MemoryCache(own, layers)
    for i, layer in enumerate(cache.layers):
        text = []
        for part in ("keys", "values"):
            taken = [
                (getattr(old.layers[i], part)[row], n)
                for old, rows, lengths in parts
                for row, n in zip(rows, lengths, strict=True)
            ]
            made = taken[0][0].new_zeros(len(taken), taken[0][0].shape[0], longest, taken[0][0].shape[2])
            for into, (row, n) in zip(made, taken, strict=True):
                into[:, longest - n :] = row[:, row.shape[1] - n :]
            text.append(made)
        if isinstance(layer, MemoryLayer):
            layer.begin(text[0], text[1], [own.index(front) for front in fronts])
        else:
            layer.update(text[0], text[1])
    return cache


def functional_cache(
    decoder: Decoder, hidden: Tensor, wrap: Callable[[Callable[[], KV]], Callable[[], KV]] | None = None
) -> Cache:
    """The same prefix, projected inside each layer's forward at every call, so that gradients flow into it.

    Args:
        hidden: [first ; slots] at the input of each layer, [L, P, d].
        wrap: puts each projection under an adapter, for example; by default the active one is used.
    """
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]

    def make(i: int) -> Callable[[], KV]:
        def kv() -> KV:
            keys, values = decoder.keys_values(i, hidden[i][None])
            return decoder.rotate(i, keys, positions), values

        return wrap(kv) if wrap else kv

    return memory_cache([Front(hidden.shape[1], [make(i) for i in range(decoder.L)])], decoder, store=False)


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
        apart: hand the memories to `core.attention` instead of copying them in front of every row's text.
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
        self.kv, self.length, self.store, self.apart = kv, length, store, apart
        self._rows = list(range(len(kv)))  # which memory each row reads
        self._buffers: KV | None = None
        self._stacked = stacked
        self._stack: attention.Stack | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> KV:
        rows = self._rows_of(key_states.shape[0])
        if self.apart:
            if self.store:
                key_states, value_states = self._append(key_states, value_states, rows)
            memories = [kv() for kv in self.kv]
            own = self.store and len(memories) > 1 and rows == list(range(len(memories)))  # each row reads its own
            attention.hand_over(key_states, memories, rows, partial(self._stack_of, memories) if own else None)
            return key_states, value_states
        if self.store:
            return self._append(key_states, value_states, rows)
        keys, values = attention.stacked([kv() for kv in self.kv], rows)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def begin(self, keys: Tensor, values: Tensor, rows: Sequence[int]) -> None:
        """Store a text that was read before, [B, heads, n, head width], with the memory that each row reads."""
        self._rows = list(rows)
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
        rows = [0] * B if len(self.kv) == 1 else [i for i in self._rows for _ in range(B // len(self._rows))]
        if len(rows) != B:
            raise ValueError(f"a cache over {len(self._rows)} memories takes as many rows or a multiple, got {B}.")
        self._rows = rows
        return rows

    def _append(self, key_states: Tensor, value_states: Tensor, rows: Sequence[int]) -> KV:
        """Store more text and give all of it, behind the memories if they are not handed over apart."""
        lead, t = (0 if self.apart else self.length), self._text
        end = t + key_states.shape[2]
        buffers = self._buffers
        if buffers is None or not self._fits(buffers[0], key_states.shape[0], lead, lead + end):
            B, heads = key_states.shape[:2]
            room = lead + end + max(ROOM, end // 2)
            buffers = (
                key_states.new_empty(B, heads, room, key_states.shape[3]),
                value_states.new_empty(B, heads, room, value_states.shape[3]),
            )
            memories = attention.stacked([kv() for kv in self.kv], rows) if lead else (None, None)
            for buffer, old, memory in zip(buffers, (self.keys, self.values), memories, strict=True):
                if memory is not None:
                    buffer[:, :, :lead] = memory
                if t:
                    buffer[:, :, lead : lead + t] = old
            self._buffers = buffers
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if len(self.kv) > 1:
            self._rows = [self._rows[i] for i in beam_idx.tolist()]
        if self._text:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if len(self.kv) > 1:
            self._rows = [i for i in self._rows for _ in range(repeats)]
        if self._text:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if len(self.kv) > 1:
            self._rows = [self._rows[i] for i in indices.tolist()]
        if self._text:
            super().batch_select_indices(indices)


def attention_mask(cache: Cache | None, ids: Tensor) -> Tensor:
    """The mask that goes with a memory cache, [B, P + n] of ones; with a mask of the text alone, garbage is read."""
    past = cache.get_seq_length() if cache is not None else 0
    return torch.ones(ids.shape[0], past + ids.shape[1], dtype=torch.long, device=ids.device)
