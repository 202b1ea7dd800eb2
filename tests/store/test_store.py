"""A store: versions equal live memories to the bit, and what was forgotten is gone."""

import json
import random
import re
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from latentmem.core import memory as core_memory
from latentmem.core.memory import Memory, draw, empty
from latentmem.core.settings import MemorySettings
from latentmem.core.sources import forget, pin
from latentmem.errors import InUseError, NameTakenError, NotFoundError
from latentmem.files import snapshot
from latentmem.model.model import MemoryModel
from latentmem.store import Store, Turns, archive
from latentmem.store.delta import Chain, Update
from latentmem.store.objects import Disk
from latentmem.store.states import States, account_of
from latentmem.store.views import forecast
from latentmem.store.writing import Writer
from latentmem.testing import byte_tokenizer, tiny_model, updated

SECRET = "the safe opens with heliotrope"


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def other():
    return MemoryModel(tiny_model(seed=1), byte_tokenizer(), name="other")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", snapshot_every=3)


def again(store, **options):
    """The same store, opened anew."""
    return Store(store.path, snapshot_every=store.snapshot_every, **options)


def same(one, two):
    """All fields of two memories are equal, tensors to the bit."""
    for field in fields(Memory):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, field.name
    return True


def start(llm, **changes):
    return llm.empty(**{"N": 24, "K": 8, "seed": 5} | changes)


def filled(llm, store, name="m", sources="abac"):
    """A memory of a few short writes, each under one letter; and what the model gives without a store."""
    live = [start(llm)]
    store.create(name, live[0])
    for i, source in enumerate(sources):
        assert store.write(llm, name, f"note {i} of {source}", source) == i + 1
        live.append(llm.write(live[-1], f"note {i} of {source}", source))
    return live


def raw(store):
    """All bytes of all files of a store."""
    return b"\0".join(path.read_bytes() for path in sorted(store.path.rglob("*")) if path.is_file())


def files(store):
    return sorted(path.stem for path in (store.path / "objects").glob("*/*"))


# --- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [{}, {"N": 200}, {"preset": "paper"}, {"compression": 2, "choice": "surprise"}, {"N": 12, "K": 12}],
    ids=lambda kind: " ".join(map(str, kind.values())) or "exact",
)
def test_every_version_is_the_live_memory_to_the_bit(llm, tmp_path, kind):
    store, live = Store(tmp_path / "s", snapshot_every=3), [start(llm, **kind)]
    store.create("m", live[0])
    for i in range(7):
        text = f"{'a longer note ' * (i % 3)}number {i}"
        store.write(llm, "m", text, f"s{i % 3}")
        live.append(llm.write(live[-1], text, f"s{i % 3}"))
        same(store.open("m"), live[-1])
    cold = again(store)
    for i, expected in reversed(list(enumerate(live))):
        same(cold.open("m", i), expected)
    assert [v.version for v in store.history("m")] == list(range(8))


def test_a_store_that_is_opened_anew_for_each_write_gives_the_same_bits(llm, store):
    live = start(llm)
    store.create("m", live)
    for i in range(6):
        again(store).write(llm, "m", f"a text of many tokens, number {i}", "s")
        live = llm.write(live, f"a text of many tokens, number {i}", "s")
    same(again(store).open("m"), live)


def test_token_ids_and_roles_are_written_as_the_model_writes_them(llm, store):
    live = start(llm)
    store.create("m", live)
    store.write(llm, "m", [5, 6, 7], "ids")
    store.write(llm, "m", "a turn", "turn", role="user")
    live = llm.write(llm.write_ids(live, [5, 6, 7], "ids"), "a turn", "turn", role="user")
    same(again(store).open("m"), live)
    store.rebuild(llm, "m", "n")
    same(store.open("n"), live)


def test_deltas_stand_between_snapshots_and_are_smaller(llm, tmp_path):
    store = Store(tmp_path / "s", snapshot_every=4)
    store.create("m", start(llm, N=200))
    for i in range(12):
        store.write(llm, "m", "ten bytes." * (20 if i == 6 else 1))
    kinds = [store._journal.version("m", i).kind for i in range(13)]
    assert kinds == ["snapshot", *["delta"] * 3, "snapshot", *["delta"] * 3, "snapshot", *["delta"] * 3, "snapshot"]
    sizes = [v.bytes for v in store.history("m")]
    assert sizes[9] < sizes[12] / 10
    store.create("small", start(llm, N=8, K=8))
    store.write(llm, "small", "a text that is longer than the memory")
    assert store._journal.head(store._journal.id("small")).kind == "snapshot"


@pytest.mark.parametrize("action", ["write", "append", "accept", "replay", "rebuild"])
def test_a_write_of_13_updates_is_tokenised_once_and_each_update_drawn_once(llm, store, monkeypatch, action):
    text, key = "a" * (12 * 8 + 3), "one"
    store.create("m", start(llm))
    if action in ("replay", "rebuild"):
        store.write(llm, "m", "gone", "gone")
        store.write(llm, "m", text, "s")
    if action == "rebuild":
        store.rollback("m", 0)
        store.write(llm, "m", text, "s")
    if action == "append":
        store.append("m", text, "s", key=key)
    encoded, drawn = [], []
    encode, draw_all = llm.tokenizer.encode, core_memory.draw
    monkeypatch.setattr(type(llm.tokenizer), "encode", lambda self, *a, **k: encoded.append(a) or encode(*a, **k))
    monkeypatch.setattr(core_memory, "draw", lambda *a: drawn.append(a) or draw_all(*a))
    count = Progressed()
    {
        "write": lambda: store.write(llm, "m", text, "s", key=key, progress=count),
        "append": lambda: store.apply(llm, "m", count),
        "accept": lambda: (store.append("m", text, "s", llm=llm), store.apply(llm, "m", count)),
        "replay": lambda: store.forget_by_replay(llm, "m", "gone", count),
        "rebuild": lambda: store.rebuild(llm, "m", "new", count),
    }[action]()
    assert (len(encoded), len(drawn)) == (1, 13) and count.last == (len(text), len(text))


class Progressed:
    def __call__(self, *numbers):
        self.last = numbers


def test_a_rollback_is_a_version_and_can_be_undone(llm, store):
    live = filled(llm, store)
    assert store.rollback("m", 2) == 5
    same(store.open("m"), live[2])
    store.write(llm, "m", "after", "z")
    same(again(store).open("m"), llm.write(live[2], "after", "z"))
    assert store.rollback("m", 4) == 7
    same(again(store).open("m"), live[4])
    assert [v.base for v in store.history("m")][4:] == [("m", 3), ("m", 2), ("m", 5), ("m", 4)]


def test_undo_goes_one_step_further_back_each_time(llm, store):
    live = filled(llm, store)
    for version, expected in ((5, 3), (6, 2)):
        assert store.undo("m") == version
        same(store.open("m"), live[expected])
    store.write(llm, "m", "after", "z")
    same(store.open("m", store.undo("m")), live[2])  # undone is the write alone
    same(store.open("m", store.undo("m")), live[1])
    assert store.rollback("m", 4) == 10  # an undo goes on from where a rollback went to
    same(store.open("m", store.undo("m")), live[3])
    store.pin("m", "b")
    same(store.open("m", store.undo("m")), live[3])
    for expected in (2, 1, 0):
        same(store.open("m", store.undo("m")), live[expected])
    store.fork("m", "f", 4)
    for name in "mf":
        with pytest.raises(ValueError, match=f"nothing to undo in the memory '{name}'"):
            store.undo(name)
    store.append("m", "as a judge", "b", role="judge")
    store.write(llm, "m", "fine", "b")
    same(store.open("m", store.undo("m")), live[0])  # a write that failed is no step


