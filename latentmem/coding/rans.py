"""Whole numbers <-> few bytes: a range coder (rANS) in numpy with whole counts.

    symbols    c rows, one for each coefficient, of m columns, one for each token; `STRIDE` rows are coded at once
    kind       of each row: which table of counts it has
    state x    of each lane (STRIDE rows x m tokens), 2^16 <= x < 2^32; where x would grow too large, its low 16 bits go
               to the words
    end        the decoder arrives at x = 2^16 in every lane with no word left, or the bytes are not what was written

All arithmetic is in integers, so equal symbols give equal bytes on every machine.

Source: Duda, "Asymmetric numeral systems" (arXiv 1311.2540).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from latentmem.errors import DamagedError

BITS = 12  # the counts of a table add up to 1 << BITS
LOW = 1 << 16  # the smallest state, and the first
STRIDE = 4  # rows that are coded at once: more is faster, and costs the bytes of as many states a token
AT_ONCE = 1 << 14  # symbols that are looked up at once
Words = tuple[NDArray[np.uint32], NDArray[np.uint16]]  # the last states [STRIDE, m], and what went to the words


@dataclass(frozen=True, eq=False)
class Tables:
    """How often each symbol is expected.

    Args:
        counts: [kinds, symbols], whole, each row adds up to 1 << BITS; a symbol with 0 can not be coded.
        kinds: the row of `counts` that each coefficient has, [c].

    Raises:
        ValueError: counts that do not add up, or an unknown kind.
    """

    counts: NDArray[np.uint16]
    kinds: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.counts.ndim != 2 or (self.counts.sum(1, dtype=np.int64) != 1 << BITS).any():
            raise ValueError(f"counts of symbols must add up to {1 << BITS} in each row.")
        if self.kinds.ndim != 1 or (len(self.kinds) and int(self.kinds.max()) >= len(self.counts)):
            raise ValueError(f"there are {len(self.counts)} tables, and a coefficient has another one.")

    @property
    def steps(self) -> int:
        return -(-len(self.kinds) // STRIDE)

    @cached_property
    def _padded(self) -> NDArray[np.int64]:
        """`counts`, and one kind more, of which a single symbol has all places: it changes no state."""
        padded = np.pad(self.counts.astype(np.int64), ((0, 1), (0, 0)))
        padded[-1, 0] = 1 << BITS
        return padded

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """The kinds of the rows of each step, [steps, STRIDE]; rows that the last step lacks are of the added kind."""
        rows = np.full(self.steps * STRIDE, len(self.counts), np.int64)
        rows[: len(self.kinds)] = self.kinds
        return rows.reshape(self.steps, STRIDE)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Where the interval of each symbol begins, as `_padded`."""
        return self._padded.cumsum(1) - self._padded

    @cached_property
    def _places(self) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
        """Of each place of each kind: its symbol, the symbol's count, and how far into the interval the place lies."""
        every = np.arange(self.counts.shape[1])
        symbols = np.concatenate([np.repeat(every, row) for row in self._padded])
        kinds = np.repeat(np.arange(len(self._padded)), 1 << BITS)
        into = np.tile(np.arange(1 << BITS), len(self._padded)) - self._starts[kinds, symbols]
        return symbols.astype(np.uint8), self._padded[kinds, symbols], into


