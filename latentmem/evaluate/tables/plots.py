"""Pictures: curves of numbers with their intervals, in panels over each other, in one column or several."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentmem.evaluate.stats import Estimate
from latentmem.evaluate.tables.summary import CONSTANT, METRICS, OURS, Line, label, part_name

COLOURS = ("#0072b2", "#e69f00", "#d55e00", "#cc79a7", "#000000", "#999999")  # of Okabe and Ito, told apart by all eyes
Points = list[tuple[float, Estimate | float | None]]  # (x, value); None where there is none
Curves = dict[str, Points]  # by name


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
    """Draw what is remembered over steps into a PNG: a column per capacity and a panel per metric."""
    columns: dict[str, dict[str, Curves]] = {}
    for N, stream in dict.fromkeys((line.N, line.stream) for line in lines):
        part = [line for line in lines if (line.N, line.stream, line.filtered) == (N, stream, False)]
        chosen = [line for line in part if line.kind == "row" or (line.kind, line.fill) == ("bound", "full")]
        chosen.sort(key=lambda line: line.row != OURS)  # the first curves have the plainest look
        steps = sorted({t for line in chosen for t in line.cells})
        panels: dict[str, Curves] = {name: {} for name in METRICS.values()}
        for line in chosen:
            everywhere = next(iter(line.cells.values()), None) if line.row in CONSTANT else None
            panels[METRICS[line.metric]][label(line)] = [(t, line.cells.get(t, everywhere)) for t in steps]
        columns[part_name(N, stream)] = panels
    _figure(columns, "texts written since", title, path, even=True)


def panels(
    by_panel: Mapping[str, Curves], x: str, title: str, path: Path, *, ticks: Sequence[float] | None = None
) -> None:
    """Draw panels over each other with one common axis into a PNG.

    Args:
        by_panel: what each panel shows -> its curves; estimates are drawn with their intervals.
        x: name of the common axis.
        ticks: all x there are, which then stand at even distances.
    """
    _figure({"": by_panel}, x, title, path, even=ticks is not None)


def _figure(columns: Mapping[str, Mapping[str, Curves]], x: str, title: str, path: Path, *, even: bool) -> None:
    """Draw columns of panels; a curve looks the same in all of them, and its name stands below."""
    pyplot = require()
    rows = max(map(len, columns.values()))
    size = (3 + 5 * len(columns), 1.5 + 3 * rows)
    figure, axes = pyplot.subplots(
        rows, len(columns), figsize=size, squeeze=False, sharex="col", sharey="row", layout="constrained"
    )
    names = dict.fromkeys(name for part in columns.values() for curves in part.values() for name in curves)
    looks = dict(zip(names, itertools.cycle(itertools.product(("-", "--", ":"), COLOURS)), strict=False))
    shown: dict[str, Any] = {}
    for column, (heading, by_panel) in enumerate(columns.items()):
        places = {at for curves in by_panel.values() for points in curves.values() for at, _ in points}
        ticks = {at: i for i, at in enumerate(sorted(places))} if even else None
        for axis, (panel, curves) in zip(axes[:, column], by_panel.items(), strict=True):
            for name, points in curves.items():
                shown[name] = _curve(axis, points, looks[name], ticks) or shown.get(name)
            axis.set_ylabel(panel if column == 0 else "")
            if panel in (METRICS["hit"], METRICS["accuracy"]):
                axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
            if ticks is not None:
                axis.set_xticks(range(len(ticks)), [f"{at:g}" for at in ticks])
        axes[0, column].set_title(heading)
        axes[-1, column].set_xlabel(x)
    drawn = {name: curve for name, curve in shown.items() if curve}
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curve(axis: Any, points: Points, look: tuple[str, str], ticks: Mapping[float, int] | None) -> Any:
    """The curve of those points that have a value, and the intervals around them; None if there are none."""
    there = [(ticks[at] if ticks else at, value) for at, value in points if value is not None]
    if not there:
        return None
    means = [value.mean if isinstance(value, Estimate) else value for _, value in there]
    (curve,) = axis.plot([at for at, _ in there], means, look[0], color=look[1], marker=".")
    around = [(at, value.low, value.high) for at, value in there if isinstance(value, Estimate)]
    if around:
        axis.fill_between(*zip(*around, strict=True), color=look[1], alpha=0.12, linewidth=0)
    return curve