def test_an_overview_says_what_the_journal_knows(llm, store):
    filled(llm, store)
    store.fork("m", "f")
    store.append("f", "waits")
    f, m = store.overview()
    assert (f.name, f.versions, f.pending, f.bytes, f.model) == ("f", 2, 1, 0, "tiny")
    assert (m.name, m.versions, m.pending, m.model) == ("m", 5, 0, "tiny")
    assert m.bytes == sum(v.bytes for v in store.history("m")) and m.changed == store.history("m")[-1].time
    assert (store.pending_count("f"), store.applied_version("f"), store.applied_version("m")) == (1, 0, 4)
    for change in (lambda: store.forget("m", store.open("m").sources[0].name), lambda: store.rollback("m", 1)):
        change()
        assert store.overview()[1].M == store.open("m").M and store.overview()[1].N == store.open("m").N


@pytest.mark.parametrize("asked", [{}, {"longterm": 8}, {"longterm": {"R": 4, "limit": 5000}, "form": "int8"}], ids=str)
def test_an_overview_says_what_a_memory_keeps(llm, store, tmp_path, asked):
    store.create("m", start(llm, **asked))
    store.write(llm, "m", "a short text", "s")
    store.pin("m", "s")
    store.fork("m", "f")
    store.export("m", tmp_path / "m.zip")
    store.import_(tmp_path / "m.zip", "i")
    settings = store.open("m").settings
    for one in store.overview():
        assert (one.form, one.order) == (asked.get("form", "exact"), settings.reading_order)
        assert one.longterm == settings.longterm and (one.longterm is None) == ("longterm" not in asked)
    store._journal._do("UPDATE versions SET facts = json_remove(facts, '$.form', '$.order', '$.longterm')")
    assert {(one.form, one.order, one.longterm) for one in store.overview()} == {(None, None, None)}  # of old stores


def test_a_memory_can_begin_with_texts_that_its_journal_does_not_hold(llm, store, tmp_path):
    memory = llm.write(start(llm), SECRET, "s")
    store.create("m", memory)
    assert [(v.event, v.base) for v in store.history("m")] == [("import", None)]
    live = llm.write(memory, "goes on", "b")
    store.write(llm, "m", "goes on", "b")
    same(again(store).open("m"), live)
    store.export("m", tmp_path / "m.zip")
    store.import_(tmp_path / "m.zip", "copy")
    assert seen(store, "copy") == seen(store, "m")
    with pytest.raises(ValueError, match="before its journal began"):
        store.forget_by_replay(llm, "m", "s")
    with pytest.raises(ValueError, match="held something already"):
        store.rebuild(llm, "m", "new")
    store.forget_by_replay(llm, "m", "b")
    same(again(store).open("m"), memory)


# --- conversations --------------------------------------------------------------------------------------------------

TALK = [{"role": role, "content": text} for role, text in (("user", "my cat is Pip"), ("assistant", "noted"))]


def test_a_turn_is_acknowledged_under_the_number_of_its_version_and_applied_once(llm, store):
    live = filled(llm, store, sources="a")
    turns = Turns(store, "m")
    first = turns.keep(llm, TALK[0])
    assert turns.keep(llm, TALK[1], first) == first and first.endswith(" #2")
    assert [v.state for v in store.history("m")][2:] == ["pending", "pending"]
    after = Turns(again(store), "m").memory(llm)
    expected = llm.write_ids(llm.write(live[-1], TALK[0]["content"], first), llm.prompts.turn(TALK[1]), first)
    same(after, expected)
    assert turns.memory(llm) is store.open("m") and [v.text for v in store.history("m")][2:] == [
        "my cat is Pip",
        TALK[1:],
    ]
    store.rebuild(llm, "m", "again")
    same(store.open("again"), store.open("m"))


def test_turns_that_others_keep_at_the_same_time_have_names_of_their_own(llm, store):
    filled(llm, store, sources="a")
    with ThreadPoolExecutor(4) as pool:
        stores = [again(store) for _ in range(4)]
        names = list(pool.map(lambda i: Turns(stores[i % 4], "m").keep(llm, TALK[0]), range(16)))
    assert len(set(names)) == 16
    assert [source.name for source in store.open("m", llm=llm).sources][1:] == sorted(names, key=number)


def number(name):
    return int(name.rpartition("#")[2])


def test_a_turn_goes_with_its_memory_and_when_its_source_is_forgotten(llm, store):
    filled(llm, store, sources="ab")
    turns = Turns(store, "m")
    first = turns.keep(llm, TALK[0])
    store.forget_by_replay(llm, "m", "b")
    assert [v.source for v in store.history("m")][1:] == ["a", first]
    store.forget_by_replay(llm, "m", first)
    assert b"Pip" not in raw(store)
    turns.keep(llm, TALK[0])
    store.delete("m")
    assert b"Pip" not in raw(store)


@pytest.mark.parametrize(("leaving", "state"), [(0, ""), (1, "applied"), (1, "failed")])
def test_turns_that_an_earlier_commit_kept_are_writes_that_wait(llm, store, leaving, state):
    filled(llm, store, sources="a")
    if leaving:
        version = store.write(llm, "m", TALK[:1], "chat", key="turns 1")
        row = store._journal.version("m", version)
        store._journal.change(replace(row, state=state))
    kept = {"source": "chat", "messages": TALK, "leaving": leaving, "key": "turns 1"}
    store._journal._do("CREATE TABLE turns (memory INTEGER PRIMARY KEY REFERENCES memories, kept TEXT NOT NULL)")
    store._journal._do("INSERT INTO turns VALUES (?, ?)", store._journal.id("m"), json.dumps(kept))
    left = TALK[1:] if state == "applied" else TALK
    assert [v.text for v in again(store).history("m") if v.state == "pending"] == [left]
    assert again(store).overview()[0].pending == 1
    again(store).delete("m")


def test_what_a_model_refuses_is_no_turn(llm, store):
    filled(llm, store, sources="a")
    for text, words in (("", "empty"), ("\ud800", "Unicode")):
        with pytest.raises(ValueError, match=words):
            Turns(store, "m").keep(llm, {"role": "user", "content": text})
    assert len(store.history("m")) == 2


def test_progress_counts_the_tokens_of_all_that_is_written(llm, store):
    filled(llm, store, sources="ab")
    said = []

    def tell(done, total):
        said.append((done, total))

    store.append("m", "twelve bytes", "c")
    store.append("m", "as a judge", "c", role="judge")
    store.append("m", "ten bytes.", "c")
    store.apply(llm, "m", tell)
    assert said == [(8, 22), (12, 22), (20, 22), (22, 22)]
    said.clear()
    store.write(llm, "m", "nine byte", "d", progress=tell)
    assert said == [(8, 9), (9, 9)]
    said.clear()
    store.rebuild(llm, "m", "new", tell)
    assert said[-1] == (53, 53) and said == sorted(said)
    said.clear()
    store.forget_by_replay(llm, "m", "a", tell)
    assert said[-1] == (42, 42) and said == sorted(said)


def test_after_a_replay_versions_are_in_order_and_can_be_exported(llm, store, tmp_path):
    filled(llm, store, sources="ab")
    store.rollback("m", 0)
    store.write(llm, "m", "c", "c")
    store.forget_by_replay(llm, "m", "a")
    assert [v.version for v in store.history("m")] == list(range(4))
    store.export("m", tmp_path / "m.zip")
    store.import_(tmp_path / "m.zip", "copy")
    assert seen(store, "copy") == seen(store, "m")


def test_a_fork_is_a_row_and_leaves_the_other_alone(llm, store):
    live, before = filled(llm, store), None
    before = files(store)
    store.fork("m", "f", 2)
    store.fork("f", "g")
    assert files(store) == before and store.names() == ["f", "g", "m"]
    store.write(llm, "g", "only here", "z")
    same(store.open("g"), llm.write(live[2], "only here", "z"))
    same(store.open("f"), live[2])
    same(store.open("m"), live[4])
    assert store.history("g")[0].base == ("f", 0)


