"""What looks at memories, keeps books or refuses answers at once: it imports neither torch nor transformers."""

import json
import subprocess
import sys

import pytest

from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.store import Store

HEAVY = ("torch", "transformers", "fsspec", "peft", "numpy")
SCRIPT = """
import contextlib, io, json, sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name in HEAVY:
            raise AssertionError(f"{sys.argv[1:]} imports {name}")

sys.meta_path.insert(0, Guard())
from latentmem import cli
for arguments in json.load(sys.stdin):
    sys.argv, out = ["latentmem", *arguments], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    print(json.dumps([code, out.getvalue()]))
""".replace("HEAVY", repr(HEAVY))
WORKS = [
    *(["--help"], ["write", "--help"], ["eval", "retention", "--help"], ["serve", "--help"], ["--version"]),
    *(["list"], ["show", "-m", "work"], ["show", "-m", "work", "--json"], ["show", "-m", "work", "--layers"]),
    *(["show", "-m", "work", "--version", "1"], ["history", "-m", "work"], ["history", "-m", "work", "--json"]),
    *(["pin", "a.txt", "-m", "work"], ["show", "-m", "work"], ["pin", "a.txt", "-m", "work", "--off"]),
    *(["expire", "a.txt", "-m", "work", "--after", "30d"], ["expire", "a.txt", "-m", "work", "--never"]),
    *(
        ["undo", "-m", "work"],
        ["show", "-m", "work"],
        ["rollback", "1", "-m", "work"],
        ["diff", "1", "2", "-m", "work"],
    ),
    *(["fork", "trial", "-m", "work"], ["show", "-m", "trial"], ["pin", "a.txt", "-m", "trial"], ["list"]),
    *(["prune", "-m", "work", "--keep", "1", "--dry-run"], ["prune", "-m", "work", "--keep", "100"]),
    *(["keys", "add", "ada", "--memories", "work"], ["keys", "list"], ["keys", "remove", "ada"]),
    *(["rm", "-m", "trial"], ["rm", "-m", "work"], ["list"]),
]
REFUSALS = [
    *(
        ["write"],
        ["write", "missing.txt"],
        ["write", "http://a.org"],
        ["write", " "],
        ["write", "two words", "-m", "a/b"],
    ),
    *(["write", "two words", "-m", "work", "-N", "64"], ["write", "two words", "-m", "work", "--quantize", "int8"]),
    *(["write", "two words", "-m", "new", "-N", "8", "-K", "9"], ["write", "two words", "--preset", "best"]),
    *(["write", "two words", "--model", "{tmp}"], ["write", "two words", "--model", "{tmp}/no.gguf"]),
    *(["write", "two words", "--adapters", "{tmp}/no.safetensors"], ["write", "two words", "--role", "tool"]),
    *(["ask", "why?", "-m", "nobody"], ["ask", "", "-m", "work"], ["ask"], ["ask", "why?", "-m", "work", "--what"]),
    *(["ask", "why?", "-m", "work", "--version", "9"], ["ask", "why?", "-m", "work", "--model", "no-such-model"]),
    *(["chat", "-m", "a/b"], ["frobnicate"], ["doctor", "-m", "work"], ["doctor", "-m", "no", "--question", "why?"]),
    *([command, "-m", "nobody"] for command in ("show", "history", "undo", "rm")),
    *(["show", "-m", "work", "--version", "9"], ["diff", "0", "9", "-m", "work"], ["rollback", "9", "-m", "work"]),
    *(["fork", "work", "-m", "work"], ["fork", "x/y", "-m", "work"], ["undo", "-m", "begun"]),
    *(["prune", "-m", "work"], ["prune", "-m", "nobody", "--keep", "1"], ["prune", "-m", "work", "--older-than", "x"]),
    *(["pin", "none", "-m", "work"], ["expire", "none", "-m", "work", "--never"], ["expire", "a.txt", "-m", "work"]),
    *(
        ["forget", "none", "-m", "work"],
        ["forget", "none", "-m", "work", "--exact"],
        ["forget", "a.txt", "-m", "nobody"],
    ),
    *(["forget", "a.txt", "-m", "work", "--exact"], ["export", "{tmp}/no/x.zip", "-m", "work"]),
    *(["export", "{tmp}/x.zip", "-m", "nobody"], ["show", "-m", "work", "--version", "-1"]),
    *(["export", "{tmp}/notes.txt", "-m", "work"], ["import", "{tmp}/no.zip", "-m", "x"]),
    *(["import", "{tmp}/notes.txt", "-m", "x"], ["import", "{tmp}/notes.txt", "-m", "work"]),
    *(["rebuild", "work", "-m", "work"], ["rebuild", "new", "-m", "nobody"]),
    *(["rebuild", "new", "-m", "work", "--model", "nothing"], ["keys", "remove", "nobody"]),
    *(["serve", "--host", "0.0.0.0"], ["serve", "no-such-model"], ["mcp", "no-such-model"]),
    *(["train", "{tmp}/no.yaml", "--out", "{tmp}/run"], ["train", "{tmp}/notes.txt", "--out", "{tmp}/run"]),
    *(["calibrate", "--texts", "{tmp}/no.txt", "--out", "{tmp}/c"], ["eval", "all", "--out", "x", "--only", "no"]),
    *(["eval", "compare", "a", "--out", "x"], ["eval", "retention", "--out", "x", "--steps", "a"]),
]


