"""The command line: write, ask, chat, list, show, undo, rm, doctor, eval. It parses, calls and prints; nothing else."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from latentmem.core.memory import Memory
    from latentmem.model import MemoryModel

app = typer.Typer(
    help="A memory for language models: write text into it, ask for it later.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

evaluation = typer.Typer(help="Measure a memory: its curves, beside what else could be done.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")

PACKAGED = "smollm2-135m"
Name = Annotated[str, typer.Option("--memory", "-m", help="Name of the memory.")]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="smollm2-135m, a folder, a .gguf file or a hub id; by default what wrote the memory."),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps; by default the fastest.")]
Quantize = Annotated[
    str | None, typer.Option("--quantize", help="New memory: int8 for a model of 8-bit linear layers, on a CPU.")
]
Adapters = Annotated[
    str, typer.Option("--adapters", help="auto: the model's own; none: untrained; or what `latentmem train` made.")
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]


def main() -> None:
    """Run the command line; what is wrong with the input is one sentence and exit code 2."""
    try:
        app()
    except ValueError as error:
        _error(str(error))
        sys.exit(2)
    except OSError as error:
        _error(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        sys.exit(1)


@app.command()
def write(
    texts: Annotated[list[str], typer.Argument(help="Files, a text in quotes, or - for standard input.")],
    memory: Name = "default",
    role: Annotated[
        str | None, typer.Option(help="How it is wrapped: raw, system, user or assistant; by default as measured.")
    ] = None,
    capacity: Annotated[
        int | None, typer.Option("--capacity", "-N", help="New memory: slots per layer [2048].")
    ] = None,
    per_update: Annotated[
        int | None, typer.Option("--per-update", "-K", help="New memory: slots that one update may write [256].")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="New memory: exact or paper.", show_default="exact")] = None,
    compression: Annotated[int | None, typer.Option(help="New memory: tokens per slot, exact only [1].")] = None,
    choice: Annotated[
        str | None, typer.Option(help="New memory: which token becomes a slot, last or surprise.", show_default="last")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="New memory: seed of its random drops [0].")] = None,
    quantize: Quantize = None,
    model: ModelName = None,
    device: Device = None,
) -> None:
    """Write texts into a memory; it is made if it does not exist."""
    from latentmem.files import NamedMemory

    sources = _read_all(texts)
    place = NamedMemory(memory)
    wanted = {"N": capacity, "K": per_update, "preset": preset, "seed": seed}
    wanted |= {"compression": compression, "choice": choice}
    given: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    with place.writing():
        before = place.load() if place.exists else None
        for key, value in given.items():
            if before is not None and getattr(before, key) != value:
                raise ValueError(
                    f"the memory {memory!r} was made with {key}={getattr(before, key)}, not {value}. "
                    f"Leave it out, or choose a new name."
                )
        llm = _load(before, model, device, quantize)
        start = before if before is not None else llm.empty(**given)
        llm.check(start)
        prompts = llm.prompts_or_raise()
        written = [(name, prompts.written(text, role)) for name, text in sources]
        now = start
        place.begin(start)
        with _progress() as progress:
            task = progress.add_task("writing", total=sum(len(ids) for _, ids in written))
            for i, (name, ids) in enumerate(written):
                before_it = sum(len(earlier) for _, earlier in written[:i])

                def show(n: int, _: int, before_it: int = before_it) -> None:
                    progress.update(task, completed=before_it + n)

                now = place.save(llm.write_ids(now, ids, name, show))
    for name, ids in written:
        typer.echo(f"{name}: {len(ids)} tokens")
    typer.echo(f"{memory}: {now.M} of {now.N} slots per layer, {now.updates} updates" + _forgetting(now))


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    memory: Name = "default",
    compare: Annotated[bool, typer.Option("--compare", help="Answer without the memory as well.")] = False,
    max_new_tokens: NewTokens = 128,
    model: ModelName = None,
    device: Device = None,
) -> None:
    """Ask a memory; the answer comes as it is made."""
    from latentmem.files import NamedMemory

    now = NamedMemory(memory).load()
    llm = _load(now, model, device)
    if compare:
        typer.echo("with memory:    ", nl=False)
    _speak(llm.stream(now, question, max_new_tokens=max_new_tokens))
    if compare:
        typer.echo("without memory: ", nl=False)
        _speak(llm.stream(llm.blank(), question, max_new_tokens=max_new_tokens))


@app.command()
def chat(
    memory: Name = "default",
    max_new_tokens: NewTokens = 256,
    quantize: Quantize = None,
    model: ModelName = None,
    device: Device = None,
) -> None:
    """Talk with a memory; what leaves the conversation is written into it, the rest at the end (Ctrl-D or /exit)."""
    from latentmem.chat import Conversation
    from latentmem.files import NamedMemory

    place = NamedMemory(memory)
    with place.writing():
        before = place.load() if place.exists else None
        llm = _load(before, model, device, quantize)
        start = before if before is not None else llm.empty()
        place.begin(start)
        talk = Conversation(llm, start, place.pending(), journal=place)
        if talk.messages:
            typer.echo(f"(going on with {len(talk.messages)} turns of a chat that was cut off)", err=True)
        while True:
            try:
                line = input("you> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if line in ("/exit", "/quit"):
                break
            if not line:
                continue
            try:
                _speak(talk.stream(line, max_new_tokens=max_new_tokens))
            except ValueError as error:
                _error(str(error))
            except KeyboardInterrupt:
                typer.echo(" (stopped)")
        turns = len(talk.messages)
        talk.close()
    if sys.stdin.isatty():
        typer.echo()
    typer.echo(f"(wrote {turns} turns into the memory {memory!r})" if turns else "(nothing to write)", err=True)


@app.command("list")
def list_() -> None:
    """List all memories."""
    from rich.table import Table
    from rich.text import Text

    from latentmem.core.snapshot import read_header
    from latentmem.files import NamedMemory, names

    table = Table(box=None, pad_edge=False)
    for column in ("memory", "fill", "updates", "tokens", "sources", "size", "model"):
        table.add_column(column, justify="left" if column in ("memory", "model") else "right")
    for name in names():
        path = NamedMemory(name).path
        try:
            header, _, held = read_header(path)
        except ValueError as error:
            table.add_row(name, "", "", "", "", "", Text(f"damaged: {error}"))
            continue
        size = _size(path.stat().st_size)
        row = (f"{held} of {header['N']}", header["updates"], header["tokens"], len(header["sources"]))
        table.add_row(name, *map(str, row), size, Text(header["model_name"]))
    if not table.rows:
        typer.echo("No memories yet. `latentmem write notes.txt --memory work` makes one.")
        return
    _print(table)


@app.command()
def show(
    memory: Name = "default",
    text: Annotated[bool, typer.Option("--text", help="Print the text that layer 0 still holds.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print all of it as JSON, with every layer.")] = False,
    model: ModelName = None,
) -> None:
    """Show what a memory holds: fill, updates, sources and how much of each is left per layer, half-life."""
    import json

    from latentmem.files import NamedMemory

    now = NamedMemory(memory).load()
    left = now.left()
    if json_:
        facts: dict[str, Any] = {key: getattr(now, key) for key in ("N", "K", "M", "L", "d", *_SHOWN)}
        facts["half_life"] = now.half_life
        facts["sources"] = [{**asdict(s), "left": left[i].tolist()} for i, s in enumerate(now.sources)]
        typer.echo(json.dumps(facts))
        return
    if text:
        _show_text(now, _load(now, model, "cpu"))
        return
    _show_tables(memory, now, left)


@app.command()
def undo(memory: Name = "default") -> None:
    """Go back to the memory before the last write or chat; one step is kept."""
    from latentmem.files import NamedMemory

    place = NamedMemory(memory)
    place.load()
    with place.writing():
        now = place.undo()
    typer.echo(f"{memory}: back to {now.updates} updates, {now.M} of {now.N} slots per layer")


@app.command()
def rm(memory: Annotated[str, typer.Option("--memory", "-m", help="Name of the memory.")]) -> None:
    """Delete a memory for good, with its undo step."""
    from latentmem.files import NamedMemory

    place = NamedMemory(memory)
    place.existing()
    with place.writing(settle=False):
        place.remove()
    typer.echo(f"{memory}: deleted")


@app.command()
def doctor(
    memory: Annotated[str | None, typer.Option("--memory", "-m", help="Look at this memory too.")] = None,
    question: Annotated[str | None, typer.Option(help="With --memory: what to ask it.")] = None,
    model: ModelName = None,
    device: Device = None,
) -> None:
    """Is memory alive? Answers with the real memory, a zeroed one and another's, side by side; exit code 1 if not."""
    from latentmem import doctor as examine
    from latentmem.files import NamedMemory

    if (memory is None) != (question is None):
        raise ValueError("--memory and --question go together: name the memory and what to ask it.")
    now = NamedMemory(memory).load() if memory is not None else None
    llm = _load(now, model, device)
    typer.echo(f"model: {llm.name}, {str(llm.decoder.dtype)[6:]} on {llm.decoder.device.type}, {_versions()}")
    difference = examine.law(llm)
    if difference is not None:
        typer.echo(f"memory against the same text in the context: largest logit difference {difference:.1e}")
    with _progress("questions") as progress:
        cases = list(progress.track(examine.planted(llm), total=len(examine.THINGS), description="asking"))
    _print(_side_by_side(cases))
    if now is not None and question is not None:
        other = llm.write(llm.empty(), examine.fact(0), source="doctor")
        _print(_side_by_side([examine.ask(llm, now, other, question)]))
    alive = examine.alive(cases)
    hits = {row: sum(case.hits(row) for case in cases) for row in examine.ROWS}
    typer.echo("right answers: " + ", ".join(f"{row} {count} of {len(cases)}" for row, count in hits.items()))
    typer.echo("The memory is alive." if alive else "The memory is DEAD: what is written makes no difference.")
    raise typer.Exit(0 if alive else 1)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of one that comes with the package.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same one goes on with it.")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="A value of the config: steps.total=100")] = None,
    stop: Annotated[int | None, typer.Option(min=1, help="End after so many steps in all; go on later.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show counts, time and memory; write nothing.")] = False,
) -> None:
    """Teach a model to write and read its memory; what is stopped or killed goes on with the same command."""
    try:
        from latentmem.train import config as configs
        from latentmem.train import loop
    except ImportError as error:
        raise ValueError(f"training needs {error.name}: run `pip install 'latentmem[train]'`.") from None
    settings = configs.load(config, changes or ())
    if dry_run:
        _print(_rehearsed(loop.rehearse(settings)))
        return
    run = loop.Run(settings, out)
    try:
        with _progress("steps", seconds=600) as progress:
            task = progress.add_task("training", total=settings.steps.total)

            def show(done: int, total: int, row: dict[str, Any]) -> None:
                words = f"loss {row['loss']:.2f}, {row['tokens'] / row['seconds']:.0f} tokens/s"
                progress.update(task, completed=done, total=total, description=words)

            run.train(show, stop)
    except KeyboardInterrupt:
        _error(f"stopped; the newest checkpoint is in {out}, and the same command goes on from there.")
        raise typer.Exit(130) from None
    if run.rank == 0:
        done = run.step == settings.steps.total
        typer.echo(f"The adapters are in {out / loop.RESULT}." if done else f"{run.step} steps are done; see {out}.")


