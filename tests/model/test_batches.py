"""Several memories at once: each row is written, read and continued as if it stood alone."""

from dataclasses import replace

import pytest
import torch
from test_adapters import adapted
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from latentmem.core import memory as memories
from latentmem.decoder import cache as caches
from latentmem.decoder.attention import CUDA, NAME, Stack
from latentmem.model import context as contexts
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model

SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# One of each kind: without a window, with one in some layers, in all of them; with experts. The others: test_families.
FAMILIES = {
    "llama": {},
    "gemma3_text": {**SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8},
    "mistral": {"head_dim": 8, "sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
SIZES = [(64, 16), (20, 7), (64, 5), (12, 12)]  # N and K of four memories
TEXTS = [list(range(10, 50)), list(range(60, 90)), [5, 6, 7], list(range(100, 125))]
MORE = [[9, 8, 7, 6, 5], list(range(150, 172)), list(range(30, 41)), [77]]
PROMPTS = [[3, 4, 5, 6], [7], [40, 9, 133, 8, 222, 17, 18, 19], [91, 77]]
ANSWERS = [[8, 9], [10, 11, 12, 13, 14, 15, 16], [13], [201, 5, 5]]
every_family = pytest.mark.parametrize("family", FAMILIES)


ATTENTIONS = (NAME, CUDA, "sdpa", "eager")


@pytest.fixture(params=ATTENTIONS)
def attention(request):
    return request.param


def made(family="llama", attention=NAME):
    llm = MemoryModel(tiny_model(family, **FAMILIES[family]), first_token=1)
    llm.base.set_attn_implementation(attention)
    return llm


def beginnings(llm, **more):
    return [llm.empty(N=N, K=K, seed=i, **more) for i, (N, K) in enumerate(SIZES)]


def written(llm):
    """Four memories: not full, full, nearly nothing in it, full after several drops."""
    found = [llm.write_ids(memory, text) for memory, text in zip(beginnings(llm), TEXTS, strict=True)]
    assert [m.M for m in found] == [40, 20, 3, 12] and [m.updates for m in found] == [3, 5, 1, 3]
    return found


def alike(a, b):
    """Two memories, the slots but for rounding."""
    same = all(getattr(a, k) == getattr(b, k) for k in ("N", "K", "seed", "updates", "tokens", "sources", "model"))
    same &= torch.equal(a.births, b.births) and torch.equal(a.origins, b.origins)
    return same and a.slots.shape == b.slots.shape and (a.slots - b.slots).abs().max() < 1e-4


# --- writing --------------------------------------------------------------------------------------------------------


@every_family
def test_texts_are_written_as_if_each_stood_alone(family, attention):
    llm, other = made(family, attention), made(family, attention)
    after, alone = beginnings(llm), beginnings(other)
    for texts in (TEXTS, MORE, TEXTS[::-1]):
        before = [(m, m.slots.clone()) for m in after]
        after = llm.write_ids(after, texts, "notes")
        alone = [other.write_ids(m, text, "notes") for m, text in zip(alone, texts, strict=True)]
        assert all(map(alike, after, alone))
        assert all(torch.equal(m.slots, slots) for m, slots in before)
    for mine, theirs in zip(after, alone, strict=True):  # and what was derived from them on the way
        fresh = made(family, attention)
        for a, b, c in zip(*(x.prefix(m).keys for x, m in ((llm, mine), (other, theirs), (fresh, mine))), strict=True):
            assert (a - b).abs().max() < 1e-4 and (a - c).abs().max() < 1e-5


def test_compressions_and_presets_go_together():
    llm = made()
    kinds = [{"compression": 3}, {}, {"preset": "paper"}, {"compression": 2}]
    before = [llm.empty(N=24, K=8, **kind) for kind in kinds]
    steps = []
    after = llm.write_ids(before, TEXTS, progress=lambda *x: steps.append(x))
    assert all(alike(m, llm.write_ids(b, t)) for m, b, t in zip(after, before, TEXTS, strict=True))
    assert [m.M for m in after] == [14, 24, 3, 13]
    assert steps[-1] == (98, 98) and [a for a, _ in steps] == sorted({a for a, _ in steps})


def test_one_memory_is_written_by_lists_to_the_bit_of_itself():
    llm = made()
    (after,) = llm.write_ids(beginnings(llm)[:1], TEXTS[:1])
    assert torch.equal(after.slots, llm.write_ids(beginnings(llm)[0], TEXTS[0]).slots)
    assert llm.write_ids([], []) == []


def test_the_adapters_of_writing_and_of_reading_are_those_of_one():
    llm = adapted()
    after = llm.write_ids(beginnings(llm), TEXTS)
    alone = [llm.write_ids(m, text) for m, text in zip(beginnings(llm), TEXTS, strict=True)]
    assert all(map(alike, after, alone))
    context = llm.context([*after, llm.empty(N=8, K=4)])  # an empty memory is the plain model, without adapters
    prompts, answers = [*PROMPTS, [3, 4]], [*ANSWERS, [5, 6]]
    found = llm.score_rows(context, prompts, answers)
    for score, memory, prompt, answer in zip(found, [*after, llm.empty(N=8, K=4)], prompts, answers, strict=True):
        assert (score.logprobs - llm.score(memory, prompt, answer).logprobs).abs().max() < 1e-4


# --- reading --------------------------------------------------------------------------------------------------------


@every_family
def test_answers_are_as_likely_as_behind_each_memory_alone(family, attention):
    llm = made(family, attention)
    after = [*written(llm), llm.empty(N=16, K=4)]
    prompts, answers = [*PROMPTS, [9, 9, 9]], [*ANSWERS, [4, 5]]
    found = llm.score_rows(llm.context(after), prompts, answers)
    for score, memory, prompt, answer in zip(found, after, prompts, answers, strict=True):
        logits = llm.logits(memory, [*prompt, *answer])[len(prompt) - 1 : -1].detach()
        alone = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (score.logprobs - alone).abs().max() < 1e-4
        assert score.hits.tolist() == (logits.argmax(-1) == torch.tensor(answer)).tolist()
    elsewhere = llm.score_rows(llm.context([after[i] for i in (1, 2, 3, 0)]), PROMPTS, ANSWERS)
    assert all((a.logprobs - b.logprobs).abs().max() > 1e-3 for a, b in zip(found, elsewhere, strict=False))


@every_family
def test_a_neighbours_memory_changes_no_bit_of_a_row(family):
    llm = made(family)
    after = written(llm)
    before = llm.score_rows(llm.context(after), PROMPTS, ANSWERS)
    tokens = llm.generate_ids(after, PROMPTS, max_new_tokens=6)
    after[1] = replace(after[1], slots=after[1].slots.flip(1) * 2)
    again = llm.score_rows(llm.context(after), PROMPTS, ANSWERS)
    # an expert multiplies the tokens that are routed to it together; how many a neighbour sends is no fixed shape
    close = 1e-5 if family == "mixtral" else 0
    for i in (0, 2, 3):
        assert (before[i].logprobs - again[i].logprobs).abs().max() <= close
    assert not torch.equal(before[1].logprobs, again[1].logprobs)
    changed = llm.generate_ids(after, PROMPTS, max_new_tokens=6)
    assert all(torch.equal(tokens[i], changed[i]) for i in (0, 2, 3)) and not torch.equal(tokens[1], changed[1])


# --- generating -----------------------------------------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "the most likely of samples": {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "a bound of all tokens": {"max_length": 20},
    "a penalty of repetitions": {"repetition_penalty": 5.0},
    "no repeated pair": {"no_repeat_ngram_size": 2},
    "a length at least": {"min_length": 9},
}


@pytest.mark.parametrize(
    ("attention", "way"),  # what more there is stands above the attention
    [*((NAME, way) for way in WAYS), *((other, way) for other in ATTENTIONS[1:] for way in ("greedy", "beams"))],
)
@every_family
def test_answers_are_those_behind_each_memory_alone(family, attention, way):
    llm, options = made(family, attention), WAYS[way]
    after = [*written(llm), llm.empty(N=16, K=4)]
    prompts = [*PROMPTS, [9, 9, 9]]
    options = {"max_new_tokens": 9, **options} if "max_length" not in options else options
    alone = [llm.generate_ids(m, p, **options) for m, p in zip(after, prompts, strict=True)]
    found = llm.generate_ids(after, prompts, **options)
    for mine, theirs in zip(found, alone, strict=True):
        assert mine.tolist() == theirs.tolist()
    assert len({tuple(x[0, -3:].tolist()) for x in found}) > 1


@pytest.mark.parametrize(("options", "limit", "stacks"), [({}, 2**31, 3), ({}, 100, 0), (WAYS["beams"], 2**31, 0)])
def test_memories_are_stacked_once_for_an_answer_if_they_are_not_too_large(monkeypatch, options, limit, stacks):
    made_of, calls = Stack.of, []
    monkeypatch.setattr(Stack, "of", lambda memories: (calls.append(len(memories)), made_of(memories))[1])
    monkeypatch.setattr(caches, "STACKED", limit)
    llm = made()
    after = written(llm)
    alone = [llm.generate_ids(m, p, max_new_tokens=9, **options) for m, p in zip(after, PROMPTS, strict=True)]
    found = llm.generate_ids(after, PROMPTS, max_new_tokens=9, **options)
    assert calls == [4] * stacks and llm.decoder.L == 3
    assert [x.tolist() for x in found] == [x.tolist() for x in alone]


def test_rows_that_end_early_end_with_their_end_token():
    llm = made()
    after = written(llm)
    free = llm.generate_ids(after, PROMPTS, max_new_tokens=9)
    llm.base.generation_config.eos_token_id = end = int(free[1][0, 3])
    cut = llm.generate_ids(after, PROMPTS, max_new_tokens=9)
    for whole, short, prompt in zip(free, cut, PROMPTS, strict=True):
        new = whole[0, len(prompt) :].tolist()
        new = new[: new.index(end) + 1] if end in new else new
        assert short[0].tolist() == [*prompt, *new]
    assert cut[1].shape[1] == 4 and max(x.shape[1] - len(p) for x, p in zip(cut, PROMPTS, strict=True)) == 9
    alone = [llm.generate_ids(m, p, max_new_tokens=9).tolist() for m, p in zip(after, PROMPTS, strict=True)]
    assert [x.tolist() for x in cut] == alone


@pytest.mark.parametrize("end", [0, 2])  # an id that is no truth, and one that is
def test_an_end_token_is_any_id(end):
    llm = made()
    after = written(llm)
    free = llm.generate_ids(after, PROMPTS, max_new_tokens=9)
    with torch.no_grad():  # the first row's third token becomes this one
        for weights in (llm.base.lm_head.weight, llm.base.get_input_embeddings().weight):
            weights[[end, int(free[0][0, 6])]] = weights[[int(free[0][0, 6]), end]]
    llm = MemoryModel(llm.base, first_token=1)
    llm.base.generation_config.eos_token_id = end
    after = written(llm)
    found = llm.generate_ids(after, PROMPTS, max_new_tokens=30)
    alone = [llm.generate_ids(m, p, max_new_tokens=30) for m, p in zip(after, PROMPTS, strict=True)]
    assert [x.tolist() for x in found] == [x.tolist() for x in alone]
    assert any(x[0, -1] == end and x.shape[1] < 30 for x in found)


def test_rows_are_stopped_by_what_a_caller_says():
    llm = made()
    after = written(llm)
    free = llm.generate_ids(after, PROMPTS, max_new_tokens=9)
    stop_at = int(free[0][0, 6])

    class Seen(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return input_ids[:, -1] == stop_at

    options = {"max_new_tokens": 9, "stopping_criteria": StoppingCriteriaList([Seen()])}
    alone = [llm.generate_ids(m, p, **options) for m, p in zip(after, PROMPTS, strict=True)]
    assert [x.tolist() for x in llm.generate_ids(after, PROMPTS, **options)] == [x.tolist() for x in alone]
    assert alone[0].shape[1] <= 7 < max(x.shape[1] for x in alone)


def test_more_rows_than_go_at_once_are_read_in_turns(monkeypatch):
    llm = made()
    after = written(llm)
    expected = llm.generate_ids(after, PROMPTS, max_new_tokens=5)
    slots = [m.slots for m in llm.write_ids(after, MORE)]
    monkeypatch.setattr(contexts, "ROWS", 3)
    found = llm.generate_ids(after, PROMPTS, max_new_tokens=5)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all((m.slots - s).abs().max() < 1e-4 for m, s in zip(llm.write_ids(after, MORE), slots, strict=True))


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([5, 5, 5], 100, [[0, 1, 2]]),
        ([5, 5, 5], 10, [[0, 1], [2]]),
        ([1, 9, 1, 1], 10, [[0], [1], [2, 3]]),  # as padded
        ([50, 50], 10, [[0], [1]]),
        ([1] * 33, 100, [list(range(32)), [32]]),
        ([], 10, []),
    ],
)
def test_writes_go_in_turns_of_so_many_tokens(lengths, most, expected):
    assert contexts.by_tokens(range(len(lengths)), lengths, most) == expected


