"""A store of memories whose updates are kept coded: each update lies there once, and every version is to the bit."""

import contextlib
import hashlib
import json
import random
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentmem import container
from latentmem.coding import codec
from latentmem.coding.coder import Coder
from latentmem.core import sources
from latentmem.core.memory import Memory
from latentmem.errors import DamagedError
from latentmem.files import snapshot
from latentmem.model.model import MemoryModel
from latentmem.store import Store, objects
from latentmem.store.journal import Journal
from latentmem.store.states import States
from latentmem.testing import byte_tokenizer, tiny_model
from latentmem.written import Written

SECRET = "the safe opens with heliotrope"
FORMS = ("int8", "coded")


@pytest.fixture(scope="module")
def llm(tiny_coder):
    llm = MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")
    llm.coder = tiny_coder
    return llm


@pytest.fixture
def unknown(monkeypatch):
    """A process that knows no coder, once it is called."""
    return lambda: monkeypatch.setattr(codec, "_codecs", {codec.EIGHT_BITS: codec.EightBits()})


def start(llm, form="int8", **changes):
    return llm.empty(**{"N": 24, "K": 8, "seed": 5, "form": form, "longterm": 8} | changes)


def same(one, other):
    """All that two memories are is equal, tensors to the bit."""
    for name in [field.name for field in fields(Memory) if field.name not in ("written", "longterm")]:
        a, b = getattr(one, name), getattr(other, name)
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, name
    assert list(one.written) == list(other.written) and (one.longterm is None) == (other.longterm is None)
    for a, b in zip(one.written.values(), other.written.values(), strict=True):
        assert a.source == b.source and set(a.tensors) == set(b.tensors)
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    if one.longterm is not None:
        assert all(getattr(one.longterm, f.name) == getattr(other.longterm, f.name) for f in fields(one.longterm))


def answers_alike(llm, one, other):
    """Two memories that are the same answer the same to the bit, though one is read from its codes."""
    ids = llm.prompts.question("What is it?", bare=True)
    llm.prefixes.clear()
    mine = llm.logits(one, ids)
    llm.prefixes.clear()
    llm.retriever.clear()
    assert torch.equal(mine, llm.logits(other, ids))


def on_disk(store):
    return {path.stem: path.stat().st_size for path in store.path.glob("objects/??/*")}


def raw(store):
    """All bytes of all files of a store."""
    return b"\0".join(path.read_bytes() for path in sorted(store.path.rglob("*")) if path.is_file())


def filled(llm, folder, form="int8", every=3, texts=7, **changes):
    """A store with a memory of a few writes, one of them of several updates; and what the model gives without it."""
    store, live = Store(folder, snapshot_every=every), [start(llm, form, **changes)]
    store.create("m", live[0])
    for i in range(texts):
        text = f"{'a longer note ' * (i % 3)}number {i}"
        store.write(llm, "m", text, f"s{i % 3}")
        live.append(llm.write(live[-1], text, f"s{i % 3}"))
    return store, live


# --- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind",
    [{}, {"longterm": 0}, {"longterm": {"R": 8, "limit": 5_000}}, {"N": 200}, {"compression": 2, "choice": "surprise"}],
    ids=["", "forgets", "limit", "not full", "compression"],
)
def test_every_version_is_the_live_memory_to_the_bit(llm, tmp_path, form, kind):
    store, live = filled(llm, tmp_path / "s", form, **kind)
    cold = Store(store.path)
    for i, expected in reversed(list(enumerate(live))):
        same(cold.open("m", i), expected)
        same(store.open("m", i), expected)
    answers_alike(llm, live[-1], cold.open("m"))


def test_the_work_of_a_write_does_not_grow_with_the_updates_that_are_kept(llm, tmp_path, monkeypatch):
    store, count = Store(tmp_path / "s", snapshot_every=1000), Counter()
    store.create("m", start(llm, N=16))

    def counted(kind, name):
        plain = getattr(kind, name)
        asked = plain.fget if isinstance(plain, property) else plain

        def call(*given):
            count[name] += 1
            return asked(*given)

        monkeypatch.setattr(kind, name, property(call) if isinstance(plain, property) else call)

    for kind, name in ((Written, "__len__"), (Written, "nbytes"), (Journal, "_all")):
        counted(kind, name)
    work = []
    for _ in range(60):
        count.clear()
        store.write(llm, "m", "eight by", "s")
        work.append(dict(count))
    assert work[10] == work[59] and len(store.open("m").written) == 60


