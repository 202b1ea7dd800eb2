"""Sets of edits: a fact that is to be changed, and the prompts that show what the change did.

`zsre` and `counterfact` are read from the paper's own file where one is given, else from the folder `$LATENTMEM_DATA`,
where it is set and holds them, else from the hub.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentmem import data
from latentmem.evaluate.data.questions import UNRELATED, heldout, unrelated_texts

NAMES = ("zsre", "counterfact")
FIRST = {"zsre": 10_000, "counterfact": 2_000}  # records of the paper's files, here as there
FILES: dict[str, tuple[str, str, dict[str, type]]] = {  # the paper's: of which set, name, what each record has
    "zsre": (
        "zsRE",
        "zsre_mend_eval.json",
        {"subject": str, "src": str, "answers": list, "rephrase": str, "loc": str, "loc_ans": str},
    ),
    "counterfact": (
        "CounterFact",
        "counterfact.json",
        {"case_id": int, "requested_rewrite": dict, "paraphrase_prompts": list, "neighborhood_prompts": list},
    ),
}
ARTICLES = 50  # held-out ones that come with a set; the hub's set has no more
NQ = "nq question: "  # what stands in front of the unrelated questions of the hub's zsRE
Row = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """What is asked, and the answer whose likelihood is measured.

    Args:
        prompt: a question, or the beginning of a sentence.
        answer: what should follow.
        other: what should be less likely than `answer`; "" where the answer's own tokens are counted.
    """

    prompt: str
    answer: str
    other: str = ""


@dataclass(frozen=True)
class Edit:
    """A fact to be changed.

    Args:
        subject: what the fact is about, as it stands in `rewrite.prompt`.
        rewrite: the prompt and what should follow it from now on.
        rephrased: other prompts for the same fact.
        unrelated: prompts that the edit should not touch, with their true answers.
        portability: prompts whose answers follow from the edit; may be empty.
    """

    id: str
    subject: str
    rewrite: Probe
    rephrased: tuple[Probe, ...]
    unrelated: tuple[Probe, ...]
    portability: tuple[Probe, ...] = ()

    @property
    def sentence(self) -> str:
        """What is written, or stands in the context: the prompt with its new answer."""
        return f"{self.rewrite.prompt} {self.rewrite.answer}"

    @property
    def probes(self) -> tuple[Probe, ...]:
        """All that is asked."""
        return (self.rewrite, *self.rephrased, *self.unrelated, *self.portability)

    @property
    def whole(self) -> bool:
        """Whether every row can take it: its subject stands in its prompt, and no prompt and no answer is empty."""
        said = [text for probe in self.probes for text in (probe.prompt, probe.answer)]
        return self.subject in self.rewrite.prompt and all(text.strip() for text in said)


@dataclass(frozen=True)
class EditSet:
    """Edits in the order in which they were drawn, and texts that have nothing to do with them.

    Args:
        name: one of `NAMES`.
        source: where it was read from, in words.
        edits: all there are; a run takes the first ones.
        unrelated: texts that fill a memory.
        articles: held-out articles, for what needs a sample of text.
    """

    name: str
    source: str
    edits: tuple[Edit, ...]
    unrelated: tuple[str, ...]
    articles: tuple[str, ...]

    @property
    def questions(self) -> bool:
        """Whether prompts are questions; else they are beginnings of sentences."""
        return self.name == "zsre"

    @property
    def identity(self) -> str:
        """Hash of everything in it."""
        return hashlib.sha256(repr((self.edits, self.unrelated, self.articles)).encode()).hexdigest()


def load(name: str, *, seed: int, file: Path | None = None) -> EditSet:
    """A set by name, in an order that is drawn by seed, without the records that not every row can take.

    Args:
        name: "zsre": questions; "counterfact": beginnings of sentences.
        file: the authors' zsre_mend_eval.json or counterfact.json, gzipped or not, of which the paper's first records
            are taken; by default what `$LATENTMEM_DATA` or the hub has.

    Raises:
        ValueError: an unknown name, or data that can not be found or read.

    Source: MemoryLLM section 4.2.
    """
    if name not in NAMES:
        raise ValueError(f"the set of edits must be one of {', '.join(NAMES)}, got {name!r}.")
    source, records = _file(name, file) if file else _found(name)
    edits = [edit for edit in records if edit.whole]
    unusable = len(records) - len(edits)
    source += f", {len(edits)} records"
    source += f" ({unusable} left out: no subject in the prompt, or nothing to ask)" if unusable else ""
    order, asked = np.random.default_rng(seed), {edit.rewrite.prompt for edit in edits}
    drawn = tuple(edits[i] for i in order.permutation(len(edits)))
    free = [text for text in unrelated_texts() if text not in asked]
    texts = tuple(free[i] for i in order.permutation(len(free))[:UNRELATED])
    return EditSet(name, source, drawn, texts, tuple(heldout(ARTICLES, seed)))


def _found(name: str) -> tuple[str, list[Edit]]:
    """What `$LATENTMEM_DATA` or the hub has, and where it is from, in words."""
    rows = data.local_rows(f"editing/{name}.jsonl.gz")
    if name == "zsre":
        if rows:
            return "zsRE as in KnowEdit's test split", [knowedit(row) for row in rows[0]]
        return "zsre_mend_eval", _hub_zsre()
    if rows:
        return "CounterFact, a part of its records", [counterfact(row) for row in rows[0]]
    return "CounterFact", _hub_counterfact()


def _file(name: str, file: Path) -> tuple[str, list[Edit]]:
    """The first records of a file of the paper's, and which it is."""
    title, original, fields = FILES[name]
    edits = []
    for i, row in enumerate(data.rows_of_file(file, f"records of {original}", fields)[: FIRST[name]]):
        try:
            edits.append(mend(i, row) if name == "zsre" else counterfact(row))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"record {i} of {file} is not as in {original} ({error!r}): {row!r:.120}. Give that file, or choose "
                f"its set with --data."
            ) from None
    return f"{title}, {file.name}", edits