def test_history_says_what_was_done(llm, store):
    filled(llm, store, sources="ab")
    store.pin("m", "a")
    store.forget("m", "b")
    now = datetime.now(UTC)
    history = store.history("m")
    assert [(v.event, v.source, v.text, v.state) for v in history] == [
        ("create", None, None, "applied"),
        ("write", "a", "note 0 of a", "applied"),
        ("write", "b", "note 1 of b", "applied"),
        ("pin", "a", None, "applied"),
        ("forget", "b", None, "applied"),
    ]
    assert all(now - timedelta(minutes=5) < v.time <= now for v in history)
    assert history[1].facts["dtype"] == "float32" and history[1].facts["threads"] == torch.get_num_threads()
    assert [v.tokens for v in history] == [0, 11, 11, 0, 0]


def test_what_is_not_there_is_refused_with_what_is(llm, store):
    filled(llm, store, sources="a")
    for call, words in [
        (lambda: store.open("x"), r"no memory 'x' \(there are: m\)"),
        (lambda: store.open("m", 9), "no version 9; it has 0 to 1"),
        (lambda: store.rollback("m", -1), "no version -1"),
        (lambda: store.create("m", start(llm)), "already"),
        (lambda: store.fork("m", "m"), "already"),
        (lambda: store.create("../m", start(llm)), "can not be a memory's name"),
        (lambda: store.fork("m", "a/b"), "can not be a memory's name"),
        (lambda: store.pin("m", "z"), "no source 'z'"),
        (lambda: store.forget("m", "z"), "no source 'z'"),
        (lambda: store.expire("m", "z", 1), "no source 'z'"),
        (lambda: store.expire("m", "a", datetime(2030, 1, 1)), "time zone"),
        (lambda: store.write(llm, "m", " "), "empty"),
        (lambda: store.write(llm, "m", []), "empty"),
        (lambda: store.write(llm, "m", "\ud800"), "Unicode"),
        (lambda: store.write(llm, "m", [999]), "between 0 and 259"),
        (lambda: store.write(llm, "m", [[5, 6]]), "one list of integers"),
        (lambda: store.write(llm, "m", [0.5]), "one list of integers"),
        (lambda: store.write(llm, "m", [5], role="user"), "without a role"),
        (lambda: store.write(llm, "m", "x", role="judge"), "role"),
        (lambda: Store(store.path, snapshot_every=0), "snapshot_every"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    assert len(store.history("m")) == 2 and store.names() == ["m"]


def test_what_everybody_may_be_told_names_no_other_memory_process_or_path(llm, store):
    filled(llm, store)
    store.fork("m", "secret")
    impatient, lock = again(store, timeout=0.01), FileLock(store.path / "locks" / f"{store._journal.id('secret')}.lock")
    actions = [(NotFoundError, partial(store.open, "n")), (InUseError, partial(store.delete, "m"))]
    actions += [(InUseError, partial(impatient.forget_by_replay, llm, "m", "a"))]
    with lock:
        for kind, action in actions:
            with pytest.raises(kind) as error:
                action()
            assert "secret" in str(error.value) and not re.search(r"secret|process \d|/", error.value.public)
    with pytest.raises(NameTakenError, match="there is a memory 'm' already"):
        store.create("m", start(llm))


def test_another_model_is_refused_and_nothing_is_marked(llm, other, store):
    live = filled(llm, store)
    store.append("m", "waits", "z")
    for call in (lambda: store.write(other, "m", "x"), lambda: store.ask(other, "m", "x?")):
        with pytest.raises(ValueError, match="another model"):
            call()
    same(store.open("m", llm=llm), llm.write(live[-1], "waits", "z"))


def test_ask_answers_with_the_named_memory_and_version(llm, store):
    live = filled(llm, store)
    assert store.ask(llm, "m", "what?", max_new_tokens=8) == llm.ask(live[-1], "what?", max_new_tokens=8)
    asked = store.ask(llm, "m", "what?", version=1, max_new_tokens=8)
    assert asked == llm.ask(live[1], "what?", max_new_tokens=8) != llm.ask(live[-1], "what?", max_new_tokens=8)


# --- a slow and obvious store ---------------------------------------------------------------------------------------


class Slow:
    """The store as lists of (event, what it was made from): every state is computed from the beginning."""

    def __init__(self, llm):
        self.memories, self.known = {}, {}
        self.steps = {"write": llm.write, "forget": forget, "pin": pin, "unpin": lambda m, s: pin(m, s, False)}

    def state(self, name, version=-1):
        event, base, *what = self.memories[name][version]
        if event == "create":
            return what[0]
        memory = self.state(*base)
        if event in self.steps and (memory, event, *what) not in self.known:
            try:
                self.known[memory, event, *what] = self.steps[event](memory, *what)
            except ValueError:  # an acknowledged write that the model refuses
                self.known[memory, event, *what] = memory
        return self.known.get((memory, event, *what), memory)

    def add(self, name, event, *what, base=None):
        rows = self.memories.setdefault(name, [])
        rows.append((event, base or (name, len(rows) - 1), *what))


def test_a_random_walk_equals_the_slow_store(llm, tmp_path):
    rng, slow = random.Random(7), Slow(llm)
    store = Store(tmp_path / "s", snapshot_every=3, cache_bytes=40_000)
    done = dict.fromkeys(("write", "append", "rollback", "fork", "pin", "unpin", "forget", "reopen", "refused"), 0)
    for name in "xy":
        store.create(name, start(llm, seed=ord(name)))
        slow.add(name, "create", start(llm, seed=ord(name)))
    for step in range(110):
        name, source = rng.choice(sorted(slow.memories)), rng.choice("pqr")
        version = rng.randrange(len(slow.memories[name]))
        event = rng.choices(list(done), (6, 3, 2, 1, 2, 1, 1, 2, 0))[0]
        done[event] += 1
        try:
            if event == "write":
                store.write(llm, name, f"text {step}", source)
                slow.add(name, "write", f"text {step}", source)
            elif event == "append":
                key = f"key {step}"
                seq = store.append(name, f"text {step}", source, key=key)
                slow.add(name, "write", f"text {step}", source)
                assert seq == len(slow.memories[name]) - 1
                assert store.apply(llm, name) == seq == store.append(name, f"text {step}", source, key=key)
            elif event == "rollback":
                store.rollback(name, version)
                slow.add(name, "rollback", base=(name, version))
            elif event == "fork" and len(slow.memories) < 6:
                new = f"f{step}"
                store.fork(name, new, version)
                slow.add(new, "fork", base=(name, version))
            elif event in ("pin", "unpin", "forget"):
                if event == "forget":
                    store.forget(name, source)
                else:
                    store.pin(name, source, event == "pin")
                slow.add(name, event, source)
            elif event == "reopen":
                store.close()
                store = Store(tmp_path / "s", snapshot_every=3, cache_bytes=40_000)
        except ValueError as error:
            assert any(words in str(error) for words in ("no source", "pinned")), error
            done["refused"] += 1
        same(store.open(name), slow.state(name))
    assert min(done.values()) > 2, done
    cold = Store(tmp_path / "s")
    for name, rows in slow.memories.items():
        history = cold.history(name)
        assert [v.event for v in history] == [event for event, *_ in rows]
        for i in range(len(rows)):
            same(cold.open(name, i), slow.state(name, i))


def test_a_chain_of_changes_is_the_same_changes_one_after_another():
    rng, seen = random.Random(11), dict.fromkeys(("update", "pin", "unpin", "forget", "refused"), 0)
    for case in range(60):
        memory = empty(3, 4, MemorySettings(20, 6, seed=case, quota=rng.choice([0.3, 1.0])))
        for start in range(rng.randrange(5)):
            memory = updated(memory, torch.randn(3, rng.randint(1, 6), 4), source=f"old {start % 2}")
        mapped, before = case % 2 == 0, memory
        kept, chain = memory.slots.clone(), Chain(memory, mapped)
        for _ in range(rng.randrange(40)):
            what, source = rng.choices(list(seen)[:4], (8, 1, 1, 1))[0], rng.choice(["a", "b", "old 0"])
            try:
                if what == "update":
                    new = torch.randn(3, rng.randint(1, 6), 4)
                    memory, dropped = updated(memory, new, source=source, tokens=7), draw(memory, new.shape[1])
                    chain.update(Update(new, dropped, source, 7))
                else:
                    change = {"pin": pin, "unpin": partial(pin, pinned=False), "forget": forget}[what]
                    memory = change(memory, source)
                    chain.change(partial(change, name=source))
                seen[what] += 1
            except ValueError:
                seen["refused"] += 1
        same(chain.memory(), memory)
        assert torch.equal(before.slots, kept)
        assert not mapped or not before.M or chain.memory().slots.data_ptr() != before.slots.data_ptr()
    assert min(seen.values()) > 10, seen


def test_a_chain_that_holds_much_goes_on_from_what_is_left():
    memory = empty(2, 1 << 14, MemorySettings(8, 8))
    chain, most = Chain(memory), 0
    for i in range(20):
        new, dropped = torch.full((2, 8, memory.d), float(i)), draw(memory, 8)
        memory = updated(memory, new, source="a")
        chain.update(Update(new, dropped, "a", 0))
        most = max(most, len(chain._parts))
    same(chain.memory(), memory)
    assert 2 < most < 10


@pytest.mark.parametrize(
    "new", [torch.zeros(2, 1, 4), torch.zeros(3, 1, 5), torch.zeros(3, 1, 4).half(), torch.zeros(4)]
)
def test_an_update_that_does_not_fit_a_chain_is_refused(new):
    with pytest.raises(ValueError, match=r"new slots must be \[3, k, 4\] in torch.float32"):
        Chain(empty(3, 4)).update(Update(new, torch.zeros(3, 0), "a", 0))


# --- acknowledged, applied once -------------------------------------------------------------------------------------


def test_a_key_writes_once(llm, store):
    live = filled(llm, store, sources="a")
    assert store.write(llm, "m", "once", "b", key="k1") == 2
    assert store.write(llm, "m", "once", "b", key="k1") == 2
    assert again(store).append("m", "once", "b", key="k1") == 2
    for text, source in (("twice", "b"), ("once", "c")):
        with pytest.raises(ValueError, match=r"key 'k1' belongs to another text, version 2 of 'm'"):
            store.write(llm, "m", text, source, key="k1")
    same(again(store).open("m"), llm.write(live[-1], "once", "b"))
    store.create("n", start(llm))
    assert store.write(llm, "n", "other", key="k1") == 1  # keys are those of one memory


def test_what_was_acknowledged_is_applied_in_order_by_the_next_who_has_a_model(llm, store):
    live = filled(llm, store, sources="a")
    assert [store.append("m", text, "b", key=text) for text in ("one", "two")] == [2, 3]
    later = again(store)
    assert [v.state for v in later.history("m")] == ["applied", "applied", "pending", "pending"]
    same(later.open("m", 1), live[1])
    for call in (lambda: later.open("m"), lambda: later.open("m", 2), lambda: later.pin("m", "a")):
        with pytest.raises(ValueError, match="acknowledged and not applied"):
            call()
    assert later.write(llm, "m", "three", "c") == 4
    expected = llm.write(llm.write(llm.write(live[-1], "one", "b"), "two", "b"), "three", "c")
    same(again(later).open("m"), expected)
    assert store.append("m", "two", "b", key="two") == 3


def test_a_model_at_hand_refuses_before_a_write_is_acknowledged_and_counts_its_tokens(llm, store):
    store.create("m", start(llm))
    with pytest.raises(ValueError, match="role"):
        store.append("m", "x", role="judge", llm=llm)
    assert store.append("m", "five.", llm=llm) == 1 and store.version("m").tokens == 5
    assert store.append("m", "five.") == 2 and store.version("m").tokens == 0
    store.apply(llm, "m")
    assert [v.tokens for v in store.history("m")] == [0, 5, 5]


def test_a_row_that_the_model_refuses_is_marked_and_passed_over(llm, store):
    live = filled(llm, store, sources="a")
    store.append("m", "as a judge", "b", role="judge")
    store.append("m", [5, 999], "b")
    store.append("m", "fine", "b", key="fine")
    assert store.apply(llm, "m") == 4
    states = [(v.state, v.error) for v in store.history("m")]
    assert [state for state, _ in states] == ["applied", "applied", "failed", "failed", "applied"]
    assert "role must be" in states[2][1] and "between 0 and 259" in states[3][1]
    same(again(store).open("m"), llm.write(live[-1], "fine", "b"))
    same(store.open("m", 3), live[-1])


def test_a_row_that_breaks_the_process_three_times_is_given_up(llm, store, monkeypatch):
    live = filled(llm, store, sources="a")
    store.append("m", "poison", "b", key="p")
    store.append("m", "fine", "b")
    write_ids = llm.write_ids

    def crash(memory, ids, *args):
        if len(ids) == len("poison"):
            raise MemoryError
        return write_ids(memory, ids, *args)

    with monkeypatch.context() as patch:
        patch.setattr(llm, "write_ids", crash)
        for _ in range(3):
            with pytest.raises(MemoryError):
                again(store).apply(llm, "m")
        assert again(store).apply(llm, "m") == 3
    assert [v.state for v in store.history("m")][2:] == ["failed", "applied"]
    same(store.open("m"), llm.write(live[-1], "fine", "b"))
    with pytest.raises(ValueError, match="broken off 3 times"):
        store.write(llm, "m", "poison", "b", key="p")


def test_an_interrupted_write_is_taken_back_and_an_interrupted_apply_waits_on(llm, store, monkeypatch):
    live = filled(llm, store, sources="a")
    store.append("m", "waits", "b")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm, "write_ids", interrupted)
        for _ in range(5):
            with pytest.raises(KeyboardInterrupt):
                store.write(llm, "m", "mine", "b")
    assert [v.state for v in store.history("m")] == ["applied", "applied", "pending"]
    same(store.open("m", llm=llm), llm.write(live[-1], "waits", "b"))


def test_a_refused_write_changes_nothing(llm, store):
    live = filled(llm, store, sources="aaa")
    pinned = pin(live[-1].with_settings(quota=1.0), "a")
    store.create("full", pinned)
    before = files(store)
    with pytest.raises(ValueError, match="do not fit beside"):
        store.write(llm, "full", "a long text that does not fit any more", "b", key="k")
    assert len(store.history("full")) == 1 and files(store) == before
    same(again(store).open("full"), pinned)


# --- forgetting -----------------------------------------------------------------------------------------------------


def test_forgetting_by_slots_is_that_of_the_core_and_older_versions_keep_the_source(llm, store):
    live = filled(llm, store)
    assert store.forget("m", "a") == 5
    same(again(store).open("m"), forget(live[-1], "a"))
    assert "a" not in [s.name for s in store.open("m").sources]
    same(store.open("m", 4), live[4])


def roomy(llm):
    """Full after a few writes, with room for pins."""
    return start(llm, N=40).with_settings(quota=0.9)


def secretive(llm, store):
    """A memory, a fork and a rollback that hold a secret, another that does not; and all of them without it."""
    bare = roomy(llm)
    store.create("m", bare)
    store.create("apart", bare)
    store.write(llm, "m", "first", "a")
    store.write(llm, "m", SECRET, "s", key="secret key")
    store.write(llm, "m", "second", "b")
    store.pin("m", "s")
    store.fork("m", "f")
    store.fork("m", "early", 1)
    store.write(llm, "f", "in the fork", "c")
    store.write(llm, "f", "4712!", "s")
    store.rollback("m", 2)
    store.write(llm, "m", "third", "b")
    store.pin("m", "b")
    store.append("m", "waits", "d")
    store.write(llm, "apart", "has nothing to do with it", "s")
    a = llm.write(bare, "first", "a")
    ab = llm.write(a, "second", "b")
    return {
        "m": [bare, a, ab, a, llm.write(a, "third", "b"), pin(llm.write(a, "third", "b"), "b")],
        "f": [ab, llm.write(ab, "in the fork", "c")],
        "early": [a],
    }


@pytest.mark.parametrize("snapshot_every", [1, 2, 16])
def test_forgetting_by_replay_equals_memories_that_never_held_the_source(llm, tmp_path, snapshot_every):
    store = Store(tmp_path / "s", snapshot_every=snapshot_every)
    expected = secretive(llm, store)
    old = {name: files(store) for name in "m"}["m"]
    embeddings = [v.object for v in store._journal.rows([store._journal.id("m")]) if v.payload.get("source") == "s"][:1]
    assert SECRET.encode() in raw(store) and b"secret key" in raw(store) and embeddings[0] in old
    store.open("f")
    assert store.forget_by_replay(llm, "f", "s") == ["f", "m"]
    for anew in (store, again(store)):
        for name, versions in expected.items():
            for i, memory in enumerate(versions):
                same(anew.open(name, i), memory)
    assert [v.event for v in store.history("m")] == ["create", "write", "write", "rollback", "write", "pin", "write"]
    assert [v.base for v in store.history("f")] == [("m", 2), ("f", 0)]
    same(store.open("m", llm=llm), llm.write(expected["m"][-1], "waits", "d"))
    assert [s.name for s in store.open("apart").sources] == ["s"]
    left = raw(store)
    assert SECRET.encode() not in left and b"heliotrope" not in left and b"secret key" not in left
    assert embeddings[0].encode() not in left and embeddings[0] not in files(store)
    used = {row.object for row in store._journal.rows(list(store._journal.names().values()))} - {None}
    assert set(files(store)) == used
    with pytest.raises(ValueError, match="no write of the source 's'"):
        store.forget_by_replay(llm, "m", "s")


def test_no_embedding_of_what_was_forgotten_is_left_on_disk(llm, store):
    store.create("m", start(llm, N=100))
    store.write(llm, "m", "first", "a")
    store.write(llm, "m", "Q", "s")
    store.write(llm, "m", "second", "a")
    (token,) = llm.prompts.text("Q")
    embedding = llm.base.get_input_embeddings().weight[token].numpy().tobytes()
    assert embedding in raw(store)
    store.forget_by_replay(llm, "m", "s")
    assert embedding not in raw(store)


def test_a_write_that_is_acknowledged_while_others_are_replayed_is_kept(llm, store, monkeypatch):
    store.create("m", start(llm))
    store.write(llm, "m", SECRET, "s")
    store.write(llm, "m", "second", "b")
    write_ids, late = llm.write_ids, []

    def meanwhile(*args):
        if not late:
            late.append(again(store).append("m", "late", "c"))
        return write_ids(*args)

    with monkeypatch.context() as patch:
        patch.setattr(llm, "write_ids", meanwhile)
        store.forget_by_replay(llm, "m", "s")
    assert late == [3] and [v.state for v in store.history("m")] == ["applied", "applied", "pending"]
    same(store.open("m", llm=llm), llm.write(llm.write(start(llm), "second", "b"), "late", "c"))


def test_a_replay_that_is_broken_off_changes_nothing_and_is_cleared_up(llm, store, monkeypatch):
    expected = secretive(llm, store)
    before, write_ids, calls = files(store), llm.write_ids, []
    versions = {n: [store.open(n, i) for i in range(len(store.history(n)) - (n == "m"))] for n in ("m", "f")}

    def breaks(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write_ids(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm, "write_ids", breaks)
        store.forget_by_replay(llm, "m", "s")
    later = again(store)
    assert files(store) == before and not later._journal.building()
    for name, memories in versions.items():
        for i, memory in enumerate(memories):
            same(later.open(name, i), memory)
    later.forget_by_replay(llm, "m", "s")
    same(later.open("f"), expected["f"][-1])


def test_a_reader_whose_version_is_replayed_meanwhile_gets_the_new_one(llm, store, monkeypatch):
    expected = secretive(llm, store)
    reader, get = again(store), States.memory

    def meanwhile(self, row, **options):
        if self is reader._states and "s" in [source.name for source in get(store._states, row).sources]:
            store.forget_by_replay(llm, "m", "s")
        return get(self, row, **options)

    monkeypatch.setattr(States, "memory", meanwhile)
    same(reader.open("f"), expected["f"][-1])


def test_what_can_not_be_replayed_is_refused_and_stays(llm, other, store, tmp_path):
    live = filled(llm, store)
    with pytest.raises(ValueError, match="another model"):
        store.forget_by_replay(other, "m", "a")
    with pytest.raises(ValueError, match="no write of the source 'z'"):
        store.forget_by_replay(llm, "m", "z")
    store.create("given", live[-1])
    store.write(llm, "given", "more", "a")
    with pytest.raises(ValueError, match="before its journal began"):
        store.forget_by_replay(llm, "given", "a")
    with pytest.raises(ValueError, match="held something"):
        store.rebuild(llm, "given", "new")
    same(store.open("m"), live[-1])
    assert store.names() == ["given", "m"]


def test_what_is_deleted_is_gone_from_the_disk(llm, store):
    secretive(llm, store)
    with pytest.raises(ValueError, match="early, f was forked from 'm'"):
        store.delete("m")
    for name in ("f", "early", "m"):
        store.delete(name)
    assert store.names() == ["apart"] and SECRET.encode() not in raw(store)
    assert set(files(store)) == store._journal.objects()
    assert {path.stem for path in (store.path / "locks").iterdir()} <= {str(store._journal.id("apart")), "objects"}
    store.create("m", start(llm))
    assert len(store.history("m")) == 1


def test_a_sweep_that_a_crash_has_prevented_is_done_by_the_next_store(llm, store, monkeypatch):
    secretive(llm, store)
    monkeypatch.setattr(Store, "sweep", lambda _: None)
    store.forget_by_replay(llm, "m", "s")
    assert set(files(store)) > store._journal.objects() and SECRET.encode() in raw(store)
    monkeypatch.undo()
    later = again(store)
    assert set(files(later)) == later._journal.objects() and SECRET.encode() not in raw(later)


# --- pins, expiries, accounts ---------------------------------------------------------------------------------------


def test_a_pinned_source_keeps_its_slots_and_the_quota_holds(llm, store):
    live = filled(llm, store, sources="a")
    store.pin("m", "a")
    live = pin(live[-1], "a")
    for i in range(4):
        store.write(llm, "m", f"other text {i}", "b")
        live = llm.write(live, f"other text {i}", "b")
    same(again(store).open("m"), live)
    assert next(s.share_left for s in store.stats("m")) == 1.0
    with pytest.raises(ValueError, match=r"the quota is 0\.5"):
        store.write(llm, "m", "more of it", "a")
    with pytest.raises(ValueError, match=r"the quota is 0\.5"):
        store.pin("m", "b")
    assert store.history("m")[-1].source == "b"
    store.pin("m", "a", False)
    store.write(llm, "m", "more of it", "a")


def test_a_source_expires_by_slots_and_this_is_a_version(llm, store, monkeypatch):
    live = filled(llm, store)
    store.expire("m", "a", 3600)
    store.expire("m", "b", datetime.now(UTC) + timedelta(days=1))
    store.fork("m", "f")
    same(store.open("m"), live[-1])
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 4000)
    expected = forget(live[-1], "a")
    same(store.open("m"), expected)
    assert [(v.event, v.source) for v in store.history("m")][5:] == [("expire", "a")]
    same(again(store).open("m"), expected)
    assert len(store.history("m")) == 6
    with pytest.raises(ValueError, match="source 'a' of 'm' has expired"):
        store.write(llm, "m", "more", "a")
    store.rollback("m", 4)  # brings it back, and the next one to open it forgets it again
    same(store.open("m"), expected)
    assert [v.event for v in store.history("m")][6:] == ["rollback", "expire"]
    store.write(llm, "f", "in the fork", "c")
    same(store.open("f"), llm.write(expected, "in the fork", "c"))
    store.expire("m", "b", None)
    monkeypatch.setattr(time, "time", lambda: now + 10**6)
    same(store.open("m"), expected)
    assert [s.source for s in store.stats("f")] == ["c"]


def test_stats_and_diff_count_slots(llm, store):
    live = filled(llm, store)
    store.pin("m", "c")
    store.expire("m", "a", 3600)
    memory = store.open("m")
    a, b, c = store.stats("m", ahead=(0, 2))
    left = memory.slots_left().double().mean(1)
    assert (a.source, a.tokens, a.slots, a.pinned, c.pinned) == ("a", 22, 22, False, True)
    assert (
        a.share_left == left[0].item() / 22
        and b.share_left == left[1].item() / 11
        and c.share_left == left[2].item() / 11
    )
    assert a.forecast == {0: a.share_left, 2: pytest.approx(a.share_left * forecast(account_of(memory), 2))}
    assert c.forecast == {0: c.share_left, 2: c.share_left} and b.expires is None
    assert timedelta(0) < a.expires - datetime.now(UTC) <= timedelta(hours=1)
    changes = {change.source: change for change in store.diff("m", 1)}
    assert changes["a"].tokens == (11, 22) and changes["b"].tokens == (0, 11)
    assert changes["a"].slots_left == (live[1].slots_left()[0].double().mean(), left[0].item())
    assert store.diff("m", 4, 5) == []


# --- other models ---------------------------------------------------------------------------------------------------


def test_a_rebuilt_memory_is_the_old_one_to_the_bit_or_what_another_model_writes(llm, other, store):
    secretive(llm, store)
    store.apply(llm, "m")
    store.forget("m", "a")
    store.rebuild(llm, "m", "same")
    same(store.open("same"), store.open("m"))
    store.rebuild(other, "f", "other")
    live = roomy(other)
    for text, source in (("first", "a"), (SECRET, "s"), ("second", "b")):
        live = other.write(live, text, source)
    live = other.write(pin(live, "s"), "in the fork", "c")
    same(store.open("other"), other.write(live, "4712!", "s"))
    assert [v.event for v in store.history("other")] == ["create", "write", "write", "write", "pin", "write", "write"]


def test_a_rebuild_that_is_refused_leaves_nothing(llm, store):
    filled(llm, store)
    small = MemoryModel(tiny_model(max_position_embeddings=16), byte_tokenizer())
    with pytest.raises(ValueError, match="positions"):
        store.rebuild(small, "m", "new")
    store.write(llm, "m", [5, 6], "ids")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["mill"])
    with pytest.raises(ValueError, match="another tokenizer"):
        store.rebuild(MemoryModel(tiny_model(), tokenizer), "m", "new")
    assert store.names() == ["m"]