def _rehearsed(facts: dict[str, Any]) -> Any:
    """What a dry run found, as a table."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for path, kind, documents, questions in facts["sources"]:
        table.add_row(
            path,
            f"{documents:,} documents, {questions:,} questions" if kind == "questions" else f"{documents:,} documents",
        )
    table.add_row("trained weights", f"{facts['trained']:,} beside {facts['frozen']:,} that stay as they are")
    table.add_row("steps", f"{facts['steps']:,}, about {facts['tokens']:,} tokens")
    table.add_row("time", f"about {facts['seconds'] / 60:,.0f} minutes here, without the points of the curve")
    table.add_row("memory", f"{facts['bytes'] / 2**30:.1f} GiB")
    return table


# --- helpers ----------------------------------------------------------------------------------------------------------

_SHOWN = (
    *("preset", "compression", "choice", "seed", "updates", "tokens"),
    *("model_name", "model", "adapters", "version", "parent"),
)


ALL_STEPS = "0,1,2,5,10,20,50"
_LIKE_A_PATH = re.compile(r"^(/|~|\.\.?/)|\.[A-Za-z]\w{0,4}$")


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
    compression: Annotated[
        int | None, typer.Option(min=1, help="Tokens per slot.", show_default="as the adapters were trained, else 1")
    ] = None,
    choice: Annotated[
        str | None,
        typer.Option(help="Which token becomes a slot: last, surprise.", show_default="last"),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in which an answer has to come [10; synthetic 20].")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="One stream for all steps, not only above 50.")] = False,
    seed: Annotated[int, typer.Option(help="Of the drawn questions and of every drop.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="all cores on a CPU, 1 on a GPU")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float32 or float16.", show_default="bfloat16; float32 with --quantize"),
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="int8: linear layers in 8 bits, on a CPU.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small run of minutes: 50 questions, N = 1024.")] = False,
    model: Annotated[str, typer.Option("--model", help="smollm2-135m, a folder, a .gguf file or a hub id.")] = PACKAGED,
    device: Device = None,
    adapters: Adapters = "auto",
) -> None:
    """How much is still known of a text after others were written, beside floor, oracle, window and BM25."""
    import shlex

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
    loading["adapters"] = None if adapters == "none" else adapters
    llm = latentmem.load(**loading)
    settings = Settings(
        steps=_numbers("--steps", steps),
        capacities=_numbers("--capacity", capacity),
        fills=tuple(fill.split(",")),
        rows=tuple(rows.split(",")),
        K=per_update,
        compression=compression or (llm.shape.compression if llm.shape else 1),
        choice=choice or (llm.shape.choice if llm.shape else "last"),
        new_tokens=new_tokens or (20 if data == "synthetic" else NEW_TOKENS),
        stream=stream,
        seed=seed,
    )
    prompts = llm.prompts_or_raise()
    drawn: dict[str, Any] = {"questions": questions, "per_text": per_text, "seed": seed}
    chosen = sets.load(data, lambda text: len(prompts.text(text)), **drawn)
    count = workers or (runner.cores() if llm.decoder.device.type == "cpu" else 1)
    try:
        with _progress("units", seconds=3600) as progress:
            task = progress.add_task(f"retention on {data}", total=None)
            lines = measure(
                llm,
                chosen,
                settings,
                out,
                command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                drawn=drawn,
                workers=count,
                loading=loading,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except KeyboardInterrupt:
        _error(f"stopped; what is finished is in {out}, and the same command goes on from there.")
        raise typer.Exit(130) from None
    for title, table in terminal(lines):
        typer.echo(f"\n{title}")
        _print(table)
    typer.echo(f"\nAll tables, the plot and the page are in {out}: table.md, plot.png, report.html, summary.json")


@evaluation.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="name=folder of each run; the first is what others gain over.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for compare.md, compare.json and compare.png.")],
    capacity: Annotated[int, typer.Option("--capacity", "-N", help="Slots per layer.")] = 2048,
) -> None:
    """Retention runs side by side: untrained and trained, other presets, other compressions."""
    import shlex

    from latentmem.evaluate import compare as protocol

    pairs = [run.partition("=") for run in runs]
    if not all(name and folder for name, _, folder in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError(f"runs are given as name=folder with different names, got {' '.join(runs)}.")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    found = protocol.write({name: Path(folder) for name, _, folder in pairs}, capacity, out, command)
    typer.echo(protocol.markdown([line for line in found if line.metric == "accuracy"]))


@evaluation.command()
def effects(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same one goes on with it.")],
    texts: Annotated[int, typer.Option(min=2, help="Articles to read, and paragraphs to ask about.")] = 100,
    capacity: Annotated[
        int, typer.Option("--capacity", "-N", help="Slots per layer; a checkpoint has its own.")
    ] = 2048,
    compression: Annotated[
        int | None, typer.Option(min=1, help="Tokens per slot.", show_default="as the adapters were trained, else 1")
    ] = None,
    choice: Annotated[
        str | None,
        typer.Option(help="Which token becomes a slot: last, surprise.", show_default="last"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn and of every drop.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="all cores on a CPU, 1 on a GPU")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    model: Annotated[str, typer.Option("--model", help="smollm2-135m, a folder, a .gguf file or a hub id.")] = PACKAGED,
    device: Device = None,
    adapters: Adapters = "auto",
) -> None:
    """What a memory changes beside remembering: the perplexity of other text, and saying "I don't know"."""
    import shlex

    import latentmem
    from latentmem.evaluate import effects as protocol
    from latentmem.evaluate import questions as sets
    from latentmem.evaluate import runner

    loading: dict[str, Any] = {"name": model, "dtype": dtype, "device": device}
    loading["adapters"] = None if adapters == "none" else adapters
    llm = latentmem.load(**loading)
    prompts = llm.prompts_or_raise()
    chosen = sets.load("squad", lambda text: len(prompts.text(text)), questions=4 * texts, per_text=4, seed=seed)
    c = compression or (llm.shape.compression if llm.shape else 1)
    way = choice or (llm.shape.choice if llm.shape else "last")
    settings = protocol.Settings(N=capacity, compression=c, choice=way, texts=texts, seed=seed)
    with _progress("units", seconds=600) as progress:
        task = progress.add_task("effects", total=None)
        found = protocol.measure(
            llm,
            chosen,
            settings,
            out,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            workers=workers or (runner.cores() if llm.decoder.device.type == "cpu" else 1),
            loading=loading,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    typer.echo(protocol.markdown(found))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} takes numbers with commas in between, such as 0,1,5: got {text!r}.") from None


def _read_all(texts: list[str]) -> list[tuple[str, str]]:
    """The arguments of `write` -> (source, text) each; files of one name in different folders keep their paths."""
    read = [(given, *_read(given)) for given in texts]
    twice = {name for _, name, _ in read if len({given for given, other, _ in read if other == name}) > 1}
    return [
        (given if name in twice and name not in ("text", "standard input") else name, text)
        for given, name, text in read
    ]


def _read(text: str) -> tuple[str, str]:
    """An argument of `write` -> (source, text): standard input, a file, or the argument itself if it is a sentence."""
    if text == "-":
        return "standard input", _decoded("standard input", sys.stdin.buffer.read())
    path = Path(text)
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError:  # too long for a path: it is a text
        exists = is_folder = False
    if is_folder:
        raise ValueError(f"{text} is a folder; name its files, for example {text.rstrip('/')}/*.txt.")
    if exists:
        try:
            return path.name, _decoded(text, path.read_bytes())
        except OSError as error:
            raise ValueError(f"{text} can not be read: {error.strerror}.") from None
    if not text.strip():
        raise ValueError("the text to be written is empty; give a file, a text in quotes, or - for standard input.")
    if len(text.split()) == 1 or _LIKE_A_PATH.search(text):
        raise ValueError(
            f"there is no file {text!r}. (A text in quotes has at least two words and does not look like a path; "
            f"any text can be piped: give - for standard input.)"
        )
    return "text", text


def _decoded(name: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{name} is not UTF-8 text; turn it into plain text first.")
    if not text.strip():
        raise ValueError(f"{name} is empty: there is nothing to write.")
    return text


def _load(memory: Memory | None, model: str | None, device: str | None, quantize: str | None = None) -> MemoryModel:
    """The model that is asked for, or the one that wrote the memory, in the memory's dtype and quantized as it was."""
    import latentmem
    from latentmem.loading import PACKAGED

    name = model or (memory.model_name if memory is not None else "") or PACKAGED
    if memory is None:
        return latentmem.load(name, device=device, quantize=quantize)
    adapters = "auto" if memory.adapters else None  # a memory of the untrained model is read as it was written
    made = memory.model.rpartition("-")[0] or None
    if quantize not in (None, made):
        raise ValueError(
            f"the memory was written by a model with {f'--quantize {made}' if made else 'exact weights'}, "
            f"not --quantize {quantize}. Leave it out, or choose a new name."
        )
    return latentmem.load(name, device=device, dtype=memory.slots.dtype, quantize=made, adapters=adapters)


