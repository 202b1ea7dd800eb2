"""Scenes of facts -> what an episode writes and asks: in tiny and in full memories, as notes, lists and conversations.

    facts      notes of a scene are written, questions about them are asked, every third as a turn of a conversation
    talk       the newest notes of a scene are turns of a conversation, the others are written; both are asked about
    everyday   notes of a scene are written; what has nothing to do with them is answered as by the plain model

What is written never goes to the pool of the run: other texts stand in front of it, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from latentmem.model.prompts import Message, Prompts
from latentmem.train import facts
from latentmem.train.episode import Ids, Row, answer_ids, conversation, message, question_row
from latentmem.train.facts import UNKNOWN, Ask, Scene
from latentmem.train.words import grammar

SCENES = ("facts", "talk", "everyday")
FULL = 0.999  # of the pool stands in front, as much as leaves room for the notes
REPLY = 16  # tokens of a reply in "everyday" at most


@dataclass(frozen=True)
class Lesson:
    """What an episode about a scene writes and asks.

    Args:
        texts: ids of each text, oldest first.
        rows: questions about them, or what has nothing to do with them.
        fill: share of the pool that stands in front of the texts.
        last: number of the text that is read last, nearest to the rows, as a search would put it; None: the newest.
        replies: the plain model's own replies are the answers, with so many tokens at most.
    """

    texts: tuple[Ids, ...]
    rows: tuple[Row, ...]
    fill: float
    last: int | None = None
    replies: int = 0


class Scenes:
    """Lessons by objective and number; each is a function of them and of the seed.

    Args:
        prompts: how texts and questions are put to the model.
        seed: of the run.
        rows: questions of a lesson at most.
        longest: tokens of a text at most.
    """

    def __init__(self, prompts: Prompts, seed: int, rows: int, longest: int) -> None:
        self.prompts, self.seed, self.rows, self.longest = prompts, seed, rows, longest

    def __call__(self, objective: str, number: int) -> Lesson:
        """The lesson of an episode."""
        make = {"facts": self._facts, "talk": self._talk, "everyday": self._everyday}
        return make[objective](number, Random(f"{objective} {self.seed} {number}"))

    # --- lessons ------------------------------------------------------------------------------------------------------

    def _facts(self, number: int, random: Random) -> Lesson:
        fill = random.choice([0.0, 0.0, 0.0, 0.0, random.uniform(0, 0.3), random.uniform(0, 0.3), FULL])
        scene = facts.scene(self.seed, number, notes=random.choice([1, 2, 2]) if fill == FULL else 0)
        if random.random() < 0.04:  # nothing was told
            talk = facts.small_talk(self.seed, number)
            nothing = [ask._replace(answer=UNKNOWN, kind="near", about=0) for ask in scene.asks]
            return Lesson(self._texts(talk, random)[0], self._rows(nothing[: max(1, self.rows // 3)], [0]), fill)
        texts, places = self._texts(scene.notes, random)
        last = None
        if len(texts) > 1 and random.random() < 0.5:
            last = random.choice([ask.about for ask in scene.asks if ask.kind != "near"])
        return Lesson(texts, self._rows(_chosen(scene, self.rows, last), places), fill, last)

    def _talk(self, number: int, random: Random) -> Lesson:
        scene = facts.scene(self.seed, number, notes=random.choice([2, 3, 4]))
        count = min(len(scene.notes), random.choice([1, 1, 2, 3]))  # of the notes that are said in the conversation
        notes, spoken = scene.notes[:-count], scene.notes[-count:]
        texts, places = self._texts(notes or facts.small_talk(self.seed, number), random)
        turns = [turn for note in spoken for turn in self._said(note, random)]
        asks = _chosen(scene, self.rows // 2 + 1)
        if random.random() < 0.5 and len(asks) > 1:  # an answer that was given before is not to be said again
            before, *asks = asks
            turns += [message("user", before.question), message("assistant", before.answer)]
        about = [*places, *[None] * count] if notes else [None] * len(scene.notes)
        rows = []
        for ask in asks:
            prompt = conversation(self.prompts, *turns, message("user", ask.question))
            rows.append(Row(prompt, answer_ids(self.prompts, ask.question, ask.answer), about[ask.about]))
        return Lesson(texts, tuple(rows), random.choice([0.0, 0.0, random.uniform(0, 0.5)]))

    def _everyday(self, number: int, random: Random) -> Lesson:
        scene = facts.scene(self.seed, number, notes=random.choice([1, 2, 2, 3]))
        texts, _ = self._texts(scene.notes, random)
        rows: list[Ids] = []
        for i in range(-(-self.rows // 3)):
            question, _ = facts.everyday(self.seed, number * self.rows + i)
            turns = [message("user", question)]
            if i == 0 and random.random() < 0.5:  # a remark asks for nothing
                turns = [message("user", " ".join(facts.small_talk(self.seed, number)))]
            elif random.random() < 0.3:
                turns = [*self._said(scene.notes[-1], random), *turns]
            asked = len(turns) == 1 and i > 0 and random.random() < 0.6
            rows.append(
                tuple(self.prompts.question(question, bare=True)) if asked else conversation(self.prompts, *turns)
            )
        fill = random.choice([0.0, 0.0, random.uniform(0, 0.5)])
        return Lesson(texts, tuple(Row(row, (), None) for row in rows), fill, replies=REPLY)

    # --- parts --------------------------------------------------------------------------------------------------------

    def _texts(self, notes: Sequence[str], random: Random) -> tuple[tuple[Ids, ...], list[int | None]]:
        """Notes as they are written, and where each of them stands: each alone, or all as one text or conversation."""
        form, written = random.random(), self.prompts.written
        if form < 0.4:
            whole = tuple(written(("\n" if random.random() < 0.5 else " ").join(notes)))
            if len(whole) <= self.longest:
                return (whole,), [0] * len(notes)
        if form > 0.85 and self.prompts.chats:  # as turns that left the context of a conversation
            turns = [[i for turn in self._said(note, random) for i in self.prompts.turn(turn)] for note in notes]
            return tuple(map(tuple, turns)), list(range(len(notes)))
        return tuple(tuple(written(note)) for note in notes), list(range(len(notes)))

    def _rows(self, asks: Sequence[Ask], places: Sequence[int | None]) -> tuple[Row, ...]:
        about = [None if ask.kind == "near" else places[ask.about] for ask in asks]
        each = zip(asks, about, strict=True)
        return tuple(question_row(self.prompts, ask.question, ask.answer, text, chats=True) for ask, text in each)

    def _said(self, note: str, random: Random) -> list[Message]:
        nods: list[str] = grammar()["nods"]
        return [message("user", note), message("assistant", random.choice(nods))]


def _chosen(scene: Scene, most: int, last: int | None = None) -> list[Ask]:
    """Questions of a scene, of which at most two in seven are near misses; with `last`, only of this note."""
    answered = [ask for ask in scene.asks if ask.kind != "near" and last in (None, ask.about)]
    answered = answered[: most - round(most * 2 / 7)]
    near = [ask for ask in scene.asks if ask.kind == "near"][: round(len(answered) * facts.NEAR)]
    return [ask for ask in scene.asks if ask in answered or ask in near]
