"""What `latentmem write` reads: files of any kind, folders, patterns, and standard input."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from latentmem import documents
from latentmem.errors import UnreadableError

Texts = Annotated[
    list[str], typer.Argument(help="Files of any kind, folders, patterns in quotes, a text in quotes, or - for a pipe.")
]
Encoding = Annotated[
    str | None,
    typer.Option("--encoding", help="Encoding of text files, such as cp1252.", show_default="UTF-8, or a guess"),
]
Text = tuple[str, str, str]  # the path or argument, the source's name, the text
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://\S+", re.I)
NAMED = 20  # skipped files; of more there is the count


def from_files(argument: str, encoding: str | None = None) -> list[Text] | None:
    """The texts of the files that an argument names; None if it names none and is a text itself.

    Raises:
        ValueError: a file holds no text that can be read, a folder has no such file, or the argument is an address.
    """
    if argument == "-":
        return [
            (argument, "standard input", _shown(documents.from_bytes(_standard_input(), "standard input", encoding)))
        ]
    if ADDRESS.fullmatch(argument):
        raise ValueError(
            f"{argument} is an address, and latentmem opens none; save the page as a file first, for example with "
            f"`curl -L -o page.html {shlex.quote(argument)}`, and write the file."
        )
    path = Path(argument)
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError):  # too long for a path, or no path at all: it is a text
        return None
    if is_folder:
        return _listed(argument, documents.under(path), encoding)
    if exists:
        return [(argument, path.name, _read(path, encoding))]
    if re.search(r"[*?\[]", argument) and (listing := documents.matching(argument)).files:
        return _listed(argument, listing, encoding)
    return None


def _standard_input() -> bytes:
    return sys.stdin.buffer.read(documents.LIMITS.bytes + 1)


def _read(path: Path, encoding: str | None) -> str:
    try:
        return _shown(documents.from_file(path, encoding), path)
    except OSError as error:
        raise UnreadableError(f"{path} can not be read: {error.strerror}.") from None


def _listed(argument: str, listing: documents.Listing, encoding: str | None) -> list[Text]:
    """The texts of many files; what holds no text is skipped and named."""
    texts, skipped = [], listing.skipped
    for name, path in listing.files:
        try:
            texts.append((str(path), name, _read(path, encoding)))
        except UnreadableError as error:
            skipped.append((name, str(error).removeprefix(f"{path} ")))
    for line in _lines(skipped):
        typer.echo(line, err=True)
    if not texts:
        raise ValueError(f"{argument} holds no file with a text that can be read.")
    return texts


def _lines(skipped: list[tuple[str, str]]) -> Iterator[str]:
    for name, reason in skipped[:NAMED]:
        yield f"skipped {name}: {reason}"
    if len(skipped) > NAMED:
        yield f"skipped {len(skipped) - NAMED} more"


def _shown(document: documents.Document, path: Path | None = None) -> str:
    """The text; the encoding is printed if it was guessed."""
    if document.guess:
        name = path or "standard input"
        typer.echo(f"{name}: read as {document.guess}, which is a guess; --encoding names another.", err=True)
    return document.text
