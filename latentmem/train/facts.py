"""Invented facts of a person: notes to write into a memory, questions about them, and what each answer is.

    scene    := 1 to 8 notes about "I", relatives and people, and questions about them
    note     := clause | clause "and" clause | a list of clauses, alone, behind a lead or in the midst of small talk
    clause   := relation(who, word, value), or a change of it: in one note, or the newest of two or three notes
    question := wording(relation, who, word) -> the newest value | the value before it | "I don't know."

A question that is answered with "I don't know." is a near miss: a fact that is told, with another person, word or
relation. It is put in the same wordings as all others. Words and wordings are in `facts.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from latentmem.train.words import TRAIN, Draw, Split, article, capital, is_held, relations

UNKNOWN = "I don't know."
ME = ("I",)
COMMON = ("name", "kin", "pet", "lives", "job", "age", "birthday")  # what people say first: drawn twice as often
NEAR = 0.4  # near misses for each question with an answer: 29% of all


class Ask(NamedTuple):
    """A question.

    Args:
        kind: "plain", "exact", "now" (the newest of several), "before", or "near" (a near miss).
        about: number of the note that answers it, or that it nearly asks about.
        first: it is about the user.
        older: values that the answer has replaced.
    """

    question: str
    answer: str
    kind: str
    about: int
    first: bool
    older: tuple[str, ...] = ()


class Scene(NamedTuple):
    """Notes, oldest first, and questions about them in a drawn order."""

    notes: list[str]
    asks: list[Ask]


class Key(NamedTuple):
    """What a fact is about: a person by all of their names, a relation, and the word that owns the value, or ""."""

    who: tuple[str, ...]
    relation: str
    word: str


class Clause(NamedTuple):
    """A fact as it is told: as a clause, as an entry of a list (or ""), with the values that it makes known in turn."""

    key: Key
    text: str
    entry: str
    values: tuple[str, ...]


def fill(template: str, key: Key, who: str, **values: str) -> str:
    """A template about a person, who is called by one of their names; an article suits what follows."""
    first = key.who == ME
    text = re.sub(r"\[([^|\]]*)\|([^\]]*)\]", lambda match: match[1 if first else 2], template)
    known = {"w": key.word, **values}
    text = re.sub(r"\ba (?=\{([avw])\})", lambda match: article(known[match[1]]), text)
    owner = "my" if first else f"{who}'s"
    return text.format(S=who, O="me" if first else who, P=owner, **known)


class _Teller(Draw):
    """What is told in one scene, and what is asked about it."""

    def begin(self, notes: int, only: Sequence[str], statements: int = 0) -> None:
        """Choose people and relations.

        Args:
            notes: how many notes there will be, at least.
            only: relations to choose from; empty: all of the split.
            statements: what changes is said in so many notes; 0: in one to three.
        """
        self.statements = statements
        names = list(only or relations(self.split.relations))
        twice = [name for name in names if name in COMMON or self.grammar["relations"][name].get("exact")]
        self.pool = names + twice
        self.people: list[tuple[str, ...]] = [ME]
        self.relatives: set[str] = set()
        for _ in range(1 + notes // 2):
            self.people.append(self._person())
        self.values: dict[Key, list[tuple[str, int]]] = {}  # values of a fact in turn, each with the number of its note

    def _person(self) -> tuple[str, ...]:
        relative = self.word("relative")
        if self.chance(0.5) and relative not in self.relatives:
            self.relatives.add(relative)
            first = self.name(0)
            mine = f"my {relative}"
            return (f"{mine} {first}", mine, first) if self.chance(0.25) else (mine,)
        return (self.name(),)

    # --- what is told -------------------------------------------------------------------------------------------------

    def fact(self, taken: Sequence[Key]) -> Key | None:
        """Something that may be told; None where the draw would contradict what is."""
        who, name = ME if self.chance(0.45) else self.random.choice(self.people), self.random.choice(self.pool)
        relation = self.grammar["relations"][name]
        if relation.get("me"):
            who = ME
        key = Key(who, name, self.word(relation["of"]) if "of" in relation else "")
        clashes = key in taken or (name == "kin" and key.word in self.relatives)
        return None if clashes else key

    def clauses(self, key: Key, changes: float) -> list[Clause]:
        """A fact as one clause, or as it changes in one clause, or in two or three that follow one another."""
        relation = self.grammar["relations"][key.relation]
        values: list[str] = []
        n = self.random.choice([2, 2, 3]) if "changes" in relation and self.chance(changes) else 1
        n = self.statements if n > 1 and self.statements else n
        while len(values) < n:
            value = self.value(relation["value"])
            if value not in values:
                values.append(value)
        if n == 2 and not self.statements and self.chance(0.6):
            return [self._changed(key, values[0], values[1])]
        return [self._said(key, value) for value in values]

    def _said(self, key: Key, value: str) -> Clause:
        relation = self.grammar["relations"][key.relation]
        who, noun, is_ = key.who[0], self._noun(relation, key), relation.get("is", "is")
        plain = is_ == "is"
        general = noun and self.chance(0.35)
        ways = [way for way in self.grammar["says"] if plain or "not" not in way] if general else relation["says"]
        other = self._other(relation["value"], value)
        text = fill(self.wording(ways).replace("{is}", is_), key, who, v=value, a=other, n=noun)
        entry = fill("{P} {n}: {v}", key, who, v=value, n=noun) if noun else ""
        return Clause(key, text, entry, (value,))

    def _changed(self, key: Key, old: str, new: str) -> Clause:
        relation = self.grammar["relations"][key.relation]
        noun = self._noun(relation, key) if relation.get("is", "is") == "is" else ""
        general = noun and (not relation["changes"] or self.chance(0.5))
        way = self.wording(self.grammar["changes"] if general else relation["changes"])
        return Clause(key, fill(way.replace("{is}", "is"), key, key.who[0], v=new, a=old, n=noun), "", (old, new))

    def _other(self, kind: str, value: str) -> str:
        return next(other for other in iter(lambda: self.value(kind), None) if other != value)

    def _noun(self, relation: dict[str, Any], key: Key) -> str:
        nouns = relation.get("nouns")
        return self.random.choice(nouns[: max(1, len(nouns) - 1)]).format(w=key.word) if nouns else ""

    def tell(self, notes: int, changes: float) -> list[str]:
        """Texts of the notes, oldest first; what they make known goes to `told`."""
        drafts: list[list[Clause]] = []
        later: list[tuple[int, Clause]] = []
        taken: list[Key] = []
        while len(drafts) < notes:
            draft: list[Clause] = []
            for _ in range(self.random.choice([1, 1, 1, 1, 2, 2, 3])):
                key = self.fact(taken)
                if key is not None:
                    taken.append(key)
                    first, *more = self.clauses(key, changes)
                    draft.append(first)
                    later += [(len(drafts), clause) for clause in more]
            if draft:
                drafts.append(draft)
        texts = [self._note(draft) for draft in drafts]
        for after, clause in later:  # anywhere behind the first one, and behind the one before
            known = [i for i, draft in enumerate(drafts) if any(c.key == clause.key for c in draft)]
            at = self.random.randint(max([after, *known]) + 1, len(drafts))
            drafts.insert(at, [clause])
            texts.insert(at, self._note([clause], self.wording(self.grammar["updates"])))
        for i, draft in enumerate(drafts):
            for clause in draft:
                self.values.setdefault(clause.key, []).extend((value, i) for value in clause.values)
        return texts

    def _note(self, clauses: Sequence[Clause], lead: str = "") -> str:
        """Clauses as a note: a list, or one sentence, which may stand in the midst of small talk."""
        r = self.random
        if len(clauses) > 1 and not lead and all(clause.entry for clause in clauses) and self.chance(0.5):
            head = self.wording(self.grammar["heads"])
            return "\n".join([head, *(f"- {capital(clause.entry)}" for clause in clauses)])
        text = clauses[0].text
        for clause in clauses[1:]:
            text += self.wording(self.grammar["joins"]) + clause.text
        if not lead and self.chance(0.3):
            lead = self.wording(self.grammar["leads"])
        exact = any(self.grammar["relations"][clause.key.relation].get("exact") for clause in clauses)
        end = r.choice([".", ".", ".", "", "." if exact else "!"])  # a password may hold a "!" of its own
        text = capital(lead.format(text) if lead else text) + end
        if self.chance(0.25):
            talk = [self.wording(self.grammar["chatter"], 6) for _ in range(2)]
            text = text if text[-1] in ".!" else f"{text}."
            text = r.choice([f"{talk[0]} {text}", f"{text} {talk[0]}", f"{talk[0]} {text} {talk[1]}"])
        return text

    # --- what is asked ------------------------------------------------------------------------------------------------

    def asks(self, key: Key, wordings: int) -> list[Ask]:
        """Questions about a fact that is told, in so many wordings at most."""
        values = self.values[key]
        exact = self.grammar["relations"][key.relation].get("exact")
        kind = "now" if len(values) > 1 else "exact" if exact else "plain"
        (value, about), first = values[-1], key.who == ME
        older = tuple(old for old, _ in values[:-1])
        asks = [Ask(self.question(key, len(values) > 1), value, kind, about, first, older) for _ in range(wordings)]
        if len(values) == 2:
            old, about = values[0]
            asks += [Ask(self.question(key, past=True), old, "before", about, first) for _ in range(wordings // 2)]
        return asks

    def question(self, key: Key, changed: bool = False, past: bool = False) -> str:
        """A question about a fact: by a noun, or in the relation's own words.

        Args:
            changed: it was told more than once.
            past: ask for the value before the newest.
        """
        relation, r = self.grammar["relations"][key.relation], self.random
        nouns, who = relation.get("nouns", []), r.choice(key.who)
        own = relation.get("past", []) if past else relation["asks"]
        if nouns and (not own or self.chance(0.5)):
            frames, held = (self.grammar["past"], 1) if past else (self.grammar["frames"], 3)
            noun = self.wording(nouns)  # where the noun is held out, any frame will do
            way = r.choice(frames) if self.split.wordings and len(nouns) > 1 else self.wording(frames, held)
            if changed and self.chance(0.4):
                way = self.wording(self.grammar["now"])
            question = fill(way, key, who, n=noun.format(w=key.word), q=relation.get("q", "What"))
            return capital(question)
        question = fill(self.wording(own, 1 if past else 2), key, who)
        openers = self.grammar["openers"]
        opener = r.choice(openers if self.split.wordings else openers[:-1])
        return opener + (question[0].lower() + question[1:] if opener else capital(question))

    def near(self) -> Ask | None:
        """A question that no note answers, one step beside a fact; None where the draw is answered."""
        r, key = self.random, self.random.choice(list(self.values))
        about, step = self.values[key][-1][1], self.random.random()
        relation = self.grammar["relations"][key.relation]
        if step < 0.35 and not relation.get("me"):
            key = key._replace(who=r.choice([*self.people, self._person()]))
        elif step < 0.6 and "of" in relation:
            key = key._replace(word=self.word(relation["of"]))
        else:
            name = r.choice(self.pool)
            other = self.grammar["relations"][name]
            key = Key(key.who, name, self.word(other["of"]) if "of" in other else "")
        known = {(who, k.relation, k.word) for k in self.values for who in k.who}
        if any((who, key.relation, key.word) in known for who in key.who) or (key.relation == "name" and key.who != ME):
            return None
        if key.relation == "kin" and key.word in self.relatives:
            return None
        return Ask(self.question(key), UNKNOWN, "near", about, key.who == ME)


def scene(
    seed: int,
    number: int,
    split: Split = TRAIN,
    *,
    notes: int = 0,
    only: Sequence[str] = (),
    changes: float = 0.35,
    statements: int = 0,
) -> Scene:
    """The scene of this number.

    Args:
        notes: at least so many notes; 0: a drawn number, up to 8.
        only: relations that it is about; empty: all of the split.
        changes: share of the facts that change, where they can.
        statements: what changes is said in so many notes; 0: in one to three.
    """
    teller = _Teller(seed, number, split)
    count = notes or teller.random.choice([1, 1, 2, 2, 3, 4, 5, 6, 8])
    teller.begin(count, only, statements)
    texts = teller.tell(count, changes)
    asks = [ask for key in teller.values for ask in teller.asks(key, 4)]
    asks = list({ask.question: ask for ask in asks}.values())
    near: dict[str, Ask] = {}
    answered, wanted = {ask.question for ask in asks}, round(NEAR * len(asks))
    for _ in range(4 * wanted):
        ask = teller.near()
        if ask is not None and ask.question not in answered and len(near) < wanted:
            near[ask.question] = ask
    asks += near.values()
    teller.random.shuffle(asks)
    return Scene(texts, asks)


def small_talk(seed: int, number: int, split: Split = TRAIN) -> list[str]:
    """One to three notes that hold no fact."""
    draw = Draw(seed, number, split)
    ways, count = draw.grammar["chatter"], draw.random.randint(1, 3)
    return list(dict.fromkeys(draw.wording(ways, 6) for _ in range(count)))


def everyday(seed: int, number: int, split: Split = TRAIN) -> tuple[str, str]:
    """A question that no memory is needed for, and what its reply should hold, or ""."""
    draw = Draw(seed, number, split)
    groups = [
        (group, [word for word in group["of"] if is_held(word) == split.words]) for group in draw.grammar["everyday"]
    ]
    group, subjects = draw.random.choice([(group, subjects) for group, subjects in groups if subjects])
    subject = draw.random.choice(subjects)
    return draw.wording(group["asks"]).format(subject), group["of"][subject]
