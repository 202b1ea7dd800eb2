"""The memory as a value: its update, its random drops, its books."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmem.core.memory import Memory, Source, draw, empty, half_life, kept, survival
from latentmem.core.settings import MemorySettings
from latentmem.core.sources import forget, pin
from latentmem.store.states import account_of
from latentmem.store.views import forecast
from latentmem.testing import labelled_memory, updated


def holding(L, M, N, K, *, seed=0, updates=0, d=1):
    """A memory whose slots are labelled 0..M-1 in every layer, all older than the memory."""
    slots = torch.arange(M, dtype=torch.float32)[None, :, None].repeat(L, 1, d)
    old = torch.zeros(L, M, dtype=torch.int32)
    return Memory(slots, old, old - 1, MemorySettings(N, K, seed=seed), updates=updates)


def labels(L, k, first):
    return torch.arange(first, first + k, dtype=torch.float32)[None, :, None].repeat(L, 1, 1)


# --- drop, keep the order, append -----------------------------------------------------------------------------------


def test_a_memory_that_is_not_full_only_grows():
    memory = labelled_memory(3, N=12, K=4)
    for step in range(3):
        memory = updated(memory, labels(3, 4, 4 * step))
    assert memory.M == memory.N == 12
    assert torch.equal(memory.slots, labels(3, 12, 0))


@pytest.mark.parametrize(("M", "k", "count"), [(12, 4, 4), (12, 1, 1), (10, 4, 2), (8, 4, 0), (12, 12, 12), (0, 12, 0)])
def test_exactly_as_many_slots_drop_as_do_not_fit_and_the_order_is_kept(M, k, count):
    memory = holding(3, M, N=12, K=4)
    after = updated(memory, labels(3, k, 100))
    assert draw(memory, k).shape == (3, count)
    assert M + k - count == after.M
    for layer, dropped in zip(after.slots[:, :, 0].tolist(), draw(memory, k).tolist(), strict=True):
        assert layer == [i for i in range(M) if i not in dropped] + list(range(100, 100 + k))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_update_drops_the_needed_count_and_keeps_the_order(data):
    L, N = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    K, M, k = (data.draw(st.integers(low, N)) for low in (1, 0, 1))
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    memory = holding(L, M, N, K, seed=seed, updates=data.draw(st.integers(0, 10**6)))
    dropped = draw(memory, k)
    after = updated(memory, labels(L, k, 100))
    assert min(M + k, N) == after.M and dropped.shape == (L, max(0, M + k - N))
    for i in range(L):
        gone, stays = set(dropped[i].tolist()), after.slots[i, :-k, 0].tolist()
        assert len(gone) == dropped.shape[1] and dropped[i].tolist() == sorted(gone)
        assert gone | set(stays) == set(range(M)) and gone.isdisjoint(stays) and stays == sorted(stays)
        assert kept(dropped, M)[i].tolist() == stays
        assert after.slots[i, -k:, 0].tolist() == list(range(100, 100 + k))


def test_given_indices_are_dropped_in_any_order():
    memory = holding(2, 5, N=6, K=3)
    after = updated(memory, labels(2, 3, 100), dropped=torch.tensor([[4, 0], [1, 2]]))
    assert after.slots[:, :, 0].tolist() == [[1, 2, 3, 100, 101, 102], [0, 3, 4, 100, 101, 102]]


def test_the_old_memory_stays_as_it_was_and_shares_nothing_with_the_next():
    for M in (0, 5, 12):
        memory, new = holding(2, M, N=12, K=4), labels(2, 4, 100)
        before = [t.clone() for t in (memory.slots, memory.births, memory.origins)]
        after = updated(memory, new, source="a", tokens=9)
        after.slots.mul_(7.0)
        assert (memory.updates, memory.tokens, memory.sources) == (0, 0, ())
        assert all(map(torch.equal, before, (memory.slots, memory.births, memory.origins)))
        assert torch.equal(new, labels(2, 4, 100))


@pytest.mark.parametrize("form", ["int8", "coded"])
def test_slots_of_coded_updates_are_numbers(form):
    numbers = empty(2, 8, MemorySettings(8, 4, form=form))
    assert (numbers.slots.dtype, numbers.d) == (torch.int64, 1)
    for slots in (torch.zeros(2, 0, 8), torch.zeros(2, 0, 1), torch.zeros(2, 0, 8).long(), torch.zeros(2, 0).long()):
        with pytest.raises(ValueError, match=r"coded \[L, M, 1\] int64: got \["):
            replace(numbers, slots=slots)
    with pytest.raises(ValueError, match="coded"):
        empty(2, 8, MemorySettings(8, 4)).with_settings(form=form)


def test_a_memory_shows_itself_in_one_line():
    memory = updated(labelled_memory(3, N=12, K=4), labels(3, 4, 0), source="a")
    assert repr(memory) == "Memory(L=3, M=4/12, d=1, exact, 1 updates, 1 sources)"


def test_a_memory_can_not_be_assigned_to():
    with pytest.raises(FrozenInstanceError):
        labelled_memory(1, N=4, K=2).N = 5


def test_gradients_reach_new_slots_and_the_old_ones_that_stay():
    memory = holding(2, 5, N=6, K=3)
    slots, new = memory.slots.requires_grad_(), labels(2, 3, 100).requires_grad_()
    dropped = torch.tensor([[0, 4], [1, 2]])
    updated(memory, new, dropped=dropped).slots.sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new))
    assert torch.equal(slots.grad[:, :, 0], torch.ones(2, 5).scatter(1, dropped, 0.0))


# --- the draw -------------------------------------------------------------------------------------------------------


def test_layers_draw_differently():
    rows = draw(holding(8, 100, N=100, K=30), 30).tolist()
    assert len({tuple(row) for row in rows}) == 8


def test_the_draw_is_a_function_of_seed_update_and_layer_alone():
    base = draw(holding(3, 50, 50, 10, seed=1, updates=5), 10)
    assert torch.equal(base, draw(holding(3, 50, 50, 10, seed=1, updates=5), 10))
    other_content = replace(holding(3, 50, 50, 10, seed=1, updates=5, d=4), tokens=99, sources=(Source("a", 1, 1),))
    assert torch.equal(base, draw(other_content, 10))
    assert torch.equal(base[:2], draw(holding(2, 50, 50, 10, seed=1, updates=5), 10))
    assert not torch.equal(base, draw(holding(3, 50, 50, 10, seed=2, updates=5), 10))
    assert not torch.equal(base, draw(holding(3, 50, 50, 10, seed=1, updates=6), 10))


def test_the_draw_neither_reads_nor_moves_torchs_global_generator():
    memory = holding(3, 50, 50, 10)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(memory, 10)
    updated(memory, labels(3, 10, 100))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, draw(memory, 10))


@pytest.mark.parametrize(
    ("seed", "updates", "k", "drawn"),
    [
        (0, 0, 4, [[3, 5, 8, 10], [2, 4, 9, 11], [6, 7, 8, 9]]),
        (0, 1, 4, [[4, 6, 7, 8], [2, 5, 7, 8], [0, 5, 8, 11]]),
        (7, 0, 4, [[3, 5, 9, 11], [2, 4, 9, 10], [1, 4, 7, 10]]),
        (-1, 5, 3, [[0, 1, 4], [3, 9, 10], [0, 5, 8]]),
        (2**63 - 1, 10**6, 2, [[6, 9], [5, 9], [4, 9]]),
    ],
)
def test_the_drawn_indices_never_change_between_versions(seed, updates, k, drawn):
    # Stored memories are rebuilt from their journals by these very drops: never adapt the numbers to the code.
    assert draw(holding(3, 12, 12, 4, seed=seed, updates=updates), k).tolist() == drawn


def test_the_draw_equals_splitmix64_in_plain_integers():
    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def key(seed, updates, layer, slot):
        x = mix((mix((mix(seed % 2**64) + updates) % 2**64) + layer) % 2**64)
        x = mix((x + slot) % 2**64)
        return x - 2**64 if x >= 2**63 else x

    for seed in (0, 1, -1, 12345, 2**63 - 1, -(2**63)):
        for updates in (0, 1, 999):
            found = draw(holding(3, 20, 20, 6, seed=seed, updates=updates), 6).tolist()
            for layer in range(3):
                order = sorted(range(20), key=lambda slot: key(seed, updates, layer, slot))
                assert found[layer] == sorted(order[:6])


def chances(M, count, draws, layers=4):
    """How often each slot, and each pair of slots, was dropped in `draws` draws of each of `layers` layers."""
    gone = torch.zeros(draws, layers, M)
    for updates in range(draws):
        gone[updates].scatter_(1, draw(holding(layers, M, M, count, seed=11, updates=updates), count), 1.0)
    return gone


def test_every_slot_and_every_pair_of_slots_is_dropped_equally_often():
    M, count, draws, layers = 12, 4, 3000, 4
    gone = chances(M, count, draws, layers).reshape(-1, M)
    n, p = len(gone), count / M
    # Drawing without replacement: the variances of the M counts are n p (1 - p), and their sum is fixed.
    chi2 = ((gone.sum(0) - n * p) ** 2).sum().item() / (n * p * (1 - p)) * (M - 1) / M
    assert abs(chi2 - (M - 1)) < 4 * math.sqrt(2 * (M - 1))
    pair = count * (count - 1) / (M * (M - 1))
    together = (gone.T @ gone)[*torch.triu_indices(M, M, 1)]
    assert ((together - n * pair).abs() < 4 * math.sqrt(n * pair * (1 - pair))).all()


def test_draws_of_neighbouring_layers_and_updates_are_independent():
    M, count, draws = 12, 4, 3000
    gone = chances(M, count, draws)
    p = count / M
    for one, other in ((gone[:, 0], gone[:, 1]), (gone[:-1, 0], gone[1:, 0])):
        n = len(one)
        both = one.T @ other  # [M, M]: how often slot i went here and slot j there
        assert ((both - n * p * p).abs() < 4.5 * math.sqrt(n * p * p * (1 - p * p))).all()


# --- survival -------------------------------------------------------------------------------------------------------


def test_over_10000_updates_the_share_left_at_each_age_is_that_of_the_paper():
    L, N, K, steps, ages = 4, 60, 2, 10_000, 101
    memory = labelled_memory(L, N, K, seed=5)
    left = torch.zeros(ages)
    full = N // K  # after this many updates every further one drops K of N
    for step in range(1, steps + 1):
        memory = updated(memory, torch.full((L, K, 1), float(step)))
        age = step - memory.births
        left += torch.bincount(age[(memory.births >= full) & (age < ages)], minlength=ages)
    assert torch.equal(memory.slots[:, :, 0], memory.births.float())  # the slots are their own labels
    for t in range(ages):
        slots = (steps - t - full + 1) * K * L  # observed at age t, whether left or not
        p = survival(N, K, t)
        # Slots of one draw repel each other, so the binomial deviation is an upper bound.
        assert abs(left[t].item() - slots * p) <= 4 * math.sqrt(slots * p * (1 - p)), t
    assert abs(left[20].item() / ((steps - 20 - full + 1) * K * L) - 0.5) < 0.03  # half-life 20.4


@pytest.mark.parametrize(("N", "K", "expected"), [(30, 1, 20.4), (7680, 256, 20.4), (50, 1, 34.3), (12800, 256, 34.3)])
def test_half_life_is_that_of_the_paper(N, K, expected):
    assert round(half_life(N, K), 1) == expected
    assert labelled_memory(1, N, K).half_life == half_life(N, K)
    assert math.isclose(((N - K) / N) ** half_life(N, K), 0.5)


def test_survival_begins_at_one_and_ends_where_an_update_replaces_everything():
    assert survival(60, 2, 0) == 1.0 and survival(60, 2, 1) == 58 / 60
    assert half_life(4, 4) == 0.0 and survival(4, 4, 1) == 0.0


# --- the books ------------------------------------------------------------------------------------------------------


def test_births_origins_and_sources_say_what_each_slot_is():
    memory = updated(holding(2, 3, N=8, K=4), labels(2, 2, 10), source="a", tokens=5)
    memory = updated(memory, labels(2, 1, 20), source="b", tokens=3)
    memory = updated(memory, labels(2, 2, 30), source="a", tokens=4)
    assert memory.births[0].tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert memory.origins[0].tolist() == [-1, -1, -1, 0, 0, 1, 0, 0]
    assert memory.births.dtype == memory.origins.dtype == torch.int32
    assert memory.sources == (Source("a", tokens=9, slots=4), Source("b", tokens=3, slots=1))
    assert (memory.updates, memory.tokens) == (3, 12)
    assert memory.slots_left().tolist() == [[4, 4], [1, 1]]


def test_the_books_follow_their_slots_through_drops():
    memory = labelled_memory(3, N=10, K=4, seed=2)
    for step in range(1, 30):
        memory = updated(memory, torch.full((3, 4, 1), float(step)), source=f"s{step % 5}", tokens=1)
    assert torch.equal(memory.births.float(), memory.slots[:, :, 0])
    names = [source.name for source in memory.sources]
    assert names == ["s1", "s2", "s3", "s4", "s0"]
    for i, name in enumerate(names):
        held = (memory.slots[:, :, 0] % 5 == int(name[1])).sum(1)
        assert memory.slots_left()[i].tolist() == held.tolist()
    assert memory.slots_left().sum(0).tolist() == [10, 10, 10]
    assert sum(source.slots for source in memory.sources) == 29 * 4


def test_a_memory_without_sources_has_nothing_left():
    assert labelled_memory(3, N=4, K=2).slots_left().shape == (0, 3)


def test_the_next_memory_is_unsaved_and_points_to_its_newest_saved_ancestor():
    memory = replace(labelled_memory(1, N=4, K=2), version="v1", parent="v0")
    once = updated(memory, labels(1, 2, 0))
    twice = updated(once, labels(1, 2, 2))
    assert [(m.version, m.parent) for m in (once, twice)] == [("", "v1"), ("", "v1")]


def test_an_update_keeps_what_it_does_not_change():
    memory = replace(
        empty(2, 3, MemorySettings(8, 2, compression=4, seed=9)), model="m", adapters="a", tokenizer="t", model_name="n"
    )
    after = updated(memory, torch.zeros(2, 2, 3))
    for name in ("N", "K", "preset", "compression", "seed", "model", "adapters", "tokenizer", "model_name"):
        assert getattr(after, name) == getattr(memory, name)
    assert after.slots.dtype == memory.slots.dtype


def test_a_piece_is_k_times_c_tokens_and_512_in_the_preset_paper():
    assert empty(1, 1, MemorySettings(N=8, K=4)).piece == 4
    assert empty(1, 1, MemorySettings(N=8, K=4, compression=3)).piece == 12
    assert empty(1, 1, MemorySettings(N=8, K=4, preset="paper")).piece == 512


# --- pins -----------------------------------------------------------------------------------------------------------


def stream_of(*names, L=3, N=12, K=4, k=2, seed=3, memory=None):
    """A memory into which each of the names wrote k slots that carry its place in the row, in turn."""
    memory = memory or labelled_memory(L, N, K, seed=seed)
    for name in names:
        memory = updated(memory, torch.full((memory.L, k, 1), float(memory.updates)), source=name, tokens=k)
    return memory


def test_a_pinned_source_loses_nothing_until_it_is_unpinned():
    memory = pin(stream_of("a", "b", "a"), "a")
    after = stream_of(*"bcde" * 10, memory=memory)
    assert after.slots_left()[0].tolist() == [4, 4, 4] and after.M == after.N
    assert after.slots[:, :4, 0].tolist() == [[0, 0, 2, 2]] * 3
    assert stream_of(*"bcde" * 10, memory=pin(after, "a", False)).slots_left()[0].sum() == 0


def test_what_is_not_pinned_is_drawn_in_its_own_order_by_the_same_keys():
    memory = stream_of(*"abcdef")
    whole = [_order(memory, layer) for layer in range(3)]
    pinned = pin(memory, "c")
    for layer, drawn in enumerate(draw(pinned, 3).tolist()):
        free = [slot for slot in whole[layer] if not pinned.pinned()[layer, slot]]
        assert drawn == sorted(free[:3])


def _order(memory, layer):
    """All slots of a layer of a full memory, in the order in which larger and larger draws take them."""
    order = []
    for k in range(1, memory.N + 1):
        order += [slot for slot in draw(memory, k)[layer].tolist() if slot not in order]
    return order


def test_the_quota_bounds_what_is_pinned_when_pinning_and_when_a_pinned_source_grows():
    memory = stream_of(*"aaabb", N=12)
    held = pin(memory, "a")
    with pytest.raises(ValueError, match=r"8 of N=12 slots.*quota is 0.5.*6"):
        updated(held, labels(3, 2, 0), source="a")
    with pytest.raises(ValueError, match="10 of N=12"):
        pin(held, "b")
    pin(held.with_settings(quota=0.9), "b")
    assert updated(held, labels(3, 2, 0), source="b").M == 12
    with pytest.raises(ValueError, match="no source 'z'"):
        pin(memory, "z")
    for quota in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            memory.with_settings(quota=quota)


def test_an_update_that_does_not_fit_beside_what_is_pinned_is_refused():
    held = pin(stream_of("a", "a", "a", "b", "b", "b", K=12), "a")
    assert updated(held, labels(3, 6, 0), source="c").slots_left()[0].tolist() == [6, 6, 6]
    with pytest.raises(ValueError, match="7 new slots do not fit beside 6 pinned"):
        updated(held, labels(3, 7, 0), source="c")


# --- forgetting a source --------------------------------------------------------------------------------------------


def test_forgetting_drops_a_source_in_every_layer_and_as_many_others_where_fewer_are_left():
    memory = stream_of(*"abcdabcdabcd" * 3, k=1)
    left = memory.slots_left()
    i = [source.name for source in memory.sources].index("b")
    assert len(set(left[i].tolist())) > 1, "proves nothing: as many in every layer"
    after = forget(memory, "b")
    names = [source.name for source in after.sources]
    assert names == ["a", "c", "d"] and left[i].max() == memory.M - after.M
    for layer in range(memory.L):
        before = [(m, b, o) for m, b, o in zip(*_books(memory, layer), strict=True) if o != "b"]
        here = list(zip(*_books(after, layer), strict=True))
        assert [row for row in before if row in here] == here
        assert len(before) - len(here) == left[i].max() - left[i, layer]
    assert (after.updates, after.tokens, after.parent) == (memory.updates, memory.tokens, memory.parent)
    assert torch.equal(after.slots, forget(memory, "b").slots)


def _books(memory, layer):
    names = [memory.sources[i].name for i in memory.origins[layer].tolist()]
    return memory.slots[layer, :, 0].tolist(), memory.births[layer].tolist(), names


def test_forgetting_spares_what_is_pinned_and_forgets_what_is_pinned_when_told():
    memory = stream_of(*"abcabcdabe")
    held = pin(memory.with_settings(quota=1.0), "e")
    names = [source.name for source in memory.sources]
    after = forget(held, "b")
    assert after.slots_left()[-1].tolist() == held.slots_left()[names.index("e")].tolist()
    assert "e" not in [source.name for source in forget(held, "e").sources]


def test_forgetting_the_only_source_leaves_an_empty_memory_that_goes_on():
    memory = forget(stream_of("a", "a"), "a")
    assert (memory.M, memory.sources) == (0, ())
    assert stream_of("b", memory=memory).slots_left().tolist() == [[2, 2, 2]]
    with pytest.raises(ValueError, match="no source 'a'"):
        forget(memory, "a")


def test_an_account_without_slots_is_forgotten_too():
    memory = stream_of("a", *"bcde" * 20)
    assert memory.slots_left()[0].sum() == 0
    after = forget(memory, "a")
    assert torch.equal(after.slots, memory.slots) and torch.equal(after.origins, memory.origins - 1)


# --- the forecast ---------------------------------------------------------------------------------------------------


def test_the_forecast_is_one_until_the_memory_is_full_and_then_the_survival_law():
    memory = stream_of("a", "a", "a", N=13, K=4)
    assert [forecast(account_of(memory), t) for t in (0, 1)] == [1.0, 1.0]
    assert forecast(account_of(memory), 2) == pytest.approx(1 - 1 / 10)  # 10 slots, 4 more come, 13 fit
    assert forecast(account_of(memory), 5) == pytest.approx(0.9 * survival(13, 4, 3))


def test_the_forecast_is_what_is_left_on_average_also_beside_pins():
    N, K, t = 40, 4, 9
    for pinned in (False, True):
        left = []
        for seed in range(60):
            memory = stream_of("a", "a", *"bcdefg", N=N, K=K, k=4, L=4, seed=seed)
            memory = pin(memory, "b") if pinned else memory
            later = stream_of(*"x" * t, k=4, memory=memory)
            left.append(later.slots_left()[0].double().mean() / memory.slots_left()[0].double().mean())
        expected = forecast(account_of(memory), t)
        assert abs(torch.stack(left).mean().item() - expected) < 0.025, pinned
        assert expected == pytest.approx((1 - K / (N - 4 * pinned)) ** (t - 2))
    assert forecast(account_of(pin(memory.with_settings(quota=1.0), "a")), 1000) < 1e-9


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"N": 4, "K": 5}, "K=5, N=4"),
        ({"N": 4, "K": 0}, "K=0"),
        ({"N": 0, "K": 0}, "N=0"),
        ({"compression": 0}, "compression"),
        ({"compression": 2, "preset": "paper"}, "compression"),
        ({"preset": "papers"}, "exact, paper"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        empty(1, 1, MemorySettings(**{"N": 8, "K": 4, **arguments}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": torch.zeros(2, 3)}, r"\[L, M, d\].*\[2, 3\]"),
        ({"slots": torch.zeros(2, 9, 1)}, "N=8.*M=9"),
        ({"births": torch.zeros(2, 4, dtype=torch.int32)}, "births.*2, 3"),
        ({"origins": torch.zeros(3, 3, dtype=torch.int32)}, "origins.*2, 3"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(holding(2, 3, N=8, K=4), **changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 9, 1), "between 1 and N=8.*got 9"),
        ((2, 0, 1), "got 0"),
        ((3, 2, 1), r"\[3, 2, 1\]"),
        ((2, 2, 5), r"\[2, 2, 5\]"),
        ((2, 2), r"\[2, 2\]"),
    ],
)
def test_new_slots_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        updated(holding(2, 3, N=8, K=4), torch.zeros(shape))


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ([[0], [1]], r"name 2 slots.*\[2, 1\]"),
        ([[0, 1]], r"\[1, 2\]"),
        ([0, 1], r"\[2\]"),
        ([[0, 1], [3, 3]], "different indices"),
        ([[0, 1], [3, 8]], "M - 1 = 7"),
        ([[-1, 1], [3, 4]], "between 0"),
    ],
)
def test_dropped_indices_that_do_not_fit_are_refused(dropped, message):
    with pytest.raises(ValueError, match=message):
        updated(holding(2, 8, N=8, K=4), labels(2, 2, 100), dropped=torch.tensor(dropped))


def test_nothing_may_be_dropped_while_there_is_room():
    with pytest.raises(ValueError, match="name 0 slots"):
        updated(holding(2, 3, N=8, K=4), labels(2, 2, 100), dropped=torch.tensor([[0], [0]]))
