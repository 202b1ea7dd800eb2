"""What the model's verbs accept, refuse and keep, beyond the mathematics of test_reference.py."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import latentmem
from latentmem.core import memory as memories
from latentmem.errors import TooLongError
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(), byte_tokenizer())


@pytest.fixture(scope="module")
def memory(llm):
    return llm.write(llm.empty(N=64, K=16), "the door is blue")


def test_a_model_is_one_line(llm):
    assert repr(llm) == "MemoryModel(unnamed: llama, L=3, d=32, float32 on cpu)"


def test_lists_are_one_memory_for_each_text(llm, memory):
    other = llm.empty(N=32, K=8)
    texts, questions = ["first text", "second"], ["which one?", "and this?"]
    written = llm.write([memory, other], texts)
    alone = [llm.write(m, t) for m, t in zip([memory, other], texts, strict=True)]
    assert all((a.slots - b.slots).abs().max() < 1e-4 for a, b in zip(written, alone, strict=True))
    answers = llm.ask(written, questions, max_new_tokens=6)
    assert answers == [llm.ask(m, q, max_new_tokens=6) for m, q in zip(alone, questions, strict=True)]
    for wrong in (([memory], texts), (memory, texts), ([memory], "text")):
        with pytest.raises(ValueError, match="lists of the same length"):
            llm.write(*wrong)


def test_a_generation_config_of_the_caller_is_obeyed(llm, memory):
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert llm.generate_ids(memory, [5, 6], generation_config=config).shape == (1, 5)
    with pytest.raises(ValueError, match="there is room for"):
        llm.generate_ids(memory, [5, 6], generation_config=GenerationConfig(max_new_tokens=5000))


def test_ask_refuses_options_that_give_more_than_one_answer(llm, memory):
    for options in ({"num_return_sequences": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match="one answer"):
            llm.ask(memory, "why?", **options)


def test_a_cache_with_text_in_it_refuses_beams(llm, memory):
    cache = llm.text_cache(memory)
    llm.generate_ids(memory, [5, 6], cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="need a fresh one"):
        llm.generate_ids(memory, [7], cache=cache, max_new_tokens=2, num_beams=3)


@pytest.mark.parametrize("ids", [[1.5, 2.5], [], [[1], [2]], [-1], [260], [True, False]])
def test_what_is_no_list_of_token_ids_is_refused(llm, memory, ids):
    with pytest.raises(ValueError, match="token ids must"):
        llm.write_ids(memory, ids)


def test_changed_weights_are_noticed():
    llm = MemoryModel(tiny_model(), byte_tokenizer())
    memory = llm.write(llm.empty(N=64, K=16), "the door is blue")
    before = llm.logits(memory, [5, 6, 7])
    with torch.no_grad():
        llm.base.model.layers[1].self_attn.v_proj.weight.mul_(2)
    fresh = MemoryModel(llm.base, llm.tokenizer, identity=llm.identity)
    after = llm.logits(memory, [5, 6, 7])
    assert torch.equal(after, fresh.logits(memory, [5, 6, 7])) and not torch.equal(after, before)


def test_weights_that_were_replaced_and_a_model_that_was_cast_are_noticed():
    llm = MemoryModel(tiny_model(), first_token=1)
    state = {name: weight.clone() for name, weight in llm.base.state_dict().items()}
    llm.base.load_state_dict(state, assign=True)
    memory = llm.write_ids(llm.empty(N=64, K=16), [5, 6, 7])
    llm.logits(memory, [8, 9])
    with torch.no_grad():
        for weight in llm.base.parameters():
            weight.mul_(1.3)
    fresh = MemoryModel(llm.base, first_token=1, identity=llm.identity)
    assert torch.equal(llm.logits(memory, [8, 9]), fresh.logits(memory, [8, 9]))
    llm.base.to(torch.bfloat16)
    assert llm.logits(llm.write_ids(llm.empty(N=64, K=16), [5, 6, 7]), [8, 9]).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="holds float32, the model runs in bfloat16"):
        llm.logits(memory, [8, 9])


def test_the_default_size_fits_the_context():
    llm = MemoryModel(tiny_model(max_position_embeddings=256), byte_tokenizer())
    memory = llm.empty()
    assert (memory.N, memory.K) == (128, 16)
    assert (MemoryModel(tiny_model(max_position_embeddings=8192), byte_tokenizer()).empty().N) == 2048
    with pytest.raises(ValueError, match="Choose a smaller N or K"):
        llm.empty(N=256)


def test_without_a_tokenizer_only_ids_work():
    llm = MemoryModel(tiny_model())
    memory = llm.write_ids(llm.empty(N=64, K=16), [5, 6, 7])
    assert llm.generate_ids(memory, [5], max_new_tokens=2).shape == (1, 3)
    for call in (lambda: llm.write(memory, "text"), lambda: llm.ask(memory, "why?")):
        with pytest.raises(ValueError, match="without a tokenizer"):
            call()


def test_an_empty_memory_holds_no_text(llm, memory):
    assert llm.text_of(llm.empty(N=64, K=16)).tolist() == [] and llm.text_of(llm.blank()).tolist() == []
    assert llm.tokenizer.decode(llm.text_of(memory)) == "the door is blue"


def test_score_is_what_the_logits_say(llm, memory):
    score = llm.score(memory, [5, 6], [7, 8, 9])
    logits = llm.logits(memory, [5, 6, 7, 8, 9]).log_softmax(-1)
    expected = torch.stack([logits[1, 7], logits[2, 8], logits[3, 9]])
    assert torch.allclose(score.logprobs, expected) and score.hits.tolist() == [
        bool(logits[i].argmax() == t) for i, t in ((1, 7), (2, 8), (3, 9))
    ]


def test_a_write_gives_the_updates_that_repeat_it(llm):
    for longterm in (None, {"R": 4}):
        before, updates, order = llm.empty(N=16, K=8, longterm=longterm), [], []
        after = llm.write_ids(
            before,
            list(range(10, 50)),
            "notes",
            progress=lambda *_, order=order: order.append("progress"),
            updates=lambda update, updates=updates, order=order: (updates.append(update), order.append("update")),
        )
        assert order == ["update", "progress"] * 5 and [u.tokens for u in updates] == [8] * 5
        again = before
        for update in updates:
            again = memories.update(again, update)
        assert torch.equal(again.slots, after.slots) and torch.equal(again.origins, after.origins)
        assert again.sources == after.sources and again.tokens == 40


def test_tokens_of_a_text_and_of_turns_are_what_is_written(llm):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    assert llm.tokens("a note") == llm.prompts.written("a note")
    assert llm.tokens(turns) == [i for turn in turns for i in llm.prompts.turn(turn)]
    for nothing in ("", []):
        with pytest.raises(ValueError, match="at least one"):
            llm.tokens(nothing)


def two_tensors(prefix):
    """Bytes of keys and values of all positions, with nothing beside them."""
    return sum(keys.nbytes + values.nbytes for keys, values in zip(prefix.keys, prefix.values, strict=True))


@pytest.mark.parametrize("searching", [{"form": "int8", "longterm": 4}, {"form": "exact", "longterm": 4}])
def test_rotated_keys_of_a_searched_memory_are_held_by_nobody(llm, searching):
    before = llm.write(llm.empty(N=32, K=16, **searching), "the door is blue and the roof is red")
    after = llm.write([before, before], ["the cat is old", "the dog is new"])[0]
    llm.ask(after, "which door?", max_new_tokens=3)
    llm.context(after)
    for memory in (before, after):
        prefix = llm.prefix(memory)
        assert not prefix.keeps_front and prefix.nbytes == two_tensors(prefix)


def test_a_plain_read_keeps_rotated_keys_and_its_bits_do_not_change(llm):
    memory = llm.write(llm.empty(N=32, K=16), "the door is blue")
    prefix = llm.prefix(memory)
    assert prefix.nbytes == two_tensors(prefix)
    cache = prefix.cache(store=False)
    layers = [cache.fronts[0].layers[i]() for i in range(memory.L)]
    first = llm.logits(memory, [5, 6])
    assert prefix.keeps_front and prefix.nbytes == 1.5 * two_tensors(prefix) and llm.prefixes.nbytes >= prefix.nbytes
    for made, kept in zip(layers, prefix.passing().layers, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(made, kept(), strict=True))
    assert torch.equal(llm.logits(memory, [5, 6]), first)


def test_keys_and_values_of_a_coded_memory_take_two_tensors_a_slot(trained):
    memory = trained.write(trained.empty(N=96, K=64), "The door of the old mill by the river is blue. " * 10)
    assert memory.settings.form == "coded" and memory.needs_search
    answer = trained.ask(memory, "Which door is blue?", max_new_tokens=4)
    prefix = trained.prefix(memory)
    assert prefix.nbytes == prefix.P * 2 * 30 * 3 * 64 * 4  # so a slot takes 23,040 bytes in bfloat16
    trained.prefixes.clear()
    assert trained.ask(memory, "Which door is blue?", max_new_tokens=4) == answer


# --- what a caller may give ------------------------------------------------------------------------------------------


def test_a_path_is_read_and_names_its_source(llm, tmp_path):
    (tmp_path / "notes.txt").write_bytes("\ufeffthe gate is red — ü".encode())
    memory = llm.write(llm.empty(N=64, K=16), tmp_path / "notes.txt")
    plain = llm.write(llm.empty(N=64, K=16), "the gate is red — ü", "notes.txt")
    assert torch.equal(memory.slots, plain.slots) and memory.sources == plain.sources
    assert llm.write(llm.empty(N=64, K=16), tmp_path / "notes.txt", "mine").sources[0].name == "mine"
    both = llm.write([llm.empty(N=64, K=16)] * 2, [tmp_path / "notes.txt", "a text"])
    assert torch.equal(both[0].slots, memory.slots) and both[0].sources[0].name == "text"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (123, r"a text must be a str, or the pathlib.Path of a file; got int 123\."),
        (None, "got NoneType None"),
        (b"bytes", "got bytes b'bytes'"),
        ({"a": 1}, r"got dict \{'a': 1\}"),
        (["a", 1], "got int 1"),
        (Path("/no/such.txt"), "/no/such.txt: no such file"),
        (Path(__file__).parent, "is a folder; give one of its files"),
        (["a", "b"], "or lists of the same length: got one and a list of 2"),
    ],
)
def test_what_is_no_text_is_named(llm, memory, text, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        llm.write(memory, text)
    if not isinstance(text, list | dict):
        store = latentmem.Store(tmp_path)
        store.create("m", memory)
        with pytest.raises(ValueError, match=says):
            store.write(llm, "m", text)
        assert len(store.history("m")) == 1
        store.close()


def test_what_is_no_memory_or_no_question_is_named(llm, memory):
    with pytest.raises(ValueError, match=r"a memory comes from `empty`, `write` or `Memory.load`: got str"):
        llm.write("notes", "text")
    with pytest.raises(ValueError, match="a question must be a str, got int"):
        llm.ask(memory, 5)


def test_memory_text_and_answer_fit_to_the_last_position_and_not_one_beyond(llm):
    with pytest.raises(ValueError, match=r"N=20000 .* need 20257 positions, and this model has 1024"):
        llm.empty(N=20_000)
    memory = llm.write(llm.empty(N=512, K=64, longterm=0), "the door is blue. " * 20)
    room = 1024 - 1 - memory.M  # with the sink
    assert llm.generate_ids(memory, [5] * (room - 8), max_new_tokens=8).shape == (1, room)
    with pytest.raises(TooLongError, match=f"takes {room - 7} tokens and the answer up to 8.* room for {room}"):
        llm.generate_ids(memory, [5] * (room - 7), max_new_tokens=8)
