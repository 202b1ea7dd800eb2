"""Long-term memory: what is dropped is kept, found again by a question, and stands in front of it (M+)."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from margins import nearly_best

from latentmem import longterm
from latentmem.core import sources
from latentmem.core.settings import LongTermSettings
from latentmem.loading.trained import remembering
from latentmem.longterm import losses, ranking
from latentmem.longterm.blocks import NO_SLOT
from latentmem.longterm.search import Retrieval, RetrievedPrefix
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, labelled_memory, tiny_model, updated

GROUPS = ("update", "slot")


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(num_hidden_layers=6), byte_tokenizer(), name="tiny")


def labelled(R=4, N=8, K=4, layers=2, **settings):
    memory = labelled_memory(layers, N, K)
    return replace(memory, longterm=longterm.empty(layers, LongTermSettings(R, **settings)))


def write(memory, k, source="text"):
    """An update whose slots are numbered from where the last one ended, the same in all layers."""
    start = memory.tokens
    numbers = torch.arange(start, start + k, dtype=torch.float32)[None, :, None].expand(memory.L, k, 1)
    return updated(memory, numbers, source=source, tokens=k)


def stored(memory):
    """The numbers of the stored slots of each layer."""
    store = memory.longterm
    slots = [torch.cat([span.stored.slots[i, :, 0] for span in store.ranges]) for i in range(memory.L)]
    return [row[there].tolist() for row, there in zip(slots, store.occupied, strict=True)]


def told(llm, memory, count, seed=0):
    """A memory with so many short random texts in it, each a source of its own."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        text = torch.randint(4, 260, (5,), generator=generator)
        memory = llm.write_ids(memory, text, source=f"text {i}")
    return memory


def twin_of(llm, memory, chosen):
    """An ordinary memory that holds what is retrieved and its slots, as they stand."""
    both = [
        torch.cat([llm.retriever.slots(longterm.searched(memory), i, p), memory.slots[i]])
        for i, p in enumerate(chosen.places)
    ]
    slots = torch.stack([some[order] for some, order in zip(both, chosen.order, strict=True)])
    none = torch.zeros(slots.shape[:2], dtype=torch.int32)
    settings = replace(memory.settings, N=32, order="written")
    return replace(memory, longterm=None, settings=settings, slots=slots, births=none, origins=none)


