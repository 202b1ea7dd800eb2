"""Pseudo-random integers that are a function of their place alone: the same on every machine, device and version."""

from __future__ import annotations

import torch
from torch import Tensor


def keys(seed: int, step: int, streams: Tensor, count: int) -> Tensor:
    """Unrelated 64-bit integers for each stream, [streams, count] int64, as functions of (seed, step, stream, index).

    Args:
        seed: any 64-bit integer, signed.
        step: of a sequence that goes on with the same seed.
        streams: numbers of the streams, [streams] int64.
        count: integers of each stream.
    """
    stream = mix(mix(mix(torch.tensor(seed)) + step)[None] + streams)
    return mix(stream[:, None] + torch.arange(count)[None])


def mix(x: Tensor) -> Tensor:
    """SplitMix64's step on int64 tensors: neighbouring integers in, unrelated 64-bit integers out."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # int64 shifts keep the sign; a logical shift clears it


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