# --- disks ----------------------------------------------------------------------------------------------------------


class Full(Disk):
    """A disk that takes no more objects when told."""

    full = False

    def create(self, path, data):
        if self.full:
            path.write_bytes(data[:10])
            raise OSError(28, "No space left on device")
        super().create(path, data)


def test_a_full_disk_refuses_the_write_and_keeps_the_old_version(llm, tmp_path):
    disk = Full()
    store = Store(tmp_path / "s", disk=disk)
    live = filled(llm, store)
    before, disk.full = sorted((tmp_path / "s").rglob("*.safetensors")), True
    for _ in range(5):
        with pytest.raises(OSError, match="No space left"):
            store.write(llm, "m", "does not fit", "z", key="k")
        with pytest.raises(OSError, match="No space left"):
            store.create("new", start(llm, seed=9))
    assert sorted((tmp_path / "s").rglob("*.safetensors")) == before and store.names() == ["m"]
    same(store.open("m"), live[-1])
    same(again(store).open("m"), live[-1])
    disk.full = False
    assert store.write(llm, "m", "does not fit", "z", key="k") == 5
    same(again(store).open("m"), llm.write(live[-1], "does not fit", "z"))


def test_a_database_that_can_not_grow_refuses_and_keeps_the_old_version(llm, store):
    live = filled(llm, store)
    (pages,) = store._journal._one("PRAGMA page_count")
    store._journal._all(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match="disk is full"):
        store.append("m", "x" * 100_000)
    same(store.open("m"), live[-1])
    assert len(again(store).history("m")) == 5


