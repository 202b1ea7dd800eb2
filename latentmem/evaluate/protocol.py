"""What all protocols share: a memory that is full at first, the run, and its table."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypedDict, TypeVar, Unpack

import torch

from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.disk import replace_bytes
from latentmem.evaluate import runner
from latentmem.evaluate.asking import written
from latentmem.evaluate.settings import Settings
from latentmem.evaluate.stats import Estimate, perplexity
from latentmem.model.model import MemoryModel

Record = runner.Record
Unit = runner.Unit


class EnoughError(Exception):
    """The time of a run, for example, is used up: its result is all that is finished."""


class RunOptions(TypedDict, total=False):
    """How a protocol is run, whichever it is.

    Args:
        command: what was typed, for the record.
        workers: processes; more than 1 needs `loading`.
        loading: arguments of `latentmem.load` that give the same model again, for other processes.
        progress: called with (units done, units in all); may raise `EnoughError`.
    """

    command: str
    workers: int
    loading: dict[str, Any] | None
    progress: runner.Progress


@dataclass(frozen=True)
class Line:
    """One number with its interval."""

    name: str
    estimate: Estimate

    def as_json(self) -> Any:
        return [self.name, self.estimate.as_json()]


class AsJson(Protocol):
    """A line of any table."""

    def as_json(self) -> Any: ...


Numbers = Iterator[tuple[str, Estimate | None]]  # with their names
AnyLine = TypeVar("AnyLine", bound=AsJson)


def as_lines(numbers: Callable[[Sequence[Record]], Numbers]) -> Callable[[Sequence[Record]], list[Line]]:
    """The lines of a table, of a function that gives numbers by name; what has no interval has no line."""

    @wraps(numbers)
    def lines(records: Sequence[Record]) -> list[Line]:
        return [Line(name, estimate) for name, estimate in numbers(records) if estimate is not None]

    return lines


def perplexities(read: Mapping[str, Mapping[str, Record]]) -> Numbers:
    """The perplexity in each state, and over that of the state "plain": records {nll, tokens} by text."""
    for state, cell in read.items():
        yield f"perplexity, {state}", perplexity(cell)
    for state, cell in read.items():
        if state != "plain":
            yield f"perplexity, {state} / plain", perplexity(cell, read["plain"])


def empty(llm: MemoryModel, memory: MemorySettings) -> Memory:
    """An empty memory; of a checkpoint, the checkpoint's own pool."""
    return llm.empty(settings=replace(memory, N=None, K=None) if llm.born_full else memory)


def zeros(llm: MemoryModel, memory: Memory) -> Memory:
    """As many slots, all of them zero: what a memory does by being there. They are hidden states in every form."""
    if not memory.settings.by_update:
        return replace(memory, slots=torch.zeros_like(memory.slots))
    slots = torch.zeros(memory.L, memory.M, llm.decoder.d, dtype=llm.decoder.dtype, device=llm.decoder.device)
    exact = replace(memory.settings, form="exact", longterm=None)
    return replace(memory, slots=slots, settings=exact, coder="", written={}, longterm=None)


def shared(llm: MemoryModel, memory: MemorySettings, longterm: LongTermSettings) -> MemorySettings:
    """The settings of a memory whose N slots include the R that a question takes of what was dropped.

    A checkpoint has the R slots beside its own N. One update reads the same piece with and without a long-term part.
    """
    whole = empty(llm, memory)
    N = whole.N if llm.born_full else whole.N - longterm.R
    return replace(memory, N=N, K=min(whole.K, N), longterm=longterm)


def full(llm: MemoryModel, memory: MemorySettings, unrelated: Iterable[str], share: float = 1.0) -> Memory:
    """A memory into which unrelated texts were written until it was full and nothing of its first slots was left over.

    Args:
        unrelated: texts, in the order in which they are written; as many as it takes.
        share: of N, the slots that are filled; the last text of a memory that is not to be full is cut.

    Raises:
        ValueError: too few unrelated texts.
    """
    now, count = empty(llm, memory), 0
    wanted = round(share * now.N)
    texts = iter(unrelated)
    while wanted > now.M or (share == 1 and count < now.N):
        text = next(texts, None)
        if text is None:
            raise ValueError(
                f"there are too few unrelated texts to fill {wanted} slots: they filled {now.M}. Choose a smaller "
                f"capacity."
            )
        ids, before = written(llm, text), now.updates
        now = llm.write_ids(now, ids if share == 1 else ids[: (wanted - now.M) * now.compression], "unrelated")
        count += (now.updates - before) * now.K
    return now


