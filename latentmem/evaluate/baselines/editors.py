"""Ways to change a fact that a model holds: a memory, text in the context, fine-tuning, LoRA, a rank-one edit (ROME).

A state is a value, and the model's own weights are never touched: what an edit adds to them is a tensor of its own in
float32, which a linear layer adds to what it gives while `reading` lasts. So an edit is undone to the bit by leaving
it, and it is not rounded away in a model that runs in bfloat16.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from latentmem.core.memory import Memory
from latentmem.disk import replace_bytes
from latentmem.evaluate.asking import in_context, seed_of, written
from latentmem.evaluate.baselines.passages import indexed, nearest, searcher
from latentmem.evaluate.data.edits import Edit, EditSet, Probe
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel

ENOUGH = 0.01  # nats per token: the loss at which fine-tuning stops before its last step, as in ROME's released code
PASS = 512  # tokens of text that go through the model at once


class Editor:
    """One way to edit; a state is whatever the way needs, here a tuple that JSON can hold."""

    def __init__(self, llm: MemoryModel) -> None:
        self.llm = llm

    def start(self, name: str) -> Any:
        """A state without edits; `name` seeds whatever is drawn."""
        return ()

    def edit(self, state: Any, edit: Edit) -> Any:
        """The state after one more edit; the given one stays valid."""
        raise NotImplementedError

    def parts(self, state: Any, probes: Sequence[Probe]) -> list[tuple[Any, Sequence[Probe]]]:
        """The states that probes see, each with its probes."""
        return [(state, probes)]

    def context(self, state: Any) -> Context:
        """What stands before prompts, for ways that change no weights."""
        raise NotImplementedError

    def reading(self, state: Any) -> AbstractContextManager[Context]:
        """The context in which prompts are scored, for as long as it lasts."""
        return contextlib.nullcontext(self.context(state))

    def save(self, state: Any, path: Path) -> None:
        """Keep a state in a file."""
        replace_bytes(path, json.dumps(state))

    def load(self, path: Path) -> Any:
        """A state from a file."""
        return tuple(json.loads(path.read_text(encoding="utf-8")))


# --- prompts: the same ids for every way -----------------------------------------------------------------------------


def prompt_ids(llm: MemoryModel, prompt: str, *, question: bool, bare: bool) -> list[int]:
    """Ids of a question as the model is asked, or of the beginning of a sentence as it stands.

    Args:
        bare: something stands in front: a memory, or text with the opening.
    """
    prompts = llm.prompts_or_raise()
    if question:
        return prompts.question(prompt, bare=bare)
    return [*([] if bare else prompts.opening), *prompts.text(prompt)]


def answer_ids(llm: MemoryModel, prompt: str, answer: str, *, question: bool) -> list[int]:
    """Ids of an answer as it stands behind its prompt."""
    prompts = llm.prompts_or_raise()
    if question:
        return prompts.answer(prompt, answer)
    before, both = prompts.text(prompt), prompts.text(f"{prompt} {answer}")
    return both[len(before) :] if both[: len(before)] == before else prompts.text(f" {answer}")


def last_of(llm: MemoryModel, ids: Sequence[int], prompt: str, subject: str) -> int:
    """The place in `ids`, which hold the prompt, of the last token of the subject.

    Raises:
        ValueError: the prompt does not hold the subject, or its ids do not decode to it.
    """
    if subject not in prompt:
        raise ValueError(
            f"a rank-one edit needs the subject in the prompt: {subject!r} is not in {prompt!r}; leave out rome."
        )
    until = prompt[: prompt.index(subject) + len(subject)]
    for i in range(len(ids)):
        if until in llm.tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False):
            return i
    raise ValueError(
        f"the tokenizer of this model does not give {prompt!r} back, so its subject can not be found; leave out rome."
    )


# --- the plain model, and text in its context ------------------------------------------------------------------------


class Plain(Editor):
    """The plain model, which no edit changes."""

    def edit(self, state: tuple[()], edit: Edit) -> tuple[()]:
        return state

    def context(self, state: tuple[()]) -> Context:
        return self.llm.text_context([])


class InContext(Editor):
    """The sentence of an edit in the context of the plain model; a state is the text's token ids."""

    def text(self, edit: Edit) -> str:
        """What stands in front of a prompt."""
        return edit.sentence

    def edit(self, state: tuple[int, ...], edit: Edit) -> tuple[int, ...]:
        return (*state, *written(self.llm, self.text(edit)))

    def context(self, state: tuple[int, ...]) -> Context:
        return in_context(self.llm, state)


