"""Tables as lines: "name: Ada Brix, age: 36" under a head, and "Ada Brix, 36" without one."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

DELIMITERS = ",;\t|"


def of_csv(text: str) -> str:
    """The rows of separated values; a text that is none stays as it is."""
    sample = text[:65536]
    delimiter = max(DELIMITERS, key=lambda one: _evenness(sample, one))
    if match := re.match(r"sep=(.)\r?\n", text):  # Excel says so
        delimiter, text = match[1], text[match.end() :]
    try:
        return "\n".join(lines(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)))
    except csv.Error:
        return text


def _evenness(sample: str, delimiter: str) -> tuple[int, int]:
    """How many of the first rows have the same number of cells, more than one, and that number."""
    try:
        rows = [
            len(row) for _, row in zip(range(20), csv.reader(io.StringIO(sample), delimiter=delimiter), strict=False)
        ]
    except csv.Error:
        return 0, 0
    return max(((rows.count(width), width) for width in set(rows) if width > 1), default=(0, 0))


def lines(rows: Iterable[Sequence[str]], head: bool | None = None) -> list[str]:
    """A line for each row that holds something; `head`: whether the first row names the columns, None: looked for."""
    table = [row for row in map(_trimmed, rows) if row]
    if not (_has_head(table) if head is None else head and len(table) > 1):
        return [_joined(filter(None, row)) for row in table]
    names = table[0]
    return [_joined(_named(names, row)) for row in table[1:]]


def _trimmed(row: Sequence[str]) -> list[str]:
    """The cells of a row up to its last one that holds something."""
    cells = [" ".join(cell.split()) for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _joined(cells: Iterable[str]) -> str:
    cells = list(cells)
    return ("; " if any("," in cell for cell in cells) else ", ").join(cells)


def _named(names: Sequence[str], row: Sequence[str]) -> Iterable[str]:
    for i, cell in enumerate(row):
        if cell:
            name = names[i] if i < len(names) else ""
            yield f"{name}: {cell}" if name else cell


def _has_head(table: Sequence[Sequence[str]]) -> bool:
    """Whether the first row differs from the others as names differ from what they name.

    It has no digit where a whole column below has digits, or it is written small where the rows below are not.
    """
    if len(table) < 2 or len(table[0]) < 2:
        return False
    first, others = table[0], table[1:]
    if not all(first) or len(set(first)) < len(first) or any(c.isdigit() for cell in first for c in cell):
        return False
    columns = [[row[i] for row in others if i < len(row) and row[i]] for i in range(len(first))]
    if any(column and all(any(c.isdigit() for c in cell) for cell in column) for column in columns):
        return True
    small = all(cell == cell.lower() and cell != cell.upper() for cell in first)
    return small and all(any(cell != cell.lower() for cell in row) for row in others)
