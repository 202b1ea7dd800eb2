"""Decoders that are supported, how questions are put to them, and their files in a folder or on the hub."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from latentmem.loading.names import PACKAGED
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Style

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# How texts and questions are put to a model by default, where it was measured: docs/results/prompts.md, and
# docs/results/conversations.md for the window.
STYLES = {PACKAGED: Style(wrap="user", system="", question="{question} Answer briefly.", window=0)}

# Decoders, by `model_type`, for which tests/decoder/test_families.py proves the law: a memory of the form "exact" that
# is not full answers as the text in the context does. Anything else is refused.
SUPPORTED = tuple(
    """
    cohere cohere2 exaone4 gemma gemma2 gemma3_text glm4 gpt_oss granite hunyuan_v1_dense llama ministral ministral3
    mistral mixtral olmo olmo2 olmo3 phi phi3 qwen2 qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2
    """.split()  # noqa: SIM905 - shorter to read than quoted words
)


def check_supported(config: PretrainedConfig) -> None:
    """Refuse an architecture for which the law is not proven (`SUPPORTED`).

    Raises:
        ValueError: with the list of what is supported, what this one has that none of them has, and the nearest.
    """
    if config.model_type not in SUPPORTED:
        reasons, nearest = _other_parts(config), _nearest(config.get_text_config().model_type)
        raise ValueError(
            f"models of type {config.model_type!r} are not supported; these are: {', '.join(SUPPORTED)}."
            + (f" This one has {' and '.join(reasons)}." if reasons else "")
            + (f" The nearest that is supported is {nearest}." if nearest else "")
        )
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))]
    for kind in kinds:
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"rotary positions of type {kind!r} are not supported: they change with the length of the text, "
                f"so a memory's keys would be wrong. Set another rope_type in the config."
            )


def _other_parts(config: PretrainedConfig) -> list[str]:
    """What a model has that no supported model has, in words."""
    text = config.get_text_config()
    layers = {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "layers_block_type", None) or ())}
    kinds = sorted(layers - {"attention", "full_attention", "sliding_attention", "chunked_attention"})
    shared, rank = getattr(text, "num_kv_shared_layers", None), getattr(text, "kv_lora_rank", None)
    parts = {
        f"layers of the kind {', '.join(kinds)}": kinds,
        f"layers that share keys and values ({shared})": shared,
        f"keys and values of rank {rank} (MLA)": rank,
        "an encoder": config.is_encoder_decoder,
        f"a part for text, {text.model_type}, beside other parts": text is not config,
    }
    return [words for words, there in parts.items() if there]


def _nearest(model_type: str) -> str:
    """The supported family of a like name with the same first word, or ""."""
    word = (re.match(r"[a-z]*", model_type) or [""])[0]
    own = [name for name in SUPPORTED if re.match(rf"{word}(?![a-z])", name)]
    return next(iter(difflib.get_close_matches(model_type, own, 1)), "")


def from_transformers(
    source: str | Path, name: str, dtype: torch.dtype, device: torch.device, **gguf: str
) -> MemoryModel:
    """A plain transformers decoder from a folder or a hub id; `gguf_file` names a GGUF file inside the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with readable(name), quiet():
        try:
            config = AutoConfig.from_pretrained(source, **gguf)
        except ValueError as error:
            reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
            raise ValueError(
                f"the model {name!r} is of no supported family ({reason}): {', '.join(SUPPORTED)}."
            ) from error
        check_supported(config)
        options = {**gguf, **(dequantised() if gguf else {"use_safetensors": True})}  # never pickle
        base, loading = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    lacking = sorted({*loading["missing_keys"], *(str(key[0]) for key in loading["mismatched_keys"])})
    if lacking:
        raise ValueError(
            f"the model {name!r} lacks {len(lacking)} weights, or has them in another shape: "
            f"{', '.join(lacking[:8])}{' ...' if len(lacking) > 8 else ''}. Fetch it again."
        )
    return MemoryModel(base.to(device), tokenizer_of(source, name, **gguf), name=name, style=STYLES.get(name))


def tokenizer_of(source: str | Path, name: str, **gguf: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer; for some families transformers makes one without a vocabulary where there is none."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
        if set(tokenizer.encode("a text", add_special_tokens=False)) <= set(tokenizer.all_special_ids):
            raise ValueError("it has no vocabulary.")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the model {name!r} holds no tokenizer that can be read. Put the tokenizer's files beside config.json, "
            f"as `tokenizer.save_pretrained` makes them."
        ) from error
    return tokenizer


def dequantised() -> dict[str, Any]:
    """What makes transformers unpack a GGUF file's weights; before it had a choice, it always did."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a model by its name, as transformers finds it; a ValueError if there is none."""
    from transformers import PretrainedConfig

    with readable(name):
        config = PretrainedConfig.get_config_dict(name)[0]
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"the model {name!r} has a config.json without a model_type: it is no transformers model.")
    return config


_UNREADABLE: tuple[type[Exception], ...] = (  # what libraries raise on files that lack or are damaged
    *(json.JSONDecodeError, struct.error, SafetensorError, EOFError, ArithmeticError),
    *(OSError, KeyError, IndexError, AttributeError, TypeError, RuntimeError),
)


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Say in one sentence why a model could not be read."""
    try:
        yield
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the model {name!r} could not be loaded ({reason.rstrip('.')}). Give {PACKAGED!r}, a complete folder, a "
            f".gguf file, or a hub id that can be reached."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and weight reports off the screen; errors still come through."""
    from transformers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
