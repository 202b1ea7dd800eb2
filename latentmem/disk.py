"""How the package writes files: complete or not at all, and durable.

    replace_bytes           a small file, such as JSON
    replacing               any other file: yields a temporary path beside it
    replace_folder          a folder of files that belong together

A new file is written beside the old one, flushed, and renamed over it; then the folder is flushed. A crash at any
moment leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


class Disk:
    """The file operations that a crash may come between; tests put a forgetful disk in its place."""

    def mkdir(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def create(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)

    def sync(self, path: Path) -> None:
        """Flush a file's content, or a folder's names, to the device."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def sync_folder(self, folder: Path) -> None:
        if os.name == "posix":  # elsewhere a folder can not be opened, and a rename is as durable as it gets
            self.sync(folder)

    def rename(self, path: Path, to: Path) -> None:
        path.replace(to)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)


DISK = Disk()


def check_folder(path: Path) -> None:
    """Refuse a path whose folder does not exist; a ValueError."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; create it first.")


@contextlib.contextmanager
def replacing(path: Path, *, private: bool = False, disk: Disk = DISK) -> Iterator[Path]:
    """Give an empty temporary file beside `path`; at the end flush it and rename it over `path`.

    Where this or the block raises, the temporary file goes and `path` stays as it was.

    Args:
        private: only the owner may read the file; else the process decides (umask).
        disk: the file operations; for tests.

    Raises:
        ValueError: the folder does not exist.
        OSError: the disk is full or not writable.
    """
    check_folder(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
        yield temporary
        disk.sync(temporary)
        disk.rename(temporary, path)
    except BaseException:
        disk.remove(temporary)
        raise
    disk.sync_folder(path.parent)


def replace_bytes(path: Path, data: bytes | str, *, private: bool = False, disk: Disk = DISK) -> None:
    """Write a small file whole, a text as UTF-8; `private`, `disk` and errors are those of `replacing`."""
    with replacing(path, private=private, disk=disk) as temporary:
        disk.create(temporary, data.encode() if isinstance(data, str) else data)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put a folder of files in the place of another: flush all files, then rename.

    A crash between the removal of the old folder and the rename leaves neither at `folder`; `temporary` is whole then.
    """
    for path in sorted(temporary.rglob("*"), reverse=True):
        if path.is_file():
            DISK.sync(path)
        else:
            DISK.sync_folder(path)
    DISK.sync_folder(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    DISK.rename(temporary, folder)
    DISK.sync_folder(folder.parent)
