"""The command line as a person uses it, on a tiny model in a folder."""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import latentmem
from latentmem import cli, longterm
from latentmem.model.prompts import TurnSource
from latentmem.store import Store
from latentmem.store import home as files
from latentmem.store.objects import Disk


@pytest.fixture
def run(home, tiny_folder, monkeypatch, capsys):
    """Run a command and give (exit code, standard output, standard error)."""

    def command(*args, stdin=None):
        args = [str(a) for a in args]
        if args[0] in ("write", "chat") and "--model" not in args:
            args += ["--model", str(tiny_folder)]
        monkeypatch.setattr(sys, "argv", ["latentmem", *args])
        if stdin is not None:
            data = stdin if isinstance(stdin, bytes) else stdin.encode()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return command


def stored(name="work", version=None):
    """A memory as the store has it."""
    store = Store(files.home() / "store")
    memory = store.open(name, version)
    store.close()
    return memory


def books(home):
    """All that is kept: every version of every memory, what objects there are, and other files with their contents."""
    store = Store(home / "store")
    found = {name: store.history(name) for name in store.names()}
    objects = {path: path.read_bytes() for path in (home / "store" / "objects").rglob("*.safetensors")}
    store.close()
    others = {path: path.read_bytes() for path in home.rglob("*") if path.is_file() and "store" not in path.parts}
    return found, objects, {path: data for path, data in others.items() if path.suffix != ".lock"}


def raw(home):
    return b"\0".join(path.read_bytes() for path in home.rglob("*") if path.is_file())


def plain(text):
    """Words without the frames and line breaks of a terminal."""
    return " ".join(text.replace("│", " ").split())


def test_write_files_standard_input_and_a_text_in_quotes(run, tmp_path):
    (tmp_path / "notes.txt").write_text("the lease was signed by Ada")
    (tmp_path / "report.md").write_text("# report\nall is well")
    files = [tmp_path / "notes.txt", tmp_path / "report.md"]
    options = ["--memory", "work", "--capacity", 128, "--per-update", 16]
    code, out, _ = run("write", *files, "-", "a text in quotes", *options, stdin="from a pipe")
    assert code == 0 and "work, version 4: 72 of 128 slots" in out
    memory = stored()
    assert [s.name for s in memory.sources] == ["notes.txt", "report.md", "standard input", "text"]
    texts = ("the lease was signed by Ada", "report\nall is well", "from a pipe", "a text in quotes")
    assert memory.tokens == sum(map(len, texts))  # one token per byte
    assert (memory.N, memory.K) == (128, 16)


def test_ask_prints_what_the_library_answers(run, tiny_folder):
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    code, out, _ = run("ask", "which colour?", "--memory", "work", "--max-new-tokens", 8)
    llm = latentmem.load(str(tiny_folder), device="cpu")
    assert code == 0 and out.strip() == llm.ask(stored(), "which colour?", max_new_tokens=8)
    code, out, _ = run("ask", "which colour?", "--memory", "work", "--max-new-tokens", 8, "--compare")
    assert code == 0 and "with memory:" in out and "without memory:" in out


def test_an_empty_memory_says_so_in_place_of_an_answer(run):
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    empty, new = ("-m", "work", "--version", 0), ("--max-new-tokens", 8)
    for more in ((), ("--sources",)):
        code, out, err = run("ask", "which colour?", *empty, *new, *more)
        assert (code, out, err) == (0, "", "latentmem: the memory 'work' is empty: nothing is known yet.\n")
    code, out, err = run("ask", "which colour?", *empty, *new, "--compare")
    assert code == 0 and re.search("^without memory: .+", out, re.M) and "is empty" in err


def test_a_memory_of_a_quantized_model_is_read_by_one(run, tiny_folder):
    options = ("-m", "small", "-N", 64, "-K", 16)
    assert run("write", "the door is blue", *options, "--quantize", "int8")[0] == 0
    llm = latentmem.load(str(tiny_folder), device="cpu", quantize="int8")
    memory = stored("small")
    assert memory.model == llm.identity and memory.model.startswith("int8-")
    code, out, _ = run("ask", "which colour?", "-m", "small", "--max-new-tokens", 8)
    assert code == 0 and out.strip() == llm.ask(memory, "which colour?", max_new_tokens=8)
    for more in ((), ("--quantize", "int8")):
        assert run("write", "it is open", "-m", "small", *more)[0] == 0
    assert stored("small").updates > memory.updates
    assert run("chat", "-m", "talked", "--quantize", "int8", stdin="hello\n")[0] == 0
    assert stored("talked").model == llm.identity
    run("write", "the door is blue", "-m", "exact", "-N", 64, "-K", 16)
    code, _, err = run("write", "it is open", "-m", "exact", "--quantize", "int8")
    assert code == 2 and "a model with exact weights, not --quantize int8" in err


