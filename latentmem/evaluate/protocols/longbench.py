"""Questions about one long text: LongBench's six sets in English, AltQA and bAbI.

Every example has a memory of its own, which begins empty. The rows, all with the same questions:

    floor     closed book: no memory, no text
    oracle    the text in the context of the plain model, its last tokens where it has no room for all
    window    the last N tokens of the text, in the context of the plain model
    bm25      the passages of the text that BM25 ranks first, in their order, in the context of the plain model
    memory    the text is written in order, in pieces that are cut from its end, then the question is asked

For LongBench the memory's prompt holds the end of the text as well, 512 tokens with question and answer, as in the
paper; AltQA and bAbI, whose texts are short, are written whole.

Source: MemoryLLM section 4.5, LongBench.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from latentmem import data
from latentmem.core.presets import PAPER_PIECE
from latentmem.evaluate import protocol, scoring
from latentmem.evaluate.asking import in_context, named, room, say, written
from latentmem.evaluate.baselines.passages import ranked
from latentmem.evaluate.data.choices import spread
from latentmem.evaluate.protocol import Line, Numbers, Record, RunOptions, Unit, Worker, as_lines
from latentmem.evaluate.runner import Folder
from latentmem.evaluate.settings import LongBench as Settings
from latentmem.evaluate.stats import difference, mean_of
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel

HUB = "Xnhyacinth/LongBench"  # the sets as files, for versions of `datasets` that run no scripts
LOCAL = {"altqa": "long/altqa_4k.jsonl.gz", "babi": "long/babi_en_test.jsonl.gz"}
ANSWER = {  # tokens of an answer at most; LongBench's own
    **{"narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "hotpotqa": 32, "2wikimqa": 32, "musique": 32},
    **{"altqa": 32, "babi": 10},
}
NAMES = tuple(ANSWER)
ROWS = Settings.ROWS
PASSAGE = 100  # words of a passage that BM25 ranks


@dataclass(frozen=True)
class Example:
    """A text, a question about it and its right answers.

    Args:
        group: of examples that share a text.
    """

    id: str
    group: str
    text: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """Examples of one set, drawn by seed, and where they were read."""

    name: str
    source: str
    examples: tuple[Example, ...]

    @property
    def identity(self) -> str:
        """Hash of everything in it."""
        return hashlib.sha256(repr(self.examples).encode()).hexdigest()


def load(name: str, count: int, seed: int) -> Examples:
    """At most so many examples of a set, drawn by seed; of bAbI's tasks equally many, or one more.

    Raises:
        ValueError: an unknown name, or data that can not be found.
    """
    if name not in NAMES:
        raise ValueError(f"the set must be one of {', '.join(NAMES)}, got {name!r}.")
    if name in LOCAL:
        local = data.local_rows(LOCAL[name])
        if local is None:
            raise ValueError(f"{name} is read from the folder LATENTMEM_DATA, as {LOCAL[name]}: set it to one.")
        examples = {"altqa": altqa, "babi": babi}[name](local[0])
        source = LOCAL[name]
    else:
        with data.reading(HUB) as hub:
            examples = longbench(name, list(hub(name, split="test")))
        source = f"{HUB}, {name}"
    part = (lambda example: example.group.rpartition("-")[0]) if name == "babi" else (lambda example: example.id)
    examples = spread(examples, part, count, seed)
    return Examples(name, source, tuple(examples))


def longbench(name: str, rows: Iterable[Record]) -> list[Example]:
    """Rows {input or question, context, answers} of a LongBench set."""
    examples = []
    for i, row in enumerate(rows):
        asked = row["input"] if "input" in row else row["question"]
        examples.append(Example(f"{name}-{i}", named(row["context"]), row["context"], asked, tuple(row["answers"])))
    return examples


def altqa(rows: Iterable[Record]) -> list[Example]:
    """Rows {id, context, question, answer} of AltQA, each once; its questions have no question mark."""
    examples: dict[tuple[str, ...], Example] = {}
    for row in rows:
        text, asked, answer = row["context"], f"{row['question'].strip().rstrip('?').strip()}?", str(row["answer"])
        examples.setdefault((text, asked, answer), Example(f"altqa-{row['id']}", named(text), text, asked, (answer,)))
    return list(examples.values())


def babi(rows: Iterable[Record]) -> list[Example]:
    """The questions of bAbI's tasks, each behind all sentences of its story before it: rows {task, text}.

    A line is "number sentence" or "number question<tab>answer<tab>supporting numbers"; number 1 begins a story.
    Some copies of the first task have | for the tabs.

    Raises:
        ValueError: a line without a number, or a task without a question.
    """
    examples: list[Example] = []
    for row in rows:
        story, sentences, before = -1, list[str](), len(examples)
        for line in row["text"].splitlines():
            number, _, rest = line.strip().partition(" ")
            if not number:
                continue
            if not number.isdigit():
                raise ValueError(f"a line of bAbI's {row['task']} begins with no number: {line[:40]!r}. Take it out.")
            if number == "1":
                story, sentences = story + 1, []
            rest = rest.replace("|", "\t")
            if "\t" not in rest:
                sentences.append(rest.strip())
                continue
            asked, answer, *_ = rest.split("\t")
            group = f"{row['task']}-{story}"
            text = " ".join(sentences)
            examples.append(
                Example(f"{group}-{number}", group, text, asked.strip(), (answer.strip().replace(",", ", "),))
            )
        if len(examples) == before:
            raise ValueError(
                f"bAbI's {row['task']} holds no question: lines with tabs were expected. Take another copy."
            )
    return examples


class LongBench(Worker):
    """A model and the examples; a unit is (row, set, index of the example).

    Args:
        sets: as `load` gives them.
    """

    PROTOCOL, TITLE, CHOSEN = "longbench/2", "Questions about one long text", ("rows",)
    settings: Settings

    def __init__(self, llm: MemoryModel, sets: Sequence[Examples], settings: Settings) -> None:
        self.llm, self.settings = llm, settings
        self.sets = {one.name: one.examples for one in sets}
        if "bm25" in settings.rows:
            ranked(["a passage"], ["a question"], 1)  # an error now, if it is not installed, and not after hours
        self._empty = protocol.empty(llm, settings.memory)

    def units(self) -> list[Unit]:
        rows = [row for row in ROWS if row in self.settings.rows]
        return [(row, name, i) for name, examples in self.sets.items() for i in range(len(examples)) for row in rows]

    def records(self, row: str, name: str, i: int) -> Iterator[Record]:
        example = self.sets[name][i]
        context, prompt = self._memory(name, example) if row == "memory" else self._plain(row, name, example)
        (said,) = say(self.llm, context, [prompt], ANSWER[name])
        yield {
            "row": row,
            "set": name,
            "text": example.group,
            "question": example.id,
            "f1": round(scoring.f1(said, example.answers), 6),
            "em": scoring.exact(said, example.answers),
            "hit": scoring.within(said, example.answers),
        }

    def finish(self, folder: Folder, title: str, records: Sequence[Record], lines: Sequence[Line]) -> Record:
        return {"notes": notes(records)}

    def _memory(self, name: str, example: Example) -> tuple[Context, list[int]]:
        """A memory into which the text was written, and the prompt behind it, which may hold the text's end."""
        memory, asked = self._empty, self._question(example, bare=True)
        if name in LOCAL:
            ids, end = written(self.llm, example.text), list[int]()
        else:
            ids = self._kept(name, example)
            tail = min(self._tail(name, example), len(ids))
            ids, end = ids[: len(ids) - tail], ids[len(ids) - tail :]
        for piece in cut(ids, memory.piece):
            memory = self.llm.write_ids(memory, piece, "text")
        opening = self.llm.prompts_or_raise().opening if memory.is_empty else []
        return self.llm.context(memory), [*opening, *end, *asked]

    def _plain(self, row: str, name: str, example: Example) -> tuple[Context, list[int]]:
        """What the plain model reads of the text, and the question."""
        most = room(self.llm, len(self._question(example, bare=True)), ANSWER[name])
        ids: list[int] = []
        text = example.text if name in LOCAL else self.llm.tokenizer.decode(self._kept(name, example))
        if row == "bm25":
            words = text.split()
            library = [" ".join(words[i : i + PASSAGE]) for i in range(0, len(words), PASSAGE)]
            (places,) = ranked(library, [example.question], self.settings.passages)
            if places:
                ids = written(self.llm, " ".join(library[i] for i in sorted(places)))[-most:]
        elif row != "floor":
            shown = most if row == "oracle" else min(most, self._empty.N + self._tail(name, example))
            ids = written(self.llm, text)[-shown:]
        return in_context(self.llm, ids), self._question(example, bare=bool(ids))

    def _kept(self, name: str, example: Example) -> list[int]:
        """The end of a LongBench text, of which all rows know no more."""
        ids = self.llm.prompts_or_raise().text(example.text)
        return ids[-max(1, self.settings.length - ANSWER[name] - len(self._question(example, bare=True))) :]

    def _tail(self, name: str, example: Example) -> int:
        """Tokens of a LongBench text that stand in the prompt behind the memory: with question and answer, 512."""
        asked = len(self._question(example, bare=True))
        return 0 if name in LOCAL else max(0, PAPER_PIECE - ANSWER[name] - asked)

    def _question(self, example: Example, *, bare: bool) -> list[int]:
        return self.llm.prompts_or_raise().question(example.question, bare=bare)


