"""Hooks on layers: collect or change their hidden states while one thread runs the model; recompute them backwards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from latentmem.decoder.adapters import Adapters
from latentmem.decoder.decoder import Decoder

# Older versions of transformers run a layer's hooks inside what is recomputed, when those of a write are gone.
HOOKS_STAY = "__call__" not in vars(GradientCheckpointingLayer)
Change = Callable[[int, Tensor], Tensor]  # (layer, hidden states at its input [B, n, d]) -> what it gets instead


@contextmanager
def layers_seen(decoder: Decoder, change: Change | None = None, *, outputs: bool = False) -> Iterator[list[Tensor]]:
    """Collect the hidden states [B, n, d] at the input (or output) of each layer while this thread runs the model.

    Another thread may run the same model meanwhile, to stream an answer for example: it is neither seen nor changed.

    Args:
        change: rewrites the input of each layer before it runs; what is collected as input is the rewritten one.
        outputs: collect what the layers give instead of what they get.
    """
    seen: list[Tensor] = []
    handles, me = [], threading.get_ident()

    def before(i: int) -> Callable[..., Any]:
        def hook(_: torch.nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
            # without kwargs another thread has just removed this hook: torch no longer knows what to give it
            if kwargs is None or threading.get_ident() != me:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            changed = change(i, hidden) if change else hidden
            if not outputs:
                seen.append(changed)
            if change is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        return hook

    def after(_: torch.nn.Module, __: tuple, output: Tensor | tuple) -> None:
        if threading.get_ident() == me:
            seen.append(output[0] if isinstance(output, tuple) else output)

    try:
        for i, layer in enumerate(decoder.layers):
            handles.append(layer.register_forward_pre_hook(before(i), with_kwargs=True))
            if outputs:
                handles.append(layer.register_forward_hook(after))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _FirstLayer(Exception):  # noqa: N818 - no error
    """Ends a pass in front of the first layer."""


@torch.no_grad()
def first_inputs(decoder: Decoder, ids: Tensor) -> Tensor:
    """What the first layer gets of tokens [n], [n, d]; it does not depend on what stands beside them."""

    def stop(i: int, hidden: Tensor) -> Tensor:
        seen.append(hidden)
        raise _FirstLayer

    seen: list[Tensor] = []
    with layers_seen(decoder, stop), contextlib.suppress(_FirstLayer):
        decoder.body(input_ids=ids[None], use_cache=False)
    return seen[0][0]


def checkpoint_layers(decoder: Decoder, adapters: Adapters) -> None:
    """Gradient checkpointing of each layer, replayed under the adapter of its forward pass and behind its memory."""

    def replayed(function: Callable[..., Any], *args: Any) -> Any:
        name = adapters.active

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), adapters.use(name)

        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    for layer in decoder.layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._can_checkpoint_with_cache = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = replayed  # type: ignore[assignment]
