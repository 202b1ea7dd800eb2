"""A memory <-> one safetensors file, complete and verified; never pickle (letters: `latentmem.core`).

header    "format"; "memory": what is no tensor of it, as JSON; "checksum" over that and the tensors
tensors   slots, births, origins of the memory; or, where updates are kept coded, `stands` and those updates that lie in
          no file of their own: see `files.updates`
          longterm.places of its archive, if it has one, and all archived slots that lie in no file of their own:
          longterm.slots, .births, .origins, .orders, .keys (trained retriever), .frequencies (rule "frequency")
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from latentmem import container, longterm
from latentmem.coding.codec import EIGHT_BITS, form_of
from latentmem.container import Buffer
from latentmem.core.memory import Memory, Source
from latentmem.core.settings import LongTermSettings, MemorySettings, settings_of
from latentmem.disk import check_folder
from latentmem.errors import DamagedError
from latentmem.files import updates
from latentmem.longterm.blocks import NO_SLOT, Block, BlockRange, StoredSlots, packed
from latentmem.longterm.longterm import FrequencyLongTerm, LongTerm
from latentmem.longterm.updates import UpdateArchive
from latentmem.written import Written

FORMAT = "latentmem memory 4"  # the last commits that read earlier ones:
EARLIER = {"latentmem memory 1": "4f1b448", "latentmem memory 2": "45f6ebf", "latentmem memory 3": "3361d57"}
BLOCK_FORMAT = "latentmem block 1"
TENSORS = ("slots", "births", "origins")
FIELDS = tuple(f.name for f in fields(Memory) if f.name not in (*TENSORS, "version"))
TYPES = {"int": int, "str": str, "bool": bool, "float": float, "dict": dict, "None": type(None)}  # by their names
ARCHIVED = tuple(f"longterm.{name}" for name in ("slots", "births", "origins", "orders"))
REQUIRED = {"N", "K", "preset", "compression", "choice"}  # settings that no file leaves out
COUNTS = ("clock", "since")  # of the rule "frequency"
MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # of altered values


class Writer(Protocol):
    """Keeps parts of a memory in files of their own, which memories share."""

    def put_block(self, block: Block) -> str: ...  # a full block of an archive; gives its name
    def put_updates(self, updates: Sequence[Written]) -> list[tuple[str, int]]: ...  # of each the file, and where in it


class Reader(Protocol):
    """Gives the parts of a memory that lie in files of their own."""

    def block(self, name: str) -> Block: ...
    def updates(self, name: str) -> Sequence[Written]: ...


def save(memory: Memory, path: str | Path) -> Memory:
    """Write a memory to `path`: to a temporary file beside it, flushed to disk, then renamed over it.

    Args:
        path: the file, by convention `NAME.safetensors`; its folder must exist.

    Returns:
        The same memory with `version`, the checksum that the file carries.

    Raises:
        ValueError: the folder does not exist.
        OSError: the disk is full or not writable; what stood at `path` before is untouched.
    """
    check_folder(Path(path))  # before the work
    tensors, header = _parts(memory)
    container.write(Path(path), tensors, header, private=True)
    return replace(memory, version=header["checksum"])


def load(path: str | Path) -> Memory:
    """Read a memory back, to the bit, onto the CPU.

    Raises:
        ValueError: no such file, not a memory, truncated, altered, or of another format; the message says which.
    """
    return _memory(str(path), *container.read(Path(path)))


def to_bytes(memory: Memory, apart: Writer | None = None) -> bytes:
    """What `save` would write; equal bytes for equal memories, so that a hash of them names the memory.

    Args:
        apart: keeps the full blocks of the archive, and coded updates; by default all is in one file.
    """
    return container.to_bytes(*_parts(memory, apart))


def from_bytes(data: Buffer, name: str, *, verified: bool = False, parts: Reader | None = None) -> Memory:
    """Read a memory from the bytes of its file.

    Args:
        data: as in `container.from_bytes`; the memory's tensors are views of it.
        name: what an error calls it.
        verified: the caller has found a hash of `data` to be right, so the checksum is not computed.
        parts: gives what `to_bytes` has kept apart.

    Raises:
        ValueError: as `load`.
    """
    return _memory(name, *container.from_bytes(data, name), verified=verified, parts=parts)


def block_to_bytes(block: Block) -> bytes:
    """A full block of an archive as a file of its own."""
    return container.to_bytes(_archived_tensors(block.stored), {"format": BLOCK_FORMAT})


def coder_of(identity: str) -> set[str]:
    """The name of a coder's file, where there is one."""
    return {identity} - {"", EIGHT_BITS}


