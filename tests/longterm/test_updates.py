"""The archive of coded updates: all updates less what stands, layer by layer, and what a question finds in it."""

import random
from dataclasses import replace

import pytest
import torch

from latentmem import longterm
from latentmem.core import memory as memories
from latentmem.core import sources
from latentmem.core.memory import Update, empty
from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.longterm import search, updates
from latentmem.longterm.updates import UpdateArchive
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model, updated
from latentmem.written import Written

BYTES = 4 + 10  # of a slot


def of(layers=3, N=8, seed=0, **asked):
    memory = empty(layers, 1, MemorySettings(N, 4, form="int8", seed=seed))
    return replace(memory, longterm=longterm.empty(layers, LongTermSettings(**{"R": 6} | asked), by_update=True))


def write(memory, k, source="text"):
    one = Written(source, {"ids": torch.arange(k).int(), "heads": torch.zeros(k, 10, dtype=torch.int8)})
    return memories.update(memory, Update.drawn(memory, one, source, k))


def archived(memory):
    """The slow twin: of each layer (update, place) of every slot that was written, not evicted, and does not stand."""
    found = []
    for layer in memory.slots[:, :, 0].tolist():
        stands = {(n >> 32, n & 0xFFFFFFFF) for n in layer}
        every = [(n, i) for n, one in memory.written.items() if n >= memory.longterm.first for i in range(len(one))]
        found.append([slot for slot in every if slot not in stands])
    return found


def history(seed, steps=14, **asked):
    rng = random.Random(seed)
    memory = of(seed=seed, **asked)
    for step in range(steps):
        memory = write(memory, rng.randrange(1, 5), rng.choice("abc"))
        if step % 6 == 5:
            memory = sources.forget(memory, rng.choice([one.name for one in memory.sources]))
        yield memory


@pytest.mark.parametrize("limit", [1 << 20, 12 * BYTES])
@pytest.mark.parametrize("seed", range(3))
def test_the_archive_is_all_updates_less_what_stands(seed, limit):
    for memory in history(seed, limit=limit):
        twin, names = archived(memory), [one.name for one in memory.sources]
        counts = longterm.stored(memory)
        for i, slots in enumerate(twin):
            own = [names.index(memory.written[n].source) for n, _ in slots]
            assert counts[:, i].tolist() == [own.count(j) for j in range(len(names))]
        kept = [one for n, one in memory.written.items() if n >= memory.longterm.first]
        assert (memory.longterm.slots, memory.longterm.nbytes) == (sum(map(len, kept)), sum(o.nbytes for o in kept))
        assert min(6, *map(len, twin)) == memory.R and longterm.stored_most(memory) == max(map(len, twin))
        again = UpdateArchive.restored(memory.longterm.settings, memory.longterm.first, memory.written, memory.births)
        assert vars(again) == vars(memory.longterm)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_slots_are_those_of_a_slow_twin(seed):
    rng = random.Random(seed)
    for memory in history(seed, limit=20 * BYTES):
        best_first = rng.sample(list(memory.written), len(memory.written))
        found = memory.longterm.best(memory, best_first)
        for layer, slots in zip(found.tolist(), archived(memory), strict=True):
            ranked = sorted(slots, key=lambda slot: (best_first.index(slot[0]), slot[1]))[: memory.R]
            assert layer == sorted(n << 32 | i for n, i in ranked)
        index = updates.sources_of(memory, found)
        names = [one.name for one in memory.sources]
        births = (found >> 32).tolist()
        assert index.tolist() == [[names.index(memory.written[n].source) for n in row] for row in births]


def test_the_oldest_updates_go_first_and_what_stands_stays():
    memory = of(limit=8 * BYTES)
    for n in range(1, 9):
        memory = write(memory, 4)
        assert memory.longterm.nbytes <= 8 * BYTES and memory.longterm.first == max(1, n - 1)
        assert set(memory.written) == set(range(max(1, n - 1), n + 1)) | set(memory.births.unique().tolist())
    assert len(write(of(limit=1), 4).written) == 1  # the newest always stays


def test_without_an_archive_updates_go_with_their_last_slot():
    memory = replace(of(), longterm=None)
    for _ in range(200):
        memory = write(memory, 4)
        assert set(memory.written) == set(memory.births.unique().tolist())


def test_a_source_that_comes_again_after_it_was_forgotten_is_new():
    memory = of()
    for source in "abab":
        memory = write(memory, 4, source)
    memory = sources.forget(memory, "a")
    assert {one.source for one in memory.written.values()} == {"b"} and longterm.stored(memory).shape == (1, 3)
    memory = write(memory, 3, "a")
    assert [one.name for one in memory.sources] == ["b", "a"] and set(memory.written) == {2, 4, 5}
    assert longterm.stored(memory)[1].tolist() == [0, 0, 0]
    for name in ("a", "b"):
        memory = sources.forget(memory, name)
    assert memory.is_empty and not memory.written and longterm.stored_most(memory) == 0
    assert write(memory, 4, "c").M == 4


def test_pinned_slots_are_not_archived():
    memory = sources.pin(write(of(), 4, "kept"), "kept")
    for _ in range(5):
        memory = write(memory, 4, "other")
    assert memory.slots_left()[0].tolist() == [4, 4, 4] and longterm.stored(memory)[0].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="pinned"):
        write(memory, 4, "kept")


@pytest.mark.parametrize("asked", [{"int8": True}, {"group": "slot"}, {"rule": "frequency", "period": 8}], ids=str)
def test_what_only_hidden_states_can_do_is_refused(asked):
    with pytest.raises(ValueError, match="choose form='exact'"):
        of(**asked)


@pytest.mark.parametrize("order", ["best-last", "written", "best-only"])
def test_a_question_takes_the_same_slots_as_of_hidden_states(order, monkeypatch):
    """With the same marks of updates, both forms read the same slots of the same updates in the same order."""
    llm = MemoryModel(tiny_model(num_hidden_layers=6), byte_tokenizer(), name="tiny")
    marks = {n: float(torch.rand(1, generator=torch.Generator().manual_seed(n))) for n in range(1, 9)}
    read = []
    for form in ("exact", "int8"):
        memory = llm.empty(N=16, K=6, longterm=10, order=order, form=form)
        for i in range(8):
            memory = llm.write_ids(memory, list(range(10 + 9 * i, 15 + 9 * i)), f"s{i}")
        births = memory.births if form == "int8" else torch.cat([memory.births, memory.longterm.births], dim=1)
        left = sorted(memory.written) or births.unique().tolist()
        mine = torch.tensor([marks[n] for n in left])
        monkeypatch.setattr(search, "marks", lambda fits, updates, count, mine=mine: mine)
        chosen = llm.retrieve(memory, torch.tensor([7, 8, 9]))
        layers = []
        for i, (places, at) in enumerate(zip(chosen.places, chosen.order, strict=True)):
            if form == "int8":
                taken = [(int(n) >> 32, int(n) & 0xFFFFFFFF) for n in torch.cat([places, memory.slots[i, :, 0]])]
            else:
                births = torch.cat([memory.longterm.births[i, places], memory.births[i]])
                taken = births.tolist()
            layers.append([taken[j] if form == "exact" else taken[j][0] for j in at.tolist()])
        read.append(layers)
    assert read[0] == read[1]


def test_slots_of_hidden_states_have_another_archive():
    exact = empty(3, 4, MemorySettings(8, 4))
    with pytest.raises(ValueError, match="holds hidden states"):
        replace(updated(exact, torch.zeros(3, 1, 4)), longterm=UpdateArchive(LongTermSettings(4)))
