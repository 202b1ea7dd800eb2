"""Linear layers on the CPU: faster kernels for float32 (`choose`), or 8 bits, a quarter of the bytes (`quantize`).

On an x86 CPU torch gives the products to MKL. Without gradients, up to four rows the weights as a batch of two halves
are faster, 1.8 to 2.8 times on two cores, and beyond oneDNN, which torch carries too, 1.2 to 1.3 times
(`benchmarks/linear.py`, docs/results/speed.md).
"""

from __future__ import annotations

import platform
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

FEW = 4  # rows up to which two halves of the weights are faster than oneDNN
KINDS = ("int8",)
_KEYS = ("k_proj", "v_proj", "qkv_proj", "query_key_value")  # a memory must not depend on what is projected beside it
_DOWN = ("down_proj", "fc2", "c_proj")  # a few of their inputs are far larger than the rest, and one scale holds all
_EXACT = (*_KEYS, *_DOWN, "lora_A", "lora_B")
_one_dnn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Linear(nn.Linear):
    """`torch.nn.Linear`, equal but for rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight, bias = self.weight, self.bias
        learns = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        jvp = getattr(forward_ad, "_current_level", -1) >= 0  # gradients are taken forwards
        if (learns and torch.is_grad_enabled()) or jvp or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        if not x.dtype == weight.dtype == torch.float32 or not x.device.type == weight.device.type == "cpu":
            return super().forward(x)
        if not x.numel() or x.shape[-1] != self.in_features:
            return super().forward(x)
        rows = x.numel() // self.in_features
        if rows > FEW or self.out_features % 2:
            return _one_dnn(x.contiguous(), weight, bias, "none", [], "")  # type: ignore[misc]
        columns = x.reshape(rows, -1).t().expand(2, -1, -1)  # seen as transposed: one column by itself is far slower
        y = torch.bmm(weight.view(2, -1, self.in_features), columns)
        y = (y.view(-1, rows).t() if rows > 1 else y).reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias


def choose(model: nn.Module) -> None:
    """Let a model's linear layers take the faster ways, if there are any; `undo` it before replacing layers by type."""
    if _one_dnn is not None and platform.machine().lower() in ("x86_64", "amd64"):
        for part in model.modules():
            if type(part) is nn.Linear:
                part.__class__ = Linear


def undo(model: nn.Module) -> None:
    """Make a model's linear layers torch's own again."""
    for part in model.modules():
        if type(part) is Linear:
            part.__class__ = nn.Linear  # type: ignore[assignment]


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
    undo(model)
    layers = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    names = [name for name in layers if not set(name.split(".")) & set(_EXACT)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will move elsewhere
        engine.quantize_dynamic(model, dict.fromkeys(names, engine.per_channel_dynamic_qconfig), inplace=True)
