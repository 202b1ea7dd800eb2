"""A store that is killed, or loses its power, at any moment: what was acknowledged is there, once, and can be read."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_store_coded import same

from latentmem.core.settings import MemorySettings
from latentmem.model.model import MemoryModel
from latentmem.store import Store
from latentmem.store.objects import Disk
from latentmem.testing import byte_tokenizer, tiny_model

KILLS = int(os.environ.get("LATENTMEM_KILLS", "10"))


@pytest.fixture(scope="module", params=["exact", "int8"])
def llm(request):
    """A model that keeps memories in one form."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    llm = MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")
    llm.defaults = MemorySettings(form=request.param)
    yield llm
    torch.set_num_threads(threads)


# --- kill -9 --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the worker forks")
def test_a_store_that_is_killed_at_random_moments_loses_nothing_and_repeats_nothing(llm, tmp_path):
    worker = Path(__file__).with_name("store_worker.py")
    process = subprocess.Popen(
        [sys.executable, worker, tmp_path / "s", llm.defaults.form],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    written, secret, forgotten, talked, pruned, rng = set(), set(), set(), set(), set(), random.Random(1)
    try:
        for seed in range(KILLS):
            print(seed, file=process.stdin, flush=True)
            child = 0
            said, enough = [], 2 + rng.randrange(6)  # acknowledged; a slow machine does as much as a fast one
            while sum(len(line.split()) > 2 for line in said) < enough or not child:
                said.append(process.stdout.readline().strip())
                assert said[-1] != "dead", "the worker failed by itself"
                child = next((int(line.split()[1]) for line in said if line.startswith("child")), 0)
            time.sleep(rng.random() / 4)
            os.kill(child, signal.SIGKILL)
            said += iter(lambda: process.stdout.readline().strip(), "dead")
            for what, name, *key in (line.split() for line in said if len(line.split()) > 1):
                if what == "written":
                    written.add((name, *key))
                elif what == "said":
                    talked.add((name, *key))
                elif what == "pruned":
                    pruned.add((name, *key))
                elif what == "secret":
                    secret.add((name, *key))
                elif what == "forgotten":
                    forgotten |= {one for one in secret if one[0] == name}
            check(llm, tmp_path / "s", written, forgotten, talked)
    finally:
        process.stdin.close()
        process.wait(300)
        process.stdout.close()
    store = Store(tmp_path / "s")
    for name in store.names():
        for version in store.history(name):
            if not version.pruned:
                store.open(name, version.version)
        store.rebuild(llm, name, "rebuilt")
        same(store.open("rebuilt"), store.open(name))
        store.delete("rebuilt")
    assert len(written) > KILLS < 10 * len(talked) and pruned, "proves nothing: hardly anything was written"
    store.sweep()
    assert set(store._objects.names()) == store._journal.objects()


def check(llm, folder, written, forgotten, talked):
    """Every acknowledged write and turn is there once, nothing that was forgotten, every memory loads, all is sound."""
    store = Store(folder, snapshot_every=4)
    assert store._journal._one("PRAGMA integrity_check") == ("ok",)
    assert store._journal._all("PRAGMA foreign_key_check") == []
    found, turns = {}, []
    for name in store.names():
        store.apply(llm, name)
        store.open(name)
        for version in store.history(name):
            assert version.state in ("applied", "pruned"), version
            if version.event == "write" and version.source.startswith("talk "):
                turns.append((name, version.text.split()[1]))
            elif version.key:
                assert (name, version.key) not in found
                assert version.text.endswith(f" {version.key}")
                found[name, version.key] = version
    assert written <= set(found) and not forgotten & set(found)
    assert talked <= set(turns) and len(turns) == len(set(turns))
    store.close()


# --- a disk that forgets what was not flushed -----------------------------------------------------------------------


class Crash(BaseException):
    """The power is gone."""


class Forgetful(Disk):
    """A disk that knows what a power cut would leave: contents that were flushed, under names that were flushed.

    Args:
        at: file operations before the power goes.
    """

    def __init__(self, at=10**9):
        self.at, self.done = at, 0
        self.names: dict[Path, object] = {}  # as a running system sees them: path -> file, None for a folder
        self.kept: dict[Path, object] = {}  # as they are on the device
        self.flushed: set[object] = set()

    def operation(self):
        if self.done == self.at:
            raise Crash
        self.done += 1

    def mkdir(self, folder):
        self.operation()
        super().mkdir(folder)
        self.names[folder] = None

    def create(self, path, data):
        self.operation()
        super().create(path, data)
        self.names[path] = object()

    def sync(self, path):
        self.operation()
        self.flushed.add(self.names[path])

    def sync_folder(self, folder):
        self.operation()
        self.kept = {path: file for path, file in self.kept.items() if path.parent != folder}
        self.kept |= {path: file for path, file in self.names.items() if path.parent == folder}

    def rename(self, path, to):
        self.operation()
        super().rename(path, to)
        self.names[to] = self.names.pop(path)

    def remove(self, path):
        self.operation()
        super().remove(path)
        self.names.pop(path, None)

    def cut(self, folder, to, *, names):
        """What is left of a folder of a store: names that were not flushed are lost, or kept with torn contents."""
        shutil.copytree(folder, to, ignore=shutil.ignore_patterns("objects", "*.lock", "*.owner"))
        left = self.kept if names == "lost" else self.names
        for path, file in sorted(left.items(), key=lambda item: len(item[0].parts)):
            there = to / path.relative_to(folder)
            if file is None:
                there.mkdir(exist_ok=True)
            elif there.parent.is_dir():
                data = path.read_bytes() if path.exists() else b""
                there.write_bytes(data if file in self.flushed and path.exists() else data[: len(data) // 2])


def scenario(llm, folder, disk, acknowledged):
    """Everything that puts objects down or removes them; says what was acknowledged."""
    store = Store(folder, disk=disk, snapshot_every=3)
    try:
        store.create("m", llm.empty(24, 8, seed=5))
        for i, source in enumerate("aba"):
            store.write(llm, "m", f"text {i}", source, key=str(i))
            acknowledged[i] = "m"
            if i == 1:
                store.prune("m", keep=1)
                acknowledged["pruned"] = True
        store.fork("m", "f")
        store.write(llm, "f", "text 3", "c", key="3")
        acknowledged[3] = "f"
        store.append("m", "text 4", "c", key="4")
        acknowledged[4] = "m"
        store.prune("m", keep=1)
        acknowledged["forgetting"] = True
        store.forget_by_replay(llm, "m", "b")
        acknowledged["forgotten"] = True
    finally:
        store.close()


def survives(llm, folder, acknowledged):
    """The store that a power cut has left holds what was acknowledged, and goes on."""
    store = Store(folder)
    histories = {name: store.history(name) for name in store.names()}
    for name in histories:
        store.apply(llm, name)
        for version in store.history(name):
            if not version.pruned:
                store.open(name, version.version)
    assert not acknowledged.get("pruned") or histories["m"][1].pruned
    assert set(store._objects.names()) >= store._journal.objects()
    keys = {(name, v.key) for name, versions in histories.items() for v in versions if v.key}
    expected = {(name, str(i)) for i, name in acknowledged.items() if type(i) is int}
    assert expected - {("m", "1")} <= keys
    gone = ("m", "1") not in keys
    assert gone or not acknowledged.get("forgotten")
    assert not gone or acknowledged.get("forgetting") or 1 not in acknowledged
    for name in histories:
        events = [(v.text, v.source) for v in store.history(name) if v.event == "write"]
        live = llm.empty(24, 8, seed=5)
        shared = [("text 0", "a"), ("text 1", "b"), ("text 2", "a")]
        before = [] if name == "m" else [e for e in shared if e[1] != "b" or not gone]
        for text, source in before + events:
            live = llm.write(live, text, source)
        same(store.open(name), live)
    if "m" in histories:
        store.write(llm, "m", "goes on", "z")
    store.close()


def test_a_power_cut_at_any_file_operation_loses_nothing_that_was_acknowledged(llm, tmp_path):
    whole = Forgetful()
    scenario(llm, tmp_path / "whole", whole, {})
    assert whole.done > 40
    for at in range(whole.done + 1):
        disk, acknowledged = Forgetful(at), {}
        try:
            scenario(llm, tmp_path / str(at), disk, acknowledged)
        except Crash:
            assert at < whole.done
        for names in ("lost", "torn"):
            disk.cut(tmp_path / str(at), tmp_path / f"{at} {names}", names=names)
            survives(llm, tmp_path / f"{at} {names}", acknowledged)


def test_a_power_cut_while_versions_are_pruned_removes_all_of_them_or_none(llm, tmp_path):
    exact = llm.defaults.form == "exact"
    live = [llm.empty(24, 8, seed=5) if exact else llm.empty(4, 4, seed=5)]  # where whole updates go
    for i in range(6):
        live.append(llm.write(live[-1], f"text {i}", "a"))

    def life(at):
        disk, folder = Forgetful(), tmp_path / str(at)
        store = Store(folder, disk=disk, snapshot_every=4)
        store.create("m", live[0])
        for i in range(6):
            store.write(llm, "m", f"text {i}", "a")
        before, disk.at = disk.done, disk.done + at
        with contextlib.suppress(Crash):
            store.prune("m", keep=1)
        store.close()
        return disk, folder, disk.done - before

    _, _, count = life(1000)
    assert count > (10 if exact else 3)  # a removal each, and a flush
    for at in range(count + 1):
        disk, folder, _ = life(at)
        for names in ("lost", "torn"):
            disk.cut(folder, tmp_path / f"{at} {names}", names=names)
            store = Store(tmp_path / f"{at} {names}")
            history = store.history("m")
            assert [v.text for v in history] == [None, *(f"text {i}" for i in range(6))]
            assert {v.version for v in history if v.pruned} in (set(), {1, 2, 3, 4, 5})
            for version in history:
                if not version.pruned:
                    same(store.open("m", version.version), live[version.version])
            store.prune("m", keep=1)
            assert set(store._objects.names()) == store._journal.objects()
            same(store.open("m"), live[-1])
            store.close()


@pytest.mark.parametrize("forgotten", ["sync", "sync_folder"])
def test_the_forgetful_disk_notices_a_flush_that_is_missing(llm, tmp_path, monkeypatch, forgotten):
    monkeypatch.setattr(Forgetful, forgotten, lambda *_: None)
    disk, acknowledged = Forgetful(), {}
    scenario(llm, tmp_path / "s", disk, acknowledged)
    disk.cut(tmp_path / "s", tmp_path / "left", names="lost")
    with pytest.raises(ValueError, match=r"missing|damaged"):
        survives(llm, tmp_path / "left", acknowledged)
