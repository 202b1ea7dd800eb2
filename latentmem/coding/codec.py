"""The forms in which an update is kept: how its keys and values become a `Written`, and come back.

    int8     each head of each token in 8 bits with a scale of its own; any model
    coded    a `Coder`, which is calibrated for one model: about a twentieth of the bytes

Layer 0 is in neither: its input is the embedding of a token, whose id is kept. A `Written` also holds a sketch of each
slot, by which a search finds it: what one layer sees of it, in few bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from latentmem.coding.coder import Code, Coder
from latentmem.decoder.attention import KV
from latentmem.errors import OtherModelError
from latentmem.written import Written

ROWS = 1024  # sketches of one product, so that equal sketches fit equally wherever they stand
CODE = ("ids", "states", "words", "escapes")


class Codec(Protocol):
    """How one form keeps updates."""

    def encode(self, ids: Tensor, kv: Sequence[KV], directions: Tensor) -> tuple[Mapping[str, Tensor], list[KV]]:
        """Tensors of a `Written`, and what `decode` makes of them, to the bit.

        Args:
            ids: the token of each slot, [k].
            kv: unrotated keys, and values, of each layer, [1, heads, k, head width] each; the first is ignored.
            directions: what the layer that is searched sees of each slot, at length 1, [k, d].
        """

    def decode(self, written: Sequence[Written], like: Sequence[KV]) -> list[KV]:
        """Keys and values of several updates, one behind the other; the first layer has none.

        Args:
            like: of each layer keys and values of no slot, which say shape, type and device.

        Raises:
            DamagedError: an update was altered.
        """

    def likeness(self, asked: Tensor, written: Sequence[Written]) -> Tensor:
        """How near each slot is to directions [n, d] of a question, [n, T] float32."""


class EightBits:
    """Keys and values of each head and token in 8 bits, by their largest number."""

    def encode(self, ids: Tensor, kv: Sequence[KV], directions: Tensor) -> tuple[Mapping[str, Tensor], list[KV]]:
        whole, scales = [], []
        for pair in kv[1:]:
            for part in pair:
                numbers, scale = in_eight_bits(part[0].transpose(0, 1))
                whole.append(numbers.flatten(1))
                scales.append(scale.flatten(1))
        sketch, length = in_eight_bits(directions)
        parts = {"heads": torch.cat(whole, 1), "scales": torch.cat(scales, 1), "sketch": sketch, "lengths": length}
        tensors = {"ids": ids.int().cpu(), **{name: part.cpu() for name, part in parts.items()}}
        like = [(keys[:, :, :0], values[:, :, :0]) for keys, values in kv]
        return tensors, self.decode([Written("", tensors)], like)

    def decode(self, written: Sequence[Written], like: Sequence[KV]) -> list[KV]:
        sides = [side for pair in like[1:] for side in pair]
        whole = torch.cat([one.tensors["heads"] for one in written]).split([s.shape[1] * s.shape[3] for s in sides], 1)
        scales = torch.cat([one.tensors["scales"] for one in written]).split([s.shape[1] for s in sides], 1)
        decoded = []
        for side, numbers, scale in zip(sides, whole, scales, strict=True):
            heads = numbers.unflatten(1, (side.shape[1], side.shape[3])).float() * scale.float()[..., None]
            decoded.append(heads.transpose(0, 1)[None].to(side.device, side.dtype))
        return [like[0], *zip(decoded[::2], decoded[1::2], strict=True)]

    def likeness(self, asked: Tensor, written: Sequence[Written]) -> Tensor:
        asked = asked.float().cpu()
        parts = [asked.new_empty(len(asked), 0)]
        for one in written:
            sketch = torch.nn.functional.pad(one.tensors["sketch"], (0, 0, 0, -len(one) % ROWS)).float()
            lengths = one.tensors["lengths"][:, 0].float()
            parts.append(torch.cat([asked @ block.T for block in sketch.split(ROWS)], 1)[:, : len(one)] * lengths)
        return torch.cat(parts, 1)


class Coded:
    """Updates under a coder."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder

    def encode(self, ids: Tensor, kv: Sequence[KV], directions: Tensor) -> tuple[Mapping[str, Tensor], list[KV]]:
        code, decoded = self.coder.encode(ids, kv)
        return {**code.tensors, "sketch": self.coder.sketch.of(directions.float().cpu())}, decoded

    def decode(self, written: Sequence[Written], like: Sequence[KV]) -> list[KV]:
        return self.coder.decode([Code(*(one.tensors[name] for name in CODE)) for one in written], like)

    def likeness(self, asked: Tensor, written: Sequence[Written]) -> Tensor:
        sketches = [one.tensors["sketch"] for one in written]
        return self.coder.sketch.likeness(asked.float().cpu(), torch.cat(sketches))


def in_eight_bits(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [..., m] as whole ones [..., m] int8, and by how much each row is multiplied, [..., 1] float16."""
    numbers = numbers.float()
    scale = (numbers.abs().amax(-1, keepdim=True) / 127).clamp(max=torch.finfo(torch.float16).max).half()
    whole = (numbers / scale.float().where(scale > 0, 1)).round().clamp(-127, 127).to(torch.int8)
    return whole, scale


EIGHT_BITS = "int8"  # the identity of what codes updates in 8 bits
_codecs: dict[str, Codec] = {EIGHT_BITS: EightBits()}


def register(coder: Coder) -> str:
    """Let memories be read whose updates this coder coded; gives its identity."""
    _codecs.setdefault(coder.identity, Coded(coder))
    return coder.identity


def is_known(identity: str) -> bool:
    """Whether `codec_of` knows a coder."""
    return identity in _codecs


def coder_of(identity: str) -> Coder:
    """The coder of an identity; an OtherModelError if it is not known."""
    codec = codec_of(identity)
    assert isinstance(codec, Coded)
    return codec.coder


def codec_of(identity: str) -> Codec:
    """What codes and decodes the updates of a memory, by `Memory.coder`.

    Raises:
        OtherModelError: a coder that is neither packaged, nor given to `latentmem.load`, nor found in a store.
    """
    codec = _codecs.get(identity)
    if codec is None:
        raise OtherModelError(
            f"the updates of this memory are coded by the coder {identity[:12]}, which is not loaded. Give its file to "
            f"`latentmem.load(coder=...)`, or open the memory from its store, which keeps it."
        )
    return codec


def directions(normed: Tensor) -> Tensor:
    """What a layer sees of slots, at length 1."""
    return normalize(normed.float(), dim=-1)
