"""Pictures: what is remembered over steps, a column per capacity and a row per metric; and a stream's curves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentmem.evaluate.stats import Estimate
from latentmem.evaluate.tables.summary import CONSTANT, METRICS, OURS, Line, part_name

COLOURS = {  # of Okabe and Ito, told apart by all eyes
    "floor": "#999999",
    "dead": "#cc79a7",
    "oracle": "#000000",
    "window": "#d55e00",
    "bm25": "#e69f00",
    "ours": "#0072b2",
}

Points = list[tuple[float, Estimate | float | None]]  # (x, value); None where there is none
Curves = dict[str, Points]  # by name
ORDER = tuple(COLOURS[row] for row in ("ours", "bm25", "window", "dead", "oracle", "floor"))


def require() -> Any:
    """Matplotlib's pyplot.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("the plot needs matplotlib: run `pip install 'latentmem[eval]'`.") from None
    return pyplot


def draw(lines: Sequence[Line], title: str, path: Path) -> None:
    """Draw the curves of all parts with their intervals into a PNG."""
    pyplot = require()
    parts = list(dict.fromkeys((line.N, line.stream) for line in lines))
    figure, axes = pyplot.subplots(
        len(METRICS), len(parts), figsize=(1.5 + 5 * len(parts), 10), squeeze=False, sharey="row", layout="constrained"
    )
    for column, (N, stream) in enumerate(parts):
        for row, (metric, name) in enumerate(METRICS.items()):
            axis = axes[row][column]
            chosen = [x for x in lines if (x.N, x.stream, x.metric, x.filtered) == (N, stream, metric, False)]
            _curves(axis, [line for line in chosen if line.kind in ("row", "bound")])
            axis.set_ylabel(name if column == 0 else "")
            axis.grid(alpha=0.25)
        axes[0][column].set_title(part_name(N, stream))
        axes[-1][column].set_xlabel("texts written since")
    _save(figure, axes[:1, 0], title, path)


def _curves(axis: Any, lines: Sequence[Line]) -> None:
    steps = sorted({t for line in lines for t in line.cells})
    places = {t: i for i, t in enumerate(steps)}  # steps grow geometrically: even places are easier to read than a log
    for number, line in enumerate(line for line in lines if line.kind == "row"):
        cells: list[tuple[int, Estimate]] = sorted(line.cells.items())
        if line.row in CONSTANT:
            cells = [(t, cells[0][1]) for t in steps]
        x = [places[t] + 0.035 * (number - 3) for t, _ in cells]  # a little apart, so that the intervals can be told
        axis.errorbar(
            x,
            [cell.mean for _, cell in cells],
            [[cell.mean - cell.low for _, cell in cells], [cell.high - cell.mean for _, cell in cells]],
            color=COLOURS[line.row],
            label=line.name,
            linestyle="--" if line.fill == "empty" else "-",
            linewidth=2 if line.row == OURS else 1.2,
            marker="o" if line.row == OURS else ".",
            markersize=5,
            elinewidth=0.8,
        )
    for line in lines:
        if line.kind == "bound" and line.fill == "full":
            points = sorted(line.cells.items())
            x, y = [places[t] for t, _ in points], [cell.mean for _, cell in points]
            axis.plot(x, y, ":", color=COLOURS[OURS], label="if knowing went with the slots")
    axis.set_xticks(range(len(steps)), [str(t) for t in steps])


def panels(
    by_panel: Mapping[str, Curves], x: str, title: str, path: Path, *, ticks: Sequence[float] | None = None
) -> None:
    """Draw panels over each other with one common axis into a PNG.

    Args:
        by_panel: what each panel shows -> its curves; estimates are drawn with their intervals.
        x: name of the common axis.
        ticks: all x there are, which then stand at even distances.
    """
    pyplot = require()
    figure, axes = pyplot.subplots(
        len(by_panel), 1, figsize=(8, 1 + 2.6 * len(by_panel)), squeeze=False, sharex=True, layout="constrained"
    )
    alike = len({tuple(curves) for curves in by_panel.values()}) == 1 < len(by_panel)
    for axis, (name, curves) in zip(axes[:, 0], by_panel.items(), strict=True):
        if ticks is not None:
            curves = {name: [(ticks.index(at), y) for at, y in points] for name, points in curves.items()}
            axis.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
        _panel(axis, curves, alike)
        axis.set_ylabel(name)
        axis.grid(alpha=0.25)
        if not alike:
            axis.legend(frameon=False)
    axes[-1, 0].set_xlabel(x)
    _save(figure, axes[:, 0] if alike else [], title, path)


def _save(figure: Any, named: Iterable[Any], title: str, path: Path) -> None:
    """Write a figure as PNG; below it stand the names of the curves of some axes."""
    curves = {name: curve for axis in named for curve, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    if curves:
        figure.legend(curves.values(), curves, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    require().close(figure)


def _panel(axis: Any, curves: Curves, alike: bool) -> None:
    """The curves of one panel; where all panels show the same ones, a curve without points keeps its look for it."""
    looks = itertools.product(("-", "--", ":"), ORDER)  # the colours, once more with other lines
    for (line, colour), (curve, points) in zip(looks, curves.items(), strict=False):
        there = [(at, value) for at, value in points if value is not None]
        if alike and not there:
            continue
        at = [place for place, _ in there]
        axis.plot(at, [_middle(value) for _, value in there], line, color=colour, label=curve, marker=".")
        drawn = [(place, value) for place, value in there if isinstance(value, Estimate)]
        places, low, high = [p for p, _ in drawn], [e.low for _, e in drawn], [e.high for _, e in drawn]
        axis.fill_between(places, low, high, color=colour, alpha=0.1 if alike else 0.2, linewidth=0)


def _middle(value: Estimate | float) -> float:
    return value.mean if isinstance(value, Estimate) else value