def test_what_is_dropped_is_stored_with_its_account():
    memory = labelled()
    for i in range(6):
        memory = write(memory, 4, source=f"s{i % 2}")
    for i, mine in enumerate(stored(memory)):
        assert sorted([*mine, *memory.slots[i, :, 0].tolist()]) == list(range(24))  # nothing is lost, nothing twice
    for name in ("births", "origins"):
        both = torch.cat([getattr(memory.longterm, name), getattr(memory, name)], 1)
        slots = torch.cat([*(span.stored.slots for span in memory.longterm.ranges), memory.slots], 1)[..., 0].long()
        assert torch.equal(both, (slots // 4 + 1 if name == "births" else slots // 4 % 2).int())
    orders = memory.longterm.orders
    for i, mine in enumerate(stored(memory)):
        assert torch.tensor(mine)[orders[i].argsort()].diff().gt(0).all()  # orders are those of writing


def test_a_memory_before_is_untouched_and_two_may_go_on_from_it():
    memory = labelled()
    for _ in range(4):
        memory = write(memory, 4)
    before = stored(memory)
    one, other = write(memory, 4), write(sources.forget(write(memory, 3, "x"), "x"), 2)
    assert stored(memory) == before
    for later in (one, other):
        assert [mine[: len(old)] for mine, old in zip(stored(later), before, strict=True)] == before
    assert stored(one) != stored(other)


def test_nothing_stored_is_copied_by_the_next_write():
    memory = labelled()
    for _ in range(4):
        memory = write(memory, 4)
    following = write(memory, 4)
    assert following.longterm.ranges[0].block is memory.longterm.ranges[0].block


def test_the_first_go_beyond_the_limit():
    each = 2 * (4 + 4 + 4 + 8)  # two layers; a slot, its birth, origin and order
    memory = labelled(limit=6 * each)
    for _ in range(8):
        memory = write(memory, 4)
        assert memory.longterm.nbytes <= 6 * each
    free = labelled()
    for _ in range(8):
        free = write(free, 4)
    assert stored(memory) == [mine[-6:] for mine in stored(free)]


def test_forgetting_takes_what_is_stored():
    memory = labelled()
    for i in range(6):
        memory = write(memory, 4, source=f"s{i % 3}")
    gone = sources.forget(memory, "s1")
    left = [n for n in range(24) if n // 4 % 3 != 1]
    for i, mine in enumerate(stored(gone)):
        assert set(mine) <= set(left)
        assert set(mine) == {n for n in stored(memory)[i] if n in left}
    origins = gone.longterm.origins
    assert origins.max() == 1
    assert gone.longterm.slots_left(2).sum() == sum(map(len, stored(gone)))
    assert (origins == NO_SLOT).any() or len(set(map(len, stored(gone)))) == 1


def test_places_must_fit_the_memory():
    with pytest.raises(ValueError, match="longterm must be \\[L, M\\]"):
        replace(write(labelled(), 4), longterm=longterm.empty(2, LongTermSettings(4)))


@pytest.mark.parametrize(
    "settings",
    [
        *(
            {"R": 0},
            {"limit": 0},
            {"limit": -1},
            {"every": -1},
            {"group": "text"},
            {"rule": "newest"},
            {"rule": "frequency"},
        ),
        *({"R": True}, {"limit": 1e9}, {"int8": 1}, {"every": 8.0}, {"period": "3"}),  # would not come back from a file
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match="got"):
        longterm.empty(2, LongTermSettings(**{"R": 4, **settings}))


def test_marks_are_those_of_a_slow_twin():
    generator = torch.Generator().manual_seed(3)
    fits, births = torch.rand(4, 20, generator=generator), torch.randint(-1, 7, (20,), generator=generator)
    births[births == 3], births[0] = -1, 6
    best = [[max(fits[n][births == u].tolist(), default=None) for u in range(7)] for n in range(4)]
    for u, mark in enumerate(ranking.marks(fits, births, 7).tolist()):
        if not (births == u).any():
            assert mark == float("-inf")
            continue
        found = 0.0
        for row in best:
            there = torch.tensor([x for x in row if x is not None])
            beyond = row[u] - there.mean()
            found += float(beyond * beyond.abs() / there.std(correction=0)) / 4
        assert mark == pytest.approx(found, abs=1e-4)


def test_what_a_template_puts_around_a_question_is_not_searched_for(llm):
    prompts = llm.prompts
    ids = torch.tensor(prompts.question("where is it?", bare=True))
    asking = llm.question_mask(ids)
    assert llm.tokenizer.decode(ids[asking]) == "where is it?"
    assert llm.question_mask(torch.arange(30, 40)).all()
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    ids = torch.tensor(prompts.chat([*turns, {"role": "user", "content": "three"}], bare=True))
    said = llm.tokenizer.decode(ids[llm.question_mask(ids)])
    assert said.startswith("one") and said.endswith("three")


@pytest.mark.parametrize("group", GROUPS)
def test_a_question_reads_retrieved_slots_in_front_of_the_others(llm, group):
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 6, "group": group}), 9)
    ids = torch.randint(4, 260, (7,), generator=torch.Generator().manual_seed(5))
    logits, places = llm.logits(memory, ids, return_retrieved=True)
    chosen = llm.front(memory, ids).retrieval
    assert all(map(torch.equal, places, chosen.places))
    twin = twin_of(llm, memory, chosen)
    torch.testing.assert_close(logits, llm.logits(twin, ids), atol=1e-5, rtol=1e-5)
    assert [len(some) for some in places] == [6] * 6
    for i, places in enumerate(chosen.places):
        assert memory.longterm.orders[i][places].diff().gt(0).all()  # oldest first


def test_slots_are_chosen_behind_what_lower_layers_chose(llm):
    """The twin: layer by layer, the likeness of hidden states computed densely behind all that was chosen below."""
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 6, "group": "slot"}), 9)
    ids = torch.randint(4, 260, (7,), generator=torch.Generator().manual_seed(6))
    chosen = llm.front(memory, ids).retrieval
    twin = twin_of(llm, memory, chosen)
    from latentmem.decoder.hooks import layers_seen

    with layers_seen(llm.decoder) as seen:
        llm.logits(twin, ids)
    for i, layer in enumerate(llm.decoder.layers):
        slots = torch.cat([span.stored.slots[i] for span in memory.longterm.ranges])
        cos = torch.nn.functional.cosine_similarity(
            layer.input_layernorm(seen[i][0])[:, None], layer.input_layernorm(slots)[None], dim=-1
        )
        assert nearly_best(cos.mean(0), chosen.places[i])


