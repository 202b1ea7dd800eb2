"""Which slots and sources an answer drew on: the attention that transformers itself reports."""

import math
import threading
from dataclasses import replace

import pytest
import torch

from latentmem.decoder.attention import watching
from latentmem.model.model import MemoryModel
from latentmem.model.provenance import NEUTRAL, DrawnOn
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


def test_shares_of_sources_are_those_of_their_slots_beyond_those_of_a_neutral_question():
    llm = model_of()
    memory, prompts = full(llm), llm.prompts_or_raise()
    shares = llm.sources_of(memory, "who?", "me")
    mass, usual = (
        llm.attended(memory, prompts.question(question, bare=True), prompts.answer(question, answer))
        for question, answer in (("who?", "me"), NEUTRAL)
    )
    assert list(shares) == ["a", "b", "c", "d"] and sum(shares.values()) == pytest.approx(1, abs=1e-5)
    by_hand = dict.fromkeys(range(4), 0.0)
    for layer in range(memory.L):
        for at in range(memory.M):
            share, neutral = (part[layer, at].item() / part[layer].sum().item() for part in (mass, usual))
            by_hand[int(memory.origins[layer, at])] += max(0.0, share * math.log(share / neutral / 2))
    for i, name in enumerate(shares):
        assert shares[name] == pytest.approx(by_hand[i] / sum(by_hand.values()), abs=1e-5)
    older = replace(memory, origins=torch.where(memory.births < 3, -1, memory.origins))
    assert llm.sources_of(older, "who?", "me")[""] > 0
    assert sum(llm.sources_of(memory, *NEUTRAL).values()) == pytest.approx(1)  # nothing stands out


@pytest.mark.parametrize("settings", [{}, {"order": "best-last"}, {"order": "best-only"}, {"longterm": 8}])
def test_the_neutral_question_is_read_once_behind_the_same_slots_at_the_same_places(settings, monkeypatch):
    llm = model_of()
    memory, read = full(llm, **settings), []
    usual = llm._attended

    def counted(memory, ids, answer, chosen):
        read.append(chosen)
        return usual(memory, ids, answer, chosen)

    monkeypatch.setattr(llm, "_attended", counted)
    first = llm.drawn_on(memory, "who?", "me")
    assert len(read) == 2 and read[0] is read[1]
    assert llm.drawn_on(memory, "who?", "me") == first and len(read) == 3
    llm.drawn_on(memory, "an other question?", "me")
    assert len(read) == (5 if settings and not llm.retrieve(memory, asked(llm)).same(read[0]) else 4)
    with torch.no_grad():
        llm.base.get_input_embeddings().weight.mul_(1.01)  # other weights: all is read again
    count = len(read)
    llm.drawn_on(memory, "who?", "me")
    assert len(read) == count + 2


def asked(llm):
    return llm.ids(llm.prompts_or_raise().question("an other question?", bare=True))


TEXTS = {
    "mill": "The mill stands at the river. It grinds at night! Who owns it?",
    "list": "- bread\n- 3.5 litres of milk\nNothing else",
    "wide": "私は水曜日に京都へ行きます。雨です。 A 👩‍👩‍👧 came.",
}
SENTENCES = {
    "mill": ["The mill stands at the river.", "It grinds at night!", "Who owns it?"],
    "list": ["- bread", "- 3.5 litres of milk", "Nothing else"],
    "wide": ["私は水曜日に京都へ行きます。", "雨です。", "A 👩‍👩‍👧 came."],
}


@pytest.mark.parametrize("form", ["exact", "int8"])
@pytest.mark.parametrize("longterm", [0, 64])
def test_passages_are_whole_sentences_of_what_was_written(form, longterm):
    llm = model_of()
    memory = llm.empty(N=512, K=128, form=form, longterm=longterm)
    for name, text in TEXTS.items():
        memory = llm.write(memory, text, name)
    drawn = llm.drawn_on(memory, "Where does the mill stand?", "river")
    assert drawn.sources == llm.sources_of(memory, "Where does the mill stand?", "river")
    assert 1 <= len(drawn.passages) <= 3 and drawn.passages[0].share >= drawn.passages[-1].share > 0
    for passage in drawn.passages:
        assert passage.share == pytest.approx(drawn.sources[passage.source], abs=1e-5)  # one update of each source
        parts = passage.text.split(" … ")
        assert parts and all(any(sentence in part for sentence in SENTENCES[passage.source]) for part in parts)
        assert all(part in TEXTS[passage.source] or part in " ".join(SENTENCES[passage.source]) for part in parts)


def test_the_sentence_of_the_largest_shares_is_quoted():
    llm = model_of()
    memory = llm.write(llm.empty(N=128, K=128, form="int8"), TEXTS["mill"], "mill")
    for number, sentence in enumerate(SENTENCES["mill"]):
        drawn, start = torch.full((memory.L, memory.M), 1e-5), TEXTS["mill"].index(sentence)
        drawn[:, start : start + len(sentence)] = 1.0  # a byte is a token
        (passage,) = llm._passages(memory, drawn / drawn.sum(), memory.births, None)
        assert (passage.source, passage.text) == ("mill", SENTENCES["mill"][number])
    drawn = torch.zeros(memory.L, memory.M)
    drawn[:, [2, -2]] = 0.5
    (passage,) = llm._passages(memory, drawn, memory.births, None)
    assert passage.text == "The mill stands at the river. … Who owns it?"


@pytest.mark.parametrize("form", ["exact", "int8"])
def test_of_a_full_memory_passages_are_what_it_holds_whole(form):
    llm = model_of()
    memory = llm.empty(N=96, K=32, form=form, longterm={"R": 32})
    for i in range(12):
        memory = llm.write(memory, f"Fact {i} of many. It is true.", f"text {i}")
    drawn = llm.drawn_on(memory, "Which fact?", "7")
    for passage in drawn.passages:
        i = int(passage.source.removeprefix("text "))
        whole = form == "int8" or memory.slots_left()[i].min() == memory.sources[i].slots
        assert (passage.text in f"Fact {i} of many. It is true.") and bool(passage.text) == whole
    older = replace(memory, births=torch.zeros_like(memory.births), origins=-torch.ones_like(memory.origins))
    if form == "exact":
        assert ("", "") in [(one.source, one.text) for one in llm.drawn_on(older, "Which fact?", "7").passages]


def test_what_was_compressed_is_not_quoted():
    llm = model_of()
    memory = llm.write(llm.empty(N=64, K=32, compression=2, form="int8"), "The mill is old. It is red.")
    assert [one.text for one in llm.drawn_on(memory, "what?", "red").passages] == [""]


def test_an_empty_memory_has_no_sources():
    llm = model_of()
    assert llm.sources_of(llm.empty(), "who?", "me") == {} and llm.drawn_on(llm.empty(), "who?", "me") == DrawnOn({})
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
