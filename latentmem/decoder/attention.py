"""Attention over memories: on the CPU without copies of what rows share, on CUDA without a mask (`latentmem.core`).

`MemoryLayer` hands the memories over by themselves (`hand_over`), so that nothing that rows share is copied, padded or
expanded, however many rows read one and however different they are:

    scores   of all rows on their own text in one product, and on each memory in one product for the rows that read it
    weights  one softmax over both
    output   the weights on the memory times its values, plus the weights on the text times its values

Where each row reads a memory of its own for many tokens, the memories are stacked once (`Stack`), and one product reads
them all. Registered under `NAME` for transformers on the CPU. A layer with a sliding window that hides a part of a
memory, and everything without a memory, goes to transformers' own function, and so do long texts of one row in float32,
where torch's kernel is faster.

On CUDA (`CUDA`) a memory stands in front of the text in one tensor. Transformers would make a mask for that, and with a
mask torch neither takes its flash kernel nor shares key heads; that text sees all that stands before it can be said
without one (`causal_lower_right`), as long as nothing is padded and no window hides anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

NAME = "latentmem_cpu"
CUDA = "latentmem_cuda"
QUERIES = 64  # at once for one memory: the scores of more do not fit into a core's cache
LEARNED = 512  # at once where gradients flow: the scores are kept for the backward pass anyway
LONG = 128  # queries from which on one row after another, in float32 by torch's kernel, is as fast as all at once
KV = tuple[Tensor, Tensor]  # keys and values, each [B, heads, positions, head width]
_handed = threading.local()  # by the cache of this thread's current layer: (text keys, memories, rows, stack)


@dataclass(frozen=True)
class Stack:
    """Different memories in one tensor, the shorter ones padded at their end: one row each.

    Args:
        keys: rotated, [B, key heads, P, head width], P of the longest.
        values: as `keys`.
        beyond: bool [B, 1, 1, P], True behind the end of a shorter memory; None if all are equally long.
    """

    keys: Tensor
    values: Tensor
    beyond: Tensor | None

    @staticmethod
    def of(memories: Sequence[KV]) -> Stack:
        lengths = torch.tensor([keys.shape[2] for keys, _ in memories])
        P = int(lengths.max())
        made = [part.new_empty(len(memories), part.shape[1], P, part.shape[3]) for part in memories[0]]
        for row, memory in enumerate(memories):
            for into, tensor in zip(made, memory, strict=True):
                into[row, :, : tensor.shape[2]] = tensor[0]
                into[row, :, tensor.shape[2] :] = 0
        beyond = (torch.arange(P)[None] >= lengths[:, None])[:, None, None] if int(lengths.min()) < P else None
        return Stack(made[0], made[1], beyond)


def hand_over(
    text_keys: Tensor, memories: Sequence[KV], rows: Sequence[int], stack: Callable[[], Stack | None] | None = None
) -> None:
    """Give memories to the attention that is called next, with these keys of the text.

    Args:
        text_keys: what the cache returns to the layer; the attention has to get this very tensor.
        memories: rotated keys and values of each memory, [1, key heads, P, head width], each with its own P.
        rows: which memory each of B rows reads.
        stack: gives the same memories in one tensor, if each row reads its own.

    Raises:
        RuntimeError: the last layer's memory was not read, so this model's attention is not ours.
    """
    if getattr(_handed, "memory", None) is not None:
        _handed.memory = None
        raise RuntimeError("a layer did not read its memory: its attention is not the one that was chosen for it.")
    _handed.memory = (text_keys, memories, rows, stack)


def begin() -> None:
    """Forget what a pass that was broken off in this thread handed over; called where a new cache is made."""
    _handed.memory = None


@contextmanager
def watching(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect what each layer attends to in this thread's passes, in the order of the layers.

    Yields:
        For each layer and pass one tensor [n, P + t] float32: the share of each query's attention that goes to each
        position, the mean over heads, of the first row.
    """
    seen: list[Tensor] = []

    def take(module: Any, inputs: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is not None and getattr(_handed, "seen", None) is seen:
            seen.append(weights[0].float().mean(0).detach())

    hooks = [layer.self_attn.register_forward_hook(take) for layer in model.get_decoder().layers]
    _handed.seen = seen
    try:
        yield seen
    finally:
        _handed.seen = None
        for hook in hooks:
            hook.remove()


def _watch(query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float | None) -> None:
    """What `watching` collects, if it does, where the attention itself gives no weights.

    Args:
        query: [B, heads, n, head width].
        keys: [B, key heads, P + t, head width].
        mask: bool or added, [B or 1, 1, n, P + t]; None: each query sees all keys up to itself.
    """
    seen = getattr(_handed, "seen", None)
    if seen is None:
        return
    _, _, n, width = query.shape
    asked = query[0].float() * (width**-0.5 if scaling is None else scaling)
    scores = asked.unflatten(0, (keys.shape[1], -1)) @ keys[0].float().transpose(1, 2)[:, None]
    if mask is None:
        mask = torch.ones(n, keys.shape[2], dtype=torch.bool, device=keys.device).tril(keys.shape[2] - n)[None, None]
    scores = scores.masked_fill(~mask[0], float("-inf")) if mask.dtype == torch.bool else scores + mask[0].float()
    seen.append(scores.softmax(-1).mean((0, 1)))


def stacked(memories: Sequence[KV], rows: Sequence[int]) -> KV:
    """Memories as one tensor of B rows, shorter ones padded on the left; a memory that all rows read is not copied."""
    if len(memories) == 1:
        keys, values = memories[0]
        return keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1)
    P = max(keys.shape[2] for keys, _ in memories)
    padded = [[torch.nn.functional.pad(t, (0, 0, P - t.shape[2], 0)) for t in memory] for memory in memories]
    keys, values = (torch.cat([padded[i][part] for i in rows]) for part in (0, 1))
    return keys, values


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of n queries over P positions of the memories that were handed over, if any, and t of the text.

    Args:
        query: [B, heads, n, head width].
        key: [B, key heads, t, head width].
        value: as `key`.
        attention_mask: None, or bool [B or 1, 1, n, P + t], True where a query may look; P is the largest of all, and
            the columns of a shorter memory are the last before the text.

    Returns:
        [B, n, heads, head width], and no weights.

    Raises:
        RuntimeError: the layer changed its keys after the cache had returned them.
    """
    handed, _handed.memory = getattr(_handed, "memory", None), None
    if handed is None:
        _watch(query, key, attention_mask, scaling)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    text_keys, memories, rows, stack = handed
    if text_keys is not key:
        raise RuntimeError("a layer changed its keys after the cache had returned them; its memory would be lost.")
    if getattr(_handed, "seen", None) is not None:
        _watch(query, torch.cat([stacked(memories, rows)[0], key], dim=2), attention_mask, scaling)
    B, _, n, width = query.shape
    theirs = kwargs.get("dropout") or (B == 1 and n >= LONG and query.dtype == torch.float32)
    if theirs or (attention_mask is None and n > 1) or not _sees_all(attention_mask, memories, rows):
        keys, values = stacked(memories, rows)
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if len(memories) > 1 and n >= LONG:  # one after another: nothing is gained together, and the scores stay small
        output = query.new_empty(B, n, query.shape[1], width)
        for i in sorted(set(rows)):
            (keys, values), where = memories[i], _where(i, rows)
            text_keys, mask = key[where], attention_mask
            if mask is not None:
                mask = (mask[where] if len(mask) == B else mask)[..., -keys.shape[2] - key.shape[2] :]
            hand_over(text_keys, [(keys, values)], [0] * len(text_keys))
            output[where] = attend(module, query[where], text_keys, value[where], mask, scaling, **kwargs)[0]
        return output, None
    shared = key.shape[1]
    asked = (query * (width**-0.5 if scaling is None else scaling)).view(B, shared, -1, n, width)
    if len(memories) == 1:
        reader: _Read = _ReadOne(memories[0])
    else:
        together = stack() if stack else None
        reader = _ReadStack(together) if together else _ReadEach(memories, rows)
    seen = None if attention_mask is None else attention_mask[:, :, None, :, -key.shape[2] :]
    learns = torch.is_grad_enabled() and query.requires_grad
    step = max(1, (LEARNED if learns else QUERIES) // max(1, B // len(memories)))
    parts = []
    for start in range(0, n, step):
        some = slice(start, start + step)
        parts.append(_read(asked[..., some, :], reader, (key, value), None if seen is None else seen[..., some, :]))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], None


def _read(asked: Tensor, memory: _Read, text: KV, seen: Tensor | None) -> Tensor:
    """What some queries read.

    Args:
        asked: scaled queries, [B, key heads, query heads per key head, n, head width].
        memory: what gives scores on the memories of all rows, and what the weights on them read.
        text: keys and values of the text, [B, key heads, t, head width].
        seen: bool [B or 1, 1, 1, n, t].

    Returns:
        [B, n, heads, head width].
    """
    B, shared, group, n, width = asked.shape
    asked = asked.reshape(B, shared, group * n, width)
    on_text = asked @ text[0].transpose(2, 3)
    if seen is not None:
        on_text.view(B, shared, group, n, -1).masked_fill_(~seen, float("-inf"))
    weights = torch.cat([memory.scores(asked), on_text], dim=-1).softmax(-1)
    t = on_text.shape[-1]
    output = weights[..., -t:] @ text[1]
    memory.add(output, weights[..., :-t])
    return output.view(B, shared * group, n, width).transpose(1, 2).contiguous()


class _Read(Protocol):
    """Queries on memories. `scores`: [B, key heads, m, head width] -> [B, key heads, m, P]; `add`: what they read."""

    def scores(self, asked: Tensor) -> Tensor: ...
    def add(self, output: Tensor, weights: Tensor) -> None: ...


class _ReadOne:
    """All rows read one memory: its heads once, the queries of all rows side by side."""

    def __init__(self, memory: KV) -> None:
        self.keys, self.values = memory[0][0], memory[1][0]

    def scores(self, asked: Tensor) -> Tensor:
        B, shared, m, width = asked.shape
        if B == 1:
            return torch.bmm(asked[0], self.keys.transpose(1, 2))[None]
        found = asked.transpose(0, 1).reshape(shared, B * m, width) @ self.keys.transpose(1, 2)
        return found.view(shared, B, m, -1).transpose(0, 1)

    def add(self, output: Tensor, weights: Tensor) -> None:
        B, shared, m, P = weights.shape
        if B == 1:
            output[0].baddbmm_(weights[0], self.values)
            return
        found = weights.transpose(0, 1).reshape(shared, B * m, P) @ self.values
        output += found.view(shared, B, m, -1).transpose(0, 1)


class _ReadStack:
    """Each row reads a memory of its own, all in one product."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def scores(self, asked: Tensor) -> Tensor:
        found = asked @ self.stack.keys.transpose(2, 3)
        return found if self.stack.beyond is None else found.masked_fill_(self.stack.beyond, float("-inf"))

    def add(self, output: Tensor, weights: Tensor) -> None:
        output += weights @ self.stack.values


