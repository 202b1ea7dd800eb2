"""`latentmem train` and `latentmem calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentmem.cli import printing
from latentmem.cli.base import MODELS, PACKAGED, Device, OwnAdapters, app, check_model, chosen, pair

if TYPE_CHECKING:
    from latentmem.train.calibrate import Result


@app.command(rich_help_panel="Training and measuring")
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a config of the package.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same folder continues the run.")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="A value of the config: steps.total=100")] = None,
    stop: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps in all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print counts, time and memory; write nothing.")] = False,
) -> None:
    """Teach a model to write and read its memory. The same command continues a run that was stopped or killed."""
    from latentmem.train import config as configs

    settings = configs.load(config, changes or ())
    try:
        from latentmem.train import loop
    except ImportError as error:
        if (error.name or "latentmem").partition(".")[0] == "latentmem":
            raise
        raise ValueError(f"training needs {error.name}: run `pip install 'latentmem[train]'`.") from None
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
        counts = f"{documents:,} documents" + (f", {questions:,} questions" if kind == "questions" else "")
        table.add_row(path, counts if documents >= 0 else "on the hub, not counted: invented texts stand in")
    table.add_row("trained weights", f"{facts['trained']:,} beside {facts['frozen']:,} that stay as they are")
    table.add_row("steps", f"{facts['steps']:,}, about {facts['tokens']:,} tokens")
    table.add_row("time", f"about {facts['seconds'] / 60:,.0f} minutes here, without the points of the curve")
    table.add_row("memory", f"{facts['bytes'] / 2**30:.1f} GiB")
    return table


@app.command(rich_help_panel="Training and measuring")
def calibrate(
    texts: Annotated[
        list[Path],
        typer.Option("--texts", help="A file of texts: .jsonl or .jsonl.gz with a key text, or .txt. Give several."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File of the coder; the same file continues.")],
    model: Annotated[str, typer.Argument(help=f"{MODELS}.")] = PACKAGED,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read, at least.")] = 100_000,
    step: Annotated[float, typer.Option(help="Smaller: more bytes, smaller errors.")] = 0.005,
    dtype: Annotated[str, typer.Option(help="In which the model runs.")] = "bfloat16",
    bits: Annotated[int, typer.Option(help="Bits of a sketch, by which a slot is searched; a multiple of 8.")] = 192,
    adapters: OwnAdapters = None,
    device: Device = None,
) -> None:
    """Make a coder: with it, memories of this model keep each token in a small code of its keys and values.

    A coder belongs to one model with one pair of adapters. The same command continues a run that was stopped.
    """
    from latentmem.train import pieces

    pieces.check(texts)
    check_model(model, chosen(adapters))
    import latentmem
    from latentmem.train import calibrate as calibrating

    calibrating.check_files(texts, out)
    llm = latentmem.load(model, dtype=dtype, device=device, adapters=pair(chosen(adapters)), coder=None)
    sums = calibrating.sums_path(out)
    try:
        with printing.progress("tokens", seconds=600) as bar:
            show = printing.tokens(bar, "calibrating", tokens)
            result = calibrating.calibrate(llm, texts, out, tokens, step, bits, show, bar.console.print)
    except KeyboardInterrupt:
        lost = f"but for the last {calibrating.EVERY} seconds at most, and the same command goes on from there"
        kept = f"{sums} holds what was seen, {lost}" if sums.exists() else "nothing is kept yet"
        printing.error(f"stopped; {kept}.")
        raise typer.Exit(130) from None
    for line in _calibrated(result, out, sums):
        typer.echo(line)


def _calibrated(result: Result, out: Path, sums: Path) -> list[str]:
    """What was made, in sentences."""
    about = result.coder.about
    return [
        f"{out} is the coder of {about['name']}: {printing.size(result.size)}, {result.coefficients:,} coefficients, "
        f"from {int(about['tokens']):,} tokens and {int(about['answers']):,} answers.",
        f"A token takes about {result.nbytes:,.0f} bytes, and {result.coder.sketch.nbytes} more for its sketch.",
        f"Decoded keys and values differ by {result.error:.0%} on average, least where answers depend on them.",
        f"{sums} ({printing.size(sums.stat().st_size)}) holds what was seen: the same command with more --tokens, "
        f"another --step or other --bits goes on from there. The coder does not need that file.",
    ]
