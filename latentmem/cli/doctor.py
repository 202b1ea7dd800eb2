"""Is memory alive? `doctor`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from latentmem.cli import base, printing
from latentmem.cli.base import Device, app
from latentmem.cli.memories import PANEL


@app.command(rich_help_panel=PANEL)
def doctor(
    memory: Annotated[str | None, typer.Option("--memory", "-m", help="Examine this memory as well.")] = None,
    question: Annotated[str | None, typer.Option(help="With --memory: the question that the memory gets.")] = None,
    model: Annotated[
        str | None, typer.Option(help="As for `ask`; without --memory smollm2-135m.", show_default="what wrote it")
    ] = None,
    device: Device = None,
) -> None:
    """Is memory alive? Print answers with the real memory, a zeroed one and another's; exit code 1 if it is dead."""
    from latentmem.evaluate.protocols import doctor as examination

    if (memory is None) != (question is None):
        raise ValueError("--memory and --question go together: name the memory and what to ask it.")
    opened = None
    if memory is None:
        llm = base.load(None, model, device)
    else:
        opened, llm = base.read(base.opened(memory), memory, model, device)
    typer.echo(f"model: {llm.name}, {str(llm.decoder.dtype)[6:]} on {llm.decoder.device.type}, {_versions()}")
    difference = examination.law(llm)
    if difference is not None:
        typer.echo(f"memory against the same text in the context: largest logit difference {difference:.1e}")
    with printing.progress("questions") as progress:
        planted = examination.planted(llm)
        cases = list(progress.track(planted, total=len(examination.THINGS), description="asking"))
    printing.show(_side_by_side(cases))
    if opened is not None and question is not None:
        other = llm.write(llm.empty(), examination.fact(0), source="doctor")
        printing.show(_side_by_side([examination.ask(llm, opened, other, question)]))
    alive = examination.alive(cases)
    hits = {row: sum(case.hits(row) for case in cases) for row in examination.ROWS}
    typer.echo("right answers: " + ", ".join(f"{row} {count} of {len(cases)}" for row, count in hits.items()))
    typer.echo("The memory is alive." if alive else "The memory is DEAD: what is written makes no difference.")
    raise typer.Exit(0 if alive else 1)


def _side_by_side(cases: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    from latentmem.evaluate.protocols.doctor import ROWS

    table = Table(show_lines=True)
    for column in ("question", *ROWS):
        table.add_column(column, ratio=1)
    for case in cases:
        cells = []
        for row in ROWS:
            score = f"\n(log p {case.logprobs[row]:.2f})" if case.logprobs else ""
            cells.append(Text(("✓ " if case.gold and case.hits(row) else "") + case.answers[row] + score))
        table.add_row(Text(case.question + (f"\n({case.gold})" if case.gold else "")), *cells)
    return table


def _versions() -> str:
    import torch
    import transformers

    import latentmem

    return f"latentmem {latentmem.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