@pytest.mark.parametrize("command", [("write",), ("ask",), ("chat",), ("eval", "retention")])
def test_help_says_what_is_taken_by_default(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(*command, "--help", "--model", "none")
    assert code == 0 and "--model" in out
    assert not re.search(r" [.]\s", out)  # a word in brackets would be taken for markup
    assert command != ("write",) or "else exact)" in out


def test_undo_goes_one_step_back_each_time_and_rollback_anywhere(run):
    run("write", "first text here", "-m", "work", "-N", 64, "-K", 16)
    run("write", "second text here", "third text here", "-m", "work")
    updates = [stored(version=i).updates for i in range(4)]
    for i, said in ((2, "as rollback 3"), (1, "rollback 4"), (0, "rollback 5")):
        code, out, _ = run("undo", "-m", "work")
        assert code == 0 and f"back at version {i} " in out and f"`latentmem {said.removeprefix('as ')} -m work`" in out
        assert stored().updates == updates[i]
    code, _, err = run("undo", "-m", "work")
    assert code == 2 and "nothing to undo in the memory 'work'" in err
    assert run("rollback", 3, "-m", "work")[0] == 0 and stored().updates == updates[3]
    code, _, err = run("rollback", 9, "-m", "work")
    assert code == 2 and "no version 9; it has 0 to 7" in err


def test_list_show_and_rm(run, home):
    assert "No memories yet" in run("list")[1]
    run("write", "some [bold]text[/bold] of forty-odd characters", "-m", "work", "-N", 32, "-K", 8, "--longterm", 0)
    _, out, _ = run("list")
    assert re.search(r"work +32 of 32 +2 +20\d\d-.* KiB +int8 +\S", out)
    (one,) = json.loads(run("list", "--json")[1])
    assert (one["name"], one["M"], one["form"], one["order"], one["longterm"]) == ("work", 32, "int8", "written", None)
    code, out, _ = run("show", "-m", "work")
    assert code == 0 and "32 of 32 slots in each of 3 layers (100%)" in out and "half-life" in out
    assert re.search(r"text +46 +46 +70% +52% +4% +0% *\n", out) and "work, version 1" in out
    assert re.search(r"text +46 +70% \(32\) +▆▆▆ *\n", run("show", "-m", "work", "--layers")[1])
    facts = json.loads(run("show", "-m", "work", "--json")[1])
    assert facts["M"] == facts["N"] == 32 and facts["sources"][0]["left"] == [32, 32, 32] and facts["version"] == 1
    assert facts["half_life"] == pytest.approx(2.409, abs=1e-3)
    assert "0 of 32 slots" in run("show", "-m", "work", "--version", 0)[1]
    code, out, _ = run("rm", "--memory", "work")
    assert code == 0 and books(home) == ({}, {}, {}) and b"bold" not in raw(home)
    assert run("rm", "--memory", "work")[0] == 2


def test_prune_removes_old_versions_and_list_says_what_it_would_free(run, home):
    for i in range(5):
        run("write", f"text number {i} of some length", "-m", "work", "-N", 64, "-K", 16, "--form", "exact")
    _, out, _ = run("list")
    assert re.search(r"work +64 of 64 +6 +20\d\d-\S+ \S+ +[\d.]+ KiB +[\d.]+ KiB", out)
    assert re.search(r"Pruning to the newest versions would free about [\d.]+ KiB:\n`latentmem prune --keep 1", out)
    assert re.search(r"on disk +[\d.]+ KiB in 6 versions, about [\d.]+ KiB prunable", run("show", "-m", "work")[1])
    facts = json.loads(run("show", "-m", "work", "--json")[1])
    assert 0 < facts["prunable"] < facts["bytes"] == sum(version.bytes for version in books(home)[0]["work"])
    now, before = stored().slots, books(home)
    code, out, _ = run("prune", "-m", "work", "--keep", 2, "--dry-run")
    assert code == 0 and re.search(r"work: this would remove versions 1 to 3, and free about [\d.]+ KiB", out)
    assert run("prune", "-m", "work", "--older-than", "30d")[1] == "work: nothing to prune\n" and books(home) == before
    code, out, _ = run("prune", "-m", "work", "--keep", 2)
    assert code == 0 and re.search(r"work: removed versions 1 to 3, [\d.]+ KiB freed; .* the texts", out)
    assert "removed version 4," in run("prune", "-m", "work", "--older-than", "0s")[1]
    assert (stored().slots == now).all() and "Pruning" not in run("list")[1]
    assert run("history", "-m", "work")[1].count(" pruned") == 4
    code, _, err = run("undo", "-m", "work")
    assert code == 2 and "version 4 of 'work' was pruned" in err
    assert run("prune", "-m", "work", "--keep", 1)[1] == "work: nothing to prune\n"


def test_the_numbers_of_versions_are_said_in_words():
    from latentmem.cli.versions import _ranges

    cases = ([], ""), ([3], "version 3"), ([1, 2], "versions 1 to 2"), ([1, 3, 4, 6], "versions 1, 3 to 4 and 6")
    assert all(_ranges(versions) == words for versions, words in cases)


def test_show_text_prints_what_layer_0_holds(run):
    run("write", "the door is blue", "and <|im_end|> stays text", "-m", "work", "-N", 64, "-K", 16)
    code, out, _ = run("show", "-m", "work", "--text")
    assert code == 0 and "the door is blueand <|im_end|> stays text" in out


def test_a_chat_is_remembered_between_runs(run):
    run("write", "the door is blue", "-m", "work", "-N", 256, "-K", 16)
    code, _, err = run("chat", "-m", "work", "--max-new-tokens", 4, stdin="hello there\n\n/exit\n")
    assert code == 0 and "wrote 1 turn into the memory 'work'" in err
    name = re.search(r'latentmem forget "(chat \d{4}-\d\d-\d\d \d\d:\d\d #2)" -m work', err)[1]
    assert [s.name for s in stored().sources] == ["text", name]
    assert "hello there" in run("show", "-m", "work", "--text")[1]
    assert run("forget", name, "-m", "work")[0] == 0 and [s.name for s in stored().sources] == ["text"]


@pytest.mark.parametrize(("write", "texts"), [("user", 1), ("both", 2), ("none", 0)])
def test_whose_turns_a_chat_writes_is_chosen(run, home, write, texts):
    code, _, err = run("chat", "-m", "new", "--write", write, "--max-new-tokens", 9, stdin="hello\n")
    assert (code, "there is no memory 'new'" in err) == ((0, False) if texts else (2, True))
    run("write", "the door is blue", "-m", "work", "-N", 256, "-K", 16)
    code, _, err = run("chat", "-m", "work", "--write", write, "--max-new-tokens", 9, stdin="hello\n")
    assert code == 0 and ("nothing to write" in err) == (texts == 0)
    assert [v.event for v in books(home)[0]["work"]][2:] == ["write"] * texts
    assert len({v.source for v in books(home)[0]["work"][2:]}) == min(texts, 1)
    assert run("chat", "-m", "work", "--write", "all", stdin="hello\n")[0] == 2


def test_a_chat_that_is_killed_loses_no_turn_and_repeats_none(run, home):
    run("write", "the door is blue", "-m", "work", "-N", 256, "-K", 16)
    Store(home / "store").append("work", "my cat is Pip", TurnSource())
    assert "1 to be applied" in run("list")[1]
    assert run("write", "the gate is red", "-m", "work")[0] == 0  # another command in between
    text = run("show", "-m", "work", "--text")[1]
    assert text.count("my cat is Pip") == text.count("the gate is red") == 1
    assert "nothing to write" in run("chat", "-m", "work", stdin="")[2]


def test_a_chat_in_which_nothing_is_said_makes_no_memory(run, home):
    code, _, err = run("chat", "-m", "new", stdin="\n\n")
    assert code == 0 and "nothing to write" in err and books(home)[0] == {}
    assert run("chat", "-m", "new", "--max-new-tokens", 2, stdin="hello\n")[0] == 0
    assert [v.event for v in books(home)[0]["new"]] == ["create", "write"]


def test_a_write_that_was_cut_off_is_finished_by_the_next_command(run, home):
    run("write", "the door is blue", "-m", "work", "-N", 256, "-K", 16)
    for command in (["show"], ["ask", "why?", "--max-new-tokens", 2], ["undo"], ["write", "more text"], ["chat"]):
        Store(home / "store").append("work", f"cut off before {command[0]}", "cut")
        assert "1 to be applied" in run("list")[1]
        assert run(*command, "-m", "work", stdin="")[0] == 0
        assert {v.state for v in books(home)[0]["work"]} == {"applied"}


def test_a_key_writes_once(run, home):
    for _ in range(2):
        assert run("write", "first text", "second text", "-m", "work", "-N", 64, "-K", 16, "--key", "a")[0] == 0
    assert [v.key for v in books(home)[0]["work"]] == [None, "a 1", "a 2"]
    code, _, err = run("write", "another text", "second text", "-m", "work", "--key", "a")
    assert code == 2 and "belongs to another text" in err


# --- versions and sources -------------------------------------------------------------------------------------------


def test_history_and_diff_say_what_became_of_each_source(run):
    run("write", "first text here", "-m", "work", "-N", 64, "-K", 16)
    run("pin", "text", "-m", "work")
    run("fork", "trial", "--version", 1, "-m", "work")
    run("write", "-", "-m", "trial", stdin="more")
    _, out, _ = run("history", "-m", "work")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["version", "time", "event", "source", "tokens", "from", "state", "bytes"]
    assert lines[2][0] == "1" and lines[2][3:7] == ["write", "text", "15", "0"] and lines[3][3:5] == ["pin", "text"]
    assert "1 of work" in run("history", "-m", "trial")[1]
    rows = json.loads(run("history", "-m", "trial", "--json")[1])
    assert [(row["event"], row["base"]) for row in rows] == [("fork", ["work", 1]), ("write", ["trial", 0])]
    assert re.search(r"standard input +0 +4 +0.0 +4.0", run("diff", 0, "-m", "trial")[1])
    assert "every source is as it was" in run("diff", 1, 2, "-m", "work")[1]


def test_a_long_term_memory_is_made_shown_and_kept(run, tiny_folder):
    options = ["-m", "work", "-N", 32, "-K", 16, "--longterm", 8]
    run("write", "the first text of all, which is soon dropped", *options)
    code, out, _ = run("write", "another one of forty characters or so ...", "-m", "work", "--longterm", 8)
    assert code == 0 and re.search(r"32 of 32 slots.*, and 53 that were dropped in its long-term part", plain(out))
    shown = plain(run("show", "-m", "work")[1])
    part = r"long-term 53 slots in each layer, .* KiB of at most 256.0 MiB; a question takes 8 of them at most"
    assert re.search(part, shown)
    assert re.search(r"source +tokens +slots +left +long-term +\+1", shown)
    facts = json.loads(run("show", "-m", "work", "--json")[1])
    assert (facts["longterm"]["R"], facts["longterm"]["S"]) == (8, 53)
    (one,) = json.loads(run("list", "--json")[1])
    part = {name: value for name, value in facts["longterm"].items() if name not in ("S", "bytes")}
    assert one["longterm"] == part and one["order"] == facts["order"] == "best-last"
    (source,) = facts["sources"]
    assert source["stored"] + sum(source["left"]) / 3 / source["slots"] == pytest.approx(1)
    llm = latentmem.load(str(tiny_folder), device="cpu")
    _, out, _ = run("ask", "which text?", "-m", "work", "--max-new-tokens", 8)
    assert out.strip() == llm.ask(stored(), "which text?", max_new_tokens=8)
    code, _, err = run("write", "more of it", "-m", "work", "--longterm", 9)
    assert code == 2 and "was made with longterm=8, not 9" in plain(err)


def test_what_a_write_loses_is_said_and_a_rebuilt_memory_keeps_it(run):
    options = ["-m", "work", "-N", 32, "-K", 16, "--longterm", 0]
    assert "Lost for good" not in run("write", "the first text of all", *options)[1]
    code, out, _ = run("write", "another one of forty characters or so ...", "-m", "work")
    said = "Lost for good by this write: 30 slots of each layer, 48% of what the memory was given."
    assert code == 0 and said in plain(out)
    remedy = re.search(r"latentmem (rebuild) (NEW) (--memory) (work) (--longterm) (10)`", plain(out))
    code, out, _ = run("chat", "-m", "work", "--max-new-tokens", 2, stdin="hello\n")
    assert code == 0 and re.search(r"Lost for good by this write: \d+ slots", plain(out))
    assert run(*remedy.groups())[0] == 0
    kept = stored("NEW")
    assert (kept.settings.longterm.R, kept.N, kept.sources) == (10, 32, stored().sources) and longterm.lost(kept) == 0
    assert run("rebuild", "same", "-m", "work")[0] == 0 and stored("same").settings == stored().settings
    assert run("rebuild", "raw", "-m", "work", "--form", "exact")[0] == 0
    assert run("rebuild", "again", "-m", "raw")[0] == 0 and stored("again").settings == stored("raw").settings
    assert run("rebuild", "less", "-m", "NEW", "--longterm-limit", 9000)[0] == 0
    assert (stored("less").settings.longterm.R, stored("less").settings.longterm.limit) == (10, 9000)


def test_ask_says_what_an_answer_drew_on(run):
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    run("write", "-", "-m", "work", stdin="the gate is red")
    _, bare, _ = run("ask", "which colour?", "-m", "work", "--max-new-tokens", 8)
    code, out, _ = run("ask", "which colour?", "-m", "work", "--max-new-tokens", 8, "--sources")
    assert code == 0 and out.startswith(bare)
    shares = re.findall(r"^(text|standard input) +(\d+)% +100% +100% +\d+% +\d+% *$", out[len(bare) :], re.M)
    assert {name for name, _ in shares} == {"text", "standard input"} and 98 < sum(int(n) for _, n in shares) < 102
    assert re.search('^(text|standard input): "the (door is blue|gate is red)"$', out, re.M)
    _, old, _ = run("ask", "which colour?", "-m", "work", "--max-new-tokens", 8, "--version", 1, "--sources")
    assert "standard input" not in old and "100%" in old


def test_pins_and_times_are_shown_and_taken_off(run, monkeypatch):
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16, "--longterm", 0)
    assert "'text' is pinned; 16 of at most 32 slots are" in run("pin", "text", "-m", "work")[1]
    assert "is forgotten by whoever opens it after 20" in run("expire", "text", "--after", "30d", "-m", "work")[1]
    assert re.search(r"text .*100%  pinned, until 20", run("show", "-m", "work")[1])
    assert "no longer pinned" in run("pin", "text", "--off", "-m", "work")[1]
    assert "never" in run("expire", "text", "--never", "-m", "work")[1]
    assert "until" not in run("show", "-m", "work")[1]
    run("expire", "text", "--after", "1h", "-m", "work")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert run("show", "-m", "work")[0] == 0 and stored().sources == ()


