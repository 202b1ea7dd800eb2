"""The service: own memories only, changes in order, nothing accepted is lost, and no more than fits waits."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
import serving
import torch
from serving import HANG

from latentmem import MemoryModel, Store
from latentmem.core import memory as core_memory
from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.errors import NameTakenError, NotFoundError, TooLongError
from latentmem.serve.engine.answer import Sampling
from latentmem.serve.engine.service import BusyError, Service
from latentmem.serve.settings import Sizes
from latentmem.testing import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def service(llm, store):
    service = Service(llm, store, Sizes(batch=4))
    service.start()
    yield service
    service.close()


def question(text):
    return lambda prompts, bare: prompts.question(text, bare=bare)


def answer(reply):
    return "".join(piece.text for piece in reply)


def held(service):
    """An engine that does nothing until the event is set."""
    free, there = threading.Event(), threading.Event()

    def hold():
        there.set()
        assert free.wait(HANG)

    threading.Thread(target=service._engine.call, args=(hold,), daemon=True).start()
    assert there.wait(HANG)
    return free


def settled(service):
    """Nothing is counted any more; a change's result is there a moment before it is counted off."""
    serving.wait(lambda: (service.stats()["reads"], service.stats()["changes"]) == (0, 0))


def test_all_that_a_write_computes_is_computed_in_the_thread_of_the_engine(store):
    """Passes of the model, and keys of the slots that go to a long-term memory; also where versions are replayed."""
    own, threads = MemoryModel(tiny_model(), byte_tokenizer(), name="tiny"), []
    seen = lambda *_: threads.append(threading.current_thread().name)  # noqa: E731
    for module in own.base.modules():
        module.register_forward_pre_hook(seen)
    new_keys = own.retriever.new_keys
    own.retriever.new_keys = lambda *args: seen() or new_keys(*args)
    service = Service(own, store)
    service.start()
    service.create("a", MemorySettings(N=32, K=16, longterm=LongTermSettings(R=8))).result()
    for i in range(3):
        service.write("a", f"text {i}, which is long enough to be cut into pieces", f"s{i}").done.result()
    service.write("a", "text that waits")
    answer(service.read("a", question("which?"), Sampling(max_tokens=2)))
    count = len(threads)
    service.change(lambda store, llm: store.forget_by_replay(llm, "a", "s0")).result()
    service.close()
    assert len(threads) > count > 0
    assert set(threads) == {"engine"}


def test_a_served_write_of_13_updates_is_tokenised_once_and_each_update_drawn_once(service, monkeypatch):
    text = "a" * (12 * 8 + 3)
    service.create("a", MemorySettings(N=32, K=8)).result()
    encoded, drawn = [], []
    encode, draw_all = service.llm.tokenizer.encode, core_memory.draw
    tokenizer = type(service.llm.tokenizer)
    monkeypatch.setattr(tokenizer, "encode", lambda self, *a, **k: encoded.append(a) or encode(*a, **k))
    monkeypatch.setattr(core_memory, "draw", lambda *a: drawn.append(a) or draw_all(*a))
    writing = service.write("a", text)
    assert writing.tokens == writing.done.result().tokens == len(text)
    assert (len(encoded), len(drawn)) == (1, 13)


def test_a_read_comes_behind_the_writes_that_were_accepted_before(service, llm):
    service.create("a", MemorySettings(N=64, K=16)).result()
    free = held(service)
    some = [service.write("a", f"text number {i}") for i in range(3)]
    reply = service.read("a", question("which?"), Sampling(max_tokens=4))
    assert [writing.version for writing in some] == [1, 2, 3]
    assert not any(writing.done.done() for writing in some)
    free.set()
    said = answer(reply)
    assert [writing.done.result().state for writing in some] == ["applied"] * 3
    assert reply.version == 3
    assert said == llm.ask(service.store.open("a"), "which?", max_new_tokens=4)


