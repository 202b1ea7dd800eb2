"""Attention for half precision on CPU: the same as transformers' own, taken over only where its mask is understood."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from latentmem.core import attention
from latentmem.core.attention import NAME, _known, choose, grouped
from latentmem.model import MemoryModel
from latentmem.testing import tiny_model

HEADS = [(9, 3), (4, 4), (4, 1)]
TEXT, QUESTION = list(range(10, 30)), [3, 4, 5, 6]
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "llama": {},
    "cohere2": WINDOW,
    "gemma3_text": {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8},
    "mistral": {"head_dim": 8, "sliding_window": 8},
    "olmo3": WINDOW,
}


@pytest.fixture
def stock(monkeypatch):
    """The masks with which transformers' own function was called through `grouped`."""
    masks = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    return masks


def inputs(B, n, P, heads=9, shared=3, width=8):
    """Module, queries, keys and values, laid out as a model does."""
    generator = torch.Generator().manual_seed(B * 1000 + n * 100 + P)
    sizes = [(n, heads), (P + n, shared), (P + n, shared)]
    states = [torch.randn(B, *size, width, generator=generator).transpose(1, 2) for size in sizes]
    return SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True), *states


def made(B, n, P, window=None, padding=()):
    """The mask that transformers makes; `padding`: (row, from, to) of positions that hold no text."""
    text = torch.ones(B, P + n, dtype=torch.bool)
    for row, start, end in padding:
        text[row, start:end] = False
    rule = sliding_window_causal_mask_function(window) if window else causal_mask_function
    sizes = {"batch_size": B, "q_length": n, "kv_length": P + n, "q_offset": P}
    return sdpa_mask(**sizes, mask_function=rule, attention_mask=text, allow_is_causal_skip=False)


@torch.no_grad()
def difference(parts, mask, **kwargs):
    theirs, _ = sdpa_attention_forward(*parts, mask, **kwargs)
    ours, weights = grouped(*parts, mask, **kwargs)
    assert weights is None and ours.shape == theirs.shape and ours.is_contiguous()
    return (ours - theirs).abs().max().item()


# --- one call -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(("heads", "shared"), HEADS)
@pytest.mark.parametrize("B", [1, 3])
def test_one_query_without_a_mask(stock, B, heads, shared, scaling):
    assert difference(inputs(B, 1, 20, heads, shared), None, scaling=scaling) < 1e-5
    assert not stock


@pytest.mark.parametrize(("heads", "shared"), HEADS)
@pytest.mark.parametrize("window", [None, 5])
def test_one_query_with_padding(stock, window, heads, shared):
    parts, padding = inputs(3, 1, 20, heads, shared), [(0, 0, 4), (2, 12, 19)]
    mask = made(3, 1, 20, window, padding)
    assert not mask.all() and difference(parts, mask, scaling=0.3) < 1e-5
    assert difference(parts, None, scaling=0.3) < 1e-5 and not stock
    with torch.no_grad():
        assert (grouped(*parts, mask)[0] - grouped(*parts, None)[0]).abs().max() > 1e-2  # the mask matters


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(("heads", "shared"), HEADS)
@pytest.mark.parametrize("B", [1, 3])
def test_queries_that_see_all_that_came_before_them(stock, B, heads, shared, scaling):
    for n, P in ((7, 20), (2, 1), (20, 3)):
        parts = inputs(B, n, P, heads, shared)
        for mask in (made(B, n, P), made(1, n, P), made(B, n, P, window=n + P)):
            assert difference(parts, mask, scaling=scaling) < 1e-5
    assert not stock


def float_mask(n, P):
    return torch.zeros(1, 1, n, P + n).masked_fill(~made(1, n, P), torch.finfo(torch.float32).min)


ELSEWHERE = {
    "no mask": lambda B, n, P: None,
    "a sliding window": lambda B, n, P: made(B, n, P, window=4),
    "a sliding window that hides one position": lambda B, n, P: made(B, n, P, window=n + P - 1),
    "padding before the prefix": lambda B, n, P: made(B, n, P, padding=[(row, 0, 2) for row in range(B)]),
    "padding behind the prefix": lambda B, n, P: made(B, n, P, padding=[(row, P, P + 2) for row in range(B)]),
    "padding in one row": lambda B, n, P: made(B, n, P, padding=[(B - 1, P, P + 1)]),
    "padding in the middle of one row": lambda B, n, P: made(B, n, P, padding=[(B - 1, P + 2, P + 3)]),
    "both directions": lambda B, n, P: torch.ones(B, 1, n, P + n, dtype=torch.bool),
    "a mask of floats": lambda B, n, P: float_mask(n, P),
}


