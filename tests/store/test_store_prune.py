"""Pruning: old versions go from the disk, and everything else stays as it was."""

import json
import random
import sqlite3
import tempfile
import threading
import time
import zipfile
from dataclasses import replace

import pytest
import test_store_longterm
from test_store import HOSTILE, again, files, filled, lines, raw, seen, start, tampered
from test_store import same as same_fields

from latentmem.core.sources import forget, pin
from latentmem.errors import InUseError, NotFoundError
from latentmem.model.model import MemoryModel
from latentmem.store import Pruned, Store, pruning
from latentmem.store.contents import payload
from latentmem.store.objects import Disk
from latentmem.store.states import after_event
from latentmem.store.writing import Writer
from latentmem.testing import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", snapshot_every=3)


def same(one, two):
    return same_fields(one, two) if one.longterm is None else test_store_longterm.same(one, two)


def states(store, name="m"):
    return [version.state for version in store.history(name)]


def open_versions(store, name="m"):
    return [version.version for version in store.history(name) if not version.pruned]


def disk(store):
    return sum(path.stat().st_size for path in store.path.glob("objects/*/*"))


def sound(store):
    """All objects are named and there, what is not pruned can be opened, and an exported file is imported as it is."""
    assert set(files(store)) == store._journal.objects()
    cold = again(store)
    for name in store.names():
        for version in store.history(name):
            if not version.pruned:
                cold.open(name, version.version)
            else:
                with pytest.raises(NotFoundError, match=f"version {version.version} of '{name}' was pruned"):
                    cold.open(name, version.version)
    with tempfile.TemporaryDirectory() as folder:
        there = Store(f"{folder}/store")
        for name in store.names():
            store.export(name, f"{folder}/file.zip")
            there.import_(f"{folder}/file.zip", name)
            assert states(there, name) == states(store, name)
        there.close()


@pytest.mark.parametrize("keep", [1, 2, 4])
@pytest.mark.parametrize("kind", [{}, {"N": 200}, {"longterm": 8}], ids=["full", "not full", "long-term"])
def test_the_newest_versions_stay_to_the_bit_and_the_others_leave_the_disk(llm, store, kind, keep):
    live = [start(llm, **kind)]
    store.create("m", live[0])
    for i in range(9):
        store.write(llm, "m", f"note {i} " * 4, f"s{i % 3}")
        live.append(llm.write(live[-1], f"note {i} " * 4, f"s{i % 3}"))
    before, texts = disk(store), [version.text for version in store.history("m")]
    expected = list(range(1, 10 - keep))
    assert store.prune("m", keep=keep, dry_run=True).versions == expected and disk(store) == before
    pruned = store.prune("m", keep=keep)
    assert pruned == Pruned(expected, before - disk(store)) and pruned.bytes > 0
    assert open_versions(store) == [0, *range(10 - keep, 10)]
    assert [version.text for version in store.history("m")] == texts
    for version in open_versions(store):
        same(again(store).open("m", version), live[version])
    sound(store)
    assert store.prune("m", keep=keep) == Pruned([], 0)
    store.write(llm, "m", "goes on", "z")
    same(again(store).open("m"), llm.write(live[-1], "goes on", "z"))


def test_versions_older_than_a_time_go(llm, store):
    live = filled(llm, store, sources="abcabc")
    for version, days in ((0, 50), (1, 40), (2, 31), (3, 29), (4, 40), (5, 2)):
        store._journal._do("UPDATE versions SET time = ? WHERE seq = ?", time.time() - days * 86400, version)
    assert store.prune("m", older_than=30 * 86400).versions == [1, 2, 4]
    assert store.prune("m", older_than=0).versions == [3, 5]
    same(again(store).open("m"), live[6])
    sound(store)


def test_a_pruned_version_is_said_to_be_pruned(llm, store):
    filled(llm, store)
    held = again(store)
    held.open("m", 3)
    store.prune("m", keep=1)
    words = r"version 3 of 'm' was pruned: its text is in the history, its slots are gone"
    for one in (store, held):
        for call in (
            lambda one=one: one.open("m", 3),
            lambda one=one: one.rollback("m", 3),
            lambda one=one: one.fork("m", "f", 3),
            lambda one=one: one.undo("m"),
            lambda one=one: one.diff("m", 3),
            lambda one=one: one.stats("m", version=3),
            lambda one=one: one.ask(llm, "m", "what?", version=3),
        ):
            with pytest.raises(NotFoundError, match=words):
                call()
    assert store.names() == ["m"] and len(store.history("m")) == 5
    store.pin("m", "c")
    store.undo("m")
    assert states(store) == ["applied", *["pruned"] * 3, *["applied"] * 3]
    store.rollback("m", 0)  # the beginning stays
    assert store.open("m").is_empty


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either keep or older_than"),
        ({"keep": 1, "older_than": 1}, "either keep or older_than"),
        ({"keep": 0}, "keep must be 1 or more, got 0"),
        ({"older_than": -1}, "older_than must be 0 or more"),
        ({"older_than": float("nan")}, "older_than must be 0 or more"),
    ],
)
def test_what_can_not_be_pruned_is_refused(llm, store, options, words):
    filled(llm, store)
    with pytest.raises(ValueError, match=words):
        store.prune("m", **options)
    with pytest.raises(NotFoundError, match="no memory 'n'"):
        store.prune("n", keep=1)
    assert states(store) == ["applied"] * 5


