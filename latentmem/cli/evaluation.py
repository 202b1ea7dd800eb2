"""`latentmem eval`: a command for each protocol, and lm-evaluation-harness."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentmem.cli import base, options, printing
from latentmem.cli.base import PACKAGED, Adapters, Device, app
from latentmem.cli.options import FLAGS, Command, Flags, Group
from latentmem.evaluate import settings as protocols

if TYPE_CHECKING:
    from latentmem.model.model import MemoryModel

evaluation = typer.Typer(help="Measure a memory: its curves, beside what else could be done.", no_args_is_help=True)
app.add_typer(evaluation, name="eval", rich_help_panel="Training and measuring")

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same folder continues the run.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="all cores on a CPU, 1 on a GPU")]
Model = Annotated[str, typer.Option("--model", help=f"{base.MODELS}.")]
Questions = Annotated[str, typer.Option(help="squad, nq or synthetic.")]
NewTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens in which an answer has to come.", show_default="10; synthetic 20")
]
HELP = {"N": "slots per layer; a checkpoint has its own", "seed": "decides what is drawn and every drop"}


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Options of the model, and the model."""

    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float32 or float16.", show_default="bfloat16; float32 with --quantize"),
    ] = None
    quantize: Annotated[str | None, typer.Option(help="int8 runs the linear layers in 8 bits (CPU only).")] = None
    model: Model = PACKAGED
    device: Device = None
    adapters: Adapters = "auto"

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `latentmem.load`, which also give the model in another process."""
        dtype = self.dtype or ("float32" if self.quantize else "bfloat16")
        facts = {"name": self.model, "dtype": dtype, "device": self.device, "quantize": self.quantize}
        return facts | {"adapters": base.pair(self.adapters)}

    @cached_property
    def llm(self) -> MemoryModel:
        base.check_model(self.model, self.adapters)
        import latentmem

        return latentmem.load(**self.arguments)


@dataclass(frozen=True, kw_only=True)
class Run(Loading):
    """Options of every run, and what follows from them."""

    out: Out
    workers: Workers = None

    def tokens(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.llm.prompts_or_raise().text(text))

    def measured(self, name: str, measure: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """The result of a protocol's `measure(llm, *args, out, **more)`, with a bar of progress."""
        from latentmem.evaluate import runner

        cores = runner.cores() if self.llm.decoder.device.type == "cpu" else 1
        with _stoppable(self.out), printing.progress("units", seconds=3600) as bar:
            task = bar.add_task(name, total=None)
            return measure(
                self.llm,
                *args,
                self.out,
                **more,
                command=_command(),
                workers=self.workers or cores,
                loading=self.arguments,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )

    def print_table(self, lines: Any, markdown: Callable[[Any], str] | None = None) -> None:
        """Print the notes and the table of a run."""
        from latentmem.evaluate import protocol

        for note in json.loads((self.out / "summary.json").read_text(encoding="utf-8"))["notes"]:
            typer.echo(note)
        typer.echo((markdown or protocol.markdown)(lines))


def measures(
    kind: type[protocols.Settings],
    leave_out: Collection[str] = (),
    of_memory: Collection[str] = ("longterm",),
    flags: Flags = FLAGS,
) -> Callable[[Command], Command]:
    """Give the command of a protocol its settings, those of the memory, and `Run` as options.

    Args:
        kind: the command's parameter `settings` is one.
        leave_out: fields of `kind` without an option.
        of_memory: settings of the memory without an option.
    """
    own = options.of_settings(kind, ("memory", *leave_out), flags)
    memory = options.of_memory(kind().memory, of_memory, flags, HELP)
    names = {option.name for option in own.options}

    def build(**values: Any) -> protocols.Settings:
        chosen = memory.build(**{name: value for name, value in values.items() if name not in names})
        parsed = own.build(**{name: value for name, value in values.items() if name in names})
        return kind(memory=options.settings_from(chosen).filled(kind().memory), **parsed)

    group = Group([*own.options, *memory.options], build)
    return lambda command: options.expanded(options.replaced(command, "settings", group))