def test_a_damaged_or_missing_object_is_named_and_others_are_read(llm, store):
    live = filled(llm, store, sources="abacab")
    row = store._journal.version("m", 4)
    path = store.path / "objects" / row.object[:2] / f"{row.object}.safetensors"
    data = path.read_bytes()
    for damage, words in ((data[:-1], "is damaged"), (data[:-1] + b"\x07", "is damaged"), (None, "is missing")):
        path.unlink() if damage is None else path.write_bytes(damage)
        cold = again(store)
        with pytest.raises(ValueError, match=f"the object {row.object} of the store {words}"):
            cold.open("m", 4)
        same(cold.open("m", 3), live[3])


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "store.db").write_bytes(b"this is no database" * 1000)
    with pytest.raises(ValueError, match="damaged or no store"):
        Store(tmp_path)


@pytest.mark.parametrize(("number", "words"), [(1, "format 1, .* 4f1b448 .* reads it"), (4, "format 4, .* Update")])
def test_a_store_of_another_format_is_refused_with_what_reads_it(store, number, words):
    store._journal._all(f"PRAGMA user_version = {number}")
    with pytest.raises(ValueError, match=words):
        again(store)


@pytest.mark.parametrize("url", ["memory://{}", "file://{}", "{}"])
def test_objects_can_lie_elsewhere(llm, tmp_path, url):
    place = url.format(tmp_path / "elsewhere")
    store = Store(tmp_path / "s", objects=place, snapshot_every=3)
    expected = secretive(llm, store)
    assert not (tmp_path / "s" / "objects").exists()
    assert (tmp_path / "elsewhere").exists() == ("memory" not in url)
    store.forget_by_replay(llm, "m", "s")
    cold = Store(tmp_path / "s")
    for name, memories in expected.items():
        for i, memory in enumerate(memories):
            same(cold.open(name, i), memory)
    assert set(store._objects.names()) == store._journal.objects()
    cold._objects._write(row := cold._journal.head(cold._journal.id("f")).object, b"broken off")
    with pytest.raises(ValueError, match=f"the object {row} of the store is damaged"):
        Store(tmp_path / "s").open("f")


