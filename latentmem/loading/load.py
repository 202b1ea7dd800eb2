"""Names -> models: the packaged default, a folder, a GGUF file, a hub id, a released MemoryLLM checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch

from latentmem.decoder import linear
from latentmem.loading import released
from latentmem.loading.hub import config_of, from_transformers
from latentmem.loading.names import PACKAGED, check_model, path_of
from latentmem.loading.packaged import load_packaged
from latentmem.loading.trained import adapters_of, remembering, with_adapters
from latentmem.model.model import MemoryModel


def load(
    name: str = PACKAGED,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    adapters: str | None = "auto",
    quantize: str | None = None,
    coder: str | None = "auto",
) -> MemoryModel:
    """Load a language model that can read and write memories.

    Args:
        name: "smollm2-135m" (the packaged default), a local folder, a `.gguf` file, or a hub id such as
            "HuggingFaceTB/SmolLM2-360M-Instruct" or "YuWangX/memoryllm-8b-chat".
        dtype: "float32", "bfloat16" or "float16"; by default float32 on a CPU and bfloat16 elsewhere.
        device: for example "cpu" or "cuda"; by default the fastest that is there.
        adapters: "auto" takes the trained write/read pair that belongs to the model, if there is one: it comes with
            the package, or lies in the model's folder as `adapters.safetensors`. None is the untrained model; else
            the path of a pair that `latentmem train` made.
        quantize: "int8" for linear layers in 8 bits, float32 on the CPU only; its memories are its own.
        coder: what keeps updates in few bytes, the form "coded". "auto" takes the one that belongs to model and
            adapters, if there is one: it comes with the package, or lies in the model's folder as `coder.safetensors`.
            None: new memories keep 8 bits; else the path of one that `latentmem calibrate` made.

    Raises:
        ValueError: an unknown name, an architecture that is not supported, a damaged file; the message says what to do.
    """
    if quantize is not None:
        exact = load(name, dtype=dtype or "float32", device=device or "cpu", adapters=adapters, coder=None)
        return remembering(_quantized(exact, quantize), name, coder)
    own = adapters_of(name) if adapters == "auto" else None if adapters is None else path_of(adapters)
    where = _device(device) if device is not None else _fastest()
    kind = _dtype(dtype) if dtype is not None else (torch.float32 if where.type == "cpu" else torch.bfloat16)
    llm = _plain(name, kind, where, adapters=adapters)
    return remembering(llm if own is None else with_adapters(llm, own), name, coder)


def _quantized(llm: MemoryModel, how: str) -> MemoryModel:
    """The model with its linear layers in 8 bits: another identity, and other memories."""
    linear.quantize(llm.base, how)
    identity, trained = f"{how}-{llm.identity}", llm.trained
    return MemoryModel(
        llm.base,
        llm.tokenizer,
        name=llm.name,
        style=llm.prompts.style if llm.prompts else None,
        adapters=llm.adapters,
        trained=trained and replace(trained, pool=replace(trained.pool, model=identity)),
        shape=llm.shape,
        projectors=llm.retriever.projectors,
        identity=identity,
    )


def _plain(name: str, kind: torch.dtype, where: torch.device, adapters: str | None) -> MemoryModel:
    """A model by name, without adapters of ours."""
    if name == PACKAGED:
        return load_packaged(kind, where)
    path = check_model(name)
    if path.suffix == ".gguf":
        return from_transformers(path.parent, str(path), kind, where, gguf_file=path.name)
    source = str(path) if path.is_dir() else name
    config = config_of(source)
    if released.is_released(config):
        return released.load(source, config, kind, where, trained=adapters == "auto")
    return from_transformers(source, source, kind, where)


def _device(device: str | torch.device) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {str(device)!r} can not be used: {str(error).splitlines()[0]}") from None
    return where


def _fastest() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    kind = known.get(dtype) if isinstance(dtype, str) else dtype
    if kind is None or kind not in known.values():
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {dtype!r}.")
    return kind