@evaluation.command()
@measures(
    protocols.Retention,
    leave_out=["new_tokens"],
    of_memory=["N"],
    flags={
        **{"fills": ["--fill"], "capacities": ["--capacity", "-N"], "K": ["--per-update", "-K"]},
        "longterm_group": ["--longterm-group", "--group"],
    },
)
def retention(
    *,
    data: Questions = "synthetic",
    questions: Annotated[int, typer.Option(min=1, help="Number of questions.")] = 200,
    per_text: Annotated[
        int | None, typer.Option(min=1, help="Questions about each text.", show_default="5; nq 1")
    ] = None,
    new_tokens: NewTokens = None,
    quick: Annotated[bool, typer.Option("--quick", help="A run of minutes: 50 questions, 1024 slots.")] = False,
    settings: protocols.Retention,
    run: Run,
) -> None:
    """How much is still known of a text after others were written, beside floor, oracle, window and BM25."""
    from latentmem.evaluate.data import questions as sets
    from latentmem.evaluate.protocols.retention import measure
    from latentmem.evaluate.tables.summary import terminal

    if quick:
        usual = protocols.Retention()
        if (questions, settings.steps, settings.capacities) != (200, usual.steps, usual.capacities):
            raise ValueError("--quick chooses --questions, --steps and --capacity itself: leave it or them out.")
        questions, settings = 50, replace(settings, steps=(0, 1, 5, 20), capacities=(1024,))
    settings = replace(settings, new_tokens=_new_tokens(new_tokens, data))
    drawn = {"questions": questions, "per_text": per_text or (1 if data == "nq" else 5), "seed": settings.seed}
    chosen = sets.load(data, run.tokens, **drawn)
    lines = run.measured(f"retention on {data}", measure, chosen, settings, drawn=drawn)
    for title, table in terminal(lines):
        typer.echo(f"\n{title}")
        printing.show(table)
    typer.echo(f"\nAll tables, the plot and the page are in {run.out}: table.md, plot.png, report.html, summary.json")


@evaluation.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="name=folder of each run; the others are compared with the first.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for compare.md, compare.json and compare.png.")],
    capacity: Annotated[
        int, typer.Option("--capacity", "-N", help="Slots per layer that an answer sees, retrieved ones included.")
    ] = 2048,
    stream: Annotated[bool, typer.Option("--stream", help="Compare what was asked in streams.")] = False,
) -> None:
    """Retention runs side by side: untrained and trained, other presets, other compressions."""
    pairs = [run.partition("=") for run in runs]
    if not all(name and folder for name, _, folder in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError(f"runs are given as name=folder with different names, got {' '.join(runs)}.")
    from latentmem.evaluate.tables import compare as tables

    folders = {name: Path(folder) for name, _, folder in pairs}
    lines = tables.write(folders, capacity, out, _command(), stream=stream)
    typer.echo(tables.markdown([line for line in lines if line.metric == "accuracy"]))


@evaluation.command()
@measures(protocols.Effects)
def effects(*, settings: protocols.Effects, run: Run) -> None:
    """What a memory changes beside remembering: the perplexity of other text, and saying "I don't know"."""
    from latentmem.evaluate.data import questions as sets
    from latentmem.evaluate.protocols.effects import measure

    data = sets.load("squad", run.tokens, questions=4 * settings.texts, per_text=4, seed=settings.seed)
    run.print_table(run.measured("effects", measure, data, settings))


@evaluation.command()
@measures(protocols.Editing)
def editing(
    *,
    data: Annotated[str, typer.Option(help="zsre or counterfact.")] = "zsre",
    file: Annotated[
        Path | None,
        typer.Option(
            help="The paper's zsre_mend_eval.json or counterfact.json.", show_default="of LATENTMEM_DATA, or the hub"
        ),
    ] = None,
    settings: protocols.Editing,
    run: Run,
) -> None:
    """Facts that are changed: by a memory, and by fine-tuning, LoRA, demonstrations and rank-one edits."""
    from latentmem.evaluate.data import edits as sets
    from latentmem.evaluate.protocols.editing import markdown, measure

    cells = run.measured("editing", measure, sets.load(data, seed=settings.seed, file=file), settings)
    run.print_table(cells, markdown)


@evaluation.command()
@measures(protocols.Integrity)
def integrity(
    *,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Minutes after which no stretch is begun.", show_default="no limit")
    ] = None,
    settings: protocols.Integrity,
    run: Run,
) -> None:
    """What an endless stream of facts does to a memory, and to a model that is fine-tuned on it instead."""
    from latentmem.evaluate.protocols.integrity import measure

    if settings.role == "style":
        settings = replace(settings, role=None)
    run.print_table(run.measured("integrity", measure, settings, minutes=minutes))


@evaluation.command()
@measures(protocols.Forget, leave_out=["new_tokens"])
def forget(
    *,
    texts: Annotated[int, typer.Option(min=2, help="Texts that are forgotten, one by one.")] = 50,
    per_text: Annotated[int, typer.Option(min=1, help="Questions about each text.")] = 4,
    data: Questions = "squad",
    new_tokens: NewTokens = None,
    settings: protocols.Forget,
    run: Run,
) -> None:
    """What is still known of a text that was forgotten on request, in both ways, and what it costs the others."""
    from latentmem.evaluate.data import questions as sets
    from latentmem.evaluate.protocols.forget import measure

    settings = replace(settings, new_tokens=_new_tokens(new_tokens, data))
    chosen = sets.load(data, run.tokens, questions=per_text * texts, per_text=per_text, seed=settings.seed)
    run.print_table(run.measured("forget", measure, chosen, settings))