def test_forgetting_by_slots_is_said_to_leave_something_and_exactly_leaves_no_byte(run, home):
    secret = "the safe opens with heliotrope"
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    run("write", "-", "-m", "work", stdin=secret)
    run("fork", "trial", "-m", "work")
    run("write", "something else", "-m", "trial")
    code, out, _ = run("forget", "standard input", "-m", "work")
    assert code == 0 and "--exact" in out and [s.name for s in stored().sources] == ["text"]
    assert secret.encode() in raw(home)
    code, _, err = run("forget", "standard input", "--exact", "-m", "work", stdin="")
    assert code == 2 and "--yes" in err and secret.encode() in raw(home)
    code, out, _ = run("forget", "standard input", "--exact", "--yes", "-m", "work")
    assert code == 0 and "rewritten without 'standard input': trial, work" in out
    assert b"heliotrope" not in raw(home)
    for name in ("work", "trial"):
        for version in books(home)[0][name]:
            assert "standard input" not in [s.name for s in stored(name, version.version).sources]


def test_a_turn_that_waits_is_forgotten_exactly(run, home):
    run("chat", "-m", "work", "--max-new-tokens", 2, stdin="the gate is red\n")
    source = TurnSource()
    Store(home / "store").append("work", "the safe opens with heliotropes", source)
    assert b"heliotropes" in raw(home)
    assert run("forget", source.name, "--exact", "--yes", "-m", "work")[0] == 0
    assert b"heliotrope" not in raw(home)  # a number could stand there by chance, in the id of a process


