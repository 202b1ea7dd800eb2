"""`latentmem eval all`: every protocol in a folder of its own, and what happens where one of them can not run."""

import pytest
from typer.testing import CliRunner

from latentmem import cli
from latentmem.cli import evaluation


@pytest.fixture
def runs(monkeypatch):
    """Protocols that write a table of what they were given; that of ability has no data."""
    given = {}

    def made(name):
        def run(out, **ways):
            given[out.name] = ways
            if name == "ability":
                raise ValueError("there are no pairs.")
            out.mkdir(parents=True)
            (out / "table.md").write_text(f"# {name} into {out.name}\n")

        return run

    for name in ("retention", "effects", "editing", "integrity", "forget", "ability", "conversations", "longbench"):
        monkeypatch.setattr(evaluation, name, made(name))
    return given


def everything(*args):
    return CliRunner().invoke(cli.app, ["eval", "all", *map(str, args)])


def test_all_tables_come_together_and_one_that_fails_is_named(runs, tmp_path):
    result = everything("--out", tmp_path, "--model", "some", "--workers", 1)
    assert isinstance(result.exception, ValueError) and "not everything was measured: ability" in str(result.exception)
    assert "ability: there are no pairs." in result.output
    text = (tmp_path / "results.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("# ")]
    assert titles == [
        "# retention into retention",
        "# effects into effects",
        "# editing into zsre",
        "# editing into counterfact",
        "# integrity into integrity",
        "# forget into forget",
        "# conversations into conversations",
        "# longbench into longbench",
    ]
    assert runs["zsre"]["data"] == "zsre" and runs["counterfact"]["data"] == "counterfact"
    assert all(ways["model"] == "some" and ways["workers"] == 1 for ways in runs.values())


def test_some_of_them(runs, tmp_path):
    assert everything("--out", tmp_path, "--only", "forget,zsre").exit_code == 0
    assert sorted(runs) == ["forget", "zsre"]


def test_one_that_is_not_there_is_refused_before_anything_runs(runs, tmp_path):
    result = everything("--out", tmp_path, "--only", "forget,zsrr")
    assert "got zsrr" in str(result.exception) and not runs