# --- text -----------------------------------------------------------------------------------------------------------

NOTES = ["My cat is called Zorro.", "The red key opens the shed.", "x"]
QUESTIONS = ["What is my cat called?", "Which key?", "What?"]


@pytest.fixture(scope="module")
def talking():
    return MemoryModel(tiny_model(vocab_size=260), byte_tokenizer())


def test_texts_and_questions_go_together(talking):
    before = [talking.empty(N=128, K=16, seed=i) for i in range(3)]
    after = talking.write(before, NOTES, "notes")
    alone = [talking.write(m, text, "notes") for m, text in zip(before, NOTES, strict=True)]
    assert all(map(alike, after, alone))
    answers = talking.ask([*after, before[0]], [*QUESTIONS, "Nothing?"], max_new_tokens=8)
    each = [*zip(after, QUESTIONS, strict=True), (before[0], "Nothing?")]
    assert answers == [talking.ask(m, q, max_new_tokens=8) for m, q in each]


@pytest.mark.parametrize("longterm", [0, 8])
def test_an_empty_row_and_questions_of_any_length_change_no_other_row(talking, longterm):
    full = talking.write(talking.empty(N=32, K=16, longterm=longterm), NOTES[0] * 4)
    half = talking.write(talking.empty(N=64, K=16), "The door is blue.")
    empty, long = talking.empty(N=32, K=16), "Which? " * 100
    rows, questions = [full, empty, half, full], ["?", long, QUESTIONS[2], "?"]
    answers = talking.ask(rows, questions, max_new_tokens=8)
    assert answers == [talking.ask(m, q, max_new_tokens=8) for m, q in zip(rows, questions, strict=True)]
    assert answers == talking.ask(rows, questions, max_new_tokens=8) and answers[0] == answers[3]
    ids = talking.prompts.question(long, bare=False)
    plain = talking.base.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert answers[1] == talking.tokenizer.decode(plain, skip_special_tokens=True).strip()


