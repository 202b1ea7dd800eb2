"""Logs of runs as one picture: loss, accuracy, and the live retention curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentmem.files import container
from latentmem.train.log import lines

SMOOTH = 0.9  # of the running mean that is drawn over the single steps
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of Okabe and Ito


def draw(runs: Mapping[str, Path], path: Path) -> None:
    """Draw the logs of runs into a PNG.

    Args:
        runs: name -> the run's folder or its log.

    Raises:
        ValueError: matplotlib is not installed, or a log is not there.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("the plot needs matplotlib: run `pip install 'latentmem[train]'`.") from None
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for colour, (name, where) in zip(COLOURS * len(runs), runs.items(), strict=False):
        log = lines(where / "log.jsonl" if where.is_dir() else where)
        if not log:
            raise ValueError(f"{where} holds no log of a run.")
        steps = [row for row in log if "loss" in row]
        for axis, key in zip(axes, ("loss", "accuracy"), strict=False):
            x, y = [row["step"] for row in steps], [row[key] for row in steps]
            axis.plot(x, y, color=colour, alpha=0.2, linewidth=0.7)
            axis.plot(x, _smooth(y), color=colour, label=name)
        _curve(axes[2], [row for row in log if "curve" in row], name, colour)
    titles = ("loss", "token accuracy in training", "retention: token accuracy on titles left out")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.grid(alpha=0.25)
        axis.set_xlabel("step")
    axes[2].set_xlabel("texts written since")
    axes[0].set_ylim(bottom=0)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
    with container.replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def _curve(axis: Any, points: Sequence[dict[str, Any]], name: str, colour: str) -> None:
    """The first retention curve dotted, the ones between thin, the last one strong."""
    for i, row in enumerate(points):
        last, first = i == len(points) - 1, i == 0
        ages, accuracy = [p["age"] for p in row["curve"]], [p["accuracy"] for p in row["curve"]]
        axis.plot(
            ages,
            accuracy,
            color=colour,
            linestyle=":" if first else "-",
            alpha=1 if first or last else 0.3,
            marker="o" if last else None,
        )


def _smooth(values: Sequence[float]) -> list[float]:
    out, mean = [], 0.0
    for i, value in enumerate(values):
        mean = SMOOTH * mean + (1 - SMOOTH) * value
        out.append(mean / (1 - SMOOTH ** (i + 1)))
    return out
