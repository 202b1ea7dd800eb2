"""Does a memory remember by default? Texts written one after another, and questions about all of them at the end.

    python benchmarks/remembering.py --texts 20 --lists 5
    python benchmarks/remembering.py --texts 50 --lists 3

Two questions about each text. *Right after* is asked once the text was written, *at the end* once all were. An answer
counts by the share of its tokens that are said; *share* is what is left of that at the end. Rows:

    default      `llm.empty()` with nothing chosen
    best-only    the same memory, of which a question reads the best update alone
    forgetting   `llm.empty(longterm=0, form="exact")`: the paper's memory
    bm25         the plain model; the text that BM25 finds stands in its context
    text         the plain model; the text that answers stands in its context
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from datetime import date

import latentmem
from latentmem.core.memory import Memory
from latentmem.evaluate import stats
from latentmem.evaluate.asking import in_context, written
from latentmem.evaluate.baselines.passages import ranked
from latentmem.evaluate.data import questions
from latentmem.evaluate.data.sets import Question, Text
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel

LEAST, MOST = 120, 320  # tokens of a text
ROWS = ("default", "best-only", "forgetting")


def lists(llm: MemoryModel, texts: int, count: int) -> list[list[Text]]:
    def tokens(text: str) -> int:
        return len(llm.tokenizer(text, add_special_tokens=False)["input_ids"])

    some = questions.load("squad", tokens, questions=2 * 400, per_text=2, seed=1)
    fitting = [text for text in some.texts if LEAST <= tokens(text.text) <= MOST]
    if len(fitting) < texts * count:
        raise ValueError(f"there are {len(fitting)} texts of this length, and {texts * count} were asked for.")
    return [fitting[i * texts : (i + 1) * texts] for i in range(count)]


def empty(llm: MemoryModel, row: str) -> Memory:
    return llm.empty(longterm=0, form="exact") if row == "forgetting" else llm.empty()


def ask(llm: MemoryModel, context: Context, some: Sequence[Question]) -> list[float]:
    """Of each question the share of its answer's tokens that are said next, each after the right ones before it."""
    prompts = llm.prompts_or_raise()
    ids = [prompts.question(q.question, bare=context.length > 0) for q in some]
    scores = llm.score_rows(context, ids, [prompts.answer(q.question, q.answers[0]) for q in some])
    return [score.hits.double().mean().item() for score in scores]


class Table:
    """Accuracies by row and moment, and the texts that they are about."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.groups: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, row: str, moment: str, text: Text, answers: list[float]) -> None:
        self.values[row, moment] += answers
        self.groups[row, moment] += [text.id] * len(answers)

    def cell(self, row: str, moment: str) -> str:
        some = self.values[row, moment]
        estimate = stats.mean(some, self.groups[row, moment]) if some else None
        return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]" if estimate else "-"

    def share(self, row: str) -> str:
        if not self.values[row, "after"]:
            return "-"
        estimate = stats.ratio(self.values[row, "end"], self.values[row, "after"], self.groups[row, "end"])
        return f"{estimate.mean:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]" if estimate else "-"

    def show(self, rows: list[str]) -> None:
        print("| row | n | accuracy right after | at the end | share |")
        print("| --- | --- | --- | --- | --- |")
        for row in rows:
            cells = [str(len(self.values[row, "end"])), self.cell(row, "after"), self.cell(row, "end"), self.share(row)]
            print(f"| {row} | {' | '.join(cells)} |")


def asked_at_end(llm: MemoryModel, memory: Memory, row: str, texts: list[Text], table: Table) -> None:
    now = memory.with_settings(order="best-only") if row == "best-only" else memory
    for text in texts:
        table.add(row, "end", text, ask(llm, llm.context(now), text.questions))


def plain(llm: MemoryModel, texts: list[Text], table: Table) -> None:
    library = [text.text for text in texts]
    for text in texts:
        table.add("text", "end", text, ask(llm, in_context(llm, written(llm, text.text)), text.questions))
        places_of = ranked(library, [question.question for question in text.questions], 1)
        for question, places in zip(text.questions, places_of, strict=True):
            ids = written(llm, library[places[0]]) if places else []
            table.add("bm25", "end", text, ask(llm, in_context(llm, ids), [question]))


def measured(llm: MemoryModel, texts: list[Text], table: Table) -> dict[str, Memory]:
    memories = {row: empty(llm, row) for row in ("default", "forgetting")}
    for text in texts:
        for row, memory in memories.items():
            memories[row] = llm.write(memory, text.text, source=text.id)
            answers = ask(llm, llm.context(memories[row]), text.questions)
            table.add(row, "after", text, answers)
            if row == "default":
                best = memories[row].with_settings(order="best-only")
                table.add("best-only", "after", text, ask(llm, llm.context(best), text.questions))
    for row in ROWS:
        asked_at_end(llm, memories["forgetting" if row == "forgetting" else "default"], row, texts, table)
    plain(llm, texts, table)
    return memories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--lists", type=int, default=5)
    options = parser.parse_args()
    llm, table = latentmem.load(options.model, dtype=options.dtype), Table()
    for number, texts in enumerate(lists(llm, options.texts, options.lists)):
        memories = measured(llm, texts, table)
        print(f"\rlist {number + 1} of {options.lists}", end="", flush=True)
    memory = memories["default"]
    print(f"\n{date.today()}, {llm!r}")
    print(f"{options.lists} lists of {options.texts} texts, {memory.tokens} tokens in the last one")
    print(f"default: {memory}, R={memory.R}, {memory.settings.form}, {memory.reading_order}")
    table.show([*ROWS, "bm25", "text"])


if __name__ == "__main__":
    main()
