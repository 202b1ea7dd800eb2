"""Memories of other forms than hidden states: near them, to the bit of themselves, and refused in a sentence."""

from dataclasses import replace

import pytest
import torch

from latentmem import longterm
from latentmem.coding import codec
from latentmem.core import sources
from latentmem.core.memory import Memory
from latentmem.decoder.hooks import first_inputs
from latentmem.errors import OtherModelError
from latentmem.model.chat import Conversation
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model

FORMS = ("int8", "coded")
ASKED = [7, 90, 41]


@pytest.fixture(scope="module")
def llm(tiny_coder):
    llm = MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")
    llm.coder = tiny_coder
    return llm


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def written(llm, form, count=6, **changes):
    memory = llm.empty(**{"N": 24, "K": 8, "form": form} | changes)
    for i in range(count):
        memory = llm.write_ids(memory, list(range(10 + 7 * i, 17 + 7 * i)), f"s{i % 4}")
    return memory


def fresh(llm, memory):
    """What a memory answers that is read from its codes."""
    llm.prefixes.clear()
    llm.retriever.clear()
    return llm.logits(memory, ASKED)


def kl(one, other):
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("form", ["exact", *FORMS])
def test_a_write_goes_on_with_the_keys_and_values_that_are_there(llm, form, monkeypatch):
    memory = written(llm, form)
    monkeypatch.setattr(llm, "_read", None)  # of a whole memory, from nothing
    memory = llm.write_ids(llm.write_ids(memory, ASKED), ASKED)
    assert memory.updates == 8 and len(llm.logits(memory, ASKED)) == 3


@pytest.mark.parametrize("changes", [{}, {"N": 64}, {"longterm": 8}, {"order": "best-only"}], ids=str)
def test_an_answer_is_near_that_of_hidden_states(llm, form, changes):
    exact, other = written(llm, "exact", **changes), written(llm, form, **changes)
    assert torch.equal(exact.births, other.births) and torch.equal(exact.origins, other.origins)
    assert exact.sources == other.sources and exact.R == other.R
    if "longterm" not in changes and "order" not in changes:  # a search by sketches may take other updates
        nothing = kl(llm.logits(exact, ASKED), llm.logits(llm.empty(), ASKED))
        assert kl(llm.logits(exact, ASKED), llm.logits(other, ASKED)) < (0.01 if form == "int8" else 0.5) * nothing
    assert torch.equal(llm.text_of(other), torch.tensor(_text(other)))


@pytest.mark.parametrize("asked", [8, {"R": 8, "every": 3}], ids=str)
def test_the_bound_of_a_long_term_part_is_that_of_the_form(llm, tmp_path, form, asked):
    for name, limit in ((form, 256 << 20), ("exact", 1 << 30)):
        memory = llm.empty(N=24, longterm=asked, form=name)
        memory.save(tmp_path / "m")
        for one in (memory, llm.write_ids(memory, ASKED), Memory.load(tmp_path / "m")):
            assert one.settings.longterm.limit == one.longterm.settings.limit == limit
        assert llm.empty(N=24, longterm={"R": 8, "limit": 3}, form=name).longterm.settings.limit == 3


def _text(memory):
    """The tokens that stand in layer 0: of update n those of `written`."""
    return [10 + 7 * ((int(n) >> 32) - 1) + (int(n) & 0xFFFFFFFF) for n in memory.slots[0, :, 0]]


