"""Which rows go through the model together."""

from __future__ import annotations

from collections.abc import Sequence

ROWS = 32  # that go through the model at once


def by_tokens(rows: Sequence[int], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows in order, cut into passes of at most `ROWS` rows and `most` tokens when padded; at least one row each."""
    passes: list[list[int]] = []
    longest = 0
    for row, length in zip(rows, lengths, strict=True):
        longest = max(longest, length)
        if not passes or len(passes[-1]) == ROWS or longest * (len(passes[-1]) + 1) > most:
            passes.append([])
            longest = length
        passes[-1].append(row)
    return passes


def alike(
    prefixes: Sequence[int], lengths: Sequence[int], most: int | None = None, *, slides: bool, exact: bool = False
) -> list[list[int]]:
    """Rows in passes of at most `most` (`ROWS`) rows; those without a prefix go apart, for the plain model.

    Transformers counts a sliding window in columns, so padding between memory and text would hide a part of the
    memory: then only texts of one length go together.

    Args:
        prefixes: positions in front of each row.
        lengths: of each row's text, as far as it is padded on the left.
        slides: whether the model has sliding windows.
        exact: nothing may be padded, neither texts nor memories.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (P, length) in enumerate(zip(prefixes, lengths, strict=True)):
        kind = (P if exact else min(P, 1), length if exact or (slides and P) else 0)
        groups.setdefault(kind, []).append(i)
    most = most or ROWS
    return [rows[i : i + most] for rows in groups.values() for i in range(0, len(rows), most)]