def test_updates_are_taken_whole(llm):
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 10}), 12)
    _, chosen = llm.logits(memory, torch.arange(10, 20), return_retrieved=True)
    births = memory.longterm.births
    for i, places in enumerate(chosen):
        counts = {b: int((births[i] == b).sum()) for b in births[i][places].tolist()}
        taken = {b: births[i][places].tolist().count(b) for b in counts}
        assert sum(taken[b] < counts[b] for b in counts) <= 1  # the last one as far as R allows


def test_the_best_updates_stand_last_and_whole_the_others_as_they_were_written(llm):
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 10}), 12)
    ids = torch.arange(10, 20)
    chosen = llm.front(memory, ids).retrieval
    store, tails = memory.longterm, set()
    for i, (places, order) in enumerate(zip(chosen.places, chosen.order, strict=True)):
        births = torch.cat([store.births[i][places], memory.births[i]])[order].tolist()
        steps = torch.cat([store.orders[i][places] & 0xFFFFFFFF, store.places[i].long()])[order].tolist()
        assert sorted(order.tolist()) == list(range(26))
        blocks = [birth for birth, before in zip(births, [None, *births], strict=False) if birth != before]
        tail = len(blocks) - next(k for k in range(len(blocks)) if blocks[: k + 1] != sorted(set(blocks[: k + 1])))
        lifted = [*blocks[len(blocks) - tail :]]
        tails.add(tuple(birth for birth in lifted if births.count(birth)))
        rest = list(zip(births, steps, strict=True))[: len(births) - sum(births.count(b) for b in lifted)]
        assert rest == sorted(rest)
        for birth in lifted:  # each together, in order
            mine = [step for b, step in zip(births, steps, strict=True) if b == birth]
            assert mine == sorted(mine)
    assert len({tail[-1] for tail in tails}) == 1  # the best is the same in every layer


def test_what_a_text_says_is_found_again():
    llm = MemoryModel(tiny_model(num_hidden_layers=6, initializer_range=0.02), byte_tokenizer())
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 8}), 3)
    wanted = torch.randint(4, 260, (6,), generator=torch.Generator().manual_seed(9))
    memory = llm.write_ids(memory, wanted, source="wanted")
    memory = told(llm, memory, 12, seed=1)
    number = [s.name for s in memory.sources].index("wanted")
    _, chosen = llm.logits(memory, wanted, return_retrieved=True)
    origins = memory.longterm.origins
    for i, places in enumerate(chosen):
        assert (origins[i][places] == number).sum() == (origins[i] == number).sum() > 0


def test_slots_that_the_memory_still_holds_help_to_find_their_update():
    """What a text says stands in a slot that was not dropped; the rest of the text is found by it."""
    llm = MemoryModel(tiny_model(initializer_range=0.02), byte_tokenizer())
    memory = llm.empty(N=16, K=8, longterm={"R": 4})
    for start in (10, 50, 90, 130):
        memory = llm.write_ids(memory, torch.arange(start, start + 8), source=str(start))
    held = (memory.births[1] == 2).nonzero().flatten().tolist()
    places = memory.longterm.places[1]
    asked = torch.tensor([50 + int(places[i]) for i in held])
    assert 0 < len(held) < 8
    _, chosen = llm.logits(memory, asked, return_retrieved=True)
    assert (memory.longterm.births[1][chosen[1]] == 2).sum() == min(4, 8 - len(held))


