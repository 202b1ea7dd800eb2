"""Attention behind a memory that was handed over: the same as transformers' own over memory and text in one piece."""

import threading
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from latentmem.decoder import attention
from latentmem.decoder.attention import (
    CUDA,
    NAME,
    Memories,
    _contiguous,
    attend,
    attend_without_mask,
    choose,
    hand_over,
    mask_if_needed,
)
from latentmem.decoder.cache import MemoryCache, MemoryLayer, attention_mask
from latentmem.model.model import MemoryModel
from latentmem.testing import tiny_model

HEADS = [(9, 3), (4, 4), (4, 1)]
LENGTHS = [(7, 7, 20), (2, 9, 1), (20, 20, 3), (4, 31, 5)]  # queries, text, memory
TEXT, QUESTION = list(range(10, 30)), [3, 4, 5, 6]
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "llama": {},
    "cohere2": WINDOW,
    "gemma3_text": {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8},
    "mistral": {"head_dim": 8, "sliding_window": 8},
    "olmo3": WINDOW,
}
SLIDING = {"llama": 0, "mistral": 3}  # layers of three, by default two
every_heads = pytest.mark.parametrize(("heads", "shared"), HEADS)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def stock(monkeypatch):
    """The calls of transformers' own function through `attend`."""
    calls = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        calls.append(SimpleNamespace(query=query, key=key, value=value, mask=attention_mask, options=kwargs))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    return calls


def inputs(B, n=1, t=1, P=20, heads=9, shared=3, width=8):
    """Module; queries of n tokens, keys and values of t, laid out as a model does; keys and values of a memory."""
    generator = torch.Generator().manual_seed(B * 1000 + n * 100 + P)
    sizes = [(B, n, heads), (B, t, shared), (B, t, shared), (1, P, shared), (1, P, shared)]
    states = [torch.randn(*size, width, generator=generator).transpose(1, 2) for size in sizes]
    return SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True), *states


def made(B, n, t, P, window=None, padding=()):
    """The mask that transformers makes; `padding`: (row, from, to) of positions that hold no text."""
    held = torch.ones(B, P + t, dtype=torch.bool)
    for row, start, end in padding:
        held[row, start:end] = False
    rule = sliding_window_causal_mask_function(window) if window else causal_mask_function
    sizes = {"batch_size": B, "q_length": n, "kv_length": P + t, "q_offset": P + t - n}
    return sdpa_mask(**sizes, mask_function=rule, attention_mask=held, allow_is_causal_skip=False)


def ours(module, query, key, value, keys, values, mask, **options):
    hand_over(key, value, Memories([(keys, values)], [0] * len(key)))
    output, weights = attend(module, query, key, value, mask, **options)
    assert weights is None
    return output


def joined(memory, text):
    return torch.cat([memory.expand(text.shape[0], -1, -1, -1), text], dim=2)


def theirs(module, query, key, value, keys, values, mask, **options):
    return sdpa_attention_forward(module, query, joined(keys, key), joined(values, value), mask, **options)[0]


