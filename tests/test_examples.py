"""Every example runs, is short, and is the notebook beside it."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
MCP = "from latentmem import cli; cli.main()"


@pytest.fixture
def run(home, tmp_path, monkeypatch, capfd):
    """Run an example in a folder of its own and give the lines that it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def example(name):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capfd.readouterr().out.splitlines()

    return example


@pytest.fixture
def loaded(trained, monkeypatch):
    """The packaged model, which is loaded once for all examples."""
    monkeypatch.setattr("latentmem.loading.load.load", lambda name: trained)


def test_a_fact_is_written_asked_and_kept(run, loaded, tmp_path):
    *_, with_memory, without, from_file = run("quickstart")
    assert "Ada Brix" in with_memory and "Ada Brix" in from_file and "Ada Brix" not in without
    assert (tmp_path / "work.safetensors").is_file()


def test_each_user_has_the_own_answer(run, loaded):
    lines = run("many_users")
    for line, dog in zip(lines, ("Pepper", "Captain", "Biscuit", "Noodle", "Pepper"), strict=True):
        assert dog in line


def test_a_folder_is_read_and_answers_name_their_source(run, loaded):
    lines = run("folder_of_notes")
    assert len(lines) == 6 and "color" not in lines[2] and "red house" in lines[1]
    for line, name in zip(lines[3:], ("house/lease.md", "house/pump.html", "harbour.txt"), strict=True):
        shares = {source: int(share) for source, share in re.findall(r"'([\w./]+)': '(\d+)%'", line)}
        assert max(shares, key=shares.get) == name


def test_what_was_undone_comes_back_and_what_was_forgotten_does_not(run, loaded):
    lines = run("undo_fork_forget")
    assert lines[0].endswith("['bell.txt', 'secret.txt', 'pier.txt']") and lines[1].endswith("'secret.txt']")
    assert lines[2].endswith(" ['bell.txt']") and "4711" in lines[3]
    assert lines[4].endswith("['bell.txt'] ['bell.txt', 'pier.txt']")
    assert not any("secret" in line for line in lines[5:])


def test_an_assistant_remembers_in_a_new_conversation(run, trained, tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="the package openai is not installed")
    from serving import running

    with running(trained, tmp_path / "store", scripted=False) as server:
        monkeypatch.setenv("LATENTMEM_URL", server.url)
        lines = run("assistant")
    assert "'id': 'ada', 'version': 0, 'written': 1" in lines[1]
    assert "blue pot" in lines[3] and "blue pot" not in lines[4]


def test_an_agent_has_tools_of_memory(run, tiny_folder, monkeypatch):
    pytest.importorskip("mcp", reason="the extra mcp is not installed")
    import mcp

    own = {"command": sys.executable, "args": ["-c", MCP, "mcp", str(tiny_folder), "--device", "cpu"]}
    parameters = mcp.StdioServerParameters
    monkeypatch.setattr(mcp, "StdioServerParameters", lambda **options: parameters(**{**options, **own}))
    lines = run("agent")
    assert lines[0].startswith("tools: memory_write, memory_ask") and "'forgotten': 'ferry'" in lines[4]
    assert "'source': 'bell'" in lines[5] and "ferry" not in lines[5]


def test_a_model_of_ones_own_reads_a_memory_as_its_context(run):
    *_, behind_memory, empty = run("own_model")
    assert float(behind_memory.split()[-1]) < 1e-4 < float(empty.split()[-1])


def test_training_needs_no_data_set(run, tiny_folder, monkeypatch):
    monkeypatch.setenv("LATENTMEM_MODEL", str(tiny_folder))
    monkeypatch.setenv("STEPS", "5")
    lines = run("train")
    assert lines[0].startswith("step 5 of 5: loss ")
    assert [line.split(":")[0] for line in lines[-2:]] == ["untrained", "trained"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_is_its_notebook(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("\n") <= 40
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    lines = [line for line in code.splitlines() if line.strip()]
    kept = [line for line in text.split('"""\n', 1)[1].splitlines() if line.strip() and not line.startswith("# %%")]
    assert lines == kept


def test_the_notebooks_are_made_by_the_tool():
    spec = importlib.util.spec_from_file_location("notebooks", EXAMPLES.parent / "tools" / "notebooks.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for path in EXAMPLES.glob("*.py"):
        assert tool.notebook(path.read_text(encoding="utf-8")) == path.with_suffix(".ipynb").read_text(encoding="utf-8")
