"""Long conversations of two people, written turn by turn and asked about at their end: LoCoMo.

The turns of a session are written in order, as many at once as one update reads, each piece under the date of the
session. When all sessions are written, the questions are asked. The rows, all with the same questions:

    floor       closed book: no memory, no text
    window      the last N tokens of all that was written, in the context of the plain model; fewer if it has no room
    bm25        the turns that BM25 ranks first, in the order of the conversation, in the context of the plain model
    memory      a memory of N slots that begins empty
    longterm    a memory of N - R slots that begins empty, and R long-term ones for each question

Answers are scored by words, without a judge: F1 and exact match with SQuAD's normalisation. Questions that the
conversation does not answer ("adversarial") count apart: what is right there is to say so.

The conversations are for evaluation only (CC BY-NC 4.0); no record holds a word of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from latentmem import data
from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings
from latentmem.evaluate import protocol, scoring
from latentmem.evaluate.asking import in_context, named, room, say, written
from latentmem.evaluate.baselines.passages import ranked
from latentmem.evaluate.protocol import Line, Numbers, Record, RunOptions, Unit, Worker, as_lines
from latentmem.evaluate.settings import Conversations as Settings
from latentmem.evaluate.stats import difference, mean_of
from latentmem.model.model import MemoryModel

FILE = "conversations/locomo8.jsonl.gz"
ROWS = Settings.ROWS
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
OPEN_DOMAIN, ADVERSARIAL = 3, 5
NOT_ANSWERED = "not mentioned"  # stands where a question has no right answer


@dataclass(frozen=True)
class Asked:
    """A question about a conversation, its right answer and its category; "" where it has none."""

    id: str
    question: str
    answer: str
    category: int


@dataclass(frozen=True)
class Session:
    """Turns of one date, each "Speaker: text"."""

    date: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Dialogue:
    """Sessions in order, and questions about them."""

    id: str
    sessions: tuple[Session, ...]
    questions: tuple[Asked, ...]


def load(count: int, seed: int, file: Path | None = None) -> list[Dialogue]:
    """LoCoMo's dialogues, with at most so many questions each, drawn by seed: of every category its share.

    Args:
        file: LoCoMo's own locomo10.json, or one dialogue a line, gzipped or not; by default that of `$LATENTMEM_DATA`.

    Raises:
        ValueError: data that can not be found or read.
    """
    if file is None:
        local = data.local_rows(FILE)
        if local is None:
            raise ValueError(
                "LoCoMo is not on the hub: get locomo10.json from github.com/snap-research/locomo and give it with "
                "--file, or set LATENTMEM_DATA to a folder that holds it."
            )
        rows = local[0]
    else:
        rows = data.rows_of_file(file, "LoCoMo dialogues", {"qa": list, "conversation": dict})
    return [_some(dialogue(row), count, seed) for row in rows]


def dialogue(row: Record) -> Dialogue:
    """A dialogue of LoCoMo's schema; a photo stands as what its caption says.

    Args:
        row: {sample_id, conversation: {session_1_date_time, session_1: [{speaker, text, blip_caption}], ...}, qa:
            [{question, answer, category}]}.
    """
    talk, sessions = row["conversation"], []
    for name in sorted((k for k in talk if re.fullmatch(r"session_\d+", k)), key=lambda k: int(k[8:])):
        turns = []
        for turn in talk[name]:
            photo = f" (shares a photo: {turn['blip_caption']})" if turn.get("blip_caption") else ""
            turns.append(f"{turn['speaker']}: {turn.get('text', '')}{photo}")
        if turns:
            sessions.append(Session(talk[f"{name}_date_time"], tuple(turns)))
    name = str(row.get("sample_id", named(repr(sessions))))
    asked = []
    for i, qa in enumerate(row["qa"]):
        category = int(qa["category"])
        if category not in CATEGORIES:
            raise ValueError(
                f"question {i} of {name} has the category {category}, and LoCoMo knows 1 to 5: take it out."
            )
        answer = "" if category == ADVERSARIAL else str(qa["answer"])
        if category == OPEN_DOMAIN:
            answer = answer.split(";")[0].strip()  # the rest is an explanation, as in LoCoMo's own script
        asked.append(Asked(f"{name}-{i}", qa["question"], answer, category))
    return Dialogue(name, tuple(sessions), tuple(asked))


def _some(one: Dialogue, count: int, seed: int) -> Dialogue:
    """At most `count` questions drawn by seed, of every category its share."""
    places = np.random.default_rng(seed).permutation(len(one.questions)).tolist()
    sizes = {c: sum(q.category == c for q in one.questions) for c in CATEGORIES}
    rank: dict[int, float] = {}
    seen = dict.fromkeys(CATEGORIES, 0)
    for place in places:
        category = one.questions[place].category
        rank[place] = (seen[category] + 0.5) / sizes[category]
        seen[category] += 1
    chosen = sorted(sorted(places, key=lambda place: rank[place])[:count])
    return Dialogue(one.id, one.sessions, tuple(one.questions[place] for place in chosen))


def identity(data: Sequence[Dialogue]) -> str:
    """Hash of everything in the dialogues."""
    return hashlib.sha256(repr(list(data)).encode()).hexdigest()


def pieces(session: Session, length: Callable[[str], int], most: int) -> list[str]:
    """The turns of a session as texts to be written: its date, and as many turns as fit.

    Args:
        length: tokens of a text as it is written.
        most: of a piece; a single turn that is longer stands alone.
    """
    texts: list[str] = []
    turns: list[str] = []
    for turn in session.turns:
        if turns and length(_piece(session, [*turns, turn])) > most:
            texts.append(_piece(session, turns))
            turns = []
        turns.append(turn)
    return [*texts, _piece(session, turns)]


def _piece(session: Session, turns: Iterable[str]) -> str:
    return f"Conversation at {session.date}\n" + "\n".join(turns)


class Conversations(Worker):
    """A model and the dialogues; a unit is (row, index of the dialogue)."""

    PROTOCOL, TITLE, CHOSEN = "conversations/2", "Long conversations", ("rows",)
    settings: Settings

    def __init__(self, llm: MemoryModel, data: Sequence[Dialogue], settings: Settings) -> None:
        self.llm, self.data, self.settings = llm, data, settings
        if "bm25" in settings.rows:
            ranked(["a passage"], ["a question"], 1)  # an error now, if it is not installed, and not after hours
        for row in ("memory", "longterm"):
            if row in settings.rows:
                self._empty(row)  # a size that does not fit the model is an error now

    def units(self) -> list[Unit]:
        return [(row, i) for i in range(len(self.data)) for row in ROWS if row in self.settings.rows]

    def records(self, row: str, i: int) -> Iterator[Record]:
        one = self.data[i]
        said = self._bm25(one) if row == "bm25" else self._behind(row, one)
        for asked, words in zip(one.questions, said, strict=True):
            gold = [asked.answer or NOT_ANSWERED]
            facts = {"row": row, "text": one.id, "question": asked.id, "category": asked.category}
            numbers = {"f1": round(scoring.f1(words, gold), 6), "em": scoring.exact(words, gold)}
            yield {**facts, "abstains": scoring.abstains(words), **numbers}

    def _behind(self, row: str, one: Dialogue) -> list[str]:
        """What is said behind one context for all questions."""
        if row == "floor":
            context = in_context(self.llm, ())
        elif row == "window":
            longest = max(len(self._question(asked, bare=True)) for asked in one.questions)
            most = room(self.llm, longest, self.settings.new_tokens)
            ids = [i for _, text in self._texts(one) for i in written(self.llm, text)]
            context = in_context(self.llm, ids[-min(most, self.settings.memory.N or self._empty("memory").N) :])
        else:
            context = self.llm.context(self._written(row, one))
        prompts = [self._question(asked, bare=context.length > 0) for asked in one.questions]
        return say(self.llm, context, prompts, self.settings.new_tokens)

    def _bm25(self, one: Dialogue) -> list[str]:
        """What is said when the turns that were found stand before each question."""
        library = [(session, turn) for session in one.sessions for turn in session.turns]
        ranking = ranked([turn for _, turn in library], [a.question for a in one.questions], self.settings.passages)
        prompts = []
        for asked, places in zip(one.questions, ranking, strict=True):
            text = "\n".join(_piece(library[i][0], [library[i][1]]) for i in sorted(places))
            ids = [*self.llm.prompts_or_raise().opening, *written(self.llm, text)] if text else []
            prompts.append([*ids, *self._question(asked, bare=bool(ids))])
        return say(self.llm, self.llm.text_context([]), prompts, self.settings.new_tokens)

    def _written(self, row: str, one: Dialogue) -> Memory:
        """The memory of a whole dialogue."""
        memory = self._empty(row)
        for source, text in self._texts(one):
            memory = self.llm.write_ids(memory, written(self.llm, text), source)
        return memory

    def _texts(self, one: Dialogue) -> Iterator[tuple[str, str]]:
        """All that is written of a dialogue: (source, text)."""
        most = self._empty("memory").piece
        for number, session in enumerate(one.sessions, 1):
            for text in pieces(session, lambda text: len(written(self.llm, text)), most):
                yield f"session {number}", text

    def _empty(self, row: str) -> Memory:
        memory, R = self.settings.memory, self.settings.longterm
        if row == "longterm":
            memory = protocol.shared(self.llm, memory, LongTermSettings(R))
        return protocol.empty(self.llm, memory)

    def _question(self, asked: Asked, *, bare: bool) -> list[int]:
        return self.llm.prompts_or_raise().question(asked.question, bare=bare)


@as_lines
def lines(records: Sequence[Record]) -> Numbers:
    """F1 and exact match of each row by category, abstaining, and paired differences to the memory's row."""
    rows = [row for row in ROWS if any(r["row"] == row for r in records)]
    answered = [c for c in CATEGORIES if c != ADVERSARIAL]
    for metric, title in (("f1", "F1"), ("em", "exact match")):
        for row in rows:
            for name, categories in [("all but adversarial", answered), *((CATEGORIES[c], [c]) for c in answered)]:
                yield f"{title}, {name}, {row}", mean_of(_of(records, row, categories).values(), metric)
    for name, categories in (("adversarial (right)", [ADVERSARIAL]), ("all others (wrong)", answered)):
        for row in rows:
            yield f"abstains, {name}, {row}", mean_of(_of(records, row, categories).values(), "abstains")
    for row in ("memory", "longterm"):
        for other in rows[: rows.index(row)] if row in rows else ():
            ours, theirs = _of(records, row, answered), _of(records, other, answered)
            yield f"F1, {row} - {other}", difference(ours, theirs, "f1")


def _of(records: Sequence[Record], row: str, categories: Sequence[int]) -> dict[str, Record]:
    return {r["question"]: r for r in records if r["row"] == row and r["category"] in categories}


def measure(
    llm: MemoryModel, data: Sequence[Dialogue], settings: Settings, out: Path, **how: Unpack[RunOptions]
) -> list[Line]:
    """Run the protocol, or go on with it; further arguments as in `protocol.measure`.

    A later run may add rows in the same folder.
    """
    about = {"source": "LoCoMo", "sha256": identity(data), "dialogues": [one.id for one in data]}
    return protocol.measure(Conversations(llm, data, settings), lines, out, data=about, args=(data, settings), **how)
