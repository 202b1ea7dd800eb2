"""Memories by name on this computer: one file each under `$LATENTMEM_HOME/memories`, with one step of undo."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from latentmem.core.memory import Memory
from latentmem.core.snapshot import replacing
from latentmem.prompts import Message

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def folder() -> Path:
    """`$LATENTMEM_HOME/memories`, by default in the user's data directory; made if it is not there."""
    home = os.environ.get("LATENTMEM_HOME") or platformdirs.user_data_dir("latentmem")
    path = Path(home).expanduser() / "memories"
    path.mkdir(parents=True, exist_ok=True)
    return path


def names() -> list[str]:
    """All memories, by name."""
    return sorted(path.stem for path in folder().glob("*.safetensors"))


class NamedMemory:
    """One memory by name: its file, the step before it, and the turns of a chat that was cut off.

    Args:
        name: letters, digits, "_", "-" and ".", at most 64, no path.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} can not be a memory's name: use letters, digits, '_', '-' and '.', at most 64, and no path."
            )
        self.name = name
        self.path = folder() / f"{name}.safetensors"
        self._undo = folder() / f"{name}.undo"
        self._chat = folder() / f"{name}.chat.json"
        self._lock = folder() / f".{name}.lock"

    @property
    def exists(self) -> bool:
        return self.path.is_file()

    def load(self) -> Memory:
        """Read and verify it; a ValueError names the memories that exist."""
        if not self.exists:
            known = ", ".join(names()) or "none yet"
            raise ValueError(f"there is no memory {self.name!r} (there are: {known}). `latentmem write` makes one.")
        return Memory.load(self.path)

    @contextlib.contextmanager
    def writing(self, seconds: float = 10) -> Iterator[None]:
        """Hold the memory alone while it is changed.

        Raises:
            ValueError: another process holds it for longer than `seconds`.
        """
        try:
            with FileLock(self._lock, timeout=seconds):
                yield
        except Timeout:
            raise ValueError(
                f"another process is writing to the memory {self.name!r}; try again when it is done."
            ) from None

    def keep_for_undo(self, before: Memory) -> None:
        """Make `before`, the memory as it was when a command began, what `undo` goes back to."""
        if self.exists:
            with replacing(self._undo) as temporary:
                shutil.copyfile(self.path, temporary)
        else:
            before.save(self._undo)

    def save(self, memory: Memory) -> Memory:
        """Replace the file, atomically."""
        return memory.save(self.path)

    def undo(self) -> Memory:
        """Go back to the memory before the last command that wrote.

        Raises:
            ValueError: there is no such step; one is kept.
        """
        if not self._undo.is_file():
            raise ValueError(
                f"there is nothing to undo in the memory {self.name!r}: one step is kept, and it is used up."
            )
        memory = Memory.load(self._undo)
        self._undo.replace(self.path)
        self._chat.unlink(missing_ok=True)
        return memory

    def remove(self) -> None:
        """Delete the memory, its undo step and its unwritten chat turns."""
        if not self.exists:
            self.load()
        for path in (self.path, self._undo, self._chat):
            path.unlink(missing_ok=True)

    def pending(self, memory: Memory) -> list[Message]:
        """Turns of a chat that ended without being written; none if the memory has moved on since."""
        if not self._chat.is_file():
            return []
        kept = json.loads(self._chat.read_text(encoding="utf-8"))
        return kept["messages"] if kept["updates"] == memory.updates else []

    def keep_pending(self, memory: Memory, messages: list[Message]) -> None:
        """Keep the turns that are in the context and not in the memory, so that a crash loses none."""
        with replacing(self._chat) as temporary:
            temporary.write_text(json.dumps({"updates": memory.updates, "messages": messages}), encoding="utf-8")

    def drop_pending(self) -> None:
        self._chat.unlink(missing_ok=True)
