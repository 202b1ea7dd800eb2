"""Words and made-up values of personal facts, each of them drawn from one of two halves: for training, or held out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from zlib import crc32

DIGITS, LETTERS = "0123456789", "ABCDEFGHJKLMNPRSTUVWXYZ"
FORMS = {  # of exact strings: # is a digit, % a letter, w and W a word
    "password": ["w-w-##", "w-w-#", "W##", "W####", "wW!#", "wW!###", "%%##ww", "w_###", "w.w#", "WwW#", "w-##-%%"],
    "code": ["####", "####", "#####", "######"],
    "plate": ["%%## %%%", "%-%% ###", "%-%% ####"],
    "phone": ["0### ######", "555-####", "+## ### ####"],
    "serial": ["%%-###", "%%-####", "%###%", "%####%", "#######"],
    "flight": ["%%###", "%%####"],
}
SALT = 13  # of the hash that splits the words: of each list a tenth to a third is held out


class Split(NamedTuple):
    """Which half of the grammar a scene is made of; evaluation takes what training never sees.

    Args:
        words: the held-out names, words and made-up values, else the others.
        wordings: the held-out ways to say and to ask, else the others.
        relations: the held-out relations alone, else the others.
    """

    words: bool = False
    wordings: bool = False
    relations: bool = False


TRAIN, HELD = Split(), Split(words=True, wordings=True)


@cache
def grammar() -> dict[str, Any]:
    """Words and wordings of `facts.yaml`; words as lists."""
    import yaml

    parsed = yaml.safe_load((Path(__file__).parent / "facts.yaml").read_text(encoding="utf-8"))
    parsed["words"] = {
        kind: [word.replace("_", " ") for word in words.split()] for kind, words in parsed["words"].items()
    }
    return parsed


@cache
def relations(held: bool = False) -> tuple[str, ...]:
    """Names of the relations that are held out, or of all others."""
    return tuple(name for name, relation in grammar()["relations"].items() if relation.get("held", False) == held)


def is_held(word: str) -> bool:
    """Whether a word is held out of training."""
    return crc32(f"{SALT} {word.lower()}".encode()) % 5 == 0


def article(word: str) -> str:
    """The indefinite article in front of a word, with a space."""
    return "an " if word[:1].lower() in "aeio" or word.startswith(("umb", "ump", "uph")) else "a "


def capital(text: str) -> str:
    """A text as it begins a sentence."""
    return text[:1].upper() + text[1:]


class Draw:
    """Words, values and wordings of one split.

    Args:
        seed, number: all that is drawn is a function of them, and of the split.
    """

    def __init__(self, seed: int, number: int, split: Split) -> None:
        self.random = Random(f"facts {seed} {number} {tuple(split)}")
        self.split, self.grammar = split, grammar()

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def word(self, kind: str) -> str:
        return self.random.choice([w for w in self.grammar["words"][kind] if is_held(w) == self.split.words])

    def string(self, letters: str, n: int) -> str:
        return "".join(self.random.choice(letters) for _ in range(n))

    def invented(self, kind: str) -> str:
        """A word of one or two syllables and an ending that no list holds."""
        syllables, endings = self.grammar["syllables"].split(), self.grammar["endings"][kind].split()
        while True:
            n = self.random.choice([1, 2]) if kind != "first" else self.random.choice([1, 1, 2])
            word = "".join(self.random.choice(syllables) for _ in range(n)) + self.random.choice(endings)
            if is_held(word) == self.split.words:
                return word.capitalize()

    def wording(self, ways: Sequence[str], held: int = 1) -> str:
        """One of the ways; the last `held` of several are held out."""
        held = min(held, len(ways) - 1)
        cut = len(ways) - held
        return self.random.choice(ways[cut:] if self.split.wordings and held else ways[:cut])

    def name(self, full: float = 0.3) -> str:
        first = self.word("first") if self.chance(0.6) else self.invented("first")
        return f"{first} {self.invented('last')}" if self.chance(full) else first

    def value(self, kind: str) -> str:
        """A value of a relation."""
        r, word = self.random, self.word
        make: dict[str, Callable[[], str]] = {
            "name": self.name,
            "town": lambda: word("town") if self.chance(0.5) else self.invented("town"),
            "firm": lambda: f"{self.invented('last')} {word('firm')}",
            "pet": lambda: self.name(0) if self.chance(0.6) else word("word").capitalize(),
            "doctor": lambda: f"Dr. {self.invented('last')}",
            "date": lambda: f"{r.choice(self.grammar['months'].split())} {r.randint(1, 28)}",
            "age": lambda: str(r.randint(18, 95)),
            "height": lambda: f"{r.randint(148, 205)} cm",
            "car": lambda: f"{word('colour')} {word('make')}",
            "gift": lambda: f"{word('colour')} {word('thing')}",
            "spot": lambda: f"{word('colour')} {word('spot')}" if self.chance(0.4) else word("spot"),
            "items": lambda: ", ".join(self.distinct("item", r.choice([1, 1, 2]))) + f" and {word('item')}",
            "when": lambda: (
                f"{r.choice(self.grammar['days'].split())} at {r.randint(7, 19)}:{r.choice(['00', '15', '30', '45'])}"
            ),
            "price": lambda: r.choice(["${}", "{} euros", "£{}", "{} dollars"]).format(r.randint(12, 2990)),
            "shoe": lambda: str(r.randint(34, 48)),
        }
        exact = {*FORMS, "mail"}
        return self.exact(kind) if kind in exact else make[kind]() if kind in make else word(kind)

    def exact(self, kind: str) -> str:
        """A value that has to be said letter by letter."""
        if kind == "mail":
            name = self.random.choice([f"{self.name(0)}.{self.invented('last')}", f"{self.invented('last')}##"])
            form = f"{name}@{self.word('word')}.{self.random.choice(['com', 'org', 'net', 'info'])}".lower()
        else:
            form = self.random.choice(FORMS[kind])
        if kind == "password":
            form = re.sub(
                "[wW]", lambda match: self.word("word").capitalize() if match[0] == "W" else self.word("word"), form
            )
        return re.sub("[#%]", lambda match: self.random.choice(DIGITS if match[0] == "#" else LETTERS), form)

    def distinct(self, kind: str, n: int) -> list[str]:
        return [self.word(kind) for _ in range(n)]
