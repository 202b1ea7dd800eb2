"""Linear layers in float32 on an x86 CPU, without gradients: the same products, by kernels that are faster there.

Torch gives them to MKL. Up to four rows the weights as a batch of two halves are faster, 1.8 to 2.8 times on two cores,
and beyond oneDNN, which torch carries too, 1.2 to 1.3 times (`benchmarks/linear.py`, docs/results/speed.md).
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

FEW = 4  # rows up to which two halves of the weights are faster than oneDNN
_one_dnn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _forward_mode() -> bool:
    """Whether gradients are taken forwards (`torch.func.jvp`), which the faster kernels do not know."""
    return getattr(forward_ad, "_current_level", -1) >= 0


class Linear(nn.Linear):
    """`torch.nn.Linear`, equal but for rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight, bias = self.weight, self.bias
        learns = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        if (learns and torch.is_grad_enabled()) or _forward_mode() or torch.is_autocast_enabled("cpu"):
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
