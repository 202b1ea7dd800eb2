"""A memory <-> one safetensors file, complete and verified; never pickle (letters: `latentmem.core`)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import Tensor

from latentmem.core.memory import Memory, Source

FORMAT = "latentmem memory 1"
Buffer = bytearray | mmap.mmap  # what can be read and, for torch, written
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32},
}
TENSORS = ("slots", "births", "origins")
KINDS: dict[str, type] = {
    **dict.fromkeys(("N", "K", "compression", "seed", "updates", "tokens"), int),
    **dict.fromkeys(("preset", "choice", "model", "adapters", "tokenizer", "model_name", "parent"), str),
    "sources": list,
    "quota": float,
}
LATER: dict[str, Any] = {"choice": "last", "quota": 0.5}  # what older files of this format do not say, and mean
HEADER = tuple(f.name for f in fields(Memory) if f.name not in (*TENSORS, "version"))


def save(memory: Memory, path: str | Path) -> Memory:
    """Write a memory to `path`: to a temporary file beside it, flushed to disk, then renamed over it.

    Args:
        path: the file, by convention `NAME.safetensors`; its folder must exist.

    Returns:
        The same memory with `version`, the checksum that the file carries.

    Raises:
        ValueError: the folder does not exist.
        OSError: the disk is full or not writable; what stood at `path` before is untouched.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; create it first.")
    tensors, metadata = _parts(memory)
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # a full disk, for example: the library hides the number of the error
            raise OSError(errno.EIO, f"the memory could not be written ({error})", str(path)) from error
    return replace(memory, version=metadata["checksum"])


def to_bytes(memory: Memory) -> bytes:
    """What `save` would write, but equal bytes for equal memories, so that a hash of them names the memory."""
    return canonical(*_parts(memory))


def canonical(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """One safetensors file, its metadata in a fixed order: the library's own changes from process to process."""
    data = save_bytes(tensors)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.dumps({"__metadata__": metadata} | json.loads(data[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((struct.pack("<Q", len(header)), header, memoryview(data)[end:]))


def opened_bytes(data: Buffer, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file; the tensors are views of `data`, nothing is copied.

    Args:
        data: the file, writable; it must stay as it is while the tensors are used.
        name: what an error calls it.

    Raises:
        ValueError: it is not complete, or says something that can not be.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(bytes(memoryview(data)[8 : 8 + length]))
        metadata = header.pop("__metadata__", {})
        tensors, end = {}, 8 + length
        for key, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = about["data_offsets"]
            dtype, shape = DTYPES[about["dtype"]], about["shape"]
            if 8 + length + start != end or stop - start != math.prod(shape) * dtype.itemsize or min(shape) < 0:
                raise ValueError(f"the tensor {key!r} does not lie where it should")
            flat = torch.empty(0, dtype=dtype)
            if stop > start:  # torch makes no view of nothing
                flat = torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=end)
            tensors[key] = flat.reshape(shape)
            end += stop - start
        if end != len(data) or not all(type(value) is str for value in metadata.values()):
            raise ValueError(f"expected {end} bytes, got {len(data)}")
    except (struct.error, KeyError, TypeError, AttributeError, RecursionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} is not a complete safetensors file ({error}). Restore it from a copy.") from error
    return tensors, metadata


def from_bytes(data: Buffer, name: str, *, verified: bool = False) -> Memory:
    """Read a memory from the bytes of its file.

    Args:
        data, name: as in `opened_bytes`; the memory's tensors are views of `data`.
        verified: the caller has found a hash of `data` to be right, so the checksum is not computed.

    Raises:
        ValueError: as `load`.
    """
    tensors, metadata = opened_bytes(data, name)
    return _memory(name, tensors, *_checked(name, metadata), verified)


def load(path: str | Path) -> Memory:
    """Read a memory back, to the bit, onto the CPU.

    Raises:
        ValueError: no such file, not a memory, truncated, altered, or of a newer format; the message says which.
    """
    path = Path(path)
    with _opened(path) as file:  # once: another process may put the next version in its place meanwhile
        header, checksum, _ = _header(path, file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return _memory(path, tensors, header, checksum)


def _parts(memory: Memory) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {name: getattr(memory, name).detach().cpu().contiguous() for name in TENSORS}
    header = json.dumps({name: getattr(memory, name) for name in HEADER}, default=asdict, sort_keys=True)
    return tensors, {"format": FORMAT, "memory": header, "checksum": _checksum(header, tensors)}


def _memory(
    path: str | Path, tensors: dict[str, Any], header: dict[str, Any], checksum: str, verified: bool = False
) -> Memory:
    if set(tensors) != set(TENSORS):
        raise ValueError(f"{path} holds the tensors {sorted(tensors)}; a memory has {sorted(TENSORS)}.")
    if not verified and _checksum(json.dumps(header, sort_keys=True), tensors) != checksum:
        raise ValueError(f"{path} was altered or damaged: its checksum does not match. Restore it from a copy.")
    try:
        header = LATER | header
        for name, kind in KINDS.items():
            if type(header[name]) is not kind:
                raise ValueError(f"{name} is {header[name]!r}")
        sources = tuple(Source(**source) for source in header.pop("sources"))
        for source in sources:
            if list(map(type, asdict(source).values())) != [str, int, int, bool]:
                raise ValueError(f"a source is {source}")
        memory = Memory(**tensors, **header, sources=sources, version=checksum)
        if memory.M and not -1 <= int(memory.origins.min()) <= int(memory.origins.max()) < len(sources):
            raise ValueError("a slot has an unknown source")
    except (TypeError, ValueError) as error:  # a checksum is no signature: whoever writes the file can write both
        raise ValueError(f"{path} was altered or damaged: {error}. Restore it from a copy.") from error
    return memory


def read_header(path: str | Path) -> tuple[dict[str, Any], str, int]:
    """What a snapshot says of itself, not yet verified: (fields of `Memory` without tensors, checksum, M)."""
    with _opened(Path(path)) as file:
        return _header(Path(path), file)


def _header(path: Path, file: Any) -> tuple[dict[str, Any], str, int]:
    shape = file.get_slice("slots").get_shape() if "slots" in file.keys() else []  # noqa: SIM118 - no mapping
    return *_checked(path, file.metadata() or {}), shape[1] if len(shape) == 3 else 0


def _checked(path: str | Path, metadata: dict[str, str]) -> tuple[dict[str, Any], str]:
    found = metadata.get("format", "")
    if found != FORMAT:
        raise ValueError(f"{path} is not a memory of this version: expected the format {FORMAT!r}, got {found!r}.")
    try:
        header = json.loads(metadata["memory"])
        complete = isinstance(header, dict) and set(LATER | header) == set(HEADER) and metadata["checksum"]
    except (KeyError, ValueError):
        complete = False
    if not complete:
        raise ValueError(f"{path} was altered or damaged: its header is not complete. Restore it from a copy.")
    return header, metadata["checksum"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path`; on success flush it and rename it over `path`, else remove it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # elsewhere a folder can not be opened, and the rename is as durable as it gets
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}). Restore it from a copy.") from error


def _checksum(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in TENSORS:
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
