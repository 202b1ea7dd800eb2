"""Rows of a data set: from `LATENTMEM_DATA`, from a file, or from the hub."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any


def local_rows(*names: str) -> list[list[dict[str, Any]]] | None:
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
    rows = []
    for name in names:
        with gzip.open(Path(folder) / name, "rt", encoding="utf-8") as file:
            rows.append([json.loads(line) for line in file])
    return rows


def rows_of_file(file: Path, what: str, fields: Mapping[str, type]) -> list[dict[str, Any]]:
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


@contextlib.contextmanager
def reading(name: str) -> Iterator[Callable[..., Any]]:
    """`datasets.load_dataset` for one set; where it or what it gives breaks off, the error says what to do instead."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            "this set is loaded from the hub with `datasets`: run `pip install 'latentmem[eval]'`, set LATENTMEM_DATA "
            "to a folder that holds it, or where there is --data take 'synthetic', which needs neither."
        ) from None
    try:
        yield partial(load_dataset, name)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name} could not be loaded from the hub ({reason}). Set LATENTMEM_DATA to a folder that holds the set, "
            f"or where there is --data take 'synthetic'."
        ) from error
