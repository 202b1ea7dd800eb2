"""Text in any encoding: byte order mark, then UTF-8, then what the text declares, then a guess."""

from __future__ import annotations

import codecs
import re
from itertools import islice

from latentmem.documents import guessing
from latentmem.errors import UnreadableError

MARKS = (  # the marks of 32 bits begin like those of 16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")  # no text has them

# An encoding, and the one with more characters that is meant by its name, as browsers take it.
WIDER = {"iso8859-1": "cp1252", "shift_jis": "cp932", "euc_kr": "cp949", "gb2312": "gb18030", "gbk": "gb18030"}

# Codecs of names and of program text: no text is kept in them, and the first takes time that grows with the square.
NO_TEXT = {"punycode", "idna", "unicode-escape", "raw-unicode-escape", "utf-7", "undefined"}


def decoded(data: bytes, encoding: str, errors: str = "strict") -> str:
    """Text in an encoding, or in the wider one that is meant by its name.

    Raises:
        LookupError: there is no such encoding of texts.
        UnicodeError: the bytes are no text in it.
    """
    name = codecs.lookup(encoding).name
    if name in NO_TEXT:
        raise LookupError(f"{encoding} is no encoding of texts; name another.")
    try:
        return data.decode(WIDER[name])
    except (KeyError, UnicodeError):
        return data.decode(encoding, errors)


def decode(data: bytes, encoding: str | None = None, declared: str | None = None) -> tuple[str, str]:
    """The text, and the encoding that was guessed or "".

    Raises:
        UnreadableError: the bytes are no text of the encoding, or no text at all.
        ValueError: there is no such encoding.
    """
    if encoding is not None:
        return _named(data, encoding), ""
    for mark, name in MARKS:
        if data.startswith(mark):
            return _named(data, name), ""
    for each in ("iso2022_jp" if b"\x1b$" in data else "utf-8", "utf-8", declared):
        if each and (text := _tried(data, each)) is not None:
            return text, ""
    text = _repaired(data)
    return (text, "utf-8") if text is not None else guessing.guess(data)


def _repaired(data: bytes) -> str | None:
    """UTF-8 with U+FFFD for a few broken bytes, or for a character that the end cuts off; None for other bytes."""
    if b"\0" in data:
        return None
    text = data.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    ascii_ = len(data.translate(None, bytes(range(128, 256))))
    whole = len(text) - ascii_ - broken
    latin = ascii_ > len(text) / 2  # two letters of another encoding stand together by chance in other scripts
    least = 10 if not latin else 1 if text.rstrip().endswith("\ufffd") else 3
    return text if whole >= least and broken <= max(1, whole // 1000) and not CONTROLS.search(text) else None


def _named(data: bytes, encoding: str) -> str:
    try:
        text = decoded(data, encoding).removeprefix("\ufeff")
    except LookupError:
        examples = "utf-8, utf-16, cp1252, shift_jis, gb18030, koi8-r"
        raise ValueError(f"there is no text encoding {encoding!r}; there are, for example, {examples}.") from None
    except UnicodeError:
        raise UnreadableError(f"is not text in {encoding}; name its true encoding.") from None
    if "\0" in text:
        raise UnreadableError(f"is not text in {encoding}: it has zero bytes; name its true encoding.")
    return text


def _tried(data: bytes, encoding: str) -> str | None:
    """The text in an encoding; None if it is none, or full of control characters."""
    try:
        text = decoded(data, encoding)
    except (LookupError, UnicodeError):
        return None
    most = len(text) // 100
    return None if "\0" in text or sum(1 for _ in islice(CONTROLS.finditer(text), most + 1)) > most else text