@evaluation.command()
@measures(protocols.Ability)
def ability(*, settings: protocols.Ability, run: Run) -> None:
    """What a memory of unrelated texts costs what the model could do before: perplexity, BLiMP, PIQA, MMLU."""
    from latentmem.evaluate.data import choices
    from latentmem.evaluate.data import questions as sets
    from latentmem.evaluate.protocols.ability import measure

    counts = {name: getattr(settings, name) for name in protocols.SETS}
    chosen = [choices.load(name, count, settings.seed) for name, count in counts.items() if count]
    filler = sets.load("squad", run.tokens, questions=1, per_text=1, seed=settings.seed).unrelated
    run.print_table(run.measured("ability", measure, chosen, filler, settings))


@evaluation.command()
@measures(protocols.Conversations)
def conversations(
    *,
    questions: Annotated[int, typer.Option(min=1, help="Questions about each dialogue, at most.")] = 100,
    file: Annotated[Path | None, typer.Option(help="LoCoMo's locomo10.json.", show_default="of LATENTMEM_DATA")] = None,
    settings: protocols.Conversations,
    run: Run,
) -> None:
    """Long conversations, written turn by turn and asked about at their end (LoCoMo), by category."""
    from latentmem.evaluate.protocols.conversations import load, measure

    run.print_table(run.measured("conversations", measure, load(questions, settings.seed, file), settings))


@evaluation.command()
@measures(protocols.LongBench)
def longbench(
    *,
    data: Annotated[
        str, typer.Option(help="altqa, babi, narrativeqa, qasper, multifieldqa_en, hotpotqa, 2wikimqa, musique.")
    ] = "altqa,babi",
    examples: Annotated[int, typer.Option(min=1, help="Examples of each set, at most.")] = 100,
    settings: protocols.LongBench,
    run: Run,
) -> None:
    """Questions about one long text, beside the text in the context, its end, and BM25."""
    from latentmem.evaluate.protocols.longbench import load, measure

    sets = [load(name, examples, settings.seed) for name in data.split(",")]
    run.print_table(run.measured("longbench", measure, sets, settings))


@evaluation.command()
@options.expanded
def harness(
    *,
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
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results.json.")],
    loading: Loading,
) -> None:
    """Tasks of lm-evaluation-harness, with its own scorers, behind a memory."""
    try:
        from latentmem.evaluate.protocols.harness import HarnessLM, evaluate
    except ImportError as error:
        raise ValueError(str(error)) from None

    lm = HarnessLM(loading.llm, str(memory) if memory else None, write=write, max_length=length, N=capacity)
    for task, metrics in evaluate(lm, tasks.split(","), out, limit=limit).items():
        numbers = (f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        typer.echo(f"{task}: {', '.join(numbers)}")


@evaluation.command(name="all")
def everything(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of all runs; the same folder continues them.")],
    only: Annotated[
        str | None, typer.Option(help="The protocols to run, with commas in between; by default all.")
    ] = None,
    workers: Workers = None,
    model: Model = PACKAGED,
    device: Device = None,
    adapters: Adapters = "auto",
) -> None:
    """Every protocol with its own defaults, one after the other, and one page of all tables: hours on two cores."""
    shared: dict[str, Any] = {"workers": workers, "model": model, "device": device, "adapters": adapters}
    commands = _commands()
    chosen = only.split(",") if only else list(commands)
    unknown = [name for name in chosen if name not in commands]
    if unknown:
        raise ValueError(f"--only takes some of {', '.join(commands)}; got {', '.join(unknown)}.")
    from latentmem.evaluate.protocol import one_page

    failed = _run_all({name: commands[name] for name in chosen}, out, shared)
    page = one_page(out, chosen)
    if page is not None:
        typer.echo(f"All tables: {page}")
    if failed:
        raise ValueError(f"not everything was measured: {', '.join(failed)}; the reasons are above.")


def _commands() -> dict[str, Command]:
    return {
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


def _run_all(commands: dict[str, Command], out: Path, shared: dict[str, Any]) -> Sequence[str]:
    """Run each protocol in a folder of its own; the names of those that failed, such as for want of their data."""
    failed = []
    for name, command in commands.items():
        printing.error(f"{name}: into {out / name}")
        try:
            command(out=out / name, **shared)
        except ValueError as error:
            failed.append(name)
            printing.error(f"{name}: {error}")
    return failed


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


def _new_tokens(count: int | None, data: str) -> int:
    return count or (20 if data == "synthetic" else protocols.NEW_TOKENS)
