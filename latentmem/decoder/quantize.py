"""Linear layers in 8 bits on the CPU: each token reads a quarter of the bytes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from latentmem.decoder import linear

KINDS = ("int8",)
_KEYS = ("k_proj", "v_proj", "qkv_proj", "query_key_value")  # a memory must not depend on what is projected beside it
_DOWN = ("down_proj", "fc2", "c_proj")  # a few of their inputs are far larger than the rest, and one scale holds all
_EXACT = (*_KEYS, *_DOWN, "lora_A", "lora_B")


def quantize(model: nn.Module, kind: str) -> None:
    """Replace a model's linear layers, in place, by ones with 8-bit weights (one scale per output) and inputs.

    Inputs get one scale for all rows of a pass, so rows of a batch change each other's rounding. Layers that make keys
    and values are kept as they are, and those at the end of each MLP: with them the packaged model would lose up to a
    third of its token accuracy (docs/results/speed.md).

    Args:
        model: in float32 on the CPU.
        kind: "int8".

    Raises:
        ValueError: another kind, dtype or device, or a torch that can not do it.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize must be one of {', '.join(KINDS)}, got {kind!r}.")
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ValueError(
            f"int8 is for float32 on the CPU, and this model is {str(weight.dtype)[6:]} on {weight.device.type}. "
            f"Load it with dtype='float32' and device='cpu'."
        )
    engine: Any = getattr(torch.ao, "quantization", None)
    if not hasattr(engine, "quantize_dynamic"):
        raise ValueError(f"torch {torch.__version__} has no dynamic quantization any more; use torch 2.13.")
    linear.undo(model)
    layers = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    names = [name for name in layers if not set(name.split(".")) & set(_EXACT)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will move elsewhere
        engine.quantize_dynamic(model, dict.fromkeys(names, engine.per_channel_dynamic_qconfig), inplace=True)
