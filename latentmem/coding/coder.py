"""Keys and values of an update <-> a code of about a twentieth of their bytes.

    x [D]    keys and values of one token in a group of neighbouring layers, before rotation, less their mean
    z [r]    coefficients: of all z with F-distance |x - z basis|_F least the least one, F the Fisher information of x
    q [r]    z / step, rounded; one step for all coefficients of all groups, since F measures them all in nats
    code     q of all groups by `coding.rans`, with the counts that calibration saw; few large q stand apart (escapes)

Basis and F come from `latentmem calibrate`: the basis are the directions in which A x varies most, where A'A = F. To
second order the loss is the mean of err' F err / 2, so bits go where the model's answers depend on them.

Layer 0 is no part of a code: its input is the embedding of a token, whose id is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentmem import container
from latentmem.coding import rans
from latentmem.coding.blocks import in_blocks
from latentmem.coding.sketch import NAMES, Sketch
from latentmem.decoder.attention import KV
from latentmem.disk import replace_bytes
from latentmem.errors import DamagedError

FORMAT = "latentmem coder 1"
LARGEST = 126  # |q| up to which a coefficient may have a symbol; symbol 0 is the escape, ZERO is that of q = 0
ZERO = LARGEST + 1


@dataclass(frozen=True, eq=False)
class Code:
    """The k slots that one update writes, as they are kept.

    Args:
        ids: the token whose embedding each slot of layer 0 is, [k] int32.
        states: the last states of each token's lanes, [k, rans.STRIDE] int32 (bits of uint32).
        words: what the coder wrote, int16 (bits of uint16).
        escapes: coefficients that have no symbol, in the order of coefficients, then of tokens, int32.
    """

    ids: Tensor
    states: Tensor
    words: Tensor
    escapes: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"ids": self.ids, "states": self.states, "words": self.words, "escapes": self.escapes}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, eq=False)
class Group:
    """The transform of neighbouring layers.

    Args:
        layers: their numbers.
        mean: of keys and values, [D]; each layer's keys, then its values, D / layers of them.
        basis: directions in 8 bits, [r, D] int8.
        scale: by which each direction is multiplied, [r].
        fisher: F of each layer, [layers, D / layers, D / layers], symmetric.
    """

    layers: tuple[int, ...]
    mean: Tensor
    basis: Tensor
    scale: Tensor
    fisher: Tensor

    @cached_property
    def directions(self) -> Tensor:
        """[r, D] float32."""
        return self.basis.float() * self.scale[:, None]

    @cached_property
    def whole_directions(self) -> Tensor:
        """The directions before they are scaled, [r, D] bfloat16: whole numbers, which it holds exactly."""
        return self.basis.bfloat16()

    def keys_values(self, whole: Tensor, step: float, dtype: torch.dtype) -> Tensor:
        """Keys and values [k, D] float32 of whole coefficients [k, r], computed as a model of this type computes."""
        z = whole * (step * self.scale if dtype == torch.bfloat16 else step)
        if dtype == torch.bfloat16:
            return in_blocks(z.bfloat16(), self.whole_directions).float() + self.mean
        return in_blocks(z, self.directions) + self.mean

    @cached_property
    def analysis(self) -> Tensor:
        """What makes z of x, [D, r] float32: the least-squares solution under F."""
        directions = self.directions
        parts = directions.unflatten(1, (len(self.layers), -1))
        weighted = torch.einsum("rla,lab->rlb", parts, self.fisher).flatten(1)  # directions F
        return torch.linalg.solve(weighted @ directions.T, weighted).T.contiguous()  # the first is almost the identity


class Coder:
    """The code of one model's updates.

    Args:
        groups: all layers but the first, in groups.
        step: of all coefficients, in units of the root of a nat.
        tables: expected symbols of all coefficients, in the order of the groups.
        sketch: by which slots are searched.
        about: what it was made of: identities of model and adapters, texts, date.
    """

    def __init__(
        self, groups: Sequence[Group], step: float, tables: rans.Tables, sketch: Sketch, about: Mapping[str, str]
    ) -> None:
        self.groups, self.step, self.tables = tuple(groups), step, tables
        self.sketch, self.about = sketch, dict(about)
        self._data: container.Buffer | None = None  # of the file that it was read from

    # --- code -------------------------------------------------------------------------------------------------------

    def encode(self, ids: Tensor, kv: Sequence[KV]) -> tuple[Code, list[KV]]:
        """The code of an update.

        Args:
            ids: the token of each slot, [k].
            kv: keys before rotation, and values, of each layer, [1, heads, k, head width] each.

        Returns:
            The code, and what `decode` makes of it, to the bit.

        Raises:
            ValueError: keys or values that are not finite, or far larger than those of the calibration.
        """
        whole = torch.cat([self._whole(group, _rows(group, kv)) for group in self.groups], 1)
        numbers = whole.T.numpy()  # [c, k]
        beyond = self._beyond(numbers)
        symbols = np.where(beyond, 0, numbers + ZERO).astype(np.uint8)
        states, words = rans.encode(symbols, self.tables)
        escapes = torch.from_numpy(numbers[beyond].astype(np.int32))
        code = Code(ids.cpu().int(), _signed(states.T, np.int32), _signed(words, np.int16), escapes)
        return code, self._made(whole.float(), [(keys[:, :, :0], values[:, :, :0]) for keys, values in kv])

    def _whole(self, group: Group, rows: Tensor) -> Tensor:
        """Whole coefficients of keys and values [k, D], [k, r] int32."""
        whole = (in_blocks(rows - group.mean, group.analysis) / self.step).round()
        if not bool((whole.abs() < 1 << 31).all()):
            raise ValueError(
                "keys or values are not finite, or too large for this coder: load the model with dtype='bfloat16' or "
                "'float32', or keep updates in another form."
            )
        return whole.int()

    @cached_property
    def _limits(self) -> NDArray[np.int32]:
        """|q| up to which each coefficient has a symbol, [c, 1]."""
        coded = self.tables.counts[:, ZERO:] > 0
        return (coded.sum(1).astype(np.int32) - 1)[self.tables.kinds][:, None]

    def _beyond(self, numbers: NDArray[np.int32]) -> NDArray[np.bool_]:
        return np.abs(numbers) > self._limits

    def decode(self, codes: Sequence[Code], like: Sequence[KV]) -> list[KV]:
        """Keys and values of several codes, one behind the other, in all layers but the first.

        Args:
            like: of each layer keys and values of no slot, which say shape and type.

        Returns:
            As `encode` takes them; the first layer has none.

        Raises:
            DamagedError: a code that was altered.
        """
        parts = [(code.states.numpy().view(np.uint32).T, code.words.numpy().view(np.uint16)) for code in codes]
        numbers = [self._numbers(s, c) for s, c in zip(rans.decode(parts, self.tables), codes, strict=True)]
        return self._made(torch.from_numpy(np.concatenate(numbers, 1).T.astype(np.float32)), like)

    def _made(self, whole: Tensor, like: Sequence[KV]) -> list[KV]:
        """Keys and values of whole coefficients [k, c] float32."""
        decoded = list(like)
        parts = whole.split([len(group.scale) for group in self.groups], 1)
        for group, z in zip(self.groups, parts, strict=True):
            first = like[group.layers[0]][0]
            rows = group.keys_values(z, self.step, first.dtype).to(first.device, first.dtype)
            for i, row in zip(group.layers, rows.chunk(len(group.layers), 1), strict=True):
                keys, values = like[i]
                both = row.split([width(keys), width(values)], 1)
                decoded[i] = (headed(both[0], keys), headed(both[1], values))
        return decoded

    def _numbers(self, symbols: NDArray[np.uint8], code: Code) -> NDArray[np.int32]:
        numbers, beyond = symbols.astype(np.int32) - ZERO, symbols == 0
        if int(beyond.sum()) != len(code.escapes):
            raise DamagedError("a code is damaged: its large coefficients are not all there. Restore it from a copy.")
        numbers[beyond] = code.escapes.numpy()
        return numbers

    # --- file -------------------------------------------------------------------------------------------------------

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {"counts": _signed(self.tables.counts, np.int16), "kinds": torch.from_numpy(self.tables.kinds)}
        for g, group in enumerate(self.groups):
            width = group.fisher.shape[1]
            lower = torch.tril_indices(width, width)
            tensors |= {
                f"{g}.mean": group.mean,
                f"{g}.basis": group.basis,
                f"{g}.scale": group.scale,
                f"{g}.fisher": group.fisher[:, lower[0], lower[1]].bfloat16(),
            }
        tensors |= {f"sketch.{name}": tensor for name, tensor in self.sketch.tensors.items()}
        layers, searched = [group.layers for group in self.groups], self.sketch.layer
        values = {"step": self.step, "layers": layers, "searched": searched, "about": self.about}
        return tensors, {"format": FORMAT, "coder": json.dumps(values, sort_keys=True)}

    def to_bytes(self) -> bytes:
        """The coder as a safetensors file: the one that was read; equal coders that were made give equal bytes."""
        return container.to_bytes(*self._parts()) if self._data is None else bytes(self._data)

    @cached_property
    def file(self) -> tuple[str, int]:
        """The sha256 of its file, and the file's bytes."""
        return _hashed(self.to_bytes())

    @property
    def identity(self) -> str:
        """The sha256 of its file."""
        return self.file[0]

    def save(self, path: Path) -> None:
        """Write the coder to a file, atomically."""
        replace_bytes(path, self.to_bytes())

    @staticmethod
    def from_bytes(data: container.Buffer, name: str) -> Coder:
        """Read a coder back; `name` is what an error calls it.

        Raises:
            DamagedError: it is no coder, or not complete.
        """
        tensors, header = container.from_bytes(data, name)
        if header.get("format") != FORMAT:
            raise DamagedError(
                f"{name} is no coder of this version: expected {FORMAT!r}, got {header.get('format')!r}."
            )
        try:
            values = json.loads(header["coder"])
            groups = [_group(tensors, g, layers) for g, layers in enumerate(values["layers"])]
            tables = rans.Tables(tensors["counts"].numpy().view(np.uint16), tensors["kinds"].numpy())
            if len(tables.kinds) != sum(len(group.scale) for group in groups):
                raise ValueError("its tables are of another number of coefficients")
            sketch = Sketch(int(values["searched"]), *(tensors[f"sketch.{name}"] for name in NAMES))
            coder = Coder(groups, float(values["step"]), tables, sketch, values["about"])
            coder._data, coder.file = data, _hashed(data)  # its tensors are views of these bytes
            return coder
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise DamagedError(f"{name} is a damaged coder ({error}). Restore it from a copy.") from error

    @staticmethod
    def load(path: Path) -> Coder:
        """Read a coder from a file; errors as `from_bytes`."""
        if not path.is_file():
            raise DamagedError(f"{path}: no such file. `latentmem calibrate` makes a coder.")
        return Coder.from_bytes(bytearray(path.read_bytes()), str(path))