class _ReadEach:
    """Any rows read any memories: one product for each memory."""

    def __init__(self, memories: Sequence[KV], rows: Sequence[int]) -> None:
        read = sorted(set(rows))
        self.parts = [(_where(i, rows), _ReadOne(memories[i])) for i in read]
        self.lengths = [memories[i][0].shape[2] for i in read]
        self.P = max(keys.shape[2] for keys, _ in memories)

    def scores(self, asked: Tensor) -> Tensor:
        B, shared, m, _ = asked.shape
        found = asked.new_full((B, shared, m, self.P), float("-inf"))  # behind the end of a shorter memory
        for (rows, part), P in zip(self.parts, self.lengths, strict=True):
            found[rows, :, :, :P] = part.scores(asked[rows])
        return found

    def add(self, output: Tensor, weights: Tensor) -> None:
        for (rows, part), P in zip(self.parts, self.lengths, strict=True):
            read = output[rows]
            part.add(read, weights[rows, :, :, :P])
            output[rows] = read


def _where(memory: int, rows: Sequence[int]) -> slice | list[int]:
    """The rows that read a memory, as a slice if they stand together: then nothing is copied."""
    found = [row for row, i in enumerate(rows) if i == memory]
    return slice(found[0], found[-1] + 1) if found[-1] - found[0] == len(found) - 1 else found


