"""A memory and its file: complete, to the bit, verified, all or nothing."""

import errno
import hashlib
import json
import struct
from dataclasses import fields, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentmem import container, disk
from latentmem.core.memory import Memory, empty
from latentmem.core.settings import MemorySettings
from latentmem.core.sources import pin
from latentmem.decoder.adapters import insert
from latentmem.files import snapshot
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model, updated


def written(dtype=torch.float32, d=3):
    """A memory in which no field but the preset has its default value."""
    generator = torch.Generator().manual_seed(0)
    memory = empty(3, d, MemorySettings(7, 3, compression=2, choice="surprise", seed=-5), dtype=dtype)
    for step in range(4):
        new = torch.randn(3, 3, d, generator=generator).to(dtype)
        memory = updated(memory, new, source=f"Datei {step % 2} 'ü' \"\n", tokens=5)
    names = {"model": "m", "adapters": "a", "tokenizer": "t", "model_name": "owner/name", "parent": "p"}
    return replace(memory.with_settings(quota=0.75), **names)


@pytest.fixture
def file(tmp_path):
    """A saved memory."""
    path = tmp_path / "memory.safetensors"
    written().save(path)
    return path


def refused(path, *words):
    """Loading is refused with a ValueError that names the file and says the words."""
    with pytest.raises(ValueError) as error:
        Memory.load(path)
    for word in (str(path), *words):
        assert word in str(error.value)


def same(one, other):
    """Whether all fields of two memories are equal, tensors to the bit."""
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Memory)]
    return all(
        a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if torch.is_tensor(a) else a == b
        for a, b in pairs
    )


def rewritten(path, tensors=None, **metadata):
    """Change tensors and metadata of a safetensors file, all else as it was; None removes."""
    with safe_open(path, "pt") as opened:
        found = {**opened.metadata(), **metadata}
    kept = {**load_file(path), **(tensors or {})}
    save_file(
        {key: value for key, value in kept.items() if value is not None},
        path,
        {key: value for key, value in found.items() if value is not None},
    )


