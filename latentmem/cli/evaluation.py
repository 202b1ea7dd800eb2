"""`latentmem eval`: a command for each protocol, and lm-evaluation-harness."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentmem.cli import base, printing
from latentmem.cli.base import PACKAGED, Adapters, Device, app

if TYPE_CHECKING:
    from latentmem.core.settings import MemorySettings
    from latentmem.model.model import MemoryModel

evaluation = typer.Typer(help="Measure a memory: its curves, beside what else could be done.", no_args_is_help=True)
app.add_typer(evaluation, name="eval", rich_help_panel="Training and measuring")

ALL_STEPS = "0,1,2,5,10,20,50"
Compression = Annotated[
    int | None, typer.Option(min=1, help="Tokens per slot.", show_default="as the adapters were trained, else 1")
]
Choice = Annotated[
    str | None,
    typer.Option(
        help="Which token becomes a slot: last, surprise.", show_default="as the adapters were trained, else last"
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="all cores on a CPU, 1 on a GPU")]
Model = Annotated[str, typer.Option("--model", help="smollm2-135m, a folder, a .gguf file or a hub id.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same one goes on with it.")]
Capacity = Annotated[int, typer.Option("--capacity", "-N", help="Slots per layer; a checkpoint has its own.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn and of every drop.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32 or float16.")]


@dataclass(frozen=True)
class Shared:
    """The options of every protocol that measures one kind of memory, and what follows from them; see `measures`."""

    out: Out
    capacity: Capacity = 2048
    compression: Compression = None
    choice: Choice = None
    seed: Seed = 0
    workers: Workers = None
    dtype: Dtype = "bfloat16"
    model: Model = PACKAGED
    device: Device = None
    adapters: Adapters = "auto"

    @cached_property
    def loaded(self) -> tuple[MemoryModel, dict[str, Any]]:
        """The model, and the arguments that give it again in another process."""
        return _loaded(self.model, self.dtype, self.device, self.adapters)

    @property
    def memory(self) -> MemorySettings:
        """Settings of the memory that is measured."""
        from latentmem.core.settings import MemorySettings

        return MemorySettings(self.capacity, compression=self.compression, choice=self.choice, seed=self.seed)

    def tokens(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.loaded[0].prompts_or_raise().text(text))

    def measured(self, name: str, measure: Callable[..., Any], *args: Any, table: Any = None, **more: Any) -> None:
        """Run a protocol's `measure(llm, *args, out, **more)` with a bar of progress, and print its table."""
        from latentmem.evaluate import protocol, runner

        llm, loading = self.loaded
        with _stoppable(self.out), printing.progress("units", seconds=600) as progress:
            task = progress.add_task(name, total=None)
            found = measure(
                llm,
                *args,
                self.out,
                **more,
                command=_command(),
                workers=self.workers or (runner.cores() if llm.decoder.device.type == "cpu" else 1),
                loading=loading,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        for note in json.loads((self.out / "summary.json").read_text(encoding="utf-8"))["notes"]:
            typer.echo(note)
        typer.echo((table or protocol.markdown)(found))


def measures(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command line of a protocol the fields of `Shared` in the place of its first parameter."""
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    out, *others = inspect.signature(Shared, eval_str=True).parameters.values()
    options = inspect.Signature([out, *own, *others], return_annotation=None)

    @wraps(command)
    def called(**given: Any) -> None:
        bound = options.bind(**given)
        bound.apply_defaults()
        shared = Shared(**{option.name: bound.arguments.pop(option.name) for option in (out, *others)})
        command(shared, **bound.arguments)

    called.__signature__ = options  # type: ignore[attr-defined]
    return called


@evaluation.command()
def retention(
    out: Out,
    data: Annotated[str, typer.Option(help="squad, nq or synthetic.")] = "synthetic",
    questions: Annotated[int, typer.Option(min=1, help="How many questions.")] = 200,
    per_text: Annotated[int | None, typer.Option(min=1, help="Questions of each text [5; nq 1].")] = None,
    steps: Annotated[str, typer.Option(help="Texts written in between, by which to ask.")] = ALL_STEPS,
    capacity: Annotated[
        str, typer.Option("--capacity", "-N", help="Slots per layer; a checkpoint has its own.")
    ] = "1024,2048",
    fill: Annotated[str, typer.Option(help="The memory before the text: full, empty.")] = "full,empty",
    rows: Annotated[str, typer.Option(help="What is measured.")] = "floor,dead,oracle,window,bm25,ours",
    per_update: Annotated[int, typer.Option("--per-update", "-K", help="Slots that one update may write.")] = 512,
    compression: Compression = None,
    choice: Choice = None,
    longterm: Annotated[
        int, typer.Option(min=0, help="Slots that a question takes of what was dropped; 0: it is lost.")
    ] = 0,
    longterm_limit: Annotated[int, typer.Option(min=0, help="Bytes of what was dropped.")] = 1 << 30,
    group: Annotated[str, typer.Option(help="What is retrieved together: update, slot.")] = "update",
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in which an answer has to come [10; synthetic 20].")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="One stream for all steps, not only above 50.")] = False,
    seed: Annotated[int, typer.Option(help="Of the drawn questions and of every drop.")] = 0,
    workers: Workers = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float32 or float16.", show_default="bfloat16; float32 with --quantize"),
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="int8: linear layers in 8 bits, on a CPU.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small run of minutes: 50 questions, N = 1024.")] = False,
    model: Model = PACKAGED,
    device: Device = None,
    adapters: Adapters = "auto",
) -> None:
    """How much is still known of a text after others were written, beside floor, oracle, window and BM25."""
    import latentmem
    from latentmem.core.settings import LongTermSettings, MemorySettings
    from latentmem.evaluate import runner
    from latentmem.evaluate.asking import NEW_TOKENS
    from latentmem.evaluate.data import questions as sets
    from latentmem.evaluate.protocols.retention import Settings, measure
    from latentmem.evaluate.tables.summary import terminal

    if quick:
        if (questions, steps, capacity) != (200, ALL_STEPS, "1024,2048"):
            raise ValueError("--quick chooses --questions, --steps and --capacity itself: leave it or them out.")
        questions, steps, capacity = 50, "0,1,5,20", "1024"
    per_text = per_text or (1 if data == "nq" else 5)
    kind = dtype or ("float32" if quantize else "bfloat16")
    loading: dict[str, Any] = {"name": model, "dtype": kind, "device": device, "quantize": quantize}
    loading["adapters"] = base.pair(adapters)
    llm = latentmem.load(**loading)
    kept = {"limit": longterm_limit} if longterm_limit else {"keep": False}
    archive = LongTermSettings(longterm, group=group, **kept) if longterm else None
    settings = Settings(
        MemorySettings(None, per_update, compression=compression, choice=choice, seed=seed, longterm=archive),
        steps=_numbers("--steps", steps),
        capacities=_numbers("--capacity", capacity),
        fills=tuple(fill.split(",")),
        rows=tuple(rows.split(",")),
        new_tokens=new_tokens or (20 if data == "synthetic" else NEW_TOKENS),
        stream=stream,
    )
    prompts = llm.prompts_or_raise()
    drawn: dict[str, Any] = {"questions": questions, "per_text": per_text, "seed": seed}
    chosen = sets.load(data, lambda text: len(prompts.text(text)), **drawn)
    count = workers or (runner.cores() if llm.decoder.device.type == "cpu" else 1)
    with _stoppable(out), printing.progress("units", seconds=3600) as progress:
        task = progress.add_task(f"retention on {data}", total=None)
        lines = measure(
            llm,
            chosen,
            settings,
            out,
            command=_command(),
            drawn=drawn,
            workers=count,
            loading=loading,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for title, table in terminal(lines):
        typer.echo(f"\n{title}")
        printing.show(table)
    typer.echo(f"\nAll tables, the plot and the page are in {out}: table.md, plot.png, report.html, summary.json")


@evaluation.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="name=folder of each run; the first is what others gain over.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for compare.md, compare.json and compare.png.")],
    capacity: Annotated[
        int, typer.Option("--capacity", "-N", help="Slots per layer that an answer sees, retrieved ones included.")
    ] = 2048,
    stream: Annotated[bool, typer.Option("--stream", help="What was asked in streams.")] = False,
) -> None:
    """Retention runs side by side: untrained and trained, other presets, other compressions."""
    from latentmem.evaluate.tables import compare as protocol

    pairs = [run.partition("=") for run in runs]
    if not all(name and folder for name, _, folder in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError(f"runs are given as name=folder with different names, got {' '.join(runs)}.")
    found = protocol.write({name: Path(folder) for name, _, folder in pairs}, capacity, out, _command(), stream=stream)
    typer.echo(protocol.markdown([line for line in found if line.metric == "accuracy"]))


@evaluation.command()
@measures
def effects(
    shared: Shared,
    texts: Annotated[int, typer.Option(min=2, help="Articles to read, and paragraphs to ask about.")] = 100,
) -> None:
    """What a memory changes beside remembering: the perplexity of other text, and saying "I don't know"."""
    from latentmem.evaluate.data import questions as sets
    from latentmem.evaluate.protocols import effects as asked

    chosen = sets.load("squad", shared.tokens, questions=4 * texts, per_text=4, seed=shared.seed)
    settings = asked.Settings(shared.memory, texts=texts)
    shared.measured("effects", asked.measure, chosen, settings)


@evaluation.command()
@measures
def editing(
    shared: Shared,
    data: Annotated[str, typer.Option(help="zsre or counterfact.")] = "zsre",
    edits: Annotated[int, typer.Option(min=2, help="Edits that are made one at a time.")] = 200,
    rows: Annotated[
        str, typer.Option(help="What is measured; bm25 and longterm too, for sequences.")
    ] = "none,context,memory-unedited,memory-empty,memory-own,memory-full,ft,ft-l,lora,ike,rome",
    sequence: Annotated[
        str, typer.Option(help="Edits that are made without reset in between, such as 1,10,100,1000.")
    ] = "1",
    file: Annotated[
        Path | None,
        typer.Option(
            help="The paper's zsre_mend_eval.json or counterfact.json.", show_default="of LATENTMEM_DATA, or the hub"
        ),
    ] = None,
) -> None:
    """Facts that are changed: by a memory, and by fine-tuning, LoRA, demonstrations and rank-one edits."""
    from latentmem.evaluate.data import edits as sets
    from latentmem.evaluate.protocols import editing as asked

    settings = asked.Settings(edits=edits, rows=tuple(rows.split(",")), sequence=_numbers("--sequence", sequence))
    chosen = sets.load(data, seed=shared.seed, file=file)
    shared.measured("editing", asked.measure, chosen, replace(settings, memory=shared.memory), table=asked.markdown)


@evaluation.command()
@measures
def integrity(
    shared: Shared,
    updates: Annotated[int, typer.Option(min=1, help="Facts that are written, a multiple of --stretch.")] = 20_000,
    ft_updates: Annotated[int, typer.Option(min=1, help="Facts to fine-tune on, a multiple of --stretch.")] = 2_000,
    rows: Annotated[str, typer.Option(help="What is measured: memory, ft.")] = "memory,ft",
    minutes: Annotated[
        float | None, typer.Option(min=0, help="After which no stretch is begun.", show_default="no limit")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Facts of which one is asked.")] = 100,
    age: Annotated[int, typer.Option(min=1, help="Facts written since, when a fact is asked once more.")] = 50,
    stretch: Annotated[int, typer.Option(min=1, help="Facts between which memory and weights are kept.")] = 200,
    checkpoint: Annotated[int, typer.Option(min=1, help="Facts between which other text is read.")] = 1_000,
    texts: Annotated[int, typer.Option(min=2, help="Articles to read at a checkpoint.")] = 8,
    pairs: Annotated[int, typer.Option(min=0, help="BLiMP pairs of a checkpoint; 0: none.")] = 134,
    role: Annotated[str, typer.Option(help="How a fact is written: raw, user, system, style (the model's).")] = "raw",
    lr: Annotated[float, typer.Option(help="Learning rate of the fine-tuning.")] = 2e-5,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps on each fact.")] = 1,
) -> None:
    """What an endless stream of facts does to a memory, and to a model that is fine-tuned on it instead."""
    from latentmem.evaluate.protocols import integrity as asked

    settings = asked.Settings(
        shared.memory,
        rows=tuple(rows.split(",")),
        updates=updates,
        ft_updates=ft_updates,
        every=every,
        age=age,
        stretch=stretch,
        checkpoint=checkpoint,
        texts=texts,
        pairs=pairs,
        role=None if role == "style" else role,
        lr=lr,
        steps=steps,
    )
    shared.measured("integrity", asked.measure, settings, minutes=minutes)


@evaluation.command()
@measures
def forget(
    shared: Shared,
    texts: Annotated[int, typer.Option(min=2, help="Texts that are forgotten, one by one.")] = 50,
    per_text: Annotated[int, typer.Option(min=1, help="Questions about each.")] = 4,
    data: Annotated[str, typer.Option(help="squad, nq or synthetic.")] = "squad",
    behind: Annotated[int, typer.Option(min=1, help="Other texts that are written behind it.")] = 3,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in which an answer has to come [10; synthetic 20].")
    ] = None,
) -> None:
    """What is still known of a text that was forgotten on request, in both ways, and what it costs the others."""
    from latentmem.evaluate.asking import NEW_TOKENS
    from latentmem.evaluate.data import questions as sets
    from latentmem.evaluate.protocols import forget as asked

    count = per_text * texts
    chosen = sets.load(data, shared.tokens, questions=count, per_text=per_text, seed=shared.seed)
    new = new_tokens or (20 if data == "synthetic" else NEW_TOKENS)
    settings = asked.Settings(shared.memory, behind=behind, new_tokens=new)
    shared.measured("forget", asked.measure, chosen, settings)


@evaluation.command()
@measures
def ability(
    shared: Shared,
    texts: Annotated[int, typer.Option(min=0, help="Held-out articles.")] = 50,
    blimp: Annotated[int, typer.Option(min=0, help="BLiMP pairs.")] = 670,
    piqa: Annotated[int, typer.Option(min=0, help="PIQA items.")] = 400,
    mmlu: Annotated[int, typer.Option(min=0, help="MMLU items.")] = 285,
) -> None:
    """What a memory of unrelated texts costs what the model could do before: perplexity, BLiMP, PIQA, MMLU."""
    from latentmem.evaluate.data import choices
    from latentmem.evaluate.data import questions as sets
    from latentmem.evaluate.protocols import ability as asked

    counts = {"blimp": blimp, "piqa": piqa, "mmlu": mmlu}
    settings = asked.Settings(shared.memory, texts=texts, blimp=blimp, piqa=piqa, mmlu=mmlu)
    found = [choices.load(name, count, shared.seed) for name, count in counts.items() if count]
    filler = sets.load("squad", shared.tokens, questions=1, per_text=1, seed=shared.seed).unrelated
    shared.measured("ability", asked.measure, found, filler, settings)


@evaluation.command()
@measures
def conversations(
    shared: Shared,
    questions: Annotated[int, typer.Option(min=1, help="Of each dialogue, at most.")] = 100,
    rows: Annotated[str, typer.Option(help="What is measured.")] = "floor,window,bm25,memory,longterm",
    longterm: Annotated[int, typer.Option(min=1, help="Of the N slots, the long-term ones of that row.")] = 512,
    passages: Annotated[int, typer.Option(min=1, help="Turns that BM25 retrieves.")] = 10,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    file: Annotated[Path | None, typer.Option(help="LoCoMo's locomo10.json.", show_default="of LATENTMEM_DATA")] = None,
) -> None:
    """Long conversations, written turn by turn and asked about at their end (LoCoMo), by category."""
    from latentmem.evaluate.protocols import conversations as asked

    data = asked.load(questions, shared.seed, file)
    chosen = tuple(rows.split(","))
    settings = asked.Settings(shared.memory, rows=chosen, longterm=longterm, passages=passages, new_tokens=new_tokens)
    shared.measured("conversations", asked.measure, data, settings)


@evaluation.command()
@measures
def longbench(
    shared: Shared,
    data: Annotated[
        str, typer.Option(help="altqa, babi, narrativeqa, qasper, multifieldqa_en, hotpotqa, 2wikimqa, musique.")
    ] = "altqa,babi",
    examples: Annotated[int, typer.Option(min=1, help="Of each set, at most.")] = 100,
    rows: Annotated[str, typer.Option(help="What is measured.")] = "floor,oracle,window,bm25,memory",
    length: Annotated[
        int, typer.Option(min=512, help="Tokens of a LongBench text that are kept, from its end.")
    ] = 16_384,
    passages: Annotated[int, typer.Option(min=1, help="Passages that BM25 retrieves.")] = 5,
) -> None:
    """Questions about one long text, beside the text in the context, its end, and BM25."""
    from latentmem.evaluate.protocols import longbench as asked

    sets = [asked.load(name, examples, shared.seed) for name in data.split(",")]
    chosen = tuple(rows.split(","))
    settings = asked.Settings(shared.memory, rows=chosen, length=length, passages=passages)
    shared.measured("longbench", asked.measure, sets, settings)


@evaluation.command()
def harness(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results.json.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, with commas in between.")],
    memory: Annotated[
        Path | None,
        typer.Option(help="Snapshot of a memory that stands in front.", show_default="none: the plain model"),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write long prompts into a memory, all but their end.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
    length: Annotated[int, typer.Option(min=512, help="Tokens of a prompt that are kept, from its end.")] = 16_384,
    capacity: Annotated[int | None, typer.Option("--capacity", "-N", help="Slots per layer, with --write.")] = None,
    dtype: Dtype = "bfloat16",
    model: Model = PACKAGED,
    device: Device = None,
    adapters: Adapters = "auto",
) -> None:
    """Tasks of lm-evaluation-harness, with its own scorers, behind a memory."""
    try:
        from latentmem.evaluate.protocols import harness as asked
    except ImportError as error:
        raise ValueError(str(error)) from None

    llm, _ = _loaded(model, dtype, device, adapters)
    lm = asked.HarnessLM(llm, str(memory) if memory else None, write=write, max_length=length, N=capacity)
    for task, metrics in asked.evaluate(lm, tasks.split(","), out, limit=limit).items():
        numbers = (f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        typer.echo(f"{task}: {', '.join(numbers)}")


@evaluation.command(name="all")
def everything(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of all runs; the same one goes on with them.")],
    only: Annotated[
        str, typer.Option(help="Some of them.")
    ] = "retention,effects,zsre,counterfact,integrity,forget,ability,conversations,longbench",
    workers: Workers = None,
    model: Model = PACKAGED,
    device: Device = None,
    adapters: Adapters = "auto",
) -> None:
    """Every protocol with its own defaults, one after the other, and one page of all tables: hours on two cores."""
    from latentmem.evaluate.tables.results import one_page

    ways: dict[str, Any] = {"workers": workers, "model": model, "device": device, "adapters": adapters}
    runs: dict[str, Callable[..., None]] = {
        "retention": partial(retention, data="squad"),
        "effects": effects,
        "zsre": partial(editing, data="zsre"),
        "counterfact": partial(editing, data="counterfact"),
        "integrity": integrity,
        "forget": forget,
        "ability": ability,
        "conversations": conversations,
        "longbench": longbench,
    }
    chosen = only.split(",")
    unknown = [name for name in chosen if name not in runs]
    if unknown:
        raise ValueError(f"--only takes some of {', '.join(runs)}; got {', '.join(unknown)}.")
    failed: dict[str, str] = {}
    for name in chosen:
        printing.error(f"{name}: into {out / name}")
        try:
            runs[name](out=out / name, **ways)
        except ValueError as error:  # of this one, such as a data set that is not there; the others do not need it
            failed[name] = str(error)
            printing.error(f"{name}: {error}")
    page = one_page(out, chosen)
    if page is not None:
        typer.echo(f"All tables: {page}")
    if failed:
        raise ValueError(f"not everything was measured: {', '.join(failed)}; the reasons are above.")


def _loaded(model: str, dtype: str, device: str | None, adapters: str) -> tuple[MemoryModel, dict[str, Any]]:
    """The model, and the arguments that give it again in another process."""
    import latentmem

    loading: dict[str, Any] = {"name": model, "dtype": dtype, "device": device, "adapters": base.pair(adapters)}
    return latentmem.load(**loading), loading


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """Ctrl-C ends a run with a word about how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        printing.error(f"stopped; what is finished is in {out}, and the same command goes on from there.")
        raise typer.Exit(130) from None


def _command() -> str:
    """The command as it was given, for the tables."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} takes numbers with commas in between, such as 0,1,5: got {text!r}.") from None
