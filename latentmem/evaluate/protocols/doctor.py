"""Is the memory alive? The same questions with the real memory, with a zeroed one and with another's, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from latentmem.core.memory import Memory
from latentmem.evaluate import protocol
from latentmem.model.model import MemoryModel

THINGS = ("blue door", "old safe", "garden gate", "night train")
CODES = ("7391", "2846", "5108", "6427")
ROWS = ("real memory", "zeroed memory", "another's memory", "no memory")


@dataclass(frozen=True)
class Case:
    """One question with its answers.

    Args:
        question: what was asked.
        gold: the right answer, "" if it is not known.
        answers: by row of `ROWS`.
        logprobs: natural log of the probability of one gold token, by row.
    """

    question: str
    gold: str
    answers: dict[str, str]
    logprobs: dict[str, float]

    def hits(self, row: str) -> bool:
        return self.gold in self.answers[row]


def fact(i: int) -> str:
    """A sentence that no training text holds."""
    return f"The secret code of the {THINGS[i]} is {CODES[i]}."


def planted(llm: MemoryModel) -> Iterator[Case]:
    """Four memories, each with its own secret, asked for it one after another."""
    memories = [llm.write(llm.empty(), fact(i), source="doctor") for i in range(len(THINGS))]
    for i, thing in enumerate(THINGS):
        other = memories[(i + 1) % len(memories)]
        yield ask(llm, memories[i], other, f"What is the secret code of the {thing}?", CODES[i])


def ask(llm: MemoryModel, memory: Memory, other: Memory, question: str, gold: str = "") -> Case:
    """One question with `memory`, the same memory zeroed, `other`, and none."""
    zeroed = protocol.zeros(llm, memory)
    memories = dict(zip(ROWS, (memory, zeroed, other, llm.blank()), strict=True))
    prompts = llm.prompts_or_raise()
    logprobs = {}
    for row, m in memories.items():
        if gold:
            prompt = prompts.question(question, bare=not m.is_empty)
            logprobs[row] = llm.score(m, prompt, prompts.text(gold)).logprobs.mean().item()
    answers = {row: llm.ask(m, question, max_new_tokens=16) for row, m in memories.items()}
    return Case(question, gold, answers, logprobs)


def alive(cases: list[Case]) -> bool:
    """Whether the right code is likelier with the real memory than with any other, in every case."""
    return all(case.logprobs[ROWS[0]] > max(case.logprobs[row] for row in ROWS[1:]) for case in cases)


def law(llm: MemoryModel) -> float | None:
    """Largest difference between logits behind an untrained "exact" memory and with the text in the context.

    None where the law does not hold by design: with adapters, or for a checkpoint with its own pool.
    """
    if llm.adapters or llm.born_full:
        return None
    prompts = llm.prompts_or_raise()
    text, question = prompts.text(" ".join(fact(i) for i in range(len(THINGS)))), prompts.text(" And the old safe?")
    empty = llm.empty(form="exact")
    memory = llm.write_ids(empty, text)
    plain = llm.logits(empty, [prompts.first_token, *text, *question])[-len(question) :]
    return (llm.logits(memory, question) - plain).abs().max().item()
