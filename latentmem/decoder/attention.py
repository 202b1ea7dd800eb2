"""Attention over memories: on the CPU without copies of them, on CUDA without a mask (letters: `latentmem.core`).

For a query q of a row, with keys and values of the memory that the row reads and of its text:

    scores   s = [q K_memory ; q K_text] / sqrt(head width)      -inf where q may not look
    weights  w = softmax(s)                                      one softmax over both
    output   o = w_memory V_memory + w_text V_text

Memories are never copied, padded or expanded per row: the queries of all rows that read one memory are one product with
the same tensors. Where each row reads a memory of its own for many tokens, the memories are stacked once (`Stack`). The
cache hands memories over on the tensors that it returns (`hand_over`), and the function registered under `NAME` takes
them from there.

A layer with a sliding window that hides a part of a memory, and everything without a memory, goes to transformers' own
function, and so do long texts of one row in float32, where torch's kernel is faster.

On CUDA a memory stands in front of the text in one tensor. Transformers would make a mask for that, and with a mask
torch neither takes its flash kernel nor shares key heads. Where nothing is padded and no window hides anything, the
function registered under `CUDA` says the same without a mask (`causal_lower_right`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
_here = threading.local()  # shares: the list of the `watching` that lasts in this thread, if any


@dataclass(frozen=True)
class Memories:
    """What the rows of a pass read.

    Args:
        kv: rotated keys and values of each memory, [1, key heads, P, head width], each with its own P.
        rows: which memory each of B rows reads.
        stack: gives the same memories in one tensor, if each row reads its own.
    """

    kv: Sequence[KV]
    rows: Sequence[int]
    stack: Callable[[], Stack | None] | None = None

    def in_front_of(self, keys: Tensor, values: Tensor) -> KV:
        """Memories and text in one tensor of B rows."""
        mine = stacked(self.kv, self.rows)
        return torch.cat([mine[0], keys], dim=2), torch.cat([mine[1], values], dim=2)

    def rows_of(self, i: int) -> slice | list[int]:
        """The rows that read memory i, as a slice if they stand together: then nothing is copied."""
        rows = [row for row, read in enumerate(self.rows) if read == i]
        return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else rows

    def seen_whole(self, mask: Tensor | None) -> bool:
        """Whether every query sees the whole memory of its row and nothing before it; of the text anything."""
        lengths = [keys.shape[2] for keys, _ in self.kv]
        P = max(lengths)
        if mask is None:
            return min(lengths) == P
        if mask.dtype != torch.bool:
            return False
        if min(lengths) == P:
            return bool(mask[..., :P].all())
        held = torch.arange(P)[None] >= P - torch.tensor([lengths[i] for i in self.rows])[:, None]
        return bool((mask[..., :P] == held[:, None, None]).all())


def stacked(memories: Sequence[KV], rows: Sequence[int]) -> KV:
    """Memories as one tensor of B rows, shorter ones padded on the left; a memory that all rows read is not copied."""
    if len(memories) == 1:
        keys, values = memories[0]
        return keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1)
    return left_padded([memories[i][0][0] for i in rows]), left_padded([memories[i][1][0] for i in rows])


def left_padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows [heads, positions, head width] as one tensor, shorter ones padded on the left."""
    heads, most, width = rows[0].shape[0], max(row.shape[1] for row in rows), rows[0].shape[2]
    padded = rows[0].new_zeros(len(rows), heads, most, width)  # each row is copied once
    for into, row in zip(padded, rows, strict=True):
        into[:, most - row.shape[1] :] = row
    return padded


# --- from the cache to the attention ----------------------------------------------------------------------------------


def hand_over(keys: Tensor, values: Tensor, memories: Memories) -> list[Memories]:
    """Put memories on the keys and values of the text, the very tensors that the attention has to get.

    They lie on the tensors and nowhere else: a pass that is broken off leaves nothing behind, and no thread sees
    another's.

    Returns:
        [memories], and [] once the attention has taken them.
    """
    unread = [memories]
    vars(keys)["memories_in_front"] = vars(values)["memories_of_keys"] = unread
    return unread


