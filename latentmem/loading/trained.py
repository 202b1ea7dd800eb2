"""The default memory of a loaded model, and what belongs to a model: trained adapters, retriever, pool, coder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentmem.coding.codec import register
from latentmem.coding.coder import Coder
from latentmem.core import memory as memories
from latentmem.core.memory import Memory
from latentmem.core.presets import PRESETS
from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.decoder import adapters, linear
from latentmem.decoder.decoder import Decoder
from latentmem.files import adapters as files
from latentmem.loading.names import ADAPTERS, PACKAGED, check_adapters, path_of
from latentmem.longterm.search import Projectors
from latentmem.model.backbone import Trained
from latentmem.model.known import Evidence
from latentmem.model.model import MemoryModel

TRAINED, CODER, EVIDENCE = Path(__file__).parent.parent / "trained", "coder.safetensors", "known.json"
DEFAULTS = MemorySettings(N=1536, longterm=LongTermSettings(R=512), form="int8")  # of new memories


def adapters_of(name: str) -> Path | None:
    """The trained adapters that belong to a model: those of the package, or `adapters.safetensors` in its folder."""
    return _beside(name, ADAPTERS)


def _beside(name: str, file: str) -> Path | None:
    """A file that belongs to a model, if there is one."""
    path = (TRAINED / name if name == PACKAGED else path_of(name)) / file
    return path if path.is_file() else None


def remembering(llm: MemoryModel, name: str, coder: str | None) -> MemoryModel:
    """The model with the defaults of new memories, with its coder, and with what tells whether an answer is known.

    Args:
        name: by which it was loaded.
        coder: as in `load`.

    Raises:
        ValueError: the coder can not be read, or was made for another model, other adapters or another search.
    """
    llm.defaults = DEFAULTS
    if (evidence := _beside(name, EVIDENCE)) is not None:
        theirs = Evidence.load(evidence)
        same = (theirs.model, theirs.adapters) == (llm.identities["model"], llm.identities["adapters"])
        llm.evidence = theirs if same else None
    path = _beside(name, CODER) if coder == "auto" else None if coder is None else path_of(coder)
    if path is None:
        return llm
    known = Coder.load(path)
    about, mine = known.about, {key: llm.identities[key] for key in ("model", "adapters")}
    layers = known.sketch.layer, llm.retriever.layer_sketched
    if all(about.get(key) == value for key, value in mine.items()):
        if layers[0] == layers[1]:
            llm.coder, llm.defaults = register(known), replace(DEFAULTS, form="coded")
        elif coder != "auto":
            raise ValueError(
                f"the coder {path} sketches layer {layers[0]}, and this version of latentmem searches layer "
                f"{layers[1]}. Make it again with `latentmem calibrate`, or leave it out."
            )
    elif coder != "auto":
        raise ValueError(
            f"the coder {path} was made for the model {about.get('model', '')[:12]} with the adapters "
            f"{about.get('adapters', '')[:12] or 'none'}, and this is {mine['model'][:12]} with "
            f"{mine['adapters'][:12] or 'none'}. Make one with `latentmem calibrate`, or leave it out."
        )
    return llm


def with_adapters(llm: MemoryModel, path: Path) -> MemoryModel:
    """The model with adapters that `latentmem train` made.

    Raises:
        ValueError: they can not be read, belong to another model, or the model has adapters already.
    """
    file = check_adapters(path)
    if llm.adapters is not None:
        raise ValueError(f"{llm.name} has adapters of its own: leave the others out.")
    tensors, facts = files.load(file)
    if facts["model"] != llm.identity:
        raise ValueError(
            f"the adapters {file} belong to {facts['model_name']} ({facts['model'][:12]}), and this model is "
            f"{llm.name} ({llm.identity[:12]}). Load that model, or leave the adapters out."
        )
    llm.adapters = adapters.load_into(llm.base, tensors, facts)
    llm.retriever.projectors = _retriever(tensors, facts, llm.decoder)
    linear.choose(llm.base)
    settings = MemorySettings.of(facts["memory"])
    if not PRESETS[facts["memory"]["preset"]].born_full:
        llm.shape = settings
        return llm
    like: Any = {"device": llm.decoder.device, "dtype": llm.decoder.dtype}
    bos, mark = tensors["bos"].to(**like), tensors["mark"].to(**like)
    empty = memories.empty(llm.decoder.L, llm.decoder.d, settings, **like)
    pool = replace(empty, model_name=llm.name, **llm.identities)  # type: ignore[arg-type]
    return llm.with_trained(
        Trained(bos, mark, fill_pool(llm.with_trained(Trained(bos, mark, pool)), pool, facts["birth"]))
    )


def fill_pool(llm: MemoryModel, pool: Memory, text: str) -> Memory:
    """A pool of the preset "paper" that is full from birth, as those of the released checkpoints are.

    Args:
        pool: empty.
        text: is written until the pool is full, and repeated to twice the slots of an update: of a shorter text the
            slots of the update before go through the layers again, and grow with each of these writes.
    """
    ids = llm.prompts_or_raise().written(text)
    ids = (ids * -(-2 * pool.K // len(ids)))[: pool.piece]
    while pool.M < pool.N:
        pool = llm.write_ids(pool, ids, "birth")
    old = torch.zeros_like(pool.births)
    return replace(pool, births=old, origins=old - 1, sources=(), updates=0, tokens=0)


def _retriever(tensors: dict[str, Tensor], facts: dict[str, Any], decoder: Decoder) -> Projectors | None:
    """The retriever that was trained with adapters, in the model's dtype; None if there is none.

    Raises:
        ValueError: weights are missing, unknown or of another shape; all are named.
    """
    theirs = {name: tensor for name, tensor in tensors.items() if name.startswith(adapters.RETRIEVER)}
    sizes, d, each = facts.get("retriever"), decoder.d, range(decoder.L)
    shapes = {0: (sizes["hidden"], d), 1: (sizes["width"], sizes["hidden"])} if sizes else {}
    own = {f"{adapters.RETRIEVER}{kind}.{i}.{k}": shapes[k] for kind in ("query", "key") for i in each for k in shapes}
    adapters.check_shapes({name: torch.Size(shape) for name, shape in own.items()}, theirs)

    def both(kind: str) -> list[tuple[Tensor, Tensor]]:
        like: Any = {"device": decoder.device, "dtype": decoder.dtype}
        first, second = ([theirs[f"{adapters.RETRIEVER}{kind}.{i}.{k}"].to(**like) for i in each] for k in (0, 1))
        return list(zip(first, second, strict=True))

    return Projectors(both("query"), both("key")) if sizes else None
