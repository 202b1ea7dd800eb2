"""What is said is kept before it is answered, once; the newest turns stand in the context, and nothing is lost."""

import re

import pytest
import torch
from moments import Moments

from latentmem.model.chat import Conversation, in_context
from latentmem.model.model import MemoryModel
from latentmem.store import Store, Turns
from latentmem.store.objects import Disk
from latentmem.testing import byte_tokenizer, tiny_model

SOURCE = re.compile(r"chat \d{4}-\d\d-\d\d \d\d:\d\d #(\d+)")


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(), byte_tokenizer())


def turns_of(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_each_turn_of_the_user_is_written_once_as_any_text_under_a_name_of_its_own(llm):
    start = llm.write(llm.empty(N=256, K=32), "some facts")
    talk = Conversation(llm, start)
    expected = start
    for text in ("my cat is Pip", "and a dog"):
        talk.say(text, max_new_tokens=4)
        expected = llm.write(expected, text, source=talk.sources[-1], role="raw")
        assert torch.equal(talk.memory.slots, expected.slots)
    assert [source.name for source in talk.memory.sources] == ["text", *talk.sources]
    assert len({SOURCE.fullmatch(source)[1] for source in talk.sources}) == 2
    assert talk.close() is talk.memory


def test_an_answer_is_made_of_the_memory_before_the_turn_and_of_the_turns_in_the_context(llm):
    memory = llm.write(llm.empty(N=128, K=32), "some facts")
    talk = Conversation(llm, memory)
    answers = [talk.say(text, max_new_tokens=6) for text in ("hello", "and now?")]
    assert answers[0] == Conversation(llm, memory).say("hello", max_new_tokens=6)
    read = llm.write(memory, "hello", source=talk.sources[0])
    fresh = Conversation(llm, read, turns_of("hello", answers[0]), write="none")
    assert fresh.say("and now?", max_new_tokens=6) == answers[1]
    assert fresh.memory is read and fresh.close() is read and fresh.sources == []


@pytest.mark.parametrize(("write", "words"), [("user", 1), ("both", 2), ("none", 0)])
def test_whose_turns_are_written_is_chosen(llm, monkeypatch, write, words):
    talk = Conversation(llm, llm.empty(N=256, K=32), write=write)
    monkeypatch.setattr(llm, "stream_ids", lambda *_, **__: iter(["not", "ed"]))
    talk.say("my cat is Pip")
    text = llm.tokenizer.decode(llm.text_of(talk.memory)) if words else ""
    assert (text.count("my cat is Pip"), text.count("noted")) == (int(words > 0), int(words > 1))
    assert len(talk.memory.sources) == len(talk.sources) == int(words > 0)  # an answer has the source of its turn


def test_what_can_not_be_written_is_refused(llm):
    with pytest.raises(ValueError, match="write must be one of user, both, none, got 'all'"):
        Conversation(llm, llm.empty(N=64, K=16), write="all")


def test_one_turn_can_be_forgotten(llm, tmp_path):
    store = Store(tmp_path / "s")
    store.create("work", llm.empty(N=256, K=32))
    talk = Conversation(llm, store.open("work"), journal=Turns(store, "work"))
    for text in ("my cat is Pip", "my code is 4711"):
        talk.say(text, max_new_tokens=2)
    store.forget_by_replay(llm, "work", talk.sources[1])
    expected = llm.write(llm.empty(N=256, K=32), "my cat is Pip", source=talk.sources[0])
    assert torch.equal(store.open("work").slots, expected.slots)


def test_the_oldest_turns_leave_the_context_and_stay_in_the_memory(llm):
    talk = Conversation(llm, llm.empty(N=256, K=32), window=80)
    for i in range(4):
        talk.say(f"message number {i}", max_new_tokens=4)
    kept = [m["content"] for m in talk.messages if m["role"] == "user"]
    assert kept[-1] == "message number 3" and "message number 0" not in kept
    text = llm.tokenizer.decode(llm.text_of(talk.memory))
    assert all(text.count(f"message number {i}") == 1 for i in range(4))


def test_a_window_takes_whole_exchanges_and_what_the_system_says(llm):
    messages = [{"role": "system", "content": "Be kind."}, *turns_of("a", "b", "c", "d", "e")]
    tokens = [len(llm.prompts.turn(message)) for message in messages]
    assert in_context(llm.prompts, messages, sum(tokens)) == messages
    assert in_context(llm.prompts, messages, sum(tokens[1:5]) - 1) == [messages[0], *messages[3:]]
    assert in_context(llm.prompts, messages, 0) == [messages[0], messages[-1]]
    assert in_context(llm.prompts, messages[-1:], 100) == messages[-1:]


def test_what_was_said_before_the_listener_left_is_kept(llm):
    talk = Conversation(llm, llm.empty(N=64, K=16))
    stream = talk.stream("hello", max_new_tokens=30)
    for part in stream:
        if part:
            break
    stream.close()
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] and talk.messages[1]["content"]
    assert talk.memory.tokens > 0
    talk.stream("nobody reads the answer")
    assert "nobody reads" in llm.tokenizer.decode(llm.text_of(talk.close()))


