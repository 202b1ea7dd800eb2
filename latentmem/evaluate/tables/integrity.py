"""The table and the picture of `protocols.integrity`: what its records say, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from latentmem.evaluate.protocol import Numbers, as_lines
from latentmem.evaluate.settings import Integrity
from latentmem.evaluate.stats import Estimate, difference, mean, mean_of, perplexity, ratio, slope
from latentmem.evaluate.tables import plots

ROWS = Integrity.ROWS
DECAY = 0.9999  # of the paper's exponential mean, per update
TURNS = 10  # N/K updates, of which a stream has this many behind it where the test for drift begins
WINDOWS = 10  # equal parts of a stream in the table
FEWEST = 4  # windows that a drift is computed from
LESS_ALONE = "asked at once, less the same fact alone in an empty memory"
SHARES = {"hit": "hits", "accuracy": "token accuracy"}
METRICS = {**SHARES, "loglik": "log-likelihood per token"}
LOOKS = {"norms": ("mean slot norm", "norm"), "variances": ("variance of slot norms", "variance")}  # of each layer
SCALE = 10_000  # updates, of which a slope says the change
Record = dict[str, Any]


@as_lines
def lines(records: Sequence[Record]) -> Numbers:
    """Answers by age and window, perplexity and pairs at checkpoints, slot norms, drift, speed."""
    for row in ROWS:
        asked = [r for r in records if r["kind"] == "asked" and r["row"] == row]
        for age in sorted({r["age"] for r in asked}):
            yield from _answers(row, age, [r for r in asked if r["age"] == age])
        more = _less_alone(asked, records)
        yield f"{row}, {LESS_ALONE}: token accuracy", mean([y for _, y in more], [at for at, _ in more])
        yield from _checkpoints(records, row)
        for name, estimate in [*_slot_norms(records, row), *drift(records, row)]:
            yield f"{row}: {name}", estimate
        speeds = [r for r in records if r["kind"] == "speed" and r["row"] == row]
        pace = ratio([r["updates"] for r in speeds], [r["seconds"] for r in speeds], [r["at"] for r in speeds])
        yield f"{row}: updates per second", pace


def _answers(row: str, age: int, asked: Sequence[Record]) -> Numbers:
    """What was asked at one age: over the whole stream, with more weight on its end, and in each window."""
    name = f"{row}, asked {_called(age)}"
    for metric, title in METRICS.items():
        yield f"{name}: {title}", _mean(asked, metric)
    weights = [DECAY ** (asked[-1]["at"] - r["at"]) for r in asked]
    for metric, title in SHARES.items():
        values = [w * r[metric] for w, r in zip(weights, asked, strict=True)]
        yield f"{name}: {title}, exponential mean", ratio(values, weights, [r["question"] for r in asked])
        for start, end, part in _windows(asked):
            yield f"{name}: {title}, updates {start} to {end}", _mean(part, metric)
    if row == "memory":
        yield f"{name}: share of its slots that is left", _mean(asked, "left")


def _called(age: int) -> str:
    return "at once" if age == 0 else f"{age} facts later"


_mean = partial(mean_of, group="question")


def _windows(records: Sequence[Record]) -> Iterator[tuple[int, int, list[Record]]]:
    """Equal parts of the stream: (first update, last update, what was asked in between)."""
    last = max((r["at"] for r in records), default=0)
    bounds = [round(last * i / WINDOWS) for i in range(WINDOWS + 1)]
    for start, end in pairwise(bounds):
        yield start + 1, end, [r for r in records if start < r["at"] <= end]


def _checkpoints(records: Sequence[Record], row: str) -> Numbers:
    """Perplexity and pairs of the plain model, and of a row at up to `WINDOWS` checkpoints, the last one among them."""
    read, pairs = _at(records, "read", row), _at(records, "pair", row)
    plain = {kind: _at(records, kind, "plain").get(0, {}) for kind in ("read", "pair")}
    points = sorted(read)
    shown = min(WINDOWS, len(points))
    points = [points[-1 - i * len(points) // shown] for i in reversed(range(shown))]
    for at in points:
        yield f"{row}: perplexity / plain after {at}", perplexity(read[at], plain["read"])
    for at in points:
        yield f"{row}: BLiMP - plain after {at}", difference(pairs.get(at, {}), plain["pair"], "right")


def _at(records: Sequence[Record], kind: str, row: str) -> dict[int, dict[str, Record]]:
    """Records of a kind by checkpoint and text."""
    by_point: dict[int, dict[str, Record]] = {}
    for r in records:
        if r["kind"] == kind and r["row"] == row:
            by_point.setdefault(r["at"], {})[r["text"]] = r
    return by_point


def settled(records: Sequence[Record]) -> tuple[float, int] | None:
    """N/K by what was written, and the update from which drift is looked for; None: no memory was written."""
    slots = [r for r in records if r["kind"] == "slots"]
    if not slots:
        return None
    turn = slots[0]["N"] * len(slots) / sum(r["K"] for r in slots)
    return turn, round(TURNS * turn)


def drift(records: Sequence[Record], row: str) -> list[tuple[str, Estimate | None]]:
    """Slopes per `SCALE` updates, of a memory after it was replaced `TURNS` times, of fine-tuning from the start.

    Intervals are drawn over windows of 2 N/K updates, because neighbouring states share most of their slots; of
    fine-tuning over the updates that are asked. Fewer than `FEWEST` windows give nothing.
    """
    known = settled(records) if row == "memory" else (0.5, 0)
    if known is None:
        return []
    turn, start = known
    width = max(1, round(2 * turn))

    def trend(points: Sequence[tuple[int, float]]) -> Estimate | None:
        windows = [at // width for at, _ in points]
        if len(set(windows)) < FEWEST:
            return None
        return slope([at / SCALE for at, _ in points], [y for _, y in points], windows)

    asked = [r for r in records if r["kind"] == "asked" and r["row"] == row and r["at"] > start]
    out = []
    for age in sorted({r["age"] for r in asked}):
        name = f"token accuracy asked {_called(age)}"
        points = [(r["at"], float(r["accuracy"])) for r in asked if r["age"] == age]
        out.append((f"drift of the {name}, per {SCALE} updates", trend(points)))
    more = _less_alone(asked, records)
    if more:
        out.append((f"drift of the token accuracy {LESS_ALONE}, per {SCALE} updates", trend(more)))
    for what, (name, short) in LOOKS.items():
        slots = _looks(records, row, start, what)
        if slots:
            points = _relative(slots, what)
            out.append((f"drift of the {name} (1: no change of {short}), per {SCALE} updates", trend(points)))
    return out


def _looks(records: Sequence[Record], row: str, start: int, what: str) -> list[Record]:
    """Looks at the slots after this update that hold what is asked for."""
    return [r for r in records if r["kind"] == "slots" and r["row"] == row and r["at"] > start and what in r]


def _slot_norms(records: Sequence[Record], row: str) -> list[tuple[str, Estimate | None]]:
    """Mean and variance of the slot norms, mean over layers and over the looks from which drift is looked for.

    Intervals are drawn over windows of 2 N/K updates, as for drift.
    """
    known = settled(records)
    if known is None:
        return []
    turn, start = known
    estimates = []
    for what, (name, _) in LOOKS.items():
        slots = _looks(records, row, start, what)
        values = [sum(r[what]) / len(r[what]) for r in slots]
        windows = [r["at"] // max(1, round(2 * turn)) for r in slots]
        estimates.append((f"{name}, mean over layers, after {start} updates", mean(values, windows)))
    return estimates


def _less_alone(asked: Sequence[Record], records: Sequence[Record]) -> list[tuple[int, float]]:
    """At each update the token accuracy of the newest fact less that of the same fact alone in an empty memory."""
    alone = {(r["row"], r["at"]): r["accuracy"] for r in records if r["kind"] == "alone"}
    newest = [r for r in asked if r["age"] == 0 and (r["row"], r["at"]) in alone]
    return [(r["at"], r["accuracy"] - alone[r["row"], r["at"]]) for r in newest]


def _relative(slots: Sequence[Record], what: str) -> list[tuple[int, float]]:
    """Norms or variances at each update, each layer relative to its own mean, mean over layers."""
    layers = torch.tensor([r[what] for r in slots], dtype=torch.float64)
    relative = (layers / layers.mean(0)).mean(1).tolist()
    return [(r["at"], value) for r, value in zip(slots, relative, strict=True)]


def draw(records: Sequence[Record], path: Path) -> None:
    """Accuracy by window, perplexity, pairs and slot norms against updates, as one picture."""
    accuracy: plots.Curves = {}
    for row in ROWS:
        for age in sorted({r["age"] for r in records if r["kind"] == "asked" and r["row"] == row}):
            answers = [r for r in records if r["kind"] == "asked" and r["row"] == row and r["age"] == age]
            points: plots.Points = [((a + b) / 2, _mean(part, "accuracy")) for a, b, part in _windows(answers)]
            accuracy[f"{row}, {_called(age)}"] = points
    panels: dict[str, plots.Curves] = {"token accuracy": accuracy, "perplexity / plain": {}, "BLiMP - plain": {}}
    for row in ROWS:
        for name, estimate in _checkpoints(records, row):
            what, _, at = name.removeprefix(f"{row}: ").rpartition(" after ")
            panels[what].setdefault(row, []).append((float(at), estimate))
    slots = [r for r in records if r["kind"] == "slots"]
    if slots:
        norms: plots.Points = [(at, value) for at, value in _relative(slots, "norms")]
        panels["slot norm, relative to its mean"] = {"memory": norms}
    plots.panels({name: curves for name, curves in panels.items() if curves}, "updates", "Integrity", path)
