"""Files under a folder or a pattern, each named by its path under the folder; what is skipped is named, too."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple


class Listing(NamedTuple):
    """Files, and what is no file to be read.

    Attributes:
        files: (name, path) each; the name is the path under the folder, with `/`.
        skipped: (name, reason) each.
    """

    files: list[tuple[str, Path]]
    skipped: list[tuple[str, str]]


def under(folder: str | Path) -> Listing:
    """All files under a folder, at any depth, in the order of their names, but hidden ones and links to folders."""
    folder, listing = Path(folder), Listing([], [])

    def unreadable(error: OSError) -> None:
        listing.skipped.append((_name(Path(error.filename), folder) + "/", f"can not be read: {error.strerror}"))

    for place, folders, files in os.walk(folder, onerror=unreadable):
        for name in sorted(folders):
            path = Path(place, name)
            if name.startswith(".") or path.is_symlink():
                folders.remove(name)
                listing.skipped.append(
                    (_name(path, folder) + "/", "hidden" if name[0] == "." else "a link to a folder")
                )
        folders.sort()
        for name in sorted(files):
            path = Path(place, name)
            reason = "hidden" if name.startswith(".") else "" if path.is_file() else "no regular file"
            if reason:
                listing.skipped.append((_name(path, folder), reason))
            else:
                listing.files.append((_name(path, folder), path))
    listing.files.sort(key=lambda file: file[0].split("/"))
    return listing


def matching(pattern: str) -> Listing:
    """All files that fit a pattern (`*`, `?`, `[a-z]`, `**` for any depth), and the files under folders that fit it.

    A file is named by its path under the folder that stands before the first sign of the pattern.
    """
    fixed = re.match(r"[^*?\[]*/", pattern)
    folder, listing = Path(fixed[0] if fixed else "."), Listing([], [])
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - the pattern may be absolute
    for path in matches:
        if path.is_file():
            listing.files.append((_name(path, folder), path))
        elif path.is_dir() and "**" not in pattern:
            inside = under(path)
            listing.files.extend((_name(file, folder), file) for _, file in inside.files)
            listing.skipped.extend((f"{_name(path, folder)}/{name}", reason) for name, reason in inside.skipped)
    return listing


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
