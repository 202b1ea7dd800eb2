"""The page in a real browser, with the packaged model behind it: every path that a person takes.

With LATENTMEM_PICTURES set to a folder, the pictures of docs/how-to/page.md are taken into it.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import threading
import time
from itertools import count
from pathlib import Path

import office
import pytest
from serving import HANG, running, wait

from latentmem.serve.http.keys import Keys
from latentmem.serve.settings import Limits

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
PAPER = Path(__file__).parent.parent.parent / "docs" / "concepts" / "paper.md"
SAFE = "The code of the safe is 4711."
BOAT = "The boat Meridian left the harbour of Kiel on 3 May with a cargo of amber."
NOTES = {
    "log": BOAT,
    "paper.md": PAPER.read_text(encoding="utf-8")[:3500],
    "letter": "Dear Ada, the bakery in Lund closes on Mondays. The red house beside it belongs to my aunt Ingrid, who "
    "keeps eleven hens and a blind dog called Otto. She paid 90,000 crowns for it in 1987. Yours, Bram.",
    "recipe": "For the plum cake of Mrs. Lindqvist take 300 grams of flour, two eggs, a cup of cream and forty plums. "
    "It stays in the oven for 55 minutes at 180 degrees.",
    "diary": SAFE,
}
PATIENCE = 1000 * HANG  # milliseconds: busy cores take their time


def absent(what):
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        absent(f"there is no browser: install one of {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    with running(trained, tmp_path_factory.mktemp("page") / "store", scripted=False) as server:
        yield server


@pytest.fixture
def scripted(trained, tmp_path):
    """A server of its own whose answers are made up; its memory m holds a text, and another one is empty."""
    with running(trained, tmp_path / "scripted") as server:
        for name in ("m", "other"):
            server.service.store.create(name, trained.empty())
        server.service.write("m", SAFE, "secret").done.result()
        yield server


@contextlib.contextmanager
def holding(server):
    """Nothing is written meanwhile."""
    step, held = server.engine.call, threading.Event()

    def waiting(action):
        held.wait()
        return step(action)

    server.engine.call = waiting
    try:
        yield
    finally:
        held.set()
        server.engine.call = step


@pytest.fixture
def opened(browser):
    """Opens the page of a server; fails if a script of it does, or if anything asks another server.

    A test that fails is reported with what its pages showed, and with what they asked for in vain.
    """
    pages = []

    def open_(server, name="", **options):
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        page, asked, errors, waiting = context.new_page(), [], [], set()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: (asked.append(request.url), waiting.add(request)))
        for end in ("requestfinished", "requestfailed"):
            page.on(end, lambda request: waiting.discard(request))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{server.url}/#{name}")
        pages.append((page, server, asked, errors, waiting))
        return page

    yield open_
    for page, server, asked, errors, waiting in pages:
        shown = page.locator("body").inner_text()
        sys.stdout.write(f"{page.url} waits for {[request.url for request in waiting]} and shows:\n{shown}\n")
        page.context.close()
        assert not errors
        assert asked and all(url.startswith((f"{server.url}/", "data:", f"blob:{server.url}")) for url in asked)


@pytest.fixture
def memory(server, trained, request):
    """A memory that holds two texts, under a name of its own."""
    name = re.sub(r"\W", "_", request.node.name)[:40]
    server.service.store.create(name, trained.empty())
    for source, text in (("secret", SAFE), ("boat", BOAT)):
        server.service.write(name, text, source).done.result()
    return name


def button(place, name, **options):
    return place.get_by_role("button", name=name, exact=True, **options)


def ask(page, question, *, beside=False):
    """Ask, and return what is answered with the memory, and without."""
    page.get_by_label("answer without memory, too").set_checked(beside)
    page.get_by_role("textbox", name="Message").fill(question)
    number = page.locator(".exchange").count()
    page.keyboard.press("Enter")
    last = page.locator(".exchange").nth(number)
    last.wait_for()
    button(page, "Send").wait_for()
    return [text.strip() for text in last.locator(".said .text").all_inner_texts()]


def picture(page):
    """The canvas as bytes, once it is drawn."""
    return page.locator("canvas").screenshot()


# --- from nothing to an answer ----------------------------------------------------------------------------------------


def test_from_nothing_to_an_answer_and_its_source(trained, opened, tmp_path):
    with running(trained, tmp_path / "store", scripted=False) as server:
        page = opened(server)
        page.get_by_text("None yet. Make one").wait_for()
        button(page, "New").click()
        page.get_by_label("Name").fill("alice")
        button(page, "Make it").click()
        page.get_by_role("heading", name="Chat with alice").wait_for()
        page.get_by_role("img", name="An empty memory of 30 layers with room for 1,536 slots each.").wait_for()
        page.get_by_text("coded, 1,536 slots, 512 searched", exact=True).wait_for()
        for source, text in (("secret", SAFE), ("boat", BOAT)):
            page.get_by_label("Text", exact=True).fill(text)
            page.get_by_role("textbox", name="Source").fill(source)
            button(page, "Write").click()
            page.get_by_text(f"Written: {source}.").wait_for()
        stats = server.service.store.stats("alice")
        assert {one.source: one.tokens for one in stats} == {"secret": 17, "boat": 25}
        ahead = stats[0].forecast
        assert 1 > ahead[10] > ahead[100] > 0
        of_secret = page.locator(".source", has_text="secret").locator("dd").all_inner_texts()
        assert of_secret == ["100%", f"{100 * ahead[1]:.0f}%", f"{100 * ahead[10]:.0f}%", "<1%"]
        page.get_by_role("img", name="30 layers with 42 of 1,536 slots each; of these 60% boat, 40% secret.").wait_for()
        behind, plain = ask(page, "What is the code of the safe?", beside=True)
        assert "4711" in behind and plain and "4711" not in plain
        button(page, "What it drew on").click()
        shares = page.locator(".shares li")
        shares.first.wait_for()
        assert "secret" in shares.first.inner_text()
        assert "4711" in page.locator(".passage p").first.inner_text()
        before = picture(page)
        shares.first.hover()
        wait(lambda: picture(page) != before)  # the others are dimmed
        page.mouse.move(0, 0)
        wait(lambda: picture(page) == before)
        page.locator(".behind .text").click()
        shares.first.wait_for(state="detached")
        page.locator(".behind .text").click()
        shares.first.wait_for()
        button(page, "secret").click()
        wait(lambda: picture(page) != before)
        button(page, "secret").click()
        wait(lambda: picture(page) == before)
        assert page.title() == "alice · latentmem"
        page.reload()
        page.get_by_role("heading", name="Chat with alice").wait_for()


def test_an_empty_memory_says_so_beside_the_answer(scripted, opened):
    page, notice = opened(scripted, "other"), "The memory is empty: nothing is known yet, the model answers by itself."
    ask(page, "What is the code of the safe?", beside=True)
    assert page.get_by_text(notice).count() == 1
    page = opened(scripted, "m")
    ask(page, "What is the code of the safe?", beside=True)
    assert page.get_by_text(notice).count() == 0


def test_a_conversation_goes_on_and_is_written_if_one_wants(server, memory, opened):
    page, bodies = opened(server, memory), []
    page.on("request", lambda r: bodies.append(r.post_data) if r.url.endswith("/completions") else None)
    (first,) = ask(page, "From which harbour did the Meridian leave?")
    assert "Kiel" in first
    before = server.service.store.version(memory).version
    page.get_by_label("send earlier messages along").check()
    page.get_by_label("write what you say into the memory").check()
    ask(page, "My dog is called Bram.")
    wait(lambda: server.service.store.version(memory).version == before + 1)
    written = server.service.store.version(memory)
    assert written.text == "My dog is called Bram." and written.source.startswith("chat ")
    page.locator(".source", has_text="chat").wait_for()
    assert page.locator(".exchange").count() == 2
    sent = [json.loads(body)["messages"] for body in bodies]
    assert sent[0] == [{"role": "user", "content": "From which harbour did the Meridian leave?"}]
    assert sent[1] == [
        *sent[0],
        {"role": "assistant", "content": first},
        {"role": "user", "content": written.text},
    ]
    button(page, "New chat").click()
    page.get_by_text("Write something into the memory, then ask about it.").wait_for()


def test_an_answer_is_stopped(scripted, opened):
    def endless():
        while not scripted.engine.answers[-1].cancelled:
            yield "word "
            time.sleep(0.2)

    scripted.engine.words = endless()
    page = opened(scripted, "m")
    page.get_by_label("answer without memory, too").uncheck()
    page.get_by_role("textbox", name="Message").fill("Tell me a long story about the sea, in many words.")
    button(page, "Send").click()
    page.locator(".behind .text", has_text="word").wait_for()
    button(page, "Stop").click()
    button(page, "Send").wait_for()
    page.get_by_text("stopped").first.wait_for()
    wait(lambda: scripted.service.stats()["reads"] == 0)


def test_an_answer_is_seen_while_it_comes(scripted, opened):
    more, last = threading.Event(), threading.Event()

    def said():
        yield "word\n" * 80
        more.wait(HANG)
        yield "word\n" * 80
        last.wait(HANG)
        yield "the end"

    scripted.engine.words = said()
    page = opened(scripted, "m", viewport={"width": 1200, "height": 600})
    page.get_by_label("answer without memory, too").uncheck()
    page.get_by_role("textbox", name="Message").fill("Tell me more.")
    button(page, "Send").click()
    text, talk = page.locator(".behind .text"), page.locator(".talk")
    wait(lambda: text.inner_text().count("word") == 80)
    button(page, "Stop").wait_for()
    wait(lambda: talk.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 5)  # its end is seen
    talk.evaluate(
        "e => new Promise(seen => { e.addEventListener('scroll', () => requestAnimationFrame(seen), { once: true });"
        " e.scrollTop = 0 })"
    )
    more.set()
    wait(lambda: text.inner_text().count("word") == 160)
    assert talk.evaluate("e => e.scrollTop") == 0  # unless one looks at its beginning
    last.set()
    button(page, "Send").wait_for()
    assert text.inner_text().endswith("the end")


def test_a_question_waits_for_what_is_written_and_says_so(scripted, opened):
    page = opened(scripted, "m")
    page.locator(".source", has_text="secret").wait_for()
    with holding(scripted):
        scripted.service.write("m", BOAT, "boat")
        page.get_by_text("Waiting for its turn …").wait_for()
        page.get_by_role("textbox", name="Message").fill("Where?")
        page.keyboard.press("Enter")
        page.get_by_text("It answers once what is being written is in the memory.").wait_for()
        button(page, "Pin").click()
        page.get_by_text("It is done once what is being written is in the memory.").wait_for()
        page.reload()
        page.get_by_text("Waiting for its turn …").wait_for()
    page.locator(".source", has_text="boat").wait_for()


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_dropped_file_is_written_and_one_sees_how(server, trained, opened, monkeypatch):
    server.service.store.create("dropped", trained.empty(N=512, K=64))
    write, updates, seen = trained.write_ids, count(1), threading.Event()

    def slowly(memory, ids, source, **more):
        assert source != "paper.md" or next(updates) != 3 or seen.wait(HANG)
        return write(memory, ids, source, **more)

    monkeypatch.setattr(trained, "write_ids", slowly)
    page = opened(server, "dropped")
    page.locator(".write").wait_for()
    text = PAPER.read_text(encoding="utf-8")[:4000]
    file = page.evaluate_handle(
        "text => { const t = new DataTransfer(); t.items.add(new File([text], 'paper.md')); return t }",
        text,
    )
    page.dispatch_event(".write", "drop", {"dataTransfer": file})
    page.get_by_text(re.compile(r"^128 of \d[\d,]* tokens written$")).wait_for()
    first = picture(page)
    seen.set()
    wait(lambda: picture(page) != first)  # while it is written
    page.get_by_text("Written: paper.md.").wait_for()
    assert [one.source for one in server.service.store.stats("dropped")] == ["paper.md"]
    page.get_by_role("img", name="30 layers with 512 of 512 slots each; of these 100% paper.md.").wait_for()


def test_one_goes_on_typing_while_a_text_is_written(server, trained, opened):
    server.service.store.create("typing", trained.empty(N=512, K=64))
    page = opened(server, "typing")
    box = page.get_by_label("Text", exact=True)
    box.fill(PAPER.read_text(encoding="utf-8")[:2000])
    button(page, "Write").click()
    wait(lambda: box.input_value() == "")
    box.fill(SAFE)
    page.get_by_label("Files to write").set_input_files(
        [
            {"name": name, "mimeType": "application/octet-stream", "buffer": data}
            for name, data in (("a.txt", b"\xff\0\xfe"), ("b.docx", office.docx("b")))
        ]
    )
    page.get_by_role("alert").filter(has_text="a.txt: The file is not text that can be read").wait_for()
    page.locator(".source", has_text="b.docx").wait_for()
    assert [s.source for s in server.service.store.stats("typing")] == ["text", "b.docx"]
    assert box.input_value() == SAFE


def test_what_can_not_be_written_is_said(trained, opened, tmp_path):
    limits = Limits(text=100)
    with running(trained, tmp_path / "store", limits=limits, scripted=False) as server:
        server.service.store.create("m", trained.empty())
        page = opened(server, "m")
        page.get_by_label("Text", exact=True).fill("x" * 101)
        button(page, "Write").click()
        page.get_by_role("alert").filter(has_text="A request may hold 100 characters of text, got 101").wait_for()
        assert page.get_by_label("Text", exact=True).input_value() == "x" * 101  # it is not lost
        page.get_by_label("Files to write").set_input_files(
            {"name": "a.bin", "mimeType": "text/plain", "buffer": b"\xff\0\xfe"}
        )
        page.get_by_role("alert").filter(has_text="is not text that can be read").wait_for()
        server.close()
        page.get_by_role("alert").filter(has_text="The server does not answer.").first.wait_for()


def test_what_is_sent_again_because_no_answer_came_is_written_once(scripted, opened):
    page, store, lost = opened(scripted, "m"), scripted.service.store, []

    def lose(route):
        route.fetch()
        lost.append(route)
        route.abort()

    def written():
        return [line.source for line in store.history("m") if line.event == "write"]

    page.route("**/write", lose)
    box = page.get_by_label("Text", exact=True)
    box.fill(BOAT)
    page.get_by_role("textbox", name="Source").fill("boat")
    button(page, "Write").click()
    page.get_by_role("alert").filter(has_text="boat: The server does not answer.").wait_for()
    files = [{"name": name, "mimeType": "text/plain", "buffer": name.encode()} for name in ("one.txt", "two.txt")]
    page.get_by_label("Files to write").set_input_files(files)
    page.get_by_role("alert").filter(has_text="two.txt: The server does not answer.").wait_for()
    assert len(lost) == 3 and written() == ["secret", "boat", "one.txt", "two.txt"]
    page.unroute("**/write")
    page.locator(".memory", has_text="other").click()
    page.get_by_role("heading", name="Chat with other").wait_for()
    page.locator(".memory", has=page.get_by_text("m", exact=True)).click()
    page.get_by_role("alert").filter(has_text="two.txt").wait_for()  # it is not forgotten
    button(page.locator(".write .row", has_text="one.txt"), "Try again").click()
    page.get_by_text("Written: one.txt.").wait_for()
    button(page.locator(".write .row", has_text="two.txt"), "Dismiss").click()
    button(page, "Write").click()
    page.get_by_text("Written: boat.").wait_for()
    assert box.input_value() == "" and page.locator(".write [role=alert]").count() == 0
    assert written() == ["secret", "boat", "one.txt", "two.txt"]
    box.fill(BOAT)
    button(page, "Write").click()  # after an answer it is a write of its own
    wait(lambda: len(written()) == 5)


# --- mending ----------------------------------------------------------------------------------------------------------


def test_a_source_is_pinned_and_expires(server, memory, opened):
    page, store = opened(server, memory), server.service.store
    one = page.locator(".source", has_text="secret")
    button(one, "Pin").click()
    one.get_by_role("button", name="Pinned", pressed=True).wait_for()
    assert [s.pinned for s in store.stats(memory)] == [True, False]
    button(one, "Pinned").click()
    one.get_by_role("button", name="Pin", exact=True, pressed=False).wait_for()
    button(one, "Expire …").click()
    page.get_by_role("dialog").get_by_label("Expires").select_option("in a week")
    button(page, "Set").click()
    one.get_by_text("expires").wait_for()
    assert store.stats(memory)[0].expires is not None


def test_a_source_is_forgotten_in_both_ways(server, memory, opened):
    page, store = opened(server, memory), server.service.store
    button(page.locator(".source", has_text="secret"), "Forget …").click()
    button(page.get_by_role("dialog"), "Cancel").click()
    assert len(store.history(memory)) == 3
    button(page.locator(".source", has_text="secret"), "Forget …").click()
    button(page, "Forget it").click()
    page.locator(".source", has_text="secret").wait_for(state="detached")
    assert [s.source for s in store.stats(memory)] == ["boat"]
    (said,) = ask(page, "What is the code of the safe?")
    assert "4711" not in said
    page.locator(".history li", has_text="written: boat").get_by_text("25 tokens").click()
    page.locator(".history").get_by_text(BOAT).wait_for()
    button(page.locator(".source", has_text="boat"), "Forget …").click()
    page.get_by_label("As if it had never been written.").check()
    button(page, "Forget it").click()
    wait(lambda: "boat" not in {line.source for line in store.history(memory)})
    page.locator(".source", has_text="boat").wait_for(state="detached")
    page.locator(".history").get_by_text(BOAT).wait_for(state="detached")


def test_history_is_looked_at_gone_back_to_and_forked(server, memory, opened):
    page, store = opened(server, memory), server.service.store
    lines = page.locator(".history li")
    lines.nth(2).wait_for()
    assert [line.split("\n")[0] for line in lines.all_inner_texts()] == ["2", "1", "0"]
    lines.nth(1).get_by_text("17 tokens").click()
    lines.nth(1).get_by_text(SAFE).wait_for()
    button(lines.nth(1), "Look").click()
    page.get_by_role("status").get_by_text("You see version 1, and answers come from it.").wait_for()
    page.get_by_role("img", name="30 layers with 17 of 1,536 slots each; of these 100% secret.").wait_for()
    page.locator(".source", has_text="boat").wait_for(state="detached")
    assert page.locator(".write").is_hidden() and button(page, "Pin").count() == 0
    (said,) = ask(page, "What is the code of the safe?")
    assert "4711" in said
    assert page.get_by_label("write what you say into the memory").is_disabled()
    button(page, "Back to the newest").click()
    page.get_by_role("img", name="30 layers with 42 of 1,536 slots each; of these 60% boat, 40% secret.").wait_for()
    button(lines.nth(1), "Go back …").click()
    button(page, "Go back").click()
    page.locator(".history li", has_text="back to version 1").wait_for()
    assert store.version(memory).version == 3 and [s.source for s in store.stats(memory)] == ["secret"]
    button(page.locator(".history li", has_text="written: boat"), "Fork …").click()
    page.get_by_role("dialog").get_by_label("Name").fill("elsewhere")
    button(page.get_by_role("dialog"), "Fork").click()
    page.get_by_role("heading", name="Chat with elsewhere").wait_for()
    assert [s.source for s in store.stats("elsewhere")] == ["secret", "boat"]


def test_a_pruned_version_is_said_and_can_not_be_chosen(scripted, opened):
    store = scripted.service.store
    for source, text in (("secret", SAFE), ("boat", BOAT)):
        store.write(scripted.service.llm, "m", text, source=source)
        store.append("m", "as a judge", source, role="judge")
        store.apply(scripted.service.llm, "m")
    store.write(scripted.service.llm, "m", BOAT, source="boat")
    store.prune("m", keep=1)
    page = opened(scripted, "m")
    for place, words in ((1, "failed"), (2, "pruned")):
        line = page.locator(".history li").nth(place)
        line.get_by_text(words).wait_for()
        assert [button(line, name).count() for name in ("Look", "Go back …", "Fork …")] == [0, 0, 0]


def test_what_others_take_away_is_said(scripted, opened):
    page, store = opened(scripted, "m"), scripted.service.store
    for source, text in (("secret", SAFE), ("boat", BOAT)):
        store.write(scripted.service.llm, "m", text, source=source)
    page.locator(".source", has_text="boat").wait_for()
    page.get_by_role("radio", name="age").check()
    button(page.locator(".history li").nth(0), "Look").click()
    assert page.get_by_role("status").filter(has_text="You see version").count() == 0  # it is the newest one
    button(page.locator(".history li").nth(1), "Look").click()
    page.get_by_role("status").get_by_text("You see version 2").wait_for()
    assert page.get_by_role("radio", name="age").is_checked()
    store.forget_by_replay(scripted.service.llm, "m", "secret")
    page.get_by_role("alert").filter(has_text="There is no version 2 any more; you see the newest one.").wait_for()
    store.delete("m")
    page.get_by_role("alert").filter(has_text="There is no memory m, or no longer.").wait_for()
    assert page.get_by_role("heading", name="Chat with other").count() == 0  # nobody goes on in another one unawares
    page.locator(".memory", has_text="other").click()
    page.get_by_role("heading", name="Chat with other").wait_for()
    page.goto(f"{scripted.url}/#nosuch")
    page.get_by_role("alert").filter(has_text="There is no memory nosuch").wait_for()


def test_what_fails_once_is_asked_for_again(scripted, opened):
    page, failed = opened(scripted, "other"), []
    page.get_by_text("Nothing yet.").wait_for()

    def fail(route):
        failed.append(route)
        route.abort()

    page.route("**/stats", fail, times=1)
    page.evaluate("location.hash = 'm'")
    page.locator(".source", has_text="secret").wait_for()
    assert failed


def test_many_memories_are_searched(scripted, opened):
    page, store = opened(scripted, "m"), scripted.service.store
    page.locator(".memory").nth(1).wait_for()
    assert page.get_by_label("Find a memory").count() == 0
    for i in range(10):
        store.create(f"team{i}", scripted.service.llm.empty())
    page.reload()
    page.get_by_label("Find a memory").fill("EAM3")
    wait(lambda: page.locator(".memory").count() == 1)
    page.get_by_label("Find a memory").fill("zz")
    page.get_by_text("There is none of that name.").wait_for()
    for i in range(10):
        store.delete(f"team{i}")
    wait(lambda: page.locator(".memory").count() == 2)  # a search that is no longer shown hides nothing


def test_long_histories_come_in_parts(server, trained, opened):
    store = server.service.store
    store.create("long", trained.empty(N=64, K=16))
    store.write(trained, "long", SAFE, source="secret")
    for i in range(24):
        store.pin("long", "secret", i % 2 == 0)
    page = opened(server, "long")
    lines = page.locator(".history li")
    button(page, "Older ones").click()
    wait(lambda: lines.count() == 26)
    assert button(page, "Older ones").count() == 0


def test_a_memory_is_taken_out_brought_in_and_deleted(server, memory, opened, tmp_path):
    page = opened(server, memory)
    with page.expect_download() as download:
        button(page, "Export").click()
    assert download.value.suggested_filename == f"{memory}.zip"
    download.value.save_as(tmp_path / "copy.zip")
    page.get_by_label("Exported memory").set_input_files(tmp_path / "copy.zip")
    page.get_by_role("dialog").get_by_label("Name").fill(memory)
    button(page, "Import").click()
    page.get_by_role("alert").filter(has_text="There is a memory").wait_for()
    page.get_by_role("dialog").get_by_label("Name").fill("copied")
    button(page, "Import").click()
    page.get_by_role("heading", name="Chat with copied").wait_for()
    assert [s.source for s in server.service.store.stats("copied")] == ["secret", "boat"]
    button(page, "Delete …").click()
    button(page, "Delete it").click()
    page.locator(".memory", has_text="copied").wait_for(state="detached")
    assert "copied" not in server.service.store


def test_several_memories_are_apart_and_what_others_write_is_seen(server, memory, opened):
    page = opened(server, memory)
    button(page, "New").click()
    page.get_by_label("Name").fill("second")
    page.get_by_label("Slots in each layer").fill("256")
    page.get_by_label("Slots that a question takes back").fill("64")
    button(page, "Make it").click()
    page.get_by_role("heading", name="Chat with second").wait_for()
    server.service.write("second", BOAT * 30, "others").done.result()  # by somebody else
    page.get_by_text(re.compile(r"Its long-term memory holds \d+ slots; a question takes back up to 64")).wait_for()
    page.locator(".source", has_text="others").get_by_text("long-term").wait_for()
    assert page.locator(".source", has_text="secret").count() == 0
    ask(page, "Where?")
    page.get_by_role("textbox", name="Message").fill("not sent yet")
    page.locator(".memory", has_text=memory).click()
    page.locator(".source", has_text="secret").wait_for()
    assert page.locator(".exchange").count() == 0
    assert page.get_by_role("textbox", name="Message").input_value() == ""
    page.locator(".memory", has_text="second").click()
    page.get_by_role("heading", name="Chat with second").wait_for()
    assert page.locator(".exchange").count() == 1  # what was said and typed is still there
    assert page.get_by_role("textbox", name="Message").input_value() == "not sent yet"


# --- keys, states, ways to see and to move ----------------------------------------------------------------------------


def test_a_key_is_asked_for(trained, opened, tmp_path):
    keys = Keys(tmp_path / "keys.json", required=True)
    key = keys.add("alice", ["alice"])
    with running(trained, tmp_path / "store", keys=keys, scripted=False) as server:
        for name in ("alice", "bob"):
            server.service.store.create(name, trained.empty())
        page = opened(server, "bob")
        page.get_by_label("Key").fill("lm-wrong")
        button(page, "Go on").click()
        page.get_by_role("alert").filter(has_text="A valid key is needed").wait_for()
        page.get_by_label("Key").fill(key)
        button(page, "Go on").click()
        page.get_by_role("alert").filter(has_text="There is no memory bob").wait_for()  # it is not for this key
        assert page.locator(".memory").count() == 1
        page.locator(".memory", has_text="alice").click()
        page.get_by_role("heading", name="Chat with alice").wait_for()
        ask(page, "Hello?")
        button(page, "Leave").click()
        page.get_by_label("Key").wait_for()
        assert page.evaluate("sessionStorage.length + localStorage.length") == 0
        assert page.title() == "latentmem" and "alice" not in page.url
        assert page.locator("[role=alert]").locator("visible=true").count() == 0  # nothing was done wrong
        wait(lambda: page.evaluate("document.activeElement.type") == "password")
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Chat with alice").wait_for()
        keys.remove("alice")
        page.get_by_role("alert").filter(has_text="A valid key is needed").wait_for()


def test_a_key_that_may_only_read_is_shown_nothing_that_writes(trained, opened, tmp_path):
    keys = Keys(tmp_path / "keys.json", required=True)
    key = keys.add("reader", ["alice"], read_only=True)
    with running(trained, tmp_path / "store", keys=keys, scripted=False) as server:
        server.service.store.create("alice", trained.empty())
        server.service.write("alice", SAFE, "secret").done.result()
        page = opened(server)
        page.get_by_label("Key").fill(key)
        button(page, "Go on").click()
        page.get_by_text("This key may read only.").wait_for()
        (said,) = ask(page, "What is the code of the safe?")
        page.locator(".source", has_text="secret").wait_for()
        for name in ("New", "Write", "Pin", "Forget …", "Fork …", "Delete …", "Go back …", "Import a file …"):
            assert button(page, name).count() == 0, name
        assert "4711" in said and button(page, "Export").count() == 1


def test_it_waits_until_the_model_is_loaded(server, memory, opened):
    server.service.ready = False
    try:
        page = opened(server, memory)
        page.get_by_text("The model is being loaded").wait_for()
    finally:
        server.service.ready = True
    page.get_by_role("heading", name="Chat with").wait_for()


def test_with_the_keyboard_alone(server, memory, opened):
    page = opened(server, memory)
    page.locator("canvas").wait_for()

    def tab_to(name):
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText") == name:
                return
        pytest.fail(f"{name} is not reached")

    tab_to("New")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    assert page.evaluate("document.querySelector('dialog').contains(document.activeElement)")
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    tab_to("Slots, one by one with the arrow keys")
    place = page.locator("#pool-place")
    page.keyboard.press("ArrowRight")
    wait(lambda: place.inner_text() == "Layer 1, slot 42: boat, written by the last update")
    for key in ("Home", "ArrowDown"):
        page.keyboard.press(key)
    wait(lambda: place.inner_text() == "Layer 2, slot 1: secret, 1 update ago")
    page.keyboard.press("End")
    wait(lambda: place.inner_text() == "Layer 2, place 1,536: empty")
    page.keyboard.press("Escape")
    wait(lambda: place.inner_text().startswith("30 layers"))


def test_the_focus_stays_near_what_goes_away(scripted, opened):
    page, store = opened(scripted, "m"), scripted.service.store
    store.write(scripted.service.llm, "m", BOAT, source="boat")
    page.locator(".source", has_text="boat").wait_for()

    def focus():
        return page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''").strip()

    def press(place, name):
        button(place, name).focus()
        page.keyboard.press("Enter")

    page.get_by_role("textbox", name="Message").fill("Where?")
    press(page, "Send")
    page.get_by_text("the door is blue").first.wait_for()
    button(page, "Send").wait_for()
    wait(lambda: focus() == "Send")
    press(page.locator(".history li").nth(1), "Look")
    page.get_by_role("status").get_by_text("You see version 1").wait_for()
    wait(lambda: focus() == "Look")
    press(page, "Back to the newest")
    wait(lambda: focus() == "Chat with m")
    press(page.locator(".source", has_text="boat"), "Pin")
    page.get_by_role("button", name="Pinned", exact=True).wait_for()
    wait(lambda: focus() == "Pinned")
    press(page.locator(".source", has_text="boat"), "Forget …")
    press(page, "Forget it")
    wait(lambda: focus() == "What is in it")
    press(page, "Delete …")
    press(page, "Delete it")
    page.get_by_role("heading", name="Chat with other").wait_for()
    wait(lambda: page.evaluate("document.activeElement !== document.body"))


def test_age_and_zoom_change_the_picture(server, memory, opened):
    page = opened(server, memory)
    page.locator("canvas").wait_for()
    seen = [picture(page)]
    page.get_by_role("radio", name="age").check()
    wait(lambda: picture(page) not in seen)
    page.get_by_text("newest").first.wait_for()
    seen.append(picture(page))
    button(page, "Zoom in").click()
    wait(lambda: picture(page) not in seen)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_a_screen_reader_out(server, memory, opened, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = opened(server, memory, color_scheme=scheme)
    ask(page, "What is the code of the safe?", beside=True)
    button(page, "What it drew on").click()
    page.locator(".shares li").first.wait_for()
    found = axe.run(page)
    assert found.violations_count == 0, found.generate_report()
    button(page.locator(".source").first, "Forget …").click()
    found = axe.run(page, context="dialog")
    assert found.violations_count == 0, found.generate_report()


def test_nothing_keeps_a_screen_reader_out_in_other_states(scripted, opened, trained, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def check(page):
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()

    page = opened(scripted, "m")
    page.locator(".source").wait_for()
    scripted.engine.go.clear()
    page.get_by_role("textbox", name="Message").fill("Where?")
    page.keyboard.press("Enter")
    page.get_by_role("img", name="answering").first.wait_for()
    check(page)  # while it answers
    scripted.engine.go.set()
    button(page.locator(".history li").nth(1), "Look").click()
    page.get_by_role("status").get_by_text("You see version 0").wait_for()
    check(page)  # an older version, which is empty
    page.goto(f"{scripted.url}/#nosuch")
    page.get_by_role("alert").filter(has_text="There is no memory nosuch").wait_for()
    check(page)
    page.set_viewport_size({"width": 375, "height": 667})
    check(page)
    scripted.service.ready = False
    page.reload()
    page.get_by_text("The model is being loaded").wait_for()
    check(page)
    keys = Keys(tmp_path / "keys.json", required=True)
    keys.add("alice", ["alice"])
    with running(trained, tmp_path / "locked", keys=keys) as server:
        page = opened(server)
        page.get_by_label("Key").wait_for()
        check(page)


def test_on_a_phone(server, memory, opened):
    page = opened(server, memory, viewport={"width": 390, "height": 780}, device_scale_factor=2, has_touch=True)
    ask(page, "What is the code of the safe?", beside=True)
    for place, there in (("Memory", ".pool"), ("History", ".history"), ("Memories", ".memories"), ("Chat", ".chat")):
        button(page.get_by_role("navigation", name="Parts of the page"), place).click()
        page.locator(there).wait_for()
        if place == "Memory":
            page.locator("canvas").tap(position={"x": 1, "y": 1})
            page.get_by_text(re.compile(r"^Layer 1, slot \d+: secret, 1 update ago$")).wait_for()
        if place == "History":
            button(page.locator(".history li").nth(1), "Look").click()
            button(page, "Back to the newest").locator("visible=true").click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), place
    button(page.get_by_role("navigation", name="Parts of the page"), "Memories").click()
    page.locator(".memory", has_text=memory).click()
    page.locator(".chat").wait_for()


@pytest.mark.parametrize("size", [(320, 560), (375, 667), (1280, 560)])
def test_long_names_and_small_windows_move_nothing_out_of_sight(scripted, opened, size):
    llm, store = scripted.service.llm, scripted.service.store
    for name in ("long_" + "x" * 59, "second"):
        store.create(name, llm.empty())
        for source in ("Invoice_" + "y" * 200 + ".txt", "\u202egnp.exe \u05e9\u05dc\u05d5\u05dd", "a b " * 60):
            store.write(llm, name, SAFE, source=source)
    page = opened(scripted, "second", viewport={"width": size[0], "height": size[1]})
    page.locator(".source").last.wait_for(state="attached")
    file = {"name": "Invoice_2026_11_26_customer_4711_final_version_signed.pdf.txt", "mimeType": "text/plain"}
    page.get_by_label("Files to write").set_input_files([{**file, "buffer": b"4711"}])
    page.locator(".write").get_by_text("Written: Invoice_2026").wait_for(state="attached")
    for place in ("Chat", "Memory", "History", "Memories") if size[0] < 1000 else (None,):
        if place:
            button(page.get_by_role("navigation", name="Parts of the page"), place).click()
        wide = page.evaluate(
            "[...document.querySelectorAll('.app, .app > *, .side *, .memories *, .chat > *')].filter(e => "
            "e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className)"
        )
        assert not wide, place
        html = page.locator("html")
        assert html.evaluate("e => [e.scrollHeight - innerHeight, e.scrollWidth - innerWidth]") == [0, 0], place
    page.goto(f"{scripted.url}/#long_{'x' * 59}")
    page.locator("#chat-title", has_text="Chat with long_").wait_for(state="attached")
    page.locator(".memory-part button", has_text="Fork …").dispatch_event("click")
    button(page.get_by_role("dialog"), "Fork").click()
    wait(lambda: f"long_{'x' * 57}-2" in store)


def test_on_every_part_of_a_phone_one_sees_that_the_server_is_gone(scripted, opened):
    page = opened(scripted, "m", viewport={"width": 375, "height": 667})
    page.locator(".source").wait_for(state="attached")
    page.route("**/v1/**", lambda route: route.abort())
    for place in ("Memory", "History", "Memories", "Chat"):
        button(page.get_by_role("navigation", name="Parts of the page"), place).click()
        page.get_by_role("alert").filter(has_text="The server does not answer.").locator("visible=true").wait_for()
    page.unroute("**/v1/**")
    page.get_by_role("alert").filter(has_text="The server does not answer.").first.wait_for(state="hidden")


def test_ten_thousand_slots_each_of_another_update(server, memory, opened):
    N, L = 10_000, 30
    shown = {
        "id": memory, "version": 2, "L": L, "M": N, "N": N, "K": 256, "R": 0, "updates": N, "stored": 0,
        "sources": ["even", "odd"], "layers": [[x for i in range(N) for x in (i % 2, i + 1, 1)]] * L, "writing": None,
    }  # fmt: skip

    def answer(route):
        route.fulfill(json=shown)

    page = opened(server)
    page.route("**/slots", answer)
    page.evaluate(f"location.hash = '{memory}'")
    page.get_by_role("img", name="30 layers with 10,000 of 10,000 slots each; of these 50% even, 50% odd.").wait_for()
    box = page.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.get_by_text(re.compile(r"^Layer 16, slot (4,9|5,0)\d\d: (even|odd), [45],\d{3} updates ago$")).wait_for()


def test_pictures_for_the_docs(server, trained, opened):
    folder = os.environ.get("LATENTMEM_PICTURES")
    if not folder:
        pytest.skip("LATENTMEM_PICTURES names no folder for them")
    store = server.service.store
    for name in ("team", "notes", "alice"):
        store.create(name, trained.empty())
    for source, text in NOTES.items():
        server.service.write("alice", text, source).done.result()
    server.service.write("notes", BOAT, "log").done.result()
    for scheme in ("light", "dark"):
        page = opened(server, "alice", color_scheme=scheme)
        ask(page, "From which harbour did the Meridian leave?", beside=True)
        ask(page, "What is the code of the safe?", beside=True)
        button(page.locator(".exchange").last, "What it drew on").click()
        page.locator(".shares li").first.wait_for()
        page.screenshot(path=Path(folder) / f"page-{scheme}.png")
    page = opened(server, "alice", viewport={"width": 390, "height": 780}, has_touch=True)
    page.get_by_role("navigation", name="Parts of the page").get_by_role("button", name="Memory", exact=True).click()
    page.locator(".source").first.wait_for()
    page.screenshot(path=Path(folder) / "page-phone.png")
    page = opened(server, "alice")
    button(page.locator(".history li", has_text="paper.md"), "Look").click()
    page.get_by_role("radio", name="age").check()
    page.get_by_role("status").get_by_text("You see version 2").wait_for()
    page.locator(".source").nth(2).wait_for(state="detached")
    page.screenshot(path=Path(folder) / "page-version.png")