# --- many at once ---------------------------------------------------------------------------------------------------


def test_the_second_waits_or_is_told_whom_it_waits_for(llm, store):
    live = filled(llm, store)
    lock = FileLock(store.path / "locks" / f"{store._journal.id('m')}.lock")
    held, leave = threading.Event(), threading.Event()

    def hold():
        with store._locks.memory("m"):
            held.set()
            leave.wait(300)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(300)
    hasty = again(store, timeout=0.2)
    for call in (lambda: hasty.write(llm, "m", "x"), lambda: hasty.rollback("m", 1), lambda: hasty.delete("m")):
        with pytest.raises(ValueError, match=r"process \d+ on .* is changing the memory 'm'"):
            call()
    same(hasty.open("m"), live[-1])
    assert hasty.append("m", "acknowledged all the same", "z") == 5
    threading.Timer(0.3, leave.set).start()
    assert again(store).write(llm, "m", "waited", "z") == 6
    thread.join()
    assert not lock.is_locked


def test_versions_are_read_while_they_are_numbered_anew(llm, store):
    store.create("m", start(llm))
    failed, ended = [], threading.Event()

    def read():
        while not ended.is_set():
            try:
                assert next(iter(store.history("m"))).version == 0
                version, memory = store.latest("m")
                assert version >= 0 and memory.N == 24
            except Exception as error:  # noqa: BLE001 - shown below
                failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(12):
            store.write(llm, "m", "the door is blue", "a")
            store.write(llm, "m", "it is open", "b")
            store.forget("m", "a")
            for source in "ba":
                store.append("m", "more that waits", "d")
                store.forget_by_replay(llm, "m", source)
            store.forget_by_replay(llm, "m", "d")
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not failed and len(store.history("m")) == 1


def test_threads_share_a_store(llm, store):
    for name in "xyz":
        store.create(name, start(llm))
    lock, failed = threading.Lock(), []

    def work(i):
        try:
            for step in range(3):
                with lock:  # the model runs one pass at a time; the store is what is tested
                    store.write(llm, "xyz"[i % 3], f"thread {i} step {step}", f"t{i}", key=f"{i} {step}")
                store.append("x", f"more of {i} {step}", f"t{i}", key=f"more {i} {step}")
                store.history("x"), store.stats("z")
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for name in "xyz":
        store.apply(llm, name)
        live = start(llm)
        history = store.history(name)
        assert len(history) == 1 + 6 + 18 * (name == "x") and {v.state for v in history} == {"applied"}
        for version in history[1:]:
            live = llm.write(live, version.text, version.source)
        same(again(store).open(name), live)