def block_from_bytes(data: Buffer, name: str) -> Block:
    """Read a block back, its tensors views of `data`; a ValueError if it is none."""
    tensors, header = container.from_bytes(data, name)
    if header != {"format": BLOCK_FORMAT}:
        raise ValueError(f"{name} is no block of this version: expected {BLOCK_FORMAT!r}, got {header!r}.")
    try:
        return Block.of(_archived(tensors))
    except ValueError as error:
        raise _damaged(name, error) from error


def parts_of(data: Buffer, name: str) -> set[str]:
    """The names of the files that a memory's file needs: blocks, coded updates, and their coder."""
    values = _fields(name, container.from_bytes(data, name)[1])
    try:
        updates = {place[0] for _, _, _, place in values["written"] if place is not None}
        blocks = {block for block, *_ in (values["longterm"] or {}).get("blocks", ())}
        return updates | blocks | coder_of(values["coder"])
    except MALFORMED as error:
        raise _damaged(name, error) from error


def _damaged(name: str, reason: object) -> DamagedError:
    return DamagedError(f"{name} was altered or damaged: {reason}. Restore it from a copy.")


# --- writing ----------------------------------------------------------------------------------------------------------


def _parts(memory: Memory, apart: Writer | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a memory's file."""
    values = {name: getattr(memory, name) for name in FIELDS} | {"longterm": None, "written": []}
    if memory.settings.by_update:
        tensors, values["written"] = _update_parts(memory, apart)
        if isinstance(memory.longterm, UpdateArchive):
            values["longterm"] = {"first": memory.longterm.first}
    else:
        tensors = {name: getattr(memory, name).detach().cpu().contiguous() for name in TENSORS}
    if isinstance(memory.longterm, LongTerm):
        archived, values["longterm"] = _archive_parts(memory.longterm, apart)
        tensors |= archived
    text = json.dumps(values, default=asdict, sort_keys=True)
    return tensors, {"format": FORMAT, "memory": text, "checksum": _checksum(text, tensors)}


def _update_parts(memory: Memory, apart: Writer | None) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors of coded updates, and of each update: number, source, tensors' sizes and, if it lies apart, where."""
    written = list(memory.written.values())
    tensors: dict[str, Tensor] = {}
    places: list[Any] = [None] * len(written)
    if apart is None:
        tensors, _ = updates.joined(written)
    else:
        places = apart.put_updates(written)
    rows = zip(memory.written, updates.accounts(written), places, strict=True)
    table = [[number, account["source"], account["sizes"], place] for number, account, place in rows]
    return tensors | {"stands": updates.standing(memory)}, table


def _archive_parts(archive: LongTerm, apart: Writer | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of an archive: full blocks apart, if asked to, and the rest in one piece."""
    ranges, blocks = list(archive.ranges), []
    while apart and ranges and ranges[0].sealed:
        one = ranges.pop(0)
        blocks.append([apart.put_block(one.block), one.start, one.end])
    tensors, values = {"longterm.places": archive.places.contiguous()}, {"blocks": blocks}
    if ranges:
        tensors |= _archived_tensors(StoredSlots.joined([one.stored for one in ranges]))
    if isinstance(archive, FrequencyLongTerm):
        values |= {name: getattr(archive, name) for name in COUNTS}
        if archive.frequencies is not None:
            tensors["longterm.frequencies"] = archive.frequencies.contiguous()
    return tensors, values


def _archived_tensors(slots: StoredSlots) -> dict[str, Tensor]:
    return {
        name: tensor.contiguous() for name, tensor in zip((*ARCHIVED, "longterm.keys"), slots.tensors, strict=False)
    }


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    first = [name for name in TENSORS if name in tensors]
    names = (*first, *sorted(set(tensors) - set(TENSORS)))
    return container.checksum(text, {name: tensors[name] for name in names})


# --- reading ----------------------------------------------------------------------------------------------------------


def _fields(name: str, header: dict[str, str]) -> dict[str, Any]:
    """What a file's header says of a memory, each field of it, not yet verified."""
    form = header.get("format", "")
    if form in EARLIER:
        raise ValueError(f"{name} has the format {form!r} of an earlier version: commit {EARLIER[form]} reads it.")
    if form != FORMAT:
        raise ValueError(f"{name} is not a memory of this version: expected the format {FORMAT!r}, got {form!r}.")
    try:
        values = json.loads(header["memory"])
    except (KeyError, ValueError):
        values = None
    if not isinstance(values, dict) or set(values) != set(FIELDS) or not header.get("checksum"):
        raise _damaged(name, "its header is not complete")
    return values


def _memory(
    name: str,
    tensors: dict[str, Tensor],
    header: dict[str, str],
    *,
    verified: bool = False,
    parts: Reader | None = None,
) -> Memory:
    values = _fields(name, header)
    if not _by_update(values):
        _check_names(name, tensors, values["longterm"])
    if not verified and _checksum(header["memory"], tensors) != header["checksum"]:
        raise _damaged(name, "its checksum does not match")
    try:  # a checksum is no signature
        asked, counts, sources = values.pop("settings"), values.pop("longterm"), values.pop("sources")
        settings, table = _settings(asked), values.pop("written")
        if type(sources) is not list:
            raise ValueError(f"its sources are {sources!r}")
        sources = tuple(Source(**_typed(Source, source)) for source in sources)
        if settings.by_update:
            own = _coded(tensors, settings, table, counts, sources, parts)
        else:
            own = _exact(tensors, settings, counts, parts)
        plain = own | _typed(Memory, values) | {"version": header["checksum"]}
        memory = Memory(**plain, settings=settings, sources=sources)
        if any(getattr(memory.settings, name) != getattr(settings, name) for name in asked):
            raise ValueError(f"the settings {settings} are not complete")
        _check_numbers(memory)
        if isinstance(memory.longterm, LongTerm):
            _check_archive(memory.longterm, memory)
    except MALFORMED as error:
        raise _damaged(name, error) from error
    return memory


def _by_update(values: dict[str, Any]) -> bool:
    return isinstance(values["settings"], dict) and values["settings"].get("form") not in (None, "exact")


def _check_names(name: str, tensors: dict[str, Tensor], counts: Any) -> None:
    """Refuse a memory of hidden states that has other tensors."""
    archived = {key for key in tensors if key.startswith("longterm.")}
    if set(tensors) - archived != set(TENSORS) or bool(archived) != bool(counts):
        raise DamagedError(f"{name} holds the tensors {sorted(tensors)}; a memory has {sorted(TENSORS)}.")


def _exact(tensors: dict[str, Tensor], settings: MemorySettings, counts: Any, parts: Reader | None) -> dict[str, Any]:
    """Slots, births, origins and archive of a memory of hidden states."""
    archived = {key: tensor for key, tensor in tensors.items() if key.startswith("longterm.")}
    own: dict[str, Any] = {key: tensor for key, tensor in tensors.items() if key not in archived}
    return own | {"longterm": _archive(archived, settings.longterm, counts, parts) if counts else None}


def _coded(
    tensors: dict[str, Tensor],
    settings: MemorySettings,
    table: list[Any],
    counts: Any,
    sources: Sequence[Source],
    parts: Reader | None,
) -> dict[str, Any]:
    """Slots, births, origins, updates and archive of a memory whose updates are kept coded."""
    rest = dict(tensors)
    stands, inside = rest.pop("stands"), [row for row in table if row[3] is None]
    here = iter(updates.parted(rest, [{"source": source, "sizes": sizes} for _, source, sizes, _ in inside]))
    files: dict[str, Sequence[Written]] = {}
    written: dict[int, Written] = {}
    for number, source, sizes, place in table:
        if place is None:
            one = next(here)
        else:
            name, at = place
            if parts is None or at < 0:
                raise ValueError("its updates lie elsewhere")
            if name not in files:
                files[name] = parts.updates(name)
            one = files[name][at]
        if (one.source, {key: len(tensor) for key, tensor in one.tensors.items()}) != (source, sizes):
            raise ValueError(f"the update {number} is another one than was written")
        written[number] = one
    if any(form_of(one.tensors) != settings.form for one in written.values()):
        raise ValueError(f"its updates are not all of its form {settings.form}")
    if list(written) != sorted(written) or not all(type(number) is int and number > 0 for number in written):
        raise ValueError("its updates are not in their order")
    own: dict[str, Any] = updates.columns(stands, written, sources)
    if (settings.longterm is None) != (counts is None):
        raise ValueError(f"its long-term memory says {counts}")
    archive = None
    if settings.longterm is not None:
        archive = UpdateArchive.restored(settings.longterm, counts["first"], written, own["births"])
    return own | {"written": written, "longterm": archive}


def _settings(values: dict[str, Any]) -> MemorySettings:
    """A memory's settings; one that is newer than the file has its default. A ValueError if one is unknown."""
    for kind, part in ((MemorySettings, values), (LongTermSettings, values.get("longterm"))):
        if unknown := set(part or ()) - {one.name for one in settings_of(kind)}:
            raise ValueError(f"it has settings that this version does not know: {', '.join(sorted(unknown))}")
    if REQUIRED - set(values):
        raise ValueError(f"the settings are {sorted(values)}")
    return MemorySettings.of(values)


def _typed(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values of fields of a dataclass; a ValueError if one is of another type."""
    if wrong := of_other_types(kind, values):
        raise ValueError(f"{wrong[0]} of a {kind.__name__.lower()} is {values[wrong[0]]!r}")
    return values


def of_other_types(kind: Any, values: dict[str, Any]) -> list[str]:
    """Which values of fields of a dataclass are not of the fields' types, each of which has to stand in `TYPES`."""
    types = {
        field.name: [TYPES[name.partition("[")[0]] for name in str(field.type).split(" | ")]
        for field in fields(kind)
        if field.name in values
    }
    return [name for name, kinds in types.items() if type(values[name]) not in kinds]


def _archive(
    tensors: dict[str, Tensor],
    settings: LongTermSettings | None,
    values: dict[str, Any],
    parts: Reader | None,
) -> LongTerm:
    """The inverse of `_archive_parts`; a ValueError or TypeError if something does not fit."""
    if settings is None:
        raise ValueError("its long-term memory has no settings")
    tensors, counted = dict(tensors), settings.rule == "frequency"
    counts = {name: count for name, count in values.items() if name != "blocks"}
    if set(counts) != set(COUNTS if counted else ()) or not all(type(count) is int for count in counts.values()):
        raise ValueError(f"the long-term memory says {counts}")
    places = tensors.pop("longterm.places")
    if counted:
        counts["frequencies"] = tensors.pop("longterm.frequencies", None)
    ranges = [_range(parts, *one) for one in values["blocks"]]
    if tensors:
        rest = Block.of(_archived(tensors))
        ranges.append(BlockRange(rest, 0, rest.room))
    return longterm.kind(settings)(settings, places, tuple(ranges), **counts)


def _range(parts: Reader | None, name: str, start: int, end: int) -> BlockRange:
    if parts is None:
        raise ValueError("a part of its long-term memory lies elsewhere")
    block = parts.block(name)
    if not 0 <= start < end == block.room:
        raise ValueError(f"a block of {block.room} places is used from {start} to {end}")
    return BlockRange(block, start, end)


def _archived(tensors: dict[str, Tensor]) -> StoredSlots:
    """Archived slots out of a file's tensors; a ValueError if they do not fit each other."""
    keys = ["longterm.keys"] if "longterm.keys" in tensors else []
    if set(tensors) - set(keys) != set(ARCHIVED):
        raise ValueError(f"stored slots are the tensors {sorted(ARCHIVED)}, got {sorted(tensors)}")
    slots = StoredSlots.of([tensors[name] for name in (*ARCHIVED, *keys)])
    shape, columns = slots.orders.shape, (slots.births, slots.origins, slots.orders)
    wide = [slots.slots, *([] if slots.keys is None else [slots.keys])]
    if [t.dtype for t in columns] != [torch.int32, torch.int32, torch.int64] or len(shape) != 2:
        raise ValueError("births, origins and orders of stored slots are of other types")
    if any(t.shape != shape for t in columns) or any(t.ndim != 3 or t.shape[:2] != shape for t in wide):
        raise ValueError("stored slots are of another shape than their births, origins and orders")
    return slots


def _check_archive(archive: LongTerm, memory: Memory) -> None:
    """A ValueError if an archive does not fit its memory, or its parts each other."""
    int8, kinds = archive.settings.int8, set()
    width = packed(torch.zeros(1, memory.d)).shape[1] if int8 else memory.d
    for one in archive.ranges:
        slots, keys = one.block.stored.slots, one.block.stored.keys
        kinds.add((slots.dtype, None if keys is None else (keys.dtype, keys.shape[2])))
        if slots.shape[0] != memory.L or slots.shape[2] != width or (slots.dtype == torch.int8) != int8:
            raise ValueError(f"stored slots are {slots.dtype} {list(slots.shape)}, and a slot has {width} numbers")
    if len(kinds) > 1 or archive.places.dtype != torch.int32:
        raise ValueError("its stored slots do not fit each other")
    _check_range(archive.births, 0, memory.updates, "a stored slot was written by no update")
    _check_range(archive.origins, NO_SLOT, len(memory.sources) - 1, "a stored slot has an unknown source")
    frequencies = archive.frequencies if isinstance(archive, FrequencyLongTerm) else None
    if frequencies is not None and (
        frequencies.ndim != 2
        or len(frequencies) != memory.L
        or frequencies.shape[1] > archive.S
        or not frequencies.is_floating_point()
    ):
        raise ValueError("its frequencies are not those of its stored slots")


def _check_numbers(memory: Memory) -> None:
    """A ValueError where a slot, or a coded update, is of a source or an update that the memory does not have."""
    newest, archive = max(memory.written, default=0), memory.longterm
    if not newest <= memory.updates < 1 << 31:
        raise ValueError(f"it has had {memory.updates} updates, and its newest has the number {newest}")
    if isinstance(archive, UpdateArchive) and not (type(archive.first) is int and 0 < archive.first <= newest + 1):
        raise ValueError(f"its long-term memory begins with the update {archive.first}, and the newest is {newest}")
    if any(source.slots < 1 or source.tokens < 0 for source in memory.sources):
        raise ValueError(f"of a source nothing was written: {memory.sources}")
    if {memory.births.dtype, memory.origins.dtype} != {torch.int32}:
        raise ValueError(f"births and origins must be int32, got {memory.births.dtype} and {memory.origins.dtype}")
    _check_range(memory.births, 0, memory.updates, "a slot was written by no update")
    _check_range(memory.origins, -1, len(memory.sources) - 1, "a slot has an unknown source")


def _check_range(values: Tensor, least: int, most: int, reason: str) -> None:
    if values.numel() and not least <= int(values.min()) <= int(values.max()) <= most:
        raise ValueError(reason)


Memory._save, Memory._load = staticmethod(save), staticmethod(load)
