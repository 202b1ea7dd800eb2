"""A memory with its history as one file: a zip of a manifest, the journal and the objects, all of it verified."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from latentmem.container import Buffer
from latentmem.core.settings import MemorySettings
from latentmem.disk import check_folder, replacing
from latentmem.files import snapshot
from latentmem.store.contents import CONTENTS
from latentmem.store.journal import BEGINNINGS, EVENTS, KINDS, LATEST, STATES, Journal, Row
from latentmem.store.objects import HASH, Objects
from latentmem.store.states import States

FORMAT = "latentmem export 3"  # 2, and versions that were pruned
UNPRUNED = "latentmem export 2"
OLDER = {"latentmem export 1": "4f1b448"}  # format -> the last commit that reads it
FIELDS = {field.name for field in fields(Row)} - {"id", "memory"}  # of a line of the journal
PAYLOAD: dict[str, tuple[type, ...]] = {
    "source": (str,),
    "role": (str, type(None)),
    "resolved": (str, type(None)),
    "sha256": (str,),
    "text": (str,),
    "turns": (list,),
    "ids": (list,),
    "tokens": (int,),
}
FACTS: dict[str, tuple[type, ...]] = {  # of others any word or number is taken
    **dict.fromkeys(("M", "N", "size", "threads"), (int,)),
    **dict.fromkeys(("model", "dtype", "device", "machine", "torch", "transformers", "latentmem"), (str,)),
    **dict.fromkeys(("ids", "coder", "form", "order"), (str,)),
    **dict.fromkeys(("shares", "pruned"), (bool,)),
    **{"lost": (int, float), "blocks": (dict,), "longterm": (dict, type(None))},
}
BY_STATE = {  # state of a write -> the kinds of its row
    "pending": ("none",),
    "applied": ("snapshot", "delta", "pruned"),
    "failed": ("none", "snapshot", "pruned"),
}
SETTINGS = ("N", "form", "order", "longterm")  # of a version's facts
NEEDED = {"write": {"source", "role", "sha256"}} | {key: {"source"} for key in ("pin", "unpin", "forget", "expire")}


def export(journal: Journal, objects: Objects, states: States, memory: int, path: Path) -> None:
    """Write a memory to one file, atomically; a ValueError if the folder or an object is missing, or one is damaged."""
    check_folder(path)  # before the work
    rows = sorted(journal.rows([memory]), key=lambda row: row.seq)  # after a replay they are stored in another order
    begun: dict[str, bytes] = {}
    if rows[0].event == "fork":  # as if it had begun with the version that it was forked from
        whole = states.memory(rows[0])
        data = snapshot.to_bytes(whole)
        name = hashlib.sha256(data).hexdigest()
        begun[name] = data
        coders = {coder: len(objects.get(coder)) for coder in snapshot.coder_of(whole.coder)}
        facts = rows[0].facts | ({"blocks": coders, "coder": whole.coder} if coders else {})
        rows[0] = replace(
            rows[0], event="import", base=None, kind="snapshot", object=name, bytes=len(data), facts=facts
        )
    numbers, lines = {row.id: row.seq for row in rows}, []
    sizes: dict[str, int] = {}
    for row in rows:
        line = {name: getattr(row, name) for name in FIELDS}
        line["base"] = None if row.base is None else numbers[row.base]
        lines.append(json.dumps(line, sort_keys=True))
        sizes |= row.objects
    form = FORMAT if any(row.pruned for row in rows) else UNPRUNED
    manifest = {"format": form, "expiries": journal.expiries(memory), "objects": sizes}
    with replacing(path, private=True) as temporary, zipfile.ZipFile(temporary, "w") as file:
        _add_entry(file, "manifest.json", json.dumps(manifest, sort_keys=True).encode())
        _add_entry(file, "journal.jsonl", "\n".join(lines).encode())
        for name in sorted(sizes):
            _add_entry(file, _entry(name), begun.get(name) or objects.get(name))


def add(journal: Journal, objects: Objects, states: States, file: Reader, name: str) -> None:
    """Make a memory from an exported file, and read every version of it; whoever calls holds the objects.

    Raises:
        ValueError: a name that is taken, or a version that can not be read; the journal has not changed.
    """
    for hashed in file.objects:
        objects.put(file.read(hashed))
    with journal.transaction():
        first = journal.add(name, file.rows[0])
        journal.change(replace(first, time=file.rows[0].time))
        ids = [first.id]
        for row in file.rows[1:]:
            ids.append(journal.insert(replace(row, memory=first.memory, base=ids[row.base or 0])).id)
        for source, at in file.expiries.items():
            journal.set_expiry(first.memory, source, at)
        for row in journal.rows([first.memory]):
            if row.state != "pending" and row.kind != "pruned":
                states.memory(row, cached=False)


def _add_entry(file: zipfile.ZipFile, name: str, data: Buffer | bytes) -> None:
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
        ValueError: damaged, or not made by `export`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
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
        sizes = self._sizes()
        manifest = json.loads(self._file.read("manifest.json"))
        if manifest["format"] in OLDER:
            raise ValueError(f"commit {OLDER[manifest['format']]} of latentmem reads {manifest['format']!r}")
        if set(manifest) != {"format", "expiries", "objects"} or manifest["format"] not in (UNPRUNED, FORMAT):
            raise ValueError(f"expected the format {UNPRUNED!r} or {FORMAT!r}")
        self.objects, self.expiries = manifest["objects"], manifest["expiries"]
        if not all(type(at) is float and 0 <= at < LATEST for at in self.expiries.values()):
            raise ValueError("an expiry is no time")
        expected = {_entry(name): size for name, size in self.objects.items() if HASH.fullmatch(name)}
        if sizes != expected or len(expected) != len(self.objects):
            raise ValueError("its entries are not those that its manifest names")
        lines = self._file.read("journal.jsonl").decode().splitlines()
        self.rows = [_row(i, json.loads(line)) for i, line in enumerate(lines)]
        if any(row.pruned for row in self.rows) != (manifest["format"] == FORMAT):
            raise ValueError(f"a file has the format {FORMAT!r} where a version was pruned, else {UNPRUNED!r}")
        self._check_rows()

    def _sizes(self) -> dict[str, int]:
        """The sizes of all entries but the manifest and the journal."""
        entries = self._file.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"the entry {entry.filename!r} is compressed")
        if len({entry.filename for entry in entries}) != len(entries):
            raise ValueError("an entry is there twice")
        books = ("manifest.json", "journal.jsonl")
        return {entry.filename: entry.file_size for entry in entries if entry.filename not in books}

    def _check_rows(self) -> None:
        if not self.rows or self.rows[0].event not in BEGINNINGS:
            raise ValueError("its journal does not begin with a memory")
        keys = [row.key for row in self.rows if row.key is not None]
        if len(set(keys)) != len(keys):
            raise ValueError("two lines of its journal have the same key")
        if any(row.bytes != self.objects.get(row.object or "", 0) for row in self.rows):
            raise ValueError("an object has another size in its journal")
        if any(not row.parts.items() <= self.objects.items() for row in self.rows):
            raise ValueError("a block has another size in its journal")
        if set[str]().union(*(row.objects for row in self.rows)) != set(self.objects):
            raise ValueError("its objects are not those that its journal names")
        if self.rows[0].pruned or self.rows[-1].pruned:
            raise ValueError("its first or newest version was pruned")
        for row in self.rows:
            base = self.rows[row.base or 0]
            stands_for_pruned = row.kind == "none" and base.pruned and not row.pruned
            if stands_for_pruned or (row.kind in ("none", "delta") and base.kind == "pruned"):
                raise ValueError(f"version {row.seq} needs one that was pruned")
            needed: set[str] = set()
            if row.kind == "snapshot" and row.object:
                needed = snapshot.parts_of(bytearray(self.read(row.object)), f"version {row.seq}")
            if set(row.parts) != needed:
                raise ValueError(f"version {row.seq} names other blocks than its snapshot")


def _row(i: int, line: dict[str, Any]) -> Row:
    """Line i of a journal, checked by itself; a ValueError if it is no version of a memory."""
    if set(line) != FIELDS or snapshot.of_other_types(Row, line):
        raise ValueError(f"line {i} of its journal has other fields")
    json.dumps(line, ensure_ascii=False).encode()  # a ValueError where it is no valid Unicode
    row = Row(memory=0, **line)
    if row.state not in STATES or not _is_payload(row.event, row.payload):
        raise ValueError(f"line {i} of its journal has another state or payload")
    write, first = row.event == "write", row.event in BEGINNINGS
    sound = (
        row.event in EVENTS and row.kind in KINDS,
        row.seq == i and 0 <= row.attempts < 100 and 0 <= row.time < LATEST,
        (row.base is None) if i == 0 else (row.base is not None and 0 <= row.base < i),
        first == (i == 0) and (not first or row.kind == "snapshot"),
        (row.object is None) == (row.kind in ("none", "pruned")),
        row.kind in BY_STATE[row.state] if write else row.kind != "delta" and row.state != "pending",
        _are_facts(row.facts) and row.pruned >= (row.kind == "pruned"),
        not (row.pruned and row.state == "pending"),
    )
    if not all(sound):
        raise ValueError(f"line {i} of its journal does not belong there")
    MemorySettings.of({what: row.facts[what] for what in SETTINGS if what in row.facts})
    return row


def _are_facts(facts: dict[str, Any]) -> bool:
    """Whether a version can have these facts; its blocks are compared with the objects."""
    if "shares" in facts and "size" not in facts:
        return False
    return all(
        type(value) in FACTS.get(name, (str, bool, int, float))
        and value is not False
        and (type(value) not in (int, float) or 0 <= value < 1 << 62)
        for name, value in facts.items()
    )


def _is_payload(event: str, payload: dict[str, Any]) -> bool:
    needed, write = NEEDED.get(event, set()), event == "write"
    if not needed <= set(payload) <= set(PAYLOAD) or len(set(CONTENTS) & set(payload)) != int(write):
        return False
    return (
        all(type(value) in PAYLOAD[name] for name, value in payload.items())
        and all(type(token) is int for token in payload.get("ids", ()))
        and all(map(_is_turn, payload.get("turns", ())))
    )


def _is_turn(turn: object) -> bool:
    return type(turn) is dict and set(turn) == {"role", "content"} and {*map(type, turn.values())} == {str}
