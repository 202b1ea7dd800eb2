"""Where memories lie on this computer: a store in `$LATENTMEM_HOME`, which adopts the files of before there was one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from latentmem.core.memory import Memory
from latentmem.store import Store, Turns

SUFFIXES = (".chat.json", ".undo", ".safetensors")  # in this order they go; while the last is there, nothing is lost
TIMEOUT = 10.0  # seconds to wait for another process


def home() -> Path:
    """`$LATENTMEM_HOME`, by default in the user's data directory; made if it is not there."""
    named = os.environ.get("LATENTMEM_HOME") or platformdirs.user_data_dir("latentmem")
    home = Path(os.path.expanduser(named))  # noqa: PTH111 - Path's raises for an unknown user
    try:
        home.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"memories can not be kept in {home}: it is no folder. Set LATENTMEM_HOME to one.") from None
    return home


def opened() -> tuple[Store, dict[str, str]]:
    """The store of this computer; and names of older files that could not be adopted, with the reason."""
    store = Store(home() / "store", timeout=TIMEOUT)
    return store, adopt(store)


def adopt(store: Store) -> dict[str, str]:
    """Take memories that lie in files of their own into the store, and remove the files.

    A memory file becomes a memory of the same name; the step before it becomes the version before it, and turns of a
    chat that were not written stay so. A file goes when the store has what was in it, so this can be cut off anywhere
    and goes on at the next call.

    Returns:
        Name -> why it could not be adopted; its files are left alone.
    """
    folder, refused = home() / "memories", {}
    if not folder.is_dir():
        return {}
    names = {file.name.removesuffix(suffix) for suffix in SUFFIXES for file in folder.glob(f"[!.]*{suffix}")}
    for name in sorted(names):
        try:
            with FileLock(folder / f".{name}.lock", timeout=TIMEOUT):
                _adopt(store, folder, name)
        except Timeout:
            refused[name] = f"another process uses the memory {name!r} in {folder}; end it and try again."
        except ValueError as error:
            refused[name] = str(error)
    if not any(file.suffix in (".safetensors", ".undo", ".json") for file in folder.iterdir()):
        for left in folder.glob(".*"):  # locks, and what broken-off writes have left
            left.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    return refused


def remove(name: str) -> bool:
    """Remove the files of a name that could not be adopted; whether there were any."""
    folder = home() / "memories"
    found = [file for file in (folder / f"{name}{suffix}" for suffix in SUFFIXES) if file.is_file()]
    for file in found:
        file.unlink()
    return bool(found)


def _adopt(store: Store, folder: Path, name: str) -> None:
    chat, undo, file = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    for kept in (chat, undo, file):
        for half_written in folder.glob(f".{kept.name}.*"):
            half_written.unlink()
    memory = Memory.load(file) if file.is_file() else None
    turns = _turns(chat, memory.version if memory is not None else "") if chat.is_file() else []
    if memory is not None:
        key, names = f"file {memory.version}", [name, *(f"{name[:50]}-{i}" for i in range(2, 1000))]
        taken = store.names()  # by another memory, unless it came from this very file
        name = next(n for n in names if n not in taken or any(v.key == key for v in store.history(n)))
        store.create(name, memory, before=Memory.load(undo) if undo.is_file() else None, key=key)
    elif name not in store.names():  # a chat that has no memory yet: it waits until it has one
        return
    if turns:
        with Turns(store, name) as kept_turns:
            pending = kept_turns.pending()
            if pending[: len(turns)] != turns:  # else this was cut off behind here
                kept_turns.keep_turns([*turns, *pending], "chat")
    for old in (chat, undo, file) if memory is not None else (chat,):
        old.unlink(missing_ok=True)


def _turns(file: Path, version: str) -> list[dict[str, str]]:
    """Turns of a chat that are not in its memory."""
    try:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        messages = [{"role": m["role"], "content": m["content"]} for m in kept["messages"]]
        return messages[kept["leaving"] :] if kept["before"] != version else messages
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} is damaged; move it away to go on without its turns.") from None
