"""Attention over a memory on CPU in half precision, where torch's own kernel is slow (letters: `latentmem.core`).

`MemoryLayer` hands the memory over by itself (`hand_over`), so that any number of rows read one copy of it:

    per key head, [P + B * t] keys: the memory's, then those of each row's text
    all rows and query heads ask them in one product; what belongs to another row's text is hidden

Registered under `NAME` for transformers. A layer with a sliding window that hides a part of the memory, and everything
without a memory, goes to transformers' own function, and so do float32 and other devices: `choose`.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "latentmem_cpu"
_handed = threading.local()  # what the cache of this thread's current layer handed over: (text keys, keys, values)


def hand_over(text_keys: Tensor, keys: Tensor, values: Tensor) -> None:
    """Give the memory's keys and values to the attention that is called next, with these keys of the text.

    Args:
        text_keys: what the cache returns to the layer; the attention has to get this very tensor.
        keys, values: of the memory, [1, key heads, P, head width].

    Raises:
        RuntimeError: the last layer's memory was not read, so this model's attention is not ours.
    """
    if getattr(_handed, "memory", None) is not None:
        _handed.memory = None
        raise RuntimeError("a layer did not read its memory: its attention is not the one that was chosen for it.")
    _handed.memory = (text_keys, keys, values)


def begin() -> None:
    """Forget what a pass that was broken off in this thread handed over; called where a new cache is made."""
    _handed.memory = None


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of n queries over P positions of the memory that was handed over, if any, and t of the text.

    Args:
        query: [B, heads, n, head width].
        key: [B, key heads, t, head width].
        value: as `key`.
        attention_mask: None, or bool [B or 1, 1, n, P + t], True where a query may look.

    Returns:
        [B, n, heads, head width], and no weights.

    Raises:
        RuntimeError: the layer changed its keys after the cache had returned them.
    """
    handed, _handed.memory = getattr(_handed, "memory", None), None
    if handed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    text_keys, keys, values = handed
    if text_keys is not key:
        raise RuntimeError("a layer changed its keys after the cache had returned them; its memory would be lost.")
    P, n = keys.shape[2], query.shape[2]
    if kwargs.get("dropout") or (attention_mask is None and n > 1) or not _sees_all(attention_mask, P):
        rows = key.shape[0]
        key = torch.cat([keys.expand(rows, -1, -1, -1), key], dim=2)
        value = torch.cat([values.expand(rows, -1, -1, -1), value], dim=2)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    B, heads, _, width = query.shape
    shared, t = key.shape[1], key.shape[2]
    asked = (query * (width**-0.5 if scaling is None else scaling)).reshape(B, shared, -1, width)
    asked = asked.transpose(0, 1).reshape(shared, -1, width)  # all rows ask one memory
    scores = asked @ _behind(keys, key).transpose(1, 2)  # [shared, B * heads / shared * n, P + B * t]
    on_text = scores.view(shared, B, -1, n, P + B * t)[..., P:].unflatten(-1, (B, t))
    own = torch.eye(B, dtype=torch.bool, device=key.device)[:, None, None, :, None]
    seen = own if attention_mask is None else own & attention_mask[:, :, :, None, P:]  # [B, 1, n, B, t]
    on_text.masked_fill_(~seen, float("-inf"))
    output = scores.softmax(-1) @ _behind(values, value)
    return output.view(shared, B, -1, n, width).permute(1, 3, 0, 2, 4).reshape(B, n, heads, width), None


def _behind(memory: Tensor, text: Tensor) -> Tensor:
    """One memory with the texts of all rows behind it, [key heads, P + B * t, head width]."""
    return torch.cat([memory[0], text.transpose(0, 1).flatten(1, 2)], dim=1)


def _sees_all(mask: Tensor | None, P: int) -> bool:
    """Whether every query sees the whole memory; what it sees of the text may be anything."""
    return mask is None or (mask.dtype == torch.bool and bool(mask[..., :P].all()))


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def choose(model: PreTrainedModel) -> None:
    """Let a model on the CPU take the fast ways: `attend` in half precision, and an output layer that copies nothing.

    Torch multiplies a part of a tensor, such as the last positions of all rows, by copying the matrix for each row.
    """
    weight = model.get_input_embeddings().weight
    if weight.device.type != "cpu":
        return
    if weight.dtype in (torch.bfloat16, torch.float16) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    head: Any = model.get_output_embeddings()
    if head is not None and not head._forward_pre_hooks:
        head.register_forward_pre_hook(_contiguous)


def _contiguous(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous().view(-1, x.shape[-1]).view(x.shape) for x in inputs)  # strides of one row count, too
