"""A set of texts with questions, as a value."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question with its right answers; the first one is the gold answer whose likelihood is measured."""

    id: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """A text and questions that it answers."""

    id: str
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class QuestionSet:
    """Texts to be remembered, in the order in which they were drawn, and texts that have nothing to do with them.

    Args:
        name: one of `NAMES`.
        source: where it was read from, in words.
        texts: with questions that passed the filter.
        unrelated: in the order in which they are written, the same for every sample.
    """

    name: str
    source: str
    texts: tuple[Text, ...]
    unrelated: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Hash of everything in it."""
        return hashlib.sha256(repr((self.texts, self.unrelated)).encode()).hexdigest()
