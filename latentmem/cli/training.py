"""`latentmem train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from latentmem.cli import printing
from latentmem.cli.base import app


@app.command(rich_help_panel="Training and measuring")
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a config of the package.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same folder continues the run.")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="A value of the config: steps.total=100")] = None,
    stop: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps in all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print counts, time and memory; write nothing.")] = False,
) -> None:
    """Teach a model to write and read its memory. The same command continues a run that was stopped or killed."""
    try:
        from latentmem.train import config as configs
        from latentmem.train import loop
    except ImportError as error:
        if (error.name or "latentmem").partition(".")[0] == "latentmem":
            raise
        raise ValueError(f"training needs {error.name}: run `pip install 'latentmem[train]'`.") from None
    settings = configs.load(config, changes or ())
    if dry_run:
        printing.show(_rehearsed(loop.rehearse(settings)))
        return
    run = loop.Run(settings, out)
    try:
        with printing.progress("steps", seconds=600) as progress:
            task = progress.add_task("training", total=settings.steps.total)

            def show(done: int, total: int, row: dict[str, Any]) -> None:
                words = f"loss {row['loss']:.2f}, {row['tokens'] / row['seconds']:.0f} tokens/s"
                progress.update(task, completed=done, total=total, description=words)

            run.train(show, stop)
    except KeyboardInterrupt:
        printing.error(f"stopped; the newest checkpoint is in {out}, and the same command goes on from there.")
        raise typer.Exit(130) from None
    if run.rank == 0:
        done = run.step == settings.steps.total
        typer.echo(f"The adapters are in {out / loop.RESULT}." if done else f"{run.step} steps are done; see {out}.")


def _rehearsed(facts: dict[str, Any]) -> Any:
    """The facts of a dry run, as a table."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for path, kind, documents, questions in facts["sources"]:
        table.add_row(
            path,
            f"{documents:,} documents, {questions:,} questions" if kind == "questions" else f"{documents:,} documents",
        )
    table.add_row("trained weights", f"{facts['trained']:,} beside {facts['frozen']:,} that stay as they are")
    table.add_row("steps", f"{facts['steps']:,}, about {facts['tokens']:,} tokens")
    table.add_row("time", f"about {facts['seconds'] / 60:,.0f} minutes here, without the points of the curve")
    table.add_row("memory", f"{facts['bytes'] / 2**30:.1f} GiB")
    return table