def encode(symbols: NDArray[np.uint8], tables: Tables) -> Words:
    """Symbols [c, m] as states and words, in the order in which `decode` reads them."""
    m, steps = symbols.shape[1], tables.steps
    shaped = np.pad(symbols, ((0, steps * STRIDE - len(symbols)), (0, 0))).reshape(steps, STRIDE, m)
    x, whole = np.full((STRIDE, m), LOW, np.int64), np.empty((STRIDE, m), np.int64)
    lows, full = np.empty(shaped.shape, np.uint16), np.empty(shaped.shape, np.bool_)
    several = max(1, AT_ONCE // (STRIDE * m))
    for first in reversed(range(0, steps, several)):
        at = shaped[first : first + several] + tables._rows[first : first + several, :, None] * tables.counts.shape[1]
        counts, starts = tables._padded.take(at), tables._starts.take(at)
        rest, limits = (1 << BITS) - counts, counts << (32 - BITS)
        for j in reversed(range(len(at))):
            lows[first + j] = x  # the low 16 bits
            over = np.greater_equal(x, limits[j], out=full[first + j])
            np.right_shift(x, over * np.uint8(16), out=x)
            np.floor_divide(x, counts[j], out=whole)
            whole *= rest[j]  # x -> (whole << BITS) + x % count + start
            x += whole
            x += starts[j]
    return x.astype(np.uint32), lows[full]


def decode(parts: Sequence[Words], tables: Tables) -> list[NDArray[np.uint8]]:
    """The symbols [c, m] of several results of `encode`, all lanes at once.

    Raises:
        DamagedError: some of them is not what `encode` gave.
    """
    reader = _Reader(parts)
    symbol_at, count_at, into = tables._places
    x = np.concatenate([states.ravel() for states, _ in parts]).astype(np.int64)
    place, whole = np.empty_like(x), np.empty_like(x)
    rows = np.concatenate([np.repeat(np.arange(STRIDE), states.shape[1]) for states, _ in parts])
    bases = tables._rows << BITS
    symbols = np.empty((tables.steps, len(x)), np.uint8)
    for i in range(tables.steps):
        np.bitwise_and(x, (1 << BITS) - 1, out=place)
        place += bases[i].take(rows)
        symbol_at.take(place, out=symbols[i], mode="clip")  # "clip" is the fast one; no place is outside
        x >>= BITS
        x *= count_at.take(place, out=whole, mode="clip")
        x += into.take(place, out=whole, mode="clip")
        short = (x < LOW).nonzero()[0]
        if len(short):
            x[short] = (x[short] << 16) | reader.words(short)
    if (x != LOW).any() or not reader.done:
        raise DamagedError("a code is damaged: its symbols do not add up. Restore it from a copy.")
    whole_parts = np.split(symbols, reader.bounds[1:-1], axis=1)
    return [part.reshape(tables.steps * STRIDE, -1)[: len(tables.kinds)] for part in whole_parts]


class _Reader:
    """Gives each lane its next word; the words of each part follow each other."""

    def __init__(self, parts: Sequence[Words]) -> None:
        self._words = np.concatenate([words for _, words in parts]).astype(np.int64)
        self._ends = np.array([len(words) for _, words in parts]).cumsum()
        self._at = np.concatenate([[0], self._ends[:-1]])  # where each part goes on
        self.bounds = np.cumsum([0, *(states.size for states, _ in parts)])  # lanes of each part

    def words(self, short: NDArray[np.intp]) -> NDArray[np.int64]:
        """The words of lanes by number, ascending."""
        cuts = short.searchsorted(self.bounds) if len(self._ends) > 1 else np.array([0, len(short)])
        first, taken = self._at, cuts[1:] - cuts[:-1]  # of each part
        self._at = first + taken
        if (self._at > self._ends).any():
            raise DamagedError("a code is damaged: it ends too early. Restore it from a copy.")
        if len(self._ends) == 1:
            return self._words[first[0] : self._at[0]]
        return self._words[np.repeat(first - cuts[:-1], taken) + np.arange(len(short))]

    @property
    def done(self) -> bool:
        return bool((self._at == self._ends).all())


def whole_counts(shares: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Counts that add up to 1 << BITS, nearest to shares [kinds, symbols]; at least 1 where a share is not 0."""
    there = shares > 0
    free = (1 << BITS) - there.sum(1, keepdims=True)
    counts = there + np.floor(shares / shares.sum(1, keepdims=True) * free).astype(np.int64)
    counts[np.arange(len(counts)), counts.argmax(1)] += (1 << BITS) - counts.sum(1)
    return counts.astype(np.uint16)
