"""One safetensors file: written atomically and durably, verified when it is read."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes
from torch import Tensor

Buffer = bytearray | mmap.mmap  # what can be read and, for torch, written
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I8": torch.int8},
}


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