@pytest.fixture
def answers(home, tmp_path):
    """Run commands, one after the other, in a process that can not import torch; gives (exit code, output) of each."""

    def run(commands):
        filled = [[word.format(tmp=tmp_path) for word in command] for command in commands]
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT], input=json.dumps(filled), capture_output=True, text=True, cwd=tmp_path
        )
        assert process.returncode == 0, process.stderr
        return [json.loads(line) for line in process.stdout.splitlines()]

    return run


@pytest.fixture
def work(home, tiny_folder, tmp_path):
    """A memory `work` of two sources with long-term part and drops, one `begun`, and a file that is no memory."""
    import latentmem

    llm = latentmem.load(str(tiny_folder), device="cpu")
    store = Store(home / "store")
    settings = MemorySettings(N=32, K=8, longterm=LongTermSettings(8), form="int8", quota=1.0)
    store.create("work", llm.empty(settings=settings))
    store.create("begun", llm.empty(N=32, K=8))
    store.write(llm, "work", "the door of the house is blue, says Ada", "a.txt")
    store.write(llm, "work", "the gate is red", "b.txt")
    (tmp_path / "notes.txt").write_text("some notes")
    yield store
    store.close()


def test_commands_that_only_look_or_keep_books_import_no_torch(work, answers):
    for command, (code, out) in zip(WORKS, answers(WORKS), strict=True):
        assert code == 0, (command, out)


def test_refusals_import_no_torch_and_change_nothing(work, answers, tmp_path):
    before = {name: work.history(name) for name in work.names()}
    for command, (code, out) in zip(REFUSALS, answers(REFUSALS), strict=True):
        assert code in (1, 2) and "Traceback" not in out, (command, out)
    assert {name: work.history(name) for name in work.names()} == before


def test_what_is_shown_by_the_journal_is_what_the_memory_holds(work, answers):
    shown = [["show", "-m", "work", "--json"], ["show", "-m", "work", "--json", "--version", "1"]]
    by_journal = [json.loads(out) for _, out in answers([["pin", "b.txt", "-m", "work"], *shown])[1:]]
    work._journal._do("DELETE FROM accounts")
    for facts, version in zip(by_journal, (None, 1), strict=True):
        memory, account = work.open("work", version), work.account("work", version)
        assert facts["M"] == memory.M == account.M and facts["updates"] == memory.updates
        assert [one["left"] for one in facts["sources"]] == memory.slots_left().tolist()
        assert [one["pinned"] for one in facts["sources"]] == [source.pinned for source in memory.sources]
        assert work._books.account(work._journal.version("work", version)) == account
    assert work.stats("work") and work._journal.account(work._journal.version("work", 1).id)  # kept again
