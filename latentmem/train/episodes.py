"""Documents -> episodes: what is written, how old it is when it is asked for, and what is asked.

    new_knowledge   write the first part of a text, predict its next part                       (MemoryLLM 3.2.1)
    continuous      write x1 .. x(n-1) one after another, predict xn; n grows while training     (MemoryLLM 3.2.2)
    forgetting      as new_knowledge, with other documents between the text and its next part    (MemoryLLM 3.2.3)
    repetition      the start of a passage of a written text, continued word for word    (released "Repeat:" steps)
    distillation    the same model with the text in its context says what should be said
    questions       questions about several texts in one memory, each at an age of its own
    recall          questions about texts of this and earlier episodes, out of the pool as it stands; reading is learned
    unknown         as recall, half of the questions about texts that the memory does not hold: "I don't know."
    unrelated       text that has nothing to do with the memory goes on as the plain model says
    chat            turns of a conversation that have nothing to do with the memory are answered as by the plain model;
                    with it, every third question of the others is put as a turn of a conversation, too
    facts           questions about invented facts of a person (`scenes`), in tiny and in full memories
    talk            as facts, some of them are turns of the conversation in which the question is asked
    everyday        what has nothing to do with such facts is answered as by the plain model

An episode is a function of the seed and its number alone, so a run can go on after a kill, and processes share the work
without talking about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from latentmem.core.presets import PRESETS
from latentmem.model.prompts import Prompts
from latentmem.train.config import Config
from latentmem.train.data import Apart, Document, Documents
from latentmem.train.episode import Episode, Ids, Row, question_row
from latentmem.train.facts import UNKNOWN
from latentmem.train.passages import TRIES, Passages
from latentmem.train.scenes import SCENES, Scenes

START = 10  # tokens of a passage that are shown where the rest of it is to be repeated
REPLY = 24  # tokens of a reply in "chat" at most
PROSE = ("new_knowledge", "continuous", "forgetting", "repetition", "unrelated", "chat")  # objectives that need it
RECALLS = ("recall", "unknown")


class Recallable(NamedTuple):
    """A document that an episode of `RECALLS` writes: its ids, and rows about it that later episodes may ask."""

    document: Document
    text: Ids
    rows: tuple[Row, ...]


class Episodes:
    """All episodes of a run.

    Args:
        prompts: how texts and questions are put to the model.
        sources: documents, in the order of `config.data`.
        apart: what must not be trained on; a text that clashes with it is passed over.
        world: processes that share the episodes of a step.

    Raises:
        ValueError: an objective finds nothing to train on in these sources.
    """

    def __init__(
        self,
        config: Config,
        prompts: Prompts,
        sources: Sequence[Documents],
        apart: Apart | None = None,
        world: int = 1,
    ) -> None:
        self.config, self.prompts, self.sources, self.world = config, prompts, sources, world
        self._passages = Passages(config, prompts, sources, apart or Apart(()))
        self._scenes = Scenes(prompts, config.seed, config.texts.rows, config.texts.longest)
        needing = [name for name in PROSE if config.objectives.get(name)]
        if needing and not self._passages.prose:
            raise ValueError(f"objectives.{needing[0]} needs a source of kind text; give one, or take it out.")
        self._recallables = lru_cache(maxsize=512)(self._recallables_of)
        self._count = lru_cache(maxsize=512)(self._count_texts)
        self._documents = lru_cache(maxsize=512)(self._documents_of)
        self._named = {document.id: document for source in sources for document in source.all}
        self._titled: dict[str, list[Document]] = {}
        for document in self._named.values():
            if document.questions:
                self._titled.setdefault(document.title, []).append(document)

    def __getitem__(self, number: int) -> Episode:
        """Episode 0, 1, ...; any of them at any time."""
        objective, random = self._drawn(number)
        make: dict[str, Callable[..., Episode]] = {
            "new_knowledge": self._continued,
            "forgetting": self._continued,
            "continuous": self._continuous,
            "repetition": self._repeated,
            "recall": self._recalled,
            "unknown": self._recalled,
            "unrelated": self._unrelated,
            "chat": self._unrelated,
            **dict.fromkeys(SCENES, self._of_scene),
        }
        episode = make.get(objective, self._questioned)(objective, number, random)
        return replace(episode, compression=1 if objective in SCENES else self._tokens_per_slot(number))

    def _drawn(self, number: int) -> tuple[str, np.random.Generator]:
        """An episode's objective, and what all else in it is drawn from."""
        random = np.random.default_rng([self.config.seed, number])
        names = [name for name, weight in self.config.objectives.items() if weight > 0]
        weights = np.array([self.config.objectives[name] for name in names])
        return names[random.choice(len(names), p=weights / weights.sum())], random

    def _tokens_per_slot(self, number: int) -> int:
        """Of the texts of an episode."""
        drawn = self.config.memory.drawn
        return int(drawn[np.random.default_rng([self.config.seed, number, 1]).integers(len(drawn))])

    # --- objectives -------------------------------------------------------------------------------------------------

    def _continued(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        names, texts, rows = [], [], []
        for i in range(self.config.texts.at_once):
            document, (first, then) = self._passages.pieces(number, i, 2, random)
            names.append(document.id)
            texts.append(self._written(first))
            rows.append(self._continuation(then, i))
        ages = None if objective == "forgetting" else (0,) * len(texts)
        return self._episode(objective, number, random, names, texts, rows, ages)

    def _continuous(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        document, pieces = self._passages.pieces(number, 0, self._length(number, random), random)
        texts, rows = [self._written(piece) for piece in pieces[:-1]], [self._continuation(pieces[-1], len(pieces) - 2)]
        names, ages = [document.id] * len(texts), (0,) * len(texts)
        return self._episode(objective, number, random, names, texts, rows, ages, in_sequence=True)

    def _length(self, number: int, random: np.random.Generator) -> int:
        """Pieces of the document in an episode of "continuous"."""
        most = 2 + int(min(1.0, self._done(number)) * (self.config.texts.most_pieces - 1))
        return int(random.integers(2, max(3, most + 1)))

    def _repeated(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        t = self.config.texts
        names, texts, rows = [], [], []
        for i in range(t.at_once):
            document, (text,) = self._passages.pieces(number, i, 1, random)
            ids = tuple(self.prompts.text(text))
            names.append(document.id)
            texts.append(self._written(text))
            for _ in range(max(1, t.rows // (2 * t.at_once))):
                new = t.continuation // 2
                at = int(random.integers(max(1, len(ids) - START - new + 1)))
                rows.append(Row(ids[at : at + START], ids[at + START : at + START + new], i))
        return self._episode(objective, number, random, names, texts, [row for row in rows if row.answer])

    def _questioned(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        t = self.config.texts
        names, texts, asked = [], [], []
        for i in range(t.at_once):
            document, text, questions = self._passages.with_questions(number, i, random)
            names.append(document.id)
            texts.append(self._written(text))
            asked += [(question, answer, i) for question, answer in questions]
        rows = [self._question(*asked[i]) for i in random.permutation(len(asked))[: t.rows]]
        return self._episode(objective, number, random, names, texts, rows, taught=objective == "distillation")

    def _recalled(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        own, t = self._recallables(number), self.config.texts
        chosen: dict[Row, int] = {}
        for _ in range(TRIES):
            rows, since = self._at_age(number, self._age(number, random, len(own[-1].text)))
            row = rows[random.integers(len(rows))]
            if len(chosen) < t.rows:
                chosen.setdefault(row, len(own) - 1 - since)
        names = [one.document.id for one in own]
        asked = [replace(row, about=text) for row, text in chosen.items()]
        for i in range(len(asked) // 2 if objective == "unknown" else 0):
            misses = t.near > 0 and random.random() < t.near
            near = self._near(number, random, [one.document for one in own]) if misses else None
            question = near or self._passages.with_questions(number, i, random, names)[2][0][0]
            asked[i] = self._question(question, UNKNOWN, None)
        return _in_pool(self._episode(objective, number, random, names, [one.text for one in own], asked))

    def _unrelated(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        t, names, texts, chat = self.config.texts, [], [], objective == "chat"
        for i in range(t.at_once):
            document, (text,) = self._passages.pieces(number, i, 1, random)
            names.append(document.id)
            texts.append(self._written(text))
        rows = []
        for i in range(-(-t.rows // 3)):
            if chat:
                rows.append(Row(self._passages.turns(number, i, random, names), (), None))
            else:
                _, (text,) = self._passages.pieces(number, i, 1, random, names)
                rows.append(self._continuation(text, None))
        episode = self._episode(objective, number, random, names, texts, rows, taught=True)
        return _in_pool(episode, replies=min(REPLY, t.continuation) if chat else 0)

    def _of_scene(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        lesson = self._scenes(objective, number)
        ages, taught = (0,) * len(lesson.texts), lesson.replies > 0
        episode = self._episode(objective, number, random, [], lesson.texts, lesson.rows, ages, True, taught)
        return _in_pool(episode, fill=lesson.fill, replies=lesson.replies, last=lesson.last)

    # --- what was written before ------------------------------------------------------------------------------------

    def _near(self, number: int, random: np.random.Generator, documents: Sequence[Document]) -> str | None:
        """A question about the article of one of these documents that nothing in memory answers, if there is one.

        article    paragraph 1        paragraph 2        paragraph 3
                   one of documents   written lately     never written: "Who built the mill?"
                   |------------- held -------------|
                   A question is taken if nothing held asks it, or has its answer in the text.
        """
        held = [*documents, *self._written_lately(number)]
        ids, asked = {document.id for document in held}, {question for d in held for question, _ in d.questions}
        text = " ".join(document.text for document in held).lower()
        titles = sorted({document.title for document in documents if document.title})
        others = [other for title in titles for other in self._titled.get(title, ()) if other.id not in ids]
        for i in random.permutation(len(others))[:TRIES]:
            unanswered = [q for q, answer in others[i].questions if q not in asked and answer.lower() not in text]
            if unanswered and not self._passages.apart.clashes(others[i].text):
                return unanswered[random.integers(len(unanswered))]
        return None

    def _written_lately(self, number: int) -> Iterator[Document]:
        """The documents of episodes before this one, back to `texts.oldest` updates."""
        since, before = 0, self._before(number)
        while before >= 0 and since < self.config.texts.oldest:
            yield from self._documents(before)
            since, before = since + self._count(before), self._before(before)

    def _documents_of(self, number: int) -> tuple[Document, ...]:
        """Of the texts that an episode writes."""
        own = tuple(one.document for one in self._recallables(number))
        return own or tuple(self._named[name] for name in self[number].names)

    def _recallables_of(self, number: int) -> tuple[Recallable, ...]:
        """What an episode of `RECALLS` writes; others: nothing."""
        objective, random = self._drawn(number)
        own = []
        for i in range(self.config.texts.at_once if objective in RECALLS else 0):
            document, text, questions = self._passages.with_questions(number, i, random)
            rows = tuple(self._question(question, answer, None) for question, answer in questions)
            own.append(Recallable(document, self._written(text), rows))
        return tuple(own)

    def _at_age(self, number: int, age: int) -> tuple[tuple[Row, ...], int]:
        """Questions about a text that about so many updates stand behind, and how many they are exactly.

        Of the oldest one where none is as old.
        """
        oldest: tuple[tuple[Row, ...], int] = ((), 0)
        since, each = 0, self.config.steps.episodes * self.world
        first = self.config.began(number // each) * each
        while number >= first:
            own = self._recallables(number)
            for i, one in enumerate(reversed(own)):
                oldest = one.rows, since + i
                if age <= 0:
                    return oldest
                age -= 1
            age -= 0 if own else self.config.texts.at_once
            since += self._count(number)
            number = self._before(number)
        return oldest

    def _count_texts(self, number: int) -> int:
        """How many texts an episode writes."""
        objective, random = self._drawn(number)
        if objective in SCENES:
            return 0
        return self._length(number, random) - 1 if objective == "continuous" else self.config.texts.at_once

    def _before(self, number: int) -> int:
        """The episode that the same process does before this one; negative if there is none."""
        each = self.config.steps.episodes
        return number - 1 if number % each else number - 1 - (self.world - 1) * each

    def _done(self, number: int) -> float:
        """The share of the run that lies before an episode."""
        return number / (self.config.steps.total * self.config.steps.episodes * self.world)

    # --- parts ------------------------------------------------------------------------------------------------------

    def _episode(
        self,
        objective: str,
        number: int,
        random: np.random.Generator,
        names: Sequence[str],
        texts: Sequence[Ids],
        rows: Sequence[Row],
        ages: Sequence[int] | None = None,
        in_sequence: bool | None = None,
        taught: bool = False,
    ) -> Episode:
        t = self.config.texts
        drawn = sorted((self._age(number, random, len(text)) for text in texts), reverse=True)
        sequence = bool(random.random() < t.in_sequence) if in_sequence is None else in_sequence
        if not sequence and ages is None:
            drawn = [drawn[i] for i in random.permutation(len(drawn))]  # written side by side: no order among them
        fill = float(random.choice([0.0, 0.5, 1.0], p=[0.15, 0.35, 0.5])) * float(random.uniform(0.5, 1))
        return Episode(
            objective,
            tuple(names),
            tuple(texts),
            tuple(drawn if ages is None else ages),
            sequence,
            fill * min(1.0, self._done(number) / t.grow if t.grow else 1.0),
            tuple(rows),
            taught,
            int(random.integers(1 << 62)),
        )

    def _age(self, number: int, random: np.random.Generator, n: int) -> int:
        """An age for a text of n tokens: often 0, else as likely between 1 and 2 as between 20 and 40."""
        t, m = self.config.texts, self.config.memory
        k = PRESETS[m.preset].slots_of(n, m.K, self._tokens_per_slot(number))
        oldest = min(t.oldest, math.log(t.least_left) / math.log1p(-min(k, m.N - 1) / m.N))
        if oldest < 1 or random.random() < t.recent:
            return 0
        return round(float(np.exp(random.uniform(0, np.log(oldest)))))

    def _question(self, question: str, answer: str, about: int | None) -> Row:
        return question_row(self.prompts, question, answer, about, chats=bool(self.config.objectives.get("chat")))

    def _written(self, text: str) -> Ids:
        return tuple(self.prompts.written(text))

    def _continuation(self, text: str, about: int | None) -> Row:
        ids = tuple(self.prompts.text(text))[: self.config.texts.continuation]
        return Row(ids[:1], ids[1:], about)


def _in_pool(episode: Episode, **changes: Any) -> Episode:
    """The episode with texts that are written into the pool itself, one behind the other, and read at once."""
    ages = (0,) * len(episode.texts)
    return replace(episode, **{"ages": ages, "in_sequence": True, "fill": 1.0, "from_pool": True, **changes})
