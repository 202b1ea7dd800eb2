"""Keys and values of coded updates, decoded when they are needed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from latentmem.coding.codec import codec_of
from latentmem.coding.coder import headed, rowed, width
from latentmem.core.memory import Memory
from latentmem.decoder.attention import KV
from latentmem.decoder.decoder import Decoder
from latentmem.decoder.hooks import first_inputs
from latentmem.errors import DamagedError
from latentmem.written import Written

LIMIT = 64 << 20  # bytes of decoded updates that are kept


class Decoding:
    """Decodes updates for one model, and keeps those that were used last.

    What is decoded is the one truth of a coded memory: a write, too, goes on with the decoded keys and values of what
    it has coded. So a memory in RAM, saved, opened, forked or replayed is the same to the bit on one machine.

    Args:
        decoder: the model.
        limit: bytes of keys and values up to which updates are kept.
    """

    def __init__(self, decoder: Decoder, limit: int = LIMIT) -> None:
        self.decoder, self.limit = decoder, limit
        self._kept: weakref.WeakKeyDictionary[Written, Tensor] = weakref.WeakKeyDictionary()
        self._like: list[KV] = []
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget what was computed with weights that have changed since."""
        with self._lock:
            self._kept.clear()
            self._like = []

    @torch.no_grad()
    def kv(self, memory: Memory, numbers: Tensor) -> list[KV]:
        """Unrotated keys, and values, of slots by number; to be called under the adapter that reads.

        Args:
            numbers: as `Memory.slots`, [L, m], ascending in each layer.

        Returns:
            [1, heads, m, head width] each, of each layer.

        Raises:
            DamagedError: an update was altered, or is not there.
            OtherModelError: its coder is not known.
        """
        needed = (numbers >> 32).unique().tolist()
        if not needed:
            return self.like
        if missing := set(needed) - set(memory.written):
            raise DamagedError(f"the memory does not hold its update {min(missing)}. Restore the memory from a copy.")
        rows = self.updates(memory, [memory.written[n] for n in needed])
        widths = [width(keys) + width(values) for keys, values in self.like]
        counts = torch.stack([(numbers >> 32 == n).sum(1) for n in needed], dim=1).tolist()
        places = (numbers & 0xFFFFFFFF).to(self.decoder.device)
        of_layers = zip(*(row.split(widths, 1) for row in rows), strict=True)
        layers = []
        for i, (parts, like) in enumerate(zip(of_layers, self.like, strict=True)):
            pairs = zip(parts, places[i].split(counts[i]), strict=True)
            both = torch.cat([part.index_select(0, index) for part, index in pairs])
            sides = both.split(list(map(width, like)), 1)
            layers.append((headed(sides[0], like[0]), headed(sides[1], like[1])))
        return layers

    def updates(self, memory: Memory, written: Sequence[Written]) -> list[Tensor]:
        """Keys and values of whole updates, of all layers side by side, [k, width]."""
        with self._lock:
            decoded = {one: self._kept[one] for one in written if one in self._kept}
        missing = [one for one in written if one not in decoded]
        if missing:
            decoded |= zip(missing, self._decoded(memory, missing), strict=True)
        with self._lock:
            for one in written:
                self._keep(one, decoded[one])
        return [decoded[one] for one in written]

    def _decoded(self, memory: Memory, written: Sequence[Written]) -> list[Tensor]:
        kv = codec_of(memory.coder).decode(written, self.like)
        ids = torch.cat([one.tensors["ids"] for one in written]).long()
        if int(ids.max()) >= self.decoder.vocabulary:
            raise DamagedError(
                f"an update is damaged: the model has no token {int(ids.max())}. Restore it from a copy."
            )
        kv[0] = self.decoder.project(0, first_inputs(self.decoder, ids.to(self.decoder.device)))
        cut = zip(*(rowed(side).split([len(one) for one in written]) for pair in kv for side in pair), strict=True)
        return [torch.cat(parts, 1) for parts in cut]

    def _keep(self, one: Written, rows: Tensor) -> None:
        """Keep an update as the one that was used last; beyond the limit those go that were used longest ago."""
        known = self._kept.pop(one, None)  # a dictionary orders its keys by when they came
        self._kept[one] = rows if known is None else known
        surplus = self.nbytes - self.limit
        for oldest, dropped in list(self._kept.items())[:-1]:
            if surplus <= 0:
                return
            self._kept.pop(oldest, None)
            surplus -= dropped.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return sum(rows.nbytes for rows in list(self._kept.values()))

    @property
    def like(self) -> list[KV]:
        """Keys and values of no slot, of each layer."""
        if not self._like:
            empty = torch.zeros(self.decoder.L, 1, self.decoder.d, dtype=self.decoder.dtype, device=self.decoder.device)
            self._like = [(keys[:, :, :0], values[:, :, :0]) for keys, values in self.decoder.project_all(empty)]
        return self._like


def ids_of(memory: Memory, numbers: Tensor) -> Tensor:
    """Tokens of coded slots by number, [m] -> [m]."""
    if not memory.written:
        return numbers[:0]
    births = torch.tensor(list(memory.written))
    starts = torch.tensor([0, *map(len, memory.written.values())]).cumsum(0)
    ids = torch.cat([one.tensors["ids"] for one in memory.written.values()]).long()
    return ids[starts[torch.searchsorted(births, numbers >> 32)] + (numbers & 0xFFFFFFFF)]
