"""Turns stay in the context while they fit, leave it for the memory once, and nothing is said twice."""

import pytest
import torch
from moments import Moments

from latentmem.model.chat import Conversation
from latentmem.model.model import MemoryModel
from latentmem.store import Store, Turns
from latentmem.store.objects import Disk
from latentmem.testing import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(), byte_tokenizer())


def test_a_second_turn_on_the_kept_cache_is_what_a_fresh_one_says(llm):
    memory = llm.write(llm.empty(N=128, K=32), "some facts")
    talk = Conversation(llm, memory)
    talk.say("hello", max_new_tokens=6)
    fresh = Conversation(llm, memory, talk.messages)
    again = fresh.say("and now?", max_new_tokens=6)
    assert talk.say("and now?", max_new_tokens=6) == again
    assert talk.memory is memory and len(talk.messages) == 4


def test_a_kept_cache_behind_the_best_update_only_is_what_a_fresh_one_says(llm):
    memory = llm.empty(N=64, K=16, order="best-only", longterm=2)
    for text in ("Ada has a key.", "The boat is green and old.", "Ada lives in Oslo."):
        memory = llm.write(memory, text, source=text)
    kept, fresh = (Conversation(llm, memory) for _ in range(2))
    for _ in range(4):
        fresh._cache, fresh._read = None, []
        assert kept.say("Where is Ada?", max_new_tokens=5) == fresh.say("Where is Ada?", max_new_tokens=5)


def test_closing_writes_every_turn_once_with_its_role(llm):
    memory = llm.empty(N=256, K=32)
    messages = [{"role": "user", "content": "my cat is Pip"}, {"role": "assistant", "content": "noted"}]
    talk = Conversation(llm, memory, messages)
    after = talk.close()
    expected = [i for m in messages for i in llm.prompts.turn(m)]
    assert after.tokens == len(expected) and [s.name for s in after.sources] == ["chat"]
    assert torch.equal(after.slots, llm.write_ids(memory, expected).slots)
    assert talk.messages == [] and talk.close() is after


def test_the_oldest_turns_leave_when_the_window_is_full(llm):
    talk = Conversation(llm, llm.empty(N=256, K=32), window=80)
    for i in range(4):
        talk.say(f"message number {i}", max_new_tokens=4)
    assert talk.memory.tokens > 0
    kept = [m["content"] for m in talk.messages if m["role"] == "user"]
    assert kept and kept[-1] == "message number 3" and "message number 0" not in kept
    text = llm.tokenizer.decode(llm.text_of(talk.memory))
    assert text.count("message number 0") == 1


def test_a_second_turn_sees_the_first_also_behind_an_empty_memory(llm):
    talk = Conversation(llm, llm.empty(N=64, K=16))
    talk.say("hello", max_new_tokens=6)
    again = Conversation(llm, talk.memory, talk.messages).say("and now?", max_new_tokens=6)
    assert talk.say("and now?", max_new_tokens=6) == again


def test_what_was_said_before_the_listener_left_is_kept(llm):
    talk = Conversation(llm, llm.empty(N=64, K=16))
    stream = talk.stream("hello", max_new_tokens=30)
    for part in stream:
        if part:
            break
    stream.close()
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] and talk.messages[1]["content"]


def test_an_answer_of_nothing_keeps_the_turn_and_the_chat_goes_on(llm, monkeypatch):
    talk = Conversation(llm, llm.empty(N=256, K=32))
    for silence in ([], [" \n"]):
        monkeypatch.setattr(llm, "stream_ids", lambda *_, silence=silence, **__: iter(silence))
        assert talk.say("hello?") == ""
    monkeypatch.undo()
    talk.say("still there?", max_new_tokens=4)
    assert [m["content"] for m in talk.messages][:5] == ["hello?", "", "hello?", "", "still there?"]
    assert talk.close().tokens > 0


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing(llm):
    start = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk = Conversation(llm, llm.empty(N=64, K=16), start, window=60)
    with pytest.raises(ValueError, match=r"takes \d+ tokens and there is room for 60"):
        talk.stream("b" * 200)
    with pytest.raises(ValueError, match="empty"):
        talk.stream(" ")
    assert talk.messages == start and talk.memory.M == 0


def test_an_answer_that_fails_keeps_the_turn_and_reads_anew(llm, monkeypatch):
    memory = llm.write(llm.empty(N=128, K=32), "some facts")
    talk = Conversation(llm, memory)

    def failing(*_, **__):
        yield "I "
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(llm, "stream_ids", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            talk.say("hello")
    assert [m["content"] for m in talk.messages] == ["hello", "I"] and talk._cache is None
    fresh = Conversation(llm, memory, talk.messages)
    assert talk.say("again", max_new_tokens=4) == fresh.say("again", max_new_tokens=4)


def test_a_failed_save_can_be_tried_again_and_repeats_nothing(llm, tmp_path, monkeypatch):
    store = Store(tmp_path / "s")
    store.create("work", llm.empty(N=256, K=32))
    with Turns(store, "work") as turns:
        talk = Conversation(llm, store.open("work"), journal=turns)
        talk.say("my cat is Pip", max_new_tokens=2)

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Disk, "create", full)
            with pytest.raises(OSError, match="No space"):
                talk.close()
        assert len(talk.messages) == 2 and talk.memory.M == 0 and turns.pending() == talk.messages
        memory = talk.close()
        assert llm.tokenizer.decode(llm.text_of(memory)).count("my cat is Pip") == 1
        assert memory is store.open("work") and turns.pending() == []
        talk.say("and a dog", max_new_tokens=2)
        assert talk.close().updates > memory.updates and len(store.history("work")) == 3


@pytest.mark.parametrize(("preset", "compression"), [("exact", 4), ("paper", 1)])
def test_turns_leave_in_every_preset_without_an_endless_loop(llm, preset, compression):
    memory = llm.empty(N=128, K=32, preset=preset, compression=compression)
    start = [{"role": r, "content": "word " * 60} for r in ("user", "assistant")]
    talk = Conversation(llm, memory, start, window=700)
    talk.say("b" * 400, max_new_tokens=4)
    assert talk.messages[0]["content"] == "b" * 400 and talk.memory.M > 0


def test_a_crash_at_any_moment_loses_no_turn_and_writes_none_twice(llm, tmp_path, monkeypatch):
    """Stop a conversation before everything that it puts on the disk, start again, and look at what is left."""
    moments = Moments(monkeypatch)

    def run(folder, cut):
        said = []
        moments.begin(cut)
        try:
            store = Store(folder)
            if "work" not in store.names():
                store.create("work", llm.empty(N=512, K=64))
            with Turns(store, "work") as turns:
                store.apply(llm, "work")
                talk = Conversation(llm, store.open("work"), turns.pending(), journal=turns, window=90)
                for i in range(4 if cut else 0):
                    said.append(f"message {i}")
                    talk.say(f"message {i}", max_new_tokens=2)
                talk.close()
        except Moments.Cut:
            pass
        return said

    run(tmp_path / "whole", 10**6)
    assert moments.count > 30
    for cut in range(1, moments.count + 1):
        said = run(tmp_path / str(cut), cut)
        run(tmp_path / str(cut), 0)  # with nothing to say: what is left is written
        store = Store(tmp_path / str(cut))
        text = llm.tokenizer.decode(llm.text_of(store.open("work")))
        assert Turns(store, "work").pending() == []
        for message in said[:-1]:
            assert text.count(message) == 1, (cut, message)
        assert not said or text.count(said[-1]) <= 1  # the last one may have been cut off before it was kept
        store.close()
