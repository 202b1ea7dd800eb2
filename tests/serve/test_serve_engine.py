"""Answers of many memories at once are those of each alone; they join, leave, stop and fail without the others."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from latentmem import MemoryModel
from latentmem.model.batch import Batch, Detokenizer, draw
from latentmem.serve.engine.answer import Answer, Sampling
from latentmem.serve.engine.engine import Engine, _pauses, release_threads
from latentmem.testing import byte_tokenizer, tiny_model

FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
}  # plain; norms on the keys; a sliding window


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request):
    return MemoryModel(tiny_model(request.param, **FAMILIES[request.param]), byte_tokenizer())


@pytest.fixture
def engine(llm):
    engine = Engine(llm, batch=4)
    engine.start()
    yield engine
    engine.stop()


def memories(llm, count):
    """Memories of different lengths, the first one empty."""
    made = [llm.empty(N=24, K=8)]
    for i in range(1, count):
        made.append(llm.write(llm.empty(N=24, K=8), f"{i} is the number of this memory. " * (i % 3 + 1)))
    return made


def ask(engine, memory, ids, **sampling):
    reply = Answer()
    engine.submit(reply, memory, ids, Sampling(**sampling))
    return reply


def text(reply, choice=0):
    pieces = [piece for piece in reply if piece.choice == choice]
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return "".join(piece.text for piece in pieces), pieces[-1].finish


def alone(llm, memory, ids, new):
    return llm.tokenizer.decode(
        llm.generate_ids(memory, ids, max_new_tokens=new)[0, len(ids) :], skip_special_tokens=True
    )


def test_many_answers_at_once_are_those_of_each_alone(llm, engine):
    some = memories(llm, 7)
    prompts = [llm.prompts.text("x" * (3 + 5 * i) + "?") for i in range(7)]
    replies = [ask(engine, m, p, max_tokens=5 + 3 * i) for i, (m, p) in enumerate(zip(some, prompts, strict=True))]
    for i, (memory, ids, reply) in enumerate(zip(some, prompts, replies, strict=True)):
        assert text(reply)[0] == alone(llm, memory, ids, 5 + 3 * i)
        assert (reply.prompt_tokens, reply.completion_tokens <= 5 + 3 * i) == (len(ids), True)


def test_rows_with_long_term_memories_search_them_again_as_each_alone(llm, engine):
    some = []
    for i in range(6):
        memory = llm.empty(N=24, K=8, longterm={"R": 8, "every": 3} if i % 3 else None)
        for j in range(i + 1):
            memory = llm.write(memory, f"{j} is the number of text {j} of memory {i}. ", source=str(j))
        some.append(memory)
    assert [memory.R for memory in some[1:3]] == [8, 8]
    prompts = [llm.prompts.text("x" * (3 + 5 * i) + "?") for i in range(6)]
    replies = [ask(engine, m, p, max_tokens=8 + 2 * i) for i, (m, p) in enumerate(zip(some, prompts, strict=True))]
    for i, (memory, ids, reply) in enumerate(zip(some, prompts, replies, strict=True)):
        assert text(reply)[0] == alone(llm, memory, ids, 8 + 2 * i)


def test_logits_of_joined_rows_are_those_of_each_alone(llm, engine, monkeypatch):
    """Every pass of every row, joined or moved together, beside the row alone with all its tokens read at once."""
    seen, read = {}, Batch._read

    def watched(batch, tokens):
        logits = read(batch, tokens)
        for row, scores in zip(batch.rows, logits, strict=True):
            if not batch.reads and not row.ended:
                seen.setdefault(row, []).append(scores)
        return logits

    monkeypatch.setattr(Batch, "_read", watched)
    some = memories(llm, 6)
    prompts = [llm.prompts.text(f"{i}" * (4 + 3 * (i % 4))) for i in range(6)]
    replies = [
        ask(engine, m, p, max_tokens=4 + 5 * (i % 3)) for i, (m, p) in enumerate(zip(some, prompts, strict=True))
    ]
    for reply in replies:
        text(reply)
    assert len(seen) == 6
    for row, logits in seen.items():
        memory = some[prompts.index(list(row.ids))]
        ids = list(row.ids)
        for scores in logits:
            expected = llm.logits(memory, ids)[-1]
            assert (scores - expected).abs().max() < 1e-4
            ids.append(int(scores.argmax()))
            if ids[-1] in engine._ends:
                break


def test_one_memory_for_several_answers_and_seeds(llm, engine):
    memory = memories(llm, 2)[1]
    ids = llm.prompts.text("hello")
    first = ask(engine, memory, ids, n=3, temperature=1.0, seed=5, max_tokens=8)
    pieces = list(first)
    texts = ["".join(p.text for p in pieces if p.choice == i) for i in range(3)]
    assert len(set(texts)) > 1
    assert {p.choice for p in pieces if p.finish} == {0, 1, 2}
    again = list(ask(engine, memory, ids, n=3, temperature=1.0, seed=5, max_tokens=8))
    assert ["".join(p.text for p in again if p.choice == i) for i in range(3)] == texts
    assert ask(engine, memory, ids, temperature=1.0, top_p=1e-6, max_tokens=8, seed=1) is not None
    assert text(ask(engine, memory, ids, temperature=1.0, top_p=1e-6, max_tokens=8)) == text(
        ask(engine, memory, ids, max_tokens=8)
    )


def test_a_drawn_token_has_its_probability():
    logits, generator = torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw(logits, 0.5, 1.0, generator) for _ in range(4000)]).bincount(minlength=4) / 4000
    expected = (logits / 0.5).softmax(0)
    assert ((drawn - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt() + 1e-3).all()
    some = {draw(logits, 1.0, 0.7, generator) for _ in range(300)}
    assert some == {1, 2}  # .24 and .64: the first that reach .7 together


def test_a_cancelled_answer_makes_room(llm, engine):
    memory = memories(llm, 2)[1]
    slow = [ask(engine, memory, llm.prompts.text("a"), max_tokens=2000) for _ in range(4)]
    waits = ask(engine, memory, llm.prompts.text("b"), max_tokens=2)
    for reply in slow:
        next(iter(reply))  # leaving the loop cancels
    assert text(waits)[1] in ("length", "stop")


def test_what_does_not_fit_is_refused_and_what_is_long_is_cut(llm, engine):
    memory = memories(llm, 2)[1]
    limit = llm.room(memory)
    with pytest.raises(ValueError, match="room for"):
        ask(engine, memory, [5] * limit)
    reply = ask(engine, memory, [5] * (limit - 3), max_tokens=50)
    assert text(reply)[1] in ("length", "stop")
    assert reply.completion_tokens <= 3


def test_a_failing_batch_is_told_to_its_readers_and_the_next_one_works(llm, engine, monkeypatch):
    memory, ids = memories(llm, 2)[1], llm.prompts.text("hello")
    monkeypatch.setattr(Batch, "advance", lambda self: 1 / 0)
    replies = [ask(engine, memory, ids, n=2), ask(engine, memory, ids)]
    for reply in replies:
        with pytest.raises(ZeroDivisionError):
            list(reply)
    monkeypatch.undo()
    assert text(ask(engine, memory, ids, max_tokens=3))
    assert engine.stats()["answers_running"] == 0


def test_calls_run_between_answers_and_give_their_errors(llm, engine):
    memory = memories(llm, 2)[1]
    running = ask(engine, memory, llm.prompts.text("a"), max_tokens=60)
    assert engine.call(lambda: threading.current_thread().name) == "engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0)
    assert text(running)[1] in ("length", "stop")


def test_pieces_come_to_a_loop_as_well(llm, engine):
    memory, ids = memories(llm, 3)[2], llm.prompts.text("loop")

    async def read():
        return [piece async for piece in ask(engine, memory, ids, max_tokens=9)]

    expected = text(ask(engine, memory, ids, max_tokens=9))
    pieces = asyncio.run(read())
    assert ("".join(p.text for p in pieces), pieces[-1].finish) == expected


def test_many_threads(llm, engine):
    some = memories(llm, 4)
    prompts = [llm.prompts.text(f"q{i}") for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda i: text(ask(engine, some[i % 4], prompts[i], max_tokens=6))[0], range(12)))
    assert found == [alone(llm, some[i % 4], prompts[i], 6) for i in range(12)]


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        ("hello world", (), ("hello world", False)),
        ("hello END world", ("END",), ("hello ", True)),
        ("hello EN", ("END",), ("hello EN", False)),
        ("a\nb", ("\n",), ("a", True)),
        ("aab", ("ab", "b"), ("a", True)),
        ("grüße 😀 ok", ("ok",), ("grüße 😀 ", True)),
    ],
)
def test_text_comes_when_it_can_not_change_and_ends_at_a_stop_string(tokens, stop, expected):
    tokenizer = byte_tokenizer()
    words, given = Detokenizer(tokenizer, stop), []
    for token in tokenizer.encode(tokens, add_special_tokens=False):
        given.append(words.add(token))
        assert "\ufffd" not in given[-1]
        if words.stopped:
            break
    else:
        given.append(words.rest())
    assert ("".join(given), words.stopped) == expected


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n must"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_settings_that_make_no_sense(bad, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**bad)


def test_keys_and_values_are_kept_up_to_their_bytes(llm):
    some = memories(llm, 5)[1:]
    llm.prefixes.limit = None
    for memory in some:
        llm.context(memory)
    each = llm.prefixes.nbytes / 4
    try:
        llm.prefixes.limit = int(2.5 * each)
        ids = llm.prompts.text("?")
        before = [llm.logits(memory, ids) for memory in some]
        assert llm.prefixes.nbytes <= llm.prefixes.limit
        assert len(llm.prefixes.memories) < 4
        assert llm.prefixes.memories[-1] is some[-1]
        assert all(torch.equal(llm.logits(m, ids), logits) for m, logits in zip(some, before, strict=True))
    finally:
        llm.prefixes.limit = None


def test_keys_and_values_are_gone_when_they_are_not_kept(llm):
    """Without a cycle of references, which only a collection would end: they are large."""
    memory = memories(llm, 2)[1]
    front, prefix = llm.context(memory).fronts[0], weakref.ref(llm.prefixes.get(memory))
    assert llm.context(memory).fronts[0] is front
    del front
    gc.disable()
    try:
        del memory
        assert prefix() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-38, 1.0), (1.0, 1e-46), (1e-38, 1e-46)])
def test_the_smallest_settings_take_the_likeliest_token(temperature, top_p):
    logits = torch.tensor([0.0, 50.0, 49.0])
    assert {draw(logits, temperature, top_p, torch.Generator().manual_seed(i)) for i in range(20)} == {1}


def test_what_is_cancelled_while_its_prompt_is_read_is_not_read_to_its_end(llm, engine, monkeypatch):
    monkeypatch.setattr("latentmem.serve.engine.engine.CHUNK", 4)
    memory, passes, read = memories(llm, 2)[1], [], Batch._read
    reply = Answer()

    def watched(batch, tokens):
        passes.append(tokens.shape)
        reply.cancel()
        return read(batch, tokens)

    monkeypatch.setattr(Batch, "_read", watched)
    engine.submit(reply, memory, llm.prompts.text("a long prompt " * 10), Sampling())
    assert list(reply) == []
    assert len(passes) == 1
    assert engine.stats()["answers_running"] == 0


def test_prompts_that_are_read_in_chunks_give_the_same(llm, engine, monkeypatch):
    some = memories(llm, 3)
    prompts = [llm.prompts.text("x" * n) for n in (3, 30, 17)]
    expected = [alone(llm, m, p, 5) for m, p in zip(some, prompts, strict=True)]
    monkeypatch.setattr("latentmem.serve.engine.engine.CHUNK", 7)
    replies = [ask(engine, m, p, max_tokens=5) for m, p in zip(some, prompts, strict=True)]
    assert [text(reply)[0] for reply in replies] == expected


def test_an_engine_that_has_ended_says_so(llm):
    engine = Engine(llm)
    engine.start()
    engine.stop()
    with pytest.raises(RuntimeError, match="ended"):
        engine.call(lambda: None)
    with pytest.raises(RuntimeError, match="ended"):
        ask(engine, llm.blank(), [5])
    with pytest.raises(ValueError, match="empty"):
        ask(engine, llm.blank(), [])


def test_helpers_that_were_released_come_back():
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    before = a @ b
    assert all(pause(2) == 0 for pause in _pauses())
    release_threads()
    assert torch.equal(a @ b, before)
    shipped = list((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    assert len(_pauses()) >= (len(shipped) > 0)