def test_several_answers_are_streamed_at_once(talking):
    after = talking.write([talking.empty(N=128, K=16) for _ in range(3)], NOTES)
    after, asked = [*after, talking.empty(N=128, K=16)], [*QUESTIONS, "Nothing?"]
    pieces = list(talking.stream(after, asked, max_new_tokens=24))
    answers = ["".join(text for i, text in pieces if i == number) for number in range(4)]
    assert [a.strip() for a in answers] == talking.ask(after, asked, max_new_tokens=24)
    alone = ["".join(talking.stream(m, q, max_new_tokens=24)).strip() for m, q in zip(after, asked, strict=True)]
    assert [a.strip() for a in answers] == alone


def test_leaving_the_loop_stops_all_rows(talking):
    after = talking.write([talking.empty(N=128, K=16) for _ in range(2)], NOTES[:2])
    for _ in talking.stream(after, QUESTIONS[:2], max_new_tokens=900):
        break
    with pytest.raises(ValueError, match="num_beams"):
        list(talking.stream(after, QUESTIONS[:2], num_beams=2, max_new_tokens=4))


def test_nothing_more_is_begun_once_nobody_reads(talking, monkeypatch):
    monkeypatch.setattr(contexts, "ROWS", 1)
    begun, generate = [], talking.base.generate
    monkeypatch.setattr(talking.base, "generate", lambda **more: begun.append(1) or generate(**more))
    after = talking.write([talking.empty(N=128, K=16) for _ in range(3)], NOTES)
    pieces = talking.stream(after * 4, QUESTIONS * 4, max_new_tokens=60)
    next(pieces)
    pieces.close()
    assert len(begun) < 12


