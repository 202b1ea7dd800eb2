"""Many short facts of one form in one memory, each asked for its exact string.

    python benchmarks/facts_list.py --facts 30 100 300 --lists 2 --ask 50

Every fact is one line ("The alarm code of the museum in Torvik is 482913."), written alone. Places are made of
syllables and values are random, so no model knows them. A list of 30 has three kinds of facts about ten
places, a longer one ten kinds. *Right*: the greedy answer contains the value.

    alone        each fact in a memory of its own
    written      all facts in one memory without a long-term part, read as they were written
    best-last    with a long-term part; the updates that fit the question best stand last
    best-only    the same memory; only the best update is read
    prompt       all facts in the context of the plain model
"""

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from typing import NamedTuple

import latentmem
from latentmem.core.memory import Memory
from latentmem.evaluate import stats
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel

WORDS = (
    "Kar Bel Tor Mun Ost Val Ry Sten Hol Grim Pel Dru Fen Cal Nor Wyn Lor Ash Bry Kel",
    "wick mere dale ford stow ham vik sund haven borg combe lund ness thorpe by",
    "Ingvild Osric Maelle Tadeo Birger Noor Zsofia Pelle Amaru Yesenia Corwin Liv Rasmus Dunja Evander Xenia",
    "Brandvik Okonjo Castellane Dufresne Halloran Jankovic Kestrel Moretti Oberholt Quiroga Tjaden Wrobel",
    "January February March April May June July August September October November December",
)
BEGIN, END, FIRST, LAST, MONTHS = (words.split() for words in WORDS)
ROWS = ("alone", "written", "best-last", "best-only", "prompt")
SEED, NEW_TOKENS, R = 2026, 20, 512
Draw = random.Random


def code(draw: Draw) -> str:
    return f"{draw.choice('ABCDEFGHJKLMNPRSTUVWXYZ')}{draw.choice('ABCDEFGHJKLM')}-{draw.randrange(10_000, 99_999)}"


def price(draw: Draw) -> str:
    return f"{draw.randrange(11, 990)}.{draw.randrange(10, 100)}"


def password(draw: Draw) -> str:
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)) + str(draw.randrange(10, 99))


def day(draw: Draw) -> str:
    return f"{draw.randrange(1, 29)} {draw.choice(MONTHS)} {draw.randrange(2027, 2039)}"


def person(draw: Draw) -> str:
    return f"{draw.choice(FIRST)} {draw.choice(LAST)}"


def digits(draw: Draw) -> str:
    return str(draw.randrange(100_000, 999_999))


KINDS: tuple[tuple[str, str, Callable[[Draw], str]], ...] = (
    ("The serial number of the pump in {p} is {v}.", "What is the serial number of the pump in {p}?", code),
    ("A night in the guest house of {p} costs {v} euros.", "What does a night in the guest house of {p} cost?", price),
    ("The password of the printer in {p} is {v}.", "What is the password of the printer in {p}?", password),
    ("The lease of the warehouse in {p} ends on {v}.", "When does the lease of the warehouse in {p} end?", day),
    ("The caretaker of the school in {p} is {v}.", "Who is the caretaker of the school in {p}?", person),
    ("The alarm code of the museum in {p} is {v}.", "What is the alarm code of the museum in {p}?", digits),
    ("The ticket for the ferry to {p} costs {v} euros.", "How much is the ticket for the ferry to {p}?", price),
    ("The bridge in {p} was inspected on {v}.", "When was the bridge in {p} inspected?", day),
    ("The customer number of the bakery in {p} is {v}.", "What is the customer number of the bakery in {p}?", code),
    ("The doctor on call in {p} is {v}.", "Who is the doctor on call in {p}?", person),
)


class Fact(NamedTuple):
    text: str
    question: str
    value: str


def facts(n: int, number: int) -> list[Fact]:
    """A list of n facts, all values different."""
    draw = Draw(f"{SEED} {n} {number}")
    kinds = draw.sample(KINDS, 3) if n <= 30 else KINDS
    places = draw.sample([begin + end for begin in BEGIN for end in END], -(-n // len(kinds)))
    found: dict[str, Fact] = {}
    for place in places:
        for text, question, make in kinds:
            value = make(draw)
            while value in found:
                value = make(draw)
            found[value] = Fact(text.format(p=place, v=value), question.format(p=place), value)
    some = list(found.values())[:n]
    draw.shuffle(some)
    return some


def contexts(llm: MemoryModel, told: list[Fact], asked: list[Fact], N: int) -> Iterator[tuple[str, Context]]:
    """The memories in front of the questions, by row."""
    yield "alone", llm.context([llm.write(llm.empty(), fact.text) for fact in asked])
    memory: Memory = llm.empty(N=N, longterm=R)
    for fact in told:
        memory = llm.write(memory, fact.text, source="facts")
    yield "written", llm.context(replace(memory, longterm=None))
    for order in ("best-last", "best-only"):
        yield order, llm.context(memory.with_settings(order=order))


def replies(llm: MemoryModel, context: Context, ids: list[list[int]]) -> list[str]:
    rows = llm.generate_rows(context, ids, NEW_TOKENS)
    return [llm.tokenizer.decode(new, skip_special_tokens=True) for new in rows]


def said(
    llm: MemoryModel, told: list[Fact], asked: list[Fact], N: int, rows: list[str]
) -> Iterator[tuple[str, list[str]]]:
    """The answers to the questions, by row."""
    prompts = llm.prompts_or_raise()
    ids = [prompts.question(fact.question, bare=True) for fact in asked]
    for row, context in contexts(llm, told, asked, N):
        if row in rows:
            yield row, replies(llm, context, ids)
    if "prompt" in rows:
        text, nothing = "\n".join(fact.text for fact in told), llm.text_context([])
        whole = [prompts.question(f"{text}\n{fact.question}", bare=False) for fact in asked]
        yield "prompt", [reply for one in whole for reply in replies(llm, nothing, [one])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, nargs="+", default=[30, 100, 300], help="of a list")
    parser.add_argument("--lists", type=int, default=1, help="of each length")
    parser.add_argument("--ask", type=int, default=50, help="questions to a list at most")
    parser.add_argument("--rows", default="alone,written,best-last,best-only", help=f"of {', '.join(ROWS)}")
    parser.add_argument("-N", type=int, default=2048, help="slots of the memory of a list")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    llm, rows = latentmem.load(dtype=args.dtype), args.rows.split(",")
    print(f"{date.today()}, {args.dtype}, N {args.N}, R {R}\n\n| facts | row | right | of | share |\n|{' --- |' * 5}")
    for n in args.facts:
        found: dict[str, list[bool]] = {row: [] for row in rows}
        for number in range(args.lists):
            told = facts(n, number)
            asked = told[: args.ask]
            for row, answers in said(llm, told, asked, args.N, rows):
                found[row] += [fact.value in answer for fact, answer in zip(asked, answers, strict=True)]
        for row, hits in found.items():
            share = stats.mean(list(map(float, hits)), range(len(hits)))
            interval = f"{share.mean:.2f} [{share.low:.2f}, {share.high:.2f}]" if share else "-"
            print(f"| {n} | {row} | {sum(hits)} | {len(hits)} | {interval} |", flush=True)


if __name__ == "__main__":
    main()
