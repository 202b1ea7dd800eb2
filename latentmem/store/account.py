"""What a version of a memory holds, in numbers: all that is shown of a memory without opening it.

A store keeps the accounts of the newest versions beside their rows. A pin, a rollback and a fork have the account of
the version that they were made from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from latentmem.core.settings import MemorySettings
from latentmem.written import check_quota, place


@dataclass(frozen=True)
class SourceAccount:
    """How much of one source a memory holds.

    Args:
        name: what the caller called it.
        tokens: tokens written under it.
        slots: slots per layer written under it.
        pinned: whether it loses nothing.
        slots_left: slots that are left of it in each layer, L numbers.
        stored: slots of it in the long-term part, mean over layers.
    """

    name: str
    tokens: int
    slots: int
    pinned: bool
    slots_left: tuple[int, ...]
    stored: float


@dataclass(frozen=True)
class Account:
    """A memory in numbers; names and letters as in `latentmem.core.memory.Memory`.

    Args:
        settings: complete.
        sources: in the order of the memory's.
        older: slots in each layer that are older than the memory, L numbers.
        stored: slots of the layer that has most of them in its long-term part.
        archive: bytes of the long-term part.
        limit: bytes that it keeps at most; 0 without one.
        nbytes: bytes of the slots, and of the coded updates in which they stand.
    """

    settings: MemorySettings
    L: int
    M: int
    d: int
    updates: int
    tokens: int
    half_life: float
    model: str
    model_name: str
    adapters: str
    tokenizer: str
    dtype: str
    sources: tuple[SourceAccount, ...]
    older: tuple[int, ...]
    stored: int
    archive: int
    limit: int
    nbytes: int

    @property
    def N(self) -> int:
        return self.settings.N or 0

    @property
    def K(self) -> int:
        return self.settings.K or 0

    @property
    def names(self) -> list[str]:
        """The sources by name."""
        return [source.name for source in self.sources]

    def pinned(self, sources: Sequence[SourceAccount] | None = None) -> list[int]:
        """Slots of pinned sources in each layer."""
        own = [source.slots_left for source in (self.sources if sources is None else sources) if source.pinned]
        return [sum(column) for column in zip(*own, strict=True)] or [0] * self.L

    def with_pin(self, name: str, pinned: bool) -> Account:
        """The account after `latentmem.core.sources.pin`; errors as there."""
        i = place(self.names, name)
        changed = replace(self.sources[i], pinned=pinned)
        following = replace(self, sources=(*self.sources[:i], changed, *self.sources[i + 1 :]))
        if pinned:
            check_quota(max(following.pinned(), default=0), self.N, self.settings.quota)
        return following

    def to_json(self) -> str:
        """The account as one line; a source that has lost the same in all layers has one number for them."""
        values = asdict(self)
        for source in values["sources"]:
            if len(same := set(source["slots_left"])) == 1:
                source["slots_left"] = same.pop()
        return json.dumps(values | {"sources": [list(source.values()) for source in values["sources"]]})

    @staticmethod
    def from_json(line: str) -> Account:
        """The inverse of `to_json`."""
        values: dict[str, Any] = json.loads(line)
        sources = []
        for name, tokens, slots, pinned, counts, stored in values["sources"]:
            layers = (counts,) * values["L"] if isinstance(counts, int) else tuple(counts)
            sources.append(SourceAccount(name, tokens, slots, pinned, layers, stored))
        own = {"settings": MemorySettings.of(values["settings"]), "older": tuple(values["older"])}
        return Account(**values | own | {"sources": tuple(sources)})