def gap(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@torch.no_grad()
def difference(parts, mask, **options):
    return gap(ours(*parts, mask, **options), theirs(*parts, mask, **options))


def no_padding(mask):
    """Which queries look at themselves, [B, n]."""
    return mask[:, 0].diagonal(mask.shape[3] - mask.shape[2], 1, 2)


# --- one call -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, 0.3])
@every_heads
@pytest.mark.parametrize("B", [1, 3])
def test_one_query_without_a_mask(stock, B, heads, shared, scaling):
    for t, P in ((1, 20), (7, 20), (20, 1)):
        assert difference(inputs(B, 1, t, P, heads, shared), None, scaling=scaling) < 1e-5
    assert not stock


@every_heads
def test_one_query_with_padding(stock, heads, shared):
    for t in (9, 14):
        parts, padding = inputs(3, 1, t, 20, heads, shared), [(0, 20, 24), (2, 20, 28)]
        mask = made(3, 1, t, 20, padding=padding)
        assert not mask.all() and difference(parts, mask, scaling=0.3) < 1e-5
        with torch.no_grad():
            assert gap(ours(*parts, mask), ours(*parts, None)) > 1e-2  # the mask matters
    assert not stock


@pytest.mark.parametrize("scaling", [None, 0.3])
@every_heads
@pytest.mark.parametrize("B", [1, 3])
def test_queries_that_see_all_that_came_before_them(stock, B, heads, shared, scaling):
    for n, t, P in LENGTHS:
        parts = inputs(B, n, t, P, heads, shared)
        for mask in (made(B, n, t, P), made(1, n, t, P), made(B, n, t, P, window=t + P)):
            assert difference(parts, mask, scaling=scaling) < 1e-5
    assert not stock


@every_heads
@torch.no_grad()
def test_rows_with_padding_between_memory_and_text(stock, heads, shared):
    for n, t, P in LENGTHS:
        parts = inputs(3, n, t, P, heads, shared)
        for one, other in ((1, t - 1), (t // 2, 0)):
            mask = made(3, n, t, P, padding=[(0, P, P + one), (2, P, P + other)])
            real = no_padding(mask)
            assert real[1].all() and real[:, -1].all()
            assert gap(ours(*parts, mask)[real], theirs(*parts, mask)[real]) < 1e-5
            assert ours(*parts, mask).isfinite().all()
            assert gap(ours(*parts, mask)[real], ours(*parts, made(3, n, t, P))[real]) > 1e-2  # the mask matters
    assert not stock


@pytest.mark.parametrize("B", [1, 3])
def test_any_mask_over_the_text_as_long_as_all_of_the_memory_is_seen(stock, B):
    for n, t, P in LENGTHS:
        mask = torch.rand(B, 1, n, P + t, generator=torch.Generator().manual_seed(n)) < 0.5
        mask[..., :P] = True
        assert difference(inputs(B, n, t, P), mask) < 1e-5
    assert not stock


@torch.no_grad()
def test_the_memory_matters_and_the_rows_do_not_mix(stock):
    module, query, key, value, keys, values = inputs(3, 4, 6, 20)
    mask = made(3, 4, 6, 20)
    output = ours(module, query, key, value, keys, values, mask)
    assert output.is_contiguous() and output.shape == (3, 4, 9, 8)
    assert gap(output, ours(module, query, key, value, keys.flip(2), values, mask)) > 0.1
    assert gap(output, ours(module, query, key, value, keys, -values, mask)) > 0.1
    alone = [ours(module, query[[i]], key[[i]], value[[i]], keys, values, mask[[i]]) for i in range(3)]
    assert gap(output, torch.cat(alone)) < 1e-5
    assert not stock


@pytest.mark.parametrize("padding", [[], [(0, 20, 23), (2, 20, 25)]])
@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 7), (7, 7), (4, 9)])
@every_heads
@pytest.mark.parametrize("B", [1, 3])
def test_gradients_equal_those_of_transformers(stock, B, heads, shared, n, t, padding):
    parts = inputs(B, n, t, 20, heads, shared)
    padding = [(row, start, min(end, 19 + t)) for row, start, end in padding if row < B]
    mask = made(B, n, t, 20, padding=padding) if n > 1 or padding else None
    leaves = [part.requires_grad_() for part in parts[1:]]
    real = torch.ones(B, n, dtype=torch.bool) if mask is None else no_padding(mask)
    weight = torch.randn(B, n, heads, 8, generator=torch.Generator().manual_seed(1))[real]
    found, expected = (torch.autograd.grad((way(*parts, mask)[real] * weight).sum(), leaves) for way in (ours, theirs))
    for mine, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-2 and gap(mine, other) < 1e-5 * max(1, other.abs().max())
    assert not stock


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that was made; a view counts as what it looks at."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.numbers = max(self.numbers, output.untyped_storage().nbytes() // output.element_size())
        return output


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2])
def test_one_memory_is_not_copied_for_each_row(stock, n):
    parts = inputs(8, n, 2, 100, 4, 4, width=64)
    mask, memory = made(8, n, 2, 100), parts[-1].numel()
    with Largest() as largest:
        ours(*parts, mask)
    assert not stock and largest.numbers == memory  # where it lies, and nothing larger is made
    with Largest() as largest:
        theirs(*parts, mask)
    assert largest.numbers >= 8 * memory


# --- several memories -----------------------------------------------------------------------------------------------


