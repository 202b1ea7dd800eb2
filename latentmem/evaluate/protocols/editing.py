"""Model editing: a fact is changed, and prompts show whether it was, and what else changed (MemoryLLM section 4.2).

Single edits: each begins from the unedited state. Sequences: T edits one after another without reset, then all of them,
or 100 that are spread evenly over them, are measured.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import Tensor

from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings
from latentmem.evaluate import protocol
from latentmem.evaluate.baselines.editors import (
    Demonstrations,
    Editor,
    InContext,
    Plain,
    Retrieved,
    Unwritten,
    Written,
    answer_ids,
    prompt_ids,
)
from latentmem.evaluate.baselines.rome import RankOne
from latentmem.evaluate.baselines.tuning import FineTuned, LowRank
from latentmem.evaluate.data.edits import Edit, EditSet, Probe
from latentmem.evaluate.protocol import Line, Record, RunOptions, Unit, Worker
from latentmem.evaluate.runner import Folder
from latentmem.evaluate.settings import Editing as Settings
from latentmem.evaluate.stats import Means, harmonic, mean, of_means
from latentmem.evaluate.tables import plots
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel
from latentmem.model.reader import Score

ROWS = Settings.ROWS
SEQUENTIAL = ("none", "bm25", "memory-own", "memory-full", "longterm", "ft", "ft-l", "lora", "rome")  # take many edits
SHOWN = ("memory-full", "bm25", "longterm", "rome", "ft", "none", "memory-own", "lora", "ft-l")  # in a picture
TUNED = ("ft", "ft-l", "lora")  # rows of fine-tuning: the best of them is what the memory is compared with
GAINS = {"gain": "memory-full", "gain of longterm": "longterm"}  # which row is put beside all others
MAIN = ("efficacy", "generalization", "specificity")  # the paper's three, of which the score is the harmonic mean
METRICS = ("score", *MAIN, "locality", "as plain", "portability")
BEGIN = {"memory-unedited": "full", "memory-full": "full", "memory-own": "own", "longterm": "longterm"}  # else plain
SHARE, LIMIT = 4, 4_000_000_000  # of "longterm": one slot in so many is taken from what was dropped; its bytes
SCORED = 100  # edits that are measured for each T, as far as there are so many
SEGMENT = 50  # edits of a sequence between two points from which a run goes on


@dataclass(frozen=True)
class Cell(Line):
    """One number of the tables.

    Args:
        row: one of `ROWS`; of a comparison, the row that the memory is compared with.
        T: edits that were made without reset.
        metric: one of `METRICS`, or of `GAINS`: the memory's score over the row's, minus 1.
    """

    row: str
    T: int
    metric: str


class Editing(Worker):
    """A model, the edits, and the ways to make them.

    A unit is ("single", row, edit) or ("sequence", row, T, number of the sequence, segment).

    Args:
        folder: where a long sequence keeps its state between segments.
    """

    PROTOCOL, CHOSEN, OVER = "editing/2", ("edits", "rows", "sequence"), "edits"
    settings: Settings

    def __init__(self, llm: MemoryModel, data: EditSet, settings: Settings, folder: Path) -> None:
        if settings.edits > len(data.edits):
            raise ValueError(f"{data.source}: {settings.edits} edits were asked for. Ask for fewer.")
        self.llm, self.data, self.settings, self.folder = llm, data, settings, folder
        if not self.rows:
            raise ValueError(
                f"a checkpoint has no row memory-empty, and none that is called longterm if it has a long-term part of "
                f"its own (see memory-full); only a checkpoint has memory-own; got "
                f"{', '.join(settings.rows)} for {llm.name or 'this model'}. Add another row."
            )
        self._before = lru_cache(maxsize=None)(self._unedited)
        self.ways: dict[str, Editor] = {row: self._way(row) for row in self.rows}

    @property
    def rows(self) -> list[str]:
        """The rows that there are: a checkpoint has a pool of its own, which is full at birth, and no empty memory.

        What has long-term slots of its own is not measured with others.
        """
        missing = ["memory-empty"] if self.llm.born_full else ["memory-own"]
        missing += ["longterm"] if self.llm.empty().longterm is not None else []
        return [row for row in self.settings.rows if row not in missing]

    # --- units ------------------------------------------------------------------------------------------------------

    def units(self) -> list[Unit]:
        """Single edits, edit after edit, then the sequences that have one segment."""
        single: list[Unit] = [("single", row, i) for i in range(self.settings.edits) for row in self.rows]
        return [*single, *(chain[0] for chain in self._sequences() if len(chain) == 1)]

    def chains(self) -> list[list[Unit]]:
        """Sequences of several segments, each of which needs the one before it."""
        return [chain for chain in self._sequences() if len(chain) > 1]

    def _sequences(self) -> Iterator[list[Unit]]:
        there = len(self.data.edits)
        for T in sorted({min(T, there) for T in self.settings.sequence if T > 1}):
            for s in range(max(1, min(SCORED, there) // T)):
                for row in (row for row in self.rows if row in SEQUENTIAL):
                    yield [("sequence", row, T, s, k) for k in range(-(-T // SEGMENT))]

    def records(self, kind: str, *unit: Any) -> Iterator[Record]:
        yield from self._single(*unit) if kind == "single" else self._sequence(*unit)

    def _single(self, row: str, i: int) -> Iterator[Record]:
        way, edit = self.ways[row], self.data.edits[i]
        start, begun = way.start(edit.id), time.perf_counter()
        state = way.edit(start, edit)
        seconds = time.perf_counter() - begun
        facts = {"row": row, "T": 1, "sequence": i, "age": 0, "seconds": round(seconds, 3)}
        yield {**facts, **self._measured(row, state, edit)}

    def _sequence(self, row: str, T: int, s: int, segment: int) -> Iterator[Record]:
        """One segment of edits; behind the last one, the records of the whole sequence."""
        way, edits = self.ways[row], self.data.edits[s * T : (s + 1) * T]
        state = way.start(f"sequence/{T}/{s}")
        done = segment * SEGMENT
        if segment and self._kept(row, T, s, segment - 1).exists():
            state = way.load(self._kept(row, T, s, segment - 1))
        else:
            for edit in edits[:done]:  # it is not there any more: from the start
                state = way.edit(state, edit)
        for edit in edits[done : done + SEGMENT]:
            state = way.edit(state, edit)
        if done + SEGMENT < T:
            way.save(state, self._kept(row, T, s, segment))
            self._kept(row, T, s, segment - 2).unlink(missing_ok=True)  # the one before is needed if this is repeated
            return
        for i in spread(T):
            facts = {"row": row, "T": T, "sequence": s, "age": T - 1 - i}
            yield {**facts, **self._measured(row, state, edits[i])}

    def _kept(self, row: str, T: int, s: int, segment: int) -> Path:
        return self.folder / f"sequence-{row}-{T}-{s}-{segment}.safetensors"

    @property
    def title(self) -> str:
        return f"Model editing, {self.data.source}"

    def finish(self, folder: Folder, title: str, records: Sequence[Record], lines: Sequence[Any]) -> Record:
        if any(record["T"] > 1 for record in records):
            draw(lines, self.data.source, folder.path / "plot.png")
        return {"notes": []}

    def clear(self, finished: Collection[Unit]) -> None:
        """Remove the states that were kept between segments."""
        for file in self.folder.glob("sequence-*.safetensors"):
            file.unlink()

    # --- ways -------------------------------------------------------------------------------------------------------

    def _way(self, row: str) -> Editor:
        llm, data, questions = self.llm, self.data, self.data.questions
        editors: dict[str, Any] = {
            "none": lambda: Plain(llm),
            "context": lambda: InContext(llm),
            "bm25": lambda: Retrieved(llm),
            "ike": lambda: Demonstrations(llm, data),
            "memory-unedited": lambda: Unwritten(llm, lambda: self._full, self.settings.seed),
            "memory-empty": lambda: Written(llm, lambda: self._empty, self.settings.seed),
            "memory-own": lambda: Written(llm, lambda: self._empty, self.settings.seed),
            "memory-full": lambda: Written(llm, lambda: self._full, self.settings.seed),
            "longterm": lambda: Written(llm, lambda: self._longterm, self.settings.seed),
            "ft": lambda: FineTuned(llm, questions),
            "ft-l": lambda: FineTuned(llm, questions, layers=2, bound=1e-4),
            "lora": lambda: LowRank(llm, questions),
            "rome": lambda: RankOne(llm, questions, data.articles),
        }
        way: Editor = editors[row]()
        return way

    @cached_property
    def _empty(self) -> Memory:
        """A memory that holds nothing; of a checkpoint, its own pool."""
        return protocol.empty(self.llm, self.settings.memory)

    @cached_property
    def _full(self) -> Memory:
        return protocol.full(self.llm, self.settings.memory, self.data.unrelated)

    @cached_property
    def _longterm(self) -> Memory:
        longterm = LongTermSettings(self._empty.N // SHARE, limit=LIMIT)
        memory = protocol.shared(self.llm, self.settings.memory, longterm)
        return protocol.full(self.llm, memory, self.data.unrelated)

    # --- metrics ----------------------------------------------------------------------------------------------------

    def _measured(self, row: str, state: Any, edit: Edit) -> Record:
        way = self.ways[row]
        # both outside of `reading`, within which the weights work as edited
        plain, before = self._before(edit, "plain"), self._before(edit, BEGIN.get(row, "plain"))
        scores: dict[Probe, tuple[Score, ...]] = {}
        for part, probes in way.parts(state, edit.probes):
            with way.reading(part) as context:
                scores |= self._scores(context, probes)
        return {"edit": edit.id, **metrics(edit, scores, before, plain)}

    def _unedited(self, edit: Edit, begin: str) -> list[Tensor]:
        """For each unrelated prompt the most likely tokens behind the memory before all edits, or "plain"."""
        memory = {"full": lambda: self._full, "own": lambda: self._empty, "longterm": lambda: self._longterm}.get(begin)
        scores = self._scores(self.llm.context(memory()) if memory else self.llm.text_context([]), edit.probes)
        return [scores[probe][0].likeliest for probe in edit.unrelated]

    def _scores(self, context: Context, probes: Sequence[Probe]) -> dict[Probe, tuple[Score, ...]]:
        """The answer of each probe, and the other one where there is one, all in as few passes as possible."""
        asked = [(p, a) for p in dict.fromkeys(probes) for a in ([p.answer, p.other] if p.other else [p.answer])]
        kind = {"question": self.data.questions}
        ids = [prompt_ids(self.llm, p.prompt, bare=context.length > 0, **kind) for p, _ in asked]
        scores = self.llm.score_rows(context, ids, [answer_ids(self.llm, p.prompt, a, **kind) for p, a in asked])
        by_probe: dict[Probe, tuple[Score, ...]] = {}
        for (probe, _), score in zip(asked, scores, strict=True):
            by_probe[probe] = (*by_probe.get(probe, ()), score)
        return by_probe


def metrics(
    edit: Edit, scores: dict[Probe, tuple[Score, ...]], before: Sequence[Tensor], plain: Sequence[Tensor]
) -> dict[str, float]:
    """What is measured of one edit.

    Args:
        scores: of each probe its answer, and the other one where there is one.
        before: for each unrelated prompt the most likely tokens before the edit, [n] each.
        plain: the same of the plain model.

    Returns:
        efficacy, generalization, specificity: of the rewrite prompt, the rephrased ones and the unrelated ones (mean).
        Where a probe has one answer, the share of its tokens that are the most likely ones; where it has two, whether
        it is likelier per token than the other one. locality: of the unrelated prompts' answers, the share of tokens
        at which the most likely one is the same as before (EasyEdit). as plain: the same, compared with the plain
        model. portability, where there is any.

    Source: MemoryLLM section 4.2 and table 1.
    """
    kinds = {
        "efficacy": (edit.rewrite,),
        "generalization": edit.rephrased,
        "specificity": edit.unrelated,
        "portability": edit.portability,
    }
    values = {kind: _mean([_right(scores[probe]) for probe in probes]) for kind, probes in kinds.items() if probes}
    now = [scores[probe][0].likeliest for probe in edit.unrelated]
    for kind, then in (("locality", before), ("as plain", plain)):
        values[kind] = _mean([(a == b).double().mean().item() for a, b in zip(now, then, strict=True)])
    return values


def _right(scores: tuple[Score, ...]) -> float:
    """Token accuracy of one answer, or whether the first of two is the likelier one, per token."""
    if len(scores) == 1:
        return scores[0].hits.double().mean().item()
    first, other = (score.logprobs.double().mean().item() for score in scores)
    return float(first > other)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)


def spread(T: int) -> list[int]:
    """Which edits of a sequence are measured: all, or `SCORED` that lie evenly over it, the first and the last too."""
    return sorted({round(i) for i in np.linspace(0, T - 1, min(T, SCORED)).tolist()})


# --- tables ---------------------------------------------------------------------------------------------------------


def lines(records: Sequence[Record]) -> list[Cell]:
    """For every row and T each metric, and what the memory's score is over that of the other rows."""
    by: dict[tuple[int, str], list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["T"], ROWS.index(r["row"]))):
        by.setdefault((record["T"], record["row"]), []).append(record)
    cells: list[Cell] = []
    for (T, row), chosen in by.items():
        edits = [record["edit"] for record in chosen]
        columns = {m: [r[m] for r in chosen] for m in METRICS if all(m in r for r in chosen)}
        estimates = {"score": of_means(harmonic, [columns[m] for m in MAIN], edits)}
        estimates |= {metric: mean(values, edits) for metric, values in columns.items()}
        cells += [Cell(f"{row}, T = {T}, {m}", e, row, T, m) for m, e in estimates.items() if e is not None]
    for metric, ours in GAINS.items():
        for (T, row), chosen in by.items():
            gain = _gain(by[T, ours], chosen) if row != ours and (T, ours) in by else None
            cells += [] if gain is None else [Cell(f"{ours} / {row} - 1, T = {T}", gain, row, T, metric)]
    return cells


