"""The one way to write a file: whole or not at all, durable, private where that is asked for, verified when read."""

import errno
import json
import os
import stat
import struct

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from latentmem import disk
from latentmem.container import DTYPES, read, to_bytes, write
from latentmem.disk import Disk, replace_bytes, replace_folder, replacing
from latentmem.errors import DamagedError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(7, dtype=torch.int64),
    "c": torch.tensor([True, False]),
    "d": torch.zeros(2, 0, dtype=torch.bfloat16),
    "e": torch.tensor([1, 255], dtype=torch.uint8),
}


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(t, other[name]) and t.dtype == other[name].dtype for name, t in one.items()
    )


def test_tensors_and_header_come_back_and_others_can_read_the_file(tmp_path):
    write(tmp_path / "a", TENSORS | {"t": TENSORS["a"].T.requires_grad_()}, {"format": "x 1", "é": "ü\n"})
    tensors, header = read(tmp_path / "a")
    assert equal(tensors, TENSORS | {"t": TENSORS["a"].T.detach()}) and header == {"format": "x 1", "é": "ü\n"}
    assert equal(load_file(tmp_path / "a"), tensors)
    save_file(TENSORS, tmp_path / "theirs")
    assert equal(read(tmp_path / "theirs")[0], TENSORS) and read(tmp_path / "theirs")[1] == {}


def test_tensors_lie_where_the_safetensors_library_puts_them():
    tensors = {f"{name} {i}": torch.ones(3, dtype=dtype) for name, dtype in DTYPES.items() for i in range(2)}
    (mine, offsets), (theirs, expected) = (
        (data[8 + struct.unpack_from("<Q", data)[0] :], json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]]))
        for data in (to_bytes(tensors, {"x": "y"}), save(tensors, {"x": "y"}))
    )
    assert mine == theirs and offsets == expected


def test_equal_tensors_and_headers_give_equal_bytes_in_any_order():
    one = to_bytes(TENSORS, {"x": "1", "y": "2"})
    other = to_bytes(dict(reversed(TENSORS.items())), {"y": "2", "x": "1"})
    assert one == other != to_bytes(TENSORS, {"x": "1", "y": "3"})


@pytest.mark.parametrize("length", [0, 7, 8, 20, -1])
def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path, length):
    (tmp_path / "cut").write_bytes(to_bytes(TENSORS, {})[:length])
    with pytest.raises(DamagedError, match=r"cut is not a complete safetensors file .* Restore it from a copy"):
        read(tmp_path / "cut")


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(DamagedError, match=f"{path.name}: no such file"):
            read(path)


@pytest.mark.parametrize("call", ["create", "sync", "rename"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, call, error):
    class Failing(Disk):
        pass

    def fail(*_):
        raise error

    setattr(Failing, call, fail)
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)):
        replace_bytes(tmp_path / "a", "new", disk=Failing())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_content_is_flushed_before_the_rename_and_the_name_behind_it(tmp_path):
    done = []

    class Watched(Disk):
        def __getattribute__(self, name):
            done.append(name)
            return super().__getattribute__(name)

    replace_bytes(tmp_path / "a", b"data", disk=Watched())
    assert [name for name in done if name != "sync" or "rename" not in done[: done.index(name)]][:3] == [
        "create",
        "sync",
        "rename",
    ]
    assert done[3] == "sync_folder" and (tmp_path / "a").read_bytes() == b"data"


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such modes")
def test_a_private_file_is_for_its_owner_and_another_as_the_process_decides(tmp_path):
    before = os.umask(0o027)
    try:
        replace_bytes(tmp_path / "private", b"", private=True)
        write(tmp_path / "other", {}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o640


def test_two_who_replace_a_file_at_once_do_not_meet(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_flushed_whole_and_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    synced = []

    class Watched(Disk):
        def sync(self, path):
            synced.append(path.name)
            super().sync(path)

    monkeypatch.setattr(disk, "DISK", Watched())
    (tmp_path / "new" / "inner").mkdir(parents=True)
    (tmp_path / "new" / "inner" / "file").write_text("new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "gone").write_text("old")
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "inner", "old"]
    assert {"file", "inner", "new"} <= set(synced)
