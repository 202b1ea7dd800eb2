"""Rows of data sets: from a file, from the folder `$LATENTMEM_DATA`, or from the hub."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def places(path: str) -> list[Path]:
    """Where a relative path may lie: in the working folder, and in `$LATENTMEM_DATA` if it is set."""
    folder = os.environ.get("LATENTMEM_DATA")
    return [Path(path).expanduser(), *([Path(folder) / path] if folder else [])]


def local_rows(*names: str) -> list[list[Row]] | None:
    """Files of `$LATENTMEM_DATA`, or None where the variable is not set."""
    folder = os.environ.get("LATENTMEM_DATA")
    if not folder:
        return None
    missing = [name for name in names if not (Path(folder) / name).is_file()]
    if missing:
        raise ValueError(
            f"LATENTMEM_DATA is {folder}, and {missing[0]} is not there. Point it at a folder that holds it, or "
            f"unset it to load the set from the hub."
        )
    return [list(rows_of_lines(Path(folder) / name)) for name in names]


def rows_of_lines(file: Path) -> Iterator[Row]:
    """Rows of a `.jsonl` or `.jsonl.gz` file.

    Raises:
        ValueError: the file can not be read, or a line holds no JSON object.
    """
    opened = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opened(file, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):  # noqa: B007 - named in the error
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("a JSON object was expected")
                    yield row
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{file} can not be read after line {number}: {error}. Mend it, or take it away.") from None


def rows_of_file(file: Path, what: str, fields: Mapping[str, type]) -> list[Row]:
    """Rows of a file that the user names: a JSON list, or one row a line, gzipped or not.

    Args:
        what: they should be, in words.
        fields: that each of them has, and what they hold.

    Raises:
        ValueError: a file that can not be read, or rows of another form.
    """
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines()]
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} holds no {what} ({error}).") from None
    for row in rows or [None]:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in fields.items()):
            form = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
            raise ValueError(
                f"{file} holds no {what}: objects with {form} were expected, and one is {row!r:.120}. Give a file of "
                f"that form."
            )
    return list(rows)


NO_PACKAGE = (
    "this set is loaded from the hub with `datasets`: run `pip install 'latentmem[eval]'`, set LATENTMEM_DATA to a "
    "folder that holds it, or where there is --data take 'synthetic', which needs neither."
)
NO_SET = "Set LATENTMEM_DATA to a folder that holds the set, or where there is --data take 'synthetic'."


@contextlib.contextmanager
def reading(name: str, no_package: str = NO_PACKAGE, no_set: str = NO_SET) -> Iterator[Callable[..., Any]]:
    """Give `datasets.load_dataset` for one set.

    Args:
        no_package: the error where `datasets` is not installed.
        no_set: the remedy where the hub, or what it gives, breaks off.

    Raises:
        ValueError: with one of these sentences.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(no_package) from None
    try:
        yield partial(load_dataset, name)
    except Exception as error:  # whatever the hub and its readers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name} could not be loaded from the hub ({reason}). {no_set}") from error
