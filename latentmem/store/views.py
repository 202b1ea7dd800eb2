"""What a store tells about its memories: their history, what differs between versions, how much of a source is left."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from latentmem.core.settings import LongTermSettings
from latentmem.store.account import Account
from latentmem.store.contents import Content, content_of
from latentmem.store.journal import Journal, Row
from latentmem.store.pruning import prunable


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
        state: "applied", "pending" (acknowledged, not yet in the memory), "failed" (then it changed nothing), or
            "pruned" (it can not be opened any more).
        error: why it failed.
        key: the caller's idempotency key.
        bytes: what it takes on disk beside its row.
        facts: how full it is (M, N, `size` in bytes), what it keeps (form, order, longterm), the slots of each layer
            that a write `lost` for good, and with what it was computed (model, dtype, a hash of the token ids, ...):
            where these are equal, a replay gives equal bits.
        time: when, with time zone.
    """

    version: int
    event: str
    source: str | None
    tokens: int
    text: Content | None
    base: tuple[str, int] | None
    state: str
    error: str | None
    key: str | None
    bytes: int
    facts: dict[str, Any]
    time: datetime

    @property
    def pruned(self) -> bool:
        """Whether it can not be opened any more; a write that failed and was pruned still has the state "failed"."""
        return bool(self.facts.get("pruned"))


@dataclass(frozen=True)
class Overview:
    """What the journal says of one memory, without opening it.

    Args:
        name: its name.
        versions: how many.
        pending: how many of them are acknowledged and not yet in the memory.
        changed: when the newest was made, with time zone.
        bytes: of its snapshots and deltas.
        prunable: bytes of them that pruning it to its newest version frees, about.
        M, N: slots per layer that it holds, and can hold; 0 if it is not known.
        model: name of the model that wrote it; "" if it is not known.
        form, order: what it keeps of an update, and how a question reads it; None if it is not known.
        longterm: how it keeps what it drops, if it does.
    """

    name: str
    versions: int
    pending: int
    changed: datetime
    bytes: int
    prunable: int
    M: int
    N: int
    model: str
    form: str | None
    order: str | None
    longterm: LongTermSettings | None


@dataclass(frozen=True)
class Change:
    """What became of one source between two versions.

    Args:
        source: its name.
        tokens: tokens written under it, in the one and in the other.
        slots_left: slots that are left of it, mean over layers, in the one and in the other.
    """

    source: str
    tokens: tuple[int, int]
    slots_left: tuple[float, float]


@dataclass(frozen=True)
class SourceStats:
    """How much of one source is left, and will be.

    Args:
        source: its name.
        tokens: tokens written under it.
        slots: slots per layer written under it.
        share_left: share of them that is left, mean over layers.
        stored: share of them that is in the long-term memory, mean over layers.
        pinned: whether it loses nothing.
        expires: when it will be forgotten, if ever.
        forecast: updates from now -> share of what was written that is expected to be left then.
    """

    source: str
    tokens: int
    slots: int
    share_left: float
    stored: float
    pinned: bool
    expires: datetime | None
    forecast: dict[int, float]


def nothing_known(name: str) -> str:
    """What is said of a memory that is empty."""
    return f"the memory {name!r} is empty: nothing is known yet."


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds).astimezone()


def version(journal: Journal, row: Row) -> Version:
    """One line of a history from its row."""
    base = None
    if row.base is not None:
        base_row = journal.row(row.base)
        base = (journal.name(base_row.memory), base_row.seq)
    same: dict[str, Any] = {name: getattr(row, name) for name in ("event", "state", "error", "key", "bytes", "facts")}
    if row.pruned and row.state == "applied":
        same["state"] = "pruned"
    source, tokens = row.payload.get("source"), row.payload.get("tokens", 0)
    return Version(row.seq, source=source, tokens=tokens, text=content_of(row), base=base, time=_time(row.time), **same)


def overview(journal: Journal, names: Collection[str] | None) -> list[Overview]:
    """The journal's numbers of memories, by default of all, by name."""
    lines = []
    for name, memory, versions, pending, changed, size in journal.overview(names):
        facts = next((row.facts for row in journal.lineage(journal.head(memory)) if "M" in row.facts), {})
        full = facts.get("M", 0), facts.get("N", 0), facts.get("model", ""), facts.get("form"), facts.get("order")
        part = LongTermSettings.of(facts.get("longterm"))
        lines.append(Overview(name, versions, pending, _time(changed), size, prunable(journal, memory), *full, part))
    return lines


def changes(one: Account, other: Account) -> list[Change]:
    """The sources that differ between two memories, by name."""
    sides: dict[str, list[tuple[int, float]]] = {}
    for i, account in enumerate((one, other)):
        for source in account.sources:
            of_source = sides.setdefault(source.name, [(0, 0.0), (0, 0.0)])
            of_source[i] = (source.tokens, _mean(source.slots_left))
    return [Change(name, (a[0], b[0]), (a[1], b[1])) for name, (a, b) in sorted(sides.items()) if a != b]


def stats(account: Account, expiries: Mapping[str, float], ahead: Sequence[int]) -> list[SourceStats]:
    """How much is left of each source of a memory, and the forecast for numbers of updates ahead."""
    survives = {t: forecast(account, t) for t in ahead}
    lines = []
    for source in account.sources:
        share, archived = _mean(source.slots_left) / source.slots, source.stored / source.slots
        at = None if source.name not in expiries else _time(expiries[source.name])
        later = {t: share if source.pinned else share * survival for t, survival in survives.items()}
        about = source.name, source.tokens, source.slots
        lines.append(SourceStats(*about, share, archived, source.pinned, at, later))
    return lines


def forecast(account: Account, t: int) -> float:
    """The share of the unpinned slots of a memory that is expected to be left after t further updates of K slots.

    Exactly 1 as long as the memory will not be full; then `survival` among the slots that are not pinned.
    """
    M, N, K = account.M, account.N, account.K
    drops = []  # slots of a layer that go, and of how many, pinned ones among them
    while t > 0 and N > M:
        drops.append((max(0, M + K - N), M))
        M, t = min(M + K, N), t - 1
    shares = []
    for pinned in account.pinned():
        share = (1.0 - K / max(1, N - pinned)) if N - pinned > K else 0.0
        later = share**t
        for drop, of in drops:
            later *= max(0.0, 1 - drop / max(1, of - pinned))
        shares.append(later)
    return _mean(shares)


def _mean(numbers: Sequence[float]) -> float:
    """The mean over layers."""
    return sum(numbers) / len(numbers) if numbers else 0.0
