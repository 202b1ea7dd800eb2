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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Unpack

import torch

from latentmem import longterm
from latentmem.core.memory import Memory
from latentmem.evaluate import protocol, runner
from latentmem.evaluate.asking import Answer, ask, in_context, written
from latentmem.evaluate.baselines.passages import ranked
from latentmem.evaluate.data.sets import Question, QuestionSet, Text
from latentmem.evaluate.protocol import RunOptions
from latentmem.evaluate.settings import Retention as Settings
from latentmem.evaluate.tables import plots, results
from latentmem.evaluate.tables.summary import Line
from latentmem.longterm.search import RetrievedPrefix
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel

PROTOCOL = "retention/1"  # another number where records of before and after can not stand in one table
ROWS = Settings.ROWS
LONGEST_ANSWER = 64  # tokens that are kept free for a gold answer
SEGMENT = 20  # steps of a stream that are one unit of work
CHOSEN = ("rows", "fills", "capacities")  # settings that choose units and change none: a later run may add to them
Unit = tuple[Any, ...]  # (row, N, fill, index of the text), or ("stream", row, N, segment)
Record = dict[str, Any]


class Retention:
    """One worker: a model, the questions, and what it keeps between units.

    Args:
        folder: where a stream keeps the memory between its segments.
    """

    def __init__(self, llm: MemoryModel, data: QuestionSet, settings: Settings, folder: Path) -> None:
        self.llm, self.data, self.settings, self.folder = llm, data, settings, folder
        self._full = lru_cache(maxsize=4)(self._fill)
        self._dead = lru_cache(maxsize=4)(self._zeroed)
        self._ids = lru_cache(maxsize=None)(partial(written, llm))
        self._shared = lru_cache(maxsize=8)(partial(in_context, llm))
        self._seen: dict[tuple[str, str], Answer] = {}  # (question, passage) -> answer
        prompts = llm.prompts_or_raise()
        asked = [len(prompts.question(q.question, bare=True)) for text in data.texts for q in text.questions]
        self._room = (
            llm.text_context([]).room - len(prompts.opening) - max(asked) - max(settings.new_tokens, LONGEST_ANSWER)
        )
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

    def run(self, unit: Unit) -> list[Record]:
        """Do one unit of work and return its records."""
        if unit[0] == "stream":
            return list(self._stream(*unit[1:]))
        row, N, fill, i = unit
        text = self.data.texts[i]
        ways = {"ours": self._ours, "window": self._window, "bm25": self._bm25}
        return list(ways.get(row, self._constant)(row, N, fill, text))

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
        yield from _records(text.questions, answers, row=row, N=N, fill=fill, text=text.id)

    def _ours(self, row: str, N: int, fill: str, text: Text) -> Iterator[Record]:
        memory = self._full(N) if fill == "full" else self._empty(N)
        memory = self._write(memory.with_settings(seed=_seed(self.settings.seed, text.id)), text.text, "target")
        for t in range(max(self.settings.own) + 1):
            if t:
                memory = self._write(memory, self._other(t - 1), "unrelated")
            if t in self.settings.own:
                facts = {"row": row, "N": N, "fill": fill, "step": t, "text": text.id, "M": memory.M}
                answers = self._ask(self.llm.context(memory), text.questions)
                for question, answer in zip(text.questions, answers, strict=True):
                    retrieved = self._found(memory, question, "target")
                    yield from _records([question], [answer], left=_left(memory, "target"), **retrieved, **facts)

    def _window(self, row: str, N: int, fill: str, text: Text) -> Iterator[Record]:
        N_seen = min(N, self._room)
        before = [i for filler in self._filler(N) for i in self._ids(filler)]
        for t in self.settings.own:
            after = [i for j in range(t) for i in self._ids(self._other(j))]
            target = self._ids(text.text)
            ids = tuple([*before, *target, *after][-N_seen:])
            share = _in_window(N_seen, len(after), len(target))
            context = in_context(self.llm, ids) if share else self._shared(ids)  # without the text, all see the same
            answers = self._ask(context, text.questions)
            yield from _records(text.questions, answers, row=row, N=N, fill=fill, step=t, text=text.id, left=share)

    def _bm25(self, row: str, N: int, fill: str, text: Text) -> Iterator[Record]:
        for t in self.settings.own:
            library = [*self._filler(N), text.text, *(self._other(j) for j in range(t))]
            passages = _find(library, [q.question for q in text.questions])
            answers = self._ask_found(passages, text.questions)
            for question, answer, passage in zip(text.questions, answers, passages, strict=True):
                share = float(passage == text.text)
                yield from _records([question], [answer], row=row, N=N, fill=fill, step=t, text=text.id, left=share)

    # --- the stream -------------------------------------------------------------------------------------------------

    def _stream(self, row: str, N: int, segment: int) -> Iterator[Record]:
        """Steps segment * SEGMENT and on: write one text, then ask every text whose age is one of the steps."""
        texts, ages = self.data.texts, self.settings.streamed
        steps = range(segment * SEGMENT, min((segment + 1) * SEGMENT, len(texts) + max(ages)))
        memory = self._before(N, segment) if row == "ours" else None
        for step in steps:
            if memory is not None:
                memory = self._write(memory, *self._streamed(step))
            due = [(age, texts[step - age]) for age in ages if 0 <= step - age < len(texts)]
            asked = [(age, text, question) for age, text in due for question in text.questions]
            if not asked:
                continue
            questions = [question for _, _, question in asked]
            library = [*self._filler(N), *(self._streamed(j)[0] for j in range(step + 1))]
            if memory is not None:
                answers = self._ask(self.llm.context(memory), questions)
                shares = [_left(memory, text.id) for _, text, _ in asked]
            elif row == "window":
                N_seen = min(N, self._room)
                ids = [i for passage in library for i in self._ids(passage)][-N_seen:]
                answers = self._ask(in_context(self.llm, ids), questions)
                tokens = [len(self._ids(passage)) for passage in library]
                newer = {age: sum(tokens[len(tokens) - age :]) for age in ages}
                shares = [_in_window(N_seen, newer[age], len(self._ids(text.text))) for age, text, _ in asked]
            else:
                passages = _find(library, [question.question for question in questions])
                answers = self._ask_found(passages, questions)
                shares = [float(passage == text.text) for passage, (_, text, _) in zip(passages, asked, strict=True)]
            for (age, text, question), answer, share in zip(asked, answers, shares, strict=True):
                facts = {"row": row, "N": N, "fill": "full", "step": age, "stream": True, "text": text.id}
                facts |= {"M": memory.M, **self._found(memory, question, text.id)} if memory is not None else {}
                yield from _records([question], [answer], left=share, **facts)
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

    def asked(self) -> dict[str, Any]:
        """The settings as JSON, without those to which a later run may add, such as capacities."""
        values = {name: value for name, value in asdict(self.settings).items() if name not in CHOSEN}
        for N in self.capacities[:1]:
            values["memory"] = asdict(self._empty(N).settings) | {"N": None, "K": self.settings.memory.K}
        return values

    def clear(self) -> None:
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
        store = longterm.of(memory)
        if store is None or not memory.R:
            return {}
        number = [s.name for s in memory.sources].index(source)
        mine = (store.origins == number) & store.occupied
        if not mine.any():
            return {}
        front = self.llm.front(memory, self.llm.prompts_or_raise().question(question.question, bare=True))
        assert isinstance(front, RetrievedPrefix)
        layers = [i for i in range(memory.L) if mine[i].any()]
        shares = [int(mine[i][front.retrieval.places[i]].sum()) / min(memory.R, int(mine[i].sum())) for i in layers]
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
        memory = self._full(N)
        return replace(memory, slots=torch.zeros_like(memory.slots))

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
    worker = Retention(llm, data, settings, out)
    asked = {
        "data": {"name": data.name, "source": data.source, "sha256": data.identity, **(drawn or {})},
        "settings": worker.asked(),
        "model": protocol.model(llm)
        | {"tokenizer": llm.tokenizer_identity, "style": asdict(llm.prompts_or_raise().style)},
    }

    def finish(folder: runner.Folder, complete: bool) -> list[Line]:
        if complete:
            worker.clear()
        return results.write(folder, data, unfinished=not complete)

    return protocol.carry_out(PROTOCOL, llm, worker, asked, finish, out, args=(data, settings, out), **how)


def _find(library: Sequence[str], questions: Sequence[str]) -> list[str]:
    """The passage that BM25 ranks first for each question; "" where no passage shares a word with it."""
    return [library[places[0]] if places else "" for places in ranked(library, questions, 1)]


def _records(questions: Sequence[Question], answers: Sequence[Answer], **facts: Any) -> Iterator[Record]:
    for question, answer in zip(questions, answers, strict=True):
        yield {
            **facts,
            "question": question.id,
            "hit": int(answer.hit),
            "accuracy": round(answer.accuracy, 6),
            "loglik": round(answer.loglik, 6),
            "said": answer.said,
        }


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
