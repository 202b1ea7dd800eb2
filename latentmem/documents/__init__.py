"""Files that people have -> plain text: PDF, Word, slides, sheets, books, HTML, e-mail, and text in any encoding."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NamedTuple

from latentmem.documents import decoding, kinds, process
from latentmem.documents.folders import Listing, matching, under
from latentmem.documents.process import LIMITS, Limits
from latentmem.errors import UnreadableError

__all__ = ["LIMITS", "Document", "Limits", "Listing", "from_bytes", "from_file", "matching", "read", "text_of", "under"]


class Document(NamedTuple):
    """The text of a file.

    Attributes:
        text: without markup and scripts; a text file's own text, unchanged.
        guess: the encoding that was guessed; "" where the file tells its encoding or the caller names it.
    """

    text: str
    guess: str = ""


def read(path: str | Path, encoding: str | None = None) -> str:
    """The plain text of a file of any kind that `from_bytes` takes.

    Raises:
        UnreadableError: the file holds no text that can be read; the message is one sentence that names the file.
        OSError: there is no such file, or it can not be opened.
    """
    return from_file(path, encoding).text


def text_of(text: object) -> str:
    """A text as a caller gives it, or that of a file, where the caller gives a path.

    Raises:
        ValueError: it is neither, or the file can not be read.
    """
    if isinstance(text, str):
        return text
    if isinstance(text, Path):
        if text.is_dir():
            raise ValueError(f"{text} is a folder; give one of its files.")
        try:
            return read(text)
        except FileNotFoundError:
            raise ValueError(f"{text}: no such file.") from None
        except OSError as error:
            raise ValueError(f"{text} can not be read: {error.strerror}.") from None
    what = repr(text)
    raise ValueError(
        f"a text must be a str, or the pathlib.Path of a file; got {type(text).__name__} "
        f"{what if len(what) < 60 else what[:60] + '...'}."
    )


def from_file(path: str | Path, encoding: str | None = None, limits: Limits = LIMITS) -> Document:
    """The document in a file, as `from_bytes`; a file that is too large is refused before it is read."""
    path = Path(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError(f"{path} is no regular file; give a file, or pipe its text to -.")
    if status.st_size > limits.bytes:
        raise UnreadableError(f"{path} {_too_large(status.st_size, limits)}")
    return from_bytes(path.read_bytes(), str(path), encoding, limits)


def from_bytes(data: bytes, name: str, encoding: str | None = None, limits: Limits = LIMITS) -> Document:
    """The document that a file's bytes hold; its content says what kind it is, and the name where content can not.

    Args:
        name: of the file, for its kind and for errors.
        encoding: of a text; by default the byte order mark, what HTML declares, UTF-8, or a guess.

    Raises:
        UnreadableError: the bytes hold no text that can be read; the message is one sentence that begins with the name.
        ValueError: there is no such encoding.
    """
    try:
        return _converted(data, name, encoding, limits)
    except UnreadableError as error:
        raise UnreadableError(f"{name} {error}") from None


def _converted(data: bytes, name: str, encoding: str | None, limits: Limits) -> Document:
    if len(data) > limits.bytes:
        raise UnreadableError(_too_large(len(data), limits))
    if not data.strip():
        raise UnreadableError("is empty: there is nothing to write.")
    kind, guess = kinds.of_bytes(data, name), ""
    if kind is None:
        text, guess = decoding.decode(data, encoding, kinds.declared(data))
        kind = kinds.of_text(text, name)
        data = text.encode("utf-8", "surrogatepass")
    if kind != "text":
        text = process.convert(data, kind, encoding, limits)
    if len(text) > limits.characters:
        raise UnreadableError(f"holds {len(text):,} characters, and {limits.characters:,} are the most; split it.")
    if not text.strip():
        raise UnreadableError("is empty: there is nothing to write.")
    return Document(text, guess)


def _too_large(size: int, limits: Limits) -> str:
    return f"has {_megabytes(size)}, and {_megabytes(limits.bytes)} are the most; split it, or write its text alone."


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}".removesuffix(".0") + " MB" if size >= 1e6 else f"{size:,} bytes"
