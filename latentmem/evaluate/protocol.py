"""What all protocols share: a memory that is full at first, the run, and its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.evaluate import runner
from latentmem.evaluate.asking import written
from latentmem.evaluate.settings import Settings
from latentmem.evaluate.stats import Estimate, perplexity
from latentmem.evaluate.tables import results
from latentmem.model.model import MemoryModel

Record = runner.Record


class EnoughError(Exception):
    """What was asked for, such as the time of a run, is used up: what is finished is the result."""


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


Numbers = Iterator[tuple[str, Estimate | None]]  # with their names
AnyLine = TypeVar("AnyLine", bound=Line)
Result = TypeVar("Result")


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


def asked(llm: MemoryModel, settings: Settings, chosen: Sequence[str]) -> dict[str, Any]:
    """Settings as JSON: what a folder is about.

    Args:
        chosen: settings that choose units and change none: a later run may add to them in the same folder.
    """
    values = {name: value for name, value in asdict(settings).items() if name not in chosen}
    return {**values, "memory": asdict(empty(llm, settings.memory).settings)}


def carry_out(
    protocol: str,
    llm: MemoryModel,
    worker: runner.Worker,
    about: dict[str, Any],
    finish: Callable[[runner.Folder, bool], Result],
    out: Path,
    *,
    args: Sequence[Any] = (),
    command: str = "",
    workers: int = 1,
    loading: dict[str, Any] | None = None,
    progress: runner.Progress = lambda done, total: None,
) -> Result:
    """Run a protocol, or go on with it, and write its results.

    Args:
        protocol: its name and version, such as "effects/1".
        worker: does the work in this process.
        about: settings and data, as JSON: what a folder is about; "model" is added where it is not there.
        finish: given the folder and whether the run is complete, writes the results and returns them.
        out: gets config.json and records.jsonl.
        args: what another process makes its own worker of, behind the model.
        command, workers, loading, progress: as in `RunOptions`.

    Raises:
        KeyboardInterrupt: stopped; the results then show what was finished, and the next run goes on from there.
        ValueError: the folder holds another run or is in use.
    """
    if workers > 1 and loading is None:
        raise ValueError("more than one worker needs `loading`, the arguments with which they load the model.")
    folder = runner.Folder(out, {"protocol": protocol, "model": model(llm), **about})
    with folder.working(results.this_run(command)):
        try:
            with suppress(EnoughError):
                runner.run(folder, worker, _made, (type(worker), loading, args), workers, progress)
        except KeyboardInterrupt:
            finish(folder, False)
            raise
        return finish(folder, True)


def measure(
    protocol: str,
    llm: MemoryModel,
    worker: runner.Worker,
    data: dict[str, Any],
    settings: Settings,
    lines: Callable[[Sequence[Record]], list[AnyLine]],
    out: Path,
    *,
    title: str,
    chosen: Sequence[str] = (),
    args: Sequence[Any] = (),
    after: Callable[[Sequence[Record], Path], list[str]] | None = None,
    table: Callable[[Sequence[AnyLine]], str] | None = None,
    over: str = "texts",
    **how: Unpack[RunOptions],
) -> list[AnyLine]:
    """`carry_out` a protocol whose results are table.md and summary.json.

    Args:
        data: what is asked about, as JSON.
        chosen: as of `asked`.
        lines: of all records, those of the table.
        after: given all records and the folder, writes more files and returns sentences to stand over the table.
        table: the lines as Markdown; by default `markdown`.
        over: what is drawn anew for the intervals, in words.
    """

    def finish(folder: runner.Folder, complete: bool) -> list[AnyLine]:
        heading = title if complete else f"{title}, stopped before its end"
        return _write(folder, lines, heading, after, table or markdown, over)

    about = {"data": data, "settings": asked(llm, settings, chosen)}
    return carry_out(protocol, llm, worker, about, finish, out, args=args, **how)


def model(llm: MemoryModel) -> dict[str, Any]:
    """What says which model was measured."""
    return {
        "name": llm.name,
        "sha256": llm.identity,
        "adapters": llm.adapters.identity if llm.adapters else "",
        "dtype": str(llm.decoder.dtype)[6:],
    }


def _made(kind: Callable[..., runner.Worker], loading: dict[str, Any], args: Sequence[Any]) -> runner.Worker:
    """The worker of another process."""
    from latentmem.loading.load import load

    return kind(load(**loading), *args)


def _write(
    folder: runner.Folder,
    lines: Callable[[Sequence[Record]], list[AnyLine]],
    title: str,
    after: Callable[[Sequence[Record], Path], list[str]] | None,
    table: Callable[[Sequence[AnyLine]], str],
    over: str,
) -> list[AnyLine]:
    records = [record for unit in folder.done().values() for record in unit]
    table_lines, notes = lines(records), after(records, folder.path) if after else []
    config = folder.config
    values = {**config["settings"]["memory"], **config["settings"]}
    shown = ", ".join(f"{key} = {value}" for key, value in values.items() if key != "memory" and value is not None)
    about = f"{folder.runs[-1]['started'][:10]}. {config['model']['name']}, adapters "
    about += f"{config['model']['adapters'] or 'none'}, {config['model']['dtype']}; {shown}. "
    about += f"Intervals: 95%, bootstrap over {over}."
    about += "\n\n" * bool(notes) + "\n".join(f"- {note}" for note in notes)
    more = {"notes": notes, "lines": [[line.name, line.estimate.as_json()] for line in table_lines]}
    results.save(folder, title, about, table(table_lines), more)
    return table_lines


def markdown(lines: Sequence[Line]) -> str:
    """The lines as a Markdown table."""
    rows = ["| | n (texts) | mean [95% interval] |", "| --- | --- | --- |"]
    for line in lines:
        e = line.estimate
        rows.append(f"| {line.name} | {e.n} ({e.texts}) | {e.mean:.3f} [{e.low:.3f}, {e.high:.3f}] |")
    return "\n".join(rows) + "\n"
