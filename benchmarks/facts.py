"""What a memory knows of a person: invented facts in held-out words and wordings, before and after training.

    python benchmarks/facts.py --adapters auto --n 150 --out before.json
    python benchmarks/facts.py --adapters runs/facts/adapters.safetensors --n 150 --out after.json --before before.json

Each kind has its own scenes (`latentmem.train.facts`, split HELD), at most two questions each, and the same for every
run. *Said*: the greedy answer contains the right one; *word for word*: each of its tokens is the likeliest one; *lost*:
"I don't know." where there is an answer; *older*: a value that the newest has replaced. For near misses and what was
never written "I don't know." is right. Intervals are over scenes; with `--before` differences are paired.

    first, third     plain facts about the user, and about others; one or two notes
    exact            passwords, codes, numbers, prices; two notes
    now, before      the newest of two or three statements, and the one before it
    newest of three  each in a note of its own
    near, never      near misses; small talk, and nothing that was asked
    relations        relations that are never trained on
    together         exact strings in a memory of `--together` notes
    everyday         questions that no memory is needed for, behind two notes, about held-out words in trained wordings
                     (in others the model is rarely right); the row below it: with an empty memory
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import latentmem
from latentmem.core.memory import Memory
from latentmem.evaluate import protocol, stats
from latentmem.evaluate.data import questions
from latentmem.model.model import MemoryModel
from latentmem.train import facts
from latentmem.train.facts import UNKNOWN, Ask, Scene
from latentmem.train.words import HELD, Split, grammar, relations

SEED, NEW_TOKENS, EACH = 2026, 24, 2
NEW = Split(words=True, wordings=True, relations=True)
EXACT = tuple(name for name in relations() if grammar()["relations"][name].get("exact"))
PLAIN = tuple(name for name in relations() if name not in EXACT)
CHANGING = tuple(name for name in relations() if "changes" in grammar()["relations"][name])
Record = dict[str, Any]


class Item(NamedTuple):
    """A memory's notes and the questions about them."""

    notes: list[str]
    asks: list[Ask]


def sample(kind: str, n: int, together: int) -> Iterator[Item]:
    """Memories with n questions of a kind."""
    number = 0
    while n > 0:
        scene = scene_of(kind, number, together)
        asks = [ask for ask in scene.asks if fits(kind, ask)][: min(n, 10 if kind == "together" else EACH)]
        if kind == "everyday":
            pairs = [facts.everyday(SEED, 10 * number + i, Split(words=True)) for i in range(10)]
            asks = [Ask(question, answer, kind, 0, False) for question, answer in dict(pairs).items() if answer]
            asks = asks[: min(n, EACH)]
        if kind == "never":
            scene = Scene(facts.small_talk(SEED, number, HELD), scene.asks)
            asks = [ask._replace(answer=UNKNOWN, kind="near") for ask in asks]
        if asks:
            yield Item(scene.notes, asks)
        n, number = n - len(asks), number + 1


def scene_of(kind: str, number: int, together: int) -> Scene:
    """The scene of this number that questions of a kind are taken from."""
    few = 1 + number % 2
    if kind in ("first", "third"):
        return facts.scene(SEED, number, HELD, notes=few, only=PLAIN, changes=0)
    if kind in ("exact", "together"):
        return facts.scene(SEED, number, HELD, notes=2 if kind == "exact" else together, only=EXACT, changes=0)
    if kind == "newest of three":
        return facts.scene(SEED, number, HELD, notes=few, only=CHANGING, changes=1, statements=3)
    if kind in ("now", "before"):
        return facts.scene(SEED, number, HELD, notes=few, only=CHANGING, changes=1)
    return facts.scene(SEED, number, NEW if kind == "relations" else HELD, notes=2)


def fits(kind: str, ask: Ask) -> bool:
    """Whether a question is one of a kind."""
    told = ask.kind != "near"
    wanted = {
        "first": told and ask.first,
        "third": told and not ask.first,
        "near": not told,
        "now": ask.kind == "now",
        "newest of three": ask.kind == "now",
        "before": ask.kind == "before",
    }
    return wanted.get(kind, told)


def said(reply: str, answer: str) -> bool:
    """Whether a reply contains an answer as whole words; capitals count where the answer has digits."""
    reply, answer = (text if re.search(r"\d", answer) else text.casefold() for text in (reply, answer))
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply) is not None


def abstains(reply: str) -> bool:
    """Whether a reply says that it does not know."""
    return reply.strip().casefold().replace("’", "'").startswith(UNKNOWN.casefold().rstrip("."))


