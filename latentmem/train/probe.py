"""The live retention curve: texts of titles that are not trained on, asked after others were written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from latentmem.loading.trained import born
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
        self.config, self.llm, self.learner = config, llm, learner
        prompts = llm.prompts_or_raise()
        longest = config.texts.longest
        out = [d for source in sources for d in source.left_out if d.questions]
        fits = [d for d in out if len(prompts.written(d.text)) <= longest]
        self.asked = fits[: config.watch.texts]
        if not self.asked:
            raise ValueError("watch.titles: no source has questions under these titles; name some, or set probe to 0.")
        others = [d for source in sources for d in source.all if source.source.kind == "questions"]
        self.others = [d for d in others if len(prompts.written(d.text)) <= longest]
        if not self.others:
            raise ValueError("watch.probe: no source has questions under other titles, to stand between; set it to 0.")

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
        prompts, m, ages = llm.prompts_or_raise(), self.config.memory, self.config.watch.ages
        memory = llm.empty(settings=m.settings())
        memory = born(llm, memory, BIRTH) if llm.born_full else memory
        others = itertools.cycle(self.others)
        while memory.M < memory.N or (llm.born_full and memory.updates * memory.K < memory.N):
            memory = llm.write_ids(memory, prompts.written(next(others).text))
        found: dict[int, list[float]] = {age: [] for age in ages}
        for step in range(len(self.asked) + max(ages)):
            new = self.asked[step] if step < len(self.asked) else next(others)
            memory = llm.write_ids(memory, prompts.written(new.text))
            due = [(age, self.asked[step - age]) for age in ages if 0 <= step - age < len(self.asked)]
            for age, document in due:
                some = document.questions[:3]
                ids = [prompts.question(question, bare=True) for question, _ in some]
                answers = [prompts.answer(question, answer) for question, answer in some]
                scores = llm.score_rows(llm.context(memory), ids, answers)
                found[age] += [float(score.hits.double().mean()) for score in scores]
        return [{"age": age, "accuracy": sum(x) / len(x), "n": len(x)} for age, x in found.items()]
