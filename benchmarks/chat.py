"""Ten made-up conversations of twelve turns: facts told in passing, small talk, questions back, a correction.

    python benchmarks/chat.py
    python benchmarks/chat.py --rows chat window --window 64

    chat      as `latentmem.Conversation` does with nothing chosen: what the user says is written, no answer loops
    window    the same with `--window` tokens of earlier turns in the context
    plain     the model without a memory, all earlier turns in its context, greedy: what a chat was until it filled the
              context

*Right*: an answer names what was told, and not what was taken back. *Repeats*: a sentence comes twice in one answer, or
again from an earlier answer. *Invented*: words of the memory's own text that no user said. The conversations are in
`benchmarks/chat.txt`.
"""

import argparse
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import latentmem
from latentmem.core.memory import Memory
from latentmem.model.chat import in_context
from latentmem.model.model import MemoryModel
from latentmem.model.repeats import Once

LEAST = 12  # characters of a sentence that counts as said again


class Turn(NamedTuple):
    said: str
    right: tuple[str, ...] = ()  # any of these answers it
    wrong: str = ""  # what was taken back


def conversations(path: Path) -> list[list[Turn]]:
    _, *blocks = path.read_text(encoding="utf-8").strip().split("\n\n")
    return [[turn(line) for line in block.splitlines()] for block in blocks]


def turn(line: str) -> Turn:
    said, _, rest = line.partition(" => ")
    right, _, wrong = rest.partition("; not ")
    return Turn(said, tuple(right.split(" / ")) if right else (), wrong)


def names(text: str, what: str) -> bool:
    return re.search(rf"\b{re.escape(what)}", text, re.IGNORECASE) is not None


def is_right(answer: str, asked: Turn) -> bool:
    taken_back = any(names(answer, one) for one in asked.wrong.split(" / ") if one)
    return any(names(answer, one) for one in asked.right) and not taken_back


def sentences(text: str) -> list[str]:
    parts = (re.sub(r"\W+", " ", part).strip().lower() for part in re.split(r"[.!?]\s|\n", text + " "))
    return [part for part in parts if len(part) >= LEAST]


class Row(NamedTuple):
    writes: bool  # what the user says is in a memory
    window: int  # tokens of earlier turns in the context
    repeats: bool  # an answer may say a sentence again


def once(text: str) -> str:
    """An answer up to where it says a sentence again, as a conversation gives it."""
    part = Once()
    return (part.add(text) + part.rest()).strip()


def talk(llm: MemoryModel, talks: list[list[Turn]], row: Row, tokens: int) -> tuple[list[list[str]], list[Memory]]:
    """The answers to each turn of each conversation, and the memories at the end; all conversations go on at once."""
    prompts = llm.prompts_or_raise()
    memories = [llm.empty() if row.writes else llm.blank() for _ in talks]
    messages: list[list[dict[str, str]]] = [[] for _ in talks]
    for number, turns in enumerate(zip(*talks, strict=True), 1):
        for before, one in zip(messages, turns, strict=True):
            before.append({"role": "user", "content": one.said})
        both = list(zip(messages, memories, strict=True))
        ids = [prompts.chat(in_context(prompts, said, row.window), bare=not m.is_empty) for said, m in both]
        outputs = llm.generate_ids(memories, ids, max_new_tokens=tokens)
        for before, asked, output in zip(messages, ids, outputs, strict=True):
            answer = llm.tokenizer.decode(output[0, len(asked) :], skip_special_tokens=True).strip()
            before.append({"role": "assistant", "content": answer if row.repeats else once(answer)})
        if row.writes:
            memories = llm.write(memories, [one.said for one in turns], source=f"turn {number}", role="raw")
    return [[message["content"] for message in before[1::2]] for before in messages], memories


def lines(llm: MemoryModel, name: str, talks: list[list[Turn]], options: argparse.Namespace) -> Iterator[str]:
    style = llm.prompts_or_raise().style
    rows = {"chat": Row(True, style.window, False), "window": Row(True, options.window, False)}
    said, memories = talk(llm, talks, rows.get(name, Row(False, 1 << 30, True)), options.tokens)
    right, corrected, twice, again, invented, examples = [], [], [], [], [], []
    for turns, answers, memory in zip(talks, said, memories, strict=True):
        earlier: set[str] = set()
        for asked, answer in zip(turns, answers, strict=True):
            if asked.right:
                right.append(is_right(answer, asked))
                corrected += [right[-1]] if asked.wrong else []
                examples.append(f"{'+' if right[-1] else '-'} {asked.said} {answer[:70]!r}")
            own = sentences(answer)
            twice.append(len(set(own)) < len(own))
            again.append(bool(earlier & set(own)))
            earlier |= set(own)
        if not memory.is_empty:
            told = set(re.findall(r"\w+", " ".join(turn.said for turn in turns)))
            held = re.findall(r"\w+", llm.tokenizer.decode(llm.text_of(memory), skip_special_tokens=True))
            invented += [word not in told for word in held]
    cells = [f"{sum(values)} of {len(values)}" for values in (right, corrected, twice, again)]
    cells += [f"{sum(invented)} of {len(invented)}" if invented else "nothing is written"]
    yield f"| {name} | {' | '.join(cells)} |"
    if options.show:
        yield from examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["chat", "plain"], choices=["chat", "window", "plain"])
    parser.add_argument("--window", type=int, default=64, help="tokens of earlier turns in the row `window`")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--file", type=Path, default=Path(__file__).with_suffix(".txt"))
    parser.add_argument("--show", action="store_true", help="print the answers to questions")
    options = parser.parse_args()
    llm, talks = latentmem.load(), conversations(options.file)
    print(f"{len(talks)} conversations, {options.tokens} tokens an answer, {date.today()}\n", flush=True)
    print("| | right | of these, what was corrected | a sentence twice | one of an earlier answer | invented |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.rows:
        for line in lines(llm, name, talks, options):
            print(line, flush=True)


if __name__ == "__main__":
    main()