def several(lengths, B, n, t, heads=9, shared=3, width=8):
    """As `inputs`, and keys and values of a memory of each length."""
    module, query, key, value, *_ = inputs(B, n, t, 1, heads, shared, width)
    generator = torch.Generator().manual_seed(sum(lengths))
    return (module, query, key, value), [
        tuple(torch.randn(1, shared, P, width, generator=generator) for _ in range(2)) for P in lengths
    ]


def read(parts, memories, rows, mask, stack=None):
    hand_over(parts[2], parts[3], Memories(memories, rows, stack and (lambda: stack)))
    return attend(*parts, mask)[0]


def each(parts, memories, rows, masks):
    """Every row alone, by transformers' own function."""
    module, query, key, value = parts
    return torch.cat(
        [
            theirs(module, query[[b]], key[[b]], value[[b]], *memories[i], mask)
            for b, (i, mask) in enumerate(zip(rows, masks, strict=True))
        ]
    )


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [0, 0, 1, 1, 2, 2], [1, 0, 1, 2, 0, 1]])
@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 6), (5, 5), (3, 70), (70, 70), (130, 130)])
@pytest.mark.parametrize("lengths", [(20, 3, 11), (7, 7, 7)])
@every_heads
def test_each_row_reads_its_own_memory(stock, heads, shared, lengths, n, t, rows):
    B, P = len(rows), max(lengths)
    parts, memories = several(lengths, B, n, t, heads, shared)
    mask = made(B, n, t, P, padding=[(b, 0, P - lengths[i]) for b, i in enumerate(rows)])
    alone = [made(1, n, t, lengths[i]) for i in rows]
    leaves = [part.requires_grad_() for part in (*parts[1:], *(x for memory in memories for x in memory))]
    found = read(parts, memories, rows, mask)
    assert len(stock) == (n >= attention.LONG) * sum(rows.count(i) == 1 for i in range(3))
    expected = each(parts, memories, rows, alone)
    assert gap(found, expected) < 1e-5
    if n == 1 and len(set(lengths)) == 1:
        assert gap(read(parts, memories, rows, None), expected) < 1e-5
    if rows == [0, 1, 2]:
        stack = attention.Stack.of(memories)
        assert stack.keys.shape == (3, shared, P, 8) and (stack.beyond is None) == (len(set(lengths)) == 1)
        assert gap(read(parts, memories, rows, mask, stack), expected) < 1e-5
    for mine, other in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        assert other.abs().max() > 1e-2 and gap(mine, other) < 1e-4 * max(1, other.abs().max())


@torch.no_grad()
def test_a_neighbours_memory_changes_no_bit(stock):
    for n, t in ((1, 4), (6, 6)):
        parts, memories = several((20, 9, 14), 3, n, t)
        mask = made(3, n, t, 20, padding=[(1, 0, 11), (2, 0, 6)])
        before = read(parts, memories, [0, 1, 2], mask)
        memories[1] = tuple(x + 1 for x in memories[1])
        after = read(parts, memories, [0, 1, 2], mask)
        assert torch.equal(before[[0, 2]], after[[0, 2]]) and gap(before[1], after[1]) > 0.1
        stack = attention.Stack.of(memories)
        one = read(parts, memories, [0, 1, 2], mask, stack)
        stack.keys[1] += 1
        two = read(parts, memories, [0, 1, 2], mask, stack)
        assert torch.equal(one[[0, 2]], two[[0, 2]]) and gap(one[1], two[1]) > 0.1
    assert not stock


@torch.no_grad()
def test_memories_of_which_a_window_hides_a_part_go_to_transformers(stock):
    for mask in (made(2, 4, 4, 9, window=5, padding=[(1, 0, 4)]), made(2, 4, 4, 9)):  # and one that shows padding
        parts, memories = several((9, 5), 2, 4, 4)
        found = read(parts, memories, [0, 1], mask)
        keys, values = attention.stacked(memories, [0, 1])
        assert (
            keys.shape == (2, 3, 9, 8) and not keys[1, :, :4].any() and torch.equal(keys[1, :, 4:], memories[1][0][0])
        )
        text = torch.cat([keys, parts[2]], 2), torch.cat([values, parts[3]], 2)
        assert torch.equal(found, sdpa_attention_forward(*parts[:2], *text, mask)[0])
        assert len(stock) == 1
        stock.clear()