@pytest.mark.parametrize("mask", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize("B", [1, 3])
def test_queries_with_any_other_mask_go_to_transformers(stock, B, mask):
    mask = mask(B, 7, 20)
    assert difference(inputs(B, 7, 20), mask, scaling=0.3) == 0
    assert len(stock) == 1 and stock[0] is mask


def test_one_query_with_a_mask_of_floats_goes_to_transformers(stock):
    assert difference(inputs(1, 1, 20), float_mask(1, 20)) == 0
    assert len(stock) == 1


@pytest.mark.parametrize("n", [1, 7])
def test_what_has_no_prefix_goes_to_transformers(stock, n):
    for mask in (None, made(3, n, 0)):
        assert difference(inputs(3, n, 0), mask) == 0
    assert len(stock) == 2


@pytest.mark.parametrize("n", [1, 7])
def test_what_has_gradients_goes_to_transformers(stock, n):
    parts, mask = inputs(3, n, 20), made(3, n, 20)
    parts[1].requires_grad_()
    out, _ = grouped(*parts, mask)
    assert len(stock) == 1 and torch.equal(out, sdpa_attention_forward(*parts, mask)[0])
    out.sum().backward()
    assert parts[1].grad is not None


@torch.no_grad()
def test_dropout_goes_to_transformers(stock):
    grouped(*inputs(3, 1, 20), None, dropout=0.5)
    assert len(stock) == 1
    grouped(*inputs(3, 1, 20), None, dropout=0.0)
    assert len(stock) == 1


@pytest.mark.parametrize("B", [1, 3])
def test_a_mask_that_is_wrong_in_one_place_is_not_known(B):
    n, P = 4, 3
    mask = made(B, n, P).clone()
    assert _known(mask, n, P)
    for place in mask.nonzero().tolist() + (~mask).nonzero().tolist():
        mask[tuple(place)] ^= True
        assert not _known(mask, n, P), place
        mask[tuple(place)] ^= True
    assert _known(mask, n, P)


# --- in a model -----------------------------------------------------------------------------------------------------


def test_it_is_registered():
    assert AttentionInterface()[NAME] is grouped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_only_half_precision_with_sdpa_is_switched(kind, dtype):
    model = tiny_model(attention=kind).to(dtype)
    expected = NAME if kind == "sdpa" and dtype != torch.float32 else kind
    choose(model)
    assert model.config._attn_implementation == expected
    choose(model)
    assert model.config._attn_implementation == expected
    assert MemoryModel(tiny_model(attention=kind).to(dtype)).base.config._attn_implementation == expected


def half(family):
    """A model in bfloat16, its plain logits of text and question before it was switched, and how large they are."""
    base = tiny_model(family, **FAMILIES[family]).bfloat16()
    assert base.config._attn_implementation == "sdpa"
    plain = base(torch.tensor([[1, *TEXT, *QUESTION]])).logits[0, -len(QUESTION) :]
    return MemoryModel(base, first_token=1), plain, plain.abs().max()


@torch.no_grad()
def test_behind_a_memory_it_differs_from_sdpa_in_rounding_alone(stock):
    llm, _, scale = half("llama")
    memory = llm.write_ids(llm.empty(N=64, K=16), TEXT)
    other = MemoryModel(tiny_model().bfloat16(), first_token=1)
    other.base.set_attn_implementation("sdpa")
    assert memory.M == 20
    for ids in (QUESTION, QUESTION[:1]):
        stock.clear()
        ours, theirs = llm.logits(memory, ids), other.logits(memory, ids)
        assert not stock, "the model did not use what is tested here"
        assert (ours - theirs).abs().max() < 0.05 * scale
        assert (ours - llm.logits(llm.empty(N=64, K=16), ids)).abs().max() > 0.5 * scale  # the memory matters


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_law_holds_in_bfloat16(family, stock):
    llm, plain, scale = half(family)
    assert (plain - llm.logits(llm.empty(N=64, K=16), QUESTION)).abs().max() > 0.5 * scale  # the text matters
    for K in (30, 7):
        memory = llm.write_ids(llm.empty(N=64, K=K), TEXT)
        assert memory.M == 20
        stock.clear()
        assert (llm.logits(memory, QUESTION) - plain).abs().max() < 0.05 * scale
        sliding = {"llama": 0, "mistral": 3}.get(family, 2)
        assert len(stock) == sliding, "sliding layers go to transformers, and no others"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_law_holds_in_bfloat16_in_greedy_generation_past_the_window(family, stock):
    llm, _, scale = half(family)
    memory = llm.write_ids(llm.empty(N=64, K=7), TEXT)
    stock.clear()
    answer = llm.generate_ids(memory, QUESTION, max_new_tokens=20)[0, len(QUESTION) :]
    assert all(mask.shape[2] == len(QUESTION) for mask in stock), "one query never goes to transformers"
    assert len(answer) == 20 and len(set(answer.tolist())) > 2
    context = torch.tensor([[1, *TEXT, *QUESTION, *answer.tolist()]])
    logits = llm.base(context, use_cache=False).logits[0, -21:-1]  # without a prefix: all of it through transformers
    chosen = logits.gather(1, answer[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < 0.05 * scale  # up to ties in bfloat16
