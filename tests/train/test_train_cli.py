"""`latentmem train` as a person types it: a rehearsal, a run that is stopped and goes on, its picture, and mistakes."""

import json
import re
import sys

import pytest
from typer.testing import CliRunner

from latentmem import cli, load
from latentmem.train.log import draw, lines

CONFIG = """
model: {model}
dtype: float32
memory: {{N: 64, K: 64, compression: 2}}
lora: {{r: 2, alpha: 4}}
objectives: {{questions: 1, repetition: 1}}
data:
  - {{path: {data}/asked.jsonl, kind: questions}}
  - {{path: {data}/texts.jsonl}}
texts: {{at_once: 2, shortest: 8, longest: 128, rows: 4, continuation: 16}}
steps: {{total: 4, warmup: 1}}
watch: {{checkpoint: 2, probe: 2, titles: [Kept], texts: 2, ages: [0, 1], tensorboard: false}}
"""


@pytest.fixture
def config(tiny_folder, tmp_path):
    asked = [
        {"context": f"House {i} belongs to Ada{i}.", "title": "Kept" if i < 3 else "T", "question": f"Whose is {i}?",
         "answers": {"text": [f"Ada{i}"]}}
        for i in range(12)
    ]  # fmt: skip
    texts = [{"text": f"The mill {i} of Veld was built by Tessel {i} in Lower Veld for Quill {i}."} for i in range(12)]
    for name, rows in (("asked", asked), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG.format(model=tiny_folder, data=tmp_path))
    return file


def train(*args):
    return CliRunner().invoke(cli.app, ["train", *map(str, args)])


def test_a_rehearsal_counts_and_writes_nothing(config, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = train(config, "--out", tmp_path / "run", "--dry-run", "--set", "steps.total=1000")
    assert result.exit_code == 0, result.output
    assert sorted(tmp_path.rglob("*")) == before
    for found in ("9 documents, 9 questions", "12 documents", "1,000, about", "minutes here", "GiB"):
        assert found in result.output, found


def test_a_rehearsal_fetches_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr("latentmem.data.reading", lambda *_: pytest.fail("a set was fetched"))
    monkeypatch.delenv("LATENTMEM_DATA", raising=False)
    sets = (
        "data.0.path=nobody/asked",
        "data.1.path=gone.jsonl",
        "data.1.hub=nobody/texts",
        "apart=[{path: a/b}]",
        "watch.probe=0",
    )
    result = train(config, "--out", tmp_path / "run", "--dry-run", *(x for one in sets for x in ("--set", one)))
    assert result.exit_code == 0, result.output
    assert re.search(r"nobody/asked +on the hub, not counted", result.output) and "nobody/texts" in result.output
    missing = train(config, "--out", tmp_path / "run", "--dry-run", "--set", "data.0.path=gone.jsonl")
    assert missing.exit_code and "no such file" in str(missing.exception)


def test_a_run_that_is_stopped_goes_on_with_the_same_command(config, tmp_path):
    out = tmp_path / "run"
    first = train(config, "--out", out, "--stop", 2)
    assert first.exit_code == 0 and "2 steps are done" in first.output
    assert not (out / "adapters.safetensors").exists()
    said = json.loads((out / "config.json").read_text())
    del said["config"]["memory"]["quota"], said["config"]["retriever"]  # as if both were newer than the run
    (out / "config.json").write_text(json.dumps(said))
    second = train(config, "--out", out)
    assert second.exit_code == 0, second.output
    log = lines(out / "log.jsonl")
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in log if "curve" in row] == [0, 2, 4]
    assert [(p["age"], p["n"]) for p in log[0]["curve"]] == [(0, 2), (1, 2)]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    draw({"one": out, "the same": out}, tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nowhere holds no log"):
        draw({"none": tmp_path / "nowhere"}, tmp_path / "none.png")
    llm = load(json.loads((out / "config.json").read_text())["config"]["model"], adapters=out / "adapters.safetensors")
    memory = llm.write(llm.empty(form="exact"), "House 4 belongs to Ada4.")
    assert (memory.N, memory.K, memory.compression) == (64, 64, 2) and memory.adapters == llm.adapters.identity
    assert isinstance(llm.ask(memory, "Whose is 4?", max_new_tokens=3), str)


def test_adapters_in_the_models_folder_are_found(config, tmp_path, tiny_folder):
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    assert load(str(folder)).adapters is None
    assert train(config, "--out", tmp_path / "run", "--set", f"model={folder}").exit_code == 0
    shutil.copy(tmp_path / "run" / "adapters.safetensors", folder)
    assert load(str(folder)).adapters is not None and load(str(folder), adapters=None).adapters is None


@pytest.mark.parametrize(
    ("missing", "error", "said"),
    [
        ("accelerate", ValueError, r"training needs accelerate: run `pip install 'latentmem\[train\]'`"),
        ("latentmem.train.data", ModuleNotFoundError, "latentmem.train.data"),
    ],
)
def test_only_what_others_make_is_to_be_installed(missing, error, said, config, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "latentmem.train.loop", raising=False)
    monkeypatch.delattr("latentmem.train.loop", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(error, match=said):
        raise train(config, "--out", tmp_path / "run").exception


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--set", "steps.totel=3"], "steps has no key totel"),
        (["--set", "steps.lr=fast"], "steps.lr: a number was expected, got 'fast'"),
        (["--set", "objectives.singing=1"], "'singing' is none of"),
        (["--set", "watch.titles=[Nobody]"], "watch.titles: no source has questions under these titles"),
        (["--dry-run", "--set", "watch.titles=[Nobody]"], "watch.titles: no source has questions under these titles"),
    ],
)
def test_mistakes_are_one_sentence(args, said, config, tmp_path):
    given = args if args[0].endswith(".yaml") else [config, *args]
    result = train(*given, "--out", tmp_path / "run")
    assert isinstance(result.exception, ValueError) and said in str(result.exception)