@torch.no_grad()
def test_several_memories_are_not_copied(stock):
    parts, memories = several([100] * 8, 8, 1, 2, 4, 4, width=64)
    with Largest() as largest:
        read(parts, memories, list(range(8)), None)
    assert largest.numbers == memories[0][0].numel() and not stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 2])
@torch.no_grad()
def test_a_long_text_of_one_row_goes_to_transformers_in_float32(stock, B, dtype):
    for n in (attention.LONG - 1, attention.LONG):
        parts = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in inputs(B, n, n)]
        ours(*parts, made(B, n, n, 20))
        assert bool(stock) == (n >= attention.LONG and B == 1 and dtype == torch.float32)
        stock.clear()


# --- what goes to transformers --------------------------------------------------------------------------------------


def float_mask(*sizes):
    mask = made(*sizes)
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


ELSEWHERE = {
    "no mask": lambda B, n, t, P: None,
    "a sliding window": lambda B, n, t, P: made(B, n, t, P, window=4),
    "a sliding window that hides one position": lambda B, n, t, P: made(B, n, t, P, window=t + P - 1),
    "padding before the memory": lambda B, n, t, P: made(B, n, t, P, padding=[(row, 0, 2) for row in range(B)]),
    "a hole in the memory of one row": lambda B, n, t, P: made(B, n, t, P, padding=[(B - 1, P - 1, P)]),
    "a mask of floats": float_mask,
}


def gets_all(call, parts, mask):
    """Whether transformers' function got memory and text in one piece, and all else as it came."""
    _, query, key, value, keys, values = parts
    same = torch.equal(call.key, joined(keys, key)) and torch.equal(call.value, joined(values, value))
    return same and call.query is query and call.mask is mask


@pytest.mark.parametrize("mask", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize(("n", "t"), [(7, 7), (7, 12)])
@pytest.mark.parametrize("B", [1, 3])
def test_queries_with_any_other_mask_go_to_transformers(stock, B, n, t, mask):
    parts, mask = inputs(B, n, t), mask(B, n, t, 20)
    assert difference(parts, mask, scaling=0.3) == 0
    assert len(stock) == 1 and gets_all(stock[0], parts, mask) and stock[0].options == {"scaling": 0.3}


@pytest.mark.parametrize("mask", [made(3, 1, 5, 20, window=4), float_mask(3, 1, 5, 20)], ids=["window", "floats"])
def test_one_query_with_any_other_mask_goes_to_transformers(stock, mask):
    parts = inputs(3, 1, 5)
    assert difference(parts, mask) == 0
    assert len(stock) == 1 and gets_all(stock[0], parts, mask)


@pytest.mark.parametrize("n", [1, 7])
@torch.no_grad()
def test_dropout_goes_to_transformers(stock, n):
    parts, mask = inputs(3, n, 7), made(3, n, 7, 20)
    torch.manual_seed(5)
    output = ours(*parts, mask, dropout=0.5)
    assert len(stock) == 1 and gets_all(stock[0], parts, mask) and stock[0].options["dropout"] == 0.5
    torch.manual_seed(5)
    assert torch.equal(output, theirs(*parts, mask, dropout=0.5))
    assert difference(parts, mask, dropout=0.0) < 1e-5 and len(stock) == 1


@pytest.mark.parametrize("n", [1, 7])
def test_what_has_no_memory_goes_to_transformers(stock, n):
    module, query, key, value, *_ = inputs(3, n, n)
    for i, mask in enumerate((None, made(3, n, n, 0))):
        output, _ = attend(module, query, key, value, mask, scaling=0.3, is_causal=True)
        assert torch.equal(output, sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)[0])
        call = stock[i]
        assert call.query is query and call.key is key and call.value is value and call.mask is mask
        assert call.options == {"scaling": 0.3, "is_causal": True}
    assert len(stock) == 2


def test_a_memory_goes_to_transformers_with_its_gradients(stock):
    parts, mask = inputs(3, 7, 7), made(3, 7, 7, 20, window=4)
    leaves = [part.requires_grad_() for part in parts[1:]]
    found, expected = (torch.autograd.grad(way(*parts, mask).square().sum(), leaves) for way in (ours, theirs))
    assert all(map(torch.equal, found, expected)) and len(stock) == 1