def test_older_checkouts_read_a_store_until_something_is_pruned(llm, store, tmp_path):
    def number(store):
        return store._journal._one("PRAGMA user_version")[0]

    def form(path):
        with zipfile.ZipFile(path) as file:
            return json.loads(file.read("manifest.json"))["format"]

    filled(llm, store)
    store.prune("m", keep=1, dry_run=True)
    assert number(store) == number(again(store)) == 2
    store.prune("m", keep=1)
    assert number(store) == number(again(store)) == 3
    store.export("m", tmp_path / "m.zip")
    assert form(tmp_path / "m.zip") == "latentmem export 3"
    there = Store(tmp_path / "there")
    there.create("n", start(llm))
    there.export("n", tmp_path / "n.zip")
    assert number(there) == 2 and form(tmp_path / "n.zip") == "latentmem export 2"
    there.import_(tmp_path / "m.zip", "m")
    assert number(there) == number(again(there)) == 3


def test_a_kind_of_version_that_is_not_known_is_refused(llm, store):
    filled(llm, store)
    store._journal._do("UPDATE versions SET kind = 'folded', object = NULL WHERE seq = 2")
    with pytest.raises(ValueError, match=r"version 2 is kept as 'folded'.* Update latentmem"):
        again(store).open("m", 2)


# --- what others need -------------------------------------------------------------------------------------------------


def test_what_a_fork_goes_on_from_stays(llm, store):
    live = filled(llm, store)
    store.fork("m", "f", 2)
    store.write(llm, "f", "more", "z")
    assert store.prune("m", keep=1).versions == [1, 3]
    same(again(store).open("m", 2), live[2])
    same(again(store).open("f", 0), live[2])
    same(again(store).open("f"), llm.write(live[2], "more", "z"))
    for i in range(3):
        store.write(llm, "f", f"much {i}", "z")
    newest = store.open("f")
    assert store.prune("f", keep=1).versions == [1, 2, 3]
    same(again(store).open("f"), newest)
    sound(store)
    store.delete("f")
    assert store.prune("m", keep=1).versions == [2]
    sound(store)


def test_a_version_without_tensors_keeps_the_one_that_it_stands_for(llm, store):
    live = filled(llm, store)
    store.rollback("m", 2)
    store.pin("m", "a")
    pinned = store.open("m")
    store.append("m", "as a judge", "b", role="judge")
    store.apply(llm, "m")
    assert states(store)[-1] == "failed"
    assert store.prune("m", keep=1).versions == [1, 3, 4]
    same(again(store).open("m"), pinned)
    same(again(store).open("m", 2), live[2])
    store.undo("m")
    same(again(store).open("m"), live[2])
    sound(store)


def test_writes_that_wait_are_applied_as_if_nothing_was_pruned(llm, store):
    live = filled(llm, store)
    store.append("m", "waits", "z")
    store.rollback("m", 1)  # the write is not what the newest version is made from
    store.append("m", "waits too", "z")
    assert store.prune("m", keep=1).versions == [2, 3]
    assert store.pending_count("m") == 2 and store.applied_version("m") == 6
    store.apply(llm, "m")
    same(again(store).open("m", 5), llm.write(live[4], "waits", "z"))
    same(again(store).open("m"), llm.write(live[1], "waits too", "z"))
    sound(store)


def test_a_repeated_key_writes_nothing_twice(llm, store):
    store.create("m", start(llm))
    for i in range(4):
        store.write(llm, "m", f"text {i}", "s", key=str(i))
    store.append("m", "as a judge", "s", role="judge", key="bad")
    store.apply(llm, "m")
    store.write(llm, "m", "text 4", "s", key="4")
    store.prune("m", keep=1)
    assert [store.write(llm, "m", f"text {i}", "s", key=str(i)) for i in range(4)] == [1, 2, 3, 4]
    assert store.append("m", "text 2", "s", key="2") == 3 and store.version("m", key="2").state == "pruned"
    with pytest.raises(ValueError, match="belongs to another text, version 3"):
        store.write(llm, "m", "text 9", "s", key="2")
    with pytest.raises(ValueError, match="role"):
        store.write(llm, "m", "as a judge", "s", role="judge", key="bad")
    assert len(store.history("m")) == 7 and states(store)[5] == "failed"