def test_a_memory_is_exported_imported_and_rebuilt(run, home, tmp_path, tmp_path_factory):
    from latentmem.testing import byte_tokenizer, tiny_model

    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    run("chat", "-m", "work", "--max-new-tokens", 2, stdin="hello\n")
    run("undo", "-m", "work")
    code, out, _ = run("export", tmp_path / "work.zip", "-m", "work")
    assert code == 0 and "4 versions" in out
    code, _, err = run("export", tmp_path / "work.zip", "-m", "work")
    assert code == 2 and "exists already" in err
    assert run("import", tmp_path / "work.zip", "-m", "copy")[0] == 0
    found = books(home)[0]
    assert [replace(v, base=None) for v in found["copy"]] == [replace(v, base=None) for v in found["work"]]
    assert torch.equal(stored("copy").slots, stored().slots)
    run("rollback", 2, "-m", "work")
    assert run("rebuild", "same", "-m", "work")[0] == 0
    assert torch.equal(stored("same").slots, stored().slots)
    other = tmp_path_factory.mktemp("other")
    tiny_model(seed=1).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    assert run("rebuild", "other", "-m", "work", "--model", other)[0] == 0
    assert stored("other").sources == stored().sources and torch.equal(stored("other").slots, stored().slots)
    mine, theirs = (memory.written[1].tensors["heads"] for memory in (stored(), stored("other")))
    assert mine.shape == theirs.shape and not torch.equal(mine, theirs)
    assert run("ask", "why?", "-m", "other", "--max-new-tokens", 2)[0] == 0


