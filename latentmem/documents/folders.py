"""Files under a folder or a pattern, each named by its path under the folder; what is skipped is named, too."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Sequence
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
    """All files under a folder, at any depth, in the order of their names, but hidden ones and links that leave it.

    A link to a folder is skipped, too.
    """
    return _listed(Path(folder), Path(folder).resolve(), hidden=False)


def _listed(folder: Path, home: Path, hidden: bool) -> Listing:
    listing = Listing([], [])

    def unreadable(error: OSError) -> None:
        listing.skipped.append((_name(Path(error.filename), folder) + "/", f"can not be read: {error.strerror}"))

    for place, folders, files in os.walk(folder, onerror=unreadable):
        for name in sorted(folders):
            path = Path(place, name)
            is_hidden = name[0] == "." and not hidden
            if is_hidden or path.is_symlink():
                folders.remove(name)
                listing.skipped.append((_name(path, folder) + "/", "hidden" if is_hidden else "a link to a folder"))
        folders.sort()
        for name in sorted(files):
            path = Path(place, name)
            reason = "hidden" if name[0] == "." and not hidden else _no_file(path, home)
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
    parts = Path(pattern).parts
    depth = parts.index("**") if "**" in parts else len(parts)
    below = parts[depth:]
    for path in sorted(map(Path, glob.glob(str(Path(*parts[:depth]))))):  # noqa: PTH207 - the pattern may be absolute
        if any(place.is_symlink() for place in (path, *path.parents) if place.is_dir() and _inside(place, folder)):
            listing.skipped.append((_name(path, folder), "in a link to a folder, or one"))
        elif path.is_dir():
            inside = _listed(path, folder.resolve(), hidden=any(part[0] == "." for part in below))
            prefix = "" if path == folder else f"{_name(path, folder)}/"
            listing.files.extend((prefix + name, file) for name, file in inside.files if _fits(name, below))
            listing.skipped.extend(
                (prefix + name, reason) for name, reason in inside.skipped if not below or reason != "hidden"
            )
        elif not below and (reason := _no_file(path, folder.resolve())):
            listing.skipped.append((_name(path, folder), reason))
        elif not below:
            listing.files.append((_name(path, folder), path))
    return listing


def _fits(name: str, pattern: Sequence[str]) -> bool:
    """Whether a name fits the parts of a pattern, of which `**` is any number of folders; without parts all do."""
    ends = {0}  # the parts of the pattern that the parts of the name so far can fill
    for part in name.split("/"):
        ends |= {end + 1 for end in ends if pattern[end : end + 1] == ("**",)}
        ends = {
            end if pattern[end] == "**" else end + 1
            for end in ends
            if end < len(pattern)
            and (part[0] != "." or pattern[end][0] == ".")
            and (pattern[end] == "**" or fnmatch.fnmatch(part, pattern[end]))
        }
    return not pattern or any(all(part == "**" for part in pattern[end:]) for end in ends)


def _no_file(path: Path, home: Path) -> str:
    """Why a path is no file to be read; "" where it is one."""
    if not path.is_file():
        return "no regular file"
    return "" if not path.is_symlink() or path.resolve().is_relative_to(home) else "a link to a file elsewhere"


def _inside(path: Path, folder: Path) -> bool:
    return path != folder and path.is_relative_to(folder)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
