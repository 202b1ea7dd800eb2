"""A process of its own reads a document, because a hostile document can take all time and memory, or end its reader."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentmem.errors import UnreadableError


@dataclass(frozen=True)
class Limits:
    """The most that reading one file may take."""

    bytes: int = 100_000_000  # of the file
    characters: int = 20_000_000  # of its text
    seconds: float = 60
    memory: int = 2 << 30  # bytes; where the system can limit a process


LIMITS = Limits()
PREFIX, OLD = "latentmem-document-", 3600  # of folders; seconds after which nobody reads a document in one any more
ONE_THREAD = {
    "MALLOC_ARENA_MAX": "2",
    "RAYON_NUM_THREADS": "1",
    "TOKIO_WORKER_THREADS": "1",
}  # address space is limited


def convert(data: bytes, kind: str, encoding: str | None, limits: Limits) -> str:
    """The text of a document.

    Raises:
        UnreadableError: the document has no text that can be read; the message lacks its subject, the file's name.
    """
    facts = json.dumps([kind, encoding, limits.characters, limits.seconds, limits.memory])
    _sweep()
    with _ends_orderly(), tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        out = _output([sys.executable, "-P", "-m", "latentmem.documents.worker", facts], data, folder, limits)
    try:
        answer = json.loads(out)
    except ValueError:  # the process was ended: it allocated too much, or the reader crashed
        raise UnreadableError("can not be read: it is broken, or unpacks to more than memory may hold.") from None
    if "problem" in answer:
        raise UnreadableError(answer["problem"])
    return answer["text"]


def _sweep() -> None:
    """Remove the folders of readers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > OLD:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _ends_orderly() -> Iterator[None]:
    """Let SIGTERM end this program as `sys.exit` does, which leaves no folder, where the program does nothing else."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _output(command: list[str], data: bytes, folder: str, limits: Limits) -> bytes:
    """What a process prints; kreuzberg unpacks a library into `folder`, which nobody else may write."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    surroundings = os.environ | ONE_THREAD | {"PYTHONPATH": path, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), folder)}
    with subprocess.Popen(
        command, env=surroundings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        try:
            return child.communicate(data, timeout=limits.seconds)[0]
        except subprocess.TimeoutExpired:
            message = f"takes more than {limits.seconds:g} s to be read; it is broken, or larger than it looks."
            raise UnreadableError(message) from None
        finally:
            child.kill()
