"""What a memory changes beside remembering: how other text is read behind it, and whether it says "I don't know".

Perplexity: held-out articles, their first tokens, read by the plain model, behind an empty memory and behind a full one
of unrelated texts. The plain model and the empty memory must agree to the bit.

Abstention: a paragraph is written into a full memory, then three kinds of questions are asked: answered by it, about it
but not answered by it (SQuAD 2.0), and about paragraphs that were never written. Abstaining is to begin with the words
that training taught; the untrained model does not know them and is measured all the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from latentmem.core.memory import Memory
from latentmem.evaluate import results, runner
from latentmem.evaluate.asking import ask, in_context, written
from latentmem.evaluate.questions import QuestionSet, heldout, unanswerable
from latentmem.evaluate.stats import Estimate, mean, ratio
from latentmem.model import MemoryModel

PROTOCOL = "effects/1"
ABSTAINS = "i don't know"  # how an answer begins that is none
KINDS = ("answered", "not answered", "never written")
STATES = ("plain", "empty", "full")
Unit = tuple[Any, ...]  # ("perplexity" or "abstention", index)
Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        N: slots of the memory; a checkpoint has its own.
        compression: tokens per slot.
        choice: which token becomes a slot.
        texts: held-out articles for the perplexity, and paragraphs for the abstention.
        tokens: of each article.
        seed: of every drop and drawing.
    """

    N: int = 2048
    compression: int = 1
    choice: str = "last"
    texts: int = 100
    tokens: int = 512
    seed: int = 0


class Effects:
    """One worker: a model, the texts, and a memory that is full of others."""

    def __init__(self, llm: MemoryModel, data: QuestionSet, settings: Settings) -> None:
        self.llm, self.data, self.settings = llm, data, settings
        self.articles = heldout(settings.texts, settings.seed)
        self.wrong = unanswerable({text.text for text in data.texts})
        self._kept: Memory | None = None

    def units(self) -> list[Unit]:
        """One unit for each text."""
        return [
            *(("perplexity", i) for i in range(len(self.articles))),
            *(("abstention", i) for i in range(len(self.data.texts))),
        ]

    def chains(self) -> list[list[Unit]]:
        """None: each text stands by itself."""
        return []

    def run(self, unit: Unit) -> list[Record]:
        """Do one unit of work and return its records."""
        return list(self._perplexity(unit[1]) if unit[0] == "perplexity" else self._abstention(unit[1]))

    def _perplexity(self, i: int) -> Iterator[Record]:
        llm, prompts = self.llm, self.llm.prompts_or_raise()
        ids = [*prompts.opening, *prompts.text(self.articles[i])][: self.settings.tokens]
        contexts = {"plain": llm.plain([]), "empty": llm.behind(llm.blank()), "full": llm.behind(self._full)}
        for state, context in contexts.items():
            score = llm.score_rows(context, [ids[:1]], [ids[1:]])[0]
            name = hashlib.sha256(self.articles[i].encode()).hexdigest()[:12]
            yield {"kind": state, "text": name, "nll": -score.logprobs.double().sum().item(), "tokens": len(ids) - 1}

    def _abstention(self, i: int) -> Iterator[Record]:
        text, other = self.data.texts[i], self.data.texts[(i + 1) % len(self.data.texts)]
        memory = replace(self._full, seed=int.from_bytes(hashlib.sha256(text.id.encode()).digest()[:7], "big"))
        memory = self.llm.write_ids(memory, written(self.llm, text.text), "target")
        kinds = dict(zip(KINDS, (text.questions, self.wrong.get(text.text, ()), other.questions), strict=True))
        for way, context in (("memory", self.llm.behind(memory)), ("floor", in_context(self.llm, ()))):
            for kind, questions in kinds.items():
                some = questions[: len(text.questions)]
                for question, answer in zip(some, ask(self.llm, context, some) if some else [], strict=True):
                    no = answer.said.lower().replace("\u2019", "'").startswith(ABSTAINS)
                    facts = {"kind": kind, "way": way, "text": text.id, "question": question.id}
                    yield {**facts, "abstains": int(no), "hit": int(answer.hit), "said": answer.said}

    @property
    def _full(self) -> Memory:
        """A memory full of unrelated texts."""
        if self._kept is None:
            s = self.settings
            trained = self.llm.trained is not None
            memory = (
                self.llm.empty(seed=s.seed)
                if trained
                else self.llm.empty(s.N, compression=s.compression, seed=s.seed, choice=s.choice)
            )
            written_ = 0
            for text in self.data.unrelated:
                if memory.M == memory.N and written_ >= memory.N:
                    break
                before = memory.updates
                memory = self.llm.write_ids(memory, written(self.llm, text), "unrelated")
                written_ += (memory.updates - before) * memory.K
            self._kept = memory
        return self._kept


