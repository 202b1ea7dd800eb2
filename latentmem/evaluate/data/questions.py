"""Sets of texts with questions whose answers they hold, and unrelated texts to be written behind them.

`squad` and `nq` are read from the folder `$LATENTMEM_DATA`, where it is set and holds them, else from the hub. No
question here is for training: SQuAD's come from articles of the v2.0 development set, the unrelated texts from others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np

from latentmem import data
from latentmem.evaluate.data.sets import Question, QuestionSet, Text
from latentmem.evaluate.settings import LONGEST

NAMES = ("squad", "nq", "synthetic")
SHORTEST = 16  # tokens of a Natural Questions context
ANSWER = {"squad": 3, "nq": 4}  # tokens of an answer at most (MemoryLLM section 4.4)
UNRELATED = 1_000  # of the synthetic set, and the most that is taken from the hub
_NO_ANSWER = "no answer"
Count = Callable[[str], int]


def load(name: str, count: Count, *, questions: int, per_text: int, seed: int) -> QuestionSet:
    """A set by name, filtered as in the paper, drawn by seed.

    Args:
        name: "squad": answers of at most 3 tokens; "nq": answers of at most 4 tokens that stand in the long answer,
            which is the text, 16 to 512 tokens; "synthetic": see `synthetic.py`.
        count: tokens of a string, by the model's own tokenizer.
        questions: texts are drawn until they have so many questions together, or a few more.
        per_text: so many questions of each text, drawn; texts with fewer are left out.
        seed: of the drawing, and of the synthetic texts.

    Raises:
        ValueError: an unknown name, data that can not be found, or too few questions in it.

    Source: MemoryLLM section 4.4.
    """
    source, texts, unrelated = _candidates(name, count, questions, seed)
    generator = np.random.default_rng(seed)
    chosen = _draw(texts, generator, questions, per_text, name)
    targets = {text.text for text in texts}
    free = [t for t in dict.fromkeys(unrelated) if t not in targets and count(t) <= LONGEST]
    return QuestionSet(name, source, tuple(chosen), tuple(free[i] for i in generator.permutation(len(free))))


def _candidates(name: str, count: Callable[[str], int], questions: int, seed: int) -> tuple[str, list[Text], list[str]]:
    """Of a set where it is from, the texts whose questions pass its filter, and unrelated texts; as in `load`."""
    if name == "synthetic":
        from latentmem.evaluate.data import synthetic

        source = f"invented, seed {seed}"
        texts: Iterable[Text] = (synthetic.text(seed, i) for i in range(questions))
        unrelated = [synthetic.text(seed, questions + i).text for i in range(UNRELATED)]
    elif name == "squad":
        source, rows, others = _squad()
        texts = _grouped(
            (row["context"], Question(row["id"], row["question"], (row["answers"]["text"][0],)))
            for row in rows
            if row["answers"]["text"] and count(row["answers"]["text"][0]) <= ANSWER["squad"]
        )
        unrelated = others
    elif name == "nq":
        source, rows, _ = _nq()
        fitting = [row for row in rows if _nq_fits(row, count)]
        texts = _grouped(
            (row["context"], Question(f"nq-{row['id']}", f"{row['question']}?", tuple(row["answers"])))
            for row in fitting
        )
        titles = {row["title"] for row in fitting}
        unrelated = [row["context"] for row in rows if row["title"] not in titles]
    else:
        raise ValueError(f"the question set must be one of {', '.join(NAMES)}, got {name!r}.")
    return source, list(texts), unrelated


def _draw(texts: list[Text], generator: np.random.Generator, questions: int, per_text: int, name: str) -> list[Text]:
    enough = [text for text in texts if len(text.questions) >= per_text]
    if len(enough) * per_text < questions:
        raise ValueError(
            f"{name} has {len(enough)} texts with at least {per_text} questions that pass the filter; "
            f"{-(-questions // per_text)} were asked for. Ask for fewer questions, or fewer of each text."
        )
    chosen: list[Text] = []
    for i in generator.permutation(len(enough))[: -(-questions // per_text)]:
        picked = sorted(generator.permutation(len(enough[i].questions))[:per_text])
        chosen.append(Text(enough[i].id, enough[i].text, tuple(enough[i].questions[j] for j in picked)))
    return chosen


def _grouped(pairs: Iterable[tuple[str, Question]]) -> list[Text]:
    """Questions of equal contexts as one text; it is named by a hash of the context."""
    by_context: dict[str, list[Question]] = {}
    for context, question in pairs:
        by_context.setdefault(context, []).append(question)
    return [
        Text(hashlib.sha256(context.encode()).hexdigest()[:12], context, tuple(questions))
        for context, questions in by_context.items()
    ]


def _nq_fits(row: dict[str, Any], count: Count) -> bool:
    gold = row["answers"][0]
    return gold in row["context"] and count(gold) <= ANSWER["nq"] and SHORTEST <= count(row["context"]) <= LONGEST


def unanswerable(texts: Collection[str]) -> dict[str, tuple[Question, ...]]:
    """Questions of SQuAD 2.0 that seem to be about one of these texts and are not answered by it, by text."""
    local = data.local_rows("squad/eval_unanswerable.jsonl.gz")
    if local:
        rows = local[0]
    else:
        with data.reading("rajpurkar/squad_v2") as hub:
            rows = [row for row in hub(split="validation") if not row["answers"]["text"]]
    by_text: dict[str, list[Question]] = {}
    for row in rows:
        if row["context"] in texts:
            by_text.setdefault(row["context"], []).append(Question(row["id"], row["question"], (_NO_ANSWER,)))
    return {text: tuple(questions) for text, questions in by_text.items()}


def heldout(count: int, seed: int) -> list[str]:
    """Articles that are never trained on, drawn by seed: for perplexity.

    Raises:
        ValueError: data that can not be found, or too little of it.
    """
    local = data.local_rows("corpus/wiki2015_heldout.jsonl.gz", "corpus/wiki2018_heldout.jsonl.gz")
    if local:
        texts = [row["text"] for rows in local for row in rows]
    else:
        with data.reading("Salesforce/wikitext") as hub:
            lines = [row["text"] for row in hub("wikitext-2-raw-v1", split="test")]
        texts = [part for part in re.split(r"\n(?= = [^=])", "\n".join(lines)) if len(part) > 2000]
    if len(texts) < count:
        raise ValueError(f"there are {len(texts)} held-out articles, and {count} were asked for. Ask for fewer.")
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[:count]]


# --- where the rows come from ---------------------------------------------------------------------------------------

Rows = tuple[str, list[dict[str, Any]], list[str]]  # (source, rows, unrelated texts)


def unrelated_texts() -> list[str]:
    """Contexts of SQuAD articles that no question set asks about."""
    return list(dict.fromkeys(_squad()[2]))


def _squad() -> Rows:
    local = data.local_rows("squad/eval_titles.jsonl.gz", "squad/train_13_titles.jsonl.gz")
    if local:
        rows, others = local
        return "SQuAD, 27 articles of the v2.0 development set", rows, [row["context"] for row in others]
    with data.reading("rajpurkar/squad_v2") as hub:
        rows = list(hub(split="validation"))
    with data.reading("rajpurkar/squad") as hub:
        contexts = dict.fromkeys(row["context"] for row in hub(split="train", streaming=True).take(20_000))
    return "rajpurkar/squad_v2, validation", rows, list(contexts)[:UNRELATED]


def _nq() -> Rows:
    local = data.local_rows("nq/eval.jsonl.gz")
    if local:
        return "Natural Questions with gold paragraphs", local[0], []
    with data.reading("google-research-datasets/natural_questions") as hub:
        rows = list(natural_questions(hub("default", split="validation", streaming=True)))
    return "google-research-datasets/natural_questions, validation", rows, []


def natural_questions(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of the hub's Natural Questions as {id, title, context, question, answers}, as far as they have answers.

    The context is the long answer without its HTML; the first annotator with both a long and a short answer counts.
    """
    for row in rows:
        tokens = row["document"]["tokens"]
        annotations = row["annotations"]
        for long, short in zip(annotations["long_answer"], annotations["short_answers"], strict=True):
            if long["start_token"] < 0 or not short["text"]:
                continue
            span = range(long["start_token"], long["end_token"])
            context = " ".join(tokens["token"][i] for i in span if not tokens["is_html"][i])
            yield {
                "id": row["id"],
                "title": row["document"]["title"],
                "context": context,
                "question": row["question"]["text"],
                "answers": list(dict.fromkeys(short["text"])),
            }
            break
