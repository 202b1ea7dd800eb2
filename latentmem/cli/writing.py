"""`latentmem write`: files, texts and standard input into a memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from latentmem.cli import base, inputs, options, printing
from latentmem.cli.base import Device, ModelName, Name, OwnAdapters, Quantize, app

if TYPE_CHECKING:
    from latentmem.model.model import MemoryModel
    from latentmem.store import Account, Store

LIKE_A_PATH = re.compile(r"^(/|~|\.\.?/|\w+://)|\.[A-Za-z]\w{0,4}$")
SENTENCE = re.compile(r"\w[.!?]+[\"')\]]*$")  # the end of one
FILE_NAME = re.compile(r"[\w./\\~*@+%#()\[\]-]+")  # with what a shell leaves of a pattern that fits no file
UNNAMED = ("text", "standard input")  # sources that are no files


class Text(NamedTuple):
    """A text that is to be written; `replaces`: in the place of all that its source has written."""

    source: str
    text: str
    replaces: bool = False


@app.command(rich_help_panel="Memories")
@options.of_a_new_memory
def write(
    texts: inputs.Texts,
    memory: Name = "default",
    role: Annotated[
        str | None, typer.Option(help="raw, system, user or assistant; by default what the model was measured with.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Write also what is in the memory already.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Drop what a source has written before, and write it anew.")
    ] = False,
    *,
    chosen: options.Values,
    key: Annotated[
        str | None, typer.Option(help="Idempotency key: the same command with the same key writes once.")
    ] = None,
    encoding: inputs.Encoding = None,
    quantize: Quantize = None,
    model: ModelName = None,
    adapters: OwnAdapters = None,
    device: Device = None,
) -> None:
    """Write texts into a memory; it is made if it does not exist. What is there already is not written again."""
    sources, store = _texts_of(texts, encoding), base.opened(memory)
    before = _checked(store, memory, role, chosen)
    if not again and key is None:
        sources = _changed(store, memory, sources, role, replace)
    if not sources:
        return
    llm = base.load(before, model, device, quantize, adapters)
    start = store.latest(memory)[1] if before is not None else llm.empty(settings=options.settings_from(chosen))
    llm.check(start)
    counts = [len(llm.tokens(one.text, role)) for one in sources]
    if before is None and (there := base.begin(store, memory, start)) is not None:
        options.require_same(memory, there.settings, chosen)
    base.finish(store, memory, llm)
    _write_all(store, memory, llm, sources, counts, role, key)


def _write_all(
    store: Store,
    memory: str,
    llm: MemoryModel,
    sources: Sequence[Text],
    counts: Sequence[int],
    role: str | None,
    key: str | None,
) -> None:
    """Write each text, and say what became of the memory."""
    start, version = store.open(memory), 0
    with printing.progress() as bar:
        task = bar.add_task("writing", total=sum(counts))
        for i, (name, text, replaces) in enumerate(sources):
            show = printing.tokens(bar, "writing", sum(counts), sum(counts[:i]), task)
            own_key = key if key is None or len(sources) == 1 else f"{key} {i + 1}"
            version = store.write(llm, memory, text, name, role=role, key=own_key, replace=replaces, progress=show)
    for one, count in zip(sources, counts, strict=True):
        typer.echo(f"{one.source}: {count} tokens{', in place of what was there' if one.replaces else ''}")
    now = store.account(memory)
    typer.echo(f"{memory}, version {version}: {printing.state(now)}{printing.forgetting(now)}")
    printing.losses(memory, start, store.open(memory))


def _checked(store: Store, memory: str, role: str | None, chosen: options.Values) -> Account | None:
    """What the memory holds already, if there is one; refuses what can be refused before a model is loaded."""
    from latentmem.model.prompts import check_role

    check_role(role)
    options.settings_from(chosen)
    before = base.applied(store, memory)
    if before is not None:
        options.require_same(memory, before.settings, chosen)
    return before


def _changed(store: Store, memory: str, sources: list[Text], role: str | None, replace: bool) -> list[Text]:
    """The texts that are not in the memory yet; says which are."""
    fresh: list[Text] = []
    there = memory in store
    for one in dict.fromkeys(sources):
        version = store.unchanged(memory, one.text, one.source, role, alone=replace) if there else None
        if version is not None:
            typer.echo(f"{one.source}: unchanged since version {version}; --again writes it again")
            continue
        first = one.source not in [other.source for other in fresh]
        known = there and first and store.was_written(memory, one.source)
        if known and not replace and one.source not in UNNAMED:
            typer.echo(f"{one.source}: changed; what it was before stays in the memory, --replace would drop that")
        fresh.append(one._replace(replaces=known and replace))
    return fresh


# --- what the command takes in ----------------------------------------------------------------------------------------


def _texts_of(arguments: list[str], encoding: str | None = None) -> list[Text]:
    """The arguments of `write` -> (source, text) each; files of one name in different folders keep their paths."""
    pairs: list[tuple[str, str, str]] = []
    for one in arguments:
        from_files = inputs.from_files(one, encoding)
        pairs += [(one, *_read(one))] if from_files is None else from_files
    paths: dict[str, set[str]] = {}
    for argument, name, _ in pairs:
        paths.setdefault(name, set()).add(argument)
    keep_names = {name for name in paths if len(paths[name]) == 1} | set(UNNAMED)
    return [Text(name if name in keep_names else argument, text) for argument, name, text in pairs]


def _read(argument: str) -> tuple[str, str]:
    """An argument of `write` that names no file -> (source, text), if it is a sentence."""
    if not argument.strip():
        raise ValueError("the text to be written is empty; give a file, a text in quotes, or - for standard input.")
    if not _is_text(argument):
        raise ValueError(
            f"there is no file {argument!r}. (One word is taken for a text if it ends like a sentence, or can be no "
            f"file's name; any text can be piped: give - for standard input.)"
        )
    return "text", argument


def _is_text(argument: str) -> bool:
    """Whether an argument that names no file is meant as a text: not every language puts spaces between words."""
    if LIKE_A_PATH.search(argument):
        return False
    several = len(argument.split()) > 1
    return several or not argument.isascii() or bool(SENTENCE.search(argument)) or not FILE_NAME.fullmatch(argument)