def test_a_reader_waits_for_the_version_that_is_being_written(llm, store, monkeypatch):
    store.create("a", start(llm))
    begun, go = threading.Event(), threading.Event()
    compute = Writer.compute

    def slowly(*args):
        begun.set()
        assert go.wait(300)
        return compute(*args)

    monkeypatch.setattr(Writer, "compute", slowly)
    writer = threading.Thread(target=store.write, args=(llm, "a", "a text", "s"))
    writer.start()
    assert begun.wait(300)
    found = []
    reader = threading.Thread(target=lambda: found.append(store.open("a")))
    reader.start()
    reader.join(0.2)
    assert not found and store.open("a", 0).updates == 0  # older versions are there all the time
    go.set()
    writer.join()
    reader.join()
    same(found[0], llm.write(start(llm), "a text", "s"))


def test_memories_are_kept_up_to_a_number_of_bytes_the_last_used_ones(llm, tmp_path):
    store = Store(tmp_path / "s", cache_bytes=60_000)
    live = {}
    for i in range(12):
        store.create(f"m{i}", start(llm, seed=i))
        store.write(llm, f"m{i}", f"a text of its own for {i}", "s")
        live[i] = llm.write(start(llm, seed=i), f"a text of its own for {i}", "s")
    for i in range(12):
        same(store.open(f"m{i}"), live[i])
        assert store.open(f"m{i}") is store.open(f"m{i}")
        assert 0 < store._states.cache.bytes <= 60_000
    size = live[0].slots.numel() * 4 + live[0].births.numel() * 8
    assert store._states.cache.bytes // size == 60_000 // size
    nothing = Store(tmp_path / "s", cache_bytes=0)
    same(nothing.open("m3"), live[3])
    assert nothing._states.cache.bytes == 0 and nothing.open("m3") is not nothing.open("m3")


# --- export and import ----------------------------------------------------------------------------------------------


def exported(llm, store, path):
    filled(llm, store)
    store.rollback("m", 2)
    store.pin("m", "a")
    store.append("m", "as a judge", "b", role="judge")
    store.apply(llm, "m")
    store.write(llm, "m", [5, 6], "ids", key="k")
    store.append("m", "waits", "z")
    store.export("m", path)


def seen(store, name):
    """The history without what depends on the store."""
    return [replace(v, base=v.base and v.base[1]) for v in store.history(name)]


def test_a_write_that_is_applied_does_not_fail_for_one_that_came_behind_it(llm, store, monkeypatch):
    live = filled(llm, store, sources="a")
    put = store._states.put

    def full(row, content):
        if row.payload.get("source") == "later":
            raise OSError(28, "no space left")
        return put(row, content)

    def acknowledged(*_):
        if not store.pending_count("m") > 1:
            store.append("m", "a later text", "later")

    monkeypatch.setattr(store._states, "put", full)
    version = store.write(llm, "m", "an earlier text", "b", progress=acknowledged)
    assert version == 2 and store.version("m", 2).state == "applied" and store.pending_count("m") == 1
    with pytest.raises(OSError, match="no space left"):
        store.apply(llm, "m")
    monkeypatch.undo()
    assert store.apply(llm, "m") == 3
    same(store.open("m"), llm.write(llm.write(live[-1], "an earlier text", "b"), "a later text", "later"))


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_a_replay_that_is_broken_off_leaves_no_object(llm, store, monkeypatch, killed, error):
    live = filled(llm, store, sources="abcb")
    before, build = files(store), store._journal.build

    def broken(memory, name):
        build(memory, name)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(store._journal, "build", broken)
        if killed:  # nothing is done any more by this process
            patch.setattr(store._sweeper, "sweep_objects", lambda due=False: None)
        with pytest.raises(error):
            store.forget_by_replay(llm, "m", "a")
    assert (files(store) != before) == killed
    other = again(store)
    assert files(store) == before and not other._journal.building()
    same(other.open("m"), live[-1])


def test_an_exported_memory_is_imported_with_all_versions_and_goes_on(llm, store, tmp_path):
    exported(llm, store, tmp_path / "m.zip")
    there = Store(tmp_path / "there", snapshot_every=3)
    there.create("first", start(llm))
    there.import_(tmp_path / "m.zip", "copy")
    assert seen(there, "copy") == seen(store, "m")
    for i in range(8):
        same(there.open("copy", i), store.open("m", i))
    assert there.write(llm, "copy", [5, 6], "ids", key="k") == 8 and there.write(llm, "copy", "on", "y") == 10
    store.write(llm, "m", "on", "y")
    same(there.open("copy"), store.open("m"))
    there.forget_by_replay(llm, "copy", "a")
    assert "a" not in [s.name for s in there.open("copy").sources]