def test_without_a_store_the_best_updates_stand_last():
    """What is dropped is lost; what is there is read in another order, which only the reader sees."""
    llm = MemoryModel(tiny_model(num_hidden_layers=6, initializer_range=0.02), byte_tokenizer())
    plain, searched = (told(llm, llm.empty(N=24, K=8, order=order), 9) for order in ("written", "best-last"))
    assert torch.equal(plain.slots, searched.slots) and searched.longterm is None and searched.R == 0
    text = torch.randint(4, 260, (5,), generator=torch.Generator().manual_seed(8))
    plain, searched = (told(llm, llm.write_ids(m, text, source="wanted"), 2, seed=7) for m in (plain, searched))
    logits, places = llm.logits(searched, text, return_retrieved=True)
    chosen = llm.front(searched, text).retrieval
    wanted = [s.name for s in searched.sources].index("wanted")
    for i, order in enumerate(chosen.order):
        mine = searched.origins[i] == wanted
        count = int(mine.sum())
        others = (~mine).nonzero()[:, 0]
        assert 0 < count < 24 and torch.equal(order, torch.cat([others, mine.nonzero()[:, 0]]))
    assert [len(some) for some in places] == [0] * 6
    torch.testing.assert_close(logits, llm.logits(twin_of(llm, searched, chosen), text), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, llm.logits(plain, text), atol=1e-4)
    assert llm.positions(searched) == llm.positions(plain) and llm.room(searched, 9) == llm.room(plain, 9)
    rows = llm.generate_ids([searched, plain], [text, text], max_new_tokens=6)
    for one, m in zip(rows, (searched, plain), strict=True):
        assert torch.equal(one, llm.generate_ids(m, text, max_new_tokens=6))
    slots = searched.slots.clone().requires_grad_()
    llm.logits(replace(searched, slots=slots), text).sum().backward()
    assert slots.grad.abs().sum() > 0


def test_only_the_best_update_is_read():
    """Layers that hold fewer slots of it, read the next best ones too: each row is as long in every layer."""
    llm = MemoryModel(tiny_model(num_hidden_layers=6, initializer_range=0.02), byte_tokenizer())
    text = torch.randint(4, 260, (5,), generator=torch.Generator().manual_seed(8))
    for part in (None, {"R": 4, "every": 2}, {"R": 1}):
        memory = llm.write_ids(told(llm, llm.empty(N=24, K=8, order="best-only", longterm=part), 9), text, source="x")
        memory = told(llm, memory, 2, seed=7)
        wanted = [s.name for s in memory.sources].index("x")
        front = llm.front(memory, text)
        chosen = front.retrieval
        most = 0
        for i, order in enumerate(chosen.order):
            births, origins = memory.births[i], memory.origins[i]
            if part:
                births = torch.cat([memory.longterm.births[i][chosen.places[i]], births])
                origins = torch.cat([memory.longterm.origins[i][chosen.places[i]], origins])
            count = int((origins == wanted).sum())
            most = max(most, count)
            assert len(order) == chosen.length and (origins[order][chosen.length - count :] == wanted).all()
            assert len(set(order.tolist())) == chosen.length
        assert 0 < most == chosen.length < memory.M and most + 1 == front.P
        logits = llm.logits(memory, text)
        torch.testing.assert_close(logits, llm.logits(twin_of(llm, memory, chosen), text), atol=1e-5, rtol=1e-5)
        mass = llm.attended(memory, text, text)
        assert mass.shape == (6, memory.R + memory.M) and ((mass > 0).sum(1) == most).all()
        other = torch.arange(20, 26)
        rows = llm.generate_ids([memory, memory], [text, other], max_new_tokens=6)
        for one, ids in zip(rows, (text, other), strict=True):
            assert torch.equal(one, llm.generate_ids(memory, ids, max_new_tokens=6))
        slots = memory.slots.clone().requires_grad_()
        torch.testing.assert_close(llm.logits(replace(memory, slots=slots), text), logits, atol=1e-5, rtol=1e-5)


