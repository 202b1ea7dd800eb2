"""A memory with its history as one file: a zip of a manifest, the journal and the objects, all of it verified."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from latentmem.files.container import Buffer, replacing
from latentmem.store.journal import EVENTS, KINDS, STATES, Row
from latentmem.store.objects import HASH

FORMAT = "latentmem export 1"
LATEST = 1e11  # seconds since 1970: the year 5138
TYPES: dict[str, tuple[type, ...]] = {
    "seq": (int,),
    "base": (int, type(None)),
    "event": (str,),
    "payload": (dict,),
    "key": (str, type(None)),
    "state": (str,),
    "error": (str, type(None)),
    "attempts": (int,),
    "kind": (str,),
    "object": (str, type(None)),
    "bytes": (int,),
    "made": (dict,),
    "time": (float,),
}
assert set(TYPES) == {field.name for field in fields(Row)} - {"id", "memory"}
SAYS: dict[str, tuple[type, ...]] = {
    "source": (str,),
    "role": (str, type(None)),
    "resolved": (str, type(None)),
    "sha256": (str,),
    "text": (str,),
    "turns": (list,),
    "ids": (list,),
    "tokens": (int,),
}
NEEDS = {"write": {"source", "role", "sha256"}} | {event: {"source"} for event in ("pin", "unpin", "forget", "expire")}


def write(path: Path, rows: list[Row], expiries: dict[str, float], get: Callable[[str], Buffer | bytes]) -> None:
    """Write a memory to one file, atomically; equal arguments give equal bytes.

    Args:
        rows: its versions; each but the first is made from another of them.
        get: hash -> object.

    Raises:
        ValueError: the folder does not exist, or an object is missing or damaged.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; create it first.")
    seqs = {row.id: row.seq for row in rows}
    lines = []
    for row in rows:
        line = {name: getattr(row, name) for name in TYPES}
        line |= {"base": None if row.base is None else seqs[row.base], "made": row.made or {}}
        lines.append(json.dumps(line, sort_keys=True))
    sizes = {row.object: row.bytes for row in rows if row.object}
    for row in rows:
        sizes |= _blocks(row)
    manifest = {"format": FORMAT, "expiries": expiries, "objects": sizes}
    with replacing(path, private=True) as temporary, zipfile.ZipFile(temporary, "w") as file:
        _add(file, "manifest.json", json.dumps(manifest, sort_keys=True).encode())
        _add(file, "journal.jsonl", "\n".join(lines).encode())
        for name in sorted(sizes):
            _add(file, _entry(name), get(name))


def _blocks(row: Row) -> dict[str, int]:
    """The blocks of a long-term memory that a version refers to, and their sizes."""
    return (row.made or {}).get("blocks", {})


def _add(file: zipfile.ZipFile, name: str, data: Buffer | bytes) -> None:
    file.writestr(zipfile.ZipInfo(name), data)  # stored, dated 1980


def _entry(name: str) -> str:
    return f"objects/{name}.safetensors"


