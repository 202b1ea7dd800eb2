"""The live retention curve: texts of titles that are not trained on, asked after others were written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from latentmem.loading.trained import fill_pool
from latentmem.model.model import MemoryModel
from latentmem.train.config import Config
from latentmem.train.data import Documents
from latentmem.train.learner import BIRTH, Learner


class Probe:
    """A small stream: a full memory, then texts one by one, each asked when it has the ages in question.

    Args:
        config: `watch` says which titles, how many texts and which ages.

    Raises:
        ValueError: no source has questions under these titles.
    """

    def __init__(self, config: Config, llm: MemoryModel, learner: Learner, sources: Sequence[Documents]) -> None:
        self.config, self.llm, self.learner, self.prompts = config, llm, learner, llm.prompts_or_raise()
        asked = [d for source in sources for d in source.left_out if d.questions]
        others = [d for source in sources for d in source.all if source.source.kind == "questions"]
        self.asked, self.others = (
            [d for d in documents if len(self.prompts.written(d.text)) <= config.texts.longest]
            for documents in (asked, others)
        )
        self.asked = self.asked[: config.watch.texts]
        if not self.asked:
            raise ValueError("watch.titles: no source has questions under these titles; name some, or set probe to 0.")
        if not self.others:
            raise ValueError("watch.probe: no source has questions under other titles, to stand between; set it to 0.")

    @torch.no_grad()
    def run(self) -> list[dict[str, Any]]:
        """Token accuracy of gold answers at each age: [{age, accuracy, n}]."""
        base, learns = self.llm.base, self.llm.base.training
        base.eval()
        try:
            accuracies = self._accuracies()
        finally:
            base.train(learns)
        return [{"age": age, "accuracy": sum(x) / len(x), "n": len(x)} for age, x in accuracies.items()]

    def _accuracies(self) -> dict[int, list[float]]:
        """Of each age the accuracies of all questions."""
        llm, others = self.learner.reader(), itertools.cycle(self.others)
        accuracies: dict[int, list[float]] = {age: [] for age in self.config.watch.ages}
        memory = llm.empty(settings=self.config.memory.settings())
        memory = fill_pool(llm, memory, BIRTH) if llm.born_full else memory
        while memory.M < memory.N or (llm.born_full and memory.updates * memory.K < memory.N):
            memory = llm.write_ids(memory, self.prompts.written(next(others).text))
        for step in range(len(self.asked) + max(accuracies)):
            new = self.asked[step] if step < len(self.asked) else next(others)
            memory = llm.write_ids(memory, self.prompts.written(new.text))
            for age in accuracies:
                if 0 <= step - age < len(self.asked):
                    pairs = self.asked[step - age].questions[:3]
                    ids = [self.prompts.question(question, bare=True) for question, _ in pairs]
                    scores = llm.score_rows(llm.context(memory), ids, [self.prompts.answer(*pair) for pair in pairs])
                    accuracies[age] += [float(score.hits.double().mean()) for score in scores]
        return accuracies