def test_a_memory_of_other_adapters_is_read_and_written_with_them(run, home, tiny_folder, tmp_path, monkeypatch):
    from latentmem.decoder import adapters
    from latentmem.files import adapters as files

    plain = latentmem.load(str(tiny_folder), device="cpu").base
    lora = {"r": 2, "alpha": 4.0, "target_modules": ["q_proj"]}
    shape = {"preset": "exact", "N": 64, "K": 16, "compression": 1, "choice": "last"}
    adapters.insert(plain, **lora, dropout=0.0)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(weight) for name, weight in adapters.weights(plain).items()}
    file = tmp_path / "adapters.safetensors"
    files.save(
        file, weights, {**lora, "model": latentmem.load(str(tiny_folder), device="cpu").identity, "memory": shape}
    )
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    assert run("rebuild", "other", "-m", "work", "--adapters", file)[0] == 0 and stored("other").adapters
    code, _, err = run("ask", "why?", "-m", "other", "--max-new-tokens", 2)
    assert code == 2 and "written with another adapter" in err
    for verb in (["ask", "why?", "--max-new-tokens", 2], ["write", "the cat is Pip"]):
        assert run(*verb, "-m", "other", "--adapters", file)[0] == 0
        assert run(*verb, "-m", "work", "--adapters", "none")[0] == 0
    monkeypatch.setenv("LATENTMEM_ADAPTERS", str(file))
    assert run("chat", "-m", "other", "--max-new-tokens", 2, stdin="hello\n")[0] == 0
    assert run("forget", "text", "--exact", "--yes", "-m", "other")[0] == 0
    assert run("ask", "why?", "-m", "work", "--max-new-tokens", 2)[0] == 0  # of the untrained model, as it was written
    for name in ("work", "other"):  # a memory again is a memory of the same adapters
        assert run("rebuild", f"{name}-again", "-m", name, "--longterm", 4)[0] == 0
        assert stored(f"{name}-again").adapters == stored(name).adapters
    assert run("rebuild", "untaught", "-m", "other", "--adapters", "none")[0] == 0 and not stored("untaught").adapters
    own = tmp_path / "own"
    shutil.copytree(tiny_folder, own)
    shutil.copy(file, own / "adapters.safetensors")
    monkeypatch.delenv("LATENTMEM_ADAPTERS")
    assert (
        run("write", "the door is red", "-m", "bare", "--model", own, "--adapters", "none", "-N", 64, "-K", 16)[0] == 0
    )
    assert run("rebuild", "bare-again", "-m", "bare")[0] == 0 and not stored("bare-again").adapters
    assert run("rebuild", "taught", "-m", "bare", "--model", own)[0] == 0 and stored("taught").adapters
    assert stored("other").adapters and not stored("work").adapters


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_two_files_of_one_name_stay_two_sources(run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "n.txt").write_text(f"file in {name}")
    paths = [tmp_path / "a" / "n.txt", tmp_path / "b" / "n.txt"]
    assert run("write", *paths, "-m", "work", "-N", 64, "-K", 16)[0] == 0
    assert [s.name for s in stored().sources] == [str(p) for p in paths]