def _gain(ours: Sequence[Record], others: Sequence[Record]) -> Any:
    """The score of one row over that of another, minus 1, on the edits that both were measured with."""
    by = {record["edit"]: record for record in others}
    pairs = [(record, by[record["edit"]]) for record in ours if record["edit"] in by]
    columns = [[pair[side][m] for pair in pairs] for side in (0, 1) for m in MAIN]
    return of_means(_relative, columns, [record["edit"] for record, _ in pairs]) if pairs else None


def _relative(means: Means) -> Means:
    with np.errstate(divide="ignore", invalid="ignore"):
        gain: Means = harmonic(means[..., :3]) / harmonic(means[..., 3:]) - 1
    return gain


def markdown(cells: Sequence[Cell]) -> str:
    """The cells as Markdown tables: single edits, the memory beside each row, and sequences."""
    estimates = {(cell.T, cell.row, cell.metric): cell.estimate for cell in cells}
    parts = []
    for title, keep, key in (
        ("One edit at a time", lambda T: T == 1, "row"),
        ("Edits in sequence, without reset", lambda T: T > 1, "row, T"),
    ):
        keys = list(dict.fromkeys((c.T, c.row) for c in cells if keep(c.T) and c.metric not in GAINS))
        if not keys:
            continue
        shown = [m for m in METRICS if any((T, row, m) in estimates for T, row in keys)]
        rows = [f"| {key} | n | {' | '.join(shown)} |", f"| --- | --- | {' | '.join('---' for _ in shown)} |"]
        for T, row in keys:
            n = next((estimates[T, row, m].n for m in shown if (T, row, m) in estimates), 0)
            name = row if T == 1 else f"{row}, {T}"
            rows.append(f"| {name} | {n} | {' | '.join(_shown(estimates.get((T, row, m))) for m in shown)} |")
        parts.append("\n".join([f"## {title}\n", *rows]))
    for metric, ours in GAINS.items():
        beside = [c for c in cells if c.metric == "score" and c.row != ours and (c.T, ours, "score") in estimates]
        if not beside:
            continue
        rows = [f"| row | T | n | score of {ours} over that of the row, minus 1 |", "| --- | --- | --- | --- |"]
        for cell in beside:
            best = " (the best fine-tuning)" if cell.row == best_tuned(cells, cell.T) else ""
            gain = estimates.get((cell.T, cell.row, metric))
            said = _shown(gain) if gain or cell.estimate.mean else "its score is 0"
            rows.append(f"| {cell.row}{best} | {cell.T} | {gain.n if gain else cell.estimate.n} | {said} |")
        title = {"memory-full": "The full memory", "longterm": "The memory with a long-term part"}[ours]
        parts.append("\n".join([f"## {title} beside the other rows, paired by edit\n", *rows]))
    return "\n\n".join(parts) + "\n"


