"""Records of a retention run -> numbers with intervals, and the numbers as a Markdown table.

Everything that is printed has an interval; what has none is left out. Differences are paired, question by question.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from rich.table import Table

from latentmem.evaluate.stats import Estimate, difference, mean, mean_of, quotient

Record = dict[str, Any]
METRICS = {"hit": "hits", "accuracy": "token accuracy", "loglik": "log-likelihood of the gold answer, per token"}
OURS = "ours"
NAMES = {
    "floor": "floor (closed book)",
    "dead": "dead memory (slots zeroed)",
    "oracle": "oracle (text in the context)",
    "window": "window (last N tokens)",
    "bm25": "BM25 + context",
    "ours": "ours, memory",
}
CONSTANT = ("floor", "dead", "oracle")  # no step changes them


@dataclass(frozen=True)
class StepLine:
    """One row of a table: an estimate for each step; step -1 where none changes it."""

    metric: str
    kind: str
    name: str
    cells: dict[int, Estimate]

    def as_json(self) -> Record:
        return {**asdict(self), "cells": {str(t): cell.as_json() for t, cell in self.cells.items()}}


@dataclass(frozen=True)
class Line(StepLine):
    """One row of a table of retention.

    Its kind is "row", "relative" (to the oracle), "bound", "paired" (ours minus another row), "left", "M/N" or "found"
    (of the text's long-term slots what its questions take).

    Args:
        filtered: without the questions that are answered closed book.
        row, fill: as in `retention`.
    """

    N: int
    stream: bool
    filtered: bool
    row: str
    fill: str


def lines(records: Sequence[Record]) -> list[Line]:
    """All lines of all tables: for each N, own runs and stream, metric, all and filtered questions.

    A question is filtered out if it is answered closed book (the M+ protocol).
    """
    table = _Table(records)
    all_lines: list[Line] = []
    for N, stream in table.parts():
        for metric in METRICS:
            for filtered in (False, True) if metric == "hit" and table.answered else (False,):
                all_lines += table.lines(N, stream, metric, filtered)
        all_lines += table.kept(N, stream)
    return [line for line in all_lines if line.cells]


class _Table:
    """Records by what they belong to."""

    def __init__(self, records: Sequence[Record]) -> None:
        # (row, N, fill, stream, step) -> question -> record; constants have no step, floor and oracle no N
        self.by: dict[tuple[str, int, str, bool, int], dict[str, Record]] = defaultdict(dict)
        for r in records:
            key = (r["row"], r["N"], r["fill"], bool(r.get("stream")), r.get("step", 0))
            self.by[key][r["question"]] = r
        floor = self._cell("floor", 0, "")
        self.new = {q for q, r in floor.items() if not r["hit"]}  # questions that are not answered closed book
        self.answered = len(self.new) < len(floor)

    def parts(self) -> list[tuple[int, bool]]:
        """(N, stream) of each part; 0 where there is nothing but floor and oracle."""
        measured = {(N, stream) for row, N, _, stream, _ in self.by if row not in CONSTANT}
        return sorted(measured or {(N, False) for _, N, *_ in self.by if N} or {(0, False)} if self.by else set())

    def _cell(self, row: str, N: int, fill: str, stream: bool = False, step: int = 0) -> dict[str, Record]:
        if row in CONSTANT:
            N, stream, step = (N if row == "dead" else 0), False, 0
        return self.by.get((row, N, fill, stream, step), {})

    def _rows(self, N: int, stream: bool) -> dict[str, tuple[str, str]]:
        """Name of each line -> (row, fill), in the order of the table."""
        there = {(row, fill) for row, n, fill, s, _ in self.by if n in (0, N) and (s == stream or row in CONSTANT)}
        names = {}
        for row, name in NAMES.items():
            for fill in ("", "full", "empty"):
                if (row, fill) in there:
                    names[f"{name} {fill} at first" if row == OURS else name] = (row, fill)
        return names

    def _steps(self, N: int, stream: bool) -> list[int]:
        return sorted({step for row, n, _, s, step in self.by if n == N and s == stream and row not in CONSTANT})

    def lines(self, N: int, stream: bool, metric: str, filtered: bool) -> list[Line]:
        rows, steps, lines = self._rows(N, stream), self._steps(N, stream), []

        def line(kind: str, name: str, cells: Iterable[tuple[int, Estimate | None]]) -> None:
            there = {step: cell for step, cell in cells if cell is not None}
            lines.append(Line(metric, kind, name, there, N, stream, filtered, row, fill))

        def values(row: str, fill: str, step: int) -> dict[str, Record]:
            cell = self._cell(row, N, fill, stream, step)
            return {q: r for q, r in cell.items() if not filtered or q in self.new}

        for name, (row, fill) in rows.items():
            at = steps[:1] or [0] if row in CONSTANT else steps
            line("row", name, ((t, mean_of(values(row, fill, t).values(), metric)) for t in at))
        for name, (row, fill) in rows.items():
            if row != OURS:
                continue
            if metric != "loglik":
                oracle = values("oracle", "", 0)
                line("relative", name, ((t, quotient(values(row, fill, t), oracle, metric)) for t in steps))
            line("bound", name, ((t, self._bound(N, stream, fill, t, metric, values)) for t in steps))
            for other, (other_row, other_fill) in rows.items():
                if other_row in CONSTANT or (other_row != OURS and other_fill == fill):  # of one history
                    pairs = ((t, values(row, fill, t), values(other_row, other_fill, t)) for t in steps)
                    line("paired", f"{name} - {other}", ((t, difference(a, b, metric)) for t, a, b in pairs))
        return lines

    def _bound(self, N: int, stream: bool, fill: str, t: int, metric: str, values: Any) -> Estimate | None:
        """b + (u - b) * share left: what would be known if knowing went with slots alone (paper, section 4.4)."""
        ours, oracle, floor = values(OURS, fill, t), values("oracle", "", 0), values("floor", "", 0)
        both = [q for q in ours if q in oracle and q in floor]
        bound = [floor[q][metric] + (oracle[q][metric] - floor[q][metric]) * ours[q]["left"] for q in both]
        return mean(bound, [ours[q]["text"] for q in both])

    def kept(self, N: int, stream: bool) -> list[Line]:
        """Share of the text's slots (of its tokens in the window, of right passages found) left at each step; M/N."""
        lines = []
        for name, (row, fill) in self._rows(N, stream).items():
            if row in CONSTANT:
                continue
            cells = {t: self._cell(row, N, fill, stream, t) for t in self._steps(N, stream)}
            kinds = {"left": name}
            if row == OURS:
                kinds |= {"M/N": f"{name}: M/N", "found": f"{name}: long-term slots that are retrieved"}
            for kind, title in kinds.items():
                estimates = {t: _share(cell.values(), kind, N) for t, cell in cells.items()}
                there = {t: estimate for t, estimate in estimates.items() if estimate}
                lines.append(Line("left", kind, title, there, N, stream, False, row, fill))
        return lines


def _share(records: Iterable[Record], kind: str, N: int) -> Estimate | None:
    if kind == "M/N":
        records = [{**r, kind: r["M"] / N} for r in records]
    return mean_of([r for r in records if kind in r], kind)


def as_json(lines: Iterable[StepLine]) -> list[Record]:
    """Lines as plain data for a file."""
    return [line.as_json() for line in lines]


# --- Markdown -------------------------------------------------------------------------------------------------------


def markdown(lines: Sequence[Line]) -> str:
    """The tables of all parts as Markdown, means with their 95% intervals."""
    out = []
    for N, stream in dict.fromkeys((line.N, line.stream) for line in lines):
        part = [line for line in lines if (line.N, line.stream) == (N, stream)]
        out.append(f"## {part_name(N, stream)}{': one memory, texts of every age in it' * stream}")
        for title, chosen in sections(part):
            out.append(f"### {title}\n\n{table(chosen)}")
    return "\n\n".join(out) + "\n"


def sections(part: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    """Lines of one part under their headings, in the order of reading."""
    groups: list[tuple[str, list[Line]]] = []
    for filtered in (False, True):
        for metric, title in METRICS.items():
            chosen = [line for line in part if (line.metric, line.filtered) == (metric, filtered)]
            heading = f"{title[0].upper()}{title[1:]}{', without questions answered closed book' * filtered}"
            groups.append((heading, [line for line in chosen if line.kind in ("row", "relative", "bound")]))
            if metric == "accuracy":
                paired = [line for line in chosen if line.kind == "paired"]
                groups.append((f"{heading}, paired differences", paired))
    groups.append(("Share that is left of the text", [line for line in part if line.metric == "left"]))
    return [(heading, chosen) for heading, chosen in groups if chosen]


def part_name(N: int, stream: bool) -> str:
    """How a part of the tables is called."""
    return f"N = {N}{', stream' * stream}" if N else "without a memory"


def terminal(lines: Sequence[Line]) -> Iterator[tuple[str, Table]]:
    """The token accuracy of each part as a table for the terminal."""
    for N, stream in dict.fromkeys((line.N, line.stream) for line in lines):
        chosen = [x for x in lines if (x.N, x.stream, x.metric, x.kind) == (N, stream, "accuracy", "row")]
        steps, rows = grid(chosen)
        shown = Table(box=None, pad_edge=False)
        for column in ("texts written since", *map(str, steps)):
            shown.add_column(column, justify="right" if shown.columns else "left")
        for line, _, cells in rows:
            shown.add_row(line.name, *map(cell_text, cells))
        yield f"Token accuracy, {part_name(N, stream)}", shown


def label(line: StepLine) -> str:
    """How a line is called in a table."""
    return {"relative": f"{line.name} / oracle", "bound": f"bound for {line.name}"}.get(line.kind, line.name)


AnyLine = TypeVar("AnyLine", bound=StepLine)


def grid(lines: Sequence[AnyLine]) -> tuple[list[int], list[tuple[AnyLine, str, list[Estimate | None]]]]:
    """The steps of a table, and each line with its numbers of questions (and texts), and its cells."""
    steps = sorted({t for line in lines for t in line.cells if t >= 0})
    rows = []
    for line in lines:
        sizes = sorted({f"{cell.n} ({cell.texts})" for cell in line.cells.values()})
        cells = {steps[0]: line.cells[-1]} if -1 in line.cells else line.cells
        rows.append((line, ", ".join(sizes), [cells.get(t) for t in steps]))
    return steps, rows


def cell_text(cell: Estimate | None) -> str:
    """Mean and interval, two decimals."""
    if cell is None:
        return ""
    mean, low, high = (f"{round(x, 2) + 0.0:.2f}" for x in (cell.mean, cell.low, cell.high))  # + 0.0: no -0.00
    return f"{mean} [{low}, {high}]"


def table(lines: Sequence[StepLine]) -> str:
    """Lines as a Markdown table."""
    steps, rows = grid(lines)
    text = ["| | n (texts) | " + " | ".join(f"t = {t}" for t in steps) + " |", "| --- |" + " --- |" * (len(steps) + 1)]
    text += [f"| {' | '.join([label(line), sizes, *map(cell_text, cells)])} |" for line, sizes, cells in rows]
    return "\n".join(text)
