"""What a run writes down: one JSON line per step, the same numbers for tensorboard, and logs as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentmem.disk import replace_bytes, replacing

SMOOTH = 0.9  # of the running mean that is drawn over the single steps
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of Okabe and Ito


class Log:
    """`log.jsonl` and tensorboard's files, from a step on: what a killed run had logged beyond it is dropped."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        path = folder / "log.jsonl"
        kept = [line for line in lines(path) if line["step"] <= step and (step or "curve" not in line)]
        replace_bytes(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def add(self, row: dict[str, Any]) -> None:
        """Write one line."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise ValueError(
                f"the log could not be written: {error.strerror}. Make room, and give the same command."
            ) from None
        if self._board:
            for name, value in _scalars(row):
                self._board.add_scalar(name, value, row["step"])

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if name == "curve":
            yield from ((f"retention/{point['age']}", point["accuracy"]) for point in value)
        elif isinstance(value, (int, float)) and name != "step":
            yield f"train/{name}", value


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; one that a kill cut off is left out."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def draw(runs: Mapping[str, Path], path: Path) -> None:
    """Draw the logs of runs into one PNG: loss, accuracy, and the live retention curves.

    Args:
        runs: name -> the run's folder.

    Raises:
        ValueError: matplotlib is not installed, or a folder holds no log.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("the plot needs matplotlib: run `pip install 'latentmem[train]'`.") from None
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for colour, (name, folder) in zip(COLOURS * len(runs), runs.items(), strict=False):
        log = lines(folder / "log.jsonl")
        if not log:
            raise ValueError(f"{folder} holds no log of a run.")
        _draw_run(axes, log, name, colour)
    titles = ("loss", "token accuracy in training", "retention: token accuracy on titles left out")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.25)
    axes[2].set_xlabel("texts written since")
    axes[0].set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def _draw_run(axes: Any, log: Sequence[dict[str, Any]], name: str, colour: str) -> None:
    """One run in all three panels."""
    steps = [row for row in log if "loss" in row]
    for axis, key in zip(axes, ("loss", "accuracy"), strict=False):
        x, y = [row["step"] for row in steps], [row[key] for row in steps]
        axis.plot(x, y, color=colour, alpha=0.2, linewidth=0.7)
        axis.plot(x, _smooth(y), color=colour, label=name)
    curves = [row["curve"] for row in log if "curve" in row]
    for i, curve in enumerate(curves):  # the first one dotted, the last one strong
        style = {"linestyle": "-" if i else ":", "marker": "o" if i == len(curves) - 1 else None}
        alpha = 1 if i in (0, len(curves) - 1) else 0.3
        axes[2].plot([p["age"] for p in curve], [p["accuracy"] for p in curve], color=colour, alpha=alpha, **style)


def _smooth(values: Sequence[float]) -> list[float]:
    out, mean = [], 0.0
    for i, value in enumerate(values):
        mean = SMOOTH * mean + (1 - SMOOTH) * value
        out.append(mean / (1 - SMOOTH ** (i + 1)))
    return out