def record(kind: str, number: int, ask: Ask, reply: str, exactly: bool) -> Record:
    near = ask.kind == "near"
    return {
        "kind": kind,
        "scene": number,
        "question": ask.question,
        "answer": ask.answer,
        "reply": reply,
        "said": abstains(reply) if near else said(reply, ask.answer),
        "word for word": exactly,
        "lost": not near and abstains(reply),
        "older": any(said(reply, old) for old in ask.older) and not said(reply, ask.answer),
    }


def measure(llm: MemoryModel, start: Memory, kind: str, number: int, item: Item, chats: bool) -> list[Record]:
    """Records of one memory: the notes are written one after another behind what it holds, then it is asked.

    Args:
        chats: questions are put as bare turns of a conversation.
    """
    prompts, memory = llm.prompts_or_raise(), start
    for note in item.notes:
        memory = llm.write(memory, note)
    ids = [
        prompts.chat([{"role": "user", "content": ask.question}], bare=True)
        if chats
        else prompts.question(ask.question, bare=True)
        for ask in item.asks
    ]
    answers = [prompts.answer(ask.question, ask.answer) for ask in item.asks]
    context = llm.context(memory)
    greedy = llm.generate_rows(context, ids, NEW_TOKENS)
    replies = [prompts.tokenizer.decode(new, skip_special_tokens=True) for new in greedy]
    exactly = [bool(score.hits.all()) for score in llm.score_rows(context, ids, answers)]
    found = [record(kind, number, *one) for one in zip(item.asks, replies, exactly, strict=True)]
    if kind != "everyday":
        return found
    bare = [[*prompts.opening, *row] for row in ids]
    plain = llm.generate_rows(llm.text_context([]), bare, NEW_TOKENS)
    replies = [prompts.tokenizer.decode(new, skip_special_tokens=True) for new in plain]
    return found + [
        record("everyday, empty", number, ask, reply, False) for ask, reply in zip(item.asks, replies, strict=True)
    ]


def table(records: list[Record], before: list[Record]) -> str:
    """Shares with intervals, and with `before` what has changed."""
    rows = ["| | n (memories) | said | word for word | lost | older | " + ("said, less before |" if before else "")]
    rows.append("| --- " * (rows[0].count("|") - 1) + "|")
    known = {(r["kind"], r["scene"], r["question"]): r for r in before}
    for kind in dict.fromkeys(r["kind"] for r in records):
        mine = [r for r in records if r["kind"] == kind]
        scenes = [r["scene"] for r in mine]
        shares = ("said", "word for word", "lost", "older")
        columns = [estimate([float(r[what]) for r in mine], scenes) for what in shares]
        if before:
            pairs = [(r, known.get((kind, r["scene"], r["question"]))) for r in mine]
            both = [(float(r["said"]) - float(old["said"]), r["scene"]) for r, old in pairs if old]
            columns.append(estimate([x for x, _ in both], [scene for _, scene in both]))
        rows.append(f"| {kind} | {len(mine)} ({len(set(scenes))}) | " + " | ".join(columns) + " |")
    return "\n".join(rows)


def estimate(values: list[float], scenes: list[int]) -> str:
    found = stats.mean(values, scenes)
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]" if found else "-"


def main() -> None:
    kinds = ["first", "third", "exact", "now", "newest of three", "before", "near", "never", "relations", "everyday"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", default="auto", help="a file, auto or none")
    parser.add_argument("--n", type=int, default=150, help="questions of each kind")
    parser.add_argument("--kinds", default=",".join(kinds), help="separated by commas; also: together")
    parser.add_argument("--together", type=int, default=30, help="notes of a memory of the kind together")
    parser.add_argument(
        "--full", action="store_true", help="behind a full memory of other texts (needs LATENTMEM_DATA)"
    )
    parser.add_argument("--searched", action="store_true", help="the update that fits best is read last")
    parser.add_argument("--chat", action="store_true", help="questions as bare turns of a conversation")
    parser.add_argument("--out", type=Path, help="records, JSON")
    parser.add_argument("--before", type=Path, help="records of another run, for paired differences")
    args = parser.parse_args()
    llm = latentmem.load(adapters=None if args.adapters == "none" else args.adapters)
    start = llm.empty(order="best-last" if args.searched else None)
    if args.full:
        start = protocol.full(llm, replace(start.settings, seed=SEED), questions.unrelated_texts())
    records: list[Record] = []
    for kind in args.kinds.split(","):
        for number, item in enumerate(sample(kind, args.n, args.together)):
            records += measure(llm, start, kind, number, item, args.chat)
        print(table([r for r in records if r["kind"].startswith(kind)], []), flush=True)
        if args.out:
            args.out.write_text(json.dumps(records, indent=0))
    print(table(records, json.loads(args.before.read_text()) if args.before else []))


if __name__ == "__main__":
    main()