def test_a_memory_with_a_long_term_part_is_searched_from_its_first_update_on():
    llm = MemoryModel(tiny_model(num_hidden_layers=6, initializer_range=0.02), byte_tokenizer())
    memory = told(llm, llm.empty(N=64, K=8, longterm={"R": 4}), 3)
    text = torch.randint(4, 260, (8,), generator=torch.Generator().manual_seed(8))
    memory = told(llm, llm.write_ids(memory, text, source="wanted"), 3, seed=7)
    assert memory.longterm.S == 0 and memory.needs_search
    born = memory.births[0][(memory.origins[0] == 3)][0]
    for order in llm.front(memory, text).retrieval.order:
        assert (memory.births[0][order][-8:] == born).all() and sorted(order.tolist()) == list(range(memory.M))
    written = memory.with_settings(order="written")
    assert not written.needs_search
    assert torch.equal(llm.logits(written, text), llm.logits(replace(memory, longterm=None), text))


def test_gradients_flow_through_what_is_retrieved(llm):
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 6}), 9)
    slots = memory.slots.clone().requires_grad_()
    ids = torch.arange(30, 40)
    logits = llm.logits(replace(memory, slots=slots), ids)
    torch.testing.assert_close(logits, llm.logits(memory, ids), atol=1e-5, rtol=1e-5)
    logits.sum().backward()
    assert slots.grad.abs().sum() > 0


@pytest.mark.parametrize("group", GROUPS)
def test_rows_with_stores_of_their_own(llm, group):
    """Batches of memories with and without a store, full and empty, answer as each alone."""
    settings = {"R": 6, "group": group, "every": 0}
    some = [
        told(llm, llm.empty(N=16, K=8, longterm=settings), 9, seed=3),
        told(llm, llm.empty(N=16, K=8), 9, seed=4),
        told(llm, llm.empty(N=32, K=8, longterm={**settings, "R": 3}), 9, seed=5),
        llm.empty(N=16, K=8, longterm=settings),
    ]
    prompts = [torch.arange(4 + i, 10 + 3 * i) for i in range(4)]
    alone = [llm.generate_ids(m, p, max_new_tokens=8) for m, p in zip(some, prompts, strict=True)]
    for one, all_ in zip(alone, llm.generate_ids(some, prompts, max_new_tokens=8), strict=True):
        assert torch.equal(one, all_)
    answers = [torch.arange(20, 25)] * 4
    together = llm.score_rows(llm.context(some), prompts, answers)
    for m, p, a, score in zip(some, prompts, answers, together, strict=True):
        torch.testing.assert_close(score.logprobs, llm.score(m, p, a).logprobs, atol=1e-4, rtol=1e-4)
    rows = llm.score_rows(llm.context(some[0]), prompts, answers)
    for p, a, score in zip(prompts, answers, rows, strict=True):
        torch.testing.assert_close(score.logprobs, llm.score(some[0], p, a).logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_of_several_memories_are_those_of_each_alone(llm, beams):
    settings = {"R": 6, "every": 2}
    some = [told(llm, llm.empty(N=16, K=8, longterm=settings), 9, seed=i) for i in range(3)]
    prompts = [torch.arange(4 + i, 12 + i) for i in range(3)]
    more = {"num_beams": beams, "max_new_tokens": 8, "min_new_tokens": 8}
    alone = [llm.generate_ids(m, p, **more) for m, p in zip(some, prompts, strict=True)]
    for one, row in zip(alone, llm.generate_ids(some, prompts, **more), strict=True):
        assert torch.equal(one, row)


def test_an_answer_that_has_ended_is_not_searched_for(llm, monkeypatch):
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 6, "every": 2}), 9)
    asked, search = [], MemoryModel.search_again
    monkeypatch.setattr(
        MemoryModel, "search_again", lambda llm, front, said: asked.append(said.tolist()) or search(llm, front, said)
    )
    torch.manual_seed(0)
    prompt = torch.arange(30, 36)
    more = {"do_sample": True, "num_return_sequences": 3, "eos_token_id": [2, *range(100, 260)], "pad_token_id": 0}
    rows = llm.generate_ids(memory, prompt, max_new_tokens=12, **more)[:, 6:]
    ended = [next((i for i, t in enumerate(row) if t >= 100 or t == 2), 99) for row in rows.tolist()]
    expected = []
    for end in range(2, rows.shape[1], 2):
        alive = [row for row, at in zip(rows, ended, strict=True) if at >= end]
        expected += [alive[0][end - 2 : end].tolist()] if alive else []
    assert asked == expected


