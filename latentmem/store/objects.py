"""Tensors of a store: immutable objects that are named by the hash of their bytes, in a folder or at an fsspec URL."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem.disk import Disk, replace_bytes
from latentmem.errors import DamagedError

if TYPE_CHECKING:
    from latentmem.container import Buffer

HASH = re.compile(r"[0-9a-f]{64}")
SUFFIX = ".safetensors"
SMALL = 1 << 16  # bytes up to which a file is read, not mapped: a process can not map more than some ten thousand


class Objects(ABC):
    """Immutable objects by content hash."""

    def put(self, data: bytes) -> str:
        """Write an object; when this returns, no crash loses it.

        Returns:
            Its name: the sha256 of its bytes.

        Raises:
            OSError: the disk is full or not writable; nothing else is touched.
        """
        name = hashlib.sha256(data).hexdigest()
        self._write(name, data)
        return name

    def get(self, name: str) -> Buffer:
        """Read an object and verify it.

        Returns:
            Its bytes; on a disk they are mapped, not copied, so that copying what is needed is left to the caller.

        Raises:
            DamagedError: it is missing or damaged.
        """
        try:
            data = self._read(name)
        except FileNotFoundError:
            raise _missing(name) from None
        if hashlib.sha256(data).hexdigest() != name:
            raise _damaged(name)
        return data

    def check(self, name: str) -> None:
        """Verify an object; a DamagedError if it is missing or damaged."""
        self.get(name)

    @abstractmethod
    def __contains__(self, name: str) -> bool:
        """Whether an object is there; it is not read."""

    @abstractmethod
    def names(self) -> Iterator[str]:
        """All objects that are there."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove an object; behind `tidy` no crash brings it back."""

    @abstractmethod
    def tidy(self) -> None:
        """Remove what broken-off writes have left, and flush all that was removed; nobody may be writing."""

    @abstractmethod
    def _write(self, name: str, data: bytes) -> None: ...

    @abstractmethod
    def _read(self, name: str) -> Buffer: ...


class Local(Objects):
    """Objects in a folder, `ab/abcd....safetensors`: a temporary file, flushed, renamed, the folders flushed.

    Args:
        folder: is made if it is not there.
    """

    def __init__(self, folder: Path, disk: Disk) -> None:
        self.folder, self.disk = folder, disk
        self._not_flushed: set[Path] = set()  # folders from which something was removed
        disk.mkdir(folder)
        disk.sync_folder(folder.parent)

    def _write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        self.disk.mkdir(path.parent)
        replace_bytes(path, data, disk=self.disk)
        self.disk.sync_folder(self.folder)

    def _read(self, name: str) -> Buffer:
        path = self._path(name)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= SMALL or os.name != "posix":  # elsewhere a file that is mapped can not be removed
                return bytearray(file.read())
        import torch

        try:  # mapped so that no handle stays open: a memory may consist of thousands of files
            return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy().data
        except RuntimeError as error:
            if not path.exists():  # removed meanwhile
                raise FileNotFoundError(path) from error
            raise OSError(f"{path} can not be mapped ({error}).") from error

    def check(self, name: str) -> None:
        try:
            with self._path(name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise _missing(name) from None
        if digest != name:
            raise _damaged(name)

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def names(self) -> Iterator[str]:
        for path in self.folder.glob(f"??/*{SUFFIX}"):
            if HASH.fullmatch(path.stem):
                yield path.stem

    def remove(self, name: str) -> None:
        path = self._path(name)
        self._not_flushed.add(path.parent)
        self.disk.remove(path)

    def tidy(self) -> None:
        for path in self.folder.glob(f"??/.*{SUFFIX}.*"):
            self.disk.remove(path)
        for folder in sorted(self._not_flushed):
            self.disk.sync_folder(folder)
        self._not_flushed.clear()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}{SUFFIX}"


class Remote(Objects):
    """Objects at an fsspec URL. There is no rename: an object is uploaded under its final name.

    An upload that is broken off leaves a damaged object that no version refers to; the next one replaces it.

    Args:
        url: for example "s3://bucket/folder".
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.files, self.folder = url_to_fs(url)

    def _write(self, name: str, data: bytes) -> None:
        self.files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
        self.files.pipe_file(self._path(name), data)

    def _read(self, name: str) -> Buffer:
        return bytearray(self.files.cat_file(self._path(name)))

    def __contains__(self, name: str) -> bool:
        return self.files.exists(self._path(name))

    def names(self) -> Iterator[str]:
        for path in self.files.find(self.folder):
            name = path.rpartition("/")[2].removesuffix(SUFFIX)
            if HASH.fullmatch(name):
                yield name

    def remove(self, name: str) -> None:
        self.files.rm_file(self._path(name))

    def tidy(self) -> None:
        pass  # uploads have no temporary names

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name[:2]}/{name}{SUFFIX}"


def _missing(name: str) -> DamagedError:
    return DamagedError(f"the object {name} of the store is missing. Restore it from a copy.")


def _damaged(name: str) -> DamagedError:
    return DamagedError(f"the object {name} of the store is damaged. Restore it from a copy.")


def objects_at(place: Path | str, disk: Disk) -> Objects:
    """Objects in a folder of this machine, or at an fsspec URL."""
    if isinstance(place, Path) or "://" not in place:
        return Local(Path(place), disk)
    if place.startswith(("file://", "local://")):
        from fsspec.core import url_to_fs

        return Local(Path(url_to_fs(place)[1]), disk)
    return Remote(place)
