"""What a memory changes beside remembering: how other text is read behind it, and whether it says "I don't know".

Perplexity: held-out articles, their first tokens, read by the plain model, behind an empty memory and behind a full one
of unrelated texts. The plain model and the empty memory must agree to the bit.

Abstention: a paragraph is written into a full memory, then three kinds of questions are asked: answered by it, about it
but not answered by it (SQuAD 2.0), and about paragraphs that were never written. Abstaining is to begin with the words
that training taught; the untrained model does not know them and is measured all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Unpack

from latentmem.core.memory import Memory
from latentmem.evaluate import protocol
from latentmem.evaluate.asking import ask, in_context, named, read, seed_of, written
from latentmem.evaluate.data.questions import heldout, unanswerable
from latentmem.evaluate.data.sets import QuestionSet
from latentmem.evaluate.protocol import Line, Numbers, Record, RunOptions, Unit, Worker, as_lines, perplexities
from latentmem.evaluate.scoring import ABSTAINS
from latentmem.evaluate.settings import Effects as Settings
from latentmem.evaluate.stats import mean_of
from latentmem.model.model import MemoryModel

KINDS = ("answered", "not answered", "never written")
STATES = ("plain", "empty", "full")


class Effects(Worker):
    """A model, the texts, and a memory that is full of others; a unit is ("perplexity" or "abstention", index)."""

    PROTOCOL, TITLE = "effects/1", "What a memory changes beside remembering"
    settings: Settings

    def __init__(self, llm: MemoryModel, data: QuestionSet, settings: Settings) -> None:
        self.llm, self.data, self.settings = llm, data, settings
        self.articles = heldout(settings.texts, settings.seed)
        self.wrong = unanswerable({text.text for text in data.texts})

    def units(self) -> list[Unit]:
        return [
            *(("perplexity", i) for i in range(len(self.articles))),
            *(("abstention", i) for i in range(len(self.data.texts))),
        ]

    def records(self, kind: str, i: int) -> Iterator[Record]:
        return self._perplexity(i) if kind == "perplexity" else self._abstention(i)

    def _perplexity(self, i: int) -> Iterator[Record]:
        llm, text = self.llm, self.articles[i]
        contexts = {"plain": llm.text_context([]), "empty": llm.context(llm.blank()), "full": llm.context(self._full)}
        for state, context in contexts.items():
            nll, tokens = read(llm, context, text, self.settings.tokens)
            yield {"kind": state, "text": named(text), "nll": nll, "tokens": tokens}

    def _abstention(self, i: int) -> Iterator[Record]:
        text, other = self.data.texts[i], self.data.texts[(i + 1) % len(self.data.texts)]
        memory = self._full.with_settings(seed=seed_of(text.id))
        memory = self.llm.write_ids(memory, written(self.llm, text.text), "target")
        kinds = dict(zip(KINDS, (text.questions, self.wrong.get(text.text, ()), other.questions), strict=True))
        for way, context in (("memory", self.llm.context(memory)), ("floor", in_context(self.llm, ()))):
            for kind, questions in kinds.items():
                chosen = questions[: len(text.questions)]
                for question, answer in zip(chosen, ask(self.llm, context, chosen) if chosen else [], strict=True):
                    no = answer.said.lower().replace("\u2019", "'").startswith(ABSTAINS)
                    facts = {"kind": kind, "way": way, "text": text.id, "question": question.id}
                    yield {**facts, "abstains": int(no), "hit": int(answer.hit), "said": answer.said}

    @cached_property
    def _full(self) -> Memory:
        """A memory full of unrelated texts."""
        return protocol.full(self.llm, self.settings.memory, self.data.unrelated)


@as_lines
def lines(records: Sequence[Record]) -> Numbers:
    """Perplexities and their ratio, and how often each kind of question is answered by "I don't know"."""
    yield from perplexities({state: {r["text"]: r for r in records if r["kind"] == state} for state in STATES})
    for way in ("memory", "floor"):
        for kind in KINDS:
            asked = [r for r in records if r["kind"] == kind and r["way"] == way]
            yield f"abstains, {kind}, {way}", mean_of(asked, "abstains")
            if kind == "answered":
                yield f"hits, {kind}, {way}", mean_of(asked, "hit")


def measure(
    llm: MemoryModel, data: QuestionSet, settings: Settings, out: Path, **how: Unpack[RunOptions]
) -> list[Line]:
    """Run the protocol, or go on with it; arguments as in `protocol.measure`."""
    about = {"source": data.source, "sha256": data.identity}
    return protocol.measure(Effects(llm, data, settings), lines, out, data=about, args=(data, settings), **how)
