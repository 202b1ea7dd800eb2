"""The two presets: all in which they differ (letters: `latentmem.core`).

                            exact (ours)               paper (MemoryLLM, M+)
    a slot is               a layer's INPUT            a layer's OUTPUT
    a write sees            sink and all slots         bos and the newest K slots
    it reads, at most       K * c tokens               512 tokens
    n tokens become         ceil(n / c) slots          K slots
    a trained model has     an empty memory            a pool that is full

Keys and values are computed from a layer's input, so "exact" loses nothing where the form "exact" keeps that input.

Source: MemoryLLM (arXiv 2402.04624) section 3.1.2 and figure 3; the preset "exact" is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

    from latentmem.decoder.decoder import Decoder

PAPER_PIECE = 512  # tokens: the longest text that the released models were trained to write at once


@dataclass(frozen=True)
class WriteInputs:
    """What a write may see in front of its text."""

    decoder: Decoder
    slots: Tensor  # of the memory, [L, M, d], on the model's device
    first: Tensor  # sink or bos at the input of each layer, [L, 1, d]
    mark: Tensor  # what "paper" adds to the positions that become slots, [d]
    cache: Callable[[], Cache]  # makes a cache over [first ; slots] that stores nothing
    K: int
    compression: int
    choice: str


@dataclass(frozen=True)
class Preset:
    """How text becomes slots."""

    holds_inputs: bool  # slots are layers' inputs: those of layer 0 are then embeddings of tokens
    born_full: bool  # a trained model begins with a pool of N slots
    piece: Callable[[int, int], int]  # (K, c) -> tokens that one update reads at most
    slots_seen: Callable[[int, int], int]  # (N, K) -> slots that a write sees at most
    slots_of: Callable[[int, int, int], int]  # (n, K, c) -> slots that n tokens become in a memory that is full
    write: Callable[[WriteInputs, Tensor], Tensor]  # (inputs, [n] ids) -> new slots of one piece, [L, k, d]
    write_many: Callable[..., list[Tensor]] | None  # as `write_exact` of many memories; None: in turns


def _write_many(decoder: Decoder, cache: Cache, ids: Sequence[Tensor], ways: Any, **placed: Tensor) -> list[Tensor]:
    from latentmem.core.write import write_exact  # here, because transformers takes seconds to import

    return write_exact(decoder, cache, ids, ways, **placed)


def _write_exact(inputs: WriteInputs, ids: Tensor) -> Tensor:
    return _write_many(inputs.decoder, inputs.cache(), [ids], [(inputs.compression, inputs.choice)])[0]


def _write_paper(inputs: WriteInputs, ids: Tensor) -> Tensor:
    from latentmem.core.write import write_paper

    newest = inputs.slots[:, -inputs.K :]
    return write_paper(inputs.decoder, inputs.first, inputs.mark, newest, ids, inputs.K)


EXACT = Preset(True, False, lambda K, c: K * c, lambda N, K: N, lambda n, K, c: -(-n // c), _write_exact, _write_many)
PAPER = Preset(False, True, lambda K, c: PAPER_PIECE, lambda N, K: K, lambda n, K, c: K, _write_paper, None)
PRESETS = {"exact": EXACT, "paper": PAPER}
