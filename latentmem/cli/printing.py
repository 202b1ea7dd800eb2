"""What all commands print with: bars of progress, tables, sizes, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from latentmem.core.memory import Memory
    from latentmem.model.writing import Progress


def progress(unit: str = "tokens", seconds: float = 30) -> Any:
    """A bar with the time left, estimated from the speed of the last seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=seconds)


def tokens(bar: Any, description: str, total: int | None = None, before: int = 0, task: Any = None) -> Progress:
    """A callable that shows (tokens done, tokens in all) in a bar.

    Args:
        total: tokens of several texts, if this is one of them.
        before: tokens of the texts that are done.
        task: what the bar shows already.
    """
    task = bar.add_task(description, total=total) if task is None else task
    return lambda done, all_: bar.update(task, completed=before + done, total=total or all_)


def table(*columns: str, right: Sequence[str] = ()) -> Any:
    """A table of the terminal; `right` names the columns of numbers. Names are folded where it is narrow."""
    from rich.table import Table

    empty = Table(box=None, pad_edge=False)
    for column in columns:
        fixed = column in (*right, "time", "changed")
        empty.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=fixed)
    return empty


def text(words: str) -> Any:
    """Words as they are, without markup."""
    from rich.text import Text

    return Text(words)


def show(renderable: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(renderable)


def error(message: str) -> None:
    typer.echo(f"latentmem: {message}", err=True)


def size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.1f} KiB"


def state(memory: Memory) -> str:
    """How full a memory is, in words."""
    return f"{memory.M} of {memory.N} slots per layer, {memory.updates} update{'s' * (memory.updates != 1)}"