def test_objects_stay_where_a_snapshot_would_take_more(llm, store):
    memory = start(llm)
    for i in range(4):
        memory = llm.write(memory, f"before {i}", "old")
    store.create("m", memory)
    store.write(llm, "m", "x", "a")
    store.write(llm, "m", "y", "b")
    before, newest = disk(store), store.open("m")
    assert store.prune("m", keep=1) == Pruned([1], 0) and disk(store) == before
    assert states(store) == ["applied", "pruned", "applied"]
    same(again(store).open("m"), newest)
    for i in range(9):
        store.write(llm, "m", f"and more {i}", "c")
    assert store.prune("m", keep=1).versions == list(range(2, 11))
    assert store._journal.version("m", 1).kind == "pruned" and disk(store) < before * 2
    sound(store)


# --- how much ---------------------------------------------------------------------------------------------------------


def test_an_overview_says_what_pruning_would_free(llm, store):
    store.create("m", start(llm, N=200, K=40))
    assert store.overview()[0].prunable == 0
    for i in range(9):
        store.write(llm, "m", "a text of forty bytes, more or less, " * 2, str(i))
    said, before = store.overview()[0], disk(store)
    assert said.bytes == before and 0 < said.prunable < said.bytes
    estimate = store.prune("m", keep=1, dry_run=True)
    assert estimate.bytes == said.prunable
    freed = store.prune("m", keep=1).bytes
    assert freed == before - disk(store) and abs(freed - said.prunable) < 0.05 * before
    assert store.overview()[0].prunable == 0 and store.overview()[0].bytes == disk(store)


def test_an_overview_reads_all_versions_after_a_change_only(llm, store, monkeypatch):
    filled(llm, store)
    other, outline, read = again(store), pruning.outline, []
    first = store.overview(), other.overview()
    monkeypatch.setattr(pruning, "outline", lambda *asked: read.append(asked) or outline(*asked))
    assert first == (store.overview(), other.overview()) and not read
    other.write(llm, "m", "a text of forty bytes, more or less", "x")
    assert store.overview() == other.overview() != first[0] and len(read) == 2
    for change in (lambda: store.prune("m", keep=1), lambda: other.fork("m", "f", 0), lambda: store.delete("f")):
        change()
        assert store.overview() == other.overview() == again(store).overview()


def test_rows_from_before_sizes_were_kept_are_pruned_too(llm, store):
    live = filled(llm, store, sources="abcab")
    store._journal._do("UPDATE versions SET facts = json_remove(facts, '$.size')")
    assert store.overview()[0].prunable > 0
    assert store.prune("m", keep=1).versions == [1, 2, 3, 4]
    same(again(store).open("m"), live[-1])
    sound(store)


def test_blocks_that_no_version_needs_leave_the_disk(llm, tmp_path, monkeypatch):
    for module in ("latentmem.longterm.blocks", "latentmem.store.states"):
        monkeypatch.setattr(f"{module}.BLOCK", 16)
    store, live = Store(tmp_path / "s", snapshot_every=2), start(llm, longterm={"R": 8, "limit": 20_000})
    store.create("m", live)
    for i in range(24):
        store.write(llm, "m", f"text number {i}", "s")
        live = llm.write(live, f"text number {i}", "s")
    before, blocks = disk(store), [version.facts.get("blocks", {}) for version in store.history("m")]
    assert any(blocks[2:-3]) and store.overview()[0].bytes == before
    store.fork("m", "f", 23)  # two versions that become snapshots share blocks
    said = store.prune("m", keep=1, dry_run=True).bytes
    freed = store.prune("m", keep=1).bytes
    assert freed == before - disk(store) > 0 and abs(said - freed) < 0.15 * before
    store.delete("f")
    same(again(store).open("m"), live)
    sound(store)
    store.forget_by_replay(llm, "m", "s")
    assert again(store).open("m").is_empty


class Device(Disk):
    """A disk that is full after some files, or that removes none."""

    room, error = 10**9, None

    def create(self, path, data):
        if self.room <= 0:
            raise OSError(28, "No space left on device")
        self.room -= 1
        super().create(path, data)

    def remove(self, path):
        if self.error is not None and path.suffix == ".safetensors":
            raise self.error
        super().remove(path)


@pytest.mark.parametrize("room", [0, 1, 2])
@pytest.mark.parametrize("error", [None, OSError(5, "Input/output error")], ids=["", "nothing can be removed"])
def test_a_full_disk_changes_nothing_and_keeps_nothing(llm, tmp_path, room, error):
    device = Device()
    store = Store(tmp_path / "s", snapshot_every=64, disk=device)
    live = filled(llm, store, sources="abcabcabcabcabcabcab")
    for version in (5, 10, 15):
        store.fork("m", f"f{version}", version)
    before = files(store)
    device.room, device.error = room, error
    with pytest.raises(OSError, match="No space"):
        store.prune("m", keep=1)
    assert states(store) == ["applied"] * 21
    for i, expected in enumerate(live):
        same(again(store).open("m", i), expected)
    sound(store)
    device.room, device.error = 10**9, None
    assert files(store) == before
    assert len(store.prune("m", keep=1).versions) == 16
    sound(store)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("a bucket's own"), KeyError("it")])
