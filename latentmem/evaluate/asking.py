"""One context, many questions: what is said, and how likely the gold answer is (protocols of MemoryLLM section 4.4)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from latentmem.evaluate.data.sets import Question
from latentmem.evaluate.settings import NEW_TOKENS
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel

AT_ONCE = 8  # questions in one pass: more bring nothing on a CPU


@dataclass(frozen=True)
class Answer:
    """What one question brought.

    Args:
        hit: one of the right answers is a substring of what was said, upper and lower case alike.
        accuracy: share of the gold answer's tokens that are the most likely ones, given those before.
        loglik: natural log of the gold answer's probability, per token.
        said: the greedy continuation.
    """

    hit: bool
    accuracy: float
    loglik: float
    said: str

    @property
    def numbers(self) -> dict[str, float]:
        """What a record holds of an answer, without its words."""
        return {"hit": int(self.hit), "accuracy": round(self.accuracy, 6), "loglik": round(self.loglik, 6)}


def ask(
    llm: MemoryModel, context: Context, questions: Sequence[Question], *, new_tokens: int = NEW_TOKENS
) -> list[Answer]:
    """Ask questions behind one context, a few at once."""
    if len(questions) > AT_ONCE:
        parts = [questions[i : i + AT_ONCE] for i in range(0, len(questions), AT_ONCE)]
        return [answer for part in parts for answer in ask(llm, context, part, new_tokens=new_tokens)]
    prompts = llm.prompts_or_raise()
    ids = [prompts.question(q.question, bare=context.length > 0) for q in questions]
    context = llm.retrieved(context, ids)
    scores = llm.score_rows(context, ids, [prompts.answer(q.question, q.answers[0]) for q in questions])
    said = say(llm, context, ids, new_tokens)
    return [
        Answer(
            hit=any(a.lower() in words.lower() for a in q.answers),
            accuracy=score.hits.double().mean().item(),
            loglik=score.logprobs.double().mean().item(),
            said=words,
        )
        for q, score, words in zip(questions, scores, said, strict=True)
    ]


def say(llm: MemoryModel, context: Context, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
    """Greedy answers to prompts behind one context, a few at once."""
    said: list[str] = []
    for start in range(0, len(prompts), AT_ONCE):
        outputs = llm.generate_rows(context, prompts[start : start + AT_ONCE], new_tokens)
        said += [llm.tokenizer.decode(output, skip_special_tokens=True).strip() for output in outputs]
    return said


def room(llm: MemoryModel, question: int, answer: int) -> int:
    """Tokens of text that fit into the plain model's context before a question and its answer of so many tokens."""
    return llm.text_context([]).room - len(llm.prompts_or_raise().opening) - question - answer


def in_context(llm: MemoryModel, ids: Sequence[int]) -> Context:
    """Text in the context of the plain model, without memory and adapters; no text: closed book."""
    return llm.text_context([*llm.prompts_or_raise().opening, *ids] if len(ids) else [])


def written(llm: MemoryModel, text: str) -> list[int]:
    """Ids of a text as it is written; models without a chat template get the paper's "Context: "."""
    prompts = llm.prompts_or_raise()
    return prompts.written(text if prompts.chats else f"Context: {text}")


def read(llm: MemoryModel, context: Context, text: str, tokens: int) -> tuple[float, int]:
    """How unlikely the first tokens of a text are behind a context: (nats, tokens they belong to).

    Args:
        tokens: at most so many are read; the first of them is given.
    """
    prompts = llm.prompts_or_raise()
    ids = [*prompts.opening, *prompts.text(text)][:tokens]
    score = llm.score_rows(context, [ids[:1]], [ids[1:]])[0]
    return -score.logprobs.double().sum().item(), len(ids) - 1


def named(text: str) -> str:
    """The id of a text that has none: the beginning of its hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def seed_of(name: str) -> int:
    """The seed of the drops of one sample."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