def draw(cells: Sequence[Cell], source: str, path: Path) -> None:
    """Draw what each row does over the number of edits without reset into a PNG."""
    estimates = {(cell.T, cell.row, cell.metric): cell.estimate for cell in cells}
    steps = sorted({cell.T for cell in cells})
    rows = {row for _, row, _ in estimates if any((T, row, "score") in estimates for T in steps if T > 1)}
    curves: dict[str, plots.Curves] = {
        metric: {row: [(T, estimates.get((T, row, metric))) for T in steps if row in rows] for row in SHOWN}
        for metric in ("score", "efficacy", "specificity", "locality")
    }
    plots.panels(curves, "edits without reset", f"Edits in sequence, {source}", path, ticks=steps)


def best_tuned(cells: Sequence[Cell], T: int) -> str | None:
    """The row of fine-tuning with the highest score."""
    scores = {c.row: c.estimate.mean for c in cells if c.T == T and c.metric == "score" and c.row in TUNED}
    return max(scores, key=lambda row: scores[row]) if scores else None


def _shown(estimate: Any) -> str:
    return "" if estimate is None else f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def measure(llm: MemoryModel, data: EditSet, settings: Settings, out: Path, **how: Unpack[RunOptions]) -> list[Cell]:
    """Run the protocol, or go on with it; arguments as in `protocol.measure`.

    A folder is about one set and one model; more edits, rows and sequences are added to it. With sequences it also gets
    plot.png.

    Raises:
        ValueError: more edits than there are, a row that this model can not have, or as in `protocol.measure`.
    """
    plots.require()
    about = {"source": data.source, "sha256": data.identity, "ids": [edit.id for edit in data.edits]}
    worker, args = Editing(llm, data, settings, out), (data, settings, out)
    return protocol.measure(worker, lines, out, data=about, args=args, table=markdown, **how)