def test_a_sweep_that_fails_behind_the_commit_is_done_by_the_next_store(llm, tmp_path, error):
    device = Device()
    store = Store(tmp_path / "s", snapshot_every=3, disk=device)
    filled(llm, store, sources="abcab")
    before, device.error = disk(store), error
    pruned = store.prune("m", keep=1)
    assert pruned.versions == [1, 2, 3, 4] and pruned.bytes > 0
    assert disk(store) >= before
    same(again(store, disk=device).open("m"), store.open("m"))  # it can not sweep either, and opens
    device.error = None
    assert store.prune("m", keep=1) == Pruned([], 0)  # nothing to prune, and what is due is done
    assert disk(store) == store._journal.bytes()
    sound(store)


def test_who_reads_the_database_hinders_neither_pruning_nor_the_next_store(llm, store):
    filled(llm, store)
    reader = sqlite3.connect(store.path / "store.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM versions").fetchall()
    began = time.monotonic()
    short = again(store, timeout=20)
    assert short.prune("m", keep=1).versions == [1, 2, 3]
    assert time.monotonic() - began < 10  # it waits for nobody
    assert disk(store) == store._journal.bytes()
    quick = again(store, timeout=0.1)
    with pytest.raises(InUseError, match="still holds what was deleted"):
        quick.forget_by_replay(llm, "m", "b")
    quick.prune("m", keep=1)  # does not take the sweep of the log for done
    assert again(store, timeout=0.1).history("m")[-1].source == "c"
    assert store._journal.setting("sweep", "no") == "due" and b"note 1 of b" in raw(store)
    reader.close()
    again(store)
    assert store._journal.setting("sweep", "no") == "no" and b"note 1 of b" not in raw(store)
    sound(store)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_pruned_memory_is_rebuilt_from_its_texts(llm, store):
    live = filled(llm, store)
    store.pin("m", "b")
    store.prune("m", keep=1)
    store.rebuild(llm, "m", "new")
    same(store.open("new"), store.open("m"))
    same(store.open("m", 4), live[4])


def test_exact_forgetting_needs_only_the_texts(llm, store):
    filled(llm, store, sources="abacb")
    store.fork("m", "f", 3)
    store.write(llm, "f", "on the fork", "z")
    store.prune("m", keep=1)
    assert store.forget_by_replay(llm, "m", "a") == ["f", "m"]
    live = start(llm)
    for i in (1, 3, 4):
        live = llm.write(live, f"note {i} of {'abacb'[i]}", "abacb"[i])
    same(again(store).open("m"), live)
    fork = llm.write(llm.write(start(llm), "note 1 of b", "b"), "on the fork", "z")
    same(again(store).open("f"), fork)
    assert [version.source for version in store.history("m")] == [None, "b", "c", "b"]
    sound(store)
    store.rebuild(llm, "m", "new")
    same(store.open("new"), live)


def test_a_source_whose_writes_are_pruned_expires(llm, store):
    live = filled(llm, store)
    store.prune("m", keep=1)
    store.expire("m", "a", 0)
    expected = forget(live[-1], "a")
    same(again(store).open("m"), expected)
    assert states(store) == ["applied", "pruned", "pruned", "pruned", "applied", "applied"]
    assert store.prune("m", keep=1) == Pruned([], 0)  # the newest version is version 4 without the source
    with pytest.raises(ValueError, match="has expired"):
        store.write(llm, "m", "again", "a")
    store.rebuild(llm, "m", "new")
    same(store.open("new"), expected)
    store.undo("m")
    same(again(store).open("m", 4), live[-1])
    assert store.forget_by_replay(llm, "m", "a") == ["m"]
    without = llm.write(llm.write(start(llm), "note 1 of b", "b"), "note 3 of c", "c")
    same(again(store).open("m"), without)
    sound(store)


@pytest.mark.parametrize("after", ["nothing", "pin", "append", "fork", "failed"])
def test_a_version_comes_back_where_the_newest_one_is_forgotten(llm, store, after):
    live = filled(llm, store, sources="abacd")
    if after == "pin":
        store.pin("m", "b")
    if after == "fork":
        store.fork("m", "f")
    if after == "failed":
        store.append("m", "as a judge", "b", role="judge")
        store.apply(llm, "m")
    store.prune("m", keep=1)
    if after == "append":
        store.append("m", "waits", "z")
    store.forget_by_replay(llm, "m", "d")
    same(again(store).open("m", 4), live[4])
    assert open_versions(store)[:2] == [0, 4]
    if after == "append":
        store.apply(llm, "m")
    sound(store)
    store.write(llm, "m", "goes on", "z")
    store.rebuild(llm, "m", "new")
    same(store.open("new"), store.open("m"))
    sound(store)


