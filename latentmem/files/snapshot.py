"""A memory <-> one safetensors file, complete and verified; never pickle (letters: `latentmem.core`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentmem.core.memory import Memory, Source
from latentmem.core.settings import LongTermSettings, MemorySettings, settings_of
from latentmem.files import container
from latentmem.files.container import Buffer
from latentmem.longterm import blocks as blockss
from latentmem.longterm import longterm
from latentmem.longterm.blocks import Block, BlockRange, StoredSlots
from latentmem.longterm.longterm import LongTerm

FORMAT = "latentmem memory 2"
EARLIER = {"latentmem memory 1": "4f1b448"}  # format -> the last commit that reads it
BLOCK_FORMAT = "latentmem block 1"
TENSORS = ("slots", "births", "origins")
KINDS: dict[str, type] = {
    **dict.fromkeys(("updates", "tokens"), int),
    **dict.fromkeys(("model", "adapters", "tokenizer", "model_name", "parent"), str),
    "settings": dict,
    "sources": list,
}
STORED = tuple(f"longterm.{name}" for name in ("slots", "births", "origins", "orders"))  # of a long-term memory
HEADER = tuple(f.name for f in fields(Memory) if f.name not in (*TENSORS, "version"))


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
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; create it first.")
    tensors, metadata = _parts(memory)
    container.write(path, tensors, metadata, private=True)
    return replace(memory, version=metadata["checksum"])


def to_bytes(memory: Memory, apart: Callable[[Block], str] | None = None) -> bytes:
    """What `save` would write, but equal bytes for equal memories, so that a hash of them names the memory.

    Args:
        apart: keeps a block of the long-term memory that is full and gives the name by which `from_bytes` asks for it;
            by default all is in one file.
    """
    return container.to_bytes(*_parts(memory, apart))


def block_to_bytes(block: Block) -> bytes:
    """A full block of a long-term memory as a file of its own."""
    return container.to_bytes(_stored(block.stored), {"format": BLOCK_FORMAT})


def blocks_of(data: Buffer, name: str) -> set[str]:
    """The names of the blocks that a memory's file leaves out."""
    says = _checked(name, container.from_bytes(data, name)[1])[0].get("longterm") or {}
    try:
        return {block for block, *_ in says.get("blocks", ())}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} was altered or damaged: {error}. Restore it from a copy.") from error


def block_from_bytes(data: Buffer, name: str) -> Block:
    """Read a block back; its tensors are views of `data`.

    Raises:
        ValueError: it is no block.
    """
    tensors, metadata = container.from_bytes(data, name)
    if metadata != {"format": BLOCK_FORMAT}:
        raise ValueError(f"{name} is no block of this version: expected {BLOCK_FORMAT!r}, got {metadata!r}.")
    try:
        return Block.of(_some(tensors))
    except ValueError as error:
        raise ValueError(f"{name} was altered or damaged: {error}. Restore it from a copy.") from error


def from_bytes(
    data: Buffer, name: str, *, verified: bool = False, block: Callable[[str], Block] | None = None
) -> Memory:
    """Read a memory from the bytes of its file.

    Args:
        data, name: as in `container.from_bytes`; the memory's tensors are views of `data`.
        verified: the caller has found a hash of `data` to be right, so the checksum is not computed.
        block: gives the blocks that `to_bytes` has kept apart.

    Raises:
        ValueError: as `load`.
    """
    tensors, metadata = container.from_bytes(data, name)
    return _memory(name, tensors, *_checked(name, metadata), verified, block)


def load(path: str | Path) -> Memory:
    """Read a memory back, to the bit, onto the CPU.

    Raises:
        ValueError: no such file, not a memory, truncated, altered, or of a newer format; the message says which.
    """
    path = Path(path)
    tensors, metadata = container.read(path)
    return _memory(path, tensors, *_checked(path, metadata))


