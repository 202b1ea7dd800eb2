"""Which slots and sources an answer drew on: the attention that transformers itself reports."""

import threading
from dataclasses import replace

import pytest
import torch

from latentmem.decoder.attention import watching
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model

TEXT, ASKED, SAID = list(range(20, 60)), [7, 90, 41], [12, 33, 8]


def model_of(kind="llama", implementation="sdpa", **config):
    return MemoryModel(tiny_model(kind, attention=implementation, initializer_range=0.3, **config), byte_tokenizer())


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize(
    ("kind", "implementation"), [("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa"), ("gemma2", "eager")]
)
def test_a_memory_that_is_not_full_is_attended_to_as_the_text_is(kind, implementation, pieces):
    llm = model_of(kind, implementation)
    memory = llm.write_ids(llm.empty(N=64, K=len(TEXT) // pieces), TEXT)
    plain = tiny_model(kind, attention="eager", initializer_range=0.3)
    ids = torch.tensor([[llm.first_token, *TEXT, *ASKED, *SAID]])
    theirs = plain(input_ids=ids, output_attentions=True).attentions
    found = llm.attended(memory, ASKED, SAID)
    assert found.shape == (memory.L, memory.M) and (found.sum(1) < 1).all()
    for mine, weights in zip(found, theirs, strict=True):
        queries = weights[0].mean(0)[-len(SAID) - 1 : -1]  # what predicts the answer's tokens
        assert (mine - queries[:, 1 : 1 + len(TEXT)].mean(0)).abs().max() < 1e-5


def full(llm, **kinds):
    memory = llm.empty(N=48, K=16, **kinds)
    for name, start in (("a", 10), ("b", 40), ("c", 70), ("a", 100), ("d", 130)):
        memory = llm.write_ids(memory, list(range(start, start + 14)), source=name)
    return memory


def test_a_full_memory_is_attended_to_alike_with_every_attention():
    ways = []
    for implementation in ("sdpa", "eager"):
        llm = model_of(implementation=implementation)
        ways.append(llm.attended(full(llm), ASKED, SAID))
    assert (ways[0] - ways[1]).abs().max() < 1e-5 and ways[0].std() > 1e-3


def test_shares_of_sources_are_those_of_their_slots():
    llm = model_of()
    memory = full(llm)
    shares = llm.sources_of(memory, "who?", "me")
    prompts = llm.prompts_or_raise()
    mass = llm.attended(memory, prompts.question("who?", bare=True), prompts.answer("who?", "me"))
    assert list(shares) == ["a", "b", "c", "d"] and sum(shares.values()) == pytest.approx(1, abs=1e-5)
    for i, name in enumerate(shares):
        by_hand = sum(
            sum(mass[layer, at].item() for at in range(memory.M) if memory.origins[layer, at] == i)
            / mass[layer].sum().item()
            for layer in range(memory.L)
        )
        assert shares[name] == pytest.approx(by_hand / memory.L, abs=1e-6)
    older = replace(memory, origins=torch.where(memory.births < 3, -1, memory.origins))
    assert llm.sources_of(older, "who?", "me")[""] > 0


def test_an_empty_memory_has_no_sources():
    llm = model_of()
    assert llm.sources_of(llm.empty(), "who?", "me") == {}
    assert llm.attended(llm.empty(), ASKED, SAID).shape == (llm.decoder.L, 0)
    with pytest.raises(ValueError, match="n >= 1"):
        llm.attended(llm.empty(), ASKED, [])


def test_other_threads_are_not_watched():
    llm = model_of()
    memory, found = full(llm), []
    with watching(llm.base) as seen:
        thread = threading.Thread(target=lambda: found.append(llm.logits(memory, ASKED)))
        thread.start()
        thread.join()
        assert found and not seen
        llm.logits(memory, ASKED)
        assert len(seen) == memory.L
    llm.logits(memory, ASKED)
    assert len(seen) == memory.L