def test_a_version_that_fails_on_a_pruned_one_can_be_opened(llm, store, tmp_path, monkeypatch):
    filled(llm, store, sources="abacb")
    store.prune("m", keep=1)
    compute = Writer.compute

    def refusing(self, llm, row, *more):
        if row.payload["text"].startswith("note 4"):
            raise ValueError("no")
        return compute(self, llm, row, *more)

    monkeypatch.setattr(Writer, "compute", refusing)
    store.forget_by_replay(llm, "m", "a")
    live = start(llm)
    for i in (1, 3):
        live = llm.write(live, f"note {i} of {'abacb'[i]}", "abacb"[i])
    assert states(store) == ["applied", "pruned", "pruned", "failed"]
    same(again(store).open("m"), live)
    sound(store)
    store.export("m", tmp_path / "m.zip")
    store.import_(tmp_path / "m.zip", "copy")
    same(store.open("copy"), live)


def other_template():
    """A tokenizer with the same words, whose template knows no system and writes shorter turns."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


def template_of_equal_length():
    """A tokenizer with the same words, whose template puts a space where the other has a new line."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m['role'] + '\\n'", "m['role'] + ' '")
    return tokenizer


def other_words():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["hello"])
    return tokenizer


@pytest.mark.parametrize("position", ["before", "last"])
@pytest.mark.parametrize(
    ("role", "tokenizer", "words"),
    [
        ("system", other_template, r"version 1 of 'm' can not be written again: .* no system; nothing has changed"),
        ("user", other_template, r"version 1 of 'm' .* its text is \d+ tokens now, and was \d+; nothing has changed"),
        ("user", template_of_equal_length, r"version 1 of 'm' .* its text is other tokens now; nothing has changed"),
        ("user", other_words, r"another tokenizer"),
    ],
)
def test_a_pruned_version_that_is_not_what_it_was_is_never_left_out(llm, store, position, role, tokenizer, words):
    store.create("m", start(llm, N=400))
    store.write(llm, "m", [{"role": role, "content": "the patient is allergic to penicillin"}], "allergy")
    store.write(llm, "m", "hello", "a", role="raw")
    store.write(llm, "m", "xyz", "secret", role="raw")
    if position == "before":
        store.write(llm, "m", "and so on", "b", role="raw")
    store.prune("m", keep=1)
    before, newest = seen(store, "m"), store.open("m")
    with pytest.raises(ValueError, match=words):
        store.forget_by_replay(MemoryModel(tiny_model(), tokenizer(), name="tiny"), "m", "secret")
    assert seen(again(store), "m") == before
    same(again(store).open("m"), newest)
    store.sweep()
    sound(store)
    store.forget_by_replay(llm, "m", "secret")
    assert {source.name: source.tokens for source in again(store).open("m").sources}.keys() >= {"allergy", "a"}
    sound(store)


def test_a_pruned_pin_that_fails_when_it_is_repeated_is_never_left_out(llm, store, monkeypatch):
    filled(llm, store, sources="ab")
    store.pin("m", "a")
    store.write(llm, "m", "secret", "s")
    store.write(llm, "m", "more", "b")
    store.prune("m", keep=1)
    newest = store.open("m")

    def refusing(row, memory):
        if row.event == "pin":
            raise ValueError("no such pin.")
        return after_event(row, memory)

    with monkeypatch.context() as patch:
        patch.setattr("latentmem.store.replay.after_event", refusing)
        with pytest.raises(ValueError, match=r"version 3 of 'm' can not .* no such pin; nothing has changed"):
            store.forget_by_replay(llm, "m", "s")
    same(again(store).open("m"), newest)


def test_a_pin_that_failed_in_a_replay_is_a_pin_again_where_it_fits(llm, store, monkeypatch):
    live = filled(llm, store, sources="abc")
    store.pin("m", "b")
    store.write(llm, "m", "more", "d")

    def refusing(*_):
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr("latentmem.store.replay.after_event", refusing)
        store.forget_by_replay(llm, "m", "a")
    assert states(store)[3] == "failed"
    store.forget_by_replay(llm, "m", "c")
    assert states(store) == ["applied"] * 4
    expected = llm.write(pin(llm.write(live[0], "note 1 of b", "b"), "b"), "more", "d")
    same(again(store).open("m"), expected)