def _received(keys: Tensor, values: Tensor) -> Memories | None:
    """What was handed over with these keys and values, once.

    Raises:
        RuntimeError: the layer changed its keys or values after the cache had returned them.
    """
    unread, same = vars(keys).pop("memories_in_front", None), vars(values).pop("memories_of_keys", None)
    if unread is not same:
        raise RuntimeError("a layer changed its keys after the cache had returned them; its memory would be lost.")
    return unread.pop() if unread else None


# --- on the CPU -------------------------------------------------------------------------------------------------------


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
        RuntimeError: as `_received`.
    """
    memories = _received(key, value)
    if memories is None:
        watch(query, key, attention_mask, scaling)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if watched():
        watch(query, memories.in_front_of(key, value)[0], attention_mask, scaling)
    return _attend(module, query, (key, value), memories, attention_mask, scaling, kwargs), None


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    text: KV,
    memories: Memories,
    mask: Tensor | None,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor:
    """`attend` with memories."""
    B, _, n, _ = query.shape
    faster = B == 1 and n >= LONG and query.dtype == torch.float32  # torch's own kernel
    if faster or options.get("dropout") or (mask is None and n > 1) or not memories.seen_whole(mask):
        key, value = memories.in_front_of(*text)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)[0]
    if len(memories.kv) == 1 or n < LONG:
        return _read_in_steps(query, text, memories, mask, scaling)
    output = query.new_empty(B, n, query.shape[1], query.shape[3])
    for i in sorted(set(memories.rows)):  # nothing is gained together, and the scores stay small
        rows, end = memories.rows_of(i), memories.kv[i][0].shape[2] + text[0].shape[2]
        part, own = (text[0][rows], text[1][rows]), mask
        if mask is not None:
            own = (mask[rows] if len(mask) == B else mask)[..., -end:]
        alone = Memories([memories.kv[i]], [0] * len(part[0]))
        output[rows] = _attend(module, query[rows], part, alone, own, scaling, options)
    return output


def _read_in_steps(query: Tensor, text: KV, memories: Memories, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention where all queries see their whole memory: some queries of all rows at once."""
    B, _, n, width = query.shape
    asked = (query * (width**-0.5 if scaling is None else scaling)).view(B, text[0].shape[1], -1, n, width)
    reader: _Reader
    if len(memories.kv) == 1:
        reader = _OneMemory(memories.kv[0])
    else:
        reader = (memories.stack and memories.stack()) or _SeveralMemories(memories)
    seen = None if mask is None else mask[:, :, None, :, -text[0].shape[2] :]
    learns = torch.is_grad_enabled() and query.requires_grad
    step = max(1, (LEARNED if learns else QUERIES) // max(1, B // len(memories.kv)))
    parts = []
    for start in range(0, n, step):
        at = slice(start, start + step)
        parts.append(_read(asked[..., at, :], reader, text, None if seen is None else seen[..., at, :]))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _read(asked: Tensor, reader: _Reader, text: KV, seen: Tensor | None) -> Tensor:
    """The three lines of this module's head.

    Args:
        asked: scaled queries, [B, key heads, query heads per key head, n, head width].
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
    weights = torch.cat([reader.scores(asked), on_text], dim=-1).softmax(-1)
    t = on_text.shape[-1]
    output = weights[..., -t:] @ text[1]
    reader.add(output, weights[..., :-t])
    return output.view(B, shared * group, n, width).transpose(1, 2).contiguous()


# Three ways to read memories. `scores`: [B, key heads, m, head width] -> [B, key heads, m, P]; `add` adds w_memory
# V_memory to an output [B, key heads, m, head width].


class _OneMemory:
    """All rows read one memory: its heads once, the queries of all rows side by side."""

    def __init__(self, memory: KV) -> None:
        self.keys, self.values = memory[0][0], memory[1][0]

    def scores(self, asked: Tensor) -> Tensor:
        B, shared, m, width = asked.shape
        if B == 1:
            return torch.bmm(asked[0], self.keys.transpose(1, 2))[None]
        scores = asked.transpose(0, 1).reshape(shared, B * m, width) @ self.keys.transpose(1, 2)
        return scores.view(shared, B, m, -1).transpose(0, 1)

    def add(self, output: Tensor, weights: Tensor) -> None:
        B, shared, m, P = weights.shape
        if B == 1:
            output[0].baddbmm_(weights[0], self.values)
            return
        part = weights.transpose(0, 1).reshape(shared, B * m, P) @ self.values
        output += part.view(shared, B, m, -1).transpose(0, 1)


@dataclass(frozen=True)
class Stack:
    """Each row reads a memory of its own, all in one product: the memories in one tensor, padded at their end.

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
        keys, values = (part.new_empty(len(memories), part.shape[1], P, part.shape[3]) for part in memories[0])
        for row, memory in enumerate(memories):
            for into, tensor in zip((keys, values), memory, strict=True):
                into[row, :, : tensor.shape[2]] = tensor[0]
                into[row, :, tensor.shape[2] :] = 0
        beyond = (torch.arange(P)[None] >= lengths[:, None])[:, None, None] if int(lengths.min()) < P else None
        return Stack(keys, values, beyond)

    def scores(self, asked: Tensor) -> Tensor:
        scores = asked @ self.keys.transpose(2, 3)
        return scores if self.beyond is None else scores.masked_fill_(self.beyond, float("-inf"))

    def add(self, output: Tensor, weights: Tensor) -> None:
        output += weights @ self.values


class _SeveralMemories:
    """Any rows read any memories: one product for each memory."""

    def __init__(self, memories: Memories) -> None:
        read = sorted(set(memories.rows))
        self.parts = [(memories.rows_of(i), _OneMemory(memories.kv[i]), memories.kv[i][0].shape[2]) for i in read]
        self.P = max(keys.shape[2] for keys, _ in memories.kv)

    def scores(self, asked: Tensor) -> Tensor:
        B, shared, m, _ = asked.shape
        scores = asked.new_full((B, shared, m, self.P), float("-inf"))  # behind the end of a shorter memory
        for rows, memory, P in self.parts:
            scores[rows, :, :, :P] = memory.scores(asked[rows])
        return scores

    def add(self, output: Tensor, weights: Tensor) -> None:
        for rows, memory, P in self.parts:
            part = output[rows]
            memory.add(part, weights[rows, :, :, :P])
            output[rows] = part


_Reader = _OneMemory | Stack | _SeveralMemories


# --- on CUDA ----------------------------------------------------------------------------------------------------------


def attend_without_mask(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `attend`, without memories: without a mask, n queries at the end of t keys see all up to themselves."""
    watch(query, key, attention_mask, scaling)
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


# --- what each layer attends to ---------------------------------------------------------------------------------------


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


# --- which models -----------------------------------------------------------------------------------------------------

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionInterface.register(CUDA, attend_without_mask)
AttentionMaskInterface.register(CUDA, mask_if_needed)


def takes_memories(model: PreTrainedModel) -> bool:
    """Whether memories are handed over to this model's attention, or stand in front of every row's text."""
    return model.config._attn_implementation == NAME


def choose(model: PreTrainedModel) -> None:
    """Let a model take the fast ways: `attend` or `attend_without_mask`, and on the CPU an output layer without copies.

    Torch multiplies a part of a tensor, such as the last positions of all rows, by copying the matrix for each row.
    """
    device = model.get_input_embeddings().weight.device.type
    names = {"cpu": NAME, "cuda": CUDA}
    if model.config._attn_implementation == "sdpa" and device in names:
        model.set_attn_implementation(names[device])
    head: Any = model.get_output_embeddings() if device == "cpu" else None
    if head is not None and not head._forward_pre_hooks:
        head.register_forward_pre_hook(_contiguous)


def _contiguous(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous().view(-1, x.shape[-1]).view(x.shape) for x in inputs)  # strides of one row count, too