def test_a_mask_that_hides_one_position_of_the_memory_from_one_query_is_seen():
    memories = [inputs(1, P=3)[-2:], inputs(1, P=2)[-2:]]
    for some, rows, padding in (
        (memories[:1], [0, 0], []),
        (memories, [0, 1], [(1, 0, 1)]),
        (memories, [1, 0], [(0, 0, 1)]),
    ):
        mask = made(2, 4, 4, 3, padding=padding).clone()
        read = Memories(some, rows)
        assert read.seen_whole(mask) and not read.seen_whole(mask.float())
        assert read.seen_whole(None) == (not padding)
        for place in torch.ones(mask.shape).nonzero().tolist():
            mask[tuple(place)] ^= True
            assert read.seen_whole(mask) == (place[-1] >= 3), place
            mask[tuple(place)] ^= True


# --- what is handed over --------------------------------------------------------------------------------------------


def works():
    return difference(inputs(3, 7, 7), made(3, 7, 7, 20)) < 1e-5


def test_keys_that_are_not_those_of_the_cache_are_refused(stock):
    module, query, key, value, keys, values = inputs(3)
    for other in (key.clone(), key[:], value):
        hand_over(key, value, Memories([(keys, values)], [0] * 3))
        with pytest.raises(RuntimeError, match="changed its keys"):
            attend(module, query, other, value, None)
        assert works()
    assert not stock


@pytest.mark.parametrize("memories", [1, 3])
def test_rows_are_chosen_and_repeated_as_often_as_asked(memories):
    _, _, key, value, keys, values = inputs(3)
    layer, rows = MemoryLayer([lambda: (keys, values)] * memories, 20, apart=True), [0, 0, 0, 0, 2, 2, 2, 2]
    layer.update(key, value)
    layer.batch_select_indices(torch.tensor([0, 2]))
    layer.batch_repeat_interleave(2)
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, key[rows]) and torch.equal(layer.values, value[rows])
    assert memories == 1 or layer.rows == rows


@pytest.mark.parametrize("other", ["keys", "values"])
def test_values_or_keys_alone_that_are_not_those_of_the_cache_are_refused(stock, other):
    module, query, key, value, keys, values = inputs(3)
    hand_over(key, value, Memories([(keys, values)], [0] * 3))
    with pytest.raises(RuntimeError, match="changed its keys"):
        attend(module, query, *((key[:], value) if other == "keys" else (key, value[:])), None)
    assert works() and not stock


def test_a_memory_that_was_not_read_is_noticed_at_the_next_layer(stock):
    _, _, key, value, keys, values = inputs(3)
    layers = [MemoryLayer([lambda: (keys, values)], 20, store=False, apart=True) for _ in range(2)]
    cache = MemoryCache([], layers)
    for _ in range(2):  # a pass that was broken off behind the first layer changes nothing for the next one
        cache.update(key, value, 0)
    with pytest.raises(RuntimeError, match="did not read its memory"):
        cache.update(key, value, 1)
    assert works() and not stock


def test_a_layer_whose_attention_does_not_get_the_keys_of_its_cache_is_refused_when_it_is_loaded(monkeypatch):
    attention_class = type(tiny_model().model.layers[0].self_attn)
    forward = attention_class.forward

    class Copies:
        def __init__(self, cache):
            self.cache = cache

        def update(self, *states):
            return tuple(x[:] for x in self.cache.update(*states))

    def copying(self, x, *args, past_key_values=None, **kwargs):
        return forward(self, x, *args, past_key_values=past_key_values and Copies(past_key_values), **kwargs)

    monkeypatch.setattr(attention_class, "forward", copying)
    with pytest.raises(ValueError, match="layer 0 does not get what its cache hands over"):
        MemoryModel(tiny_model())
    MemoryModel(tiny_model(attention="eager"))  # nothing is handed over


def test_what_a_broken_off_pass_left_is_gone_with_its_tensors(stock):
    parts = inputs(3)
    hand_over(*parts[2:4], Memories([parts[4:]], [0] * 3))
    again = inputs(3)
    attend(*again[:4], None)
    assert len(stock) == 1 and stock[0].key is again[2]


