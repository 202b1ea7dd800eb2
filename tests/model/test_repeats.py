"""An answer ends where it begins to say again what it has said; what is said once is given whole."""

import pytest

from latentmem.model.batch import Detokenizer
from latentmem.model.model import MemoryModel
from latentmem.model.repeats import LONGEST, Once
from latentmem.testing import byte_tokenizer, tiny_model


def given(text, size):
    """What is given of a text that comes in parts of so many characters, and whether it was ended."""
    once, parts = Once(), []
    for i in range(0, len(text), size):
        parts.append(once.add(text[i : i + size]))
        if once.stopped:
            break
    return "".join(parts) + once.rest(), once.stopped


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("I like the sea. I like the sea. I like", "I like the sea."),
        ("I like the sea. And you? I like  the SEA. More", "I like the sea. And you?"),
        ('He said "I am here." So he said. He said "I am here." ', 'He said "I am here." So he said.'),
        ("I like the sea. I like the sea", "I like the sea. I like the sea"),
        ("我喜欢和你一起去海边散步。我们走吧。我喜欢和你一起去海边散步。", "我喜欢和你一起去海边散步。我们走吧。"),
        (
            "A line.\nAnother line.\nA line of code\nA line of code\n",
            "A line.\nAnother line.\nA line of code\nA line of code\n",
        ),
        ("Yes. Yes. It is 3.5 or 3.5 m long. No. No.", "Yes. Yes. It is 3.5 or 3.5 m long. No. No."),
        ("| --- | --- | --- | --- | --- | --- | --- | --- |", "| --- | --- | --- | --- | --- | --- | --- | --- |"),
        ("", ""),
        (" \n ", " \n "),
    ],
)
def test_a_sentence_that_comes_again_ends_the_text_before_it(text, kept, size):
    assert given(text, size)[0].strip() == kept.strip()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("part", ["and the sea, ", "No. No. ", "很好的。很好的。", "a b " * 20])
def test_a_part_that_comes_again_and_again_ends_the_text(part, size):
    text, stopped = given(part * 50, size)
    assert stopped and len(text) <= 4 * len(part) + LONGEST


def test_a_text_without_repeats_is_given_as_it_is():
    text = " ".join(f"Number {i} is the number behind {i - 1}." for i in range(300))
    for size in (1, 7, 5000):
        assert given(text, size) == (text, False)


def test_a_stop_string_and_a_repeat_give_what_was_held_back():
    tokenizer = byte_tokenizer()

    def said(text, **how):
        words, parts = Detokenizer(tokenizer, **how), []
        for token in tokenizer.encode(text, add_special_tokens=False):
            parts.append(words.add(token))
            if words.stopped:
                break
        return "".join(parts) + words.rest()

    text = "I like the sea. I like STOP it. I like the sea. "
    assert said(text, repeats=False, stop=["STOP"]) == "I like the sea. I like "
    assert said(text, repeats=False).strip() == "I like the sea. I like STOP it."
    assert said(text) == text


def test_a_stream_ends_and_other_rows_go_on(monkeypatch):
    llm = MemoryModel(tiny_model(), byte_tokenizer())
    memory = llm.write(llm.empty(N=64, K=16), "some facts")
    whole = "".join(llm.stream(memory, "and?", max_new_tokens=60))
    kept = "".join(llm.stream(memory, "and?", max_new_tokens=60, repeats=False))
    assert whole.startswith(kept)
    both = list(llm.stream([memory, memory], ["and?", "and?"], max_new_tokens=60, repeats=False))
    assert all("".join(piece for i, piece in both if i == row) == kept for row in (0, 1))
