"""A memory as a plain value, and its update (letters: `latentmem.core`).

memory    a b c d e f      M slots in each layer, oldest first; here N = 6 and M = 6
draw      . b . . e .      M + k - N of them, for each layer anew, uniformly, without replacement
update    a c d f x y      the others keep their order, the k new slots come behind
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from latentmem import splitmix
from latentmem.core.presets import PRESETS, Preset
from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.written import Source, Written, check_quota, needed, numbered

T = TypeVar("T")


class LongTermPart(Protocol):
    """What a memory asks of the part that keeps what it drops; `latentmem.longterm` has it."""

    @property
    def settings(self) -> LongTermSettings: ...
    @property
    def first(self) -> int: ...  # what earlier updates wrote is not kept any more
    @property
    def most(self) -> int: ...  # slots that each layer retrieves now
    def check(self, memory: Memory) -> None: ...  # raises a ValueError where it is none of this memory
    def after(self, memory: Memory, change: Update, stays: Tensor) -> LongTermPart: ...  # of M slots `stays` are left
    def without(self, memory: Memory, stays: Tensor, source: int) -> LongTermPart: ...  # later sources move up by one


@dataclass(frozen=True, eq=False)
class Update:
    """What a write makes of one piece of text: all that leads from a memory to the next one.

    Args:
        slots: new slots, [L, k, d], 1 <= k <= N, oldest first.
        dropped: which old slots go, [L, max(0, M + k - N)] int64 on the CPU, ascending; see `draw`.
        source: the name under which the new slots are accounted; writes of one name are one source.
        tokens: tokens of text behind the new slots, for the account.
        keys: what a trained retriever finds the dropped slots by, [L, dropped, width]; see `latentmem.longterm`.
        written: what it writes where updates are kept coded; `slots` are then numbers, see `numbered`.
    """

    slots: Tensor
    dropped: Tensor
    source: str = ""
    tokens: int = 0
    keys: Tensor | None = None
    written: Written | None = None

    @staticmethod
    def drawn(memory: Memory, new: Tensor | Written, source: str = "", tokens: int = 0) -> Update:
        """The update of a memory by slots [L, k, d] or what was coded of them, for which `draw` makes room."""
        if isinstance(new, Tensor):
            return Update(new, draw(memory, new.shape[1]), source, tokens)
        births = torch.full((memory.L, len(new)), memory.updates + 1)
        slots = numbered(births, torch.arange(len(new)).expand_as(births))
        return Update(slots, draw(memory, len(new)), new.source, tokens, written=new)


class _Chosen(Generic[T]):
    """A setting of a memory as its property."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, memory: Memory, owner: type) -> T:
        return cast(T, getattr(memory.settings, self._name))


