"""Whether what was asked is in the memory: an estimate from how the answer was read."""

import json
import math

import pytest

from latentmem.errors import DamagedError
from latentmem.model.known import Evidence
from latentmem.model.model import MemoryModel
from latentmem.model.provenance import NEUTRAL
from latentmem.testing import byte_tokenizer, tiny_model

WEIGHTS = (0.3, -0.2, 0.11, 1.7, -0.4)


@pytest.fixture(scope="module")
def llm():
    llm = MemoryModel(tiny_model(initializer_range=0.3), byte_tokenizer())
    llm.evidence = Evidence("", "", WEIGHTS)
    return llm


def told(llm, **kinds):
    memory = llm.empty(N=64, K=16, **kinds)
    for text in ("the door is red", "the key is small", "it rains"):
        memory = llm.write(memory, text, source=text)
    return memory


@pytest.mark.parametrize("form", ["exact", "int8"])
def test_the_estimate_is_that_of_attention_likelihood_search_and_size(llm, form):
    memory, prompts = told(llm, form=form, longterm=8), llm.prompts_or_raise()
    asked, said = prompts.question("what is red?", bare=True), prompts.answer("what is red?", "the door")
    mass = llm.attended(memory, asked, said)
    chosen, neutral = llm.retrieve(memory, llm.ids(asked)), prompts.question(NEUTRAL[0], bare=True)
    usual, _ = llm._attended(memory, neutral, prompts.answer(*NEUTRAL), chosen)
    drawn = 0.0
    for mine, theirs in zip(mass, usual, strict=True):
        for a, b in zip(mine / mine.sum(), theirs / theirs.sum(), strict=True):
            drawn += float(a) * max(0.0, math.log(float(a) / float(b) / 2)) / memory.L
    lowest = float(llm.score(memory, asked, said).logprobs.min())
    fit = max(0.0, float(chosen.marks.max())) * math.log(3)
    signs = (1, math.log(max(drawn, 1e-3)), lowest, fit, math.log(memory.M + memory.R))
    expected = 1 / (1 + math.exp(-sum(w * x for w, x in zip(WEIGHTS, signs, strict=True))))
    assert llm.drawn_on(memory, "what is red?", "the door").known == pytest.approx(expected, abs=1e-4)


def test_nothing_is_estimated_without_weights_a_search_or_a_memory(llm):
    assert llm.drawn_on(told(llm, longterm=0, form="exact"), "what?", "this").known is None
    assert llm.drawn_on(llm.empty(), "what?", "this").known is None
    assert llm.drawn_on(told(llm, longterm=8, form="int8"), "what?", "I don’t know, sorry").known == 0
    plain = MemoryModel(llm.base, byte_tokenizer())
    assert plain.drawn_on(told(plain, longterm=8, form="int8"), "what?", "this").known is None


@pytest.mark.parametrize("weights", [[1, 2, 3], [1, 2, 3, 4, math.nan], "none", None])
def test_weights_that_are_none_are_refused(tmp_path, weights):
    file = tmp_path / "known.json"
    file.write_text(json.dumps({"model": "m", "adapters": "a", "weights": weights}))
    with pytest.raises(DamagedError, match=r"known\.json is damaged"):
        Evidence.load(file)
