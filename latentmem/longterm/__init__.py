"""Long-term memory (M+): dropped slots are kept, and a question searches them (letters: `latentmem.core`)."""

from __future__ import annotations

import torch

from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings
from latentmem.longterm.longterm import FrequencyLongTerm, LongTerm


def kind(settings: LongTermSettings) -> type[LongTerm]:
    """The class of archives under these settings."""
    return FrequencyLongTerm if settings.rule == "frequency" else LongTerm


def empty(L: int, settings: LongTermSettings, M: int = 0) -> LongTerm:
    """An archive that holds nothing, for a memory of M slots in each of L layers that one update has written."""
    return kind(settings)(settings, torch.arange(M, dtype=torch.int32).expand(L, M))


def of(memory: Memory) -> LongTerm | None:
    """The archive of a memory, if there is one."""
    assert memory.longterm is None or isinstance(memory.longterm, LongTerm)
    return memory.longterm


def searched(memory: Memory) -> LongTerm:
    """What a question to a memory searches: its archive, or an empty one, of which one update may stand last."""
    return of(memory) or LongTerm(LongTermSettings(1), torch.zeros_like(memory.births))
