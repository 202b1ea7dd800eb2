"""The fast path against the slow literal twin (reference.py), and what follows from the definitions by law."""

import threading
from dataclasses import replace
from functools import cache

import pytest
import reference
import torch
from torch import Tensor
from transformers import StoppingCriteria

from latentmem.core.memory import Memory, draw, kept
from latentmem.core.read import read
from latentmem.core.settings import MemorySettings
from latentmem.core.write import write_paper
from latentmem.decoder.attention import NAME
from latentmem.decoder.cache import attention_mask
from latentmem.decoder.decoder import Decoder
from latentmem.model.backbone import Trained, fingerprint
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model, updated

N, K = 12, 4
ATTENTION = ("sdpa", "eager", NAME)
FIRST = 1  # the sink's token: bos of the tiny model
A = [7, 91, 33, 250, 18, 64, 5, 5, 120, 77, 201]
Q = [40, 9, 133, 8, 222]


def tiny(attention):
    """Weights small enough that float32 noise stays well below 1e-5, large enough that attention is not uniform."""
    return tiny_model(attention=attention, initializer_range=0.15)


@cache
def shared(attention="sdpa"):
    """A model that no test changes."""
    return MemoryModel(tiny(attention))


@cache
def released(attention="sdpa"):
    """A model with random bos, mark and pool, as a released checkpoint has them."""
    base = tiny(attention)
    L, d = base.config.num_hidden_layers, base.config.hidden_size
    old = torch.zeros(L, N, dtype=torch.int32)
    pool = Memory(random(L, N, d), old, old - 1, MemorySettings(N, K, "paper"), model=fingerprint(base))
    return MemoryModel(base, trained=Trained(random(L, 1, d, seed=1), random(d, seed=2), pool))


@cache
def speaking():
    return MemoryModel(tiny_model(), byte_tokenizer())


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(n, seed=0):
    return torch.randint(4, 260, (n,), generator=torch.Generator().manual_seed(seed))


def holding(llm, M, seed=3, **settings):
    """A memory of M random slots."""
    memory = llm.empty(**{"N": N, "K": K, **settings})
    old = torch.zeros(memory.L, M, dtype=torch.int32)
    return replace(memory, slots=random(memory.L, M, memory.d, seed=seed), births=old, origins=old - 1)


def gap(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def trainable(attention="sdpa"):
    llm = MemoryModel(tiny(attention))
    llm.base.requires_grad_(True)
    return llm


def grads(loss, slots, model):
    """Gradients of a scalar in the slots and in every weight; zero where there is none."""
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, [slots, *weights], allow_unused=True)
    inputs = [slots, *weights]
    filled = (torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True))
    return dict(zip(["slots", *names], filled, strict=True))


def same_gradients(ours, theirs):
    """Each within 1e-5 of its own largest entry, and those that matter most are there."""
    assert theirs["slots"].abs().max() > 0 and theirs["model.layers.0.self_attn.k_proj.weight"].abs().max() > 0
    for name, g in theirs.items():
        largest = g.abs().max().item()
        assert gap(ours[name], g) <= 1e-5 * largest, name


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 7, N])
@pytest.mark.parametrize("n", [K + 3, K, K - 1, 1])
@pytest.mark.parametrize("attention", ATTENTION)
def test_logits_behind_a_memory_equal_the_reference(attention, M, n):
    llm, ids = shared(attention), text(n)
    memory = holding(llm, M)
    with torch.no_grad():
        logits = llm.logits(memory, ids)
        assert logits.abs().max() > 0.5
        assert gap(logits, reference.read(llm.base, llm.first, memory.slots, ids)) < 1e-5


@pytest.mark.parametrize("attention", ATTENTION)
def test_logits_behind_a_released_pool_equal_the_reference(attention):
    llm = released(attention)
    with torch.no_grad():
        theirs = reference.read(llm.base, llm.trained.bos, llm.trained.pool.slots, A)
        assert gap(llm.logits(llm.empty(), A), theirs) < 1e-5


