"""Forgetting a text on request: what is still known of it, and what it costs the others.

Into a memory that is full of unrelated texts go one other text, the text to be forgotten, and further others; then all
questions are asked. The text is forgotten in two ways, each by the store's own code:

    dropped    its slots go (`Store.forget`); texts behind it were written while it was there, and keep what they saw
    replayed   everything else is written again as if it had never been there (`Store.forget_by_replay`)

The control is a memory of the same writes without the text. The residue is what is known of the text after forgetting
it, minus what the control "knows" of it, paired question by question.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Unpack

import torch

from latentmem.core.memory import Memory
from latentmem.evaluate import protocol
from latentmem.evaluate.asking import ask, in_context, seed_of, written
from latentmem.evaluate.data.sets import QuestionSet, Text
from latentmem.evaluate.protocol import Line, Numbers, Record, RunOptions, Unit, Worker, as_lines
from latentmem.evaluate.settings import Forget as Settings
from latentmem.evaluate.stats import difference, less, mean, mean_of, ratio
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel
from latentmem.store import Store

STATES = ("before", "dropped", "replayed", "control", "floor")
WAYS = ("dropped", "replayed")
METRICS = {"hit": "hits", "accuracy": "token accuracy", "loglik": "log-likelihood per token"}
TARGET = "target"  # the name under which the text to be forgotten is written


class Forget(Worker):
    """A model, the texts, and a memory that is full of others; a unit is ("forget", index of the text).

    Raises:
        ValueError: fewer texts than one sample takes.
    """

    PROTOCOL, TITLE = "forget/2", "Forgetting a text on request"
    settings: Settings

    def __init__(self, llm: MemoryModel, data: QuestionSet, settings: Settings) -> None:
        self.llm, self.data, self.settings = llm, data, settings
        if len(data.texts) < settings.behind + 2:
            raise ValueError(f"a sample takes {settings.behind + 2} texts, and there are {len(data.texts)}. Take more.")

    def units(self) -> list[Unit]:
        return [("forget", i) for i in range(len(self.data.texts))]

    def records(self, _: str, i: int) -> Iterator[Record]:
        texts = self.data.texts
        target, *others = (texts[(i + j) % len(texts)] for j in range(self.settings.behind + 2))
        writes = [(others[0], others[0].id), (target, TARGET), *((text, text.id) for text in others[1:])]
        start = self._full.with_settings(seed=seed_of(target.id))
        control = start
        for text, source in writes:
            if source != TARGET:
                control = self.llm.write_ids(control, written(self.llm, text.text), source)
        memories, seconds = self._forgotten(start, writes)
        memories["control"] = control
        for way in WAYS:
            after = memories[way]
            same = _is_same(after, control)
            facts = {"kind": "memory", "state": way, "text": target.id, "same": int(same), "M": after.M}
            yield {**facts, "gone": int(all(s.name != TARGET for s in after.sources)), "seconds": seconds[way]}
        for state, memory in memories.items():
            yield from self._asked(state, self.llm.context(memory), target, others)
        yield from self._asked("floor", in_context(self.llm, ()), target, ())

    def _forgotten(
        self, start: Memory, writes: Sequence[tuple[Text, str]]
    ) -> tuple[dict[str, Memory], dict[str, float]]:
        """The memory before forgetting and behind both ways, and the seconds that each way takes."""
        memories, seconds = dict[str, Memory](), dict[str, float]()
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(Store(Path(folder) / "store")) as store:
            store.create("memory", start)
            for text, source in writes:
                store.write(self.llm, "memory", written(self.llm, text.text), source)
            memories["before"] = store.open("memory")
            replay = partial(store.forget_by_replay, self.llm)
            forget: dict[str, Callable[[str, str], object]] = {"dropped": store.forget, "replayed": replay}
            for way in WAYS:
                began = time.perf_counter()
                forget[way]("memory", TARGET)
                memories[way], seconds[way] = store.open("memory"), time.perf_counter() - began
        return memories, seconds

    def _asked(self, state: str, context: Context, target: Text, others: Sequence[Text]) -> Iterator[Record]:
        """Ask about the text and the others; the sample is named by the text that is forgotten."""
        asked = [("target", target, question) for question in target.questions]
        asked += [
            ("other", text, question) for text in others for question in text.questions[: self.settings.per_other]
        ]
        answers = ask(self.llm, context, [question for *_, question in asked], new_tokens=self.settings.new_tokens)
        for (about, text, question), answer in zip(asked, answers, strict=True):
            yield {
                "kind": "asked",
                "state": state,
                "about": about,
                "sample": target.id,
                "text": text.id,
                "question": question.id,
                **answer.numbers,
            }

    @cached_property
    def _full(self) -> Memory:
        """A memory full of unrelated texts."""
        return protocol.full(self.llm, self.settings.memory, self.data.unrelated)


@as_lines
def lines(records: Sequence[Record]) -> Numbers:
    """What is known in each state, the residue of both ways, what the others lose, and what the ways cost."""
    by = {
        (about, state): {(r["sample"], r["question"]): r for r in records if _is(r, about, state)}
        for about in ("target", "other")
        for state in STATES
    }
    for metric, title in METRICS.items():
        for state in STATES:
            yield f"the text, {state}: {title}", mean_of(by["target", state].values(), metric)
        control = by["target", "control"]
        known = less(by["target", "before"], control, metric)
        yield f"known before forgetting (before - control): {title}", mean(*known)
        for way in WAYS:
            residue = less(by["target", way], control, metric)
            yield f"residue, {way} - control: {title}", mean(*residue)
            if residue[1] == known[1]:
                yield f"share of what was known that is left, {way}: {title}", ratio(residue[0], *known)
    for metric, title in METRICS.items():
        before = by["other", "before"]
        yield f"the others, before: {title}", mean_of(before.values(), metric)
        for state in (*WAYS, "control"):
            yield f"the others, {state} - before: {title}", difference(by["other", state], before, metric)
    for way in WAYS:
        memories = [r for r in records if r["kind"] == "memory" and r["state"] == way]
        yield f"memories equal to the control to the bit, {way}", mean_of(memories, "same")
        yield f"seconds, {way}", mean_of(memories, "seconds")


def _is(r: Record, about: str, state: str) -> bool:
    return bool(r["kind"] == "asked" and r["about"] == about and r["state"] == state)


def measure(
    llm: MemoryModel, data: QuestionSet, settings: Settings, out: Path, **how: Unpack[RunOptions]
) -> list[Line]:
    """Run the protocol, or go on with it; arguments as in `protocol.measure`."""
    about = {"source": data.source, "sha256": data.identity}
    return protocol.measure(Forget(llm, data, settings), lines, out, data=about, args=(data, settings), **how)


def _is_same(one: Memory, other: Memory) -> bool:
    """Whether two memories hold the same slots, to the bit."""
    if one.slots.shape != other.slots.shape or not torch.equal(one.slots, other.slots.to(one.slots)):
        return False
    pairs = zip(one.written.values(), other.written.values(), strict=True)
    return all(torch.equal(mine.tensors[name], theirs.tensors[name]) for mine, theirs in pairs for name in mine.tensors)
