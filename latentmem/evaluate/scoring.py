"""How near an answer is to the right one: F1 over words and exact match, with SQuAD's normalisation; and abstaining."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

ABSTAINS = "i don't know"  # how an answer begins that is none
SAYS_NOTHING = ("not mentioned", "no information")  # how else an answer says that it is none
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Small letters, without punctuation, English articles and extra spaces (Rajpurkar et al. 2016)."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def f1(said: str, golds: Iterable[str]) -> float:
    """The best harmonic mean of precision and recall over the words of what was said, for one of the right answers.

    Words count as often as they stand there. Two answers without a word agree.
    """
    return max(_f1(normalised(said).split(), normalised(gold).split()) for gold in golds)


def _f1(said: list[str], gold: list[str]) -> float:
    if not said or not gold:
        return float(said == gold)
    common = sum((Counter(said) & Counter(gold)).values())
    return 2 * common / (len(said) + len(gold))


def exact(said: str, golds: Iterable[str]) -> int:
    """1 where the answer is one of the right ones after normalisation, else 0."""
    return int(any(normalised(said) == normalised(gold) for gold in golds))


def within(said: str, golds: Iterable[str]) -> int:
    """1 where the words of a right answer stand next to each other in what was said, after normalisation, else 0."""
    return int(any(f" {normalised(gold)} " in f" {normalised(said)} " for gold in golds))


def abstains(said: str) -> int:
    """1 where the answer is that there is none, else 0: "I don't know" at its beginning, or what else says so."""
    plain = said.lower().replace("\u2019", "'")
    return int(plain.startswith(ABSTAINS) or any(words in plain for words in SAYS_NOTHING))
