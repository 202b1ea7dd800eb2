"""The process that reads one document: bytes on standard input, JSON on standard output."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys

from latentmem.documents import books, library, mail, markdown, markup, office, tables
from latentmem.errors import UnreadableError

READERS = {
    "docx": office.word,
    "pptx": office.slides,
    **dict.fromkeys(("odt", "ods", "odp"), office.opendocument),
    "epub": books.text,
    "html": lambda data: markup.text(data.decode()),
    "xml": lambda data: markup.xml_text(data.decode()),
    "csv": lambda data: tables.of_csv(data.decode()),
    "markdown": lambda data: markdown.text(data.decode()),
}
BROKEN = "is broken or cut off; open it in the program that made it, and save it again."
NOT_PLAIN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u00ad\u200b\ufeff\ufffe]")

LARGEST = 32 << 20  # bytes of a file that it may write: kreuzberg's PDF library has 8 MB


def limit(seconds: float, memory: int) -> None:
    """Bound this process, as far as the system can: memory, time, and files."""
    try:
        import resource
    except ImportError:  # Windows
        return
    most = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: LARGEST,
        resource.RLIMIT_CORE: 0,
    }
    for what, most_ in most.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (most_, most_))
    signal.alarm(int(seconds) + 1)  # ends this process even where nobody waits for its answer


def end_with_parent() -> None:
    """Let this process end when the one that waits for its answer ends, where the system can tell (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def convert(data: bytes, kind: str, encoding: str | None) -> str:
    """The plain text of a document.

    Raises:
        UnreadableError: there is none; the message lacks its subject.
    """
    try:
        if kind == "zip":
            kind = office.kind_of(data)
        if kind == "mail":
            text = mail.text(data, encoding)
        else:
            text = READERS[kind](data) if kind in READERS else library.text(data, kind)
    except UnreadableError:
        raise
    except MemoryError:
        raise UnreadableError("unpacks to more than memory may hold; split it.") from None
    except Exception:  # noqa: BLE001 - whatever a broken file makes of its reader
        raise UnreadableError(BROKEN) from None
    text = tidy(text)
    if not text:
        raise UnreadableError("holds no text.")
    return text


def tidy(text: str) -> str:
    """A text without control characters, blanks at ends of lines, and more than one empty line in a row."""
    text = NOT_PLAIN.sub("", re.sub(r"\r\n?|[\x0b\x0c\u2028\u2029]", "\n", text)).replace("\u00a0", " ")
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def main() -> None:
    kind, encoding, characters, seconds, memory = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    end_with_parent()
    limit(seconds, memory)
    try:
        text = convert(sys.stdin.buffer.read(), kind, encoding)
        if len(text) > characters:
            raise UnreadableError(f"holds {len(text):,} characters, and {characters:,} are the most; split it.")
        answer = {"text": text}
    except UnreadableError as error:
        answer = {"problem": str(error)}
    out.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace"))
    out.flush()
    os._exit(0)  # threads of a library are not waited for


if __name__ == "__main__":
    main()