def test_an_answer_of_nothing_keeps_the_turn_and_the_chat_goes_on(llm, monkeypatch):
    talk = Conversation(llm, llm.empty(N=256, K=32), write="both")
    for silence in ([], [" \n"]):
        monkeypatch.setattr(llm, "stream_ids", lambda *_, silence=silence, **__: iter(silence))
        assert talk.say("hello?") == ""
    monkeypatch.undo()
    talk.say("still there?", max_new_tokens=4)
    assert [m["content"] for m in talk.messages][:5] == ["hello?", "", "hello?", "", "still there?"]


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing(llm):
    start = turns_of("a", "b")
    talk = Conversation(llm, llm.empty(N=64, K=16), start)
    room = llm.room(talk.memory) - 128
    with pytest.raises(ValueError, match=rf"takes \d+ tokens and there is room for {room}"):
        talk.stream("b" * 4000)
    with pytest.raises(ValueError, match="empty"):
        talk.stream(" ")
    assert talk.messages == start and talk.close().M == 0


def test_turns_leave_a_context_that_is_smaller_than_the_window(llm):
    talk = Conversation(llm, llm.empty(N=64, K=16), turns_of(*["word " * 40] * 8), window=10**6)
    room = llm.room(talk.memory)
    talk.say("b" * 300, max_new_tokens=4)
    assert 2 <= len(talk.messages) < 10 and talk.messages[-2]["content"] == "b" * 300
    assert len(llm.prompts.chat(talk.messages, bare=True)) <= room + 16


def test_an_answer_that_fails_keeps_the_turn(llm, monkeypatch):
    memory = llm.write(llm.empty(N=128, K=32), "some facts")
    talk = Conversation(llm, memory)

    def failing(*_, **__):
        yield "I "
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(llm, "stream_ids", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            talk.say("hello")
    assert [m["content"] for m in talk.messages] == ["hello", "I"] and talk.memory.updates == memory.updates + 1
    fresh = Conversation(llm, talk.memory, talk.messages)
    assert talk.say("again", max_new_tokens=4) == fresh.say("again", max_new_tokens=4)


def test_answers_do_not_repeat_themselves_unless_that_is_wanted(llm, monkeypatch):
    chosen = []
    monkeypatch.setattr(llm, "stream_ids", lambda *_, **options: chosen.append(options) or iter([]))
    talk = Conversation(llm, llm.empty(N=64, K=16), write="none")
    talk.say("hello")
    talk.say("hello", repeats=True, max_new_tokens=5, do_sample=True)
    assert chosen == [
        {"max_new_tokens": 128, "repeats": False},
        {"max_new_tokens": 5, "repeats": True, "do_sample": True},
    ]


def test_a_turn_that_can_not_be_written_now_waits_and_comes_once(llm, tmp_path, monkeypatch):
    store = Store(tmp_path / "s")
    store.create("work", llm.empty(N=256, K=32))
    talk = Conversation(llm, store.open("work"), journal=Turns(store, "work"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "create", full)
        with pytest.raises(OSError, match="No space"):
            talk.say("my cat is Pip", max_new_tokens=2)
    assert talk.memory.M == 0 and store.has_pending("work")
    talk.say("and a dog", max_new_tokens=2)
    text = llm.tokenizer.decode(llm.text_of(talk.memory))
    assert text.count("my cat is Pip") == text.count("and a dog") == 1
    assert talk.close() is store.open("work") and len(store.history("work")) == 3


def test_two_conversations_with_one_memory_go_on_at_once(llm, tmp_path):
    store, other = Store(tmp_path / "s"), Store(tmp_path / "s")
    store.create("work", llm.empty(N=256, K=32))
    one, two = (Conversation(llm, s.open("work"), journal=Turns(s, "work")) for s in (store, other))
    for talk, text in ((one, "red"), (two, "green"), (one, "blue")):
        talk.say(text, max_new_tokens=2)
    assert [source.name for source in one.memory.sources] == [one.sources[0], *two.sources, one.sources[1]]
    assert len({*one.sources, *two.sources}) == 3


@pytest.mark.parametrize(("preset", "compression"), [("exact", 4), ("paper", 1)])
def test_turns_are_written_in_every_preset(llm, preset, compression):
    talk = Conversation(llm, llm.empty(N=128, K=32, preset=preset, compression=compression))
    talk.say("b" * 400, max_new_tokens=4)
    talk.say("c", max_new_tokens=4)
    assert talk.memory.M > 0 and len(talk.memory.sources) == 2


@pytest.mark.parametrize("write", ["user", "both"])
def test_a_crash_at_any_moment_loses_no_turn_and_writes_none_twice(llm, tmp_path, monkeypatch, write):
    """Stop a conversation before everything that it puts on the disk, start again, and look at what is left."""
    moments = Moments(monkeypatch)

    def run(folder, cut):
        said = []
        moments.begin(cut)
        try:
            store = Store(folder)
            if "work" not in store.names():
                store.create("work", llm.empty(N=512, K=64))
            store.apply(llm, "work")
            talk = Conversation(llm, store.open("work"), write=write, journal=Turns(store, "work"), window=90)
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
        for message in said[:-1]:
            assert text.count(message) == 1, (cut, message)
        assert not said or text.count(said[-1]) <= 1  # the last one may have been cut off before it was kept
        store.close()