def _sees_all(mask: Tensor | None, memories: Sequence[KV], rows: Sequence[int]) -> bool:
    """Whether every query sees the whole memory of its row and nothing before it; of the text it may see anything."""
    lengths = [keys.shape[2] for keys, _ in memories]
    P = max(lengths)
    if mask is None:
        return min(lengths) == P
    if mask.dtype != torch.bool:
        return False
    if min(lengths) == P:
        return bool(mask[..., :P].all())
    there = torch.arange(P)[None] >= P - torch.tensor([lengths[i] for i in rows])[:, None]
    return bool((mask[..., :P] == there[:, None, None]).all())


def attend_below(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of n queries at the end of t keys, each seeing all keys up to itself, where there is no mask.

    Args:
        query: [B, heads, n, head width].
        key: [B, key heads, t, head width], t >= n.
        value: as `key`.
        attention_mask: of `mask_if_needed`.

    Returns:
        [B, n, heads, head width], and no weights.
    """
    _watch(query, key, attention_mask, scaling)
    n, t = query.shape[2], key.shape[2]
    if attention_mask is not None or n in (1, t):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=causal_lower_right(n, t),
        dropout_p=kwargs.get("dropout", 0.0),
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


def mask_if_needed(**kwargs: Any) -> Tensor | None:
    """The mask of transformers, or None where every query sees all keys up to itself."""
    padding = kwargs.get("attention_mask")
    plain = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    ends = kwargs.get("q_offset", 0) + kwargs["q_length"] == kwargs.get("kv_offset", 0) + kwargs["kv_length"]
    if plain and ends and not kwargs.get("kv_offset", 0) and (padding is None or bool(padding.all())):
        return None
    return sdpa_mask(**kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionInterface.register(CUDA, attend_below)
AttentionMaskInterface.register(CUDA, mask_if_needed)


def choose(model: PreTrainedModel) -> None:
    """Let a model take the fast ways: `attend` or `attend_below`, and on the CPU an output layer that copies nothing.

    Torch multiplies a part of a tensor, such as the last positions of all rows, by copying the matrix for each row.
    """
    device = model.get_input_embeddings().weight.device.type
    ways = {"cpu": NAME, "cuda": CUDA}
    if model.config._attn_implementation == "sdpa" and device in ways:
        model.set_attn_implementation(ways[device])
    if device != "cpu":
        return
    head: Any = model.get_output_embeddings()
    if head is not None and not head._forward_pre_hooks:
        head.register_forward_pre_hook(_contiguous)


def _contiguous(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous().view(-1, x.shape[-1]).view(x.shape) for x in inputs)  # strides of one row count, too
