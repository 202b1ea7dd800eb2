"""The two presets: all in which they differ (letters: `latentmem.core`).

    exact   slots are what each layer gets as INPUT; a write sees the sink and the whole memory.
    paper   slots are what each layer gives as OUTPUT; a write sees bos and the newest K slots, and gives K slots.

A preset holds nothing: what belongs to a model (bos, mark) or to a memory (sizes, slots) comes with each call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache

    from latentmem.decoder.decoder import Decoder

PAPER_PIECE = 512  # tokens: the longest text that the released models were trained to write at once


class Sizes(Protocol):
    """What a preset asks of a memory, or of settings that are complete."""

    @property
    def N(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def compression(self) -> int: ...


@dataclass(frozen=True)
class WriteInputs:
    """What a write may see in front of its text.

    Args:
        decoder: the model.
        slots: of the memory, [L, M, d], on the model's device.
        first: sink or bos at the input of each layer, [L, 1, d].
        mark: what "paper" adds to the positions that become slots, [d].
        cache: makes a cache over [first ; slots] that stores nothing.
        choice: as in `MemorySettings`.
    """

    decoder: Decoder
    slots: Tensor
    first: Tensor
    mark: Tensor
    cache: Callable[[], Cache]
    choice: str


class Preset(ABC):
    """How text becomes slots."""

    name: ClassVar[str]
    sees_all: ClassVar[bool]  # whether a write sees all slots, so that one pass can write into many memories
    born_full: ClassVar[bool]  # whether its trained models begin with a pool of N slots
    holds_inputs: ClassVar[bool]  # whether slots are layers' inputs: those of layer 0 are then embeddings of tokens

    @abstractmethod
    def piece(self, sizes: Sizes) -> int:
        """Tokens that one update reads at most."""

    @abstractmethod
    def reads(self, sizes: Sizes) -> int:
        """Slots that a write sees at most."""

    @abstractmethod
    def slots(self, sizes: Sizes, n: int) -> int:
        """Slots that an update of n tokens writes into a memory that is full."""

    @abstractmethod
    def write(self, inputs: WriteInputs, sizes: Sizes, ids: Tensor) -> Tensor:
        """New slots of one piece of text, [n] ids -> [L, k, d]."""


class Exact(Preset):
    """Ours: slots are layers' inputs, so that nothing is lost between writing and reading them."""

    name, sees_all, born_full, holds_inputs = "exact", True, False, True

    def piece(self, sizes: Sizes) -> int:
        return sizes.K * sizes.compression

    def reads(self, sizes: Sizes) -> int:
        return sizes.N

    def slots(self, sizes: Sizes, n: int) -> int:
        return -(-n // sizes.compression)

    def write(self, inputs: WriteInputs, sizes: Sizes, ids: Tensor) -> Tensor:
        from latentmem.core.write import write_exact  # transformers is imported where it is needed

        return write_exact(inputs.decoder, inputs.cache(), ids, sizes.compression, inputs.choice)


class Paper(Preset):
    """The released checkpoints of MemoryLLM and M+: slots are layers' outputs.

    Source: MemoryLLM (arXiv 2402.04624) section 3.1.2 and figure 3.
    """

    name, sees_all, born_full, holds_inputs = "paper", False, True, False

    def piece(self, sizes: Sizes) -> int:
        return PAPER_PIECE

    def reads(self, sizes: Sizes) -> int:
        return sizes.K

    def slots(self, sizes: Sizes, n: int) -> int:
        return sizes.K

    def write(self, inputs: WriteInputs, sizes: Sizes, ids: Tensor) -> Tensor:
        from latentmem.core.write import write_paper

        return write_paper(inputs.decoder, inputs.first, inputs.mark, inputs.slots[:, -sizes.K :], ids, sizes.K)


PRESETS: dict[str, Preset] = {preset.name: preset for preset in (Exact(), Paper())}
