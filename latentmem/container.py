"""Safetensors files, written whole and verified when they are read.

write, read             a file: tensors, and a header of strings (safetensors calls it metadata)
to_bytes, from_bytes    the same, in memory; equal tensors and headers give equal bytes
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentmem.disk import replacing
from latentmem.errors import DamagedError

Buffer = bytearray | memoryview  # what can be read and, for torch, written
DTYPES = {  # in the order in which a file holds them, as the safetensors library writes it
    **{"I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16},
    **{"F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], *, private: bool = False) -> None:
    """Write a safetensors file; `private` and errors are those of `replacing`."""
    with replacing(path, private=private) as temporary, temporary.open("wb") as file:
        file.writelines(_parts(tensors, header))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file onto the CPU: its tensors and its header.

    Raises:
        DamagedError: the file is missing, not complete, or contradicts itself.
    """
    if not path.is_file():
        raise DamagedError(f"{path}: no such file.")
    with path.open("rb") as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        file.readinto(data)
    return from_bytes(data, str(path))


def to_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; equal tensors and headers give equal bytes."""
    return b"".join(_parts(tensors, header))


def _parts(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file: length of the JSON, the JSON, then each tensor."""
    order = list(DTYPES.values())
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    described: dict[str, object] = {"__metadata__": dict(header)}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.itemsize
        about = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        described[name] = about
    text = json.dumps(described, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text))
    yield text
    for name in names:
        yield _bits(tensors[name].detach().cpu().contiguous())


def _bits(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def from_bytes(data: Buffer, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file; the tensors are views of `data`.

    Args:
        data: the file, writable; it must stay as it is while the tensors are used.
        name: what an error calls it.

    Raises:
        DamagedError: the file is not complete, or contradicts itself.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        described = json.loads(bytes(memoryview(data)[8 : 8 + length]))
        header = described.pop("__metadata__", {})
        tensors, end = {}, 8 + length
        for key, about in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = about["data_offsets"]
            dtype, shape = DTYPES[about["dtype"]], about["shape"]
            size = math.prod(shape) * dtype.itemsize
            if 8 + length + start != end or stop - start != size or min(shape, default=0) < 0:
                raise ValueError(f"the tensor {key!r} does not lie where it should")
            flat = torch.empty(0, dtype=dtype)
            if stop > start:  # torch makes no view of nothing
                flat = torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=end)
            tensors[key] = flat.reshape(shape)
            end += stop - start
        if end != len(data) or not all(type(value) is str for value in header.values()):
            raise ValueError(f"expected {end} bytes, got {len(data)}")
    except (struct.error, KeyError, TypeError, AttributeError, RecursionError, RuntimeError, ValueError) as error:
        raise DamagedError(f"{name} is not a complete safetensors file ({error}). Restore it from a copy.") from error
    return tensors, header


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of a text and of contiguous tensors on the CPU: names, dtypes, shapes and bits, in their order."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bits(tensor))
    return digest.hexdigest()