@pytest.mark.parametrize("kind", [{}, {"longterm": 0}, {"longterm": {"R": 8, "limit": 3_000}}], ids=str)
def test_the_size_of_a_snapshot_counts_all_updates(llm, tmp_path, kind):
    store, live = filled(llm, tmp_path / "s", every=100, **kind)
    for version, memory in zip(store.history("m"), live, strict=True):
        slots = sum(map(len, memory.written.values()))
        assert version.facts["size"] == memory.L * slots // 8 + 250 * len(memory.written) + 1000


def test_deltas_are_counted_back_to_the_snapshot(llm, tmp_path):
    store, _ = filled(llm, tmp_path / "s", every=4)
    store.pin("m", "s1")
    store.rollback("m", 6)
    store.fork("m", "f", 3)
    store.write(llm, "f", "more", "z")
    for name in "mf":
        for row in store._journal.rows([store._journal.id(name)]):
            walked = 0
            for here in store._journal.lineage(row):
                if here.kind == "snapshot":
                    break
                walked += here.kind == "delta"
            for most in (1, 2, 100):
                assert store._journal.deltas(row, most) == min(walked, most)


class Twins:
    """A store, and what it should hold: each version of each memory as the model gives it without a store."""

    def __init__(self, llm, folder, every, seed):
        self.llm, self.folder, self.every, self.rng = llm, folder, every, random.Random(seed)
        self.live, self.pruned, self.count = {}, set(), 0
        with self.opened() as store:
            first = start(llm, longterm=self.rng.choice([0, 8, {"R": 8, "limit": 9_000}])).with_settings(quota=0.9)
            store.create("m", first)
            self.live["m"] = [first]

    @contextlib.contextmanager
    def opened(self):
        """The store, opened anew."""
        store = Store(self.folder, snapshot_every=self.every)
        try:
            yield store
        finally:
            store.close()

    def step(self, store):
        name = self.rng.choice(sorted(self.live))
        states = self.live[name]
        known = [one.name for one in states[-1].sources]
        what = self.rng.choice(["write"] * 4 + ["fork", "rollback", "forget", "prune", "pin", "import"])
        if what == "write":
            self.count += 1
            text, source = f"{'more of ' * self.rng.randrange(4)}text {self.count}", self.rng.choice("xyz")
            try:
                after = self.llm.write(states[-1], text, source)
            except ValueError:  # pinned slots leave no room
                with pytest.raises(ValueError, match="pinned"):
                    store.write(self.llm, name, text, source)
                return
            store.write(self.llm, name, text, source)
            states.append(after)
        elif what == "fork" and len(self.live) < 3:
            states = states[:1] if (name, 0) not in self.pruned and self.rng.random() < 0.2 else states
            store.fork(name, f"f{self.count}{len(self.live)}", len(states) - 1)
            self.live[f"f{self.count}{len(self.live)}"] = states[-1:]
        elif what == "rollback":
            at = self.rng.choice([i for i in range(len(states)) if (name, i) not in self.pruned])
            store.rollback(name, at)
            states.append(states[at])
        elif what in ("forget", "pin") and known:
            source = self.rng.choice(known)
            change = sources.forget if what == "forget" else sources.pin
            try:
                after = change(states[-1], source)
            except ValueError:
                return
            getattr(store, what)(name, source)
            states.append(after)
        elif what == "prune":
            keep = self.rng.choice([1, 2, 4])
            expected, freed = store.prune(name, keep=keep, dry_run=True), sum(on_disk(store).values())
            done = store.prune(name, keep=keep)
            assert expected.versions == done.versions and done.bytes == freed - sum(on_disk(store).values())
            self.pruned |= {(name, version) for version in done.versions}
        elif what == "import" and len(self.live) < 3:
            path, new = self.folder.parent / f"{self.count}.latentmem", f"i{self.count}{len(self.live)}"
            store.export(name, path)
            store.import_(path, new)
            self.live[new] = list(states)
            self.pruned |= {(new, i) for other, i in self.pruned if other == name}

    def check(self, store):
        for name, states in self.live.items():
            assert len(store.history(name)) == len(states)
            for i, expected in enumerate(states):
                if (name, i) not in self.pruned:
                    same(store.open(name, i), replace(expected, version="", parent=""))
        assert set(on_disk(store)) == store._journal.objects()


