"""Knowledge retention: what is still known of a text after t other texts were written (MemoryLLM section 4.4).

Every sample has its own run up to `OWN_RUN` steps: fill the memory with unrelated texts, write the text, ask; then
write one unrelated text per step and ask again at the steps in question. The unrelated texts are the same for all
samples, the random drops are each sample's own. Beyond that, or for all steps if so wished, there is one *stream* per
capacity: text after text, each asked when it has reached the age in question.

The rows, all with the same questions:

    floor    closed book: no memory, no text
    dead     a full memory whose slots are zero
    oracle   the text in the context of the plain model
    window   the last N tokens of all that was written, in the context of the plain model; fewer if it has no room
    bm25     the one text that BM25 finds among all that was written, in the context of the plain model
    ours     the memory; "full" before the text was written, or "empty"
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Unpack

import torch

from latentmem import longterm
from latentmem.core.memory import Memory
from latentmem.evaluate import protocol
from latentmem.evaluate.asking import Answer, ask, in_context, room, written
from latentmem.evaluate.baselines.passages import ranked
from latentmem.evaluate.data.sets import Question, QuestionSet, Text
from latentmem.evaluate.protocol import Record, RunOptions, Unit, Worker
from latentmem.evaluate.runner import Folder
from latentmem.evaluate.settings import Retention as Settings
from latentmem.evaluate.tables import plots, report, summary
from latentmem.evaluate.tables.summary import Line
from latentmem.longterm.search import RetrievedPrefix
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel

ROWS = Settings.ROWS
LONGEST_ANSWER = 64  # tokens that are kept free for a gold answer
SEGMENT = 20  # steps of a stream that are one unit of work
SETS = {"squad": "SQuAD", "nq": "Natural Questions", "synthetic": "synthetic facts"}
Asked = tuple[int, Text, Question]  # texts written since; the text; a question about it


class Retention(Worker):
    """A model, the questions, and what is kept between units.

    A unit is (row, N, fill, index of the text), or ("stream", row, N, segment).

    Args:
        folder: where a stream keeps the memory between its segments.
    """

    PROTOCOL, CHOSEN = "retention/1", ("rows", "fills", "capacities")
    settings: Settings

    def __init__(self, llm: MemoryModel, data: QuestionSet, settings: Settings, folder: Path) -> None:
        self.llm, self.data, self.settings, self.folder = llm, data, settings, folder
        self._full = lru_cache(maxsize=4)(self._fill)
        self._dead = lru_cache(maxsize=4)(self._zeroed)
        self._ids = lru_cache(maxsize=None)(partial(written, llm))
        self._shared = lru_cache(maxsize=8)(partial(in_context, llm))
        self._seen: dict[tuple[str, str], Answer] = {}  # (question, passage) -> answer
        prompts = llm.prompts_or_raise()
        asked = [len(prompts.question(q.question, bare=True)) for text in data.texts for q in text.questions]
        self._room = room(llm, max(asked), max(settings.new_tokens, LONGEST_ANSWER))
        if self._room < 1:
            raise ValueError(
                f"the questions and answers leave no room for a text in this model's context ({llm.name})."
            )
        if "bm25" in settings.rows:
            _find(["a passage"], ["a question"])  # an error now, if it is not installed, and not after hours
        for N in self.capacities:
            self._empty(N)  # a size that does not fit the model is an error now
            self._check_supply(N)

    # --- units ------------------------------------------------------------------------------------------------------

    def units(self) -> list[Unit]:
        """All units, sample after sample, so that what is done at any time is complete for its samples."""
        s = self.settings
        units: list[Unit] = []
        for i in range(len(self.data.texts)):
            units += [(row, 0, "", i) for row in ("floor", "oracle") if row in s.rows]
            for N in self.capacities:
                units += [("dead", N, "full", i)] if "dead" in s.rows else []
                if s.own:
                    units += [(row, N, "full", i) for row in ("window", "bm25") if row in s.rows]
                    fills = ("full",) if self.llm.born_full else s.fills  # a checkpoint's own pool is full at birth
                    units += [("ours", N, fill, i) for fill in fills if "ours" in s.rows]
        return [
            *units,
            *(unit for row in ("window", "bm25") for N in self.capacities for unit in self._segments(row, N)),
        ]

    def chains(self) -> list[list[Unit]]:
        """Units of memories that go through a stream, one chain per capacity: each needs the one before it."""
        return [chain for N in self.capacities if (chain := self._segments("ours", N))]

    def _segments(self, row: str, N: int) -> list[Unit]:
        ages = self.settings.streamed
        if not ages or row not in self.settings.rows:
            return []
        return [("stream", row, N, k) for k in range(-(-(len(self.data.texts) + max(ages)) // SEGMENT))]

    def records(self, first: Any, *unit: Any) -> Iterator[Record]:
        if first == "stream":
            return self._stream(*unit)
        N, fill, i = unit
        records = self._constant if first in summary.CONSTANT else self._own
        return records(first, N, fill, self.data.texts[i])

    @property
    def capacities(self) -> tuple[int, ...]:
        """N of the memories that are measured: a checkpoint has its own."""
        return (self.llm.empty().N,) if self.llm.born_full else self.settings.capacities

    # --- rows -------------------------------------------------------------------------------------------------------

    def _constant(self, row: str, N: int, fill: str, text: Text) -> Iterator[Record]:
        """Rows that no step changes: floor, oracle, dead memory."""
        if row == "oracle":
            answers = self._ask_found([text.text] * len(text.questions), text.questions)
        else:
            context = self.llm.context(self._dead(N)) if row == "dead" else in_context(self.llm, ())
            answers = self._ask(context, text.questions)
        for question, answer in zip(text.questions, answers, strict=True):
            yield _record(question, answer, row=row, N=N, fill=fill, text=text.id)

    def _own(self, row: str, N: int, fill: str, text: Text) -> Iterator[Record]:
        """A run about one text: write the text, then others, and ask at the steps in question."""
        memory, library = None, [*self._filler(N), text.text]
        if row == "ours":
            memory = self._full(N) if fill == "full" else self._empty(N)
            memory = self._write(memory.with_settings(seed=_seed(self.settings.seed, text.id)), text.text, "target")
        for t in range(max(self.settings.own) + 1):
            if t:
                library.append(self._other(t - 1))
                memory = None if memory is None else self._write(memory, library[-1], "unrelated")
            if t in self.settings.own:
                asked = [(t, text, question) for question in text.questions]
                for record in self._ask_all(row, N, memory, library, asked, ["target"] * len(asked)):
                    yield {"fill": fill, **record}

    # --- the stream -------------------------------------------------------------------------------------------------

    def _stream(self, row: str, N: int, segment: int) -> Iterator[Record]:
        """Steps segment * SEGMENT and on: write one text, then ask every text whose age is one of the steps."""
        texts, ages = self.data.texts, self.settings.streamed
        memory = self._before(N, segment) if row == "ours" else None
        for step in range(segment * SEGMENT, min((segment + 1) * SEGMENT, len(texts) + max(ages))):
            if memory is not None:
                memory = self._write(memory, *self._streamed(step))
            due = [(age, texts[step - age]) for age in ages if 0 <= step - age < len(texts)]
            asked = [(age, text, question) for age, text in due for question in text.questions]
            library = [*self._filler(N), *(self._streamed(j)[0] for j in range(step + 1))] if asked else []
            for record in self._ask_all(row, N, memory, library, asked, [text.id for _, text, _ in asked]):
                yield {"fill": "full", "stream": True, **record}
        if memory is not None:
            memory.save(self._kept(N, segment))
            self._kept(N, segment - 2).unlink(missing_ok=True)  # the one before is needed if this is done again

    def _streamed(self, step: int) -> tuple[str, str]:
        """What the stream writes at a step, and the name under which it is written."""
        texts = self.data.texts
        if step < len(texts):
            return texts[step].text, texts[step].id
        return self._other(step - len(texts)), "unrelated"

    def _before(self, N: int, segment: int) -> Memory:
        """The stream's memory before a segment: as it was kept, or written anew."""
        if segment and self._kept(N, segment - 1).exists():
            return Memory.load(self._kept(N, segment - 1))
        memory = self._full(N).with_settings(seed=_seed(self.settings.seed, "stream"))
        for step in range(segment * SEGMENT):
            memory = self._write(memory, *self._streamed(step))
        return memory

    def _kept(self, N: int, segment: int) -> Path:
        return self.folder / f"stream-{N}-{segment}.safetensors"

    # --- the run ----------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        return f"Knowledge retention: {self.llm.name}, {SETS.get(self.data.name, self.data.name)}"

    def about_model(self) -> dict[str, Any]:
        style = asdict(self.llm.prompts_or_raise().style)
        return {**super().about_model(), "tokenizer": self.llm.tokenizer_identity, "style": style}

    def about_settings(self) -> dict[str, Any]:
        """The settings as JSON, without those to which a later run may add, such as capacities."""
        values = {name: value for name, value in asdict(self.settings).items() if name not in self.CHOSEN}
        for N in self.capacities[:1]:
            values["memory"] = asdict(self._empty(N).settings) | {"N": None, "K": self.settings.memory.K}
        return values

    def finish(self, folder: Folder, title: str, records: Sequence[Record], lines: Sequence[Line]) -> Record:
        """Draw the curves and write the page, once two texts are finished."""
        if not lines:
            return {"notes": []}
        count, texts = sum(len(text.questions) for text in self.data.texts), self.data.texts
        questions = f"{count} questions about {len(texts)} texts; {self.data.source}"
        plots.draw(lines, title, folder.path / "plot.png")
        report.write(folder, title, questions, lines, records, self.data)
        return {"notes": [questions], "samples": [[text.id, [q.id for q in text.questions]] for text in texts]}

    def clear(self, finished: Collection[Unit]) -> None:
        """Remove the memories that were kept between segments."""
        for N in self.capacities:
            for file in self.folder.glob(f"stream-{N}-*.safetensors"):
                file.unlink()

    # --- parts ------------------------------------------------------------------------------------------------------

    def _empty(self, N: int) -> Memory:
        memory = self.settings.memory
        return protocol.empty(self.llm, replace(memory, N=N, K=None if memory.K is None else min(N, memory.K)))

    def _fill(self, N: int) -> Memory:
        """A memory full of unrelated texts; a checkpoint's own pool gets as many of them on top."""
        memory = self._empty(N)
        for text in self._filler(N):
            memory = self._write(memory, text, "filler")
        return memory

    def _filler(self, N: int) -> Sequence[str]:
        """Unrelated texts that fill a memory of N slots; the first ones are kept for the steps."""
        memory, texts, slots = self._empty(N), [], 0
        for text in self.data.unrelated[self._steps_supply :]:
            if slots >= N:
                break
            texts.append(text)
            slots += memory.K if self.llm.born_full else len(self._ids(text)) // memory.compression
        return texts

    def _found(self, memory: Memory, question: Question, source: str) -> dict[str, float]:
        """The share of a source's stored slots, or of R where they are more, that a question takes; mean of layers."""
        if not memory.R:
            return {}
        number = [s.name for s in memory.sources].index(source)
        mine = longterm.stored(memory)[number]
        if not mine.any():
            return {}
        front = self.llm.front(memory, self.llm.prompts_or_raise().question(question.question, bare=True))
        assert isinstance(front, RetrievedPrefix)
        taken = (longterm.sources_of(memory, torch.stack(front.retrieval.places)) == number).sum(1)
        shares = [int(n) / min(memory.R, int(all_)) for n, all_ in zip(taken, mine, strict=True) if all_]
        return {"found": sum(shares) / len(shares)}

    def _ask(self, context: Context, questions: Sequence[Question]) -> list[Answer]:
        return ask(self.llm, context, questions, new_tokens=self.settings.new_tokens)

    def _check_supply(self, N: int) -> None:
        supply = sum(len(self._ids(t)) for t in self.data.unrelated[self._steps_supply :])
        if not self.llm.born_full and supply // self._empty(N).compression < N:
            raise ValueError(
                f"the set {self.data.name} has too few unrelated texts to fill a memory of N={N} slots; "
                f"choose a smaller capacity."
            )
        if max(self.settings.steps) and not self._steps_supply:
            raise ValueError(
                f"the set {self.data.name} has too few unrelated texts to write between text and question."
            )

    @property
    def _steps_supply(self) -> int:
        """How many unrelated texts are kept for the steps; later steps begin with the first again."""
        return min(max(self.settings.steps), len(self.data.unrelated) * 3 // 4)

    def _other(self, j: int) -> str:
        return self.data.unrelated[j % max(1, self._steps_supply)]

    def _write(self, memory: Memory, text: str, source: str) -> Memory:
        return self.llm.write_ids(memory, self._ids(text), source)

    def _zeroed(self, N: int) -> Memory:
        return protocol.zeros(self.llm, self._full(N))

    def _ask_all(
        self,
        row: str,
        N: int,
        memory: Memory | None,
        library: Sequence[str],
        asked: Sequence[Asked],
        sources: Sequence[str],
    ) -> Iterator[Record]:
        """Ask about texts that were written, each so many texts ago.

        Args:
            memory: of the row "ours".
            library: all texts that were written, for the other rows.
            sources: the name under which each text was written.
        """
        questions = [question for *_, question in asked]
        if not asked:
            return
        if memory is not None:
            answers = self._ask(self.llm.context(memory), questions)
            shares = [_left(memory, source) for source in sources]
        elif row == "window":
            answers, shares = self._ask_window(min(N, self._room), library, asked)
        else:
            passages = _find(library, [question.question for question in questions])
            answers = self._ask_found(passages, questions)
            shares = [float(passage == text.text) for passage, (_, text, _) in zip(passages, asked, strict=True)]
        for (age, text, question), answer, share, source in zip(asked, answers, shares, sources, strict=True):
            facts = {"row": row, "N": N, "step": age, "text": text.id, "left": share}
            facts |= {"M": memory.M, **self._found(memory, question, source)} if memory is not None else {}
            yield _record(question, answer, **facts)

    def _ask_window(self, N: int, library: Sequence[str], asked: Sequence[Asked]) -> tuple[list[Answer], list[float]]:
        """Answers behind the last N tokens of all that was written, and the share of each text that is among them."""
        tokens = [len(self._ids(passage)) for passage in library]
        shares = [_in_window(N, sum(tokens[len(tokens) - age :]), len(self._ids(text.text))) for age, text, _ in asked]
        ids = tuple([i for passage in library for i in self._ids(passage)][-N:])
        context = in_context(self.llm, ids) if any(shares) else self._shared(ids)  # without the text, all see the same
        return self._ask(context, [question for *_, question in asked]), shares

    def _ask_found(self, passages: list[str], questions: Sequence[Question]) -> list[Answer]:
        """Ask each question behind the passage that was found for it, if any; what was asked before is kept."""
        seen = self._seen
        for passage in dict.fromkeys(passages):
            new = [q for q, p in zip(questions, passages, strict=True) if p == passage and (q.id, p) not in seen]
            if new:
                context = in_context(self.llm, self._ids(passage) if passage else ())
                for question, answer in zip(new, self._ask(context, new), strict=True):
                    seen[question.id, passage] = answer
        return [seen[q.id, passage] for q, passage in zip(questions, passages, strict=True)]


def measure(
    llm: MemoryModel,
    data: QuestionSet,
    settings: Settings,
    out: Path,
    *,
    drawn: dict[str, Any] | None = None,
    **how: Unpack[RunOptions],
) -> list[Line]:
    """Run the protocol, or go on with it; the lines of all tables.

    A folder is about the same questions, steps and model; other rows, fills and capacities are added to it.

    Args:
        out: gets config.json, records.jsonl, summary.json, table.md, plot.png and report.html.
        drawn: how the questions were drawn, for the record.

    Raises:
        KeyboardInterrupt: stopped; the tables then show what was finished, and the next run goes on from there.
        ValueError: the folder holds another run or is in use, or settings that do not fit the model or the data.
    """
    if len(data.texts) < 2:
        raise ValueError("one text has no interval, and without an interval there is no result: take more questions.")
    plots.require()
    worker, args = Retention(llm, data, settings, out), (data, settings, out)
    about = {"name": data.name, "source": data.source, "sha256": data.identity, **(drawn or {})}
    return protocol.measure(worker, summary.lines, out, data=about, args=args, table=summary.markdown, **how)


def _find(library: Sequence[str], questions: Sequence[str]) -> list[str]:
    """The passage that BM25 ranks first for each question; "" where no passage shares a word with it."""
    return [library[places[0]] if places else "" for places in ranked(library, questions, 1)]


def _record(question: Question, answer: Answer, **facts: Any) -> Record:
    return {**facts, "question": question.id, **answer.numbers, "said": answer.said}


def _left(memory: Memory, source: str) -> float:
    """Share of a source's slots that is left, over all layers."""
    i = [s.name for s in memory.sources].index(source)
    return (memory.slots_left()[i].double().mean() / memory.sources[i].slots).item()


def _in_window(N: int, newer: int, tokens: int) -> float:
    """Share of a text's tokens within the last N, behind so many newer ones."""
    return min(1.0, max(0, N - newer) / tokens)


def _seed(seed: int, name: str) -> int:
    """A seed for one sample, from the seed of the run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big", signed=True)
