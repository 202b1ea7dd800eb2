"""What a store tells about a memory: its history, what changed, how much is left."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from latentmem.model.prompts import Message


@dataclass(frozen=True)
class Version:
    """One line of a memory's history.

    Args:
        version: its number, from 0.
        event: "create", "import", "write", "rollback", "fork", "pin", "unpin", "forget" or "expire".
        source: the source that was written, pinned or forgotten, if any.
        tokens: tokens that were written.
        text: what was written: a text, turns of a conversation, or token ids.
        base: (name, version) that it was made from.
        state: "applied", "pending" (acknowledged, not yet in the memory) or "failed" (then it changed nothing).
        error: why it failed.
        key: the caller's idempotency key.
        bytes: what it takes on disk beside its row.
        made: how full it is (M, N), and with what it was computed (model, dtype, ...): where these are equal, a
            replay gives equal bits.
        time: when, with time zone.
    """

    version: int
    event: str
    source: str | None
    tokens: int
    text: str | list[Message] | list[int] | None
    base: tuple[str, int] | None
    state: str
    error: str | None
    key: str | None
    bytes: int
    made: dict[str, Any]
    time: datetime


@dataclass(frozen=True)
class Overview:
    """What the journal says of one memory, without opening it.

    Args:
        name: its name.
        versions: how many.
        pending: how many of them are acknowledged and not yet in the memory.
        changed: when the newest was made, with time zone.
        bytes: of its snapshots and deltas.
        M, N: slots per layer that it holds, and can hold; 0 if it is not known.
        model: name of the model that wrote it; "" if it is not known.
    """

    name: str
    versions: int
    pending: int
    changed: datetime
    bytes: int
    M: int
    N: int
    model: str


@dataclass(frozen=True)
class Change:
    """What became of one source between two versions.

    Args:
        source: its name.
        tokens: tokens written under it, in the one and in the other.
        left: slots that are left of it, mean over layers, in the one and in the other.
    """

    source: str
    tokens: tuple[int, int]
    left: tuple[float, float]


@dataclass(frozen=True)
class SourceStats:
    """How much of one source is left, and will be.

    Args:
        source: its name.
        tokens: tokens written under it.
        slots: slots per layer written under it.
        left: share of them that is left, mean over layers.
        stored: share of them that is in the long-term memory, mean over layers.
        pinned: whether it loses nothing.
        expires: when it will be forgotten, if ever.
        forecast: updates from now -> share of what was written that is expected to be left then.
    """

    source: str
    tokens: int
    slots: int
    left: float
    stored: float
    pinned: bool
    expires: datetime | None
    forecast: dict[int, float]
