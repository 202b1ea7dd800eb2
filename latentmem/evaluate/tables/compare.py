"""Retention runs of one question side by side: untrained and trained, other presets, other compressions.

All runs have to be about the same texts and questions. Questions that every run answered at a step count there, so that
all differences are paired; a run that was stopped makes the table smaller, not wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentmem.core.settings import MemorySettings
from latentmem.evaluate.runner import Folder, Record
from latentmem.evaluate.stats import Estimate, difference, mean_of, quotient
from latentmem.evaluate.tables.summary import METRICS, NAMES, cell_text
from latentmem.files.container import replace_bytes

Cells = dict[int, dict[str, Record]]  # step -> question -> record
SHARED = ("floor", "oracle", "window", "bm25")


@dataclass(frozen=True)
class Line:
    """One row of one table: an estimate for each step; step -1 where none changes it."""

    metric: str
    kind: str  # "row", "kept" (share of step 0), "gain" (minus the first run), "over window", "left"
    name: str
    cells: dict[int, Estimate]


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
    return config, [record for unit in Folder(path, config).done().values() for record in unit]


def _taken(memory: Mapping[str, Any]) -> int:
    """The slots that an answer takes of a long-term part; none where nothing that is dropped is kept."""
    longterm = MemorySettings.of(memory).longterm
    return longterm.takes if longterm is not None else 0


def compare(runs: Mapping[str, Path], N: int, *, stream: bool = False) -> list[Line]:
    """The lines of all tables: every run's full memory of N slots, beside floor, oracle, window and BM25.

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
    for name, (config, _) in loaded.items():
        if config["data"]["sha256"] != first["data"]["sha256"]:
            raise ValueError(f"{name} asks other questions than {next(iter(runs))}: draw both with the same options.")
    memories = {
        name: _cells(records, "ours", N - _taken(config["settings"]["memory"]), "full", stream)
        for name, (config, records) in loaded.items()
    }
    for name, cells in memories.items():
        if not cells:
            raise ValueError(f"{runs[name]} holds no memory of N = {N} slots that was full at first.")
    rows = _beside([records for _, records in loaded.values()], N, stream)
    steps = sorted(set.intersection(*(set(cells) for cells in memories.values())))
    both = {t: set.intersection(*(set(cells[t]) for cells in memories.values())) for t in steps}
    out: list[Line] = []
    for metric in METRICS:
        out += _lines(metric, memories, rows, both)
    for name, cells in memories.items():
        shares = {t: mean_of(_of(cells[t], both[t]).values(), "left") for t in steps}
        out.append(Line("left", "left", name, _there(shares)))
        taken = {t: {q for q in questions if "found" in cells[t][q]} for t, questions in both.items()}
        if any(taken.values()):
            share = {t: mean_of(_of(cells[t], questions).values(), "found") for t, questions in taken.items()}
            out.append(Line("left", "left", f"{name}: of its long-term slots retrieved", _there(share)))
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
) -> list[Line]:
    out, base = [], next(iter(memories))
    for name, cells in [*rows.items(), *memories.items()]:
        at = {t: both[t] for t in both} if set(cells) != {-1} else {-1: set.union(*both.values())}
        out.append(
            Line(
                metric,
                "row",
                name,
                _there({t: mean_of(_of(cells.get(t, {}), questions).values(), metric) for t, questions in at.items()}),
            )
        )
    for name, cells in memories.items():
        if metric != "loglik" and 0 in both:
            kept = {t: quotient(_of(cells[t], q & both[0]), cells[0], metric) for t, q in both.items()}
            out.append(Line(metric, "kept", f"{name} / its step 0", _there(kept)))
        beside = [(NAMES[row], rows.get(NAMES[row], {})) for row in ("window", "bm25")]
        for other, theirs in ((base, memories[base]), *beside):
            if name != other and theirs:
                gain = {t: difference(_of(cells[t], q), theirs.get(t, {}), metric) for t, q in both.items()}
                out.append(Line(metric, "gain", f"{name} - {other}", _there(gain)))
    return [line for line in out if line.cells]


def _cells(records: Iterable[Record], row: str, N: int, fill: str | None, stream: bool) -> Cells:
    cells: Cells = {}
    for r in records:
        there = r["row"] == row and r["N"] == N and bool(r.get("stream")) == stream
        if there and (fill is None or r["fill"] == fill):
            cells.setdefault(r.get("step", -1), {})[r["question"]] = r
    return cells


def _of(cell: dict[str, Record], questions: Iterable[str]) -> dict[str, Record]:
    return {q: cell[q] for q in sorted(questions) if q in cell}


def _there(cells: Mapping[int, Estimate | None]) -> dict[int, Estimate]:
    return {t: cell for t, cell in cells.items() if cell is not None}


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
                out.append(f"## {heading}\n\n{_table(chosen)}")
    return "\n\n".join(out) + "\n"


def _table(lines: Sequence[Line]) -> str:
    steps = sorted({t for line in lines for t in line.cells if t >= 0})
    rows = ["| | n (texts) | " + " | ".join(f"t = {t}" for t in steps) + " |", "| --- |" + " --- |" * (len(steps) + 1)]
    for line in lines:
        sizes = ", ".join(sorted({f"{cell.n} ({cell.texts})" for cell in line.cells.values()}))
        cells = {steps[0]: line.cells[-1]} if -1 in line.cells else line.cells
        rows.append(
            f"| {line.name} | {sizes} | {' | '.join(cell_text(cells[t]) if t in cells else '' for t in steps)} |"
        )
    return "\n".join(rows)


def draw(lines: Sequence[Line], title: str, path: Path) -> None:
    """The token accuracy of all rows over steps, with intervals, as a PNG."""
    from latentmem.evaluate.tables.plots import require

    pyplot = require()
    figure, axis = pyplot.subplots(figsize=(8, 5.4), layout="constrained")
    lines = [line for line in lines if (line.metric, line.kind) == ("accuracy", "row")]
    shared = set(NAMES.values())
    colours = iter(("#999999", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"))
    for line in lines:
        if -1 in line.cells:
            axis.axhline(line.cells[-1].mean, color="black", linestyle=":", linewidth=1)
            axis.annotate(
                line.name,
                (0.99, line.cells[-1].mean),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
            )
            continue
        colour = "#d55e00" if line.name in shared else next(colours)
        steps = sorted(line.cells)
        style = {NAMES["window"]: "--", NAMES["bm25"]: "-."}.get(line.name, "-")
        places = range(len(steps))
        axis.plot(
            places, [line.cells[t].mean for t in steps], style, color=colour, label=line.name, marker="o", markersize=4
        )
        low, high = ([getattr(line.cells[t], end) for t in steps] for end in ("low", "high"))
        axis.fill_between(places, low, high, color=colour, alpha=0.12)
        axis.set_xticks(list(places), [str(t) for t in steps])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("texts written since")
    axis.set_ylabel("token accuracy")
    axis.set_title(title)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(runs: Mapping[str, Path], N: int, out: Path, command: str = "", *, stream: bool = False) -> list[Line]:
    """Compare runs and write compare.md, compare.json and compare.png into a folder."""
    lines = compare(runs, N, stream=stream)
    out.mkdir(parents=True, exist_ok=True)
    title = f"Retention side by side, N = {N}"
    replace_bytes(out / "compare.json", json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    replace_bytes(out / "compare.md", f"# {title}\n\n```\n{command}\n```\n\n{markdown(lines)}")
    draw(lines, title, out / "compare.png")
    return lines
