"""The forms in which an update is kept: how its keys and values become a `Written`, and come back.

    int8     each head of each token in 8 bits with a scale of its own; any model
    coded    a `Coder`, which is calibrated for one model: about a twentieth of the bytes

Layer 0 is in neither: its input is the embedding of a token, whose id is kept. A `Written` also holds a sketch of each
slot, by which a search finds it: what one layer sees of it, in few bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from latentmem.coding.coder import Code, Coder
from latentmem.coding.rans import STRIDE
from latentmem.decoder.attention import KV
from latentmem.errors import DamagedError, OtherModelError
from latentmem.written import Written

ROWS = 1024  # sketches of one product, so that equal sketches fit equally wherever they stand
CODE = ("ids", "states", "words", "escapes")
Layout = Mapping[str, tuple[torch.dtype, tuple[int | None, ...] | None]]
LAYOUTS: Mapping[str, Layout] = {  # form -> of each tensor the type, and the shape of one slot's part; None: any
    "int8": {
        "ids": (torch.int32, ()),
        "heads": (torch.int8, (None,)),
        "scales": (torch.float16, (None,)),
        "sketch": (torch.int8, (None,)),
        "lengths": (torch.float16, (1,)),
    },
    "coded": {
        "ids": (torch.int32, ()),
        "states": (torch.int32, (STRIDE,)),
        "words": (torch.int16, None),
        "escapes": (torch.int32, None),
        "sketch": (torch.uint8, (None,)),
    },
}


def form_of(tensors: Iterable[str]) -> str | None:
    """The form of an update by the names of its tensors; None: it is of no form."""
    names = set(tensors)
    return next((form for form, layout in LAYOUTS.items() if set(layout) == names), None)


def rows_of(tensors: Mapping[str, Tensor]) -> set[str]:
    """The tensors of updates that have a row for each slot.

    Args:
        tensors: of one update, or of several, one behind the other.

    Raises:
        ValueError: these are no updates; with the tensor, what was expected, and what came.
    """
    form = form_of(tensors)
    if form is None:
        raise ValueError(f"updates of the forms {', '.join(LAYOUTS)} have other tensors than {sorted(tensors)}")
    layout = LAYOUTS[form]
    rows = {name for name, (_, part) in layout.items() if part is not None}
    for name, (dtype, part) in layout.items():
        tensor, count = tensors[name], len(tensors["ids"]) if name in rows else None
        wanted = (count, *(part or ()))
        fits = [want in (None, size) for want, size in zip(wanted, tensor.shape, strict=False)]
        if tensor.dtype != dtype or tensor.ndim != len(wanted) or not all(fits):
            came = f"{tensor.dtype}, {list(tensor.shape)}"
            raise ValueError(f"`{name}` of {len(tensors['ids'])} slots must be {dtype}, {list(wanted)}, got {came}")
    if len(tensors["ids"]) and int(tensors["ids"].min()) < 0:
        raise ValueError("a token of a slot is none")
    return rows


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
        widths = {"heads": [s.shape[1] * s.shape[3] for s in sides], "scales": [s.shape[1] for s in sides]}
        for name, parts in widths.items():
            _check_width(written, name, sum(parts))
        whole, scales = (torch.cat([one.tensors[name] for one in written]).split(widths[name], 1) for name in widths)
        decoded = []
        for side, numbers, scale in zip(sides, whole, scales, strict=True):
            heads = numbers.unflatten(1, (side.shape[1], side.shape[3])).float() * scale.float()[..., None]
            decoded.append(heads.transpose(0, 1)[None].to(side.device, side.dtype))
        return [like[0], *zip(decoded[::2], decoded[1::2], strict=True)]

    def likeness(self, asked: Tensor, written: Sequence[Written]) -> Tensor:
        asked = asked.float().cpu()
        _check_width(written, "sketch", asked.shape[1])
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
        _check_width(written, "sketch", self.coder.sketch.nbytes)
        sketches = [one.tensors["sketch"] for one in written]
        return self.coder.sketch.likeness(asked.float().cpu(), torch.cat(sketches))


def _check_width(written: Sequence[Written], name: str, width: int) -> None:
    """Refuse updates whose rows of a tensor are not as wide as the model needs them."""
    for one in written:
        if one.tensors[name].shape[1] != width:
            raise DamagedError(
                f"an update is damaged: a row of `{name}` must have {width} numbers, got {one.tensors[name].shape[1]}. "
                f"Restore it from a copy."
            )


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
