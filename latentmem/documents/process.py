"""A process of its own reads a document, because a hostile document can take all time and memory, or end its reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from latentmem.errors import UnreadableError


@dataclass(frozen=True)
class Limits:
    """The most that reading one file may take."""

    bytes: int = 100_000_000  # of the file
    characters: int = 20_000_000  # of its text
    seconds: float = 60
    memory: int = 2 << 30  # bytes; where the system can limit a process


LIMITS = Limits()
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
    with tempfile.TemporaryDirectory(prefix="latentmem-") as folder:
        out = _output([sys.executable, "-P", "-m", "latentmem.documents.worker", facts], data, folder, limits)
    try:
        answer = json.loads(out)
    except ValueError:  # the process was ended: it allocated too much, or the reader crashed
        raise UnreadableError("can not be read: it is broken, or unpacks to more than memory may hold.") from None
    if "problem" in answer:
        raise UnreadableError(answer["problem"])
    return answer["text"]


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
