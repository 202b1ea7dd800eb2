"""Memories by name on this computer: one file each under `$LATENTMEM_HOME/memories`, with one step of undo."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from latentmem.core.memory import Memory
from latentmem.core.snapshot import read_header, replacing
from latentmem.prompts import Message

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


def folder() -> Path:
    """`$LATENTMEM_HOME/memories`, by default in the user's data directory; made if it is not there."""
    named = os.environ.get("LATENTMEM_HOME") or platformdirs.user_data_dir("latentmem")
    home = Path(os.path.expanduser(named))  # noqa: PTH111 - Path's raises for an unknown user
    try:
        (home / "memories").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"memories can not be kept in {home}: it is no folder. Set LATENTMEM_HOME to one.") from None
    return home / "memories"


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Let no Ctrl-C come between steps that belong together; they take milliseconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def names() -> list[str]:
    """All memories, by name."""
    return sorted(path.stem for path in folder().glob("*.safetensors"))


class NamedMemory:
    """One memory by name: its file, the step before it, and the turns of a chat that are not in it yet.

    Args:
        name: letters, digits, "_" and "-", at most 64, no path.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} can not be a memory's name: use letters, digits, '_' and '-', and no path.")
        self.name = name
        self.path = folder() / f"{name}.safetensors"
        self._undo = folder() / f"{name}.undo"
        self._chat = folder() / f"{name}.chat.json"
        self._before: Memory | None = None

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
    def writing(self, seconds: float = 10, *, settle: bool = True) -> Iterator[None]:
        """Hold the memory alone while it is changed, and first clear up what a crash left behind.

        Raises:
            ValueError: another process holds it for longer than `seconds`.
        """
        try:
            with FileLock(folder() / f".{self.name}.lock", timeout=seconds):
                for kept in (self.path, self._undo, self._chat):
                    for half_written in folder().glob(f".{kept.name}.*"):
                        half_written.unlink()
                if settle:
                    self._settle()
                yield
        except Timeout:
            raise ValueError(f"another process is writing to the memory {self.name!r}; try again later.") from None

    def begin(self, before: Memory) -> None:
        """Make `before` what `undo` goes back to, from the next `save` on."""
        self._before = before

    def save(self, memory: Memory) -> Memory:
        """Replace the file, atomically."""
        if self._before is not None:
            if self.exists:
                with replacing(self._undo) as temporary:
                    shutil.copyfile(self.path, temporary)
            else:
                self._before.save(self._undo)
            self._before = None
        return memory.save(self.path)

    def undo(self) -> Memory:
        """Go back to the memory before the last command that wrote.

        Raises:
            ValueError: there is no such step; one is kept.
        """
        self.load()
        if not self._undo.is_file():
            raise ValueError(
                f"there is nothing to undo in the memory {self.name!r}: one step is kept, and it is used up."
            )
        memory = Memory.load(self._undo)
        self._undo.replace(self.path)
        return memory

    def remove(self) -> None:
        """Delete the memory, its undo step and its unwritten chat turns."""
        self.existing()
        for path in (self._chat, self._undo, self.path):  # while it is listed it can be removed again
            path.unlink(missing_ok=True)

    def existing(self) -> None:
        """Raise a ValueError if nothing of this name is there, not even a damaged file or the turns of a chat."""
        if not any(path.is_file() for path in (self.path, self._undo, self._chat)):
            self.load()

    # --- the turns of a chat that are not in the memory yet (`chat.Journal`) ----------------------------------------

    def pending(self) -> list[Message]:
        """Turns of a chat that ended without being written."""
        return self._turns()[0]

    def keep_turns(self, messages: list[Message]) -> None:
        """Keep turns that are not in the memory, so that a crash loses none."""
        self._keep(messages, 0)

    def keep_written(self, memory: Memory, messages: list[Message], count: int) -> Memory:
        """Save a memory that holds the first `count` turns; after a crash, `_settle` sees whether it does."""
        with _no_interrupt():
            self._keep(messages, count)
            saved = self.save(memory)
            self._keep(messages[count:], 0)
        return saved

    def _keep(self, messages: list[Message], leaving: int) -> None:
        if not messages:
            self._chat.unlink(missing_ok=True)
            return
        kept = {"messages": messages, "leaving": leaving, "before": self._version()}
        with replacing(self._chat) as temporary:
            temporary.write_text(json.dumps(kept), encoding="utf-8")

    def _settle(self) -> None:
        """Take turns out that were on their way into the memory, if the memory was saved with them."""
        messages, leaving, before = self._turns()
        if leaving:
            self._keep(messages[leaving:] if self._version() != before else messages, 0)

    def _turns(self) -> tuple[list[Message], int, str]:
        if not self._chat.is_file():
            return [], 0, ""
        try:
            kept = json.loads(self._chat.read_text(encoding="utf-8"))
            messages = [{"role": m["role"], "content": m["content"]} for m in kept["messages"]]
            return messages, kept["leaving"], kept["before"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{self._chat} is damaged; move it away to go on without its turns.") from None

    def _version(self) -> str:
        return read_header(self.path)[1] if self.exists else ""
