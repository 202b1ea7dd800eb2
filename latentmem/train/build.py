"""A config -> what a run is made of: the model with its adapters, the learner, the pool, the optimizer, the result."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from latentmem.core import memory as memories
from latentmem.core.memory import Memory
from latentmem.core.presets import PRESETS
from latentmem.core.settings import OF_USE
from latentmem.decoder import adapters as pairs
from latentmem.decoder.adapters import READ
from latentmem.decoder.hooks import HOOKS_STAY, checkpoint_layers
from latentmem.files import adapters as files
from latentmem.loading import load as loading
from latentmem.model.model import MemoryModel
from latentmem.train.config import Config
from latentmem.train.learner import BIRTH, Learner
from latentmem.train.retriever import Retriever


def model_of(config: Config, device: torch.device) -> MemoryModel:
    """The model with its adapters in float32: those that the config names, or fresh ones, the same for the same seed.

    Raises:
        ValueError: adapters to go on from that have another rank, scale or place than the config says, or a retriever
            of another size.
    """
    llm = loading.load(config.model, dtype=config.dtype, device=device, adapters=config.adapters)
    lora = config.lora
    if config.adapters:
        _check_adapters(config, llm)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            llm.adapters = pairs.insert(
                llm.base, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, target_modules=list(lora.target_modules)
            )
    assert llm.adapters is not None
    for _, weight in llm.adapters.parameters():
        weight.data = weight.data.float()
        weight.requires_grad_(not config.retriever.alone)
    if lora.dropout:
        llm.base.train()
    return llm


def _check_adapters(config: Config, llm: MemoryModel) -> None:
    if llm.adapters is None:
        raise ValueError(f"adapters: {config.adapters!r}, and {config.model} comes with none. Give a file, or null.")
    layer, own = llm.adapters.layers[0], {name.split(".lora_")[0].split(".")[-1] for name in pairs.weights(llm.base)}
    theirs = [layer.r[READ], layer.lora_alpha[READ], sorted(own)]
    mine = [config.lora.r, config.lora.alpha, sorted({name.split(".")[-1] for name in config.lora.target_modules})]
    if theirs != mine:
        raise ValueError(f"lora (r, alpha, target_modules) must be as in {config.adapters!r}: {theirs}, got {mine}.")
    if llm.born_full != PRESETS[config.memory.preset].born_full:
        raise ValueError(f"memory.preset is {config.memory.preset!r}, and {config.adapters!r} are of the other one.")
    if llm.retriever.projectors is not None:
        first, second = llm.retriever.projectors.query[0]
        sizes = {"width": len(second), "hidden": len(first)}
        if config.retriever.sizes != sizes:
            raise ValueError(f"retriever must be as in {config.adapters!r}: {sizes}, got {config.retriever.sizes}.")


def learner_of(config: Config, llm: MemoryModel) -> Learner:
    """The learner for a config; in "paper", bos begins as the sink and mark as zeros, unless they are trained."""
    marked = not PRESETS[config.memory.preset].holds_inputs
    learner = Learner(
        llm,
        config.memory,
        bos=llm.first.detach().clone() if marked else None,
        mark=llm.mark.detach().clone() if marked else None,
        retriever=_retriever_of(config, llm),
        weight=config.retriever.weight,
    )
    for part in (learner.bos, learner.mark):
        if part is not None:
            part.requires_grad_(not config.retriever.alone)
    return learner


def _retriever_of(config: Config, llm: MemoryModel) -> Retriever | None:
    """The retriever of the adapters that are gone on from, or else a fresh one."""
    known = llm.retriever.projectors
    if not config.retriever.width:
        return None
    if known is not None:
        return Retriever(known.query, known.key)
    d = llm.decoder
    return Retriever.fresh(d.L, d.d, **config.retriever.sizes, seed=config.seed, device=d.device)


def pool_of(config: Config, llm: MemoryModel) -> Memory:
    """An empty pool."""
    settings, d = replace(config.memory.settings(), seed=config.seed), llm.decoder
    return memories.empty(d.L, d.d, settings, dtype=d.dtype, device=d.device)


def recompute(learner: Learner) -> None:
    """Gradient checkpointing of each layer, replayed under the adapter of its forward pass and behind its memory.

    Raises:
        ValueError: the preset "paper" with a transformers that recomputes a layer without what was done to its input.
    """
    if not learner.rules.holds_inputs and not HOOKS_STAY:
        raise ValueError(
            f"checkpointing of the preset 'paper' needs a newer transformers than {transformers.__version__}, "
            f"5.23 for example. Install it, or set checkpointing to false."
        )
    adapters = learner.llm.adapters
    assert adapters is not None
    learner.base.train()  # transformers recomputes in training mode only; the adapters' dropout is as configured
    checkpoint_layers(learner.llm.decoder, adapters)


def optimizer_of(config: Config, parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with a group each for what reads, writes and retrieves; a group's `share` is its part of the rate."""
    s = config.steps
    retrieves = {name for name in parameters if name.startswith(pairs.RETRIEVER)}
    reads = {name for name in parameters if f".{READ}." in name}
    shares = ((reads, 1.0), (parameters.keys() - reads - retrieves, s.write), (retrieves, config.retriever.lr / s.lr))
    groups = [{"params": [p for n, p in parameters.items() if n in names], "share": x} for names, x in shares if names]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(s.betas[0], s.betas[1]), weight_decay=s.weight_decay)


def rate(config: Config, step: int) -> float:
    """The learning rate of a step, 0 the first: up linearly, level, and down linearly to 0 at the end."""
    s = config.steps
    up = min(1.0, (step + 1) / max(1, s.warmup))
    down = min(1.0, (s.total - step) / max(1, round(s.decay * s.total)))
    return s.lr * min(up, down)


def save_result(path: Path, config: Config, llm: MemoryModel, state: dict[str, Tensor], more: dict[str, Any]) -> None:
    """Write trained adapters in bfloat16, with all that belongs to them.

    Args:
        state: of a run; tensors whose names begin with "model." count.
        more: facts of the run.
    """
    m = config.memory  # an update in use is as long as the longest in training
    K = min(m.K, PRESETS[m.preset].slots_of(config.texts.longest, m.K, m.compression))
    settings = asdict(replace(m.settings(), K=K))
    facts = {
        "model": llm.identity,
        "model_name": llm.name,
        "r": config.lora.r,
        "alpha": config.lora.alpha,
        "target_modules": list(config.lora.target_modules),
        "memory": {name: value for name, value in settings.items() if name not in OF_USE},
        "birth": BIRTH if PRESETS[m.preset].born_full else "",
        **({"retriever": config.retriever.sizes} if config.retriever.width else {}),
        **more,
    }
    model = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    files.save(path, {name.removeprefix("base."): t.to(torch.bfloat16) for name, t in model.items()}, facts)
