"""A store of memories with a long-term part: versions, blocks that are shared, copies, forgetting."""

from dataclasses import replace

import pytest
import torch

from latentmem.longterm import blocks
from latentmem.model.model import MemoryModel
from latentmem.store import Store
from latentmem.testing import byte_tokenizer, tiny_model

NOUNS = ("cat", "dog", "sun", "car", "hat", "jar", "key", "map")
TEXTS = [f"The {noun} of number {i} is {7 * i}." for i, noun in enumerate(NOUNS)]


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)


@pytest.fixture(params=[{}, {"int8": True}, {"rule": "frequency", "period": 48}], ids=["plain", "int8", "frequency"])
def filled(request, llm, tmp_path):
    """A store with a memory "m" in which every text is one version, and the memory as it is without a store."""
    store = Store(tmp_path / "store", snapshot_every=3)
    memory = llm.empty(N=32, K=16, longterm={"R": 16, **request.param})
    store.create("m", memory)
    states = [memory]
    for i, text in enumerate(TEXTS):
        store.write(llm, "m", text, f"s{i % 4}")
        memory = llm.write(memory, text, f"s{i % 4}")
        states.append(memory)
    return store, states


def places(memory):
    """All of a store that counts, in order: (layer, slot, birth, origin, order) of what is there."""
    store = memory.longterm
    found = []
    for i, there in enumerate(store.occupied):
        slots = torch.cat([span.stored.slots[i] for span in store.ranges])[there].tolist() if store.ranges else []
        columns = [getattr(store, name)[i][there].tolist() for name in ("births", "origins", "orders")]
        found.append(list(zip(slots, *columns, strict=True)))
    return found


def same(one, other):
    assert one.sources == other.sources
    assert torch.equal(one.slots, other.slots)
    assert torch.equal(one.longterm.places, other.longterm.places)
    for what in ("settings", "clock", "since"):
        assert getattr(one.longterm, what, None) == getattr(other.longterm, what, None)
    assert places(one) == places(other)
    a, b = (getattr(m.longterm, "frequencies", None) for m in (one, other))
    assert (a is None and b is None) or torch.equal(a, b)


def test_every_version_is_that_memory_also_in_another_process(llm, filled):
    store, states = filled
    again = Store(store.path)
    for version, memory in enumerate(states):
        same(again.open("m", version), memory)
        same(store.open("m", version), memory)
    assert states[-1].longterm.S > 4 * 16 - 1
    assert again.ask(llm, "m", "What?", max_new_tokens=4) == llm.ask(states[-1], "What?", max_new_tokens=4)
    after = llm.write(states[-1], "One more.", "last")
    again.write(llm, "m", "One more.", "last")
    same(Store(store.path).open("m"), after)


def test_full_blocks_are_objects_that_versions_share(filled):
    store, _ = filled
    blocks = [version.facts.get("blocks", {}) for version in store.history("m")]
    names = {name for some in blocks for name in some}
    assert len(names) >= 4 and any(set(a) & set(b) for a, b in zip(blocks, blocks[3:], strict=False))
    assert names <= set(store._objects.names())
    assert store.sweep() == 0
    assert store.overview()[0].bytes == sum(path.stat().st_size for path in store.path.glob("objects/??/*"))
    store.delete("m")
    assert not list(store._objects.names())


def test_a_missing_block_is_named(filled):
    store, _ = filled
    name = [next(iter(version.facts["blocks"])) for version in store.history("m") if version.facts.get("blocks")][-1]
    store._objects.remove(name)
    with pytest.raises(ValueError, match=f"{name}.*missing"):
        Store(store.path).open("m")


def test_a_block_that_was_swept_is_put_down_again(llm, filled):
    """What is in memory of a block does not vouch for what is on the disk."""
    store, states = filled
    for name in {name for version in store.history("m") for name in version.facts.get("blocks", {})}:
        store._objects.remove(name)
    store.create("copy", replace(states[-1], version="", parent=""))
    same(Store(store.path).open("copy"), states[-1])


