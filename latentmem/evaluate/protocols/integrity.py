"""Integrity: what an endless stream of short facts does to a memory, and to a model that is fine-tuned on it instead.

Fact after fact is written into one memory that begins empty (`synthetic.fact`: one sentence about a person of its own).
After every so many the newest fact is asked at once, as in the paper, and beyond it one that is a fixed age old. At
checkpoints other text and BLiMP pairs are read behind the memory; after every stretch the slots are looked at. The row
"ft" has no memory: the plain model takes gradient steps on every fact, and the questions and checkpoints are the same.

A stretch of facts is one unit of work. The memory, or the weights, is kept at its end, and the next stretch begins with
what was kept: a run that was killed loses one stretch at most and ends with the same numbers as one that was not.

Source: MemoryLLM figure 6.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch

from latentmem.core.memory import Memory
from latentmem.evaluate import protocol
from latentmem.evaluate.asking import ask, named, read
from latentmem.evaluate.baselines.tuned import Tuned
from latentmem.evaluate.data import choices
from latentmem.evaluate.data.questions import heldout
from latentmem.evaluate.data.sets import Text
from latentmem.evaluate.data.synthetic import fact
from latentmem.evaluate.protocol import Line, Record, RunOptions, Unit, Worker
from latentmem.evaluate.runner import Folder, Progress
from latentmem.evaluate.settings import Integrity as Settings
from latentmem.evaluate.tables import plots
from latentmem.evaluate.tables.integrity import ROWS, TURNS, draw, drift, lines, settled
from latentmem.model.model import MemoryModel

FACT = 32  # tokens of a fact at most
NEW_TOKENS = 20  # of an answer, as for all invented texts


class Integrity(Worker):
    """A model, and the texts of the checkpoints; a unit is ("plain", 0), ("ft", stretch) or ("memory", stretch).

    Args:
        folder: where memory and weights are kept between stretches.
    """

    PROTOCOL, TITLE = "integrity/2", "Integrity: an endless stream of facts"
    CHOSEN = ("rows", "updates", "ft_updates")
    settings: Settings

    def __init__(self, llm: MemoryModel, settings: Settings, folder: Path) -> None:
        self.llm, self.settings, self.folder = llm, settings, folder
        self.articles = heldout(settings.texts, settings.seed)
        blimp = choices.load("blimp", settings.pairs, settings.seed) if settings.pairs else None
        self.pairs = blimp.items if blimp else ()
        self._tuned: Tuned | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What is written, asked and read, as JSON."""
        articles = [named(article) for article in self.articles]
        facts = f"invented, seed {self.settings.seed}"
        return {"facts": facts, "articles": articles, "pairs": named(repr(self.pairs))}

    def chains(self) -> list[list[Unit]]:
        """The plain model's own numbers, and stretch after stretch of each row."""
        s = self.settings
        counts = {"ft": s.ft_updates, "memory": s.updates}  # the short one first, for runs whose time is limited
        chains: list[list[Unit]] = [[("plain", 0)]]
        return chains + [[(row, k) for k in range(n // s.stretch)] for row, n in counts.items() if row in s.rows]

    def records(self, row: str, k: int) -> Iterator[Record]:
        if row == "plain":
            return self._checkpoint("plain", 0, None)
        return self._memory(k) if row == "memory" else self._ft(k)

    def finish(self, folder: Folder, title: str, records: Sequence[Record], lines: Sequence[Line]) -> Record:
        if records:
            draw(records, folder.path / "plot.png")
        return {"notes": notes(records, self.settings)}

    # --- rows -------------------------------------------------------------------------------------------------------

    def _memory(self, k: int) -> Iterator[Record]:
        """One stretch of facts, written into the memory."""
        s, before = self.settings, self._before(k)
        memory, seconds = before, 0.0
        for i in range(k * s.stretch, (k + 1) * s.stretch):
            ids, start = self._ids(i), time.perf_counter()
            memory = self.llm.write_ids(memory, ids, "facts")
            self._synchronize()
            seconds += time.perf_counter() - start
            if memory.updates != before.updates + i + 1 - k * s.stretch:
                raise ValueError(
                    f"a fact of {len(ids)} tokens took more than one update, and one update reads {memory.piece} "
                    f"tokens. Choose a larger capacity."
                )
            yield from self._due("memory", i, memory)
        yield {"kind": "speed", "row": "memory", "at": _end(k, s), "updates": s.stretch, "seconds": seconds}
        yield _slots(memory, before, _end(k, s))
        memory.save(self._kept("memory", k))
        self._kept("memory", k - 2).unlink(missing_ok=True)  # the one before is needed if this is done again

    def _before(self, k: int) -> Memory:
        """The memory before a stretch: as it was kept, or written anew."""
        if k and self._kept("memory", k - 1).exists():
            return Memory.load(self._kept("memory", k - 1))
        memory = protocol.empty(self.llm, self.settings.memory)
        for i in range(k * self.settings.stretch):
            memory = self.llm.write_ids(memory, self._ids(i), "facts")
        return memory

    def _ft(self, k: int) -> Iterator[Record]:
        """One stretch of facts, learnt by the weights."""
        s, tuned, seconds = self.settings, self._trained(k), 0.0
        with tuned:
            for i in range(k * s.stretch, (k + 1) * s.stretch):
                start = time.perf_counter()
                tuned.learn(self._ids(i))
                self._synchronize()
                seconds += time.perf_counter() - start
                yield from self._due("ft", i, None)
        yield {"kind": "speed", "row": "ft", "at": _end(k, s), "updates": s.stretch, "seconds": seconds}
        tuned.save(self._kept("ft", k))
        self._kept("ft", k - 2).unlink(missing_ok=True)

    def _trained(self, k: int) -> Tuned:
        """The fine-tuned weights before a stretch: as they were kept, or learnt anew."""
        kept, s = self._kept("ft", k - 1), self.settings
        if self._tuned is None or not kept.exists():
            self._tuned = Tuned(self.llm, s.lr, s.steps)
        if kept.exists():
            self._tuned.load(kept)
        elif k:
            with self._tuned:
                for i in range(k * s.stretch):
                    self._tuned.learn(self._ids(i))
        return self._tuned

    # --- what is asked ----------------------------------------------------------------------------------------------

    def _due(self, row: str, i: int, memory: Memory | None) -> Iterator[Record]:
        """What is asked and read after fact i: nothing, most of the time."""
        s, at = self.settings, i + 1
        if at % s.every == 0:
            ages = [age for age in (0, s.age) if age <= i]
            context = self.llm.text_context([]) if memory is None else self.llm.context(memory)
            questions = [self._fact(i - age).questions[0] for age in ages]
            answers = ask(self.llm, context, questions, new_tokens=NEW_TOKENS)
            for age, question, answer in zip(ages, questions, answers, strict=True):
                facts: Record = {"kind": "asked", "row": row, "at": at, "age": age, "question": question.id}
                if memory is not None:
                    facts["left"] = self._left(memory, i - age, memory.updates - age)
                yield {**facts, **answer.numbers, "said": answer.said}
            if memory is not None:
                yield self._alone(i)
        if at % s.checkpoint == 0:
            yield from self._checkpoint(row, at, memory)

    def _alone(self, i: int) -> Record:
        """Fact i asked of a memory that holds nothing else: how hard it is by itself."""
        memory = self.llm.write_ids(protocol.empty(self.llm, self.settings.memory), self._ids(i), "facts")
        question = self._fact(i).questions[0]
        (answer,) = ask(self.llm, self.llm.context(memory), [question], new_tokens=NEW_TOKENS)
        facts = {"kind": "alone", "row": "memory", "at": i + 1, "question": question.id}
        return {**facts, **answer.numbers, "said": answer.said}

    def _checkpoint(self, row: str, at: int, memory: Memory | None) -> Iterator[Record]:
        """Held-out text and BLiMP pairs, read behind the memory, or by the model as its weights are."""
        context = self.llm.text_context([]) if memory is None else self.llm.context(memory)
        for article in self.articles:
            nll, tokens = read(self.llm, context, article, self.settings.tokens)
            yield {"kind": "read", "row": row, "at": at, "text": named(article), "nll": nll, "tokens": tokens}
        for start in range(0, len(self.pairs), 8):
            batch = self.pairs[start : start + 8]
            for item, logliks in zip(batch, choices.logliks(self.llm, memory, batch), strict=True):
                yield {"kind": "pair", "row": row, "at": at, "text": item.id, "right": choices.is_right(item, logliks)}

    def _left(self, memory: Memory, i: int, update: int) -> float:
        """Share of the slots of fact i, written by this update, that is left, over all layers."""
        written = memory.rules.slots_of(len(self._ids(i)), memory.K, memory.compression)
        return int((memory.births == update).sum()) / (memory.L * written)

    def _fact(self, i: int) -> Text:
        return fact(self.settings.seed, i)

    def _ids(self, i: int) -> list[int]:
        return self.llm.prompts_or_raise().written(self._fact(i).text, self.settings.role)

    def _synchronize(self) -> None:
        if self.llm.decoder.device.type == "cuda":
            torch.cuda.synchronize()

    def _kept(self, row: str, k: int) -> Path:
        return self.folder / f"{row}-{k}.safetensors"

    def clear(self, finished: Collection[Unit]) -> None:
        """Keep of each row what the newest finished stretch left, from which a longer run goes on."""
        for row in ROWS:
            newest = max((unit[1] for unit in finished if unit[0] == row), default=0)
            for file in self.folder.glob(f"{row}-*.safetensors"):
                if int(file.stem.rpartition("-")[2]) < newest:
                    file.unlink()


def _end(k: int, s: Settings) -> int:
    """Facts that are written at the end of stretch k."""
    return (k + 1) * s.stretch


def _slots(memory: Memory, before: Memory, at: int) -> Record:
    """The slots at the end of a stretch: norms by layer, numbers that are none, and how many an update writes."""
    slots = memory.slots.float()
    norms = slots.norm(dim=2).double()
    written = memory.sources[-1].slots - (before.sources[-1].slots if before.sources else 0)
    return {
        "kind": "slots",
        "row": "memory",
        "at": at,
        "N": memory.N,
        "M": memory.M,
        "K": written / (memory.updates - before.updates),
        "norms": [round(x, 6) for x in norms.mean(1).tolist()],
        "variances": [round(x, 6) for x in norms.var(1).tolist()],
        "broken": int((~slots.isfinite()).sum()),
    }


# --- the run --------------------------------------------------------------------------------------------------------


def notes(records: Sequence[Record], settings: Settings) -> list[str]:
    """How far each row came, whether slots are broken, and what the test for drift says, in sentences."""
    said = []
    for row, asked in (("memory", settings.updates), ("ft", settings.ft_updates)):
        reached = max((r["at"] for r in records if r["kind"] == "speed" and r["row"] == row), default=0)
        if row not in settings.rows:
            continue
        said.append(f"{row}: {reached} of {asked} updates were reached.")
        known = settled(records) if row == "memory" else None
        if known:
            turn, start = known
            slots = [r for r in records if r["kind"] == "slots"]
            broken = sum(r["broken"] for r in slots)
            said.append(
                f"memory: N = {slots[-1]['N']}, N/K = {turn:.1f} updates: it was replaced {reached / turn:.1f} times. "
                f"{broken} numbers in its slots were NaN or infinite, over {len(slots)} looks."
            )
            if reached <= start:
                said.append(f"memory: drift is looked for after {start} updates ({TURNS} N/K), which were not reached.")
        for name, e in drift(records, row):
            if e is None:
                said.append(f"{row}, {name}: too few windows for an interval.")
                continue
            verdict = "no drift found, the interval contains 0" if e.low <= 0 <= e.high else "drift"
            after = f" after update {known[1]}" if known else ""
            said.append(f"{row}, {name}{after}: {e.mean:.4f} [{e.low:.4f}, {e.high:.4f}]: {verdict}.")
    return said


def _until(end: float, progress: Progress | None) -> Progress:
    """A progress that also ends the run behind this time."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)
        if done < total and time.monotonic() > end:
            raise protocol.EnoughError

    return report


def measure(
    llm: MemoryModel, settings: Settings, out: Path, *, minutes: float | None = None, **how: Unpack[RunOptions]
) -> list[Line]:
    """Run the protocol, or go on with it; further arguments as in `protocol.measure`.

    A later run may ask for more updates, or for the other row, in the same folder.

    Args:
        out: also gets plot.png, and memory-K.safetensors with the memory at the end of stretch K.
        minutes: after which no stretch is begun; the table then shows what was reached.
    """
    plots.require()
    worker = Integrity(llm, settings, out)
    if minutes is not None:
        how["progress"] = _until(time.monotonic() + 60 * minutes, how.get("progress"))
    return protocol.measure(worker, lines, out, data=worker.about, args=(settings, out), **how)