def test_a_model_in_a_folder_is_found_again_from_anywhere(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    assert run("write", "some text", "-m", "work", "-N", 64, "-K", 16, "--model", f"./{tiny_folder.name}")[0] == 0
    monkeypatch.chdir(tmp_path)
    assert run("ask", "why?", "-m", "work", "--max-new-tokens", 2)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["write", "missing.txt"], "there is no file 'missing.txt'"),
        (["write", "{tmp}/binary.bin"], "is not text"),
        (["write", "{tmp}/empty.txt"], "is empty"),
        (["write", "{tmp}/nothing"], "nothing holds no file with a text that can be read"),
        (["write", " "], "is empty"),
        (["write", "my missing notes.txt"], "there is no file"),
        (["write", "../missing file"], "there is no file"),
        (["write", "a lone \udce9 surrogate"], "not valid Unicode"),
        (["ask", "a lone \udce9 surrogate", "-m", "work"], "not valid Unicode"),
        (["ask", "why?", "-m", "work", "--device", "foo"], "device 'foo' can not be used"),
        (
            ["write", "some text", "-m", "new", "--seed", "99999999999999999999"],
            "seed (determines every random drop) must",
        ),
        (["write", "some text", "--model", "{tmp}/truncated"], "could not be loaded"),
        (["write", "some text", "--model", "{tmp}/lacking"], "lacks 1 weights"),
        (["write", "some text", "--model", "{tmp}/other-shape"], "could not be loaded"),
        (["write", "some text", "--model", "{tmp}/broken.gguf"], "could not be loaded"),
        (["write", "some text", "--model", "~nobody-at-all/x"], "unknown model"),
        (["write", "some text", "--model", "{tmp}/list"], "/list'"),
        (["rm", "-m", "nobody"], "there is no memory"),
        (["write", "some text", "--model", "no-such-model"], "unknown model 'no-such-model'"),
        (["write", "some text", "--model", "{tmp}/no.gguf"], "no such file"),
        (["write", "some text", "--model", "{tmp}"], "holds no config.json"),
        (["write", "some text", "-m", "new", "-N", "8", "-K", "9"], "K=9, N=8"),
        (["write", "some text", "-m", "new", "-N", "100000"], "Choose a smaller N"),
        (["write", "some text", "-m", "new", "--preset", "best"], "preset must be one of exact, paper"),
        (["write", "some text", "-m", "work", "-N", "32"], "was made with N=64"),
        (["write", "some text", "-m", "work", "--role", "tool"], "role must be"),
        (["write", "some text", "-m", "../evil"], "no path"),
        (["write", "some text", "-m", "work", "--model", "{other}"], "written with another model"),
        (["ask", "why?", "-m", "/etc/passwd"], "no path"),
        (["ask", "why?", "-m", "nobody"], "there is no memory 'nobody' (there are: work)"),
        (["ask", "", "-m", "work"], "the question is empty"),
        (["ask", "why " * 400, "-m", "work"], "there is room for"),
        (["ask", "why?", "-m", "work", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["show", "-m", "nobody"], "there is no memory"),
        (["undo", "-m", "nobody"], "there is no memory"),
        (["doctor", "--question", "why?"], "go together"),
        (["ask", "why?", "-m", "work", "--version", "7"], "has no version 7; it has 0 to 1"),
        (["show", "-m", "work", "--version", "-1"], "has no version -1"),
        (["history", "-m", "nobody"], "there is no memory"),
        (["diff", "0", "9", "-m", "work"], "has no version 9"),
        (["rollback", "two", "-m", "work"], "unable to parse string as an integer"),
        (["prune", "-m", "nobody", "--keep", "1"], "there is no memory"),
        (["prune", "-m", "work"], "--keep 10, for example, or --older-than 30d"),
        (["prune", "-m", "work", "--keep", "1", "--older-than", "1d"], "say which versions stay"),
        (["prune", "-m", "work", "--keep", "0"], "--keep"),
        (["prune", "-m", "work", "--older-than", "soon"], "got 'soon'"),
        (["fork", "work", "-m", "work"], "a memory 'work' already"),
        (["fork", "../x", "-m", "work"], "no path"),
        (["forget", "nothing", "-m", "work"], "no source 'nothing' (it has: text)"),
        (["forget", "nothing", "-m", "work", "--exact", "--yes"], "no write of the source 'nothing'"),
        (["forget", "text", "-m", "work", "--exact"], "with --yes"),
        (["pin", "nothing", "-m", "work"], "no source 'nothing'"),
        (["expire", "text", "-m", "work"], "--after 30d, for example, or --never"),
        (["expire", "text", "-m", "work", "--after", "1d", "--never"], "or --never"),
        (["expire", "text", "-m", "work", "--after", "soon"], "got 'soon'"),
        (["export", "{tmp}/missing/x.zip", "-m", "work"], "create it first"),
        (["export", "{tmp}/empty.txt", "-m", "work"], "exists already"),
        (["import", "{tmp}/missing.zip", "-m", "new"], "no such file"),
        (["import", "{tmp}/empty.txt", "-m", "new"], "is no exported memory"),
        (["rebuild", "work", "-m", "work"], "a memory 'work' already"),
        (["rebuild", "new", "-m", "work", "--model", "no-such-model"], "unknown model"),
        (["chat", "-m", "a/b"], "no path"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(
    run, home, tiny_folder, tmp_path, tmp_path_factory, arguments, sentence
):
    from latentmem.testing import byte_tokenizer, tiny_model

    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "list").mkdir()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00")
    if any("other-shape" in a for a in arguments):
        shutil.copytree(tiny_folder, tmp_path / "other-shape")
        config = tmp_path / "other-shape" / "config.json"
        config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 64'))
    for damage in ("truncated", "lacking"):
        if any(damage in a for a in arguments):
            shutil.copytree(tiny_folder, tmp_path / damage)
            weights = tmp_path / damage / "model.safetensors"
            tensors = load_file(weights)
            del tensors["model.norm.weight"]
            save_file(tensors, weights, {"format": "pt"})
            if damage == "truncated":
                weights.write_bytes(weights.read_bytes()[:-100])
    other = tmp_path_factory.mktemp("other")
    if "{other}" in arguments:
        tiny_model(seed=1).save_pretrained(other)
        byte_tokenizer().save_pretrained(other)
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    before = books(home)
    code, out, err = run(*(a.format(tmp=tmp_path, other=other) for a in arguments), stdin="")
    assert code == 2 and sentence in plain(out + err) and "Traceback" not in err
    assert books(home) == before


@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing", "empty"])
def test_a_damaged_memory_is_refused_and_left_alone(run, home, damage):
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    store = Store(home / "store")
    name = store._journal.head(store._journal.id("work")).object
    path = home / "store" / "objects" / name[:2] / f"{name}.safetensors"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-9], "tampered": data[:-1] + bytes([data[-1] ^ 1])}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    before = books(home)
    for command in (["ask", "why?"], ["write", "more text"], ["show"], ["chat"]):
        code, _, err = run(*command, "-m", "work", stdin="")
        assert code == 2 and name in err and "Traceback" not in err
    assert books(home) == before
    assert run("list")[0] == 0 and run("rollback", 0, "-m", "work")[0] == 0 and run("write", "more", "-m", "work")[0]


