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
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from zlib import crc32

import numpy as np

from latentmem.core.presets import PRESETS
from latentmem.model.prompts import Message, Prompts
from latentmem.train.config import Config
from latentmem.train.data import Apart, Document, Documents, cloze, sentences
from latentmem.train.facts import UNKNOWN
from latentmem.train.scenes import SCENES, Scenes

START = 10  # tokens of a passage that are given where the rest of it is to be repeated
TRIES = 50  # documents that are looked at until one is long enough
REPLY = 24  # tokens of a reply in "chat" at most
PASSAGE = 96  # tokens of a user's turn in "chat" at most, where it is taken from a document
SHORT = 40  # tokens of two sentences that are one turn at most
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
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """What is read behind a memory.

    Args:
        prompt: ids that are given, without bos.
        answer: ids whose likelihood is the loss.
        about: number of the text in the episode; -1, -2, ...: of the last one that was written before it, and so on;
            None: it is about no text.
    """

    prompt: Ids
    answer: Ids
    about: int | None


@dataclass(frozen=True)
class Episode:
    """What one pass of training does.

    Args:
        objective: its name.
        names: of the texts' documents.
        texts: ids of each, oldest first.
        ages: for each text, how many updates are between it and the rows, falling.
        in_sequence: each text is written behind the ones before it, else beside them.
        fill: share of the pool that stands before the texts, from 0 to 1.
        last: text that the rows read last, nearest to them, as a search puts it; None: in the order of writing.
        rows: what is read.
        taught: the teacher's distribution is learned instead of the answer.
        seed: of what is dropped.
        from_pool: texts are written into the pool itself, without gradient, and the rows read all of it; where `fill`
            is less than 1, into a copy of its newest part, of which nothing stays.
        compression: tokens per slot of its texts; None: as the learner has it.
        replies: the rows' answers are empty, and the plain model itself gives each, so many tokens at most; 0: they
            are there.
    """

    objective: str
    names: tuple[str, ...]
    texts: tuple[Ids, ...]
    ages: tuple[int, ...]
    in_sequence: bool
    fill: float
    rows: tuple[Row, ...]
    taught: bool
    seed: int
    from_pool: bool = False
    compression: int | None = None
    replies: int = 0
    last: int | None = None

    @property
    def written(self) -> int:
        """Tokens that are written."""
        return sum(map(len, self.texts))

    @property
    def read(self) -> int:
        """Tokens that are read; of replies as many as there may be."""
        return sum(len(row.prompt) + len(row.answer) + self.replies for row in self.rows)


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
        self._apart = apart or Apart(())
        self._count = lru_cache(maxsize=4096)(lambda text: len(prompts.text(text)))
        self._told = lru_cache(maxsize=512)(self._tell)
        self._writes = lru_cache(maxsize=512)(self._count_texts)
        self._around = len(prompts.written("x")) - self._count("x")  # ids that wrap a text
        prose = [i for i, source in enumerate(sources) if source.source.kind == "text"]
        needing = [
            name
            for name in ("new_knowledge", "continuous", "forgetting", "repetition", "unrelated", "chat")
            if config.objectives.get(name)
        ]
        if needing and not prose:
            raise ValueError(f"objectives.{needing[0]} needs a source of kind text; give one, or take it out.")
        self._prose = prose
        self._scenes = Scenes(prompts, config.seed, config.texts.rows, config.texts.longest)
        self._held = lru_cache(maxsize=512)(self._documents)
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
        made = make.get(objective, self._asked)(objective, number, random)
        return replace(made, compression=1 if objective in SCENES else self._tokens_per_slot(number))

    def _drawn(self, number: int) -> tuple[str, np.random.Generator]:
        """An episode's objective, and what all else in it is drawn from."""
        random = np.random.default_rng([self.config.seed, number])
        names = [name for name, weight in self.config.objectives.items() if weight > 0]
        weights = np.array([self.config.objectives[name] for name in names])
        return names[random.choice(len(names), p=weights / weights.sum())], random

    def _tokens_per_slot(self, number: int) -> int:
        """Of the texts of an episode."""
        some = self.config.memory.drawn
        return int(some[np.random.default_rng([self.config.seed, number, 1]).integers(len(some))])

    def _before(self, number: int) -> int:
        """The episode that the same process does before this one; negative if there is none."""
        each = self.config.steps.episodes
        return number - 1 if number % each else number - 1 - (self.world - 1) * each

    def _done(self, number: int) -> float:
        """The share of the run that lies before an episode."""
        return number / (self.config.steps.total * self.config.steps.episodes * self.world)

    # --- objectives -------------------------------------------------------------------------------------------------

    def _continued(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        names, texts, rows = [], [], []
        for i in range(self.config.texts.at_once):
            document, (first, then) = self._pieces(number, i, 2, random)
            names.append(document.id)
            texts.append(self._written(first))
            rows.append(self._continuation(then, i))
        aged = objective == "forgetting"
        return self._episode(objective, number, random, names, texts, rows, ages=None if aged else (0,) * len(texts))

    def _continuous(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        n = self._length(number, random)
        document, pieces = self._pieces(number, 0, n, random)
        rows = [self._continuation(pieces[-1], len(pieces) - 2)]
        texts = [self._written(piece) for piece in pieces[:-1]]
        return self._episode(
            objective, number, random, [document.id] * len(texts), texts, rows, ages=(0,) * len(texts), in_sequence=True
        )

    def _length(self, number: int, random: np.random.Generator) -> int:
        """Pieces of the document in an episode of "continuous"."""
        most = 2 + int(min(1.0, self._done(number)) * (self.config.texts.most_pieces - 1))
        return int(random.integers(2, max(3, most + 1)))

    def _repeated(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        t = self.config.texts
        names, texts, rows = [], [], []
        for i in range(t.at_once):
            document, (text,) = self._pieces(number, i, 1, random)
            ids = tuple(self.prompts.text(text))
            names.append(document.id)
            texts.append(self._written(text))
            for _ in range(max(1, t.rows // (2 * t.at_once))):
                given, new = START, t.continuation // 2
                at = int(random.integers(max(1, len(ids) - given - new + 1)))
                rows.append(Row(ids[at : at + given], ids[at + given : at + given + new], i))
        return self._episode(objective, number, random, names, texts, [row for row in rows if row.answer])

    def _asked(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        t = self.config.texts
        names, texts, asked = [], [], []
        for i in range(t.at_once):
            document, text, questions = self._with_questions(number, i, random)
            names.append(document.id)
            texts.append(self._written(text))
            asked += [(question, answer, i) for question, answer in questions]
        chosen = [asked[i] for i in random.permutation(len(asked))[: t.rows]]
        rows = [self._question(question, answer, about) for question, answer, about in chosen]
        return self._episode(objective, number, random, names, texts, rows, taught=objective == "distillation")

    def _recalled(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        own, t = self._told(number), self.config.texts
        documents = [document for document, _, _ in own]
        rows: dict[Row, int] = {}
        for _ in range(TRIES):
            some, since = self._at_age(number, self._age(number, random, len(own[-1][1])))
            row = some[random.integers(len(some))]
            if len(rows) < t.rows:
                rows.setdefault(row, len(own) - 1 - since)
        names, asked = [document.id for document in documents], [replace(row, about=text) for row, text in rows.items()]
        for i in range(len(asked) // 2 if objective == "unknown" else 0):
            near = self._near(number, random, documents) if t.near and random.random() < t.near else None
            question = near or self._with_questions(number, i, random, names)[2][0][0]
            asked[i] = self._question(question, UNKNOWN, None)
        made = self._episode(objective, number, random, names, [text for _, text, _ in own], asked)
        return replace(made, ages=(0,) * len(own), in_sequence=True, fill=1.0, from_pool=True)

    def _unrelated(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        t, names, texts = self.config.texts, [], []
        for i in range(t.at_once):
            document, (text,) = self._pieces(number, i, 1, random)
            names.append(document.id)
            texts.append(self._written(text))
        rows, chat = [], objective == "chat"
        for i in range(-(-t.rows // 3)):
            if chat:
                rows.append(self._turns(number, i, random, names))
                continue
            _, (text,) = self._pieces(number, i, 1, random, names)
            rows.append(self._continuation(text, None))
        made = self._episode(objective, number, random, names, texts, rows, taught=True)
        replies = min(REPLY, t.continuation) if chat else 0
        return replace(made, ages=(0,) * len(texts), in_sequence=True, fill=1.0, from_pool=True, replies=replies)

    def _of_scene(self, objective: str, number: int, random: np.random.Generator) -> Episode:
        lesson = self._scenes(objective, number)
        rows, taught = [Row(*row) for row in lesson.rows], lesson.replies > 0
        made = self._episode(objective, number, random, [], lesson.texts, rows, (0,) * len(lesson.texts), True, taught)
        return replace(made, fill=lesson.fill, from_pool=True, replies=lesson.replies, last=lesson.last)

    def _turns(self, number: int, i: int, random: np.random.Generator, without: Sequence[str]) -> Row:
        """A conversation about no document of `without`: a statement, an opening, or a passage with a question."""
        kind = (number + i) % 3
        said: tuple[str, ...]
        if kind == 2:
            _, passage, questions = self._with_questions(number, i, random, without, (PASSAGE // 4, PASSAGE))
            said = (passage, NODS[random.integers(len(NODS))], questions[0][0])
        else:
            said = ((self._opening if kind else self._statement)(number, i, random, without),)
        turns: list[Message] = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), said, strict=False)
        ]
        return Row(tuple(self.prompts.chat(turns, bare=True)), (), None)

    def _statement(self, number: int, i: int, random: np.random.Generator, without: Sequence[str]) -> str:
        """A sentence of a document, or two short ones; in the first person, if it has any such."""
        for document in self._candidates(number, i, self._prose, random, without):
            some = sentences(document.text)
            whole = [j for j, text in enumerate(some) if len(text.split()) > 3]  # no headings
            fit = [j for j in whole if self._count(some[j]) <= PASSAGE]
            fit = [j for j in fit if FIRST_PERSON.search(some[j])] or fit
            if not fit:
                continue
            at, n = fit[random.integers(len(fit))], int(random.integers(1, 3))
            said = self._run(some[: at + n], at, SHORT)[0] or some[at]
            if not self._apart.clashes(said):
                return said
        raise ValueError(
            f"{self.sources[self._prose[0]].source.path}: {TRIES} documents were looked at, and none has a sentence of "
            f"at most {PASSAGE} tokens. Give other data, or take out objectives.chat."
        )

    def _opening(self, number: int, i: int, random: np.random.Generator, without: Sequence[str]) -> str:
        """How a conversation may begin; where documents have titles, it may be about one."""
        everything = range(len(self.sources))
        document = next(self._candidates(number, i, everything, random, without), None)
        title = document.title.replace("_", " ") if document else ""
        some = [text for text in OPENINGS if title or "{title}" not in text]
        return some[random.integers(len(some))].format(title=title)

    def _near(self, number: int, random: np.random.Generator, documents: Sequence[Document]) -> str | None:
        """A question about one of these documents' article that nothing written lately answers, if there is one."""
        held, since, before = list(documents), 0, self._before(number)
        while before >= 0 and since < self.config.texts.oldest:
            held += self._held(before)
            since, before = since + self._writes(before), self._before(before)
        ids, asked = {document.id for document in held}, {question for d in held for question, _ in d.questions}
        titles = sorted({document.title for document in documents if document.title})
        some = [other for title in titles for other in self._titled.get(title, ()) if other.id not in ids]
        text = " ".join(document.text for document in held).lower()
        for i in random.permutation(len(some))[:TRIES]:
            found = [q for q, answer in some[i].questions if q not in asked and answer.lower() not in text]
            if found and not self._apart.clashes(some[i].text):
                return found[random.integers(len(found))]
        return None

    def _documents(self, number: int) -> tuple[Document, ...]:
        """Of the texts that an episode writes."""
        told = self._told(number)
        return tuple(document for document, _, _ in told) or tuple(self._named[name] for name in self[number].names)

    def _tell(self, number: int) -> tuple[tuple[Document, Ids, tuple[Row, ...]], ...]:
        """What an episode of "recall" or "unknown" writes: ids and questions of each document; others: nothing."""
        objective, random = self._drawn(number)
        told = []
        for i in range(self.config.texts.at_once if objective in ("recall", "unknown") else 0):
            document, text, questions = self._with_questions(number, i, random)
            rows = tuple(self._question(question, answer, None) for question, answer in questions)
            told.append((document, self._written(text), rows))
        return tuple(told)

    def _at_age(self, number: int, age: int) -> tuple[tuple[Row, ...], int]:
        """Questions about a text that about so many updates stand behind, and how many they are exactly.

        Of the oldest one where none is as old.
        """
        found: tuple[tuple[Row, ...], int] = ((), 0)
        since, each = 0, self.config.steps.episodes * self.world
        first = self.config.began(number // each) * each
        while number >= first:
            told = self._told(number)
            for i, (_, _, rows) in enumerate(reversed(told)):
                found = rows, since + i
                if age <= 0:
                    return found
                age -= 1
            age -= 0 if told else self.config.texts.at_once
            since += self._writes(number)
            number = self._before(number)
        return found

    def _count_texts(self, number: int) -> int:
        """How many texts an episode writes."""
        objective, random = self._drawn(number)
        if objective in SCENES:
            return 0
        return self._length(number, random) - 1 if objective == "continuous" else self.config.texts.at_once

    # --- parts ------------------------------------------------------------------------------------------------------

    def _episode(
        self,
        objective: str,
        number: int,
        random: np.random.Generator,
        names: list[str],
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
        end = self.prompts.tokenizer.eos_token_id
        ids = [*self.prompts.answer(question, answer), *([] if end is None else [end])]
        as_chat = self.config.objectives.get("chat") and crc32(question.encode()) % 3 == 0  # as in a conversation
        turns: list[Message] = [{"role": "user", "content": question}]
        prompt = self.prompts.chat(turns, bare=True) if as_chat else self.prompts.question(question, bare=True)
        return Row(tuple(prompt), tuple(ids), about)

    def _written(self, text: str) -> Ids:
        return tuple(self.prompts.written(text))

    def _continuation(self, text: str, about: int | None) -> Row:
        ids = tuple(self.prompts.text(text))[: self.config.texts.continuation]
        return Row(ids[:1], ids[1:], about)

    def _pick(
        self, number: int, i: int, among: Sequence[int], random: np.random.Generator, away: int, opposite: bool = False
    ) -> Document:
        weights = np.array([self.sources[j].source.weight for j in among])
        source = self.sources[among[random.choice(len(among), p=weights / weights.sum())]]
        n = number * self.config.texts.at_once + i + away
        return source.opposite(n) if opposite else source[n]

    def _candidates(
        self, number: int, i: int, among: Sequence[int], random: np.random.Generator, without: Sequence[str]
    ) -> Iterator[Document]:
        """Documents of the sources `among` to look at; none `without`, and if there are such all far from them."""
        for away in range(TRIES):
            document = self._pick(number, i, among, random, away * 7919, bool(without))
            if document.id not in without:
                yield document

    def _pieces(
        self, number: int, i: int, n: int, random: np.random.Generator, without: Sequence[str] = ()
    ) -> tuple[Document, list[str]]:
        """n pieces of one text, each following the one before.

        Args:
            without: names of documents; the text is far from them in the order, and none of them.
        """
        t = self.config.texts
        for document in self._candidates(number, i, self._prose, random, without):
            some = sentences(document.text)
            start = int(random.integers(len(some)))
            pieces: list[str] = []
            for _ in range(n):
                most = int(random.integers(t.shortest, t.longest + 1)) - self._around
                piece, start = self._run(some, start, max(1, most))
                pieces.append(piece)
            if self._apart.clashes(" ".join(pieces)):
                continue
            if all(pieces) and self._count(pieces[-1]) > 1:
                return document, pieces
        raise ValueError(
            f"{self.sources[self._prose[0]].source.path}: {TRIES} documents were looked at, and none has {n} pieces of "
            f"{t.shortest} to {t.longest} tokens. Make texts.longest smaller, or give longer documents."
        )

    def _run(self, some: Sequence[str], start: int, most: int) -> tuple[str, int]:
        """Sentences from `start` on with at most so many tokens, as one text, and where they end."""
        taken: list[str] = []
        while start < len(some) and self._count(" ".join([*taken, some[start]])) <= most:
            taken.append(some[start])
            start += 1
        return " ".join(taken), start

    def _with_questions(
        self,
        number: int,
        i: int,
        random: np.random.Generator,
        without: Sequence[str] = (),
        tokens: tuple[int, int] | None = None,
    ) -> tuple[Document, str, list[tuple[str, str]]]:
        """A text of any source that answers at least one question, and these questions in a drawn order.

        Args:
            without: names of documents; the text is far from them in the order, and none of them.
            tokens: the shortest and the longest; None: as the config says.
        """
        shortest, longest = tokens or (self.config.texts.shortest, self.config.texts.longest)
        for document in self._candidates(number, i, range(len(self.sources)), random, without):
            text, questions = document.text, list(document.questions)
            if self._count(text) + self._around > longest:
                some = sentences(text)
                start = 0 if questions else int(random.integers(len(some)))
                text, _ = self._run(some, start, int(random.integers(shortest, longest + 1)) - self._around)
                questions = [(question, answer) for question, answer in questions if answer in text]
            if self._apart.clashes(text):
                continue
            questions = questions or (cloze(text) if not document.questions else [])
            if questions and self._count(text) + self._around >= shortest:
                return document, text, [questions[j] for j in random.permutation(len(questions))]
        change = "take out objectives.chat" if tokens else "change texts.shortest and texts.longest"
        raise ValueError(
            f"{TRIES} documents were looked at, and none of {shortest} to {longest} tokens answers a question. "
            f"Give other data, or {change}."
        )
