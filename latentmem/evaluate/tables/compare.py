"""Retention runs of one question side by side: untrained and trained, other presets, other compressions.

All runs have to be about the same texts and questions. Questions that every run answered at a step count there, so that
all differences are paired; a run that was stopped makes the table smaller, not wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentmem.disk import replace_bytes
from latentmem.evaluate.runner import Folder, Record
from latentmem.evaluate.stats import Estimate, difference, mean_of, quotient
from latentmem.evaluate.tables import plots
from latentmem.evaluate.tables.summary import METRICS, NAMES, as_json, table
from latentmem.evaluate.tables.summary import StepLine as Line

Cells = dict[int, dict[str, Record]]  # step -> question -> record
SHARED = ("floor", "oracle", "window", "bm25")


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """A run's config and its records.

    Raises:
        ValueError: the folder holds no retention run.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))["config"]
        protocol = config["protocol"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{path} holds no run of `latentmem eval retention`.") from None
    if not protocol.startswith("retention/"):
        raise ValueError(f"{path} holds a run of {protocol}, and retention was expected.")
    return config, Folder(path, config).all_records()


def _taken(memory: Mapping[str, Any]) -> int:
    """The slots that an answer takes of a long-term part; none where what is dropped is lost."""
    return (memory.get("longterm") or {}).get("R", 0)


def compare(runs: Mapping[str, Path], N: int, *, stream: bool = False) -> list[Line]:
    """The lines of all tables: every run's full memory of N slots, beside floor, oracle, window and BM25.

    A line's kind is "row", "kept" (share of step 0), "gain" (minus the first run, window or BM25) or "left".

    Args:
        runs: name -> folder; differences are taken against the first. Rows beside the memories come from the first run
            that has them.
        N: slots that an answer sees: those of a memory, and those that it takes of a long-term part.
        stream: compare what was asked in streams, not in runs of each sample's own.

    Raises:
        ValueError: fewer than two runs, runs about other questions, or none with such a memory.
    """
    if len(runs) < 2:
        raise ValueError(f"give at least two runs as name=folder, got {len(runs)}.")
    loaded = {name: read(path) for name, path in runs.items()}
    first = next(iter(loaded.values()))[0]
    memories: dict[str, Cells] = {}
    for name, (config, records) in loaded.items():
        if config["data"]["sha256"] != first["data"]["sha256"]:
            raise ValueError(f"{name} asks other questions than {next(iter(runs))}: draw both with the same options.")
        cells = _cells(records, "ours", N - _taken(config["settings"]["memory"]), "full", stream)
        if not cells:
            raise ValueError(f"{runs[name]} holds no memory of N = {N} slots that was full at first.")
        memories[name] = cells
    rows = _beside([records for _, records in loaded.values()], N, stream)
    steps = sorted(set.intersection(*(set(cells) for cells in memories.values())))
    both = {t: set.intersection(*(set(cells[t]) for cells in memories.values())) for t in steps}
    out = [line for metric in METRICS for line in _lines(metric, memories, rows, both) if line.cells]
    for name, cells in memories.items():
        out.append(_line("left", "left", name, {t: _mean(cells[t], q, "left") for t, q in both.items()}))
        taken = {t: {q for q in questions if "found" in cells[t][q]} for t, questions in both.items()}
        if any(taken.values()):
            share = {t: _mean(cells[t], questions, "found") for t, questions in taken.items()}
            out.append(_line("left", "left", f"{name}: of its long-term slots retrieved", share))
    return out


def _beside(runs: Iterable[Sequence[Record]], N: int, stream: bool) -> dict[str, Cells]:
    """The rows beside the memories by their names, each from the first run that has it."""
    rows: dict[str, Cells] = {}
    for row in SHARED:
        apart = row in ("floor", "oracle")
        of_runs = (_cells(records, row, 0 if apart else N, None, stream and not apart) for records in runs)
        if cells := next(filter(None, of_runs), None):
            rows[NAMES[row]] = cells
    return rows


def _lines(
    metric: str, memories: Mapping[str, Cells], rows: Mapping[str, Cells], both: dict[int, set[str]]
) -> Iterator[Line]:
    base = next(iter(memories))
    for name, cells in [*rows.items(), *memories.items()]:
        at = both if set(cells) != {-1} else {-1: set.union(*both.values())}
        yield _line(metric, "row", name, {t: _mean(cells.get(t, {}), q, metric) for t, q in at.items()})
    for name, cells in memories.items():
        if metric != "loglik" and 0 in both:
            kept = {t: quotient(_of(cells[t], q & both[0]), cells[0], metric) for t, q in both.items()}
            yield _line(metric, "kept", f"{name} / its step 0", kept)
        beside = [(NAMES[row], rows.get(NAMES[row], {})) for row in ("window", "bm25")]
        for other, theirs in ((base, memories[base]), *beside):
            if name != other and theirs:
                gain = {t: difference(_of(cells[t], q), theirs.get(t, {}), metric) for t, q in both.items()}
                yield _line(metric, "gain", f"{name} - {other}", gain)


def _line(metric: str, kind: str, name: str, cells: Mapping[int, Estimate | None]) -> Line:
    return Line(metric, kind, name, {t: cell for t, cell in cells.items() if cell is not None})


def _cells(records: Iterable[Record], row: str, N: int, fill: str | None, stream: bool) -> Cells:
    cells: Cells = {}
    for r in records:
        there = r["row"] == row and r["N"] == N and bool(r.get("stream")) == stream
        if there and (fill is None or r["fill"] == fill):
            cells.setdefault(r.get("step", -1), {})[r["question"]] = r
    return cells


def _of(cell: dict[str, Record], questions: Iterable[str]) -> dict[str, Record]:
    return {q: cell[q] for q in sorted(questions) if q in cell}


def _mean(cell: dict[str, Record], questions: Iterable[str], metric: str) -> Estimate | None:
    return mean_of(_of(cell, questions).values(), metric)


def markdown(lines: Sequence[Line]) -> str:
    """The tables as Markdown, means with their 95% intervals."""
    titles = {
        **{m: f"{t[0].upper()}{t[1:]}" for m, t in METRICS.items()},
        "left": "Share of the text's slots that is left",
    }
    out = []
    for metric, title in titles.items():
        for heading, kinds in ((title, ("row", "kept", "left")), (f"{title}, paired differences", ("gain",))):
            chosen = [line for line in lines if line.metric == metric and line.kind in kinds]
            if chosen:
                out.append(f"## {heading}\n\n{table(chosen)}")
    return "\n\n".join(out) + "\n"


def draw(lines: Sequence[Line], title: str, path: Path) -> None:
    """The token accuracy of all rows over steps, with intervals, as a PNG."""
    chosen = [line for line in lines if (line.metric, line.kind) == ("accuracy", "row")]
    chosen.sort(key=lambda line: set(line.cells) <= {-1})  # the first curves have the plainest look
    steps = sorted({t for line in chosen for t in line.cells if t >= 0})
    curves: plots.Curves = {x.name: [(t, x.cells.get(t, x.cells.get(-1))) for t in steps] for x in chosen}
    plots.panels({"token accuracy": curves}, "texts written since", title, path, ticks=steps)


def write(runs: Mapping[str, Path], N: int, out: Path, command: str = "", *, stream: bool = False) -> list[Line]:
    """Compare runs and write compare.md, compare.json and compare.png into a folder."""
    lines = compare(runs, N, stream=stream)
    out.mkdir(parents=True, exist_ok=True)
    title = f"Retention side by side, N = {N}"
    replace_bytes(out / "compare.json", json.dumps(as_json(lines), indent=1) + "\n")
    replace_bytes(out / "compare.md", f"# {title}\n\n```\n{command}\n```\n\n{markdown(lines)}")
    draw(lines, title, out / "compare.png")
    return lines