def test_what_is_asked_in_inference_mode_can_be_written_to_outside():
    llm = MemoryModel(tiny_model(), byte_tokenizer())
    memory = told(llm, llm.empty(N=16, K=8, longterm=6), 6)
    with torch.inference_mode():
        llm.logits(memory, [5, 6, 7])
        inside = told(llm, memory, 2)
    memory = told(llm, memory, 2)
    told(llm, inside, 2)
    assert llm.logits(memory, [5, 6, 7]).isfinite().all()


def test_an_update_of_which_a_layer_holds_nothing_can_be_found():
    llm = MemoryModel(tiny_model(num_hidden_layers=20, initializer_range=0.02), byte_tokenizer())
    memory = told(llm, llm.empty(N=16, K=8, longterm=8), 2)
    wanted = torch.arange(100, 106)
    memory = told(llm, llm.write_ids(memory, wanted, source="wanted"), 12, seed=1)
    store = memory.longterm
    (span,) = store.ranges
    births = store.births
    span.block.stored.origins[2, : span.end][births[2] == 3] = NO_SLOT  # layers 1 and 2 are searched
    memory = replace(memory, longterm=replace(store, ranges=store.ranges))
    _, chosen = llm.logits(memory, wanted, return_retrieved=True)
    assert (births[0][chosen[0]] == 3).sum() == (births[0] == 3).sum() > 0


def test_the_rule_frequency_keeps_to_the_limit_too():
    each = 2 * (4 + 4 + 4 + 8)
    memory = labelled(limit=10 * each, rule="frequency", period=8)
    for _ in range(12):
        memory = write(memory, 4)
        assert memory.longterm.nbytes <= 10 * each
        frequencies = memory.longterm.frequencies
        assert frequencies is None or frequencies.shape[1] <= memory.longterm.S


def test_a_pool_of_a_checkpoint_keeps_its_order():
    import latentmem

    llm = latentmem.load(str(Path(__file__).parent.parent / "golden" / "memoryllm"), device="cpu")
    memory = llm.empty(longterm={"R": 8, "group": "slot"})
    memory = llm.write_ids(memory, torch.arange(20, 30))
    _, chosen = llm.logits(memory, [5, 6, 7], return_retrieved=True)
    for i, places in enumerate(chosen):
        assert memory.longterm.orders[i][places].diff().gt(0).all()


def test_the_answer_is_not_what_is_searched_for(llm):
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 6}), 9)
    ids, answer = torch.arange(30, 36), torch.arange(90, 96)
    chosen = llm.front(memory, ids).retrieval
    front = RetrievedPrefix.of(llm.retriever, memory, llm.prefix(memory), chosen, ids)
    from latentmem.decoder.adapters import READ
    from latentmem.model.context import Context

    context = Context((front,), (llm.room(memory),), READ)
    expected = llm.score_rows(context, [ids], [answer])[0]
    torch.testing.assert_close(llm.score(memory, ids, answer).logprobs, expected.logprobs)