@pytest.mark.parametrize("every", [1, 4, 16])
@pytest.mark.parametrize("seed", range(2))
def test_a_random_history_is_that_of_memories_without_a_store(llm, tmp_path, every, seed):
    twins = Twins(llm, tmp_path / "s", every, seed)
    for _ in range(25):
        with twins.opened() as store:
            twins.step(store)
    with twins.opened() as store:
        twins.check(store)
        overview = {one.name: one.bytes for one in store.overview()}
        for name in twins.live:
            used, memory = set(), store._journal.id(name)
            for row in store._journal.rows([memory]):
                used |= {row.object} - {None} | set(row.facts.get("blocks", {}))
            assert overview[name] == sum(on_disk(store)[one] for one in used)
        for name in sorted(twins.live, reverse=True):
            if not store._journal.forks(store._journal.id(name)):
                store.delete(name)
        assert set(on_disk(store)) == store._journal.objects()


@pytest.mark.parametrize("every", [1, 3])
def test_forgetting_by_replay_is_as_if_it_had_never_been_written(llm, tmp_path, every):
    store, _ = filled(llm, tmp_path / "s", every=every)
    store.fork("m", "f", 5)
    assert set(store.forget_by_replay(llm, "m", "s1")) == {"m", "f"}
    memory = start(llm)
    for i in range(7):
        if i % 3 != 1:
            memory = llm.write(memory, f"{'a longer note ' * (i % 3)}number {i}", f"s{i % 3}")
    same(Store(store.path).open("m"), memory)
    assert set(on_disk(store)) == store._journal.objects()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("imported", [False, True])
def test_forgetting_by_replay_leaves_no_code_of_what_was_forgotten(llm, tmp_path, every, imported):
    store = Store(tmp_path / "s", snapshot_every=every)
    store.create("m", start(llm, N=64))
    store.write(llm, "m", "an older text", "old")
    if imported:  # a fork's first snapshot holds its updates itself, and the next one puts them apart
        store.fork("m", "f")
        store.export("f", tmp_path / "f")
        store = Store(tmp_path / "other", snapshot_every=every)
        store.import_(tmp_path / "f", "m")
    for text, source in ((SECRET, "secret"), ("yes", "y"), (SECRET, "secret"), ("no", "n"), ("no", "n"), ("no", "n")):
        store.write(llm, "m", text, source)
    codes = torch.tensor(llm.prompts.written(SECRET)[:8], dtype=torch.int32).numpy().tobytes()
    assert codes in raw(store)
    store.forget_by_replay(llm, "m", "secret")
    assert codes not in raw(store) and SECRET.encode() not in raw(store)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_store_of_many_updates_keeps_no_file_open(llm, tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(objects, "SMALL", 0 if mapped else objects.SMALL)
    resource = pytest.importorskip("resource")
    store = Store(tmp_path / "s")
    store.create("m", start(llm, K=1, N=8))
    memory = llm.write(start(llm, K=1, N=8), "".join(map(chr, range(40, 100))), "s")
    with store._locks.objects():
        names = [store._states.put_updates([one])[0][0] for one in memory.written.values()]
    assert len(set(names)) == 60
    store.create("whole", memory)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(int(one.name) for one in Path("/dev/fd").iterdir()) + 20, limits[1])
        )
        opened = [Store(store.path).open("whole")]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    same(opened[0], memory)


def test_updates_lie_on_the_disk_once(llm, tmp_path):
    store, live = filled(llm, tmp_path / "s", every=1, N=40, K=40)
    store.fork("m", "f", 5)
    store.rollback("m", 4)
    kinds = [row.kind for row in store._journal.rows([store._journal.id("m")])]
    assert kinds == ["snapshot"] * 8 + ["none"]
    codes = sum(one.nbytes for one in live[-1].written.values())
    parts = [name for name, size in on_disk(store).items() if b"latentmem updates 1" in store._objects.get(name)]
    assert len(parts) == len(live[-1].written) == 7
    assert codes <= sum(on_disk(store)[name] for name in parts) < codes + 7 * 1500


def test_a_delta_of_many_updates(llm, tmp_path):
    store, steps = Store(tmp_path / "s"), []
    memory = start(llm, K=1, N=4, longterm={"R": 4, "limit": 1 << 30})
    store.create("m", memory)
    ids = [5 + i % 200 for i in range(200)]
    store.write(llm, "m", ids, "long", progress=lambda *n: steps.append(n))
    opened = Store(store.path).open("m")
    assert opened.updates == len(opened.written) == 200 and steps[-1] == (200, 200)
    same(opened, store.open("m"))
    assert [one.kind for one in store._journal.rows([store._journal.id("m")])] == ["snapshot", "delta"]