def test_a_version_comes_back_in_its_place_and_nothing_else_is_written_again(llm, store, monkeypatch):
    live = filled(llm, store, sources="abcs")
    store.fork("m", "f", 4)
    store.rollback("m", 3)
    store.write(llm, "m", "on top of the third", "z")
    store.prune("m", keep=1)
    assert open_versions(store) == [0, 4, 6]
    row, written = store._journal.version("m", 6), []
    compute = Writer.compute
    monkeypatch.setattr(
        Writer, "compute", lambda self, llm, row, *a: written.append(row.seq) or compute(self, llm, row, *a)
    )
    store.forget_by_replay(llm, "m", "s")
    assert written == [1, 2, 3] and store._journal.version("m", 5) == replace(row, seq=5)
    assert open_versions(store) == [0, 3, 5]
    same(again(store).open("m", 3), live[3])
    same(again(store).open("f"), live[3])
    sound(store)


def test_a_version_without_tensors_that_comes_back_gets_some_where_its_base_stays_pruned(llm, store):
    memory = start(llm, N=200)
    for i in range(4):
        memory = llm.write(memory, f"before {i} " * 20, "old")
    store.create("m", memory)
    store.write(llm, "m", "x", "a")
    store.pin("m", "a")
    pinned = store.open("m")
    store.write(llm, "m", "y", "b")
    assert store.prune("m", keep=1).versions == [1, 2] and store._journal.version("m", 1).kind == "delta"
    sound(store)
    store.forget_by_replay(llm, "m", "b")
    assert open_versions(store) == [0, 2]
    same(again(store).open("m"), pinned)
    sound(store)
    store.write(llm, "m", "z", "c")
    sound(store)
    store.forget_by_replay(llm, "m", "c")
    sound(store)


class Twins:
    """Two stores in which the same happens, but that only the first is pruned."""

    def __init__(self, llm, folder, objects, **kind):
        self.llm, self.names = llm, ["m"]
        options = {"snapshot_every": 3, "cache_bytes": 40_000}
        self.stores = [Store(folder / "pruned", objects=objects, **options), Store(folder / "whole", **options)]
        self.pruned, self.whole = self.stores
        for store in self.stores:
            store.create("m", start(llm, **kind))

    def both(self, action):
        results = []
        for store in self.stores:
            try:
                results.append(action(store))
            except ValueError as error:
                assert any(words in str(error) for words in ("no source", "pinned", "expired", "waits")), error
                results.append(str(error))
        assert results[0] == results[1]

    def step(self, rng, number):
        """Something at random in one of the memories."""
        llm, name, source = self.llm, rng.choice(self.names), rng.choice("pqrs")
        events = ("write", "wait", "judge", "pin", "forget", "expire", "back", "fork", "prune")
        event = rng.choices(events, (10, 2, 1, 2, 1, 1, 2, 1, 4))[0]
        version = rng.choice(open_versions(self.pruned, name))
        if event == "write":
            self.both(lambda store: store.write(llm, name, f"text {number}", source))
        elif event == "wait":
            self.both(lambda store: store.append(name, f"text {number}", source))
        elif event == "judge":
            self.both(lambda store: (store.append(name, "as a judge", source, role="judge"), store.apply(llm, name)))
        elif event in ("pin", "forget"):
            self.both(lambda store: getattr(store, event)(name, source))
        elif event == "expire":
            self.both(lambda store: store.expire(name, source, 0))
        elif event == "back":
            self.both(lambda store: store.rollback(name, version))
        elif event == "fork" and len(self.names) < 4:
            self.both(lambda store: store.fork(name, f"f{number}", version))
            self.names = self.pruned.names()
        elif event == "prune":
            self.pruned.prune(name, **rng.choice([{"keep": 1}, {"keep": 1}, {"keep": 3}, {"older_than": 0}]))
            self.compare()

    def compare(self):
        """What is left of the pruned store is as in the other, to the bit, and its newest versions are left."""
        assert set(self.pruned._objects.names()) == self.pruned._journal.objects()
        for name in self.names:
            one, other = (store.history(name) for store in self.stores)
            for what in ("version", "event", "source", "text", "base", "error"):
                assert [getattr(v, what) for v in one] == [getattr(v, what) for v in other]
            assert not one[0].pruned and not one[-1].pruned
            for version in one:
                if not version.pruned and not self.pruned._books.waits(self.row(name, version.version)):
                    same(*(store.open(name, version.version) for store in self.stores))

    def row(self, name, version):
        return self.pruned._journal.version(name, version)