def cut(ids: Sequence[int], piece: int) -> Iterator[Sequence[int]]:
    """Tokens in order, in pieces that are cut from the end: the first one is the shorter."""
    first = len(ids) % piece
    if first:
        yield ids[:first]
    for start in range(first, len(ids), piece):
        yield ids[start : start + piece]


@as_lines
def lines(records: Sequence[Record]) -> Numbers:
    """F1, exact match and hits of every set in each row, their mean over sets, and paired differences."""
    names = [name for name in NAMES if any(r["set"] == name for r in records)]
    by = {(row, name): _of(records, row, name) for row in ROWS for name in names}
    for metric, title in (("f1", "F1"), ("em", "exact match"), ("hit", "hits")):
        for name in names:
            for row in ROWS:
                yield f"{title}, {name}, {row}", mean_of(by[row, name].values(), metric)
    for name in names:
        for row in ROWS[:-1]:
            yield f"F1, {name}, memory - {row}", difference(by["memory", name], by[row, name], "f1")


def _of(records: Sequence[Record], row: str, name: str) -> dict[str, Record]:
    return {r["question"]: r for r in records if r["row"] == row and r["set"] == name}


def notes(records: Sequence[Record]) -> list[str]:
    """The mean F1 over LongBench's sets, which has no interval of its own, in sentences."""
    said = []
    for row in ROWS:
        means = []
        for name in NAMES:
            scores = [r["f1"] for r in records if r["row"] == row and r["set"] == name and name not in LOCAL]
            means += [sum(scores) / len(scores)] if scores else []
        if means:
            said.append(f"{row}: mean F1 over {len(means)} of LongBench's sets {100 * sum(means) / len(means):.1f}%.")
    return said


def measure(
    llm: MemoryModel, sets: Sequence[Examples], settings: Settings, out: Path, **how: Unpack[RunOptions]
) -> list[Line]:
    """Run the protocol, or go on with it; further arguments as in `protocol.measure`.

    A later run may add rows in the same folder.

    Args:
        sets: as `load` gives them.
    """
    about = {one.name: {"source": one.source, "sha256": one.identity, "n": len(one.examples)} for one in sets}
    return protocol.measure(LongBench(llm, sets, settings), lines, out, data=about, args=(sets, settings), **how)