def test_a_write_holds_of_its_updates_what_a_delta_takes(llm, tmp_path, monkeypatch):
    store, put, numbers = Store(tmp_path / "s"), States.put, []

    def seen(self, row, content):
        numbers.extend((one.slots.numel(), one.dropped.numel()) for one in content)
        return put(self, row, content)

    store.create("m", start(llm))
    monkeypatch.setattr(States, "put", seen)
    store.write(llm, "m", list(range(5, 105)), "long")
    assert numbers == [(0, 0)] * 13
    same(Store(store.path).open("m"), llm.write_ids(start(llm), list(range(5, 105)), "long"))


@pytest.mark.parametrize("form", FORMS)
def test_a_snapshot_neither_copies_its_updates_nor_reads_itself(llm, tmp_path, form, monkeypatch):
    store, _ = filled(llm, tmp_path / "s", form, every=1, texts=3)
    memory = store.open("m")
    monkeypatch.setattr("latentmem.files.snapshot.parts_of", None)
    monkeypatch.setattr("latentmem.files.snapshot.updates.joined", None)
    store.create("again", memory)
    monkeypatch.undo()
    row, old = (store._journal.version(name) for name in ("again", "m"))
    assert row.parts == old.parts and len(row.parts) == 3 + (form == "coded")
    assert set(row.parts) == snapshot.parts_of(store._objects.get(row.object), "again")


@pytest.mark.parametrize("form", FORMS)
def test_what_all_layers_have_in_common_is_in_ram_once(llm, tmp_path, form):
    Store(tmp_path).create("a", start(llm, form))
    live = start(llm, form)
    for text, in_common in (("the first text", True), ("and a second one that makes the memory drop slots", False)):
        Store(tmp_path).write(llm, "a", text)
        live = llm.write(live, text)
        store = Store(tmp_path)
        opened = store.open("a")
        same(opened, live)
        codes = sum(one.nbytes for one in opened.written.values())
        tables = store.nbytes()[0] - codes  # numbers in 8 bytes, births and origins in 4 each
        assert tables == 16 * opened.M if in_common else tables >= 8 * opened.M * opened.L


@pytest.mark.parametrize("form", FORMS)
def test_the_updates_of_opened_memories_count_once_for_the_bound(llm, tmp_path, form):
    store = Store(tmp_path / "s", snapshot_every=3)
    for i in range(4):
        store.create(f"m{i}", start(llm, form))
        for n in range(4):
            store.write(llm, f"m{i}", f"a text of its own, {n} of {i}", "s")
    names = [(f"m{i}", version) for i in range(4) for version in range(5)]

    def held(memories):
        updates = {id(one): one.nbytes for memory in memories for one in memory.written.values()}
        tables = [t for memory in memories for t in (memory.slots, memory.births, memory.origins)]
        numbers = sum(table.untyped_storage().nbytes() for table in tables)
        return numbers + sum(updates.values())

    whole = held([store.open("m0", version) for version in range(5)])
    for limit in (0, whole - 1, whole, 3 * whole):
        bounded = Store(store.path, cache_bytes=limit)
        for name in (*names, *names[:7], *names[::-1]):
            opened, kept = bounded.open(*name), list(bounded._states.cache._memories.values())
            assert bounded.nbytes()[0] == held(kept) <= limit
            assert kept[-1] is opened if kept else held([opened]) > limit
    assert all(bounded.open("m2", version) is bounded.open("m2", version) for version in range(5))
    bounded.prune("m2", keep=1)
    bounded.write(llm, "m1", "one more", "s")
    assert bounded.nbytes()[0] == held(bounded._states.cache._memories.values()) <= limit


# --- the coder ------------------------------------------------------------------------------------------------------


def test_a_store_brings_its_coder_along(llm, tmp_path, unknown):
    store, live = filled(llm, tmp_path / "s", "coded")
    store.fork("m", "f", 5)
    for name in ("m", "f"):
        store.export(name, tmp_path / name)
    other = Store(tmp_path / "other", snapshot_every=2)
    for name in ("m", "f"):
        unknown()
        other.import_(tmp_path / name, name)
        assert codec.is_known(llm.coder)
    same(other.open("m"), live[-1])
    same(other.open("f"), live[5])
    other.write(llm, "f", "one more", "z")
    other.write(llm, "f", "and more", "z")
    unknown()
    after = Store(other.path).open("f")
    same(after, llm.write(llm.write(live[5], "one more", "z"), "and more", "z"))
    answers_alike(llm, after, other.open("f"))
    for one in other.overview():  # a coder is of all memories of a model, and counts for none
        assert one.bytes < on_disk(other)[llm.coder]
    assert other.sweep() == 0
    for name in ("m", "f"):
        assert llm.coder in on_disk(other)
        other.delete(name)
    assert not on_disk(other)


