"""What a run writes down: one JSON line per step, and the same numbers for tensorboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentmem.files import container


class Log:
    """`log.jsonl` and tensorboard's files, from a step on: what a killed run had logged beyond it is dropped."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        path = folder / "log.jsonl"
        kept = [line for line in lines(path) if line["step"] <= step and (step or "curve" not in line)]
        container.replace_bytes(path, "".join(json.dumps(line) + "\n" for line in kept))
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
