"""The live retention curve: texts of titles that are not trained on, asked after others were written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from latentmem.core.memory import Memory
from latentmem.loading.trained import fill_pool
from latentmem.model.model import MemoryModel
from latentmem.train.config import Config
from latentmem.train.data import Document, Documents
from latentmem.train.learner import BIRTH, Learner


class Probe:
    """A small stream: a full memory, then texts one by one, each asked when it has the ages in question.

    Args:
        config: `watch` says which titles, how many texts and which ages.

    Raises:
        ValueError: no source has questions under these titles.
    """

    def __init__(self, config: Config, llm: MemoryModel, learner: Learner, sources: Sequence[Documents]) -> None:
        self.config, self.llm, self.learner = config, llm, learner
        prompts = llm.prompts_or_raise()
        self._ids = lambda document: prompts.written(document.text)
        self.asked = [d for s in sources for d in s.left_out if d.questions and self._fits(d)][: config.watch.texts]
        if not self.asked:
            raise ValueError("watch.titles: no source has questions under these titles; name some, or set probe to 0.")
        self.others = [d for s in sources if s.source.kind == "questions" for d in s.all if self._fits(d)]
        if not self.others:
            raise ValueError("watch.probe: no source has questions under other titles, to stand between; set it to 0.")

    def _fits(self, document: Document) -> bool:
        return len(self._ids(document)) <= self.config.texts.longest

    @torch.no_grad()
    def run(self) -> list[dict[str, Any]]:
        """Token accuracy of gold answers at each age: [{age, accuracy, n}]."""
        llm = self.learner.reader()
        learns = llm.base.training
        llm.base.eval()
        try:
            return self._curve(llm)
        finally:
            llm.base.train(learns)

    def _curve(self, llm: MemoryModel) -> list[dict[str, Any]]:
        ages, others = self.config.watch.ages, itertools.cycle(self.others)
        memory = llm.empty(settings=self.config.memory.settings())
        memory = fill_pool(llm, memory, BIRTH) if llm.born_full else memory
        while memory.M < memory.N or (llm.born_full and memory.updates * memory.K < memory.N):
            memory = llm.write_ids(memory, self._ids(next(others)))
        accuracies: dict[int, list[float]] = {age: [] for age in ages}
        for step in range(len(self.asked) + max(ages)):
            new = self.asked[step] if step < len(self.asked) else next(others)
            memory = llm.write_ids(memory, self._ids(new))
            for age in ages:
                if 0 <= step - age < len(self.asked):
                    accuracies[age] += _accuracies(llm, memory, self.asked[step - age])
        return [{"age": age, "accuracy": sum(x) / len(x), "n": len(x)} for age, x in accuracies.items()]


def _accuracies(llm: MemoryModel, memory: Memory, document: Document) -> list[float]:
    """Shares of the answers' tokens that are the most likely ones, of up to three questions."""
    prompts, asked = llm.prompts_or_raise(), document.questions[:3]
    ids = [prompts.question(question, bare=True) for question, _ in asked]
    scores = llm.score_rows(llm.context(memory), ids, [prompts.answer(*pair) for pair in asked])
    return [float(score.hits.double().mean()) for score in scores]
