"""`latentmem calibrate`: files of texts -> a coder; a run that is stopped or killed goes on.

OUT         the coder
OUT.sums    what was seen (`calibration.Sums`), written every `EVERY` seconds and at the end. Whoever asks for more
            tokens, for another step or for other sketches goes on from there.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentmem.coding.coder import FORMAT, Coder
from latentmem.coding.sketch import BITS
from latentmem.disk import check_folder
from latentmem.errors import OtherModelError
from latentmem.model.model import MemoryModel
from latentmem.train import pieces
from latentmem.train.calibration import ASKED, STEP, Calibration, Progress, Sums, fit, thinned

TOKENS = 100_000
EVERY = 120  # seconds from one file of sums to the next
TRIED = 1024  # slots of the sample that are coded for `Result`
SAME = ("model", "adapters", "tokenizer", "dtype")  # what sums have of the model


@dataclass(frozen=True)
class Result:
    """What a calibration has made.

    Args:
        coder: as it is in the file.
        size: of the file, in bytes.
        nbytes: of a code, for each token: words, states, ids and what has no symbol; of slots that were seen.
        error: of keys and values of a token in a layer, as a share of their length; the mean over slots that were seen.
    """

    coder: Coder
    size: int
    nbytes: float
    error: float

    @property
    def coefficients(self) -> int:
        return sum(len(group.scale) for group in self.coder.groups)


def calibrate(
    llm: MemoryModel,
    files: Sequence[Path],
    out: Path,
    tokens: int = TOKENS,
    step: float = STEP,
    bits: int = BITS,
    progress: Progress | None = None,
    note: Callable[[str], object] = lambda sentence: None,
) -> Result:
    """Make a coder of a model from texts, or go on with one.

    Args:
        llm: the model with the adapters whose updates are to be coded.
        files: `.jsonl` or `.jsonl.gz` with "text" in each row, or `.txt`.
        out: file of the coder; what was seen lies beside it.
        tokens: tokens that are written into memories, at least.
        step: of coefficients; a smaller step takes more bytes and errs less.
        bits: of a sketch.
        progress: called with (tokens done, tokens in all).
        note: called with sentences on what is not as expected.

    Raises:
        ValueError: a model that writes no memories of the preset "exact", files that can not be read or are too short,
            something else than a coder at `out`, or a step that is larger than all coefficients.
        OtherModelError: the sums beside `out` are of another model.
        DamagedError: the sums beside `out` are damaged.
    """
    _check(llm, files, out, tokens, step, bits)
    sums = sums_path(out)
    calibration = _begun(llm, files, sums)
    _see(calibration, files, sums, tokens, progress, note)
    coder = fit(calibration, step, _about(calibration.sums, llm), bits)
    coder.save(out)
    return Result(coder, out.stat().st_size, *_tried(calibration, coder))


def sums_path(out: Path) -> Path:
    """Where the sums of a coder's file lie."""
    return out.with_name(f"{out.name}.sums")


def check_files(files: Sequence[Path], out: Path) -> None:
    """Refuse what is no file of texts, and a place of a coder where something else lies; a ValueError."""
    pieces.check(files)
    check_folder(out)
    if out.exists() and not _is_coder(out):
        raise ValueError(f"{out} exists and is no coder of this version. Choose another file, or remove {out}.")


def _is_coder(path: Path) -> bool:
    """Whether a file says that it is a coder of this version; only its header is read."""
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def _check(llm: MemoryModel, files: Sequence[Path], out: Path, tokens: int, step: float, bits: int) -> None:
    check_files(files, out)
    llm.prompts_or_raise()
    if llm.born_full or llm.decoder.L < 2:
        raise ValueError(
            "a coder is for memories of the preset 'exact' of a model with two layers or more, and this model has "
            f"{'a pool of the preset paper' if llm.born_full else 'one layer'}. Load another model."
        )
    if tokens < 1 or not 0 < step < float("inf") or bits < 8 or bits % 8:
        raise ValueError(
            f"tokens must be 1 or more, step above 0, and bits a multiple of 8: got tokens={tokens}, step={step} and "
            f"bits={bits}."
        )


def _begun(llm: MemoryModel, files: Sequence[Path], path: Path) -> Calibration:
    """The calibration that a file of sums goes on with, or a new one.

    Raises:
        ValueError: the sums are of another model, of other texts, or damaged.
    """
    mine = _described(llm, files)
    if not path.exists():
        calibration = Calibration(llm)
        calibration.sums.about = mine | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
        return calibration
    sums = Sums.load(path)
    for what in SAME:
        if sums.about.get(what) != mine[what]:
            raise OtherModelError(
                f"{path} belongs to another {what.removesuffix('s')} ({sums.about.get(what, '')[:12] or 'none'}) than "
                f"this model ({mine[what][:12] or 'none'}). Load the same model, choose another file for the coder, or "
                f"remove {path}."
            )
    if sums.about.get("texts") != mine["texts"]:
        raise ValueError(
            f"{path} belongs to other texts ({sums.about.get('names')}). Give the same files in the same order and "
            f"unchanged, choose another file for the coder, or remove {path}."
        )
    return Calibration(llm, sums)


def _described(llm: MemoryModel, files: Sequence[Path]) -> dict[str, str]:
    """What sums are made of: the model, and the texts with their hashes."""
    hashes = []
    for file in files:
        with file.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    names = ", ".join(file.name for file in files)
    return {**llm.identities, "dtype": str(llm.decoder.dtype)[6:], "texts": json.dumps(hashes), "names": names}


def _see(
    calibration: Calibration,
    files: Sequence[Path],
    path: Path,
    tokens: int,
    progress: Progress | None,
    note: Callable[[str], object],
) -> None:
    """Take memories into the sums until they hold so many tokens."""
    sums, saved, kept = calibration.sums, time.monotonic(), calibration.sums.memories
    memories = islice(pieces.fillings(calibration.llm, files, calibration.slots, note), kept, None)
    while sums.tokens < tokens:
        if progress is not None:
            progress(sums.tokens, tokens)
        texts, following = next(memories)
        calibration.see(texts, following[: 2 * ASKED])
        if time.monotonic() - saved >= EVERY:
            sums.save(path)
            saved, kept = time.monotonic(), sums.memories
    if progress is not None:
        progress(tokens, tokens)
    if kept < sums.memories:
        sums.save(path)


def _about(sums: Sums, llm: MemoryModel) -> dict[str, str]:
    """What a coder says of itself."""
    counts = {name: str(getattr(sums, name)) for name in ("tokens", "answers", "memories")}
    return {**llm.identities, "name": llm.name, "texts": sums.about["names"], **counts, "date": sums.about["date"]}


@torch.no_grad()
def _tried(calibration: Calibration, coder: Coder) -> tuple[float, float]:
    """Bytes a token and mean relative error, of a part of the sample."""
    kv = calibration.kv(thinned(calibration.sums.sample, TRIED))
    code, decoded = coder.encode(torch.zeros(kv[0][0].shape[2], dtype=torch.int32), kv)
    errors = [_relative(mine, theirs) for mine, theirs in zip(kv[1:], decoded[1:], strict=True)]
    return code.nbytes / len(code), float(torch.stack(errors).mean())


def _relative(pair: tuple[Tensor, Tensor], decoded: tuple[Tensor, Tensor]) -> Tensor:
    """|decoded - x| / |x| of each slot, x its keys and values, [k]."""
    x, error = (torch.cat([part.transpose(1, 2).flatten(2) for part in one], 2)[0].float() for one in (pair, decoded))
    return (error - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-9)
