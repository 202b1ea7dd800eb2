"""Write a real text into the packaged model's memory and ask it three questions, with the memory and without.

make demo
"""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import latentmem

TEXT = Path(__file__).parent.parent / "docs" / "concepts" / "paper.md"
QUESTIONS = (
    "Who is the author of MemoryLLM?",
    "What do we call one extra hidden vector?",
    "How many slots does memoryllm-8b have in each layer?",
)


def main() -> None:
    console = Console()
    llm = latentmem.load("smollm2-135m")
    text = TEXT.read_text(encoding="utf-8")
    start = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"writing {TEXT.name}", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        memory = llm.write(llm.empty(), text, source=TEXT.name, progress=show)
    seconds = time.perf_counter() - start
    console.print(
        f"{TEXT.name}: {memory.tokens} tokens written in {memory.updates} updates and {seconds:.1f} s; "
        f"the memory holds {memory.M} of {memory.N} slots in each of {memory.L} layers."
    )
    table = Table("question", "with memory", "without memory", show_lines=True)
    for question in QUESTIONS:
        with console.status(question):
            answers = [llm.ask(m, question, max_new_tokens=32) for m in (memory, llm.empty())]
        table.add_row(question, *answers)
    console.print(table)


if __name__ == "__main__":
    main()
