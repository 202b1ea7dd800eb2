"""Many rows behind one context: each row is scored and continued as if it stood alone behind the text itself."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from test_adapters import adapted, tiny

from latentmem.core.memory import Memory
from latentmem.core.settings import MemorySettings
from latentmem.decoder.adapters import READ
from latentmem.model.backbone import Trained, fingerprint
from latentmem.model.model import MemoryModel
from latentmem.testing import tiny_model

FAMILIES = {
    "llama": {},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
FIRST, TEXT = 1, list(range(10, 40))
PROMPTS = [[3, 4, 5, 6], [7], [40, 9, 133, 8, 222, 17, 18, 19, 20, 21, 22, 23], [91, 77]]
ANSWERS = [[8, 9], [10, 11, 12, 13, 14, 15, 16], [13], [201, 5, 5]]
BEFORE = {"an empty memory": [], "a memory": [FIRST, *TEXT], "text": [FIRST, *TEXT], "nothing": []}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_context = pytest.mark.parametrize("kind", BEFORE)


@cache
def shared(family="llama"):
    """A model that no test changes."""
    return MemoryModel(tiny_model(family, **FAMILIES[family]), first_token=FIRST)


def untrained(**config):
    return MemoryModel(tiny_model(**config), first_token=FIRST)


def remembering(llm):
    return llm.write_ids(llm.empty(N=64, K=16), TEXT)


def made(llm, kind):
    if kind == "an empty memory":
        return llm.context(llm.empty(N=64, K=16))
    return llm.context(remembering(llm)) if kind == "a memory" else llm.text_context(BEFORE[kind])


@torch.no_grad()
def scored(model, before, prompt, answer):
    """Logprobs and hits of an answer in all of the text, by the plain model."""
    logits = model(torch.tensor([[*before, *prompt, *answer]]), use_cache=False).logits[0, -len(answer) - 1 : -1]
    target = torch.tensor(answer)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0], logits.argmax(-1) == target


@torch.no_grad()
def read(llm, memory, prompt, answer):
    """Logprobs and hits of an answer behind a memory, by `logits`."""
    logits = llm.logits(memory, [*prompt, *answer])[len(prompt) - 1 : -1]
    target = torch.tensor(answer)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0], logits.argmax(-1) == target


@torch.no_grad()
def continued(model, before, prompt, new):
    ids = torch.tensor([[*before, *prompt]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return output[0, ids.shape[1] :].tolist()


def row(i):
    return PROMPTS[i], ANSWERS[i]


def lists(rows):
    return [row.tolist() for row in rows]


def close(score, logprobs, hits, tolerance=1e-4):
    assert score.logprobs.shape == logprobs.shape
    return (score.logprobs - logprobs).abs().max() < tolerance and torch.equal(score.hits, hits)


# --- what rows are --------------------------------------------------------------------------------------------------


@every_context
@every_family
def test_rows_at_once_are_scored_as_each_alone(family, kind):
    llm = shared(family)
    context = made(llm, kind)
    for i, at_once in enumerate(llm.score_rows(context, PROMPTS, ANSWERS)):
        (alone,) = llm.score_rows(context, *([ids] for ids in row(i)))
        assert close(at_once, alone.logprobs, alone.hits)


@every_context
@every_family
def test_rows_at_once_are_scored_as_by_the_plain_model_on_all_of_the_text(family, kind):
    llm = shared(family)
    context = made(llm, kind)
    assert context.length == len(BEFORE[kind])
    scores = llm.score_rows(context, PROMPTS, ANSWERS)
    assert len(scores) == len(PROMPTS)
    for i, score in enumerate(scores):
        assert close(score, *scored(llm.base, BEFORE[kind], *row(i)))
        other = scored(llm.base, [] if BEFORE[kind] else TEXT, *row(i))
        assert not close(score, *other, tolerance=1e-2)  # the context matters


@every_context
@every_family
def test_rows_at_once_are_continued_as_each_alone(family, kind):
    llm = shared(family)
    context = made(llm, kind)
    alone = [llm.generate_rows(context, [prompt], 12)[0].tolist() for prompt in PROMPTS]
    assert lists(llm.generate_rows(context, PROMPTS, 12)) == alone


@every_context
@every_family
def test_a_row_alone_is_continued_as_by_the_plain_model_on_all_of_the_text(family, kind):
    llm = shared(family)
    context = made(llm, kind)
    for prompt in PROMPTS:
        assert lists(llm.generate_rows(context, [prompt], 12)) == [continued(llm.base, BEFORE[kind], prompt, 12)]


@every_context
@every_family
def test_rows_of_one_length_are_continued_as_by_the_plain_model_on_all_of_the_text(family, kind):
    llm, prompts = shared(family), [PROMPTS[2], PROMPTS[2][::-1], list(range(100, 112))]
    expected = [continued(llm.base, BEFORE[kind], prompt, 12) for prompt in prompts]
    assert lists(llm.generate_rows(made(llm, kind), prompts, 12)) == expected


@every_family
def test_behind_a_memory_rows_are_what_one_memory_and_one_row_give(family):
    llm = shared(family)
    for memory in (remembering(llm), llm.empty(N=64, K=16)):
        for i, at_once in enumerate(llm.score_rows(llm.context(memory), PROMPTS, ANSWERS)):
            prompt, answer = row(i)
            score = llm.score(memory, prompt, answer)
            assert close(at_once, score.logprobs, score.hits)
            assert close(score, *read(llm, memory, prompt, answer))
            ids = llm.generate_ids(memory, prompt, max_new_tokens=6)[0, len(prompt) :].tolist()
            assert lists(llm.generate_rows(llm.context(memory), [prompt], 6)) == [ids]


def test_a_full_memory_serves_rows_too():
    llm = shared()
    memory = llm.write_ids(llm.empty(N=16, K=8), TEXT)
    assert memory.M == 16 and llm.context(memory).length == 17
    for i, score in enumerate(llm.score_rows(llm.context(memory), PROMPTS, ANSWERS)):
        assert close(score, *read(llm, memory, *row(i)))
    alone = [llm.generate_ids(memory, p, max_new_tokens=8)[0, len(p) :].tolist() for p in PROMPTS]
    assert lists(llm.generate_rows(llm.context(memory), PROMPTS, 8)) == alone


def test_a_hit_is_the_most_likely_token():
    llm = shared()
    context = made(llm, "a memory")
    answers = llm.generate_rows(context, PROMPTS, 4)
    assert all(score.hits.all() for score in llm.score_rows(context, PROMPTS, answers))
    answers[1][2] = (answers[1][2] + 1) % 260
    assert llm.score_rows(context, PROMPTS, answers)[1].hits.tolist()[:3] == [True, True, False]


def test_rows_may_be_lists_or_tensors():
    llm = shared()
    context = llm.text_context(torch.tensor(BEFORE["text"]))
    prompts, answers = ([torch.tensor(ids) for ids in rows] for rows in (PROMPTS, ANSWERS))
    expected = llm.score_rows(made(llm, "text"), PROMPTS, ANSWERS)
    for score, right in zip(llm.score_rows(context, prompts, answers), expected, strict=True):
        assert close(score, right.logprobs, right.hits, tolerance=1e-6)
    assert lists(llm.generate_rows(context, prompts, 3)) == lists(llm.generate_rows(context, PROMPTS, 3))


def test_a_row_that_ends_early_ends_with_its_end_token():
    llm = untrained()
    context = made(llm, "a memory")
    free = lists(llm.generate_rows(context, PROMPTS, 10))
    end = llm.base.generation_config.eos_token_id = free[0][2]
    cut = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len(cut[0]) <= 3 < max(map(len, cut))
    assert lists(llm.generate_rows(context, PROMPTS, 10)) == cut


# --- contexts -------------------------------------------------------------------------------------------------------


@every_family
def test_a_context_is_used_many_times_in_any_order_and_never_changed(family):
    llm = shared(family)
    uses = [
        lambda context: lists(s.logprobs for s in llm.score_rows(context, PROMPTS, ANSWERS)),
        lambda context: lists(llm.generate_rows(context, PROMPTS[2:3], 9)),
        lambda context: lists(s.logprobs for s in llm.score_rows(context, PROMPTS[:1], ANSWERS[:1])),
        lambda context: lists(llm.generate_rows(context, PROMPTS, 3)),
    ]
    contexts = {kind: made(llm, kind) for kind in BEFORE}
    expected = {kind: [use(made(llm, kind)) for use in uses] for kind in BEFORE}
    before = {kind: bits(contexts[kind]) for kind in ("a memory", "text")}
    for order in ((0, 1, 2, 3), (3, 3, 1, 0), (2, 1, 0, 3)):
        for i in order:
            for kind, context in contexts.items():
                assert uses[i](context) == expected[kind][i]
    for kind, tensors in before.items():
        assert contexts[kind].length == contexts[kind].cache(llm.decoder, store=True).get_seq_length() == 1 + len(TEXT)
        assert all(map(torch.equal, bits(contexts[kind]), tensors))


def bits(context):
    return [tensor.clone() for kv in context.fronts[0].layers for tensor in kv()]


def test_a_context_outlives_its_memory():
    llm = untrained()
    context = made(llm, "a memory")
    assert not llm.prefixes.memories
    assert close(llm.score_rows(context, PROMPTS[:1], ANSWERS[:1])[0], *scored(llm.base, [FIRST, *TEXT], *row(0)))


def test_behind_gives_no_gradients_and_leaves_the_weights_flags():
    llm = untrained()
    llm.base.requires_grad_(True)
    for kind in BEFORE:
        score = llm.score_rows(made(llm, kind), PROMPTS, ANSWERS)[0]
        assert not score.logprobs.requires_grad and torch.is_grad_enabled()
    assert all(weight.requires_grad for weight in llm.base.parameters())


# --- adapters and checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "nothing", "an empty memory"])
def test_text_and_an_empty_memory_know_no_adapter(kind):
    llm, base = adapted(), tiny()
    for active in (None, READ):
        with llm.adapters.use(active):
            context = made(llm, kind)
            scores = llm.score_rows(context, PROMPTS, ANSWERS)
            answers = lists(llm.generate_rows(context, PROMPTS, 6))
        for i, score in enumerate(scores):
            assert close(score, *scored(base, BEFORE[kind], *row(i)))
        assert answers == [continued(base, BEFORE[kind], prompt, 6) for prompt in PROMPTS]


def test_behind_a_memory_rows_are_read_by_the_read_adapter():
    llm = adapted()
    memory = remembering(llm)
    context = llm.context(memory)
    for i, score in enumerate(llm.score_rows(context, PROMPTS, ANSWERS)):
        assert close(score, *read(llm, memory, *row(i)))
        assert not close(score, *scored(tiny(), [FIRST, *TEXT], *row(i)), tolerance=1e-2)
    alone = [llm.generate_ids(memory, p, max_new_tokens=6)[0, len(p) :].tolist() for p in PROMPTS]
    assert lists(llm.generate_rows(context, PROMPTS, 6)) == alone


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def released(**config):
    """A model with random bos, mark and a pool of 12 slots, as a released checkpoint has them."""
    base = tiny_model(initializer_range=0.15, **config)
    L, d = base.config.num_hidden_layers, base.config.hidden_size
    old = torch.zeros(L, 12, dtype=torch.int32)
    pool = Memory(random(L, 12, d, seed=0), old, old - 1, MemorySettings(12, 4, "paper"), model=fingerprint(base))
    return MemoryModel(base, trained=Trained(random(L, 1, d, seed=1), random(d, seed=2), pool))


def test_a_released_checkpoint_serves_rows_behind_its_pool_and_as_the_plain_model():
    llm = released()
    pool = llm.empty()
    assert llm.context(pool).length == 13
    for i, score in enumerate(llm.score_rows(llm.context(pool), PROMPTS, ANSWERS)):
        assert close(score, *read(llm, pool, *row(i)))
    for before, context in ((TEXT, llm.text_context(TEXT)), ([], llm.text_context([])), ([], llm.context(llm.blank()))):
        for i, score in enumerate(llm.score_rows(context, PROMPTS, ANSWERS)):
            assert close(score, *scored(llm.base, before, *row(i)))
        assert lists(llm.generate_rows(context, PROMPTS, 6)) == [continued(llm.base, before, p, 6) for p in PROMPTS]


# --- what is refused ------------------------------------------------------------------------------------------------


@every_context
def test_empty_rows_and_rows_that_are_no_pairs_are_refused(kind):
    llm = shared()
    context = made(llm, kind)
    for prompts, answers in (([[5], []], [[6], [7]]), ([[5], [6]], [[7], []])):
        with pytest.raises(ValueError, match="n >= 1"):
            llm.score_rows(context, prompts, answers)
    with pytest.raises(ValueError, match="n >= 1"):
        llm.generate_rows(context, [[5], []], 3)
    with pytest.raises(ValueError, match="zip"):
        llm.score_rows(context, [[5], [6]], [[7]])


@pytest.mark.parametrize("ids", [[1.5], [-1], [260], [[1], [2]]])
def test_what_is_no_list_of_token_ids_is_refused(ids):
    llm = shared()
    for call in (
        lambda: llm.text_context(ids),
        lambda: llm.score_rows(llm.text_context([]), [ids], [[5]]),
        lambda: llm.score_rows(llm.text_context([]), [[5]], [ids]),
        lambda: llm.generate_rows(llm.text_context([]), [[5], ids], 2),
    ):
        with pytest.raises(ValueError, match="token ids must"):
            call()


@every_context
def test_rows_that_do_not_fit_are_refused_and_those_that_just_fit_are_not(kind):
    llm = untrained(max_position_embeddings=96)
    context = made(llm, kind)
    room = 96 - context.length
    llm.score_rows(context, [[5], [5] * (room - 3)], [[6], [7] * 3])
    llm.generate_rows(context, [[5], [5] * (room - 3)], 3)
    with pytest.raises(ValueError, match=f"this context of {context.length} positions"):
        llm.score_rows(context, [[5], [5] * (room - 2)], [[6], [7] * 3])
    with pytest.raises(ValueError, match="the answer up to 4"):
        llm.generate_rows(context, [[5], [5] * (room - 3)], 4)


def test_text_that_does_not_fit_is_refused():
    llm = untrained(max_position_embeddings=96)
    assert llm.text_context([5] * 96).length == 96
    with pytest.raises(ValueError, match="97 tokens"):
        llm.text_context([5] * 97)


@pytest.mark.parametrize("kind", ["its pool", "no slots", "text", "nothing"])
def test_a_released_checkpoint_refuses_rows_that_do_not_fit(kind):
    llm = released(max_position_embeddings=64)
    context = {
        "its pool": lambda: llm.context(llm.empty()),
        "no slots": lambda: llm.context(llm.blank()),
        "text": lambda: llm.text_context(TEXT),
        "nothing": lambda: llm.text_context([]),
    }[kind]()
    room = 64 - (context.length if kind == "text" else 0)  # a checkpoint was trained behind its pool
    llm.score_rows(context, [[5] * (room - 1)], [[6]])
    llm.generate_rows(context, [[5] * (room - 1)], 1)
    with pytest.raises(ValueError, match=r"room for|not fit"):
        llm.score_rows(context, [[5] * room], [[6]])
    with pytest.raises(ValueError, match=r"room for|not fit"):
        llm.generate_rows(context, [[5] * room], 1)


@pytest.mark.parametrize("make", [released, untrained])
def test_score_refuses_what_logits_refuse(make):
    llm = make(max_position_embeddings=64)
    memory = llm.blank()
    for call in (lambda: llm.logits(memory, [5] * 65), lambda: llm.score(memory, [5] * 64, [6])):
        with pytest.raises(ValueError, match=r"room for|not fit"):
            call()


def test_a_foreign_memory_is_refused():
    llm = shared()
    memory = remembering(llm)
    with pytest.raises(ValueError, match="another model"):
        llm.context(remembering(untrained(seed=1)))
    with pytest.raises(ValueError, match="another model"):
        llm.context(untrained(seed=1).empty(N=64, K=16))
    for wrong, reason in (
        (replace(memory, tokenizer="other"), "another tokenizer"),
        (replace(memory, adapters="other"), "another adapter"),
        (replace(memory, slots=memory.slots.bfloat16()), "holds bfloat16"),
    ):
        with pytest.raises(ValueError, match=reason):
            llm.context(wrong)
