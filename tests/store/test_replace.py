"""A source gets another text in one version, which has the old text or the new one, never both and never none."""

import pytest
import torch

from latentmem import MemoryModel, Store
from latentmem.core import sources
from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.store.journal import Journal
from latentmem.store.states import States
from latentmem.testing import byte_tokenizer, tiny_model

OLD, NEW = "the rent is 900 euros", "the rent is 950 euros, and rises"
KINDS = {
    "exact": MemorySettings(N=64, K=16, form="exact"),
    "int8": MemorySettings(N=64, K=16, form="int8"),
    "exact, full, long-term": MemorySettings(N=40, K=8, form="exact", longterm=LongTermSettings(8)),
    "int8, full, long-term": MemorySettings(N=40, K=8, form="int8", longterm=LongTermSettings(8)),
}


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(), byte_tokenizer())


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def live(request, llm, tmp_path):
    """A store in which `rent` was written between two others, and the memory that it holds."""
    store = Store(tmp_path / "store", snapshot_every=3)
    memory = llm.empty(settings=request.param)
    store.create("m", memory)
    for text, source in (("the gate is red", "a"), (OLD, "rent"), ("Ada lives in Oslo", "b")):
        store.write(llm, "m", text, source)
        memory = llm.write(memory, text, source)
    yield store, memory
    store.close()


def same(one, other):
    assert torch.equal(one.origins, other.origins) and torch.equal(one.births, other.births)
    assert torch.equal(one.slots, other.slots) and one.sources == other.sources and one.updates == other.updates
    assert {n: w.source for n, w in one.written.items()} == {n: w.source for n, w in other.written.items()}


def replaced(llm, memory):
    return llm.write(sources.forget(memory, "rent"), NEW, "rent")


def test_a_replaced_source_is_forgotten_and_written_in_one_version(llm, live):
    store, memory = live
    assert store.write(llm, "m", NEW, "rent", replace=True) == 4
    expected = replaced(llm, memory)
    cold = Store(store.path)
    same(store.open("m"), expected)
    same(cold.open("m"), expected)
    version = cold.version("m")
    assert (version.event, version.source, version.text) == ("replace", "rent", NEW)
    same(cold.open("m", 3), memory)
    assert cold.undo("m") == 5
    same(cold.open("m"), memory)


def test_what_follows_a_replaced_source_is_read_and_written_again_as_it_was(llm, live, tmp_path):
    store, memory = live
    store.write(llm, "m", NEW, "rent", replace=True)
    expected = replaced(llm, memory)
    for i in range(4):
        store.write(llm, "m", f"text {i}", "c")
        expected = llm.write(expected, f"text {i}", "c")
    same(Store(store.path).open("m"), expected)
    store.rebuild(llm, "m", "again")
    same(store.open("again"), expected)
    store.export("m", tmp_path / "m.zip")
    store.import_(tmp_path / "m.zip", "copy")
    same(store.open("copy"), expected)
    store.forget_by_replay(llm, "m", "a")
    assert [source.name for source in store.open("m").sources] == ["b", "rent", "c"]
    store.forget_by_replay(llm, "m", "rent")
    assert [source.name for source in store.open("m").sources] == ["b", "c"]


def test_a_source_that_is_pinned_stays_pinned_and_one_that_is_not_there_is_written(llm, live):
    store, _ = live
    store.pin("m", "rent")
    store.write(llm, "m", "it is 950", "rent", replace=True)
    pinned = {source.name: source for source in store.open("m").sources}["rent"]
    assert pinned.pinned and (pinned.tokens, pinned.slots) == (9, 9)
    same(Store(store.path).open("m"), store.open("m"))
    store.write(llm, "m", "new", "new", replace=True)
    assert [source.name for source in store.open("m").sources][-1] == "new"


@pytest.mark.parametrize(
    "moment", [(Journal, "append"), (States, "put"), (Journal, "change"), (Journal, "keep_account")]
)
def test_whoever_is_killed_has_the_old_text_or_the_new_one(llm, live, monkeypatch, moment):
    store, memory = live
    kind, name = moment
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, killed)
        patch.setattr(
            "latentmem.store.writing.Writer._withdraw", lambda *_: None
        )  # a process that is gone does nothing
        with pytest.raises(Killed):
            store.write(llm, "m", NEW, "rent", replace=True)
    later = Store(store.path)
    waits = later.pending_count("m")
    same(later.latest("m")[1], memory)
    later.apply(llm, "m")
    same(later.open("m"), replaced(llm, memory) if waits else memory)
    assert waits == (moment != (Journal, "append"))


class Killed(BaseException):
    pass


def killed(*_, **__):
    raise Killed


def test_an_older_version_of_the_package_refuses_a_store_with_replaced_sources(llm, live):
    store, _ = live
    assert store._journal._one("PRAGMA user_version") == (2,)
    store.write(llm, "m", NEW, "rent", replace=True)
    store.prune("m", keep=1)
    assert store._journal._one("PRAGMA user_version") == (4,)


def test_what_is_unchanged_is_known_by_name_and_bytes(llm, live):
    store, _ = live
    assert store.unchanged("m", OLD, "rent") == 2 == store.unchanged("m", OLD, "rent", alone=True)
    assert store.unchanged("m", NEW, "rent") is store.unchanged("m", OLD, "a") is None
    store.write(llm, "m", NEW, "rent")
    assert store.unchanged("m", OLD, "rent") == 2 and store.unchanged("m", OLD, "rent", alone=True) is None
    store.undo("m")
    assert store.unchanged("m", NEW, "rent") is None
    store.append("m", "waits", "w")
    assert store.unchanged("m", "waits", "w") == 6
    store.apply(llm, "m")
    store.forget("m", "rent")
    assert store.unchanged("m", OLD, "rent") is None
    store.fork("m", "trial")
    assert store.unchanged("trial", "waits", "w") == 6 and not store.was_written("trial", "rent")