class Worker:
    """A protocol at work on one model; each process makes its own.

    A protocol gives `units` and `records`, and `chains` where a unit needs the one before it.
    """

    PROTOCOL: ClassVar[str]  # name/version; another version where records of before and after can not be in one table
    TITLE: ClassVar[str]
    CHOSEN: ClassVar[tuple[str, ...]] = ()  # settings that choose units and change none: a later run may add to them
    OVER: ClassVar[str] = "texts"  # drawn anew for the intervals
    llm: MemoryModel
    settings: Settings

    def units(self) -> list[Unit]:
        """Units that stand by themselves, in the order of work."""
        return []

    def chains(self) -> list[list[Unit]]:
        """Units of which each needs the one before it in its chain."""
        return []

    def records(self, *unit: Any) -> Iterator[Record]:
        """Do one unit of work: records of ids and numbers."""
        raise NotImplementedError

    def run(self, unit: Unit) -> list[Record]:
        """Do one unit of work and return its records."""
        return list(self.records(*unit))

    @property
    def title(self) -> str:
        """The heading of the table."""
        return self.TITLE

    def about_model(self) -> dict[str, Any]:
        """Which model is measured, as JSON."""
        llm = self.llm
        adapters = llm.adapters.identity if llm.adapters else ""
        return {"name": llm.name, "sha256": llm.identity, "adapters": adapters, "dtype": str(llm.decoder.dtype)[6:]}

    def about_settings(self) -> dict[str, Any]:
        """The settings as JSON, without those to which a later run may add."""
        values = {name: value for name, value in asdict(self.settings).items() if name not in self.CHOSEN}
        return {**values, "memory": asdict(empty(self.llm, self.settings.memory).settings)}

    def finish(self, folder: runner.Folder, title: str, records: Sequence[Record], lines: Sequence[Any]) -> Record:
        """Write more files than table.md and summary.json; more of summary.json: its notes stand over the table."""
        return {"notes": []}

    def clear(self, finished: Collection[Unit]) -> None:
        """Remove files that only an unfinished run needs."""


def measure(
    worker: Worker,
    lines: Callable[[Sequence[Record]], list[AnyLine]],
    out: Path,
    *,
    data: dict[str, Any],
    args: Sequence[Any],
    table: Callable[[Any], str] | None = None,
    **how: Unpack[RunOptions],
) -> list[AnyLine]:
    """Run a protocol, or go on with it, and write table.md and summary.json.

    Args:
        worker: does the work in this process.
        lines: of all records, those of the table.
        out: the run's folder; also gets config.json and records.jsonl.
        data: what is asked about, as JSON.
        args: what another process makes its own worker of, behind the model.
        table: the lines as Markdown; by default `markdown`.

    Raises:
        KeyboardInterrupt: stopped; the results then show what was finished, and the next run goes on from there.
        ValueError: the folder holds another run or is in use.
    """
    workers, loading = how.get("workers", 1), how.get("loading")
    if workers > 1 and loading is None:
        raise ValueError("more than one worker needs `loading`, the arguments with which they load the model.")
    about = {"model": worker.about_model(), "data": data, "settings": worker.about_settings()}
    folder = runner.Folder(out, {"protocol": worker.PROTOCOL, **about})
    finish = partial(_finish, folder, worker, lines, table or markdown)
    with folder.working(runner.this_run(how.get("command", ""))):
        try:
            with suppress(EnoughError):
                progress = how.get("progress") or (lambda done, total: None)
                runner.run(folder, worker, _worker, (type(worker), loading, args), workers, progress)
        except KeyboardInterrupt:
            finish(complete=False)
            raise
        worker.clear(folder.done())
        return finish(complete=True)


def _worker(kind: Callable[..., Worker], loading: dict[str, Any], args: Sequence[Any]) -> Worker:
    """The worker of another process."""
    from latentmem.loading.load import load

    return kind(load(**loading), *args)


def _finish(
    folder: runner.Folder,
    worker: Worker,
    lines: Callable[[Sequence[Record]], list[AnyLine]],
    table: Callable[[Any], str],
    complete: bool,
) -> list[AnyLine]:
    """Write the results; a run that was stopped before it has a line leaves none."""
    title = worker.title if complete else f"{worker.title}, stopped before its end"
    records = folder.all_records()
    table_lines = lines(records)
    more = worker.finish(folder, title, records, table_lines)
    if not complete and not table_lines:
        return []
    config, notes = folder.config, more["notes"]
    values = {**config["settings"]["memory"], **config["settings"]}
    if isinstance(values.get("longterm"), dict):
        values |= {f"longterm {name}": value for name, value in values.pop("longterm").items()}
    shown = ", ".join(f"{key} = {value}" for key, value in values.items() if key != "memory" and value is not None)
    about = f"{folder.runs[-1]['started'][:10]}. {config['model']['name']}, adapters "
    about += f"{config['model']['adapters'] or 'none'}, {config['model']['dtype']}; {shown}. "
    about += f"Intervals: 95%, bootstrap over {worker.OVER}."
    about += "\n\n" * bool(notes) + "\n".join(f"- {note}" for note in notes)
    summary = {"title": title, **config, "runs": folder.runs, **more, "lines": [line.as_json() for line in table_lines]}
    replace_bytes(folder.path / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    commands = "\n".join(dict.fromkeys(run["command"] for run in folder.runs))
    replace_bytes(folder.path / "table.md", f"# {title}\n\n```\n{commands}\n```\n\n{about}\n\n{table(table_lines)}")
    return table_lines


def markdown(lines: Sequence[Line]) -> str:
    """The lines as a Markdown table."""
    rows = ["| | n (texts) | mean [95% interval] |", "| --- | --- | --- |"]
    for line in lines:
        e = line.estimate
        rows.append(f"| {line.name} | {e.n} ({e.texts}) | {e.mean:.3f} [{e.low:.3f}, {e.high:.3f}] |")
    return "\n".join(rows) + "\n"


def one_page(folder: Path, names: Sequence[str]) -> Path | None:
    """Put the tables of several runs, which lie in folders of these names, on one page; None if there are no tables."""
    tables = {name: folder / name / "table.md" for name in names}
    parts = [f"<!-- {name} -->\n\n{path.read_text(encoding='utf-8')}" for name, path in tables.items() if path.exists()]
    if not parts:
        return None
    replace_bytes(folder / "results.md", "\n".join(parts))
    return folder / "results.md"