def knowedit(row: Row) -> Edit:
    """A record of KnowEdit's zsRE; its new answer is false, the unrelated question is the one of Natural Questions."""
    loc, portable = row["locality_nq"], [p for kind in sorted(row["portability"]) for p in row["portability"][kind]]
    return Edit(
        str(row["id"]),
        row["subject"],
        Probe(row["prompt"], row["target_new"].strip()),
        (Probe(row["rephrase"], row["target_new"].strip()),),
        (Probe(_question(loc["question"]), loc["answers"][0]),),
        tuple(Probe(p["prompt"], p["ground_truth"].strip()) for p in portable),
    )


def mend(i: int, row: Row) -> Edit:
    """Record i of zsre_mend_eval, {subject, src, answers, rephrase, loc, loc_ans}; the new answer is the true one.

    Source: the paper's code, which takes `answers[0]` and not `alt`, as ROME's does.
    """
    true = row["answers"][0]
    return Edit(
        str(i),
        row["subject"],
        Probe(row["src"], true),
        (Probe(row["rephrase"], true),),
        (Probe(_question(row["loc"].removeprefix(NQ)), row["loc_ans"]),),
    )


def counterfact(row: Row) -> Edit:
    """A record of CounterFact, in the format of its authors."""
    asked = row["requested_rewrite"]
    new, true = asked["target_new"]["str"], asked["target_true"]["str"]
    return Edit(
        str(row["case_id"]),
        asked["subject"],
        Probe(asked["prompt"].replace("{}", asked["subject"]), new, true),
        tuple(Probe(prompt, new, true) for prompt in row["paraphrase_prompts"]),
        tuple(Probe(prompt, true, new) for prompt in row["neighborhood_prompts"]),
    )


def _question(text: str) -> str:
    """A question of Natural Questions, which has no question mark."""
    return text if text.rstrip().endswith("?") else f"{text.rstrip()}?"


def _hub_zsre() -> list[Edit]:
    with data.reading("wangzn2001/Model_Editing_Hurt") as hub:
        rows = hub(data_files="training-data/zsre_mend_eval.json", split="train", streaming=True)
        return [mend(i, row) for i, row in enumerate(rows.take(FIRST["zsre"]))]


def _hub_counterfact() -> list[Edit]:
    """The first records by `case_id`, which is the order of the authors' file; the hub's is split in two."""
    with data.reading("azhx/counterfact") as hub:
        rows = [row for split in ("train", "test") for row in hub(split=split)]
        return [counterfact(row) for row in sorted(rows, key=lambda row: row["case_id"])[: FIRST["counterfact"]]]
