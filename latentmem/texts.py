"""Files of text that are to be written: read whole, and refused where they are no text."""

from __future__ import annotations

from pathlib import Path


def read(path: Path) -> str:
    """The text of a file; a ValueError where it is missing, empty, or no UTF-8 text."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give one of its files.")
    if not path.exists():
        raise ValueError(f"{path}: no such file.")
    try:
        return decoded(str(path), path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} can not be read: {error.strerror}.") from None


def decoded(name: str, data: bytes) -> str:
    """The text of bytes of a file, without a byte order mark; a ValueError, which calls it `name`, if it is none."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{name} is not UTF-8 text; turn it into plain text first.")
    if not text.strip():
        raise ValueError(f"{name} is empty: there is nothing to write.")
    return text


def text_of(text: object) -> str:
    """A text as a caller gives it, or that of a file; a ValueError for anything else."""
    if isinstance(text, Path):
        return read(text)
    if isinstance(text, str):
        return text
    what = repr(text)
    raise ValueError(
        f"a text must be a str, or the pathlib.Path of a file of text; got {type(text).__name__} "
        f"{what if len(what) < 60 else what[:60] + '...'}."
    )