def _speak(parts: Any) -> None:
    """Print an answer as it comes, without blanks around it."""
    begun = False
    for part in parts:
        part = part if begun else part.lstrip()
        begun = begun or bool(part)
        typer.echo(part, nl=False)
        sys.stdout.flush()
    typer.echo()


def _forgetting(memory: Memory) -> str:
    if memory.M < memory.N:
        return f", forgets nothing until {memory.N - memory.M} more slots are filled"
    return f", full: half of what is in it is left after {memory.half_life:.1f} more updates"


def _show_tables(name: str, memory: Memory, left: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_row("memory", name)
    facts.add_row("fill", f"{memory.M} of {memory.N} slots in each of {memory.L} layers ({memory.M / memory.N:.0%})")
    facts.add_row("written", f"{memory.updates} updates, {memory.tokens} tokens, at most {memory.K} slots per update")
    facts.add_row(
        "half-life", f"{memory.half_life:.1f} updates of {memory.K} slots once it is full" if memory.half_life else "0"
    )
    per_slot = f"{memory.compression} token(s) per slot" + f" ({memory.choice})" * (memory.compression > 1)
    facts.add_row("kind", f"{memory.preset}, {per_slot}, seed {memory.seed}")
    facts.add_row("model", Text(f"{memory.model_name} {memory.model[:12]}"))
    facts.add_row("bytes", f"{_size(memory.slots.nbytes)} in {str(memory.slots.dtype)[6:]}")
    facts.add_row("version", memory.version[:12] + (f", after {memory.parent[:12]}" if memory.parent else ""))
    _print(facts)
    table = Table(box=None, pad_edge=False)
    for column in ("source", "tokens", "slots", "left", "each layer, first to last"):
        table.add_column(column, justify="left" if column.startswith(("source", "each")) else "right")
    for i, source in enumerate(memory.sources):
        share = left[i].float() / source.slots
        low, high = int(left[i].min()), int(left[i].max())
        amount = f"{share.mean():.0%} ({low})" if low == high else f"{share.mean():.0%} ({low} to {high})"
        table.add_row(Text(source.name), str(source.tokens), str(source.slots), amount, _bars(share.tolist()))
    older = (memory.origins < 0).sum(1)
    if int(older.sum()):
        table.add_row("(older)", "", "", f"({int(older.min())} to {int(older.max())})", "")
    if table.rows:
        _print(table)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.1f} KiB"


