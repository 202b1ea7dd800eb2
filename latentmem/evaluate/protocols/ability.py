"""What a memory of unrelated texts costs what the model could do before: perplexity, BLiMP, PIQA and MMLU.

Every item is read in four states, the same way in all of them: by the plain model, and behind an empty, a half full and
a full memory. The plain model and the empty memory must agree to the bit. Nothing is generated:

    perplexity    the first tokens of held-out articles
    BLiMP         the acceptable sentence of a pair is the likelier one, summed over its tokens
    PIQA          the right of two ways to a goal is the likelier one, summed, and per character ("normed")
    MMLU          the right letter is the likeliest of four as the next token, without examples
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

from latentmem.core.memory import Memory
from latentmem.evaluate import protocol
from latentmem.evaluate.asking import named, read
from latentmem.evaluate.data import choices
from latentmem.evaluate.data.choices import Choices
from latentmem.evaluate.data.questions import heldout
from latentmem.evaluate.protocol import Line, Numbers, Record, RunOptions, Unit, Worker, as_lines, perplexities
from latentmem.evaluate.settings import Ability as Settings
from latentmem.evaluate.stats import difference, mean_of
from latentmem.model.model import MemoryModel

STATES = ("plain", "empty", "half", "full")
METRICS = (  # set, metric, and how it is called
    ("blimp", "right", "BLiMP"),
    ("piqa", "right", "PIQA"),
    ("piqa", "normed", "PIQA, normed"),
    ("mmlu", "right", "MMLU"),
)
BATCH = 8  # items of one unit of work


class Ability(Worker):
    """A model, the sets, and memories of unrelated texts.

    A unit is ("perplexity", index of the article), or (set, number of the batch).

    Args:
        sets: what is chosen from, as `choices.load` gives it.
        unrelated: texts that fill the memories.
    """

    PROTOCOL, TITLE = "ability/1", "What a memory costs what the model could do before"
    settings: Settings

    def __init__(self, llm: MemoryModel, sets: Sequence[Choices], unrelated: Sequence[str], settings: Settings) -> None:
        self.llm, self.settings, self.unrelated = llm, settings, unrelated
        self.sets = {one.name: one.items for one in sets}
        self.articles = heldout(settings.texts, settings.seed) if settings.texts else []

    def units(self) -> list[Unit]:
        units: list[Unit] = [("perplexity", i) for i in range(len(self.articles))]
        return units + [(name, k) for name, items in self.sets.items() for k in range(-(-len(items) // BATCH))]

    def records(self, name: str, k: int) -> Iterator[Record]:
        return self._perplexity(k) if name == "perplexity" else self._choices(name, k)

    def _perplexity(self, i: int) -> Iterator[Record]:
        text = self.articles[i]
        for state, memory in self._memories.items():
            context = self.llm.text_context([]) if memory is None else self.llm.context(memory)
            nll, tokens = read(self.llm, context, text, self.settings.tokens)
            yield {"task": "perplexity", "state": state, "text": named(text), "nll": nll, "tokens": tokens}

    def _choices(self, name: str, k: int) -> Iterator[Record]:
        items = self.sets[name][k * BATCH : (k + 1) * BATCH]
        for state, memory in self._memories.items():
            for item, logliks in zip(items, choices.logliks(self.llm, memory, items), strict=True):
                record = {"task": name, "state": state, "text": item.id, "right": choices.is_right(item, logliks)}
                normed = {"normed": choices.is_right(item, logliks, normed=True)} if name == "piqa" else {}
                yield record | normed

    @cached_property
    def _memories(self) -> dict[str, Memory | None]:
        """What stands in front in each state; a checkpoint's own pool is always full."""
        s = self.settings
        memories: dict[str, Memory | None] = {"plain": None, "empty": self.llm.blank()}
        if not self.llm.born_full:
            memories["half"] = protocol.full(self.llm, s.memory, self.unrelated, share=0.5)
        return memories | {"full": protocol.full(self.llm, s.memory, self.unrelated)}


@as_lines
def lines(records: Sequence[Record]) -> Numbers:
    """Each task in each state, and paired with the plain model."""
    by: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for r in records:
        by[r["task"], r["state"]][r["text"]] = r
    yield from perplexities({state: by["perplexity", state] for state in STATES})
    for name, metric, title in METRICS:
        for state in STATES:
            yield f"{title}, {state}", mean_of(by[name, state].values(), metric)
        for state in STATES[1:]:
            yield f"{title}, {state} - plain", difference(by[name, state], by[name, "plain"], metric)


def measure(
    llm: MemoryModel,
    sets: Sequence[Choices],
    unrelated: Sequence[str],
    settings: Settings,
    out: Path,
    **how: Unpack[RunOptions],
) -> list[Line]:
    """Run the protocol, or go on with it; arguments as in `Ability` and `protocol.measure`."""
    worker = Ability(llm, sets, unrelated, settings)
    about: dict[str, Any] = {one.name: {"source": one.source, "sha256": one.identity} for one in sets}
    about |= {"articles": named(repr(worker.articles)), "unrelated": named(repr(list(unrelated)))}
    return protocol.measure(worker, lines, out, data=about, args=(sets, unrelated, settings), **how)