def test_equal_memories_export_equal_bytes(llm, store, tmp_path):
    exported(llm, store, tmp_path / "1.zip")
    store.export("m", tmp_path / "2.zip")
    there = Store(tmp_path / "there")
    there.import_(tmp_path / "1.zip", "other-name")
    there.export("other-name", tmp_path / "3.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes() == (tmp_path / "3.zip").read_bytes()


def test_a_fork_is_exported_as_if_it_had_begun_there(llm, store, tmp_path):
    live = filled(llm, store)
    store.fork("m", "f", 2)
    store.write(llm, "f", "more", "z")
    store.expire("f", "z", 3600)
    store.export("f", tmp_path / "f.zip")
    there = Store(tmp_path / "there")
    there.import_(tmp_path / "f.zip", "f")
    assert [v.event for v in there.history("f")] == ["import", "write"]
    same(there.open("f", 0), live[2])
    same(there.open("f"), store.open("f"))
    assert there.stats("f")[-1].expires == store.stats("f")[-1].expires is not None


def tampered(path, change):
    """The exported file with its entries changed; they come as {name: bytes}."""
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    entries = change(entries) or entries
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            file.writestr(zipfile.ZipInfo(name), data)


def lines(change):
    """Change the rows of an exported journal."""

    def changed(entries):
        rows = [json.loads(line) for line in entries["journal.jsonl"].splitlines()]
        found = change(rows)
        rows = rows if found is None else found
        entries["journal.jsonl"] = "\n".join(map(json.dumps, rows)).encode()

    return changed


def manifest(change):
    def changed(entries):
        found = json.loads(entries["manifest.json"])
        change(found)
        entries["manifest.json"] = json.dumps(found).encode()

    return changed


HOSTILE = {
    "another path": lambda e: e.update({"../../escaped": b"x"}),
    "an absolute path": lambda e: e.update({"/escaped": b"x"}),
    "no manifest": lambda e: {k: v for k, v in e.items() if k != "manifest.json"},
    "no journal": lambda e: {k: v for k, v in e.items() if k != "journal.jsonl"},
    "no object": lambda e: dict(list(e.items())[:-1]),
    "another object": lambda e: e.update({list(e)[-1]: b"\0" * len(e[list(e)[-1]])}),
    "a longer object": lambda e: e.update({list(e)[-1]: e[list(e)[-1]] + b"\0"}),
    "another format": manifest(lambda m: m.update(format="latentmem export 3")),
    "an older format": manifest(lambda m: m.update(format="latentmem export 1")),
    "a key more": manifest(lambda m: m.update(more=1)),
    "an object's path": manifest(lambda m: m["objects"].update({"../x": 3})),
    "an endless expiry": manifest(lambda m: m.update(expiries={"a": float("inf")})),
    "a time that is none": lines(lambda rows: rows[1].update(time=float("nan"))),
    "another size": lines(lambda rows: rows[1].update(bytes=2**70)),
    "too many attempts": lines(lambda rows: rows[1].update(attempts=2**70)),
    "a deep line": lambda e: e.update({"journal.jsonl": b"[" * 100_000}),
    "an expiry that is none": manifest(lambda m: m.update(expiries={"a": "soon"})),
    "no rows": lines(lambda rows: rows[:0]),
    "a field more": lines(lambda rows: rows[1].update(more=1)),
    "a field less": lines(lambda rows: rows[1].pop("key") and None),
    "another type": lines(lambda rows: rows[1].update(seq="1")),
    "a truth for a number": lines(lambda rows: rows[1].update(seq=True)),
    "an event more": lines(lambda rows: rows[1].update(event="run")),
    "a state more": lines(lambda rows: rows[1].update(state="done")),
    "a payload more": lines(lambda rows: rows[1]["payload"].update(path="/etc/passwd")),
    "a payload less": lines(lambda rows: rows[1]["payload"].pop("source") and None),
    "ids that are none": lines(lambda rows: rows[-2]["payload"].update(ids=["x"])),
    "a rollback that waits": lines(lambda rows: rows[5].update(state="pending")),
    "a wait for nothing": lines(lambda rows: rows[-1]["payload"].pop("text") and None),
    "a write of nothing": lines(lambda rows: rows[1]["payload"].pop("text") and None),
    "a rollback with a text": lines(lambda rows: rows[5]["payload"].update(text="x")),
    "a number twice": lines(lambda rows: rows[2].update(seq=1)),
    "a base to come": lines(lambda rows: rows[1].update(base=3)),
    "a base before": lines(lambda rows: rows[1].update(base=-1)),
    "no base": lines(lambda rows: rows[1].update(base=None)),
    "a second beginning": lines(lambda rows: rows[1].update(event="create")),
    "a write without its object": lines(lambda rows: rows[1].update(kind="none", object=None)),
    "a rollback with an object": lines(lambda rows: rows[5].update(kind="delta", object=rows[1]["object"])),
    "a delta of another version": lines(lambda rows: rows[2].update(kind="snapshot")),
    "a key twice": lines(lambda rows: [row.update(key="k") for row in rows] and None),
    "an unknown object": lines(lambda rows: rows[1].update(object="0" * 64)),
    "slots that are no number": lines(lambda rows: rows[1]["facts"].update(M="3")),
    "another form": lines(lambda rows: rows[1]["facts"].update(form="lossless")),
    "another order": lines(lambda rows: rows[1]["facts"].update(order=3)),
    "a long-term part without R": lines(lambda rows: rows[1]["facts"].update(longterm={"limit": 3})),
    "a long-term part that is none": lines(lambda rows: rows[1]["facts"].update(longterm=[3])),
    "a size that is none": lines(lambda rows: rows[1]["facts"].update(size="x")),
    "a size below 0": lines(lambda rows: rows[1]["facts"].update(size=-1)),
    "a number of slots that is none": lines(lambda rows: [row["facts"].update(M=None) for row in rows] and None),
    "a name of a model that is none": lines(lambda rows: [row["facts"].update(model=5) for row in rows] and None),
    "a loss that is none": lines(lambda rows: rows[1]["facts"].update(lost=float("nan"))),
    "a fact that is a list": lines(lambda rows: rows[1]["facts"].update(more=[1])),
    "blocks that are none": lines(lambda rows: rows[1]["facts"].update(blocks=[])),
    "what shares without a size": lines(lambda rows: rows[1].update(facts={"shares": True})),
    "a share that is none": lines(lambda rows: rows[1]["facts"].update(shares="x")),
    "a line that is no object": lines(lambda rows: [*rows[:-1], 5]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_an_altered_file_is_refused_and_nothing_is_imported(llm, tmp_path, hostile, change):
    path = tmp_path / "x.zip"
    path.write_bytes(hostile)
    tampered(path, change)
    there = Store(tmp_path / "there")
    with pytest.raises(ValueError, match=r"x\.zip|damaged|snapshot|delta|file"):
        there.import_(path, "m")
    assert there.names() == [] and files(there) == []
    assert {p.name for p in tmp_path.iterdir()} == {"x.zip", "there"}


@pytest.fixture(scope="module")
def hostile(llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    exported(llm, Store(folder / "s", snapshot_every=3), folder / "m.zip")
    return (folder / "m.zip").read_bytes()


def test_a_file_that_is_compressed_truncated_or_none_is_refused(llm, tmp_path, hostile):
    path, there = tmp_path / "x.zip", Store(tmp_path / "there")
    path.write_bytes(hostile)
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    with pytest.raises(ValueError, match="compressed"):
        there.import_(path, "m")
    for data in (hostile[:-50], hostile[: len(hostile) // 2], b"", b"no zip"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.zip is no exported memory"):
            there.import_(path, "m")
    with pytest.raises(ValueError, match="no such file"):
        there.import_(tmp_path / "missing.zip", "m")
    path.write_bytes(hostile)
    there.import_(path, "m")
    for name, words in (("m", "already"), ("../m", "can not be")):
        with pytest.raises(ValueError, match=words):
            there.import_(path, name)
    with pytest.raises(ValueError, match="create it first"):
        there.export("m", tmp_path / "missing" / "x.zip")


def test_a_flipped_bit_anywhere_in_an_exported_file_is_noticed_or_means_the_same(llm, tmp_path, hostile):
    there, rng = Store(tmp_path / "there"), random.Random(3)
    there.import_(_put(tmp_path, hostile), "m")
    for at in rng.sample(range(len(hostile)), 40):
        flipped = bytearray(hostile)
        flipped[at] ^= 1 << at % 8
        try:
            there.import_(_put(tmp_path, bytes(flipped)), "x")
        except ValueError:
            assert there.names() == ["m"]
        else:  # for example in a zip entry's attributes
            assert seen(there, "x") == seen(there, "m")
            there.delete("x")


def _put(folder, data):
    (folder / "x.zip").write_bytes(data)
    return folder / "x.zip"


def test_the_snapshot_object_is_a_file_of_the_memory(llm, store):
    live = filled(llm, store, sources="aba")
    row = store._journal.version("m", 3)
    assert row.kind == "snapshot"
    loaded = Memory.load(store.path / "objects" / row.object[:2] / f"{row.object}.safetensors")
    same(replace(loaded, version=""), live[3])
    assert archive.HASH.fullmatch(row.object) and snapshot.to_bytes(live[3])


# --- the guide ------------------------------------------------------------------------------------------------------


def test_the_example_of_the_guide_runs(llm, tmp_path, monkeypatch, capsys):
    guide = (Path(__file__).parent.parent.parent / "docs" / "how-to" / "store.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    small = MemoryModel(tiny_model(max_position_embeddings=8192), byte_tokenizer())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latentmem.loading.load.load", lambda: small)
    seen = {}
    exec(code, seen)
    assert [s.name for s in seen["memory"].sources] == ["notes.txt"] and "secret.txt" in capsys.readouterr().out
    assert [s.name for s in seen["store"].open("trial").sources] == ["notes.txt"]


@pytest.mark.parametrize("after", [1e18, float("inf"), float("nan"), -1e12])
def test_a_time_that_no_calendar_has_is_refused(llm, store, after):
    filled(llm, store)
    with pytest.raises(ValueError, match="year 5138"):
        store.expire("m", "a", after)
    assert all(one.expires is None for one in store.stats("m"))


def test_a_source_that_has_expired_can_be_given_another_time(llm, store):
    filled(llm, store)
    store.expire("m", "a", 0)
    store.open("m")
    store.expire("m", "a", None)
    store.write(llm, "m", "it is there again", "a")
    assert "a" in [one.source for one in store.stats("m")]


def test_a_version_beyond_all_numbers_is_not_there(llm, store):
    filled(llm, store)
    for version in (1 << 80, -(1 << 80)):
        with pytest.raises(NotFoundError, match="has no version"):
            store.version("m", version)


def test_no_account_is_kept_of_a_version_that_has_gone(llm, store):
    filled(llm, store)
    row = store._journal.version("m")
    store.delete("m")
    store._journal.keep_account(row, "{}")
    assert store._journal.account(row.id) is None
