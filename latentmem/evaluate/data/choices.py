"""Sets where the likelier of some options is chosen: BLiMP, PIQA and MMLU, and how likely a model finds each option.

They are read from the folder `$LATENTMEM_DATA`, where it is set and holds them, else from the hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from latentmem import data
from latentmem.core.memory import Memory
from latentmem.model.model import MemoryModel

NAMES = ("blimp", "piqa", "mmlu")
FILES = {
    "blimp": "ability/blimp_100_each.jsonl.gz",
    "piqa": "ability/piqa_valid.jsonl.gz",
    "mmlu": "ability/mmlu_test_100_each.jsonl.gz",
}
HUB = {"blimp": "nyu-mll/blimp", "piqa": "baber/piqa", "mmlu": "cais/mmlu"}
LETTERS = ("A", "B", "C", "D")
Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One choice.

    Args:
        id: of the set, so that a run can be repeated.
        prompt: what stands before every option; "" where the options are whole sentences.
        options: with the space that stands before them.
        right: index of the right one.
    """

    id: str
    prompt: str
    options: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Choices:
    """Items of one set, drawn by seed, and where they were read."""

    name: str
    source: str
    items: tuple[Item, ...]

    @property
    def identity(self) -> str:
        """Hash of everything in it."""
        return hashlib.sha256(repr(self.items).encode()).hexdigest()


def load(name: str, count: int, seed: int) -> Choices:
    """So many items of a set, drawn by seed; of BLiMP's paradigms and MMLU's subjects equally many, or one more.

    Args:
        name: "blimp", "piqa" or "mmlu".

    Raises:
        ValueError: an unknown name, data that can not be found, or too few items in it.
    """
    if name not in NAMES:
        raise ValueError(f"the set must be one of {', '.join(NAMES)}, got {name!r}.")
    local = data.local_rows(FILES[name])
    rows, source = (local[0], FILES[name]) if local else (_from_hub(name), HUB[name])
    items = {"blimp": blimp, "piqa": piqa, "mmlu": mmlu}[name](rows)
    if len(items) < count:
        raise ValueError(f"{name} has {len(items)} items, and {count} were asked for. Ask for fewer.")
    return Choices(name, source, tuple(spread(items, lambda item: item.id.rpartition("-")[0], count, seed)))


def _from_hub(name: str) -> list[Row]:
    with data.reading(HUB[name]) as hub:
        if name == "piqa":
            return list(hub(split="validation"))
        if name == "mmlu":
            return list(hub("all", split="test"))
        from datasets import get_dataset_config_names

        return [
            {"UID": part, **row} for part in get_dataset_config_names(HUB[name]) for row in hub(part, split="train")
        ]


def blimp(rows: Iterable[Row]) -> list[Item]:
    """Pairs of sentences of which the first is right: rows {sentence_good, sentence_bad, UID}."""
    rows = list(rows)
    pairs = ((row["UID"], (row["sentence_good"], row["sentence_bad"])) for row in rows)
    return [Item(f"{uid}-{i}", "", options, 0) for i, (uid, options) in enumerate(pairs)]


def piqa(rows: Iterable[Row]) -> list[Item]:
    """Two ways to reach a goal: rows {goal, sol1, sol2, label}."""
    return [
        Item(
            f"piqa-{i}", f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), int(row["label"])
        )
        for i, row in enumerate(rows)
    ]


def mmlu(rows: Iterable[Row]) -> list[Item]:
    """Four answers, of which the letter is to be said: rows {subject, question, choices, answer}."""
    items = []
    for i, row in enumerate(rows):
        head = "The following are multiple choice questions (with answers) about "
        answers = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
        prompt = f"{head}{row['subject'].replace('_', ' ')}.\n\n{row['question'].strip()}\n{answers}\nAnswer:"
        items.append(
            Item(f"{row['subject']}-{i}", prompt, tuple(f" {letter}" for letter in LETTERS), int(row["answer"]))
        )
    return items


Drawn = TypeVar("Drawn")


def spread(items: Sequence[Drawn], part: Callable[[Drawn], Hashable], count: int, seed: int) -> list[Drawn]:
    """At most `count` items drawn by seed, one of each part in turn."""
    seen: dict[Hashable, int] = {}
    ranked: list[tuple[int, int]] = []
    for place in np.random.default_rng(seed).permutation(len(items)).tolist():
        name = part(items[place])
        seen[name] = seen.get(name, -1) + 1
        ranked.append((seen[name], place))
    ranked.sort(key=lambda pair: pair[0])  # stable: in each round as they were drawn
    return [items[place] for _, place in ranked[:count]]


@torch.no_grad()
def logliks(llm: MemoryModel, memory: Memory | None, items: Sequence[Item]) -> list[list[float]]:
    """The log-likelihood of every option of every item, summed over its tokens, in nats.

    In front of a prompt stands the token of the sink, as lm-evaluation-harness puts bos there.

    Args:
        memory: what the items are read behind; None: the plain model.

    Raises:
        ValueError: an item does not fit into the model's context.
    """
    text, first = llm.prompts_or_raise().text, llm.first_token
    context = llm.text_context([]) if memory is None else llm.context(memory)
    values: list[list[float]] = [[] for _ in items]
    asked: list[tuple[int, list[int], list[int]]] = []
    for i, item in enumerate(items):
        prompt, options = [first, *(text(item.prompt) if item.prompt else [])], [text(o) for o in item.options]
        if all(len(option) == 1 for option in options):  # letters: one pass tells all of them
            values[i] = _next(llm, memory, prompt)[torch.tensor([option[0] for option in options])].tolist()
        else:
            asked += [(i, prompt, option) for option in options]
    if asked:
        scores = llm.score_rows(context, [prompt for _, prompt, _ in asked], [option for _, _, option in asked])
        for (i, _, _), score in zip(asked, scores, strict=True):
            values[i].append(score.logprobs.double().sum().item())
    return values


def _next(llm: MemoryModel, memory: Memory | None, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of the token that follows, [vocab] float32 on the CPU."""
    if memory is not None:
        logits = llm.logits(memory, ids)[-1]
    else:
        with llm.using(None):
            logits = llm.base(input_ids=torch.tensor([list(ids)], device=llm.decoder.device), use_cache=False).logits[
                0, -1
            ]
    return logits.float().log_softmax(-1).cpu()


def is_right(item: Item, logliks: Sequence[float], *, normed: bool = False) -> int:
    """1 where the right option is the likeliest, else 0; of equal ones the first counts against the right one.

    Args:
        logliks: of the item's options.
        normed: per character of the option, as lm-evaluation-harness does for PIQA.
    """
    values = [v / len(o.strip()) for v, o in zip(logliks, item.options, strict=True)] if normed else list(logliks)
    return int(all(values[item.right] > v for i, v in enumerate(values) if i != item.right))