def test_a_coder_whose_file_another_program_has_written_comes_along(llm, tmp_path, unknown):
    tensors, header = container.from_bytes(bytearray(codec.coder_of(llm.coder).to_bytes()), "a coder")
    path, again = tmp_path / "coder", tmp_path / "again"
    save_file(tensors, path, header | {"more": "from elsewhere"})
    resaved = codec.register(Coder.load(path))
    Coder.load(path).save(again)
    assert resaved != llm.coder and again.read_bytes() == path.read_bytes()
    other = MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")
    other.coder = resaved
    store, live = filled(other, tmp_path / "s", "coded")
    store.export("m", tmp_path / "m")
    unknown()
    imported = Store(tmp_path / "imported")
    imported.import_(tmp_path / "m", "m")
    for one in (Store(store.path), imported):
        same(one.open("m"), live[-1])
        assert resaved in on_disk(one)


def test_a_coder_that_is_missing_or_damaged_is_said_and_put_down_again(llm, tmp_path, unknown):
    store, live = filled(llm, tmp_path / "s", "coded", every=100)
    path = store._objects._path(llm.coder)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for word in ("damaged", "missing"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(codec, "_codecs", {codec.EIGHT_BITS: codec.EightBits()})
            with pytest.raises(DamagedError, match=f"the object {llm.coder} of the store is {word}"):
                Store(store.path).open("m")
        path.unlink(missing_ok=True)
    same(Store(store.path).open("m"), live[-1])  # who knows the coder reads on
    again = Store(store.path, snapshot_every=1)
    again.write(llm, "m", "one more", "z")
    assert path.read_bytes() == data
    unknown()
    same(Store(store.path).open("m"), llm.write(live[-1], "one more", "z"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["ids", "sketch"])
def test_an_exported_file_with_updates_of_different_lengths_is_refused(llm, tmp_path, form, name):
    """The hashes of such a file are right: only the tensors do not belong together."""
    store, _ = filled(llm, tmp_path / "s", form, every=100, texts=1)
    store.export("m", tmp_path / "m.zip")
    with zipfile.ZipFile(tmp_path / "m.zip") as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    old = store.history("m")[1]
    hashed = json.loads(entries["journal.jsonl"].decode().splitlines()[1])["object"]
    tensors, header = container.from_bytes(bytearray(entries.pop(f"objects/{hashed}.safetensors")), "x")
    table = json.loads(header["updates"])
    tensors[name], table[-1]["sizes"][name] = tensors[name][:-1].contiguous(), table[-1]["sizes"][name] - 1
    data = container.to_bytes(tensors, header | {"updates": json.dumps(table)})
    fresh = hashlib.sha256(data).hexdigest()
    entries[f"objects/{fresh}.safetensors"] = data
    for book in ("manifest.json", "journal.jsonl"):
        text = entries[book].decode().replace(hashed, fresh).replace(f": {old.bytes}", f": {len(data)}")
        entries[book] = text.encode()
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as file:
        for entry, content in entries.items():
            file.writestr(zipfile.ZipInfo(entry), content)
    there = Store(tmp_path / "there")
    with pytest.raises(DamagedError, match=rf"the object {fresh} is a damaged delta .*`{name}`|damaged delta .*slots"):
        there.import_(tmp_path / "m.zip", "m")
    assert not there.names() and not on_disk(there)


def test_another_process_reads_what_this_one_has_coded(llm, tmp_path):
    store, live = filled(llm, tmp_path / "s", "coded")
    code = (
        "import sys, torch; torch.set_num_threads(1); from latentmem.store import Store;"
        "from latentmem.model.model import MemoryModel; from latentmem.testing import byte_tokenizer, tiny_model;"
        "llm = MemoryModel(tiny_model(), byte_tokenizer(), name='tiny'); store = Store(sys.argv[1]);"
        "store.write(llm, 'm', 'by another process', 'z');"
        "print(llm.logits(store.open('m'), [5, 6, 7]).double().sum().item())"
    )
    run = subprocess.run([sys.executable, "-c", code, store.path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    after = llm.write(live[-1], "by another process", "z")
    same(store.open("m"), after)
    assert llm.logits(store.open("m"), [5, 6, 7]).double().sum().item() == pytest.approx(float(run.stdout), abs=1e-3)
    store.write(llm, "m", "by this one again", "z")
    same(Store(store.path).open("m"), llm.write(after, "by this one again", "z"))


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "damaged", "truncated"])
@pytest.mark.parametrize("part", ["delta", "update of a snapshot"])
def test_damage_is_said_and_rebuild_mends_it(llm, tmp_path, damage, part):
    store, live = filled(llm, tmp_path / "s", every=3)
    rows = store._journal.rows([store._journal.id("m")])
    deltas = [row for row in rows if row.kind == "delta"]
    name = deltas[-1].object if part == "delta" else deltas[0].object
    path = store._objects._path(name)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    cold = Store(store.path)
    word = "missing" if damage == "missing" else "damaged"
    with pytest.raises(DamagedError, match=f"the object {name} of the store is {word}. Restore it from a copy"):
        cold.open("m")
    same(cold.open("m", 0), live[0])
    assert [version.text for version in cold.history("m")][1:] == [
        f"{'a longer note ' * (i % 3)}number {i}" for i in range(7)
    ]
    cold.rebuild(llm, "m", "n")
    same(cold.open("n"), live[-1])
    path.write_bytes(data)
    same(cold.open("m"), live[-1])


def test_an_update_object_that_is_gone_is_put_down_again_by_a_process_that_has_it(llm, tmp_path):
    store, live = filled(llm, tmp_path / "s", every=3)
    for name in {row.object for row in store._journal.rows([store._journal.id("m")]) if row.kind == "delta"}:
        store._objects.remove(name)
    store.create("copy", replace(live[-1], version="", parent=""))
    same(Store(store.path).open("copy"), live[-1])


@pytest.mark.parametrize("place", [["NAME", 99], [], 5, ["NAME", "x"]])
def test_an_export_whose_snapshot_names_no_update_is_refused_and_leaves_nothing(llm, tmp_path, place):
    store, _ = filled(llm, tmp_path / "s", every=1, texts=2)
    store.export("m", tmp_path / "m")
    with zipfile.ZipFile(tmp_path / "m") as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    lines = [json.loads(line) for line in entries["journal.jsonl"].splitlines()]
    old = lines[-1]["object"]
    tensors, header = container.from_bytes(bytearray(entries.pop(f"objects/{old}.safetensors")), "x")
    values = json.loads(header["memory"])
    name = values["written"][-1][3][0]
    values["written"][-1][3] = [name if one == "NAME" else one for one in place] if isinstance(place, list) else place
    data = container.to_bytes(tensors, header | {"memory": json.dumps(values)})
    new, manifest = hashlib.sha256(data).hexdigest(), json.loads(entries["manifest.json"])
    lines[-1] |= {"object": new, "bytes": len(data)}
    del manifest["objects"][old]
    manifest["objects"][new] = len(data)
    entries |= {"manifest.json": json.dumps(manifest).encode(), f"objects/{new}.safetensors": data}
    entries["journal.jsonl"] = "\n".join(map(json.dumps, lines)).encode()
    with zipfile.ZipFile(tmp_path / "m", "w") as file:
        for entry, content in entries.items():
            file.writestr(zipfile.ZipInfo(entry), content)
    there = Store(tmp_path / "there")
    with pytest.raises(ValueError, match="damaged"):
        there.import_(tmp_path / "m", "m")
    assert there.names() == [] and on_disk(there) == {}


# --- several at once ------------------------------------------------------------------------------------------------


def test_threads_read_while_another_writes(llm, tmp_path):
    store, live = filled(llm, tmp_path / "s", "coded", texts=2)
    ids = llm.prompts.question("What is it?", bare=True)
    for i in range(8):
        live.append(llm.write(live[-1], f"text {i}", f"s{i % 3}"))
    expected = []
    for memory in live:
        llm.prefixes.clear()
        expected.append(llm.logits(memory, ids))
    errors, done = [], threading.Event()
    llm.prefixes.clear()
    llm.retriever.clear()
    llm.retriever.decoding.limit = 4_000  # so that updates leave, and come again

    def read():
        try:
            while not done.is_set():
                version, memory = store.latest("m")
                assert torch.equal(llm.logits(memory, ids), expected[version]), version
                assert llm.retriever.decoding.nbytes >= 0
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for i in range(8):
            store.write(llm, "m", f"text {i}", f"s{i % 3}")
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not errors, errors
    same(Store(store.path).open("m"), live[-1])