def test_the_sink_is_the_first_tokens_hidden_state_at_each_layer():
    llm = shared()
    with torch.no_grad():
        assert gap(llm.first, reference.sink(llm.base, FIRST)) < 1e-5


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("preset", ["exact", "paper"])
def test_an_empty_memory_is_the_plain_model_to_the_bit(attention, preset):
    llm = shared(attention)
    memory = llm.empty(N, K, preset)
    ids = torch.tensor([A])
    with torch.no_grad():
        assert torch.equal(llm.logits(memory, A), llm.base(input_ids=ids).logits[0])
    greedy = llm.base.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    assert torch.equal(llm.generate_ids(memory, A, max_new_tokens=8), greedy)


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1, 2, 4])
@pytest.mark.parametrize("M", [0, 7, N])
@pytest.mark.parametrize("attention", ATTENTION)
def test_exact_new_slots_equal_the_reference(attention, M, c):
    llm = shared(attention)
    memory = holding(llm, M, compression=c)
    for n in sorted({1, K - 1, K, K + 1, K * c - 1, K * c} & set(range(1, K * c + 1))):
        with torch.no_grad():
            new = llm.new_slots(memory, text(n))
            theirs = reference.write_exact(llm.base, llm.first, memory.slots, text(n), c)
        assert new.shape[1] == -(-n // c) <= K
        assert gap(new, theirs) < 1e-5, n


@pytest.mark.parametrize("c", [2, 4])
@pytest.mark.parametrize("M", [0, 7, N])
@pytest.mark.parametrize("attention", ATTENTION)
def test_slots_of_the_least_expected_tokens_equal_the_reference(attention, M, c):
    llm = shared(attention)
    memory = holding(llm, M, compression=c, choice="surprise")
    for n in (1, K, K + 1, K * c - 1, K * c):
        with torch.no_grad():
            new = llm.new_slots(memory, text(n))
            theirs = reference.write_exact(llm.base, llm.first, memory.slots, text(n), c, "surprise")
            plain = reference.write_exact(llm.base, llm.first, memory.slots, text(n), c)
        assert gap(new, theirs) < 1e-5, n
        assert n < K * c or gap(new, plain) > 1e-2


def test_least_expected_tokens_of_several_memories_are_chosen_as_alone():
    llm = shared()
    memories = [holding(llm, M, compression=c, choice="surprise") for M, c in ((0, 2), (7, 3), (N, 2))]
    texts = [text(n) for n in (2 * K, 3 * K - 1, K + 1)]
    for one, together in zip(memories, llm.write_ids(memories, texts), strict=True):
        assert gap(together.slots, llm.write_ids(one, texts[memories.index(one)]).slots) < 1e-4


def test_surprise_of_a_long_text_is_computed_piece_by_piece(monkeypatch):
    llm = shared()
    memory = holding(llm, 7, compression=2, choice="surprise")
    whole = llm.new_slots(memory, text(2 * K))
    monkeypatch.setattr("latentmem.core.write.AT_ONCE", 3)
    assert torch.equal(llm.new_slots(memory, text(2 * K)), whole)


@pytest.mark.parametrize("c", [1, 2])
def test_a_text_longer_than_a_piece_is_no_single_update(c):
    llm = shared()
    with pytest.raises(ValueError, match=f"at most {K * c} tokens, got {K * c + 1}"):
        llm.new_slots(holding(llm, 7, compression=c), text(K * c + 1))


@pytest.mark.parametrize("n", [K + 3, K, K - 1, 1])
@pytest.mark.parametrize("m", [0, 2, K])
@pytest.mark.parametrize("attention", ATTENTION)
def test_paper_new_slots_with_mark_and_bos_equal_the_reference(attention, m, n):
    base = shared(attention).base
    L, d = base.config.num_hidden_layers, base.config.hidden_size
    bos, mark, newest = random(L, 1, d, seed=4), random(d, seed=5), random(L, m, d, seed=6)
    with torch.no_grad():
        new = write_paper(Decoder(base), bos, mark, newest, text(n), K)
        assert new.shape[1] == min(K, n + m)
        assert gap(new, reference.write_paper(base, bos, mark, newest, text(n), K)) < 1e-5


@pytest.mark.parametrize("n", [K + 3, K, K - 1, 1])
@pytest.mark.parametrize("attention", ATTENTION)
def test_paper_new_slots_of_a_released_model_equal_the_reference(attention, n):
    llm = released(attention)
    memory, extra = llm.empty(), llm.trained
    with torch.no_grad():
        theirs = reference.write_paper(llm.base, extra.bos, extra.mark, memory.slots, text(n), K)
        unmarked = reference.write_paper(llm.base, extra.bos, 0 * extra.mark, memory.slots, text(n), K)
        assert gap(llm.new_slots(memory, text(n)), theirs) < 1e-5
        assert gap(theirs, unmarked) > 0.1


@pytest.mark.parametrize("n", [K + 3, K - 1, 1])
@pytest.mark.parametrize("M", [0, 2, 7, N])
def test_paper_new_slots_of_an_untrained_model_have_the_sink_and_no_mark(M, n):
    llm = shared()
    memory = holding(llm, M, preset="paper")
    with torch.no_grad():
        theirs = reference.write_paper(llm.base, llm.first, torch.zeros(memory.d), memory.slots, text(n), K)
        assert gap(llm.new_slots(memory, text(n)), theirs) < 1e-5


@pytest.mark.parametrize(("preset", "c"), [("exact", 1), ("exact", 2), ("paper", 1)])
def test_write_ids_in_pieces_equals_new_slots_and_update_step_by_step(preset, c):
    llm = shared()
    memory = holding(llm, 7, preset=preset, compression=c)
    ids = text(1030 if preset == "paper" else 4 * K * c + 3)
    written, stepped = llm.write_ids(memory, ids, "a"), memory
    with torch.no_grad():
        for piece in ids.split(memory.piece):
            stepped = updated(stepped, llm.new_slots(stepped, piece), source="a", tokens=len(piece))
    for name in ("slots", "births", "origins"):
        assert torch.equal(getattr(written, name), getattr(stepped, name)), name
    assert (written.updates, written.tokens, written.sources) == (stepped.updates, stepped.tokens, stepped.sources)
    assert written.tokens == len(ids) and written.updates == -(-len(ids) // memory.piece) > 1


def test_write_ids_reports_every_piece():
    llm, calls = shared(), []
    llm.write_ids(llm.empty(N, K), text(10), progress=lambda *at: calls.append(at))
    assert calls == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize(("capacity", "piece"), [(12, 4), (300, 70)])  # below and above one block of projection
@pytest.mark.parametrize("attention", ATTENTION)
def test_keys_and_values_kept_through_drops_equal_a_fresh_projection_to_the_bit(attention, capacity, piece):
    llm = shared(attention)
    memory = llm.empty(capacity, piece, seed=1)
    for step in range(7):
        memory = llm.write_ids(memory, text(piece - step % 3, seed=step))
        derived = llm.prefixes.get(memory)
        with torch.no_grad():
            fresh = read(llm.decoder, llm.first, memory.slots)
        assert derived.P == fresh.P == 1 + memory.M
        for name in ("keys", "rotated", "values"):
            assert all(map(torch.equal, getattr(derived, name), getattr(fresh, name))), (step, name)
    assert capacity == memory.M and memory.tokens > capacity


# --- the law: a memory that is not full is a context ----------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[11], [4, 4, 3], [1] * 11, [5, 6]])
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_memory_that_is_not_full_reads_like_the_text_in_the_context(attention, pieces):
    llm = shared(attention)
    memory = llm.empty(16, max(pieces))
    for piece in torch.tensor(A).split(pieces):
        memory = llm.write_ids(memory, piece)
    assert memory.updates == len(pieces) and len(A) == memory.M
    with torch.no_grad():
        plain = llm.base(input_ids=torch.tensor([[FIRST, *A, *Q]])).logits[0, -len(Q) :]
        assert gap(llm.logits(memory, Q), plain) < 1e-4


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients_of_logits_equal_the_reference(attention):
    llm, ids = trainable(attention), text(K + 3)
    memory = holding(llm, 7)
    memory.slots.requires_grad_()
    weight = random(len(ids), 260, seed=8)
    ours = grads((llm.logits(memory, ids) * weight).sum(), memory.slots, llm.base)
    theirs = (reference.read(llm.base, llm.first, memory.slots, ids) * weight).sum()
    same_gradients(ours, grads(theirs, memory.slots, llm.base))


@pytest.mark.parametrize(("preset", "c", "n"), [("exact", 1, K), ("exact", 2, 2 * K), ("paper", 1, 7), ("paper", 1, 2)])
@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients_of_new_slots_equal_the_reference(attention, preset, c, n):
    llm, ids = trainable(attention), text(n)
    memory = holding(llm, 7, preset=preset, compression=c)
    memory.slots.requires_grad_()
    new = llm.new_slots(memory, ids)
    weight = random(*new.shape, seed=9)
    ours = grads((new * weight).sum(), memory.slots, llm.base)
    if preset == "exact":
        theirs = reference.write_exact(llm.base, llm.first, memory.slots, ids, c)
    else:
        theirs = reference.write_paper(llm.base, llm.first, torch.zeros(memory.d), memory.slots, ids, K)
    same_gradients(ours, grads((theirs * weight).sum(), memory.slots, llm.base))


@pytest.mark.parametrize("preset", ["exact", "paper"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients_through_write_update_write_update_read_equal_the_reference(attention, preset):
    llm = trainable(attention)
    memory = holding(llm, 10, preset=preset)
    start = memory.slots.requires_grad_()
    first, second = text(K, seed=1), text(K - 1, seed=2)
    weight = random(len(Q), 260, seed=8)

    slots = start
    for ids in (first, second):
        if preset == "exact":
            new = reference.write_exact(llm.base, llm.first, slots, ids)
        else:
            new = reference.write_paper(llm.base, llm.first, torch.zeros(memory.d), slots, ids, K)
        stays = kept(draw(memory, new.shape[1]), memory.M)
        slots = torch.stack([torch.cat([slots[i][stays[i]], new[i]]) for i in range(memory.L)])
        memory = updated(memory, llm.new_slots(memory, ids))
        assert gap(memory.slots, slots) < 1e-5
    assert memory.M == N and memory.updates == 2
    ours = grads((llm.logits(memory, Q) * weight).sum(), start, llm.base)
    theirs = (reference.read(llm.base, llm.first, slots, Q) * weight).sum()
    same_gradients(ours, grads(theirs, start, llm.base))


@pytest.mark.parametrize("attention", ATTENTION)
def test_the_form_with_gradients_equals_the_form_without(attention):
    llm, memory = trainable(attention), holding(shared(attention), 7)
    logits, new = llm.logits(memory, Q), llm.new_slots(memory, text(K))
    assert logits.requires_grad and new.requires_grad
    with torch.no_grad():
        assert gap(logits, llm.logits(memory, Q)) < 1e-5
        assert gap(new, llm.new_slots(memory, text(K))) < 1e-5


@pytest.mark.parametrize("gradients", [True, False])
def test_a_cache_that_does_not_store_reads_the_same_any_number_of_times(gradients):
    llm = trainable()
    memory, ids = holding(llm, 7), torch.tensor([Q])
    with torch.set_grad_enabled(gradients):
        cache = llm.functional(memory) if gradients else llm.prefix(memory).cache(store=False)
        first, second = (
            llm.base(input_ids=ids, attention_mask=attention_mask(cache, ids), past_key_values=cache).logits
            for _ in range(2)
        )
    assert torch.equal(first, second) and cache.get_seq_length() == llm.positions(memory)


# --- generate -------------------------------------------------------------------------------------------------------


def following(llm, memory, ids):
    """Logits of the next token, by the reference."""
    with torch.no_grad():
        return reference.read(llm.base, llm.first, memory.slots, ids)[-1]


def test_greedy_generation_equals_a_slow_loop_over_the_reference():
    for llm, memory in ((shared(), holding(shared(), 7)), (released(), released().empty())):
        ids = list(Q)
        while len(ids) < len(Q) + 16 and ids[-1] != 2:
            ids.append(int(following(llm, memory, ids).argmax()))
        assert len(ids) > len(Q) + 8
        assert llm.generate_ids(memory, Q, max_new_tokens=16)[0].tolist() == ids


def test_sampling_three_answers_equals_a_slow_loop_over_the_reference():
    llm = shared()
    memory = holding(llm, 7)
    sample = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 10, "top_k": 0}
    torch.manual_seed(4)
    rows = [list(Q) for _ in range(3)]
    for _ in range(10):
        logits = torch.stack([following(llm, memory, row) for row in rows])
        drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0].tolist()
        for row, token in zip(rows, drawn, strict=True):
            row.append(0 if 2 in row[len(Q) :] else token)  # pad behind eos
    torch.manual_seed(4)
    assert llm.generate_ids(memory, Q, **sample).tolist() == rows
    assert len({tuple(row) for row in rows}) == 3


def test_beams_equal_beams_of_the_plain_model_with_the_text_in_its_context():
    llm = shared()
    memory = llm.write_ids(llm.empty(16, K), A)
    prompt = torch.tensor([[FIRST, *A, *Q]])
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 10, "do_sample": False}
    plain = llm.base.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, prompt.shape[1] :]
    ours = llm.generate_ids(memory, Q, **options)[:, len(Q) :]
    greedy = llm.generate_ids(memory, Q, max_new_tokens=10)[:, len(Q) :]
    assert torch.equal(ours, plain)
    assert not torch.equal(ours[:1], greedy)  # else this would prove little