@pytest.mark.parametrize("objects", [None, "memory://pruned-twin"], ids=["folder", "bucket"])
@pytest.mark.parametrize("kind", [{}, {"longterm": {"R": 8, "limit": 20_000}}], ids=["", "long-term"])
def test_a_pruned_store_is_as_one_that_is_not(llm, tmp_path, monkeypatch, kind, objects):
    for module in ("latentmem.longterm.blocks", "latentmem.store.states"):
        monkeypatch.setattr(f"{module}.BLOCK", 16)
    forgotten = 0
    for case in range(2):
        rng, place = random.Random(f"{case}{kind}"), objects and f"{objects}-{case}-{len(kind)}"
        twins = Twins(llm, tmp_path / str(case), place, **kind)
        for number in range(35):
            twins.step(rng, number)
        for name in twins.names:
            twins.both(lambda store, name=name: store.apply(llm, name))
        twins.pruned.prune("m", keep=1)
        twins.compare()
        for source in rng.sample("pqrs", 3):
            if any(v.event == "write" and v.source == source for n in twins.names for v in twins.pruned.history(n)):
                twins.both(lambda store, source=source: store.forget_by_replay(llm, "m", source))
                forgotten += 1
            twins.compare()
            twins.pruned.prune(rng.choice(twins.names), keep=1)
        if objects is None:
            sound(twins.pruned)
    assert forgotten > 3


# --- export and import ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    store = Store(folder / "s", snapshot_every=3)
    filled(llm, store, sources="abacaba")
    store.pin("m", "c")
    store.prune("m", keep=3)
    store.export("m", folder / "m.zip")
    return store, (folder / "m.zip").read_bytes()


def test_a_pruned_memory_is_exported_and_imported(llm, exported, tmp_path):
    store, data = exported
    (tmp_path / "m.zip").write_bytes(data)
    there = Store(tmp_path / "there", snapshot_every=3)
    there.import_(tmp_path / "m.zip", "copy")
    assert seen(there, "copy") == seen(store, "m")
    assert states(there, "copy") == ["applied", *["pruned"] * 5, *["applied"] * 3]
    sound(there)
    there.export("copy", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == data
    there.forget_by_replay(llm, "copy", "b")
    live = start(llm)
    for i in (0, 2, 3, 4, 6):
        live = llm.write(live, f"note {i} of {'abacaba'[i]}", "abacaba"[i])
    same(there.open("copy"), pin(live, "c"))
    there.rebuild(llm, "copy", "new")


def marked_and_waiting(rows):
    waits = {"state": "pending", "kind": "none", "object": None, "bytes": 0, "seq": 9, "base": 8}
    rows += [rows[7] | waits | {"facts": {"pruned": True}}, rows[8] | {"seq": 10}]


ALTERED = {
    "the newest pruned": lines(lambda rows: rows[-1]["facts"].update(pruned=True)),
    "the first pruned": lines(lambda rows: rows[0]["facts"].update(pruned=True)),
    "a mark that is none": lines(lambda rows: rows[1]["facts"].update(pruned="no")),
    "no mark": lines(lambda rows: rows[1]["facts"].pop("pruned") and None),
    "a delta on nothing": lines(lambda rows: rows[7].update(base=2)),
    "a pin on nothing": lines(lambda rows: rows[8].update(base=2)),
    "a pruned version with bytes": lines(lambda rows: rows[1].update(bytes=5)),
    "a pruned version that waits": lines(lambda rows: rows[1].update(state="pending")),
    "a mark on a version that waits": lines(marked_and_waiting),
    "a pruned version with an object": lines(lambda rows: rows[1].update(object=rows[6]["object"])),
}


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED)
def test_an_altered_file_of_a_pruned_memory_is_refused(exported, tmp_path, change):
    path, there = tmp_path / "x.zip", Store(tmp_path / "there")
    path.write_bytes(exported[1])
    tampered(path, change)
    with pytest.raises(ValueError, match=r"x\.zip"):
        there.import_(path, "m")
    assert there.names() == [] and files(there) == [] and len(HOSTILE) > 20


# --- at once ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["open", "stats", "latest", "has_pending", "diff"])
def test_the_newest_version_is_read_where_the_one_before_is_pruned_meanwhile(llm, store, monkeypatch, what):
    live = filled(llm, store)
    if what == "has_pending":
        store.expire("m", "a", 0)
    reader, moved = again(store, cache_bytes=0), []
    get = reader._objects.get

    def slow(name):
        if len(moved) < 2:
            moved.append(store._journal.head(store._journal.id("m")).seq)
            store._writer.write(llm, store._journal.id("m"), payload("goes on", "z", None))
            store.prune("m", keep=1)
        return get(name)

    monkeypatch.setattr(reader._objects, "get", slow)
    monkeypatch.setattr(reader._journal, "account", lambda _: None)  # as of a store that kept none
    monkeypatch.setattr(store._books, "expired", lambda _: [])
    expected = live[-1]
    for _ in range(2):
        expected = llm.write(expected, "goes on", "z")
    if what == "has_pending":
        assert reader.has_pending("m")
    elif what == "stats":
        assert [(one.source, one.tokens) for one in reader.stats("m")] == [(s.name, s.tokens) for s in expected.sources]
    elif what == "diff":
        assert {change.source for change in reader.diff("m", 0)} >= {"z"}
    elif what == "latest":
        version, memory = reader.latest("m")
        assert version == 6
        same(memory, expected)
    else:
        same(reader.open("m"), expected)
    assert moved[-1] == 5 or what == "diff"


