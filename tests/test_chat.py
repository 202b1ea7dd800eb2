"""Turns stay in the context while they fit, leave it for the memory once, and nothing is said twice."""

import pytest
import torch

from latentmem.chat import Conversation
from latentmem.model import MemoryModel
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


def test_what_was_said_before_the_listener_left_is_kept(llm):
    talk = Conversation(llm, llm.empty(N=64, K=16))
    stream = talk.stream("hello", max_new_tokens=30)
    for part in stream:
        if part:
            break
    stream.close()
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing(llm):
    talk = Conversation(llm, llm.empty(N=64, K=16), [{"role": "user", "content": "a"}], window=60)
    with pytest.raises(ValueError, match=r"takes \d+ tokens and there is room for 60"):
        talk.stream("b" * 200)
    with pytest.raises(ValueError, match="empty"):
        talk.stream(" ")