@pytest.mark.parametrize("M", [7, N])
def test_a_second_turn_on_the_same_cache_equals_asking_from_scratch(M):
    llm = shared()
    memory = holding(llm, M)
    cache = llm.text_cache(memory)
    one = llm.generate_ids(memory, Q, cache=cache, max_new_tokens=6)[0].tolist()
    assert cache.get_seq_length() == llm.positions(memory) + len(one) - 1  # the last token was not read yet
    two = llm.generate_ids(memory, [one[-1], *A], cache=cache, max_new_tokens=6)[0].tolist()
    assert one[:-1] + two == llm.generate_ids(memory, one + A, max_new_tokens=6)[0].tolist()


def test_a_cache_that_was_cut_back_equals_asking_from_scratch():
    llm = shared()
    memory = holding(llm, N)
    cache = llm.text_cache(memory)
    llm.generate_ids(memory, A, cache=cache, max_new_tokens=6)
    cache.crop(llm.positions(memory) + 5 - cache.get_seq_length())
    assert cache.get_seq_length() == llm.positions(memory) + 5
    other = llm.generate_ids(memory, Q, cache=cache, max_new_tokens=6)[0].tolist()
    assert A[:5] + other == llm.generate_ids(memory, A[:5] + Q, max_new_tokens=6)[0].tolist()


