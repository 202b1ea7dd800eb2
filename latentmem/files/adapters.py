"""Trained adapters <-> one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from latentmem import container
from latentmem.errors import DamagedError

KEY = "latentmem"  # of the header: the facts, as JSON


def save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write trained adapters.

    Args:
        tensors: weights by the names of `decoder.adapters.weights`, "bos" and "mark" of the preset "paper", and those
            of a retriever.
        facts: r, alpha and target_modules of the LoRA pair, the model's identity, the memory's shape and, if there is
            one, the retriever's; JSON.
    """
    container.write(path, tensors, {KEY: json.dumps(facts)})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote.

    Raises:
        ValueError: no such file, or not one of ours.
    """
    try:
        tensors, header = container.read(path)
    except (OSError, DamagedError) as error:
        raise DamagedError(f"{path}: no adapters can be read there ({error}).") from None
    try:
        return tensors, json.loads(header[KEY])
    except (KeyError, ValueError):
        raise DamagedError(f"{path} holds no adapters of latentmem: its header does not say so.") from None
