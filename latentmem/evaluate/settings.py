"""What each protocol lets one choose; the command line makes its options from these fields.

The module imports no torch, so that `latentmem --help` is fast. A field that holds several values is a tuple.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentmem.core.settings import MemorySettings
from latentmem.fields import setting

NEW_TOKENS = 10  # of an answer, as in the paper
LONGEST = 512  # tokens of a text that is asked about: one update of the paper
OWN_RUN = 50  # steps of retention up to which every sample has its own run
SETS = ("blimp", "piqa", "mmlu")
MEMORY = MemorySettings(N=2048, form="exact")  # the paper's memory, of hidden states; not the default of a model
ONE_UPDATE = MemorySettings(K=LONGEST, form="exact")  # every text is one update


@dataclass(frozen=True)
class Settings:
    """What the settings of every protocol hold.

    Args:
        memory: settings of the memory that is measured; a checkpoint has its own N and K. The seed is also the seed of
            everything that is drawn.
    """

    memory: MemorySettings = setting("the memory that is measured", MEMORY)  # noqa: RUF009

    @property
    def seed(self) -> int:
        """Seed of everything that is drawn, and of every drop."""
        return self.memory.seed


def _require_some(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    """Refuse values that are unknown, given twice, or none."""
    if not values or set(values) - set(known) or len(set(values)) < len(values):
        raise ValueError(f"{name} must be some of {', '.join(known)}, got {', '.join(values) or 'none'}.")


@dataclass(frozen=True)
class Ability(Settings):
    """Settings of `protocols.ability`.

    Raises:
        ValueError: numbers below 0, or articles of one token.
    """

    texts: int = setting("held-out articles", 50, least=0)
    tokens: int = setting("tokens of each article", 512, least=2)
    blimp: int = setting("BLiMP pairs; 0: none", 670, least=0)
    piqa: int = setting("PIQA items; 0: none", 400, least=0)
    mmlu: int = setting("MMLU items; 0: none", 285, least=0)

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("texts", *SETS)}
        if min(counts.values()) < 0 or self.tokens < 2:
            values = ", ".join(f"{name}={count}" for name, count in counts.items())
            raise ValueError(f"counts are 0 or more and tokens 2 or more, got {values}, tokens={self.tokens}.")


@dataclass(frozen=True)
class Conversations(Settings):
    """Settings of `protocols.conversations`.

    Raises:
        ValueError: unknown rows, or a long-term part that leaves no slots.
    """

    ROWS = ("floor", "window", "bm25", "memory", "longterm")

    rows: tuple[str, ...] = setting("what is measured", ROWS, choices=ROWS)
    longterm: int = setting("slots of the N that the row longterm takes from what was dropped", 512, least=1)
    passages: int = setting("turns that BM25 retrieves for a question", 10, least=1)
    new_tokens: int = setting("longest answer, in tokens", 32, least=1)

    def __post_init__(self) -> None:
        _require_some("rows", self.rows, self.ROWS)
        N = self.memory.N
        if "longterm" in self.rows and not (self.longterm >= 1 and (N is None or self.longterm < N)):
            raise ValueError(f"the long-term part takes between 1 and N - 1 of N={N} slots, got {self.longterm}.")


@dataclass(frozen=True)
class Editing(Settings):
    """Settings of `protocols.editing`; which rows a model does not have, `Editing.rows` says there."""

    MEMORIES = ("memory-unedited", "memory-empty", "memory-own", "memory-full")
    ROWS = ("none", "context", "bm25", *MEMORIES, "longterm", "ft", "ft-l", "lora", "ike", "rome")
    DEFAULT = tuple(row for row in ROWS if row not in ("bm25", "longterm"))  # of use where much was written

    edits: int = setting("edits that are made one at a time", 200, least=2)
    rows: tuple[str, ...] = setting("what is measured; bm25 and longterm are for sequences", DEFAULT)
    sequence: tuple[int, ...] = setting("numbers of edits without reset in between, such as 1,10,100,1000", (1,))

    def __post_init__(self) -> None:
        unknown = [row for row in self.rows if row not in self.ROWS]
        if unknown or not self.rows:
            raise ValueError(f"rows must be some of {', '.join(self.ROWS)}; got {', '.join(unknown) or 'none'}.")
        if self.edits < 2:
            raise ValueError(f"one edit has no interval: take at least 2, got {self.edits}.")
        if not self.sequence or min(self.sequence) < 1:
            raise ValueError(f"a sequence has at least one edit, got {self.sequence}.")


@dataclass(frozen=True)
class Effects(Settings):
    """Settings of `protocols.effects`."""

    texts: int = setting("articles for the perplexity, and paragraphs for the abstention", 100, least=2)
    tokens: int = setting("tokens of each article", 512, least=2)


@dataclass(frozen=True)
class Forget(Settings):
    """Settings of `protocols.forget`.

    Raises:
        ValueError: no text behind, or no question about others.
    """

    behind: int = setting("other texts behind the one that is forgotten; one more stands before it", 3, least=1)
    per_other: int = setting("questions about each other text", 2, least=1)
    new_tokens: int = setting("tokens in which an answer has to come", NEW_TOKENS, least=1)

    def __post_init__(self) -> None:
        if self.behind < 1 or self.per_other < 1:
            raise ValueError(f"behind and per_other must be 1 or more, got {self.behind} and {self.per_other}.")


@dataclass(frozen=True)
class Integrity(Settings):
    """Settings of `protocols.integrity`.

    Raises:
        ValueError: unknown rows, or numbers that do not go into each other.
    """

    ROWS = ("memory", "ft")

    rows: tuple[str, ...] = setting("what is measured", ROWS, choices=ROWS)
    updates: int = setting("facts that are written, a multiple of --stretch", 20_000, least=1)
    ft_updates: int = setting("facts to fine-tune on, a multiple of --stretch", 2_000, least=1)
    every: int = setting("facts of which one is asked", 100, least=1)
    age: int = setting("facts written since, when a fact is asked once more", 50, least=1)
    stretch: int = setting("facts of one unit of work, all that a killed run loses", 200, least=1)
    checkpoint: int = setting("facts after which other text and pairs are read", 1_000, least=1)
    texts: int = setting("held-out articles of a checkpoint", 8, least=2)
    tokens: int = setting("tokens of each article", 256, least=2)
    pairs: int = setting("BLiMP pairs of a checkpoint; 0: none", 134, least=0)
    role: str | None = setting("how a fact is written: raw, user, system, or style for the model's own", "raw")
    lr: float = setting("learning rate of the fine-tuning", 2e-5)
    steps: int = setting("gradient steps on each fact", 1, least=1)

    def __post_init__(self) -> None:
        _require_some("rows", self.rows, self.ROWS)
        numbers = ("updates", "ft_updates", "every", "age", "stretch", "checkpoint", "texts", "steps")
        small = [f"{name}={getattr(self, name)}" for name in numbers if getattr(self, name) < 1]
        if small or self.tokens < 2 or self.pairs < 0 or self.lr <= 0:
            wrong = ", ".join(small) or f"tokens={self.tokens}, pairs={self.pairs}, lr={self.lr}"
            raise ValueError(f"a stream needs positive numbers (tokens from 2, pairs from 0), got {wrong}.")
        for name in ("updates", "ft_updates", "checkpoint"):
            if getattr(self, name) % self.stretch:
                raise ValueError(
                    f"{name} must be a multiple of the stretch, {self.stretch}, got {getattr(self, name)}; a stretch "
                    f"is never cut."
                )


@dataclass(frozen=True)
class LongBench(Settings):
    """Settings of `protocols.longbench`.

    Raises:
        ValueError: unknown rows, or no room for a prompt.
    """

    ROWS = ("floor", "oracle", "window", "bm25", "memory")

    rows: tuple[str, ...] = setting("what is measured", ROWS, choices=ROWS)
    length: int = setting("tokens of text, question and answer that are kept, from the end", 16_384, least=LONGEST)
    passages: int = setting("passages that BM25 retrieves", 5, least=1)

    def __post_init__(self) -> None:
        _require_some("rows", self.rows, self.ROWS)
        if self.length < LONGEST or self.passages < 1:
            raise ValueError(
                f"length must be {LONGEST} or more and passages 1 or more, got {self.length} and {self.passages}."
            )


@dataclass(frozen=True)
class Retention(Settings):
    """Settings of `protocols.retention`; `memory` gets each of the capacities as its N.

    Raises:
        ValueError: unknown rows or fills, steps that are negative or not ascending, a stream that does not begin full.
    """

    ROWS = ("floor", "dead", "oracle", "window", "bm25", "ours")
    FILLS = ("full", "empty")

    memory: MemorySettings = setting("the memory that is measured", ONE_UPDATE)  # noqa: RUF009
    steps: tuple[int, ...] = setting("texts written in between, after which is asked", (0, 1, 2, 5, 10, 20, 50))
    capacities: tuple[int, ...] = setting("slots that a layer can hold; a checkpoint has its own", (1024, 2048))
    fills: tuple[str, ...] = setting("the memory before the text", FILLS, choices=FILLS)
    rows: tuple[str, ...] = setting("what is measured", ROWS, choices=ROWS)
    new_tokens: int = setting("tokens in which an answer has to come", NEW_TOKENS, least=1)
    stream: bool = setting(f"ask all steps in one stream, not only those beyond {OWN_RUN}", False)

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 0 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must be ascending numbers from 0, got {', '.join(map(str, self.steps))}.")
        _require_some("rows", self.rows, self.ROWS)
        _require_some("fills", self.fills, self.FILLS)
        if len(set(self.capacities)) < len(self.capacities):
            raise ValueError(f"capacities must differ, got {', '.join(map(str, self.capacities))}.")
        if self.streamed and "full" not in self.fills:
            raise ValueError(
                f"a stream (here the steps {self.streamed}) begins with a full memory: add the fill 'full'."
            )

    @property
    def own(self) -> tuple[int, ...]:
        """Steps at which every sample is asked in its own run."""
        return () if self.stream else tuple(t for t in self.steps if t <= OWN_RUN)

    @property
    def streamed(self) -> tuple[int, ...]:
        """Ages at which the texts of the stream are asked."""
        return tuple(t for t in self.steps if t not in self.own)