def said(path):
    """What a file says of its memory."""
    return json.loads(container.read(path)[1]["memory"])


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_field_comes_back_to_the_bit(tmp_path, dtype):
    memory = written(dtype)
    memory.slots[0, 0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    saved = memory.save(tmp_path / "a.safetensors")
    loaded = Memory.load(tmp_path / "a.safetensors")
    assert same(saved, loaded)
    for field in fields(Memory):
        assert type(getattr(saved, field.name)) is type(getattr(loaded, field.name)), field.name
        if field.name not in ("longterm", "coder", "written"):  # tests/files/test_updates.py has those two
            assert getattr(saved, field.name) is not field.default, f"{field.name} proves nothing: its default"


@pytest.mark.parametrize(("number", "commit"), [(1, "4f1b448"), (2, "45f6ebf"), (3, "3361d57")])
def test_an_earlier_format_is_refused_with_the_commit_that_reads_it(file, number, commit):
    rewritten(file, format=f"latentmem memory {number}")
    refused(file, "earlier version", commit)


def test_settings_that_are_not_complete_are_refused(file):
    header = said(file)
    for name, value in (("N", None), ("seed", "1"), ("more", 1), ("longterm", {"R": 1})):
        text = json.dumps({**header, "settings": {**header["settings"], name: value}}, sort_keys=True)
        rewritten(file, memory=text, checksum=snapshot._checksum(text, load_file(file)))
        refused(
            file,
            "altered or damaged",
            {"seed": "seed must be int", "more": "does not know: more"}.get(name, "settings"),
        )
    del header["settings"]["choice"]
    text = json.dumps(header, sort_keys=True)
    rewritten(file, memory=text, checksum=snapshot._checksum(text, load_file(file)))
    refused(file, "altered or damaged", "the settings are")


def test_a_setting_that_is_newer_than_the_file_has_its_default(file):
    header = said(file)
    settings = {name: value for name, value in header["settings"].items() if name != "quota"}
    text = json.dumps({**header, "settings": settings}, sort_keys=True)
    rewritten(file, memory=text, checksum=snapshot._checksum(text, load_file(file)))
    assert Memory.load(file).quota == MemorySettings().quota


def test_the_bytes_of_a_memory_are_a_file_of_it_and_equal_in_every_process(tmp_path):
    memory = pin(written().with_settings(quota=1), written().sources[0].name)
    data = snapshot.to_bytes(memory)
    (tmp_path / "a.safetensors").write_bytes(data)
    saved = memory.save(tmp_path / "b.safetensors")
    loaded = Memory.load(tmp_path / "a.safetensors")
    assert same(loaded, saved) and same(snapshot.from_bytes(bytearray(data), "a"), saved)
    assert [source.pinned for source in loaded.sources] == [True, False]
    assert hashlib.sha256(data).hexdigest() == "c88bdb46b0d25595952e16796baae17882c136c4e1cef64f4e675f6a98fecb3d"


def test_bytes_that_are_no_memory_are_refused_by_name():
    data = snapshot.to_bytes(written())
    for other, words in ((data[:-1], "not a complete"), (b"", "not a complete"), (data[:-1] + b"\xff", "checksum")):
        with pytest.raises(ValueError, match=f"^the object 5.* {words}"):
            snapshot.from_bytes(bytearray(other), "the object 5")


@pytest.mark.parametrize(
    "about",
    [
        {"data_offsets": [0, 8]},
        {"data_offsets": [8, 24]},
        {"shape": [4, 4]},
        {"shape": [-2, -2]},
        {"shape": []},
        {"shape": "ab"},
        {"dtype": "F8"},
        {"dtype": ["F32"]},
    ],
    ids=str,
)
def test_a_header_that_says_what_can_not_be_is_refused(about):
    written = container.to_bytes({"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.int32)}, {"x": "y"})
    tensors, metadata = container.from_bytes(bytearray(written), "z")
    assert metadata == {"x": "y"} and torch.equal(tensors["a"], torch.ones(2, 2)) and tensors["b"].tolist() == [1] * 3
    length = struct.unpack_from("<Q", written)[0]
    header = json.loads(written[8 : 8 + length])
    header["a"] |= about
    text = json.dumps(header).encode()
    with pytest.raises(ValueError, match=r"^z is not a complete safetensors file"):
        container.from_bytes(bytearray(struct.pack("<Q", len(text)) + text + written[8 + length :]), "z")


def test_an_account_with_other_types_is_refused(file):
    header = said(file)
    header["sources"][0]["pinned"] = "no"
    text = json.dumps(header, sort_keys=True)
    rewritten(file, memory=text, checksum=snapshot._checksum(text, load_file(file)))
    refused(file, "altered or damaged", "pinned of a source is 'no'")


def test_sources_that_are_no_list_are_refused(tmp_path):
    file = tmp_path / "empty.safetensors"
    empty(1, 1).save(file)
    text = json.dumps({**said(file), "sources": {}}, sort_keys=True)
    rewritten(file, memory=text, checksum=snapshot._checksum(text, load_file(file)))
    refused(file, "altered or damaged", "its sources are {}")


def test_an_empty_memory_comes_back(tmp_path):
    memory = empty(3, 4, MemorySettings(7, 3, "paper")).save(tmp_path / "a.safetensors")
    loaded = Memory.load(tmp_path / "a.safetensors")
    assert (loaded.L, loaded.M, loaded.d, loaded.preset, loaded.version) == (3, 0, 4, "paper", memory.version)


def test_what_goes_on_from_a_file_equals_what_goes_on_from_the_memory(tmp_path):
    memory = written().save(tmp_path / "a.safetensors")
    new = torch.ones(3, 3, 3)
    one, other = updated(memory, new, source="x"), updated(Memory.load(tmp_path / "a.safetensors"), new, source="x")
    assert torch.equal(one.slots, other.slots) and torch.equal(one.births, other.births)
    assert one.sources == other.sources and one.parent == other.parent == memory.version


def test_a_memory_with_gradients_or_in_another_stride_is_saved(tmp_path):
    memory = written()
    odd = replace(memory, slots=memory.slots.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_())
    assert not odd.slots.is_contiguous()
    assert odd.save(tmp_path / "a.safetensors").version == memory.save(tmp_path / "b.safetensors").version


def test_equal_memories_have_equal_versions_and_any_change_gives_another(tmp_path):
    path, memory = tmp_path / "a.safetensors", written()
    version = memory.save(path).version
    assert version and memory.save(path).version == version
    changed = [memory.with_settings(seed=1), replace(memory, tokens=1), replace(memory, slots=memory.slots + 1e-3)]
    changed += [replace(memory, births=memory.births + 1), replace(memory, slots=memory.slots.bfloat16())]
    assert len({version, *(m.save(path).version for m in changed)}) == 6


def test_the_version_does_not_depend_on_an_earlier_version(tmp_path):
    once = written().save(tmp_path / "a.safetensors")
    assert once.save(tmp_path / "b.safetensors").version == once.version


def test_parents_chain_through_saved_versions(tmp_path):
    new = torch.zeros(3, 1, 3)
    first = replace(written(), parent="").save(tmp_path / "1.safetensors")
    second = updated(updated(first, new), new).save(tmp_path / "2.safetensors")
    third = updated(Memory.load(tmp_path / "2.safetensors"), new).save(tmp_path / "3.safetensors")
    assert [m.parent for m in (first, second, third)] == ["", first.version, second.version]
    assert len({first.version, second.version, third.version}) == 3


def test_saving_leaves_the_memory_itself_without_a_version(tmp_path):
    memory = written()
    assert memory.save(tmp_path / "a.safetensors").version and memory.version == ""


def test_the_header_says_what_the_memory_is(file):
    header = said(file)
    settings = header["settings"]
    assert (settings["N"], settings["K"], settings["compression"], settings["seed"]) == (7, 3, 2, -5)
    assert header["sources"][0] == {"name": "Datei 0 'ü' \"\n", "tokens": 10, "slots": 6, "pinned": False}
    assert set(header) == {f.name for f in fields(Memory)} - {"slots", "births", "origins", "version"}


def test_a_snapshot_is_a_safetensors_file_and_no_pickle(file):
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert set(header) == {"__metadata__", "slots", "births", "origins"}
    assert header["slots"]["shape"] == [3, 7, 3] and header["__metadata__"]["format"] == "latentmem memory 4"
    assert not data.startswith((b"PK", b"\x80"))


# --- damage ---------------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_at_any_length(file):
    data = file.read_bytes()
    for length in (0, 1, 7, 8, 9, 50, 200, len(data) // 2, len(data) - 100, len(data) - 1):
        file.write_bytes(data[:length])
        refused(file, "not a complete safetensors file")


def test_a_longer_file_is_refused(file):
    file.write_bytes(file.read_bytes() + b"\0")
    refused(file, "not a complete safetensors file")


def test_a_flipped_bit_anywhere_in_the_tensors_is_noticed(file):
    data = file.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for at in range(start, len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        file.write_bytes(flipped)
        refused(file, "altered or damaged", "checksum")


def test_a_flipped_bit_anywhere_in_the_header_is_refused_or_means_the_same(file):
    data, memory = file.read_bytes(), Memory.load(file)
    for at in range(8 + struct.unpack("<Q", data[:8])[0]):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 7
        file.write_bytes(flipped)
        try:
            loaded = Memory.load(file)
        except ValueError as error:
            assert str(file) in str(error)
        else:  # for example \u00fc and \u00Fc
            assert same(loaded, memory)


@pytest.mark.parametrize("change", [{"N": 8}, {"seed": 0}, {"sources": []}, {"model": "other"}, {"preset": "paper"}])
def test_a_changed_header_is_noticed(file, change):
    header = said(file)
    change = change if set(change) <= set(header) else {"settings": header["settings"] | change}
    rewritten(file, memory=json.dumps({**header, **change}, sort_keys=True))
    refused(file, "altered or damaged", "checksum")


@pytest.mark.parametrize("memory", [None, "", "{", "{}", "[]", "5", "null", '"N"'])
def test_a_header_that_is_no_header_is_refused(file, memory):
    rewritten(file, memory=memory)
    refused(file, "altered or damaged", "header")


def test_a_header_with_a_field_more_or_less_is_refused(file):
    header = said(file)
    for other in ({**header, "more": 1}, {key: value for key, value in header.items() if key != "updates"}):
        rewritten(file, memory=json.dumps(other, sort_keys=True))
        refused(file, "header is not complete")


@pytest.mark.parametrize("checksum", [None, "", "0" * 64])
def test_a_missing_or_other_checksum_is_refused(file, checksum):
    rewritten(file, checksum=checksum)
    refused(file, "altered or damaged")


def test_changed_tensors_are_noticed(file):
    slots = load_file(file)["slots"]
    same_bytes = (slots.view(torch.int32), slots.reshape(7, 3, 3), slots.reshape(3, 21, 1))
    for other in (slots.half(), slots.transpose(1, 2).contiguous(), slots[:, :, :-1].contiguous(), *same_bytes):
        rewritten(file, {"slots": other})
        refused(file, "checksum")
    rewritten(file, {"slots": None})
    refused(file, "births", "slots")


def test_slots_of_updates_and_sources_that_there_are_not_are_refused(file):
    data, tensors, text = file.read_bytes(), load_file(file), container.read(file)[1]["memory"]
    for name, value, words in (
        ("births", 99, "written by no update"),
        ("births", -1, "written by no update"),
        ("births", torch.int64, "int32"),
        ("births", torch.float32, "int32"),
        ("origins", 2, "unknown source"),
        ("origins", -2, "unknown source"),
        ("origins", torch.int64, "int32"),
    ):
        changed = tensors[name].clone()
        if isinstance(value, int):
            changed[1, 2] = value
        new = tensors | {name: changed if isinstance(value, int) else changed.to(value)}
        rewritten(file, new, checksum=snapshot._checksum(text, new))
        refused(file, "altered or damaged", words)
        file.write_bytes(data)


def test_a_tensor_too_many_is_refused(file):
    rewritten(file, {"more": torch.zeros(1)})
    refused(file, "more")


def test_a_file_of_another_format_version_is_refused(file):
    rewritten(file, format="latentmem memory 5")
    refused(file, "latentmem memory 4", "latentmem memory 5")


def test_another_safetensors_file_is_refused(tmp_path):
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata)
        refused(tmp_path / "model.safetensors", "not a memory")


def test_a_text_file_a_pickle_a_folder_and_no_file_are_refused(tmp_path):
    (tmp_path / "note.txt").write_text("The mill stands at the river. " * 20)
    refused(tmp_path / "note.txt", "not a complete safetensors file")
    torch.save({"slots": torch.zeros(2)}, tmp_path / "pickle.pt")
    refused(tmp_path / "pickle.pt", "not a complete safetensors file")
    refused(tmp_path, "no such file")
    refused(tmp_path / "missing.safetensors", "no such file")


# --- failing saves --------------------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    def full(path):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(disk.DISK, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        written().with_settings(seed=9).save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(("of", "call"), [(disk.os, "fsync"), (disk.Path, "replace")])
def test_a_save_that_is_interrupted_before_the_rename_leaves_the_old_file_and_nothing_else(file, monkeypatch, of, call):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = file.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(of, call, interrupted)
        written().with_settings(seed=9).save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_disk_that_takes_no_more_raises_an_os_error(file):
    resource = pytest.importorskip("resource")
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    large = empty(3, 4000, MemorySettings(7, 3))
    large = updated(large, torch.zeros(3, 3, 4000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))  # a write beyond fails with EFBIG
    try:
        with pytest.raises(OSError):
            large.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_save_replaces_the_old_file_and_leaves_nothing_else(file):
    memory = written().with_settings(seed=9).save(file)
    assert Memory.load(file).version == memory.version
    assert list(file.parent.iterdir()) == [file]


def test_saving_into_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="folder"):
        written().save(tmp_path / "missing" / "a.safetensors")


# --- whose memory it is ---------------------------------------------------------------------------------------------


def test_a_loaded_memory_answers_like_the_saved_one(tmp_path):
    llm = MemoryModel(tiny_model(), byte_tokenizer())
    memory = llm.write(llm.empty(12, 4), "The mill stands at the river.")
    memory.save(tmp_path / "a.safetensors")
    loaded = Memory.load(tmp_path / "a.safetensors")
    again = MemoryModel(tiny_model(), byte_tokenizer())
    for model in (llm, again):
        assert torch.equal(model.logits(loaded, [9, 8, 7]), llm.logits(memory, [9, 8, 7]))


def test_a_memory_of_another_model_tokenizer_adapters_or_dtype_is_refused_in_a_sentence(tmp_path):
    llm = MemoryModel(tiny_model(), byte_tokenizer(), name="mine")
    other_tokenizer = byte_tokenizer()
    other_tokenizer.add_tokens(["mill"])
    adapted = tiny_model()
    pair = insert(adapted, r=2, alpha=4, dropout=0.0, target_modules=["q_proj"])
    others = {
        "another model ": MemoryModel(tiny_model(seed=1), byte_tokenizer(), name="other"),
        "another tokenizer ": MemoryModel(tiny_model(), other_tokenizer, name="other"),
        "another adapter ": MemoryModel(adapted, byte_tokenizer(), name="other", adapters=pair),
        "dtype='bfloat16'": MemoryModel(tiny_model().bfloat16(), byte_tokenizer(), name="other"),
    }
    for words, other in others.items():
        path = tmp_path / "a.safetensors"
        other.write_ids(other.empty(12, 4), [5, 6, 7]).save(path)
        memory = Memory.load(path)
        other.check(memory)
        for use in (llm.check, lambda m: llm.logits(m, [5]), lambda m: llm.write_ids(m, [5])):
            with pytest.raises(ValueError, match=words) as error:
                use(memory)
            assert str(error.value).endswith(".") and len(str(error.value).split()) > 10


def test_a_memory_of_the_same_weights_in_another_folder_is_accepted(tmp_path):
    here, there = (MemoryModel(tiny_model(), byte_tokenizer(), name=name) for name in ("here", "there"))
    there.check(here.write_ids(here.empty(12, 4), [5, 6, 7]).save(tmp_path / "a.safetensors"))
