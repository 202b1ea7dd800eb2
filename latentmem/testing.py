"""Test doubles that need no network: tiny random models, a byte tokenizer, memories with labelled slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from latentmem.core.memory import Memory, Update, empty, update
from latentmem.core.settings import MemorySettings

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TINY: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


def tiny_model(
    model_type: str = "llama", *, seed: int = 0, attention: str = "sdpa", **config: object
) -> PreTrainedModel:
    """A decoder of a few thousand random fp32 weights.

    Args:
        model_type: the transformers name of the architecture.
        seed: of the weights.
        attention: "sdpa" or "eager".
        config: overrides of `TINY`.
    """
    settings = AutoConfig.for_model(model_type, **{**TINY, **config})
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
    finally:
        torch.random.set_rng_state(state)
    return model.to(torch.float32).eval()


def byte_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, ids 4..259, and `<|im_start|>` (1, bos) and `<|im_end|>` (2, eos)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
    )
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def labelled_memory(layers: int, N: int, K: int, *, seed: int = 0) -> Memory:
    """A memory of width 1 that holds nothing, for slots that are their own labels."""
    return empty(layers, 1, MemorySettings(N, K, seed=seed))


def updated(
    memory: Memory,
    slots: Tensor,
    *,
    dropped: Tensor | None = None,
    source: str = "",
    tokens: int = 0,
    keys: Tensor | None = None,
) -> Memory:
    """A memory after an update by slots [L, k, d]; the other arguments are those of `Update`, by default as drawn."""
    change = Update.drawn(memory, slots, source, tokens) if dropped is None else Update(slots, dropped, source, tokens)
    return update(memory, replace(change, keys=keys))