def test_a_full_disk_keeps_the_old_memory(run, home, monkeypatch):
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    before = books(home)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Disk, "create", full)
    code, _, err = run("write", "more text here", "-m", "work")
    assert code == 1 and "No space left on device" in err
    assert books(home) == before


def test_two_writers_do_not_meet(run, home, monkeypatch):
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    monkeypatch.setattr(files, "TIMEOUT", 0.05)
    store = Store(home / "store")
    with store._locks.memory("work"):
        code, _, err = run("write", "the gate is red", "-m", "work")
    assert code == 2 and "is changing the memory 'work'" in err
    with store._locks.memory("work"):
        code, _, err = run("chat", "-m", "work", "--max-new-tokens", 2, stdin="hello")
    assert code == 2 and "is changing the memory 'work'" in err
    assert [v.state for v in store.history("work")][2:] == ["pending"]  # the turn waits, and is answered from next time
    assert run("ask", "why?", "-m", "work", "--max-new-tokens", 2)[0] == 0
    assert "hello" in run("show", "-m", "work", "--text")[1]


def test_errors_name_commands_that_there_are(run, home):
    there = {command.name or command.callback.__name__.strip("_") for command in cli.app.registered_commands}
    there |= {group.name for group in cli.app.registered_groups}
    for path in Path(latentmem.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert set(re.findall(r"`latentmem ([a-z]+)", node.value)) <= there, (path, node.value)
    assert "`latentmem write` makes one" in run("ask", "hi")[2] and "create" not in run("ask", "hi")[2]


TEXTS = [
    *("私は水曜日に京都へ行きます。", "我下周三去京都。", "我下周三去京都", "ฉันชอบกาแฟ", "👩‍👩‍👧‍👦", "Größe", "Да"),
    *("Stop!", "Why?", "Done.", '"Done."', "(really?)", "red,green", "colour=red", '{"a":1}', "it's", "a:b", "x<y"),
]
NAMES = [
    *("Donaudampfschifffahrtsgesellschaft", "notes", "README", "notes.txt", "笔记.txt", "./メモ", "~/notes", "../x"),
    *("/tmp/ü", "*.zzz", "notes/*", "notes[12]", "a/b", "report-2", "v1.2", "-x.md"),
]


def test_a_text_without_spaces_is_written(run):
    assert run("write", *TEXTS, "-m", "work", "-N", 512, "-K", 16)[0] == 0
    assert stored().tokens == sum(len(text.encode()) for text in TEXTS)  # one token per byte


def test_any_text_is_shown_as_it_was_written_and_what_is_none_changes_nothing(run, home, tmp_path):
    text = "我下周三去京都。\nשלום, הקוד הוא 7391\ne\u0301 versus é\n👩‍👩‍👧‍👦 🇳🇴 𝄞\n"
    (tmp_path / "笔记.txt").write_text(text, encoding="utf-8")
    assert run("write", tmp_path / "笔记.txt", "-m", "work", "-N", 512, "-K", 16)[0] == 0  # a sign lies in two pieces
    code, out, _ = run("show", "--text", "-m", "work")
    assert code == 0 and text in out and "笔记.txt" in out and "\ufffd" not in out
    before = books(home)
    code, _, err = run("write", "two \udcff words", "-m", "work")
    assert code == 2 and "not valid Unicode" in err and books(home) == before


def test_one_long_line_is_remembered_to_its_end(run, tmp_path):
    line = json.dumps({f"k{i}": f"v{i * 7919 % 100_003}" for i in range(150)}, separators=(",", ":"))
    (tmp_path / "line.log").write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert run("write", tmp_path / "line.log", "-m", "work", "-N", 64, "-K", 16, "--longterm", 0)[0] == 0
    memory, (_, out, _) = stored(), run("show", "--text", "-m", "work")
    assert (memory.M, memory.tokens) == (64, len(line))  # without the byte order mark
    assert out.rstrip().endswith(line[-(len(line) % 16 or 16) :])  # the newest piece


@pytest.mark.parametrize("name", NAMES)
def test_one_word_that_may_be_a_file_is_refused_where_there_is_none(run, home, name):
    code, _, err = run("write", "-m", "work", "--", name)
    assert code == 2 and f"there is no file {name!r}" in err
    assert "work" not in Store(home / "store")


@pytest.fixture
def meanwhile(home, tiny_folder, monkeypatch):
    """Somebody else begins the memory `both` and writes into it, while this process loads its model."""
    load = cli.base.load

    def slowly(*args, **more):
        llm = load(*args, **more)
        store = Store(home / "store")
        if "both" not in store:
            store.create("both", llm.empty(N=64, K=16, form="exact"))
            store.write(llm, "both", "the gate is red", "other")
        store.close()
        return llm

    monkeypatch.setattr(cli.base, "load", slowly)


@pytest.mark.parametrize("settings", [(), ("-N", 64)])
def test_the_second_of_two_first_writers_goes_on_with_what_is_there(run, meanwhile, settings):
    code, out, err = run("write", "the door is blue", "-m", "both", *settings)
    assert code == 0 and "both, version 2" in out, err
    assert [(one.name, one.tokens) for one in stored("both").sources] == [("other", 15), ("text", 16)]


def test_the_second_of_two_first_writers_is_told_of_other_settings(run, meanwhile):
    code, _, err = run("write", "the door is blue", "-m", "both", "-N", 32)
    assert code == 2 and "the memory 'both' was made with N=64, not 32" in err
    assert [source.name for source in stored("both").sources] == ["other"]


def test_a_chat_goes_on_with_a_memory_that_was_made_meanwhile(run, meanwhile):
    code, _, err = run("chat", "-m", "both", "--max-new-tokens", 2, stdin="hello\n")
    assert code == 0 and "wrote 1 turn into the memory 'both'" in err
    first, second = stored("both").sources
    assert first.name == "other" and second.tokens == 5


VERBS = (
    *("write", "ask", "chat", "list", "show", "rm", "doctor", "history", "diff", "undo", "rollback", "fork"),
    *("prune", "forget", "pin", "expire", "export", "import", "rebuild", "train", "eval"),
)


def test_the_version_is_said(run):
    assert run("--version")[:2] == (0, f"latentmem {latentmem.__version__}\n")


def test_help_and_unknown_commands(run):
    code, out, _ = run("--help")
    assert code == 0 and all(f" {verb} " in out for verb in VERBS)
    assert run("frobnicate")[0] == 2


def test_help_is_printed_without_torch():
    code = "import sys; import latentmem.cli; assert not {'torch', 'fastapi', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