@dataclass(frozen=True)
class Line:
    """One number with its interval."""

    name: str
    estimate: Estimate


def lines(records: Sequence[Record]) -> list[Line]:
    """Perplexities and their ratio, and how often each kind of question is answered by "I don't know"."""
    found: list[tuple[str, Estimate | None]] = []
    by = {state: {r["text"]: r for r in records if r["kind"] == state} for state in STATES}
    for state, some in by.items():
        texts = list(some)
        each = ratio([some[t]["nll"] for t in texts], [some[t]["tokens"] for t in texts], texts)
        found.append((f"perplexity, {state}", _exp(each)))
    for state in STATES[1:]:
        texts = [t for t in by[state] if t in by["plain"]]
        more = [by[state][t]["nll"] - by["plain"][t]["nll"] for t in texts]
        found.append(
            (f"perplexity, {state} / plain", _exp(ratio(more, [by[state][t]["tokens"] for t in texts], texts)))
        )
    for way in ("memory", "floor"):
        for kind in KINDS:
            asked = [r for r in records if r["kind"] == kind and r["way"] == way]
            groups = [r["text"] for r in asked]
            found.append((f"abstains, {kind}, {way}", mean([r["abstains"] for r in asked], groups)))
            if kind == "answered":
                found.append((f"hits, {kind}, {way}", mean([r["hit"] for r in asked], groups)))
    return [Line(name, estimate) for name, estimate in found if estimate is not None]


def _exp(e: Estimate | None) -> Estimate | None:
    return None if e is None else replace(e, mean=math.exp(e.mean), low=math.exp(e.low), high=math.exp(e.high))


def markdown(found: Sequence[Line]) -> str:
    """The lines as a Markdown table."""
    rows = ["| | n (texts) | mean [95% interval] |", "| --- | --- | --- |"]
    for line in found:
        e = line.estimate
        rows.append(f"| {line.name} | {e.n} ({e.texts}) | {e.mean:.3f} [{e.low:.3f}, {e.high:.3f}] |")
    return "\n".join(rows) + "\n"


def measure(
    llm: MemoryModel,
    data: QuestionSet,
    settings: Settings,
    out: Path,
    *,
    command: str = "",
    workers: int = 1,
    loading: dict[str, Any] | None = None,
    progress: runner.Progress = lambda done, total: None,
) -> list[Line]:
    """Run the protocol, or go on with it, and write table.md and summary.json; arguments as in `retention.measure`.

    Raises:
        ValueError: the folder holds another run or is in use.
    """
    worker = Effects(llm, data, settings)
    config: dict[str, Any] = {
        "protocol": PROTOCOL,
        "data": {"source": data.source, "sha256": data.identity},
        "settings": asdict(settings),
        "model": {
            "name": llm.name,
            "sha256": llm.identity,
            "adapters": llm.adapters.identity if llm.adapters else "",
            "dtype": str(llm.decoder.dtype)[6:],
        },
    }
    folder = runner.Folder(out, config)
    with folder.working(results.this_run(command)):
        runner.run(folder, worker, _make, (loading, data, settings), workers, progress)
        found = lines([record for unit in folder.done().values() for record in unit])
        everything = {**config, "runs": folder.runs, "lines": [[x.name, asdict(x.estimate)] for x in found]}
        (out / "summary.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        date = folder.runs[-1]["started"][:10]
        head = f"# What a memory changes beside remembering\n\n```\n{command}\n```\n\n{date}. {llm.name}, "
        head += f"adapters {config['model']['adapters'] or 'none'}, N = {settings.N}. 95%, bootstrap over texts.\n\n"
        (out / "table.md").write_text(head + markdown(found), encoding="utf-8")
        return found


def _make(loading: dict[str, Any], data: QuestionSet, settings: Settings) -> Effects:
    from latentmem.loading import load

    return Effects(load(**loading), data, settings)