def test_generation_leaves_the_memory_and_its_prefix_as_they_were():
    llm = shared()
    memory = holding(llm, 7)
    before = llm.logits(memory, Q)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        llm.generate_ids(memory, A, max_new_tokens=4, **options)
        assert torch.equal(llm.logits(memory, Q), before)


def test_an_answer_that_may_outgrow_the_context_is_refused():
    llm = shared()
    memory = holding(llm, 7)
    room = 1024 - 1 - 7
    for options in ({"max_new_tokens": room - len(Q) + 1}, {"max_length": room + 1}):
        with pytest.raises(ValueError, match=f"room for {room}"):
            llm.generate_ids(memory, Q, **options)
    assert llm.generate_ids(memory, Q, max_length=len(Q) + 2).shape == (1, len(Q) + 2)


# --- streaming ------------------------------------------------------------------------------------------------------


class Counted(StoppingCriteria):
    """Counts the tokens that were made."""

    def __init__(self):
        self.made = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.made += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_streamed_pieces_join_to_the_answer():
    llm = speaking()
    memory = llm.write(llm.empty(64, 16), "The mill stands at the river.")
    pieces = list(llm.stream(memory, "Where?", max_new_tokens=60))
    answer = llm.ask(memory, "Where?", max_new_tokens=60)
    assert len(answer) > 8 and sum(map(bool, pieces)) > 1
    assert "".join(pieces).strip() == answer


def test_leaving_a_stream_early_stops_the_generation():
    llm, counted, threads = speaking(), Counted(), set(threading.enumerate())
    memory = llm.write(llm.empty(64, 16), "The mill stands at the river.")
    stream = llm.stream(memory, "Where?", max_new_tokens=300, min_new_tokens=300, stopping_criteria=[counted])
    next(stream)
    stream.close()
    assert 1 <= counted.made < 300 and set(threading.enumerate()) <= threads


def test_an_error_in_a_stream_reaches_its_reader():
    llm = speaking()
    with pytest.raises(ValueError, match="room for"):
        list(llm.stream(llm.empty(64, 16), "Where?", max_new_tokens=5000))


def test_writing_while_an_answer_is_being_streamed_changes_neither():
    llm = speaking()
    memory = llm.write(llm.empty(64, 16), "The mill stands at the river.")
    answer, written = llm.ask(memory, "Where?", max_new_tokens=200), llm.write_ids(memory, A).slots
    pieces = []
    for piece in llm.stream(memory, "Where?", max_new_tokens=200):
        assert torch.equal(llm.write_ids(memory, A).slots, written)  # the answer goes on afterwards
        pieces.append(piece)
    assert "".join(pieces).strip() == answer