def test_a_long_answer_is_searched_for_again(llm, monkeypatch):
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 6, "every": 4}), 9)
    asked = []
    chosen = llm.retriever.retrieve
    monkeypatch.setattr(
        llm.retriever, "retrieve", lambda s, p, ids, of: asked.append(ids.tolist()) or chosen(s, p, ids, of)
    )
    prompt = torch.arange(30, 36)
    output = llm.generate_ids(memory, prompt, max_new_tokens=10, min_new_tokens=10)[0].tolist()
    assert asked == [prompt.tolist(), prompt.tolist() + output[6:10], prompt.tolist() + output[10:14]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_slots_are_read_from_there_on(attention, monkeypatch):
    """After a search the next token is that of a cache in which the new slots stand in front of the same text."""
    llm = MemoryModel(tiny_model(attention=attention), byte_tokenizer())
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 6, "every": 1}), 9)
    prompt = torch.arange(30, 36)
    first = llm.front(memory, prompt).retrieval
    other = Retrieval([torch.arange(6)] * 3, [torch.arange(22)] * 3)
    found = iter([first, other, other])
    monkeypatch.setattr(llm.retriever, "retrieve", lambda *_: next(found))
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    made = llm.generate_ids(memory, prompt, **settings)

    cache = RetrievedPrefix.of(llm.retriever, memory, llm.prefix(memory), first, prompt)
    from latentmem.decoder.cache import attention_mask, memory_cache

    with torch.no_grad():
        text = memory_cache([cache], llm.decoder, store=True)
        llm.base(input_ids=prompt[None], attention_mask=attention_mask(text, prompt[None]), past_key_values=text)
        cache.take(other)
        text.changed()
        token = made.sequences[:, 6:7]
        logits = llm.base(input_ids=token, attention_mask=attention_mask(text, token), past_key_values=text).logits
    torch.testing.assert_close(made.logits[1], logits[:, -1], atol=1e-5, rtol=1e-5)


def test_shares_of_sources_count_what_is_retrieved(llm):
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 8}), 9)
    shares = llm.sources_of(memory, "what", "this")
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    mass = llm.attended(memory, [5, 6], [7])
    assert mass.shape == (6, 8 + 16)
    chosen = llm.front(memory, [5, 6]).retrieval
    theirs = llm.attended(twin_of(llm, memory, chosen), [5, 6], [7])
    for i, order in enumerate(chosen.order):
        torch.testing.assert_close(mass[i][order], theirs[i], atol=1e-5, rtol=1e-5)


def test_a_memory_whose_slots_are_all_forgotten_still_has_its_store(llm):
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 8}), 2)
    memory = llm.write_ids(memory, torch.randint(4, 260, (64,)), source="flood")
    gone = sources.forget(memory, "flood")
    assert not gone.is_empty
    assert gone.M + gone.R > 0
    llm.ask(gone, "what?", max_new_tokens=2)


def test_a_conversation_reads_turns_again_where_others_are_retrieved(llm):
    """A conversation that goes on gives the answers of one that begins with its turns and its memory."""
    memory = told(llm, llm.empty(N=16, K=8, longterm={"R": 6, "every": 2}), 9)
    from latentmem.model.chat import Conversation

    kept, turns = Conversation(llm, memory), ["one", "two words", "and three of them", "one", "two words"]
    for i, turn in enumerate(turns):
        fresh = Conversation(llm, kept.memory, [dict(m) for m in kept.messages])
        assert kept.say(turn, max_new_tokens=6) == fresh.say(turn, max_new_tokens=6), i


def test_positions_leave_room_for_what_is_retrieved(llm):
    memory = llm.empty(N=500, K=100, longterm=100)
    assert llm.positions(memory) == 0
    with pytest.raises(ValueError, match="retrieved"):
        llm.empty(N=900, K=100, longterm=200)
    with pytest.raises(ValueError, match="mapping"):
        llm.empty(longterm={"rows": 3})
    full = told(llm, llm.empty(N=16, K=8, longterm=6), 9)
    assert llm.positions(full) == 1 + 6 + 16
    assert llm.room(full) == 1024 - 23