def _parts(memory: Memory, apart: Callable[[Block], str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {name: getattr(memory, name).detach().cpu().contiguous() for name in TENSORS}
    says = {name: getattr(memory, name) for name in HEADER if name != "longterm"}
    says["longterm"] = None
    if (store := longterm.of(memory)) is not None:
        more, says["longterm"] = _longterm_parts(store, apart)
        tensors |= more
    header = json.dumps(says, default=asdict, sort_keys=True)
    return tensors, {"format": FORMAT, "memory": header, "checksum": _checksum(header, tensors)}


def _longterm_parts(store: LongTerm, apart: Callable[[Block], str] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a long-term memory: full blocks apart, if asked to, and the rest in one piece."""
    spans, blocks = list(store.ranges), []
    while apart and spans and spans[0].sealed:
        span = spans.pop(0)
        blocks.append([apart(span.block), span.start, span.end])
    tensors = {"longterm.places": store.places.contiguous()}
    if spans:
        tensors |= _stored(StoredSlots.joined([span.stored for span in spans]))
    if store.frequencies is not None:
        tensors["longterm.frequencies"] = store.frequencies.contiguous()
    return tensors, {"clock": store.clock, "since": store.since, "blocks": blocks}


def _stored(some: StoredSlots) -> dict[str, Tensor]:
    tensors = {name: getattr(some, name.split(".")[1]).contiguous() for name in STORED}
    return tensors | ({"longterm.keys": some.keys.contiguous()} if some.keys is not None else {})


def _some(tensors: dict[str, Tensor]) -> StoredSlots:
    """Stored slots out of a file's tensors; a ValueError if they do not fit each other."""
    if set(tensors) - {"longterm.keys"} != set(STORED):
        raise ValueError(f"stored slots are the tensors {sorted(STORED)}, got {sorted(tensors)}")
    slots, births, origins, orders = (tensors[name] for name in STORED)
    some = StoredSlots(slots, births, origins, orders, tensors.get("longterm.keys"))
    shape, kinds = some.orders.shape, (torch.int32, torch.int32, torch.int64)
    columns = (some.births, some.origins, some.orders)
    wide = [t for t in (some.slots, some.keys) if t is not None]
    if [t.dtype for t in columns] != list(kinds) or any(t.shape != shape for t in columns) or len(shape) != 2:
        raise ValueError("births, origins and orders of stored slots do not fit each other")
    if any(t.ndim != 3 or t.shape[:2] != shape for t in wide):
        raise ValueError("stored slots are of another shape than their births")
    return some


def _longterm(
    tensors: dict[str, Tensor],
    settings: LongTermSettings | None,
    says: dict[str, Any],
    d: int,
    updates: int,
    block: Callable[[str], Block] | None,
) -> LongTerm:
    """The other way of `_longterm_parts`; a ValueError or TypeError if something does not fit."""
    says = dict(says)
    blocks = says.pop("blocks")
    if set(says) != {"clock", "since"} or not all(type(count) is int for count in says.values()) or settings is None:
        raise ValueError(f"the long-term memory says {says}")
    places, frequencies = tensors.pop("longterm.places"), tensors.pop("longterm.frequencies", None)
    spans = []
    for name, start, end in blocks:
        if block is None:
            raise ValueError("a part of its long-term memory lies elsewhere")
        found = block(name)
        if not 0 <= start < end == found.room:
            raise ValueError(f"a block of {found.room} places is used from {start} to {end}")
        spans.append(BlockRange(found, start, end))
    if tensors:
        rest = Block.of(_some(tensors))
        spans.append(BlockRange(rest, 0, rest.room))
    store = LongTerm(settings, places, ranges=tuple(spans), frequencies=frequencies, **says)
    width = blockss.packed(torch.zeros(1, d)).shape[1] if settings.int8 else d
    for span in spans:
        slots = span.block.slots
        if slots.shape[2] != width or (slots.dtype == torch.int8) != settings.int8:
            raise ValueError(f"stored slots are {slots.dtype} of width {slots.shape[2]}, and a slot has {width}")
    births = store.column("births")
    if births.numel() and not 0 <= int(births.min()) <= int(births.max()) <= updates:
        raise ValueError("a stored slot was written by no update")
    parts = [span.stored for span in spans]
    if len({(part.slots.dtype, part.slots.shape[::2], part.keys is None) for part in parts}) > 1:
        raise ValueError("its stored slots do not fit each other")
    if places.dtype != torch.int32 or (parts and parts[0].slots.shape[0] != len(places)):
        raise ValueError("its stored slots are of another number of layers")
    if frequencies is not None and (
        frequencies.ndim != 2
        or len(frequencies) != len(places)
        or frequencies.shape[1] > store.S
        or not frequencies.is_floating_point()
    ):
        raise ValueError("its frequencies are not those of its stored slots")
    return store


def _memory(
    path: str | Path,
    tensors: dict[str, Any],
    header: dict[str, Any],
    checksum: str,
    verified: bool = False,
    block: Callable[[str], Block] | None = None,
) -> Memory:
    stored = {name: t for name, t in tensors.items() if name.startswith("longterm.")}
    own = {name: t for name, t in tensors.items() if name not in stored}
    if set(own) != set(TENSORS) or bool(stored) != bool(header.get("longterm")):
        raise ValueError(f"{path} holds the tensors {sorted(tensors)}; a memory has {sorted(TENSORS)}.")
    if not verified and _checksum(json.dumps(header, sort_keys=True), tensors) != checksum:
        raise ValueError(f"{path} was altered or damaged: its checksum does not match. Restore it from a copy.")
    try:
        for name, kind in KINDS.items():
            if type(header[name]) is not kind:
                raise ValueError(f"{name} is {header[name]!r}")
        sources = tuple(Source(**source) for source in header.pop("sources"))
        for source in sources:
            if list(map(type, asdict(source).values())) != [str, int, int, bool]:
                raise ValueError(f"a source is {source}")
        settings, says = _settings(header.pop("settings")), header.pop("longterm")
        store = None
        if says:
            store = _longterm(stored, settings.longterm, says, own["slots"].shape[-1], header["updates"], block)
        memory = Memory(**own, **header, settings=settings, sources=sources, longterm=store, version=checksum)
        if memory.settings != settings:
            raise ValueError(f"the settings {settings} are not complete")
        origins = [memory.origins, *((store.column("origins"),) if store is not None else ())]
        least = blockss.NO_SLOT if store is not None else -1
        if any(t.numel() and not least <= int(t.min()) <= int(t.max()) < len(sources) for t in origins):
            raise ValueError("a slot has an unknown source")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # a checksum is no signature
        raise ValueError(f"{path} was altered or damaged: {error}. Restore it from a copy.") from error
    return memory


def _settings(says: dict[str, Any]) -> MemorySettings:
    """A memory's settings out of its header; a ValueError unless each is there."""
    for kind, values in ((MemorySettings, says), (LongTermSettings, says.get("longterm"))):
        if values is not None and set(values) != {one.name for one in settings_of(kind)}:
            raise ValueError(f"the settings are {sorted(values)}")
    return MemorySettings.of(says)


def _checked(path: str | Path, metadata: dict[str, str]) -> tuple[dict[str, Any], str]:
    found = metadata.get("format", "")
    if found in EARLIER:
        raise ValueError(
            f"{path} has the format {found!r} of an earlier version: latentmem of commit {EARLIER[found]} reads it."
        )
    if found != FORMAT:
        raise ValueError(f"{path} is not a memory of this version: expected the format {FORMAT!r}, got {found!r}.")
    try:
        header = json.loads(metadata["memory"])
        complete = isinstance(header, dict) and set(header) == set(HEADER) and metadata["checksum"]
    except (KeyError, ValueError):
        complete = False
    if not complete:
        raise ValueError(f"{path} was altered or damaged: its header is not complete. Restore it from a copy.")
    return header, metadata["checksum"]


def _checksum(header: str, tensors: dict[str, Tensor]) -> str:
    return container.checksum(
        header, {name: tensors[name] for name in (*TENSORS, *sorted(set(tensors) - set(TENSORS)))}
    )


Memory._save, Memory._load = staticmethod(save), staticmethod(load)
