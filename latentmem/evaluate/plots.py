"""What is remembered over steps, as one picture: a column per capacity, a row per metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentmem.evaluate.stats import Estimate
from latentmem.evaluate.summary import CONSTANT, METRICS, OURS, Line, part_name

COLOURS = {  # of Okabe and Ito, told apart by all eyes
    "floor": "#999999",
    "dead": "#cc79a7",
    "oracle": "#000000",
    "window": "#d55e00",
    "bm25": "#e69f00",
    "ours": "#0072b2",
}


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
            some = [x for x in lines if (x.N, x.stream, x.metric, x.filtered) == (N, stream, metric, False)]
            _curves(axis, [line for line in some if line.kind in ("row", "bound")])
            axis.set_ylabel(name if column == 0 else "")
            axis.grid(alpha=0.25)
        axes[0][column].set_title(part_name(N, stream))
        axes[-1][column].set_xlabel("texts written since")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curves(axis: Any, some: Sequence[Line]) -> None:
    steps = sorted({t for line in some for t in line.cells})
    places = {t: i for i, t in enumerate(steps)}  # steps grow geometrically: even places are easier to read than a log
    for number, line in enumerate(line for line in some if line.kind == "row"):
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
    for line in some:
        if line.kind == "bound" and line.fill == "full":
            points = sorted(line.cells.items())
            x, y = [places[t] for t, _ in points], [cell.mean for _, cell in points]
            axis.plot(x, y, ":", color=COLOURS[OURS], label="if knowing went with the slots")
    axis.set_xticks(range(len(steps)), [str(t) for t in steps])