def test_the_example_of_the_guide_runs(monkeypatch, capsys):
    root = Path(__file__).parent.parent.parent
    monkeypatch.chdir(root)
    guide = (root / "docs" / "how-to" / "longterm.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    small = remembering(MemoryModel(tiny_model(max_position_embeddings=8192), byte_tokenizer()), "small", None)
    monkeypatch.setattr("latentmem.loading.load.load", lambda: small)
    seen = {}
    exec(code, seen)
    memory = seen["memory"]
    assert longterm.stored_most(memory) > 0 and memory.slots_left()[0].sum() < memory.L * memory.sources[0].slots
    assert capsys.readouterr().out.count("\n") >= 3


def test_a_memory_that_keeps_updates_shows_its_form(llm):
    memory = told(llm, llm.empty(N=16, K=8, form="int8", longterm=4), 1)
    assert repr(memory) == f"Memory(L={memory.L}, M={memory.M}/16, int8, 1 updates, 1 sources)"


def test_equal_slots_fit_equally_in_the_memory_and_in_its_archive(llm):
    memory = llm.empty(N=8, K=8, form="exact", longterm=4)
    for first in (5, 50):
        memory = llm.write_ids(memory, list(range(first, first + 8)))
    archive = memory.longterm
    twice = replace(memory, slots=archive.ranges[0].stored.slots.clone())  # what the archive holds stands there, too
    numbers, U = ranking.numbered(torch.cat([archive.writers, twice.births], dim=1), twice.updates)
    asked = [torch.randn(9, twice.d, generator=torch.Generator().manual_seed(i)) for i in llm.retriever.layers_searched]
    mark = llm.retriever._marks(twice, archive, asked, numbers, U)
    assert U == 2 and mark[0] == mark[1]


# --- what is lost for good --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["exact", "int8"])
def test_lost_slots_are_those_that_stand_nowhere(llm, form):
    def after(longterm_, count=6):
        return told(llm, llm.empty(N=16, K=8, form=form, longterm=longterm_), count)

    plain, kept = after(0), after({"R": 4})
    assert longterm.lost(plain) == 30 - 16 and longterm.lost(kept) == 0
    bytes_ = kept.longterm.nbytes
    bound = after({"R": 4, "limit": bytes_ // 2})
    standing = bound.slots_left().sum(0) + longterm.stored(bound).sum(0)
    assert longterm.lost(bound) == pytest.approx(30 - standing.double().mean().item()) and longterm.lost(bound) > 0
    assert longterm.lost(sources.forget(kept, "text 0")) == pytest.approx(collateral(kept, "text 0"))


def collateral(memory, name):
    """Slots of other sources that go with a source, the mean over layers."""
    after = sources.forget(memory, name)
    rest = sum(source.slots for source in after.sources)
    return rest - (after.slots_left().sum(0) + longterm.stored(after).sum(0)).double().mean().item()


def test_a_loss_is_said_with_the_setting_that_would_have_kept_it(llm):
    plain = told(llm, llm.empty(N=16, K=8, form="int8", longterm=0), 6)
    said = losses.sentence(plain, losses.lost(plain), "notes")
    assert "14 slots of each layer, 47% of what" in said and "rebuild NEW --memory notes --longterm 5`" in said
    full = told(llm, llm.empty(N=16, K=8, form="int8", longterm={"R": 4, "limit": 1000}), 6)
    assert (
        "--longterm-limit 2000`" in losses.sentence(full, 0.04, "notes") and losses.sentence(full, 0.0, "notes") == ""
    )
    for slots, number in ((0.001, "less than 0.1"), (1 / 30, "less than 0.1"), (0.1, "0.1"), (0.96, "1"), (1.5, "1.5")):
        said = losses.sentence(full, slots, "notes")
        assert f": {number} slots of each layer, " in said
    assert "less than 0.1 slots of each layer, less than 1%" in losses.sentence(full, 0.04, "notes")