@dataclass(frozen=True, eq=False)
class Memory:
    """Latent vectors of every layer, oldest first, with all that is needed to go on from them.

    A memory is never changed: `update` returns the next one, and the old one stays valid. `eq` is identity.

    Args:
        slots: hidden states, [L, M, d], as the model computes them; or, of coded updates, numbers, [L, M, 1] int64.
        births: the number of the update that wrote each slot, [L, M] int32, on the CPU; 0 = older than this memory.
        origins: index into `sources` of each slot, [L, M] int32, on the CPU; -1 = older than this memory.
        settings: N, K, preset and the others, made complete; each is a property of the memory, too.
        updates: updates so far.
        tokens: tokens read in so far.
        sources: what was written, in the order of first appearance.
        model: identity (hash) of the model that wrote it; "" = none.
        adapters: identity of the adapters that wrote it; "" = none.
        tokenizer: identity of the tokenizer that wrote it; "" = none.
        model_name: the name by which that model was loaded, a hint for people and for the command line.
        coder: identity of what codes its updates; "" = its slots are hidden states.
        dtype: in what the model runs that writes it; by default as the slots.
        longterm: what it has dropped, if that is kept; see `latentmem.longterm`. `settings.longterm` follows it.
        written: the coded updates of which something is left, by number, ascending.
        version: checksum of the snapshot that holds this very memory; "" = not saved.
        parent: version of the newest ancestor that was saved; "" = none.

    Raises:
        ValueError: sizes or shapes that do not belong together.

    Source: MemoryLLM (arXiv 2402.04624) section 3.1, where a memory is theta of shape [L, N, d].
    """

    slots: Tensor
    births: Tensor
    origins: Tensor
    settings: MemorySettings
    updates: int = 0
    tokens: int = 0
    sources: tuple[Source, ...] = ()
    model: str = ""
    adapters: str = ""
    tokenizer: str = ""
    model_name: str = ""
    coder: str = ""
    dtype: str = ""
    longterm: LongTermPart | None = None
    written: Mapping[int, Written] = field(default_factory=dict)
    version: str = ""
    parent: str = ""
    N, K, compression, seed = _Chosen[int](), _Chosen[int](), _Chosen[int](), _Chosen[int]()
    preset, choice, quota, reading_order = _Chosen[str](), _Chosen[str](), _Chosen[float](), _Chosen[str]()
    _save: ClassVar[Callable[[Memory, str | Path], Memory]]  # given by `files.snapshot`, which knows the file format
    _load: ClassVar[Callable[[str | Path], Memory]]

    def __post_init__(self) -> None:
        longterm = self.longterm.settings if self.longterm is not None else None
        object.__setattr__(self, "settings", replace(self.settings, longterm=longterm).complete())
        by_update, dtype = self.settings.by_update, str(self.slots.dtype)[6:]
        object.__setattr__(self, "dtype", self.dtype if by_update else dtype)
        if self.slots.ndim != 3 or (by_update and (self.d, dtype) != (1, "int64")):
            raise ValueError(f"slots must be [L, M, d], coded [L, M, 1] int64: got {[*self.slots.shape]} {dtype}.")
        if self.M > self.N:
            raise ValueError(f"a memory of capacity N={self.N} can not hold M={self.M} slots.")
        for name, column in {"births": self.births, "origins": self.origins}.items():
            if tuple(column.shape) != (self.L, self.M):
                raise ValueError(f"{name} must be [L, M] = {[self.L, self.M]}, got {list(column.shape)}.")
        if self.longterm is not None:
            self.longterm.check(self)

    def __repr__(self) -> str:
        form = self.settings.form if self.settings.by_update else f"d={self.d}, {self.preset}"
        return f"Memory(L={self.L}, M={self.M}/{self.N}, {form}, {self.updates} updates, {len(self.sources)} sources)"

    def with_settings(self, **changes: object) -> Memory:
        """The same slots under changed settings, for example another seed."""
        return replace(self, settings=replace(self.settings, **changes))  # type: ignore[arg-type]

    def following(self, **changes: object) -> Memory:
        """The memory that comes of this one by changes of its fields: not saved yet, and a child of what was."""
        return replace(self, version="", parent=self.version or self.parent, **changes)  # type: ignore[arg-type]

    @property
    def L(self) -> int:
        return self.slots.shape[0]

    @property
    def M(self) -> int:
        return self.slots.shape[1]

    @property
    def d(self) -> int:
        return self.slots.shape[2]

    @property
    def R(self) -> int:
        """Slots that a question takes from the long-term memory, in each layer."""
        return self.longterm.most if self.longterm is not None else 0

    @property
    def needs_search(self) -> bool:
        """Whether what a question asks decides what it reads, or in which order."""
        return self.R > 0 or (self.M > 0 and self.reading_order != "written")

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read."""
        return self.M == 0 and self.R == 0

    @property
    def rules(self) -> Preset:
        """The preset itself, of which `preset` is the name."""
        return PRESETS[self.preset]

    @property
    def piece(self) -> int:
        """Tokens that one update reads at most: K * c, or 512 in the preset "paper"."""
        return self.rules.piece(self.K, self.compression)

    @property
    def half_life(self) -> float:
        """Updates of K slots after which half of what was written is expected to be left, once the memory is full."""
        return half_life(self.N, self.K)

    def slots_left(self) -> Tensor:
        """Slots that are left of each source in each layer, [number of sources, L] int64."""
        counts = torch.zeros(self.L, len(self.sources) + 1, dtype=torch.long)  # the first for -1, no source
        return counts.scatter_add_(1, self.origins.long() + 1, torch.ones_like(self.births, dtype=torch.long))[:, 1:].T

    def pinned(self) -> Tensor:
        """Which slots belong to pinned sources, [L, M] bool."""
        if not any(source.pinned for source in self.sources):
            return torch.zeros(self.L, self.M, dtype=torch.bool)
        flags = torch.tensor([*(source.pinned for source in self.sources), False])  # the last for -1, no source
        return flags[self.origins.long()]

    def save(self, path: str | Path) -> Memory:
        """Write this memory to one file, atomically, and return it with its `version`; see `files.snapshot.save`."""
        return type(self)._save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Memory:
        """Read a memory from one file and verify it; see `files.snapshot.load`."""
        return cls._load(path)


def empty(
    layers: int,
    width: int,
    settings: MemorySettings = MemorySettings(),  # noqa: B008 - frozen
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Memory:
    """A memory that holds nothing, [L, 0, d]; without a long-term part, which `longterm.longterm.empty` makes."""
    nothing = torch.zeros(layers, 0, dtype=torch.int32)
    slots = torch.zeros(layers, 0, width, dtype=dtype, device=device)
    return Memory(numbered(nothing, nothing) if settings.by_update else slots, nothing, nothing, settings)


def draw(memory: Memory, k: int) -> Tensor:
    """Choose which old slots make room for k new ones: each layer draws its own, uniformly, without replacement.

    Every slot gets a 64-bit key, a function of (seed, number of the update, layer, its place), and the smallest keys
    lose; pinned slots never do. These are integers only, so all machines and devices agree.

    Args:
        k: new slots per layer, 1 <= k <= N.

    Returns:
        Indices into the M old slots, ascending, [L, max(0, M + k - N)] int64, on the CPU.

    Raises:
        ValueError: another k, or pinned slots leave no room for k new ones.

    Source: MemoryLLM section 3.1.2; one draw per layer as in the released `drop_memory_per_layer`.
    """
    count = _surplus(memory, k)
    if not count:
        return torch.zeros(memory.L, 0, dtype=torch.long)
    pinned = memory.pinned()
    held = int(pinned.sum(1).max())
    if count > memory.M - held:
        raise ValueError(
            f"{k} new slots do not fit beside {held} pinned ones into a memory of N={memory.N}. Unpin a source, or "
            f"write in smaller pieces."
        )
    return lowest(memory, pinned.long(), count, torch.arange(memory.L))


def _surplus(memory: Memory, k: int) -> int:
    """Old slots of a layer that do not fit beside k new ones."""
    if not 1 <= k <= memory.N:
        raise ValueError(
            f"one update writes between 1 and N={memory.N} slots per layer, got {k}; write the text in pieces."
        )
    return max(0, memory.M + k - memory.N)


def lowest(memory: Memory, ranks: Tensor, count: int, streams: Tensor) -> Tensor:
    """In each layer the `count` slots of lowest rank [L, M], at random among equals: ascending, [L, count]."""
    order = splitmix.keys(memory.seed, memory.updates, streams, memory.M).argsort(dim=1, stable=True)
    order = order.gather(1, ranks.gather(1, order).argsort(dim=1, stable=True))
    return order[:, :count].sort(dim=1).values


def update(memory: Memory, change: Update) -> Memory:
    """Drop the old slots that do not fit, keep the order of the others, append the new ones.

    Differentiable in `memory.slots` and `change.slots`.

    Args:
        memory: [L, M, d].
        change: of this memory; the indices of what it drops may come in any order.

    Returns:
        The next memory, [L, min(M + k, N), d]. The one before is untouched.

    Raises:
        ValueError: shapes or indices that do not fit, or a pinned source that grows beyond the quota.

    Source: MemoryLLM section 3.1.2, figure 2.
    """
    change = _checked(memory, change)
    stays, k = kept(change.dropped, memory.M), change.slots.shape[1]
    i = next((i for i, s in enumerate(memory.sources) if s.name == change.source), len(memory.sources))
    old = memory.sources[i] if i < len(memory.sources) else Source(change.source, 0, 0)
    grown = replace(old, tokens=old.tokens + change.tokens, slots=old.slots + k)

    def moved(column: Tensor, value: int) -> Tensor:
        return torch.cat([column.gather(1, stays), torch.full((memory.L, k), value, dtype=torch.int32)], 1)

    number = memory.updates + 1
    following = memory.following(
        slots=gathered(memory.slots, stays, change.slots),
        births=moved(memory.births, number),
        origins=moved(memory.origins, i),
        updates=number,
        tokens=memory.tokens + change.tokens,
        sources=(*memory.sources[:i], grown, *memory.sources[i + 1 :]),
        longterm=memory.longterm.after(memory, change, stays) if memory.longterm is not None else None,
        written={**memory.written, number: change.written} if change.written is not None else memory.written,
    )
    first = following.longterm.first if following.longterm is not None else number + 1
    following = replace(following, written=needed(following.written, following.births, first))
    return within_quota(following) if old.pinned else following


def kept(dropped: Tensor, M: int) -> Tensor:
    """The complement of `dropped`, [L, count] of 0..M-1: indices ascending, [L, M - count] int64."""
    stays = torch.ones(dropped.shape[0], M, dtype=torch.bool).scatter_(1, dropped, False)
    return torch.arange(M).expand_as(stays)[stays].reshape(dropped.shape[0], M - dropped.shape[1])


def gathered(slots: Tensor, stays: Tensor, new_slots: Tensor) -> Tensor:
    """Slots `stays` [L, m] of [L, M, d], with the new ones behind; each slot is copied once."""
    stays = stays.to(slots.device)
    if torch.is_grad_enabled() and (slots.requires_grad or new_slots.requires_grad):
        old = torch.stack([layer.index_select(0, i) for layer, i in zip(slots, stays, strict=True)])
        return torch.cat([old, new_slots], dim=1)
    m = stays.shape[1]
    if m == slots.shape[1]:  # all stay
        return torch.cat([slots.detach(), new_slots.detach().to(slots.device)], dim=1)
    moved = slots.new_empty(slots.shape[0], m + new_slots.shape[1], slots.shape[2])
    for layer, i, into in zip(slots.detach(), stays, moved, strict=True):
        torch.index_select(layer, 0, i, out=into[:m])
    moved[:, m:] = new_slots.detach()
    return moved


def within_quota(memory: Memory) -> Memory:
    """A memory, if its pinned sources take no more than the share `quota` of N; else a ValueError."""
    check_quota(int(memory.pinned().sum(1).max()) if memory.M else 0, memory.N, memory.quota)
    return memory


def _checked(memory: Memory, change: Update) -> Update:
    """The update, its indices ascending; a ValueError if it is none of this memory."""
    L, M, slots = memory.L, memory.M, change.slots
    if slots.ndim != 3 or slots.shape[0] != L or slots.shape[2] != memory.d:
        raise ValueError(f"new slots must be [L, k, d] = [{L}, k, {memory.d}], got {list(slots.shape)}.")
    if slots.dtype != memory.slots.dtype:
        raise ValueError(f"new slots must be {memory.slots.dtype} as the memory, got {slots.dtype}.")
    dropped = torch.as_tensor(change.dropped, dtype=torch.long, device="cpu")
    count = _surplus(memory, slots.shape[1])
    if tuple(dropped.shape) != (L, count):
        raise ValueError(
            f"`dropped` must name {count} slots in each of {L} layers, [{L}, {count}]: got {list(dropped.shape)}."
        )
    dropped = dropped.sort(dim=1).values
    if count and (dropped[:, 0].min() < 0 or dropped[:, -1].max() >= M or (dropped.diff(dim=1) == 0).any()):
        raise ValueError(f"`dropped` must hold different indices between 0 and M - 1 = {M - 1} in each layer.")
    return replace(change, dropped=dropped)


def survival(N: int, K: int, t: int) -> float:
    """The share of a slot's kind that is expected to be left after t further updates of a full memory: ((N - K) / N)^t.

    Source: MemoryLLM section 3.1.2, equation 2.
    """
    return ((N - K) / N) ** t


def half_life(N: int, K: int) -> float:
    """Updates of K slots after which `survival` is one half; 0 where an update replaces everything."""
    return 0.0 if K == N else math.log(2) / -math.log1p(-K / N)
