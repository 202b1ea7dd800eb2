"""The write/read pair of LoRA adapters: which one is active, without side effects.

PEFT's own `set_adapter` also freezes the other adapter, so that the gradients of a write are lost when a read follows
in the same graph. Here a switch only says which adapter a layer uses, and outside of a `with` none is: the base model
stays the plain one. A switch holds for the thread that made it: an answer may be streamed while a text is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


WRITE, READ = "write", "read"
RETRIEVER = "retriever."  # what names of a retriever's weights begin with


class Adapters:
    """The adapters "write" and "read" inside a model, or none of them.

    Args:
        model: a model into which PEFT has put LoRA layers that know the adapters "write" and "read".
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._active: ContextVar[str | None] = ContextVar("adapter", default=None)
        self._stamp, self._identity = -1, ""
        self.retriever = ""  # hash of the one that belongs to them, if any: a memory's archive depends on it
        self.layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        classes: dict[Any, type] = {}
        for layer in self.layers:
            kind = getattr(layer, "_of_peft", type(layer))  # not the class that other `Adapters` have made of it
            if kind not in classes:
                classes[kind] = self._switched(kind)
            layer.__class__ = classes[kind]

    def _switched(self, kind: Any) -> type:
        """PEFT's class of LoRA layers, with the active adapter that `use` chooses in the thread that runs a layer."""
        from peft.tuners import lora

        def refuse(layer: Any, value: Any) -> None:
            raise RuntimeError("this adapter is switched by `Adapters.use` alone.")

        def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """PEFT's own forward for one plain LoRA adapter, without its bookkeeping for each token."""
            name = self._active.get()
            if args or kwargs or layer.merged or layer.lora_variant or (name and name not in layer.lora_A):
                return kind.forward(layer, x, *args, **kwargs)
            if name is None:
                return layer.base_layer(x)
            A, B, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
            plain, dropout = B.bias is None and isinstance(scaling, (int, float)), layer.lora_dropout[name]
            if not plain or (dropout.training and not isinstance(dropout, nn.Identity)):
                return kind.forward(layer, x)
            down, up = A.weight.to(x.dtype), B.weight.to(x.dtype)  # float32 adapters of a bfloat16 model are cast here
            return torch.add(layer.base_layer(x), linear(linear(x, down), up), alpha=scaling)

        active = property(lambda layer: [self._active.get() or READ], refuse)
        disabled = property(lambda layer: self._active.get() is None, refuse)
        own: dict[str, Any] = {"_active_adapter": active, "_disable_adapters": disabled, "_of_peft": kind}
        if kind is lora.Linear:
            own["forward"] = forward
        return type(kind.__name__, (kind,), own)

    @property
    def active(self) -> str | None:
        """Which adapter is active in this thread."""
        return self._active.get()

    @contextlib.contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Make one adapter active in this thread, or none; it nests, and gradients flow to all that were used."""
        token = self._active.set(name)
        try:
            yield
        finally:
            self._active.reset(token)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights of both adapters, named by layer number, in a fixed order."""
        for i, layer in enumerate(self.layers):
            for kind in layer.adapter_layer_names:
                for name, part in sorted(getattr(layer, kind).items()):
                    for key, weight in part.named_parameters() if isinstance(part, nn.Module) else [("", part)]:
                        yield f"{i}.{kind}.{name}.{key}", weight

    @property
    def stamp(self) -> int:
        """Grows whenever a weight of an adapter is changed in place, for example by an optimizer's step."""
        return sum(changes(layer) for layer in self.layers)

    @property
    def identity(self) -> str:
        """Hash of all adapter weights and their scaling, and of their retriever; computed anew after they changed."""
        if self._stamp != self.stamp:
            digest = hashlib.sha256()
            for name, weight in self.parameters():
                digest.update(name.encode())
                digest.update(bits(weight))
            digest.update(str([sorted(layer.scaling.items()) for layer in self.layers]).encode())
            digest.update(self.retriever.encode())
            self._stamp, self._identity = self.stamp, digest.hexdigest()
        return self._identity


def changes(module: nn.Module) -> int:
    """How often a module's weights were changed in place so far; weights of the inference mode do not count it."""
    count, inside = 0, [module]
    for part in inside:  # grows meanwhile; many times faster than `parameters()`
        inside += filter(None, part._modules.values()) if part._modules else ()
        for weight in part._parameters.values():
            if weight is not None and not weight.is_inference():
                count += weight._version
    return count


def bits(tensor: Tensor) -> bytes:
    """A tensor's values in bfloat16, as bytes: equal for a model that was loaded in another dtype."""
    return tensor.detach().to("cpu", torch.bfloat16).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def insert(model: PreTrainedModel, *, r: int, alpha: float, dropout: float, target_modules: list[str]) -> Adapters:
    """Put a fresh write/read pair into a model, its weights to be loaded or trained.

    Args:
        r: rank.
        alpha: the LoRA scale is alpha / r.
        dropout: on the input of the adapters, in training.
        target_modules: names of the linear layers that get one.
    """
    from peft import LoraConfig, inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # two are meant here
        for name in (WRITE, READ):
            config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules)
            inject_adapter_in_model(config, model, adapter_name=name)
    model.eval()
    return Adapters(model)


def weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights of both adapters, by the names that they have in the model."""
    return {name: weight for name, weight in model.named_parameters() if ".lora_" in name}


def load_into(model: PreTrainedModel, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Adapters:
    """Put trained adapters into a plain model, in its dtype.

    Args:
        tensors: weights by the names of `weights`, and those of a retriever.
        facts: r, alpha and target_modules of the LoRA pair.

    Raises:
        ValueError: weights are missing, unknown or of another shape; all are named.
    """
    adapters = insert(model, dropout=0.0, **{key: facts[key] for key in ("r", "alpha", "target_modules")})
    own = weights(model)
    theirs = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    check_shapes({name: weight.shape for name, weight in own.items()}, theirs)
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(theirs[name])
    parts = [name.encode() + bits(tensor) for name, tensor in sorted(tensors.items()) if name.startswith(RETRIEVER)]
    adapters.retriever = hashlib.sha256(b"".join(parts)).hexdigest() if parts else ""
    return adapters


def check_shapes(own: dict[str, torch.Size], theirs: dict[str, Tensor]) -> None:
    """Refuse weights of other names or shapes than the model's own."""
    wrong = sorted(own.keys() ^ theirs.keys()) + [n for n in own if n in theirs and own[n] != theirs[n].shape]
    if wrong:
        more = " ..." if len(wrong) > 8 else ""
        raise ValueError(f"these adapters do not fit the model: {', '.join(wrong[:8])}{more}.")
