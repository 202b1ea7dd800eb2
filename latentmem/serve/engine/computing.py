"""The model as the store writes with it: all that it computes, it computes in the engine's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from latentmem.core.memory import Memory
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Message, Prompts
from latentmem.model.writing import Progress, Updates
from latentmem.serve.engine.engine import Engine, Result
from latentmem.serve.engine.threads import release_threads


class EngineModel:
    """What a store needs of a model for its writes; the calling thread waits while the engine's thread computes.

    A text is computed piece by piece, so answers get their tokens between two pieces.

    Args:
        llm: the model.
        engine: in whose thread the model computes.

    Attributes:
        newest: the memory after the newest piece, until `clear`.
        tokens_written: tokens of all pieces.
    """

    def __init__(self, llm: MemoryModel, engine: Engine) -> None:
        self._llm, self._engine, self.tokenizer_identity = llm, engine, llm.tokenizer_identity
        self.newest: Memory | None = None
        self.tokens_written = 0

    def clear(self) -> None:
        """Keep the memory of the newest piece no longer."""
        self.newest = None

    # --- what computes nothing --------------------------------------------------------------------------------------

    def check(self, memory: Memory) -> None:
        """As `MemoryModel.check`."""
        self._llm.check(memory)

    def prompts_or_raise(self) -> Prompts:
        """As `MemoryModel.prompts_or_raise`."""
        return self._llm.prompts_or_raise()

    # --- what computes ----------------------------------------------------------------------------------------------

    def tokens(self, content: str | Sequence[Message], role: str | None = None) -> list[int]:
        """As `MemoryModel.tokens`."""
        return self._llm.tokens(content, role)

    def write_ids(
        self,
        memory: Memory,
        ids: Any,
        source: str = "text",
        progress: Progress | None = None,
        updates: Updates | None = None,
    ) -> Memory:
        """As `MemoryModel.write_ids`, for one memory."""
        for start in range(0, len(ids), memory.piece):
            piece = ids[start : start + memory.piece]
            memory = self._compute(partial(self._llm.write_ids, memory, piece, source, updates=updates))
            self.newest = memory
            self.tokens_written += len(piece)
            if progress is not None:
                progress(start + len(piece), len(ids))
        return memory

    def _compute(self, action: Callable[[], Result]) -> Result:
        release_threads()
        return self._engine.call(action)