def test_what_several_memories_do_not_take_is_refused(talking):
    memory = talking.write(talking.empty(N=32, K=16), NOTES[0])
    with pytest.raises(ValueError, match="as many prompts as memories: got 1 and 2"):
        talking.generate_ids([memory, memory], [[5, 6]])
    with pytest.raises(ValueError, match="return_dict_in_generate: this takes one memory"):
        talking.generate_ids([memory], [[5, 6]], return_dict_in_generate=True)
    with pytest.raises(ValueError, match="cache: this takes one memory"):
        talking.generate_ids([memory], [[5, 6]], talking.text_cache(memory))
    with pytest.raises(ValueError, match="return_dict_in_generate: this takes one memory"):
        config = GenerationConfig(return_dict_in_generate=True, max_new_tokens=2)
        talking.generate_ids([memory], [[5, 6]], generation_config=config)
    with pytest.raises(ValueError, match="a stream gives one answer to each question, got num_return_sequences=2"):
        list(talking.stream([memory], ["Who?"], num_return_sequences=2, do_sample=True))
    for one in ((memory, [5, 6]), ([memory], [[5, 6]])):
        with pytest.raises(ValueError, match="use_cache=False: a memory is read through the cache"):
            talking.generate_ids(*one, use_cache=False)
    with pytest.raises(ValueError, match="as many texts as memories: got 1 and 2"):
        talking.write_ids([memory, memory], [[5, 6]])
    with pytest.raises(ValueError, match="one list of integers for each memory"):
        talking.write_ids(memory, [[5, 6], [7]])
    with pytest.raises(ValueError, match="as many rows as memories: got 3 and 2"):
        talking.score_rows(talking.context([memory, memory]), [[5]] * 3, [[6]] * 3)
    with pytest.raises(ValueError, match="no memory was given"):
        talking.context([])
    both = talking.generate_ids([memory, memory], torch.tensor([[5, 6], [7, 8]]), max_new_tokens=2)
    assert [x.shape[1] for x in both] == [4, 4]
    with pytest.raises(ValueError, match="there is room for"):
        talking.generate_ids([memory, memory], [[5, 6], [5] * 1100], max_new_tokens=2)
    stranger = replace(memory, model="another")
    for use in (talking.context, lambda m: talking.write_ids(m, [[5], [6]])):
        with pytest.raises(ValueError, match="another model"):
            use([memory, stranger])
    assert talking.ask([], []) == [] and talking.write([], []) == [] and list(talking.stream([], [])) == []
    assert memories.half_life(memory.N, memory.K) == 1