@pytest.mark.parametrize("changes", [{}, {"longterm": 8}, {"compression": 2, "choice": "surprise"}], ids=str)
def test_a_memory_answers_to_the_bit_saved_loaded_forked_and_written_again(llm, tmp_path, form, changes):
    memory = written(llm, form, **changes)
    live = llm.logits(memory, ASKED)
    assert torch.equal(fresh(llm, memory), live)
    memory.save(tmp_path / "a")
    loaded = Memory.load(tmp_path / "a")
    assert torch.equal(fresh(llm, loaded), live)
    one, other = (llm.write_ids(m, list(range(200, 215)), "more") for m in (memory, loaded))
    assert torch.equal(llm.logits(one, ASKED), fresh(llm, other)) and torch.equal(fresh(llm, memory), live)
    assert torch.equal(one.slots, other.slots) and torch.equal(one.births, other.births)
    for a, b in zip(one.written.values(), other.written.values(), strict=True):
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_several_memories_are_written_and_read_as_each_alone(llm, form):
    before = [llm.empty(N=N, K=5, form=form, seed=N, longterm=R) for N, R in ((8, 4), (30, 0), (12, 0))]
    before += [llm.empty(N=12, K=5)]
    texts = [list(range(10, 30)), [5, 6, 7], list(range(100, 125)), list(range(50, 60))]
    together = llm.write_ids(before, texts, "notes")
    alone = [llm.write_ids(memory, text, "notes") for memory, text in zip(before, texts, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.births, other.births) and one.sources == other.sources
        assert (llm.logits(one, ASKED) - llm.logits(other, ASKED)).abs().max() < 0.05
    scores = llm.score_rows(llm.context(together), [ASKED] * 4, [[8, 9]] * 4)
    for score, memory in zip(scores, together, strict=True):
        assert (score.logprobs - llm.score(memory, ASKED, [8, 9]).logprobs).abs().max() < 1e-4


def test_shares_of_sources_know_what_was_archived(llm, form):
    memory = written(llm, form, longterm=16, count=8)
    assert memory.R == 16
    shares = llm.sources_of(memory, "who?", "me")
    assert list(shares) == ["s0", "s1", "s2", "s3"] and sum(shares.values()) == pytest.approx(1, abs=1e-5)
    memory = sources.forget(memory, "s1")
    assert "s1" not in llm.sources_of(memory, "who?", "me")


@pytest.mark.parametrize("order", ["written", "best-last", "best-only"])
@pytest.mark.parametrize("longterm", [0, 8])
def test_streams_and_conversations_are_those_of_an_answer(llm, form, order, longterm):
    memory = written(llm, form, order=order, longterm=longterm)
    answer = llm.ask(memory, "What?", max_new_tokens=6)
    assert "".join(llm.stream(memory, "What?", max_new_tokens=6)) == answer
    kept, anew = Conversation(llm, memory), Conversation(llm, memory)
    for _ in range(2):
        anew._cache, anew._read = None, []
        assert kept.say("What?", max_new_tokens=4) == anew.say("What?", max_new_tokens=4)
    assert kept.close().tokens > memory.tokens


@pytest.mark.parametrize("order", ["written", "best-last", "best-only"])
@pytest.mark.parametrize("kept", ["exact", *FORMS])
@torch.no_grad()
def test_a_question_reads_what_a_slow_twin_puts_together(llm, kept, order):
    memory = written(llm, kept, order=order, longterm=8, count=8)
    front, prefix = llm.front(memory, ASKED), llm.prefix(memory)
    archive, decoder, reads = longterm.of(memory), llm.decoder, front.retrieval
    assert memory.R == 8 and (order == "best-only" or front.P == 1 + 8 + memory.M)
    for i, (places, at) in enumerate(zip(reads.places, reads.order, strict=True)):
        if kept == "exact":
            taken = decoder.project(i, llm.retriever.slots(archive, i, places))
        else:
            taken = [
                torch.cat(side, 2) for side in zip(*(_decoded(llm, memory, int(n), i) for n in places), strict=True)
            ]
        slots = [torch.cat([t, own[:, :, 1:]], 2)[:, :, at] for t, own in zip(taken, _sides(prefix, i), strict=True)]
        keys, values = (torch.cat([own[:, :, :1], part], 2) for part, own in zip(slots, _sides(prefix, i), strict=True))
        rotated = decoder.rotate(i, keys, torch.arange(front.P)[None])
        mine = front.layers[i]()
        assert torch.equal(mine[1], values) and (mine[0] - rotated).abs().max() < 1e-5 * rotated.abs().max()


def _sides(prefix, i):
    return prefix.keys[i], prefix.values[i]


def _decoded(llm, memory, number, i):
    """Keys and values of one slot in one layer, its update decoded by itself."""
    one, place = memory.written[number >> 32], number & 0xFFFFFFFF
    if i == 0:
        kv = llm.decoder.project(0, first_inputs(llm.decoder, one.tensors["ids"].long()))
    else:
        kv = codec.codec_of(memory.coder).decode([one], llm.retriever.decoding.like)[i]
    return [side[:, :, place : place + 1] for side in kv]


def test_an_empty_memory_and_one_of_which_all_was_forgotten_are_the_plain_model(llm, form):
    plain = llm.base(torch.tensor([ASKED])).logits[0]
    memory = written(llm, form, longterm=8)
    for name in ("s0", "s1", "s2", "s3"):
        memory = sources.forget(memory, name)
    for empty in (memory, llm.empty(N=24, K=8, form=form, longterm=8)):
        assert empty.is_empty and not empty.written and torch.equal(llm.logits(empty, ASKED), plain)
        assert llm.text_of(empty).tolist() == [] and llm.sources_of(empty, "who?", "me") == {}
    assert llm.write_ids(memory, [5, 6], "again").M == 2


def test_a_slot_that_is_no_token_is_refused(llm, form, monkeypatch):
    memory = llm.empty(N=16, K=8, form=form, compression=2, choice="surprise")
    llm.write_ids(memory, list(range(5, 21)))
    monkeypatch.setattr("latentmem.model.writing.first_inputs", lambda decoder, ids: first_inputs(decoder, ids) + 1)
    with pytest.raises(ValueError, match=r"is no embedding of a token, so no token stands for a slot: take"):
        llm.write_ids(memory, list(range(5, 21)))


def test_what_can_not_be_read_or_made_is_refused_in_a_sentence(llm, form, monkeypatch):
    memory = written(llm, form)
    half = MemoryModel(tiny_model().bfloat16(), byte_tokenizer())
    with pytest.raises(OtherModelError, match="holds float32, the model runs in bfloat16"):
        half.logits(memory, ASKED)
    with pytest.raises(OtherModelError, match="coded by the coder aaaaaaaaaaaa, which is not loaded"):
        llm.logits(replace(memory, coder="a" * 64), ASKED)
    with pytest.raises(ValueError, match="is for the preset 'exact': 'paper' keeps hidden states"):
        llm.empty(preset="paper", form=form)
    with pytest.raises(ValueError, match="choose form='exact'"):
        llm.empty(form=form, N=24, longterm={"R": 4, "group": "slot"})
    monkeypatch.setattr(llm, "coder", "")
    if form == "coded":
        with pytest.raises(ValueError, match="tiny has no coder for the form 'coded': make one"):
            llm.empty(form=form)
    assert codec.is_known(memory.coder)