def _hashed(data: container.Buffer | bytes) -> tuple[str, int]:
    return hashlib.sha256(data).hexdigest(), len(data)


def _group(tensors: Mapping[str, Tensor], g: int, layers: Sequence[int]) -> Group:
    mean, basis, scale, flat = (tensors[f"{g}.{name}"] for name in ("mean", "basis", "scale", "fisher"))
    width = len(mean) // len(layers)
    if basis.shape != (len(scale), len(mean)) or flat.shape != (len(layers), width * (width + 1) // 2):
        raise ValueError(f"group {g} has a basis of {list(basis.shape)} and Fisher matrices of {list(flat.shape)}")
    fisher = torch.zeros(len(layers), width, width)
    lower = torch.tril_indices(width, width)
    fisher[:, lower[0], lower[1]] = fisher[:, lower[1], lower[0]] = flat.float()
    return Group(tuple(layers), mean, basis, scale, fisher)


def _rows(group: Group, kv: Sequence[KV]) -> Tensor:
    """Keys and values of a group's layers, [k, D] float32."""
    return torch.cat([rowed(part) for i in group.layers for part in kv[i]], 1).float().cpu()


def rowed(side: Tensor) -> Tensor:
    """[1, heads, k, head width] as [k, heads * head width]."""
    return side[0].transpose(0, 1).flatten(1)


def headed(rows: Tensor, like: Tensor) -> Tensor:
    """[k, heads * head width] as [1, heads, k, head width]."""
    return rows.unflatten(1, (like.shape[1], like.shape[3])).transpose(0, 1)[None].to(like.device, like.dtype)


def width(like: Tensor) -> int:
    """Keys or values of one token: heads * head width."""
    return like.shape[1] * like.shape[3]


def _signed(array: NDArray[np.unsignedinteger], dtype: type) -> Tensor:
    """The same bits as a tensor; torch computes little with unsigned numbers."""
    return torch.from_numpy(array.view(dtype).copy())
