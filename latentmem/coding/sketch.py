"""Sketches: a few bits of a slot that tell which questions the slot fits.

    x [d]       what one layer sees of a slot or of a token of a question, after its norm, at length 1
    z [bits]    (x - mean) directions; the directions in which slots differ most
    sketch      the signs of z of a slot, 8 of them in a byte
    likeness    of a token of a question and a slot: z of the token times the signs of the slot, each sign as large as
                its coefficient usually is

A search takes a likeness of each token of a question with each slot of a store, so the products of 8 bits come out of
tables: a table for each byte of a sketch has the 256 sums that the byte can stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from latentmem.coding.blocks import in_blocks

BITS = 192  # of a sketch
CHUNK = 8192  # sketches that are looked up at once
WIDE = 32  # tokens of a question that are looked up at once, so that the tables stay in the processor's cache
NAMES = ("mean", "basis", "scale", "sizes")  # of its tensors


@dataclass(frozen=True, eq=False)
class Sketch:
    """How slots are sketched in one layer, and how sketches fit a question.

    Args:
        layer: whose input is sketched.
        mean: of directions of slots, [d].
        basis: the directions in which they differ most in 8 bits, [bits, d] int8.
        scale: by which each of them is multiplied, [bits].
        sizes: mean size of each coefficient, [bits].

    Raises:
        ValueError: tensors that do not fit each other.
    """

    layer: int
    mean: Tensor
    basis: Tensor
    scale: Tensor
    sizes: Tensor

    def __post_init__(self) -> None:
        bits, width = self.basis.shape if self.basis.ndim == 2 else (0, 0)
        shapes = [list(tensor.shape) for tensor in (self.mean, self.scale, self.sizes)]
        types = [tensor.dtype for tensor in (self.mean, self.basis, self.scale, self.sizes)]
        if not bits or bits % 8 or shapes != [[width], [bits], [bits]]:
            raise ValueError(f"a sketch has a multiple of 8 directions, got {list(self.basis.shape)} beside {shapes}.")
        if types != [torch.float32, torch.int8, torch.float32, torch.float32]:
            raise ValueError(f"a sketch is made of float32 and of a basis in int8, got {types}.")

    @property
    def bits(self) -> int:
        return len(self.basis)

    @property
    def nbytes(self) -> int:
        """Bytes of one slot's sketch."""
        return self.bits // 8

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES}

    @cached_property
    def directions(self) -> Tensor:
        """[d, bits] float32."""
        return (self.basis.float() * self.scale[:, None]).T.contiguous()

    def of(self, directions: Tensor) -> Tensor:
        """Sketches of slots.

        Args:
            directions: `normalize(decoder.normed(layer, slots))`, [k, d].

        Returns:
            [k, bits / 8] uint8.
        """
        signs = self._coefficients(directions) > 0
        return torch.from_numpy(np.packbits(signs.numpy(), axis=1))

    def likeness(self, asked: Tensor, sketches: Tensor) -> Tensor:
        """How well slots fit tokens of a question; the likeness of two depends on nothing else.

        Args:
            asked: directions of the tokens, as `of` takes them, [n, d].
            sketches: [T, bits / 8] uint8.

        Returns:
            [n, T] float32.
        """
        out = torch.empty(len(asked), len(sketches))
        tables = [self._table(part) for part in (self._coefficients(asked) * self.sizes).split(WIDE)]
        starts = torch.arange(self.nbytes, dtype=torch.int32) * 256
        for at in range(0, len(sketches), CHUNK):
            rows = sketches[at : at + CHUNK].int() + starts
            for i, table in enumerate(tables):
                out[i * WIDE : (i + 1) * WIDE, at : at + CHUNK] = embedding_bag(rows, table, mode="sum").T
        return out

    @torch.no_grad()
    def _coefficients(self, directions: Tensor) -> Tensor:
        """[k, bits] float32."""
        return in_blocks(directions.float().cpu() - self.mean, self.directions)

    def _table(self, weights: Tensor) -> Tensor:
        """What each value of each byte adds for n tokens, [bytes * 256, n]; weights of single bits are [n, bits]."""
        bits = weights.T.unflatten(0, (self.nbytes, 8))  # the highest bit of each byte first
        sums = weights.new_zeros(self.nbytes, 1, len(weights))
        for bit in range(7, -1, -1):
            one = bits[:, bit : bit + 1]
            sums = torch.cat([sums - one, sums + one], dim=1)
        return sums.flatten(0, 1)
