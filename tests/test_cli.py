"""The command line as a person uses it, on a tiny model in a folder."""

import io
import json
import re
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file

import latentmem
from latentmem import cli
from latentmem.files import NamedMemory


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


def tree(folder):
    """All files below a folder with their contents, locks left out."""
    return (
        {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"} if folder.exists() else {}
    )


def test_write_files_standard_input_and_a_text_in_quotes(run, tmp_path):
    (tmp_path / "notes.txt").write_text("the lease was signed by Ada")
    (tmp_path / "report.md").write_text("# report\nall is well")
    files = [tmp_path / "notes.txt", tmp_path / "report.md"]
    options = ["--memory", "work", "--capacity", 128, "--per-update", 16]
    code, out, _ = run("write", *files, "-", "a text in quotes", *options, stdin="from a pipe")
    assert code == 0 and "work: " in out
    memory = NamedMemory("work").load()
    assert [s.name for s in memory.sources] == ["notes.txt", "report.md", "standard input", "text"]
    texts = ("the lease was signed by Ada", "# report\nall is well", "from a pipe", "a text in quotes")
    assert memory.tokens == sum(map(len, texts))  # one token per byte
    assert (memory.N, memory.K) == (128, 16)


def test_ask_prints_what_the_library_answers(run, tiny_folder):
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    code, out, _ = run("ask", "which colour?", "--memory", "work", "--max-new-tokens", 8)
    llm = latentmem.load(str(tiny_folder), device="cpu")
    assert code == 0 and out.strip() == llm.ask(NamedMemory("work").load(), "which colour?", max_new_tokens=8)
    code, out, _ = run("ask", "which colour?", "--memory", "work", "--max-new-tokens", 8, "--compare")
    assert code == 0 and "with memory:" in out and "without memory:" in out


def test_a_memory_of_a_quantized_model_is_read_by_one(run, tiny_folder):
    options = ("-m", "small", "-N", 64, "-K", 16)
    assert run("write", "the door is blue", *options, "--quantize", "int8")[0] == 0
    llm = latentmem.load(str(tiny_folder), device="cpu", quantize="int8")
    memory = NamedMemory("small").load()
    assert memory.model == llm.identity and memory.model.startswith("int8-")
    code, out, _ = run("ask", "which colour?", "-m", "small", "--max-new-tokens", 8)
    assert code == 0 and out.strip() == llm.ask(memory, "which colour?", max_new_tokens=8)
    for more in ((), ("--quantize", "int8")):
        assert run("write", "it is open", "-m", "small", *more)[0] == 0
    assert NamedMemory("small").load().updates > memory.updates
    assert run("chat", "-m", "talked", "--quantize", "int8", stdin="hello\n")[0] == 0
    assert NamedMemory("talked").load().model == llm.identity
    run("write", "the door is blue", "-m", "exact", "-N", 64, "-K", 16)
    code, _, err = run("write", "it is open", "-m", "exact", "--quantize", "int8")
    assert code == 2 and "a model with exact weights, not --quantize int8" in err


@pytest.mark.parametrize("command", [("write",), ("ask",), ("chat",), ("eval", "retention")])
def test_help_says_what_is_taken_by_default(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(*command, "--help", "--model", "none")
    assert code == 0 and "--model" in out
    assert not re.search(r" [.]\s", out)  # a word in brackets would be taken for markup
    assert command != ("write",) or "(exact)" in out


def test_undo_goes_one_command_back_and_then_says_so(run, home):
    run("write", "first text here", "-m", "work", "-N", 64, "-K", 16)
    first = NamedMemory("work").load()
    run("write", "second text here", "third text here", "-m", "work")
    assert NamedMemory("work").load().parent != ""
    assert run("undo", "-m", "work")[0] == 0
    assert NamedMemory("work").load().version == first.version
    code, _, err = run("undo", "-m", "work")
    assert code == 2 and "nothing to undo in the memory 'work'" in err
    assert NamedMemory("work").load().version == first.version


def test_undo_of_the_first_write_leaves_an_empty_memory(run):
    run("write", "first text here", "-m", "work", "-N", 64, "-K", 16)
    assert run("undo", "-m", "work")[0] == 0
    assert NamedMemory("work").load().M == 0


def test_list_show_and_rm(run, home):
    assert "No memories yet" in run("list")[1]
    run("write", "some [bold]text[/bold] of forty-odd characters", "-m", "work", "-N", 32, "-K", 8)
    _, out, _ = run("list")
    assert "work" in out and "32 of 32" in out and "KiB" in out
    code, out, _ = run("show", "-m", "work")
    assert code == 0 and "32 of 32 slots in each of 3 layers (100%)" in out and "half-life" in out
    assert re.search(r"text +46 +46 +70% \(32\) +▆▆▆ *\n", out)
    facts = json.loads(run("show", "-m", "work", "--json")[1])
    assert facts["M"] == facts["N"] == 32 and facts["sources"][0]["left"] == [32, 32, 32]
    assert facts["half_life"] == pytest.approx(2.409, abs=1e-3)
    code, out, _ = run("rm", "--memory", "work")
    assert code == 0 and tree(home) == {}
    assert run("rm", "--memory", "work")[0] == 2


def test_show_text_prints_what_layer_0_holds(run):
    run("write", "the door is blue", "and <|im_end|> stays text", "-m", "work", "-N", 64, "-K", 16)
    code, out, _ = run("show", "-m", "work", "--text")
    assert code == 0 and "the door is blueand <|im_end|> stays text" in out


def test_a_chat_is_remembered_between_runs(run):
    run("write", "the door is blue", "-m", "work", "-N", 256, "-K", 16)
    code, _, err = run("chat", "-m", "work", "--max-new-tokens", 4, stdin="hello there\n\n/exit\n")
    assert code == 0 and "wrote 2 turns" in err
    memory = NamedMemory("work").load()
    assert [s.name for s in memory.sources] == ["text", "chat"]
    assert "hello there" in run("show", "-m", "work", "--text")[1]
    assert run("undo", "-m", "work")[0] == 0 and [s.name for s in NamedMemory("work").load().sources] == ["text"]


def test_a_chat_that_is_killed_loses_no_turn_and_repeats_none(run):
    run("write", "the door is blue", "-m", "work", "-N", 256, "-K", 16)
    NamedMemory("work").keep_turns(
        [{"role": "user", "content": "my cat is Pip"}, {"role": "assistant", "content": "noted"}]
    )
    assert run("write", "the gate is red", "-m", "work")[0] == 0  # another command in between
    code, _, err = run("chat", "-m", "work", stdin="")
    assert code == 0 and "going on with 2 turns" in err and "wrote 2 turns" in err
    text = run("show", "-m", "work", "--text")[1]
    assert text.count("my cat is Pip") == text.count("the gate is red") == 1
    assert "nothing to write" in run("chat", "-m", "work", stdin="")[2]


def test_two_files_of_one_name_stay_two_sources(run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "n.txt").write_text(f"file in {name}")
    paths = [tmp_path / "a" / "n.txt", tmp_path / "b" / "n.txt"]
    assert run("write", *paths, "-m", "work", "-N", 64, "-K", 16)[0] == 0
    assert [s.name for s in NamedMemory("work").load().sources] == [str(p) for p in paths]


def test_a_model_in_a_folder_is_found_again_from_anywhere(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    assert run("write", "some text", "-m", "work", "-N", 64, "-K", 16, "--model", f"./{tiny_folder.name}")[0] == 0
    monkeypatch.chdir(tmp_path)
    assert run("ask", "why?", "-m", "work", "--max-new-tokens", 2)[0] == 0


def test_what_a_killed_save_left_behind_goes_with_the_memory(run, home):
    run("write", "some text", "-m", "work", "-N", 64, "-K", 16)
    (home / "memories" / ".work.safetensors.abc123").write_bytes(b"half of it")
    assert run("rm", "-m", "work")[0] == 0 and tree(home) == {}
    NamedMemory("work").keep_turns([{"role": "user", "content": "secret"}])  # a chat that never became a memory
    (home / "memories" / "work.chat.json").write_text("{")  # and is damaged
    assert run("rm", "-m", "work")[0] == 0 and tree(home) == {}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["write", "missing.txt"], "there is no file 'missing.txt'"),
        (["write", "{tmp}/binary.bin"], "is not UTF-8 text"),
        (["write", "{tmp}/empty.txt"], "is empty"),
        (["write", "{tmp}"], "is a folder"),
        (["write", " "], "is empty"),
        (["write", "my missing notes.txt"], "there is no file"),
        (["write", "../missing file"], "there is no file"),
        (["write", "a lone \udce9 surrogate"], "not valid Unicode"),
        (["ask", "a lone \udce9 surrogate", "-m", "work"], "not valid Unicode"),
        (["ask", "why?", "-m", "work", "--device", "foo"], "device 'foo' can not be used"),
        (["write", "some text", "-m", "new", "--seed", "99999999999999999999"], "fit into 64 bits"),
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
    before = tree(home)
    code, out, err = run(*(a.format(tmp=tmp_path, other=other) for a in arguments), stdin="")
    assert code == 2 and sentence in " ".join((out + err).replace("│", " ").split()) and "Traceback" not in err
    assert tree(home) == before


@pytest.mark.parametrize("damage", ["truncated", "tampered", "header", "not a memory"])
def test_a_damaged_memory_is_refused_and_left_alone(run, home, damage):
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    path = NamedMemory("work").path
    data = path.read_bytes()
    damaged = {
        "truncated": data[: len(data) // 2],
        "tampered": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "header": data.replace(b'\\"updates\\": 1', b'\\"updates\\": 2'),
        "not a memory": b"hello",
    }[damage]
    assert damaged != data
    path.write_bytes(damaged)
    before = tree(home)
    for command in (["ask", "why?"], ["write", "more text"], ["show"], ["chat"]):
        code, _, err = run(*command, "-m", "work", stdin="")
        assert code == 2 and str(path) in err and "Traceback" not in err
    assert tree(home) == before
    if damage in ("truncated", "not a memory"):  # `list` reads headers only
        assert "damaged" in run("list")[1]


def test_a_full_disk_keeps_the_old_memory(run, home, monkeypatch):
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    before = NamedMemory("work").path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentmem.core.snapshot.save_file", full)
    code, _, err = run("write", "more text here", "-m", "work")
    assert code == 1 and "No space left on device" in err
    assert NamedMemory("work").path.read_bytes() == before
    assert not list(home.rglob(".work.safetensors.*"))


def test_two_writers_do_not_meet(run, monkeypatch):
    run("write", "the door is blue", "-m", "work", "-N", 64, "-K", 16)
    place = NamedMemory("work")
    with (
        place.writing(),
        pytest.raises(ValueError, match="another process is writing"),
        NamedMemory("work").writing(0.05),
    ):
        pass


def test_help_and_unknown_commands(run):
    code, out, _ = run("--help")
    assert code == 0 and all(verb in out for verb in ("write", "ask", "chat", "list", "show", "undo", "rm", "doctor"))
    assert run("frobnicate")[0] == 2