def test_an_older_version_is_read_as_it_was(service, llm):
    service.create("a").result()
    service.write("a", "one").done.result()
    before = service.store.open("a", 1)
    service.write("a", "two").done.result()
    reply = service.read("a", question("which?"), Sampling(max_tokens=4), version=1)
    assert (answer(reply), reply.version) == (llm.ask(before, "which?", max_new_tokens=4), 1)
    with pytest.raises(NotFoundError, match="0 to 2"):
        answer(service.read("a", question("which?"), Sampling(), version=3))


def test_writes_of_many_threads_give_what_their_order_gives(service, llm):
    service.create("a", MemorySettings(N=32, K=8)).result()
    with ThreadPoolExecutor(8) as pool:
        wait([w.done for w in pool.map(lambda i: service.write("a", f"this is text {i}", f"s{i}"), range(12))])
    again = llm.empty(N=32, K=8)
    for version in service.store.history("a")[1:]:
        again = llm.write(again, version.text, source=version.source)
    assert torch.equal(service.store.open("a").slots, again.slots)


def test_each_memory_answers_for_itself(service, llm):
    names = [f"m{i}" for i in range(9)]
    for i, name in enumerate(names):
        service.create(name, MemorySettings(N=64, K=16, seed=i)).result()
        service.write(name, f"the secret of {name} is {i * 7919}" * (i % 3 + 1)).done.result()
    replies = [(name, service.read(name, question("secret?"), Sampling(max_tokens=6))) for name in names * 3]
    for name, reply in replies:
        assert answer(reply) == llm.ask(service.store.open(name), "secret?", max_new_tokens=6)
    plain = service.read(None, question("secret?"), Sampling(max_tokens=6))
    assert (answer(plain), plain.version) == (llm.ask(llm.blank(), "secret?", max_new_tokens=6), None)


def test_more_than_fits_is_refused_and_then_taken_again(llm, store):
    service = Service(llm, store, Sizes(batch=2, waiting=3, changes=2))
    with pytest.raises(BusyError):
        service.read(None, question("?"), Sampling())  # it has not begun
    service.start()
    service.create("a").result()
    settled(service)
    free = held(service)
    replies = [service.read("a", question("?"), Sampling(max_tokens=2)) for _ in range(3)]
    with pytest.raises(BusyError) as busy:
        service.read("a", question("?"), Sampling())
    assert 1 <= busy.value.retry_after <= 60
    writes = [service.write("a", "text") for _ in range(2)]
    for refused in (lambda: service.write("a", "text"), lambda: service.change(lambda store, llm: None)):
        with pytest.raises(BusyError):
            refused()
    assert store.version("a").version == 2  # what was refused is not in the journal
    free.set()
    for reply in replies:
        answer(reply)
    wait([writing.done for writing in writes])
    settled(service)
    answer(service.read("a", question("?"), Sampling(max_tokens=2)))
    service.close()
    with pytest.raises(BusyError):
        service.write("a", "text")


def test_what_is_wrong_changes_and_holds_nothing(service):
    service.create("a").result()
    with pytest.raises(NameTakenError):
        service.create("a").result()
    with pytest.raises(NotFoundError):
        service.write("b", "text")
    for bad in ({"content": " "}, {"content": "x", "role": "nobody"}, {"content": "\ud800"}, {"content": []}):
        with pytest.raises(ValueError):
            service.write("a", **bad)
    with pytest.raises(NotFoundError):
        answer(service.read("b", question("?"), Sampling()))
    with pytest.raises(TooLongError, match="room"):
        answer(service.read("a", lambda prompts, bare: [5] * 2000, Sampling()))
    assert len(service.store.history("a")) == 1
    settled(service)


def test_a_write_with_the_same_key_is_one(service):
    service.create("a").result()
    some = [service.write("a", "text", key="k") for _ in range(3)]
    assert {writing.version for writing in some} == {1} == {w.done.result().version for w in some}
    with pytest.raises(ValueError, match="another text"):
        service.write("a", "other", key="k")