class Reader:
    """An exported file, opened and checked; use it with `with`.

    Entries are stored, not compressed, so nothing in it is larger than the file; no path of it is ever used.

    Args:
        path: the file.

    Attributes:
        rows: the versions, oldest first; `base` is the number of another, smaller one.
        expiries: source -> seconds since 1970.
        objects: hash -> size.

    Raises:
        ValueError: no such file, damaged, or not made by `write`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        try:
            self._file = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is no exported memory ({error}).") from error
        try:
            self._read_books()
        except (KeyError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile, ValueError) as error:
            self._file.close()
            raise ValueError(f"{path} is damaged or no exported memory: {error}.") from error

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> bytes:
        """One object, verified."""
        try:
            data = self._file.read(_entry(name))
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self._path} is damaged: {error}.") from error
        if hashlib.sha256(data).hexdigest() != name:
            raise ValueError(f"{self._path} is damaged: the object {name} has another content.")
        return data

    def _read_books(self) -> None:
        entries = self._file.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"the entry {entry.filename!r} is compressed")
        if len({entry.filename for entry in entries}) != len(entries):
            raise ValueError("an entry is there twice")
        manifest = json.loads(self._file.read("manifest.json"))
        if set(manifest) != {"format", "expiries", "objects"} or manifest["format"] != FORMAT:
            raise ValueError(f"expected the format {FORMAT!r}")
        self.objects, self.expiries = manifest["objects"], manifest["expiries"]
        if not all(type(at) is float and 0 <= at < LATEST for at in self.expiries.values()):
            raise ValueError("an expiry is no time")
        found = {entry.filename: entry.file_size for entry in entries}
        expected = {_entry(name): size for name, size in self.objects.items() if HASH.fullmatch(name)}
        found = {name: size for name, size in found.items() if name not in ("manifest.json", "journal.jsonl")}
        if found != expected or len(expected) != len(self.objects):
            raise ValueError("its entries are not those that its manifest names")
        lines = self._file.read("journal.jsonl").decode().splitlines()
        self.rows = [self._row(i, json.loads(line)) for i, line in enumerate(lines)]
        if not self.rows or self.rows[0].event not in ("create", "import"):
            raise ValueError("its journal does not begin with a memory")
        keys = [row.key for row in self.rows if row.key is not None]
        if len(set(keys)) != len(keys):
            raise ValueError("two lines of its journal have the same key")
        if any(row.bytes != self.objects.get(row.object or "", 0) for row in self.rows):
            raise ValueError("an object has another size in its journal")
        blocks = [_blocks(row) for row in self.rows]
        if any(type(some) is not dict or not some.items() <= self.objects.items() for some in blocks):
            raise ValueError("a block has another size in its journal")
        if {row.object for row in self.rows if row.object}.union(*blocks) != set(self.objects):
            raise ValueError("its objects are not those that its journal names")

    def _row(self, i: int, line: dict[str, Any]) -> Row:
        if set(line) != set(TYPES) or any(type(line[name]) not in kinds for name, kinds in TYPES.items()):
            raise ValueError(f"line {i} of its journal has other fields")
        json.dumps(line, ensure_ascii=False).encode()  # a ValueError where it is no valid Unicode
        row, says = Row(memory=0, **line), line["payload"]
        if not NEEDS.get(row.event, set()) <= set(says) <= set(SAYS):
            raise ValueError(f"line {i} of its journal says other things")
        if any(type(value) not in SAYS[name] for name, value in says.items()):
            raise ValueError(f"line {i} of its journal has a value of another type")
        if any(type(token) is not int for token in says.get("ids", [])):
            raise ValueError(f"line {i} of its journal holds token ids that are no numbers")
        known = row.event in EVENTS and row.state in STATES and row.kind in KINDS
        known = known and 0 <= row.attempts < 100 and 0 <= row.time < LATEST
        for turn in says.get("turns", []):
            if type(turn) is not dict or set(turn) != {"role", "content"} or {*map(type, turn.values())} != {str}:
                raise ValueError(f"line {i} of its journal holds turns that are none")
        first = row.event in ("create", "import")
        based = row.base is None if i == 0 else row.base is not None and 0 <= row.base < i
        carries = (row.object is not None) == (row.kind != "none") and (row.kind == "delta") <= (row.event == "write")
        second = i == 1 and row.event == "import"  # a memory that was taken with what it was made from
        begins = first == (i == 0 or second) and (not first or row.kind == "snapshot")
        if not (known and row.seq == i and begins and based and carries):
            raise ValueError(f"line {i} of its journal does not belong there")
        if row.event == "write" and (row.state == "applied") != (row.kind != "none"):
            raise ValueError(f"line {i} of its journal is a write without an object, or one too many")
        if (row.event == "write") != (len({"text", "turns", "ids"} & set(says)) == 1):
            raise ValueError(f"line {i} of its journal holds no text, more than one, or one too many")
        if row.state == "pending" and row.event != "write":
            raise ValueError(f"line {i} of its journal waits for what can not be applied")
        return row