def test_a_memory_is_read_once(stock):
    parts = inputs(3)
    ours(*parts, None)
    attend(*parts[:4], None)
    assert len(stock) == 1 and stock[0].key is parts[2]


def test_after_an_error_inside_the_attention_the_next_one_works(stock):
    parts = inputs(3, 7, 7)
    with pytest.raises(RuntimeError):
        ours(*parts, torch.ones(3, 1, 7, 5, dtype=torch.bool))
    assert works() and not stock


def test_threads_do_not_see_each_others_memory(stock):
    barrier, outputs = threading.Barrier(3), {}

    def read(n, memory):
        module, query, key, value, keys, values = inputs(3, n, n)
        mask = made(3, n, n, 20 if memory else 0)
        if memory:
            hand_over(key, value, Memories([(keys, values)], [0] * 3))
        barrier.wait(timeout=300)
        outputs[n] = attend(module, query, key, value, mask)[0]
        barrier.wait(timeout=300)

    threads = [threading.Thread(target=read, args=args) for args in ((2, True), (3, True), (4, False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in (2, 3):
        assert gap(outputs[n], theirs(*inputs(3, n, n), made(3, n, n, 20))) < 1e-5
    assert torch.equal(outputs[4], sdpa_attention_forward(*inputs(3, 4, 4)[:4], made(3, 4, 4, 0))[0])
    assert len(stock) == 1


# --- without a mask -------------------------------------------------------------------------------------------------


@every_heads
def test_queries_at_the_end_of_all_keys_need_no_mask(heads, shared):
    for B, n, t in ((1, 5, 20), (3, 7, 7), (2, 1, 9), (1, 19, 20)):
        module, query, key, value, *_ = inputs(B, n, t, heads=heads, shared=shared)
        leaves = [part.requires_grad_() for part in (query, key, value)]
        found = attend_without_mask(module, query, key, value, None, scaling=0.3)[0]
        expected = sdpa_attention_forward(module, query, key, value, made(B, n, t, 0), scaling=0.3)[0]
        assert gap(found, expected) < 1e-5 and found.is_contiguous()
        for mine, other in zip(
            *(torch.autograd.grad(x.square().sum(), leaves) for x in (found, expected)), strict=True
        ):
            assert gap(mine, other) < 1e-4


def test_a_mask_is_made_only_where_something_is_hidden():
    sizes = {"batch_size": 2, "q_length": 4, "kv_length": 9, "q_offset": 5, "kv_offset": 0}
    window = sliding_window_causal_mask_function(6)
    padded = torch.ones(2, 9, dtype=torch.bool)
    assert mask_if_needed(**sizes) is None and mask_if_needed(**sizes, attention_mask=padded) is None
    assert mask_if_needed(**sizes, mask_function=window).shape == (2, 1, 4, 9)
    padded[1, 0] = False
    assert not mask_if_needed(**sizes, attention_mask=padded)[1, 0, :, 0].any()
    assert mask_if_needed(**{**sizes, "q_offset": 3}) is not None  # the last keys are not yet written


def test_without_a_mask_is_for_cuda():
    assert AttentionInterface()[CUDA] is attend_without_mask
    chosen, weight = [], SimpleNamespace(device=SimpleNamespace(type="cuda"))
    choose(
        SimpleNamespace(
            get_input_embeddings=lambda: SimpleNamespace(weight=weight),
            config=SimpleNamespace(_attn_implementation="sdpa"),
            set_attn_implementation=chosen.append,
        )
    )
    assert chosen == [CUDA]  # and no hook on the output layer


# --- which models ---------------------------------------------------------------------------------------------------


def test_it_is_registered():
    assert AttentionInterface()[NAME] is attend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_only_sdpa_is_switched(kind, dtype):
    model = tiny_model(attention=kind).to(dtype)
    expected = NAME if kind == "sdpa" else kind
    for _ in range(2):
        choose(model)
        assert model.config._attn_implementation == expected
    assert MemoryModel(tiny_model(attention=kind).to(dtype)).base.config._attn_implementation == expected


def test_a_model_on_another_device_stays_as_it_is():
    model = tiny_model().to("meta", torch.bfloat16)
    choose(model)
    assert model.config._attn_implementation == "sdpa" and not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_the_output_layer_gets_one_hook_that_changes_no_value(dtype):
    model, ids = tiny_model().to(dtype), torch.arange(4, 34).view(3, 10)
    plain = model(ids).logits
    for _ in range(2):
        choose(model)
        assert list(model.lm_head._forward_pre_hooks.values()) == [_contiguous]
        assert torch.equal(model(ids).logits, plain)
    assert list(MemoryModel(model).base.lm_head._forward_pre_hooks.values()) == [_contiguous]


@pytest.mark.parametrize("B", [1, 3])
@torch.no_grad()
def test_the_last_logits_are_those_of_all_logits(B):
    model, ids = tiny_model(initializer_range=0.1), torch.arange(4, 4 + 10 * B).view(B, 10)
    choose(model)
    logits = model(ids).logits
    for keep in (1, 4, 10):
        assert gap(model(ids, logits_to_keep=keep).logits, logits[:, -keep:]) < 1e-5


def test_the_output_layer_gets_the_strides_of_a_fresh_tensor():
    states = torch.arange(60.0).view(3, 5, 4)
    for part in (states, states[:, -1:], states[:, -2:], states[:1, -1:], states.transpose(0, 1)):
        (given,) = _contiguous(None, (part,))
        assert torch.equal(given, part) and given.stride() == torch.empty(part.shape).stride()


# --- in a model -----------------------------------------------------------------------------------------------------


@cache
def twice(family):
    """A model with this attention, and the same one with sdpa, both in float32."""
    found = [MemoryModel(tiny_model(family, **FAMILIES[family]), first_token=1) for _ in range(2)]
    found[1].base.set_attn_implementation("sdpa")  # as it is on other devices
    return found


def remembering(llm, K=7):
    memory = llm.write_ids(llm.empty(N=64, K=K), TEXT)
    assert memory.M == 20
    return memory


@every_family
@torch.no_grad()
def test_the_law_holds_as_with_sdpa(family, stock):
    (llm, other), outputs = twice(family), []
    assert [llm.base.config._attn_implementation, other.base.config._attn_implementation] == [NAME, "sdpa"]
    plain = other.base(torch.tensor([[1, *TEXT, *QUESTION]])).logits[0, -len(QUESTION) :]
    scale = plain.abs().max()
    for K in (30, 7, 1):
        memory = remembering(llm, K)
        stock.clear()
        outputs.append(llm.logits(memory, QUESTION))
        assert len(stock) == SLIDING.get(family, 2), "sliding layers go to transformers, and no others"
        assert gap(outputs[-1], plain) < 1e-5 * max(1, scale)
        assert gap(outputs[-1], other.logits(remembering(other, K), QUESTION)) < 1e-5 * max(1, scale)
    assert gap(outputs[0], llm.logits(llm.empty(N=64, K=16), QUESTION)) > 0.1 * scale  # the memory matters


@every_family
def test_greedy_answers_past_the_window_are_those_of_sdpa(family, stock):
    (llm, other), prompt = twice(family), torch.tensor([[1, *TEXT, *QUESTION]])
    memory = remembering(llm)
    stock.clear()
    answer = llm.generate_ids(memory, QUESTION, max_new_tokens=20, min_new_tokens=20)
    assert len(stock) == 20 * SLIDING.get(family, 2)
    assert torch.equal(answer, other.generate_ids(remembering(other), QUESTION, max_new_tokens=20, min_new_tokens=20))
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    plain = other.base.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
    assert torch.equal(answer[0, len(QUESTION) :], plain) and len(set(plain.tolist())) > 2


ANSWERS = {
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "samples": {"do_sample": True, "num_return_sequences": 4, "top_k": 0},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


@pytest.mark.parametrize("options", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_several_answers_are_those_of_sdpa(family, options, stock):
    answers = []
    for llm in twice(family):
        memory = remembering(llm)
        stock.clear()
        torch.manual_seed(3)
        answers.append(llm.generate_ids(memory, QUESTION, max_new_tokens=12, **options).tolist())
        assert family != "llama" or not stock
    assert answers[0] == answers[1] and len(answers[0]) == options.get("num_return_sequences", 1)
    assert len(set(map(tuple, answers[0]))) == len(answers[0])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_many_rows_behind_one_memory_are_those_of_sdpa(family, stock):
    prompts, answers = [[3, 4, 5, 6], [7], [40, 9, 133, 8, 222, 17, 18]], [[8, 9], [10, 11, 12], [13]]
    found = []
    for llm in twice(family):
        context = llm.context(remembering(llm))
        stock.clear()
        scores = llm.score_rows(context, prompts, answers)
        found.append(([row.tolist() for row in llm.generate_rows(context, prompts, 12)], scores))
        assert family != "llama" or not stock
    assert found[0][0] == found[1][0]
    for mine, other in zip(found[0][1], found[1][1], strict=True):
        assert gap(mine.logprobs, other.logprobs) < 1e-4 and torch.equal(mine.hits, other.hits)


def test_a_second_turn_on_the_same_cache_is_that_of_sdpa(stock):
    answers = []
    for llm in twice("llama"):
        memory = remembering(llm)
        cache = llm.text_cache(memory)
        stock.clear()
        one = llm.generate_ids(memory, QUESTION, cache=cache, max_new_tokens=6)[0].tolist()
        two = llm.generate_ids(memory, [one[-1], *TEXT[:5]], cache=cache, max_new_tokens=6)[0].tolist()
        answers.append(one[:-1] + two)
        assert not stock
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("n", "error"), [(1, "did not read its memory"), (4, "size")])
@torch.no_grad()
def test_a_model_that_does_not_read_what_was_handed_over_is_noticed(n, error):
    llm = MemoryModel(tiny_model(attention=NAME), first_token=1)
    memory, ids = remembering(llm), torch.tensor([QUESTION[:n]])
    expected, taken = llm.logits(memory, ids), llm.prefix(memory).cache(store=False)
    llm.base.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=error):
        llm.base(input_ids=ids, attention_mask=attention_mask(taken, ids), past_key_values=taken, use_cache=False)
    llm.base.set_attn_implementation(NAME)
    assert torch.equal(llm.logits(memory, ids), expected)


# --- in bfloat16 ----------------------------------------------------------------------------------------------------


def half(family):
    """A model in bfloat16, its plain logits of text and question before it was switched, and how large they are."""
    base = tiny_model(family, **FAMILIES[family]).bfloat16()
    assert base.config._attn_implementation == "sdpa"
    plain = base(torch.tensor([[1, *TEXT, *QUESTION]])).logits[0, -len(QUESTION) :]
    return MemoryModel(base, first_token=1), plain, plain.abs().max()


@torch.no_grad()
def test_behind_a_memory_it_differs_from_sdpa_in_rounding_alone(stock):
    llm, _, scale = half("llama")
    other = MemoryModel(tiny_model().bfloat16(), first_token=1)
    other.base.set_attn_implementation("sdpa")
    memory = remembering(llm)
    for ids in (QUESTION, QUESTION[:1]):
        stock.clear()
        found, expected = llm.logits(memory, ids), other.logits(memory, ids)
        assert not stock, "the model did not use what is tested here"
        assert gap(found, expected) < 0.05 * scale
        assert gap(found, llm.logits(llm.empty(N=64, K=16), ids)) > 0.5 * scale  # the memory matters


@every_family
@torch.no_grad()
def test_the_law_holds_in_bfloat16(family, stock):
    llm, plain, scale = half(family)
    assert gap(plain, llm.logits(llm.empty(N=64, K=16), QUESTION)) > 0.5 * scale  # the text matters
    for K in (30, 7):
        memory = remembering(llm, K)
        stock.clear()
        assert gap(llm.logits(memory, QUESTION), plain) < 0.05 * scale
        assert len(stock) == SLIDING.get(family, 2), "sliding layers go to transformers, and no others"


@every_family
@torch.no_grad()
def test_the_law_holds_in_bfloat16_in_greedy_generation_past_the_window(family):
    llm, _, scale = half(family)
    answer = llm.generate_ids(remembering(llm), QUESTION, max_new_tokens=20)[0, len(QUESTION) :]
    assert len(answer) == 20 and len(set(answer.tolist())) > 2
    context = torch.tensor([[1, *TEXT, *QUESTION, *answer.tolist()]])
    logits = llm.base(context, use_cache=False).logits[0, -21:-1]  # without a memory: all of it through transformers
    chosen = logits.gather(1, answer[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < 0.05 * scale  # up to ties in bfloat16
