"""Of three statements about one thing, is the newest answered?

    python benchmarks/newest.py --triples 100 --others 0 5 20

A triple says where somebody lives, what somebody's job or telephone number is, or when a meeting is; then that this
has changed; then how it is now. Each statement is a write of its own into the default memory, with so many other
sentences about other people behind each of the first two. Half of the triples are worded in another way. An answer is
*newest*, *older* or *neither* by the value that it names first.

    memory    the default memory
    prompt    the plain model, all sentences in its context in the order in which they were written
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from datetime import date
from typing import NamedTuple

import latentmem
from latentmem.evaluate import stats
from latentmem.model.model import MemoryModel

SEED, NEW_TOKENS = 2026, 20
WORDS = (
    "Elin Marek Odile Tamsin Farid Hanneke Solveig Bruno Ines Yara Piet Lotte Emeka Noor Anselm Dunja Rasmus Corwin "
    "Yesenia Tadeo Birger Zsofia Amaru Maelle Osric Ingvild Evander Xenia",
    "Oslo Bergen Trondheim Leipzig Porto Ghent Turin Lyon Krakow Malmo Bilbao Tartu Graz",
    "baker plumber teacher nurse pilot lawyer gardener tailor cook librarian dentist welder",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
)
NAMES, TOWNS, JOBS, DAYS, MONTHS = (words.split() for words in WORDS)
WORDINGS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "home": (
        ("{n} lives in {a}.", "{n} has moved to {b}.", "{n} lives in {c} now.", "Where does {n} live?"),
        (
            "The home of {n} is {a}.",
            "{n} has left for {b} and lives there.",
            "By now {n} has settled in {c}.",
            "In which town does {n} live now?",
        ),
    ),
    "job": (
        ("{n} works as a {a}.", "{n} has become a {b}.", "{n} is a {c} now.", "What is the job of {n}?"),
        (
            "{n} earns a living as a {a}.",
            "{n} has changed jobs and works as a {b}.",
            "These days {n} works as a {c}.",
            "What does {n} work as now?",
        ),
    ),
    "number": (
        (
            "The phone number of {n} is {a}.",
            "{n} has a new phone number, {b}.",
            "The phone number of {n} is {c} now.",
            "What is the phone number of {n}?",
        ),
        (
            "Call {n} at {a}.",
            "{n} has changed numbers; call {b}.",
            "From today on {n} is reached at {c}.",
            "At which number is {n} reached now?",
        ),
    ),
    "day": (
        (
            "The meeting with {n} is on {a}.",
            "The meeting with {n} has been put off to {b}.",
            "The meeting with {n} is on {c} now.",
            "When is the meeting with {n}?",
        ),
        (
            "{n} meets us on {a}.",
            "{n} can not come and meets us on {b} instead.",
            "{n} has asked for {c}, and so we meet then.",
            "On which day do we meet {n}?",
        ),
    ),
}
OTHERS = (
    "{n} likes plums and dislikes pears.",
    "{n} has a red bicycle with seven gears.",
    "{n} was born in {month}.",
    "{n} plays the cello on winter evenings.",
    "{n} is allergic to nuts.",
    "{n} collects stamps from Peru.",
    "The dog of {n} is called Biscuit.",
    "{n} has read the whole library of the ship.",
)


class Triple(NamedTuple):
    kind: str
    told: list[str]  # all sentences, in order
    question: str
    values: tuple[str, ...]  # the newest first


def triples(count: int, others: int) -> Iterator[Triple]:
    for i in range(count):
        draw, kind = random.Random(f"{SEED} {i}"), list(WORDINGS)[i % len(WORDINGS)]
        *tells, question = WORDINGS[kind][i // len(WORDINGS) % 2]
        some = {"home": TOWNS, "job": JOBS, "day": DAYS}.get(kind)
        a, b, c = draw.sample(some, 3) if some else (str(draw.randrange(10**5, 10**6)) for _ in range(3))
        name, *rest = draw.sample(NAMES, len(NAMES))
        told = []
        for tell in tells:
            told.append(tell.format(n=name, a=a, b=b, c=c))
            about = range(others if tell != tells[-1] else 0)
            told += [draw.choice(OTHERS).format(n=draw.choice(rest), month=draw.choice(MONTHS)) for _ in about]
        yield Triple(kind, told, question.format(n=name), (c, b, a))


def said(reply: str, values: tuple[str, ...]) -> str:
    """Which of the values a reply names first."""
    places = {reply.casefold().find(value.casefold()): value for value in values}
    named = [place for place in places if place >= 0]
    if not named:
        return "neither"
    return "newest" if places[min(named)] == values[0] else "older"


def answers(llm: MemoryModel, one: Triple) -> Iterator[tuple[str, str]]:
    """Rows and answers."""
    memory = llm.empty()
    for text in one.told:
        memory = llm.write(memory, text)
    yield "memory", llm.ask(memory, one.question, max_new_tokens=NEW_TOKENS)
    ids = llm.prompts_or_raise().question("\n".join([*one.told, one.question]), bare=False)
    (reply,) = llm.generate_rows(llm.text_context([]), [ids], NEW_TOKENS)
    yield "prompt", llm.tokenizer.decode(reply, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triples", type=int, default=100)
    parser.add_argument("--others", type=int, nargs="+", default=[0, 5, 20], help="sentences between the statements")
    options = parser.parse_args()
    llm = latentmem.load(dtype="float32")
    print(f"{date.today()}, {llm!r}, {options.triples} triples")
    print("| others | answered by | newest | older | neither |\n| --- | --- | --- | --- | --- |")
    for others in options.others:
        counts: dict[str, list[str]] = {}
        for i, one in enumerate(triples(options.triples, others)):
            for row, reply in answers(llm, one):
                counts.setdefault(row, []).append(said(reply, one.values))
            print(f"\r{i + 1} of {options.triples}", end="", flush=True)
        for row, found in counts.items():
            newest = stats.mean([float(one == "newest") for one in found], list(range(len(found))))
            assert newest is not None
            share = Counter(found)
            cells = [f"{share[what] / len(found):.2f}" for what in ("older", "neither")]
            interval = f"{newest.mean:.2f} [{newest.low:.2f}, {newest.high:.2f}]"
            print(f"\r| {others} | {row} | {interval} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