def test_two_who_prune_and_one_who_writes_meet(llm, store):
    store.create("m", start(llm))
    store.write(llm, "m", "first", "s")
    store.fork("m", "f")
    failed, ended = [], threading.Event()

    def prune(mine, names):
        while not ended.is_set():
            try:
                for name in names:
                    mine.prune(name, keep=1)
            except Exception as error:  # noqa: BLE001 - shown below
                failed.append(error)

    threads = [threading.Thread(target=prune, args=(again(store), names)) for names in ("mf", "fm")]
    for thread in threads:
        thread.start()
    live = dict.fromkeys("mf", store.open("m"))
    try:
        for i in range(12):
            for name in "mf":
                store.write(llm, name, f"text {i}", name if i % 2 else "same")  # both have some objects in common
                live[name] = llm.write(live[name], f"text {i}", name if i % 2 else "same")
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not failed
    for name in "mf":
        same(again(store).open(name), live[name])
        store.prune(name, keep=1)
    assert [open_versions(store, name) for name in "mf"] == [[0, 1, 13], [0, 12]]
    sound(store)


def test_who_prunes_beside_a_replay_waits_for_its_memories_and_takes_nothing_of_it(llm, store):
    filled(llm, store, sources="abacb")
    store.fork("m", "f", 3)
    filled(llm, store, "other", "abc")
    hasty, seen_there = again(store, timeout=0.2), []

    def beside(*_):
        for name in "mf":
            with pytest.raises(InUseError, match=f"is changing the memory '{name}'"):
                hasty.prune(name, keep=1)
        if not seen_there:
            assert hasty.prune("other", keep=1).versions == [1, 2]
        seen_there.append(store._journal.building())

    store.forget_by_replay(llm, "m", "a", beside)
    assert any(seen_there), "nothing was on disk yet"
    live = start(llm)
    for i in (1, 3, 4):
        live = llm.write(live, f"note {i} of {'abacb'[i]}", "abacb"[i])
    same(again(store).open("m"), live)
    same(again(store).open("f"), llm.write(start(llm), "note 1 of b", "b"))
    hasty.prune("m", keep=1)
    sound(store)


def test_a_replay_that_is_refused_leaves_nothing_on_the_disk(llm, store, monkeypatch):
    filled(llm, store, sources="abacb")
    store.prune("m", keep=1)
    before = files(store)

    def refuse(*_):
        assert set(files(store)) > set(before) and store._journal.building()
        raise ValueError("this is where a replay says what does not fit")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="does not fit"):
        patch.setattr("latentmem.store.replay.Replay._exchange", refuse)
        store.forget_by_replay(llm, "m", "a")
    assert files(store) == before and not store._journal.building()
    sound(store)


def test_the_objects_lock_is_free_between_two_snapshots_and_the_next_store_waits_for_nobody(llm, store, monkeypatch):
    live = filled(llm, store, sources="abcabcab")
    for version in (2, 4):
        store.fork("m", f"f{version}", version)
    other, put, beside = again(store, timeout=0.2), store._states.put, []

    def slow(row, content):
        began = time.monotonic()
        assert again(store, timeout=20).names() == ["f2", "f4", "m"]  # sweeps later
        assert time.monotonic() - began < 10
        return put(row, content)

    build = store._journal.build

    def built(memory, name):
        build(memory, name)
        beside.append(name)

    monkeypatch.setattr(store._states, "put", slow)
    monkeypatch.setattr(store._journal, "build", built)
    memory = store._states.memory

    def write_beside(row, **options):
        if len(beside) == 1:
            other.write(llm, "f2", "beside", "z")
        other.sweep()
        return memory(row, **options)

    monkeypatch.setattr(store._states, "memory", write_beside)
    assert store.prune("m", keep=1).versions == [1, 3, 5, 6, 7]
    assert len(beside) > 1
    monkeypatch.undo()
    same(again(store).open("m"), live[-1])
    same(again(store).open("f2"), llm.write(live[2], "beside", "z"))
    sound(store)


def test_versions_are_read_while_others_are_pruned(llm, store):
    store.create("m", start(llm))
    failed, ended = [], threading.Event()

    def read(reader):
        while not ended.is_set():
            try:
                version, memory = reader.latest("m")
                assert memory.updates == version
                assert reader.history("m")[-1].version >= version
            except Exception as error:  # noqa: BLE001 - shown below
                failed.append(error)

    readers = [store, again(store, cache_bytes=0), again(store, cache_bytes=0)]
    threads = [threading.Thread(target=read, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    try:
        for i in range(30):
            store.write(llm, "m", f"text {i}", "s")
            store.prune("m", keep=1 + i % 3)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not failed
    live = start(llm)
    for i in range(30):
        live = llm.write(live, f"text {i}", "s")
    same(again(store).open("m"), live)
    sound(store)