def _bars(shares: list[float]) -> str:
    """One character per layer: the share that is left, from ▁ (none) to █ (all)."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(share * 7.999))] for share in shares)


def _show_text(memory: Memory, llm: MemoryModel) -> None:
    if memory.preset != "exact":
        raise ValueError("only memories of the preset 'exact' hold embeddings in layer 0; this one can not be printed.")
    ids, origins = llm.text_of(memory), memory.origins[0]
    edges = [0, *((origins.diff() != 0).nonzero().flatten() + 1).tolist(), memory.M]
    for start, end in itertools.pairwise(edges):
        if start < end:
            source = memory.sources[int(origins[start])].name if origins[start] >= 0 else "(older)"
            typer.echo(f"--- {source}: {end - start} slots of layer 0")
            typer.echo(llm.tokenizer.decode([int(i) for i in ids[start:end] if i >= 0]))


def _side_by_side(cases: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    from latentmem.doctor import ROWS

    table = Table(show_lines=True)
    for column in ("question", *ROWS):
        table.add_column(column, ratio=1)
    for case in cases:
        cells = []
        for row in ROWS:
            score = f"\n(log p {case.logprobs[row]:.2f})" if case.logprobs else ""
            cells.append(Text(("✓ " if case.gold and case.hits(row) else "") + case.answers[row] + score))
        table.add_row(Text(case.question + (f"\n({case.gold})" if case.gold else "")), *cells)
    return table


def _versions() -> str:
    import torch
    import transformers

    import latentmem

    return f"latentmem {latentmem.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"


def _progress(unit: str = "tokens", seconds: float = 30) -> Any:
    """A bar with the time left, estimated from the speed of the last seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=seconds)


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(renderable)


def _error(message: str) -> None:
    typer.echo(f"latentmem: {message}", err=True)
