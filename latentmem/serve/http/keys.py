"""API keys: who may read and write which memories. The file holds hashes; a key is shown once, when it is made."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import FileLock

from latentmem.disk import replace_bytes

FILE = "keys.json"
FORMAT = "latentmem keys 1"
NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
PATTERN = re.compile(r"[A-Za-z0-9_*?\[\]!-]{1,64}")
RIGHTS = ("read", "write")


@dataclass(frozen=True)
class Key:
    """What one key may do."""

    name: str  # for lists and logs
    sha256: str  # of the key, as hex digits
    memories: tuple[str, ...]  # patterns of the names of memories that it may touch, such as "alice" or "team-*"
    rights: tuple[str, ...] = RIGHTS  # "read", or "read" and "write"

    def may_touch(self, memory: str) -> bool:
        """Whether a memory of this name is this key's business."""
        return any(fnmatchcase(memory, pattern) for pattern in self.memories)

    @property
    def writes(self) -> bool:
        return "write" in self.rights


EVERYONE = Key("none", "", ("*",))  # where the server asks for no key


class Keys:
    """The keys in a file, which need not exist; read anew when the file changes.

    Where a key is `required`, requests without a key are refused even while there is none. Once there was one, they
    always are.

    Raises:
        ValueError: the file is damaged, or others than its owner can change it.
    """

    def __init__(self, path: Path, *, required: bool = False) -> None:
        self.path, self._required, self._lock = path, required, threading.Lock()
        self._seen: object = ()
        self._keys: dict[str, Key] = {}
        with self._lock:
            self._refresh()

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        self.all()
        return self._required

    def all(self) -> list[Key]:
        """The keys as the file has them now, by name; none while it is damaged."""
        with self._lock:
            try:
                self._refresh()
            except (ValueError, OSError) as error:
                self._seen, self._keys = (), {}  # read again, even if a whole file comes within the same tick
                sys.stderr.write(f"latentmem: no key is taken: {error}\n")
            return list(self._keys.values())

    def find(self, secret: str) -> Key | None:
        """The key with this secret; takes as long for a wrong one."""
        hashed, match = _hash(secret), None
        for key in self.all():
            if hmac.compare_digest(key.sha256, hashed):
                match = key
        return match

    def add(self, name: str, memories: Iterable[str], *, read_only: bool = False) -> str:
        """Make a key.

        Returns:
            Its secret, which is kept nowhere else.

        Raises:
            ValueError: a name that is taken or can not be one, or no valid pattern.
        """
        patterns = tuple(memories)
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} can not be a key's name: use letters, digits and '_.@-', at most 64.")
        for pattern in patterns:
            if not PATTERN.fullmatch(pattern):
                raise ValueError(
                    f"{pattern!r} is no pattern of memories' names: use their letters and *, for example 'team-*'."
                )
        if not patterns:
            raise ValueError("a key needs the memories that it may touch, for example 'alice,team-*', or '*' for all.")
        secret = f"lm-{secrets.token_urlsafe(32)}"
        with self._changing() as keys:
            if name in keys:
                raise ValueError(f"there is a key {name!r} already; remove it first, or choose another name.")
            keys[name] = Key(name, _hash(secret), patterns, RIGHTS[:1] if read_only else RIGHTS)
        return secret

    def remove(self, name: str) -> None:
        """Take a key away, at once for servers that run.

        Raises:
            ValueError: no such key.
        """
        with self._changing() as keys:
            if name not in keys:
                raise ValueError(f"there is no key {name!r} (there are: {', '.join(keys) or 'none'}).")
            del keys[name]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Key]]:
        """The keys, to be changed; what they are at the end is kept."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=10), self._lock:
            self._refresh()
            keys = dict(self._keys)
            yield keys
            data = json.dumps({"format": FORMAT, "keys": [asdict(key) for key in keys.values()]}, indent=1)
            replace_bytes(self.path, data, private=True)
            self._refresh()

    def _refresh(self) -> None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._seen, self._keys = (), {}
            return
        seen = (status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode)
        if seen == self._seen:
            return
        try:
            if os.name == "posix" and status.st_mode & 0o022:
                raise ValueError(f"{self.path} can be changed by others than its owner; chmod 600 it.")
            keys = _read(self.path)
        except ValueError:
            self._required = True
            raise
        self._seen, self._keys, self._required = seen, keys, self._required or bool(keys)


def _read(path: Path) -> dict[str, Key]:
    try:
        book = json.loads(path.read_text(encoding="utf-8"))
        if book["format"] != FORMAT:
            raise ValueError(f"expected the format {FORMAT!r}, got {book['format']!r}")
        keys = [Key(k["name"], k["sha256"], tuple(k["memories"]), tuple(k["rights"])) for k in book["keys"]]
        if any(not re.fullmatch(r"[0-9a-f]{64}", k.sha256) or not set(k.rights) <= set(RIGHTS) for k in keys):
            raise ValueError("a key has other fields")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or move it away and make new keys.") from None
    return {key.name: key for key in keys}


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
