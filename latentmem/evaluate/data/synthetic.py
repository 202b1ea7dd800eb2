"""An endless set of invented texts: people, places, names and numbers that no training text holds.

Text i of a seed is about one invented person and states five facts in random order, each in one of three sentences:
the town of the workshop, the year in which it opened, the number of the locker, the name of the teacher and the name
of the boat. Names are built of syllables; the person's name counts through a permutation of three syllables, then of
four and so on, so no two texts of a seed share one. Every question names the person, so it has one answer however many
texts are read. The years lie between 1100 and 1990 and the numbers between 100 and 999.

Fact i of a seed is one such sentence about person i with its question, for streams in which nobody comes twice.
"""

from __future__ import annotations

from random import Random

from latentmem.evaluate.data.sets import Question, Text

SYLLABLES = tuple(
    "ba be bi bo bra bri da del dro fa fen fi gar gel gri hol ja jor ka kel kir lam len lo mar "  # noqa: SIM905
    "mel mi nar nel no or pal per ral ren ri sal sel sor ta tel tor ul va vel vor wen zal zor zu".split()
)
_STEP, _START = 2_641_337, 1_234_567  # no factor in common with 50, so i -> i * _STEP permutes all names of a length
TRADES = ("baker", "cooper", "dyer", "glazier", "miller", "potter", "saddler", "smith", "tanner", "weaver")
FACTS = (  # what is asked, and three ways to say it; {a} is the answer
    (
        "In which town is the workshop of {who}?",
        "The workshop of {who} is in the town of {a}.",
        "{who} works in {a}, a small town.",
        "To find the workshop of {who}, go to the town of {a}.",
    ),
    (
        "In which year did {who} open the workshop?",
        "{who} opened the workshop in {a}.",
        "It was the year {a} when {who} opened the workshop.",
        "The workshop of {who} was opened in {a}.",
    ),
    (
        "What is the number of the locker of {who}?",
        "{who} has the locker with the number {a}.",
        "The tools are kept in the locker number {a}, which belongs to {who}.",
        "The number of the locker of {who} is {a}.",
    ),
    (
        "Who taught {who} the trade?",
        "{who} was taught the trade by {a}.",
        "It was {a} who taught {who} the trade.",
        "{a} taught {who} the trade.",
    ),
    (
        "What is the name of the boat of {who}?",
        "{who} owns a boat with the name {a}.",
        "The boat of {who} is named {a}.",
        "On Sundays {who} sails a boat that is called {a}.",
    ),
)


def text(seed: int, index: int) -> Text:
    """Text `index` of a seed, with its five questions; a pure function of both.

    Args:
        seed: another seed gives other people and other facts.
        index: 0 or more.
    """
    draw = Random(f"latentmem/synthetic/{seed}/{index}")
    who = _person(seed, index)
    answers = (_word(draw), draw.randint(1100, 1990), draw.randint(100, 999), _word(draw), _word(draw))
    sentences, questions = [], []
    for number, ((question, *ways), answer) in enumerate(zip(FACTS, answers, strict=True)):
        sentences.append(draw.choice(ways).format(who=who, a=answer))
        questions.append(Question(f"synthetic-{seed}-{index}-{number}", question.format(who=who), (str(answer),)))
    draw.shuffle(sentences)
    opening = f"{who} is a {draw.choice(TRADES)}."
    return Text(f"synthetic-{seed}-{index}", " ".join([opening, *sentences]), tuple(questions))


def fact(seed: int, index: int) -> Text:
    """Fact `index` of a seed: one sentence about a person of its own, with its question; a pure function of both.

    Args:
        seed: as in `text`.
        index: 0 or more.
    """
    draw = Random(f"latentmem/synthetic/fact/{seed}/{index}")
    who, number = _person(seed, index), draw.randrange(len(FACTS))
    question, *ways = FACTS[number]
    answer = str((_word(draw), draw.randint(1100, 1990), draw.randint(100, 999), _word(draw), _word(draw))[number])
    name = f"fact-{seed}-{index}"
    asked = Question(name, question.format(who=who), (answer,))
    return Text(name, draw.choice(ways).format(who=who, a=answer), (asked,))


def _word(draw: Random) -> str:
    return "".join(draw.choice(SYLLABLES) for _ in range(3)).capitalize()


def _person(seed: int, index: int) -> str:
    base, length = len(SYLLABLES), 3
    while index >= base**length:
        index -= base**length
        length += 1
    number = (index + seed * 7919 + _START) * _STEP % base**length
    word = ""
    for _ in range(length):
        number, syllable = divmod(number, base)
        word += SYLLABLES[syllable]
    return word.capitalize()
