"""What commands take in: texts to write, and what a person types."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

LIKE_A_PATH = re.compile(r"^(/|~|\.\.?/)|\.[A-Za-z]\w{0,4}$")


def texts_of(arguments: list[str]) -> list[tuple[str, str]]:
    """The arguments of `write` -> (source, text) each; files of one name in different folders keep their paths."""
    texts = [(argument, *_read(argument)) for argument in arguments]
    paths: dict[str, set[str]] = {}
    for argument, name, _ in texts:
        paths.setdefault(name, set()).add(argument)
    keep_names = {name for name in paths if len(paths[name]) == 1} | {"text", "standard input"}
    return [(name if name in keep_names else argument, text) for argument, name, text in texts]


def _read(argument: str) -> tuple[str, str]:
    """An argument of `write` -> (source, text): standard input, a file, or the argument itself if it is a sentence."""
    if argument == "-":
        return "standard input", _decoded("standard input", sys.stdin.buffer.read())
    path = Path(argument)
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError:  # too long for a path: it is a text
        exists = is_folder = False
    if is_folder:
        raise ValueError(f"{argument} is a folder; name its files, for example {argument.rstrip('/')}/*.txt.")
    if exists:
        try:
            return path.name, _decoded(argument, path.read_bytes())
        except OSError as error:
            raise ValueError(f"{argument} can not be read: {error.strerror}.") from None
    if not argument.strip():
        raise ValueError("the text to be written is empty; give a file, a text in quotes, or - for standard input.")
    if len(argument.split()) == 1 or LIKE_A_PATH.search(argument):
        raise ValueError(
            f"there is no file {argument!r}. (A text in quotes has at least two words and does not look like a path; "
            f"any text can be piped: give - for standard input.)"
        )
    return "text", argument


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


def lines() -> Iterator[str]:
    """What a person types, until they leave."""
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/exit", "/quit"):
            return
        if line:
            yield line