def test_forks_rollbacks_and_forgetting(llm, filled):
    store, states = filled
    store.fork("m", "f", version=6)
    store.forget("f", "s1")
    forgotten = store.open("f")
    assert forgotten.longterm.slots_left(len(forgotten.sources)).shape[0] == 3
    kept = [[row[:2] for row in layer if row[2] != 1] for layer in places(states[6])]
    assert [[row[:2] for row in layer] for layer in places(forgotten)] == kept
    same(store.open("m"), states[-1])
    store.rollback("m", 5)
    same(Store(store.path).open("m"), states[5])


def test_an_export_holds_the_blocks(llm, filled, tmp_path):
    store, states = filled
    store.export("m", tmp_path / "m.latentmem")
    other = Store(tmp_path / "other")
    other.import_(tmp_path / "m.latentmem", "n")
    for version, memory in enumerate(states):
        same(other.open("n", version), memory)
    assert other.sweep() == 0
    store.fork("m", "f")
    store.export("f", tmp_path / "f.latentmem")
    other.import_(tmp_path / "f.latentmem", "f")
    same(other.open("f"), states[-1])


def test_an_exact_forgetting_leaves_nothing_in_the_store(llm, filled):
    store, states = filled
    store.forget_by_replay(llm, "m", "s2")
    memory = states[0]
    for i, text in enumerate(TEXTS):
        if i % 4 != 2:
            memory = llm.write(memory, text, f"s{i % 4}")
    same(Store(store.path).open("m"), memory)
    assert store.sweep() == 0


def test_an_exact_forgetting_whose_replay_fails_leaves_no_block_of_before(llm, filled):
    """Without the forgotten text another one is over the quota, and fails."""
    store, _ = filled
    blocks = {name for version in store.history("m") for name in version.facts.get("blocks", {})}
    compute = store._writer.compute

    def computed(llm, row, *rest):
        if row.seq == len(TEXTS):
            raise ValueError("no")
        return compute(llm, row, *rest)

    store._writer.compute = computed
    store.forget_by_replay(llm, "m", "s0")
    left = set(store._objects.names())
    named = {name for version in store.history("m") for name in version.facts.get("blocks", {})}
    assert store.history("m")[-1].state == "failed" and not store.history("m")[-1].facts.get("blocks")
    assert blocks & left <= named


def test_a_file_that_names_other_blocks_than_its_snapshots_is_refused(llm, filled, tmp_path):
    import json
    import zipfile

    store, _ = filled
    store.export("m", tmp_path / "m.latentmem")
    with zipfile.ZipFile(tmp_path / "m.latentmem") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    manifest = json.loads(parts["manifest.json"])
    lines = [json.loads(line) for line in parts["journal.jsonl"].splitlines()]
    gone = next(iter(next(line["facts"]["blocks"] for line in lines if line["facts"].get("blocks"))))
    for line in lines:
        line["facts"].get("blocks", {}).pop(gone, None)
    del manifest["objects"][gone], parts[f"objects/{gone}.safetensors"]
    parts["manifest.json"] = json.dumps(manifest).encode()
    parts["journal.jsonl"] = "\n".join(map(json.dumps, lines)).encode()
    with zipfile.ZipFile(tmp_path / "bad.latentmem", "w") as file:
        for name, data in parts.items():
            file.writestr(zipfile.ZipInfo(name), data)
    before = set(store._objects.names())
    with pytest.raises(ValueError, match="names other blocks"):
        store.import_(tmp_path / "bad.latentmem", "n")
    assert set(store._objects.names()) == before and store.names() == ["m"]


def test_a_rebuilt_memory_has_the_same_store(llm, filled):
    store, states = filled
    store.rebuild(llm, "m", "r")
    same(store.open("r"), states[-1])


def test_stats_say_what_is_stored(filled):
    store, states = filled
    for source, kept in zip(store.stats("m"), states[-1].longterm.slots_left(4), strict=True):
        assert source.stored == pytest.approx(kept.double().mean().item() / source.slots)
    assert any(source.stored > 0 for source in store.stats("m"))


@pytest.mark.parametrize("key", ["longterm.places", "longterm.slots", "longterm.orders"])
def test_a_file_without_a_part_of_it_is_refused(filled, tmp_path, key):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from latentmem.core.memory import Memory

    path = tmp_path / "m.safetensors"
    saved = filled[1][-1].save(path)
    same(Memory.load(path), saved)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="altered or damaged"):
        Memory.load(path)