class Demonstrations(InContext):
    """IKE: the sentence of an edit behind demonstrations of how a new fact is to be used.

    The demonstrations are made of those other records whose sentences BM25 finds nearest, the nearest last. Of eight of
    them one shows that the new fact's own prompt gets the new answer, three that another prompt for it does, and four
    that a prompt about something else keeps its answer. None holds a prompt that the edit is measured with. Behind them
    the new fact is shown once with its own prompt, and then said again, as in the released code.

    Args:
        data: the records.
        count: of demonstrations; fewer where there are not so many records.

    Raises:
        ValueError: bm25s is not installed.

    Source: Zheng et al. 2023 (IKE), section 3: 32 demonstrations, copied, updated and retained 1 : 3 : 4.
    """

    KINDS = ("copy", *["update"] * 3, *["retain"] * 4)

    def __init__(self, llm: MemoryModel, data: EditSet, count: int = 32) -> None:
        super().__init__(llm)
        self.data, self.count, self.bm25s = data, count, searcher("ike")

    def text(self, edit: Edit) -> str:
        asked = {probe.prompt for probe in edit.probes}
        shown: list[str] = []
        for i in self._nearest(edit):
            other, kind = self.data.edits[i], self.KINDS[len(shown) % len(self.KINDS)]
            probe = {"copy": other.rewrite, "update": other.rephrased[0], "retain": other.unrelated[0]}[kind]
            if other.id == edit.id or asked & {probe.prompt, other.rewrite.prompt}:
                continue
            shown.append(f"New Fact: {other.sentence}\n{probe.prompt} {probe.answer}\n\n")
            if len(shown) == self.count:
                break
        fact = f"New Fact: {edit.sentence}\n"
        return "".join([*reversed(shown), f"{fact}{edit.sentence}\n\n", fact])

    def _nearest(self, edit: Edit) -> list[int]:
        """Records by how near their sentences are, the nearest first: twice as many as are shown."""
        asked = self.bm25s.tokenize([edit.sentence], stopwords="en", show_progress=False)
        k = min(len(self.data.edits), 2 * self.count + 1)
        return [int(i) for i in self._index.retrieve(asked, k=k, show_progress=False).documents[0]]

    @cached_property
    def _index(self) -> Any:
        return indexed([edit.sentence for edit in self.data.edits])


class Retrieved(Editor):
    """The sentences of all edits, of which each prompt sees the one that BM25 finds; a state is the sentences.

    The newest of equals is taken, also where a prompt shares no word with any: behind one edit it is `InContext`.

    Raises:
        ValueError: bm25s is not installed.
    """

    def __init__(self, llm: MemoryModel) -> None:
        super().__init__(llm)
        self._index = lru_cache(maxsize=1)(indexed)
        searcher()  # an error now, if it is not installed, and not after hours

    def edit(self, state: tuple[str, ...], edit: Edit) -> tuple[str, ...]:
        return (*state, edit.sentence)

    def parts(self, state: tuple[str, ...], probes: Sequence[Probe]) -> list[tuple[Any, Sequence[Probe]]]:
        """The states with nothing but the sentence that is found for a prompt, each with the probes that see it."""
        if len(state) < 2:
            return [(state, probes)]
        parts: dict[tuple[str, ...], list[Probe]] = {}
        for probe, i in zip(probes, nearest(self._index(state), [probe.prompt for probe in probes]), strict=True):
            parts.setdefault((state[i],), []).append(probe)
        return list(parts.items())

    def context(self, state: tuple[str, ...]) -> Context:
        return in_context(self.llm, [i for text in state for i in written(self.llm, text)])


# --- a memory --------------------------------------------------------------------------------------------------------


class Written(Editor):
    """The sentence of each edit is written into a memory; a state is the memory.

    Args:
        begin: gives the memory before all edits.
        seed: of the drops, together with the name that a state is started with.
    """

    def __init__(self, llm: MemoryModel, begin: Callable[[], Memory], seed: int = 0) -> None:
        super().__init__(llm)
        self.begin, self.seed = begin, seed

    def start(self, name: str) -> Memory:
        return self.begin().with_settings(seed=seed_of(f"{self.seed}/{name}"))

    def edit(self, state: Memory, edit: Edit) -> Memory:
        return self.llm.write_ids(state, written(self.llm, edit.sentence), edit.id)

    def context(self, state: Memory) -> Context:
        return self.llm.context(state)

    def save(self, state: Memory, path: Path) -> None:
        state.save(path)

    def load(self, path: Path) -> Memory:
        return Memory.load(path)


class Unwritten(Written):
    """The memory as it is before all edits: what the memory and its adapters change without the fact."""

    def edit(self, state: Memory, edit: Edit) -> Memory:
        return state
