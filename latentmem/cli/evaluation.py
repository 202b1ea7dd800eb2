"""`latentmem eval`: retention, compare, effects, editing."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentmem.cli import base
from latentmem.cli.base import PACKAGED, Adapters, Device, app

if TYPE_CHECKING:
    from latentmem.model import MemoryModel

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


@evaluation.command()
def retention(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same one goes on with it.")],
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
    from latentmem.evaluate import questions as sets
    from latentmem.evaluate import runner
    from latentmem.evaluate.asking import NEW_TOKENS
    from latentmem.evaluate.retention import Settings, measure
    from latentmem.evaluate.summary import terminal

    if quick:
        if (questions, steps, capacity) != (200, ALL_STEPS, "1024,2048"):
            raise ValueError("--quick chooses --questions, --steps and --capacity itself: leave it or them out.")
        questions, steps, capacity = 50, "0,1,5,20", "1024"
    per_text = per_text or (1 if data == "nq" else 5)
    kind = dtype or ("float32" if quantize else "bfloat16")
    loading: dict[str, Any] = {"name": model, "dtype": kind, "device": device, "quantize": quantize}
    loading["adapters"] = base.pair(adapters)
    llm = latentmem.load(**loading)
    c, way = _slots(llm, compression, choice)
    settings = Settings(
        steps=_numbers("--steps", steps),
        capacities=_numbers("--capacity", capacity),
        fills=tuple(fill.split(",")),
        rows=tuple(rows.split(",")),
        K=per_update,
        compression=c,
        choice=way,
        longterm=longterm,
        longterm_limit=longterm_limit,
        group=group,
        new_tokens=new_tokens or (20 if data == "synthetic" else NEW_TOKENS),
        stream=stream,
        seed=seed,
    )
    prompts = llm.prompts_or_raise()
    drawn: dict[str, Any] = {"questions": questions, "per_text": per_text, "seed": seed}
    chosen = sets.load(data, lambda text: len(prompts.text(text)), **drawn)
    count = workers or (runner.cores() if llm.decoder.device.type == "cpu" else 1)
    with _stoppable(out), base.progress("units", seconds=3600) as progress:
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
        base.show(table)
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
    from latentmem.evaluate import compare as protocol

    pairs = [run.partition("=") for run in runs]
    if not all(name and folder for name, _, folder in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError(f"runs are given as name=folder with different names, got {' '.join(runs)}.")
    found = protocol.write({name: Path(folder) for name, _, folder in pairs}, capacity, out, _command(), stream=stream)
    typer.echo(protocol.markdown([line for line in found if line.metric == "accuracy"]))


@evaluation.command()
def effects(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same one goes on with it.")],
    texts: Annotated[int, typer.Option(min=2, help="Articles to read, and paragraphs to ask about.")] = 100,
    capacity: Annotated[
        int, typer.Option("--capacity", "-N", help="Slots per layer; a checkpoint has its own.")
    ] = 2048,
    compression: Compression = None,
    choice: Choice = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn and of every drop.")] = 0,
    workers: Workers = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    model: Model = PACKAGED,
    device: Device = None,
    adapters: Adapters = "auto",
) -> None:
    """What a memory changes beside remembering: the perplexity of other text, and saying "I don't know"."""
    import latentmem
    from latentmem.evaluate import effects as asked
    from latentmem.evaluate import questions as sets

    loading: dict[str, Any] = {"name": model, "dtype": dtype, "device": device, "adapters": base.pair(adapters)}
    llm = latentmem.load(**loading)
    prompts = llm.prompts_or_raise()
    chosen = sets.load("squad", lambda text: len(prompts.text(text)), questions=4 * texts, per_text=4, seed=seed)
    c, way = _slots(llm, compression, choice)
    settings = asked.Settings(N=capacity, compression=c, choice=way, texts=texts, seed=seed)
    _measured("effects", llm, workers, out, asked.measure, chosen, settings, loading=loading)


@evaluation.command()
def editing(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same one goes on with it.")],
    data: Annotated[str, typer.Option(help="zsre or counterfact.")] = "zsre",
    edits: Annotated[int, typer.Option(min=2, help="Edits that are made one at a time.")] = 200,
    rows: Annotated[
        str, typer.Option(help="What is measured.")
    ] = "none,context,memory-unedited,memory-empty,memory-full,ft,ft-l,lora,ike,rome",
    sequence: Annotated[
        str, typer.Option(help="Edits that are made without reset in between, such as 1,10,100,1000.")
    ] = "1",
    capacity: Annotated[
        int, typer.Option("--capacity", "-N", help="Slots per layer; a checkpoint has its own.")
    ] = 2048,
    compression: Compression = None,
    choice: Choice = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn and of every drop.")] = 0,
    workers: Workers = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    model: Model = PACKAGED,
    device: Device = None,
    adapters: Adapters = "auto",
) -> None:
    """Facts that are changed: by a memory, and by fine-tuning, LoRA, demonstrations and rank-one edits."""
    import latentmem
    from latentmem.evaluate import editing as asked
    from latentmem.evaluate import edits as sets

    loading: dict[str, Any] = {"name": model, "dtype": dtype, "device": device, "adapters": base.pair(adapters)}
    settings = asked.Settings(
        N=capacity, edits=edits, rows=tuple(rows.split(",")), sequence=_numbers("--sequence", sequence), seed=seed
    )
    chosen = sets.load(data, seed=seed)
    llm = latentmem.load(**loading)
    c, way = _slots(llm, compression, choice)
    settings = replace(settings, compression=c, choice=way)
    _measured("editing", llm, workers, out, asked.measure, chosen, settings, loading=loading, table=asked.markdown)


def _measured(
    name: str,
    llm: MemoryModel,
    workers: int | None,
    out: Path,
    measure: Any,
    *args: Any,
    table: Any = None,
    **more: Any,
) -> None:
    """Run a protocol's `measure(llm, *args, out, **more)` with a bar of progress, and print its table."""
    from latentmem.evaluate import protocol, runner

    with _stoppable(out), base.progress("units", seconds=600) as progress:
        task = progress.add_task(name, total=None)
        found = measure(
            llm,
            *args,
            out,
            **more,
            command=_command(),
            workers=workers or (runner.cores() if llm.decoder.device.type == "cpu" else 1),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    typer.echo((table or protocol.markdown)(found))


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """Ctrl-C ends a run with a word about how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        base.error(f"stopped; what is finished is in {out}, and the same command goes on from there.")
        raise typer.Exit(130) from None


def _command() -> str:
    """The command as it was given, for the tables."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _slots(llm: MemoryModel, compression: int | None, choice: str | None) -> tuple[int, str]:
    """Tokens per slot and which of them is kept: as given, or as the adapters were trained."""
    shape = llm.shape
    return compression or (shape.compression if shape else 1), choice or (shape.choice if shape else "last")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} takes numbers with commas in between, such as 0,1,5: got {text!r}.") from None