def test_a_cancelled_read_gives_its_place_back(service):
    service.create("a").result()
    free = held(service)
    reply = service.read("a", question("?"), Sampling(max_tokens=500))
    reply.cancel()
    free.set()
    assert list(reply) == []
    assert service.stats()["reads"] == 0


def test_what_was_accepted_before_a_crash_is_applied_at_the_start(llm, store):
    store.create("a", llm.empty())
    store.append("a", "what was accepted", key="k")
    other = MemoryModel(tiny_model(seed=1), byte_tokenizer(), name="other")
    store.create("b", other.empty())
    store.append("b", "of another model")
    service = Service(llm, store)
    service.start()
    assert store.version("a", key="k").state == "applied"
    assert store.pending_count("b") == 1
    with pytest.raises(ValueError, match="another model"):
        answer(service.read("b", question("?"), Sampling(), version=0))
    service.close()


def test_closing_finishes_what_was_accepted(llm, store):
    service = Service(llm, store)
    service.start()
    service.create("a").result()
    writing = service.write("a", "the last text")
    reply = service.read("a", question("?"), Sampling(max_tokens=3))
    service.close()
    assert writing.done.result().state == "applied"
    assert reply.version == 1
    assert len(list(reply)) > 0


def test_a_memory_that_another_process_has_broken_is_told_to_its_reader_alone(service, store, llm):
    service.create("a").result()
    service.create("b").result()
    service.write("a", "text").done.result()
    store._states.cache.clear()
    row = store._journal.head(store._journal.id("a"))
    store._journal.change(replace(row, object="0" * 64))
    with pytest.raises(ValueError):
        answer(service.read("a", question("?"), Sampling()))
    answer(service.read("b", question("?"), Sampling(max_tokens=2)))


def test_text_of_one_thread_never_becomes_control_tokens_beside_another(llm):
    """Whether special tokens are split is a state of the tokenizer, which threads share."""
    bad, stop = [], threading.Event()

    def chat():
        while not stop.is_set():
            llm.prompts.chat([{"role": "user", "content": "x"}], bare=True)

    thread = threading.Thread(target=chat)
    thread.start()
    for _ in range(3000):
        bad += [i for i in llm.prompts.text("a<|im_end|>b<|im_start|>c") if i < 4]
    stop.set()
    thread.join()
    assert not bad


def test_a_version_that_is_accepted_and_not_applied_can_be_asked_for(service):
    service.create("a").result()
    free = held(service)
    writing = service.write("a", "text")
    reply = service.read("a", question("?"), Sampling(max_tokens=2), version=writing.version)
    free.set()
    answer(reply)
    assert reply.version == writing.version == 1


def test_what_passes_does_not_fail_a_write_for_good(service, store, monkeypatch):
    """A full device, again and again: readers are told, the write stays accepted, and is applied when it can be."""
    service.create("a").result()

    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(service.llm, "write_ids", full, raising=False)
    writing = service.write("a", "accepted")
    with pytest.raises(torch.OutOfMemoryError):
        writing.done.result()
    for _ in range(4):
        with pytest.raises(torch.OutOfMemoryError):
            answer(service.read("a", question("?"), Sampling(max_tokens=2)))
    assert store.version("a", 1).state == "pending"
    monkeypatch.undo()
    reply = service.read("a", question("?"), Sampling(max_tokens=2))
    answer(reply)
    assert (reply.version, store.version("a", 1).state) == (1, "applied")


def test_one_damaged_memory_does_not_keep_the_service_from_starting(llm, store):
    store.create("a", llm.empty())
    store.append("a", "waits")
    row = store._journal.version("a", 0)
    store._journal.change(replace(row, object="0" * 64))
    store._states.cache.clear()
    store.create("b", llm.empty())
    store.append("b", "waits too")
    service = Service(llm, store)
    service.start()
    assert (store.pending_count("a"), store.pending_count("b")) == (1, 0)
    service.close()
