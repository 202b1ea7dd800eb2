"""What each layer attends to in a pass: the share of attention that goes to each position."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_here = threading.local()  # shares: the list of the `watching` that lasts in this thread, if any


@contextmanager
def watching(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect what each layer attends to in this thread's passes, in the order of the layers.

    Yields:
        For each layer and pass one tensor [n, P + t] float32: the share of each query's attention that goes to each
        position, the mean over heads, of the first row.
    """
    shares: list[Tensor] = []

    def take(module: Any, inputs: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is not None and getattr(_here, "shares", None) is shares:
            shares.append(weights[0].float().mean(0).detach())

    hooks = [layer.self_attn.register_forward_hook(take) for layer in model.get_decoder().layers]
    _here.shares = shares
    try:
        yield shares
    finally:
        _here.shares = None
        for hook in hooks:
            hook.remove()


def watched() -> bool:
    """Whether a `watching` lasts in this thread."""
    return getattr(_here, "shares", None) is not None


def watch(query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float | None) -> None:
    """Collect for `watching`, where the attention itself gives no weights.

    Args:
        query: [B, heads, n, head width].
        keys: [B, key heads, P + t, head width].
        mask: bool or added, [B or 1, 1, n, P + t]; None: each query sees all keys up to itself.
    """
    if not watched():
        return
    _, _, n, width = query.shape
    asked = query[0].float() * (width**-0.5 if scaling is None else scaling)
    scores = asked.unflatten(0, (keys.shape[1], -1)) @ keys[0].float().transpose(1, 2)[:, None]
    if mask is None:
        mask = torch.ones(n, keys.shape[2], dtype=torch.bool, device=keys.device).tril(keys.shape[2] - n)[None, None]
    scores = scores.masked_fill(~mask[0], float("-inf")) if mask.dtype == torch.bool else scores + mask[0].float()
    _here.shares.append(scores.softmax(-1).mean((0, 1)))
