"""Documents -> parts of them that an episode can use: pieces of text, questions with the text that answers them, turns.

Which document is looked at first depends on the number of the episode alone; one that is too long or too short, that
has no question, or that clashes with an evaluation set is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from latentmem.model.prompts import Prompts
from latentmem.train.config import Config
from latentmem.train.data import Apart, Document, Documents, cloze, sentences
from latentmem.train.episode import Ids, conversation, message

TRIES = 50  # documents that are looked at until one is long enough
PASSAGE = 96  # tokens of a user's turn in "chat" at most, where it is taken from a document
SHORT = 40  # tokens of two sentences that are one turn at most
FAR = 7919  # numbers between two documents that are looked at for one text
# The "I" of "World War I" is no person.
FIRST_PERSON = re.compile(r"(?:^|\b[a-z]+ |[,;:\"“] ?)I(?:['’]\w+)? [a-z]|\b(?:[Mm]y|[Ww]e|[Oo]ur)\b")
OPENINGS = (
    "Hello!",
    "Good morning! How are you?",
    "Thanks, that helps.",
    "Tell me a joke.",
    "What can you do for me?",
    "Let's talk about something else.",
    "I don't feel well today.",
    "My name is Nora, and I live in Leeds.",
    "I have two cats and a rabbit.",
    "Help me write a letter to my landlord.",
    "Write two sentences about {title}.",
    "Write a short poem about {title}.",
    "Give me three ideas for a story about {title}.",
    "I would like to talk about {title}.",
    "My sister gave me a book about {title}.",
    "We are going to see a film about {title} tonight.",
)
NODS = ("Thank you, I have read it.", "All right.", "Got it. What would you like to know?", "Interesting!")


class Passages:
    """Parts of all documents of a run.

    In its methods, `number` is that of the episode, `i` that of a text in it, and `without` names documents: what is
    given is far from them in the order, and part of none of them.

    Args:
        prompts: how texts and questions are put to the model.
        sources: documents, in the order of `config.data`.
        apart: what must not be trained on.
    """

    def __init__(self, config: Config, prompts: Prompts, sources: Sequence[Documents], apart: Apart) -> None:
        self.texts, self.prompts, self.sources, self.apart = config.texts, prompts, sources, apart
        self.prose = [i for i, source in enumerate(sources) if source.source.kind == "text"]
        self._count = lru_cache(maxsize=4096)(lambda text: len(prompts.text(text)))
        self._around = len(prompts.written("x")) - self._count("x")  # ids that wrap a text

    def pieces(
        self, number: int, i: int, n: int, random: np.random.Generator, without: Sequence[str] = ()
    ) -> tuple[Document, list[str]]:
        """n pieces of one text, each following the one before."""
        t = self.texts
        for document in self._candidates(number, i, self.prose, random, without):
            parts = sentences(document.text)
            start = int(random.integers(len(parts)))
            pieces: list[str] = []
            for _ in range(n):
                most = int(random.integers(t.shortest, t.longest + 1)) - self._around
                piece, start = self._run(parts, start, max(1, most))
                pieces.append(piece)
            if self.apart.clashes(" ".join(pieces)):
                continue
            if all(pieces) and self._count(pieces[-1]) > 1:
                return document, pieces
        raise ValueError(
            f"{self.sources[self.prose[0]].source.path}: {TRIES} documents were looked at, and none has {n} pieces of "
            f"{t.shortest} to {t.longest} tokens. Make texts.longest smaller, or give longer documents."
        )

    def with_questions(
        self,
        number: int,
        i: int,
        random: np.random.Generator,
        without: Sequence[str] = (),
        tokens: tuple[int, int] | None = None,
    ) -> tuple[Document, str, list[tuple[str, str]]]:
        """A text of any source that answers at least one question, and these questions in a drawn order.

        Args:
            tokens: the shortest and the longest; None: as the config says.
        """
        shortest, longest = tokens or (self.texts.shortest, self.texts.longest)
        for document in self._candidates(number, i, range(len(self.sources)), random, without):
            text, questions = document.text, list(document.questions)
            if self._count(text) + self._around > longest:
                parts = sentences(text)
                start = 0 if questions else int(random.integers(len(parts)))
                text, _ = self._run(parts, start, int(random.integers(shortest, longest + 1)) - self._around)
                questions = [(question, answer) for question, answer in questions if answer in text]
            if self.apart.clashes(text):
                continue
            questions = questions or (cloze(text) if not document.questions else [])
            if questions and self._count(text) + self._around >= shortest:
                return document, text, [questions[j] for j in random.permutation(len(questions))]
        change = "take out objectives.chat" if tokens else "change texts.shortest and texts.longest"
        raise ValueError(
            f"{TRIES} documents were looked at, and none of {shortest} to {longest} tokens answers a question. "
            f"Give other data, or {change}."
        )

    def turns(self, number: int, i: int, random: np.random.Generator, without: Sequence[str]) -> Ids:
        """A conversation: a passage with a question, a statement, or an opening, in turn."""
        kind = (number + i) % 3
        turns: tuple[str, ...]
        if kind == 2:
            _, passage, questions = self.with_questions(number, i, random, without, (PASSAGE // 4, PASSAGE))
            turns = (passage, NODS[random.integers(len(NODS))], questions[0][0])
        else:
            turns = ((self._opening if kind else self._statement)(number, i, random, without),)
        roles = ("user", "assistant", "user")
        return conversation(self.prompts, *(message(role, text) for role, text in zip(roles, turns, strict=False)))

    def _statement(self, number: int, i: int, random: np.random.Generator, without: Sequence[str]) -> str:
        """A sentence of a document, or two short ones; in the first person, if it has any such."""
        for document in self._candidates(number, i, self.prose, random, without):
            parts = sentences(document.text)
            whole = [j for j, text in enumerate(parts) if len(text.split()) > 3]  # no headings
            fit = [j for j in whole if self._count(parts[j]) <= PASSAGE]
            fit = [j for j in fit if FIRST_PERSON.search(parts[j])] or fit
            if not fit:
                continue
            at, n = fit[random.integers(len(fit))], int(random.integers(1, 3))
            statement = self._run(parts[: at + n], at, SHORT)[0] or parts[at]
            if not self.apart.clashes(statement):
                return statement
        raise ValueError(
            f"{self.sources[self.prose[0]].source.path}: {TRIES} documents were looked at, and none has a sentence of "
            f"at most {PASSAGE} tokens. Give other data, or take out objectives.chat."
        )

    def _opening(self, number: int, i: int, random: np.random.Generator, without: Sequence[str]) -> str:
        """How a conversation may begin; where documents have titles, it may be about one."""
        document = next(self._candidates(number, i, range(len(self.sources)), random, without), None)
        title = document.title.replace("_", " ") if document else ""
        openings = [text for text in OPENINGS if title or "{title}" not in text]
        return openings[random.integers(len(openings))].format(title=title)

    def _candidates(
        self, number: int, i: int, among: Sequence[int], random: np.random.Generator, without: Sequence[str]
    ) -> Iterator[Document]:
        """Documents of the sources `among` to look at."""
        weights = np.array([self.sources[j].source.weight for j in among])
        for away in range(TRIES):
            source = self.sources[among[random.choice(len(among), p=weights / weights.sum())]]
            place = number * self.texts.at_once + i + away * FAR
            document = source.opposite(place) if without else source[place]
            if document.id not in without:
                yield document

    def _run(self, parts: Sequence[str], start: int, most: int) -> tuple[str, int]:
        """Sentences from `start` on with at most so many tokens, as one text, and where they end."""
        taken: list[str] = []
        while start < len(parts) and self._count(" ".join([*taken, parts[start]])) <= most:
            taken.append(parts[start])
            start += 1
        return " ".join(taken), start
