"""Names of models and of adapters: what is refused before anything is loaded, or torch imported."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGED, ADAPTERS = "smollm2-135m", "adapters.safetensors"


def path_of(name: str) -> Path:
    """A model's name as a path, with ~ for the home folder."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for an unknown user


def check_model(name: str) -> Path:
    """The path of a model, absolute where it is there, so that a memory which keeps it finds the model from any folder.

    Raises:
        ValueError: the name is neither that of the packaged model, nor a model's folder or file, nor a hub id.
    """
    path = path_of(name)
    if name == PACKAGED:
        return path
    if path.exists():
        path = path.resolve()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json: a folder with a transformers model was expected.")
    elif path.is_file() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"unknown model {name!r}: expected {PACKAGED!r} (packaged), a folder with config.json, a .gguf file, "
            f"or a hub id of the form owner/name."
        )
    return path


def check_adapters(path: Path) -> Path:
    """The file of adapters that a path names, itself or in a folder; a ValueError if there is none."""
    file = path / ADAPTERS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"adapters must be 'auto', None or a file that `latentmem train` made; there is no {file}.")
    return file
