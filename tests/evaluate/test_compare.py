"""Runs side by side: numbers that are known, questions that both answered, and what can not be compared."""

import json

import pytest

from latentmem import cli
from latentmem.evaluate.tables import compare
from latentmem.evaluate.tables.summary import NAMES


def run_of(path, accuracy, *, sha="same", shared=True, steps=(0, 10), N=64, longterm=0, stream=False):
    """A folder as a run leaves it: four texts with one question each; `accuracy` is (step, text) -> number."""
    path.mkdir()
    settings = {"memory": {"longterm": {"R": longterm} if longterm else None}}
    config = {"protocol": "retention/1", "data": {"sha256": sha}, "settings": settings}
    (path / "config.json").write_text(json.dumps({"config": config, "runs": []}))
    units = []
    for i in range(4):
        base = {"text": f"t{i}", "question": f"q{i}", "hit": 0, "loglik": -1.0, "said": ""}
        ours = [
            {**base, "row": "ours", "N": N, "fill": "full", "step": t, "accuracy": accuracy(t, i), "left": 0.5, "M": N}
            for t in steps
        ]
        ours = [{**r, "stream": True} for r in ours] if stream else ours
        ours = [{**r, "found": 0.5} if longterm and r["step"] else r for r in ours]
        units.append((["ours", N, "full", i], ours))
        if shared:
            window = [{**r, "row": "window", "accuracy": 0.25} for r in ours]
            units.append((["window", N, "full", i], window))
            units.append((["oracle", 0, "", i], [{**base, "row": "oracle", "N": 0, "fill": "", "accuracy": 0.8}]))
    text = "".join(json.dumps({"unit": unit, "records": records}) + "\n" for unit, records in units)
    (path / "records.jsonl").write_text(text)
    return path


@pytest.fixture
def pair(tmp_path):
    before = run_of(tmp_path / "before", lambda t, i: 0.4 if t == 0 else 0.2)
    after = run_of(tmp_path / "after", lambda t, i: 0.8 if t == 0 else 0.4 + 0.1 * i, shared=False)
    return {"before": before, "after": after}


def test_rows_gains_and_what_is_kept_are_those_of_the_records(pair):
    found = {(x.metric, x.kind, x.name): x.cells for x in compare.compare(pair, 64)}
    assert found["accuracy", "row", "after"][10].mean == pytest.approx(0.55)
    assert found["accuracy", "row", NAMES["oracle"]][-1].mean == pytest.approx(0.8)
    assert found["accuracy", "kept", "after / its step 0"][10].mean == pytest.approx(0.55 / 0.8)
    gain = found["accuracy", "gain", "after - before"]
    assert gain[0].mean == pytest.approx(0.4) and gain[10].mean == pytest.approx(0.35)
    assert gain[10].n == 4 and gain[10].low > 0
    assert found["accuracy", "gain", f"after - {NAMES['window']}"][10].mean == pytest.approx(0.3)
    assert ("accuracy", "gain", "before - before") not in found
    assert found["left", "left", "after"][0].mean == 0.5


def test_a_memory_with_a_long_term_part_stands_beside_one_that_shows_as_many_slots(pair, tmp_path):
    plain = run_of(tmp_path / "plain", lambda t, i: 0.4, stream=True)
    longterm = run_of(tmp_path / "longterm", lambda t, i: 0.7, N=48, longterm=16, stream=True)
    lines = compare.compare({"a": plain, "b": longterm}, 64, stream=True)
    found = {x.name: x.cells for x in lines if x.metric in ("accuracy", "left") and x.kind != "row"}
    assert found["b - a"][10].mean == found["b - a"][0].mean == pytest.approx(0.3)
    retrieved = found["b: of its long-term slots retrieved"]
    assert set(retrieved) == {10} and retrieved[10].mean == 0.5
    with pytest.raises(ValueError, match="no memory of N = 64 slots"):
        compare.compare({"a": pair["before"], "b": longterm}, 64, stream=True)
    searched = run_of(tmp_path / "searched", lambda t, i: 0.5, stream=True)  # nothing is stored
    lines = compare.compare({"a": plain, "b": searched}, 64, stream=True)
    (gain,) = (x.cells for x in lines if x.metric == "accuracy" and x.name == "b - a")
    assert gain[10].mean == pytest.approx(0.1)


def test_only_questions_that_every_run_answered_count(pair):
    lines = (pair["after"] / "records.jsonl").read_text().splitlines()
    (pair["after"] / "records.jsonl").write_text("\n".join(lines[:3]) + "\n")
    found = {(x.metric, x.kind, x.name): x.cells for x in compare.compare(pair, 64)}
    assert {cell.n for cells in found.values() for cell in cells.values()} == {3}


def test_runs_about_other_questions_or_without_such_a_memory_are_refused(pair, tmp_path):
    other = run_of(tmp_path / "other", lambda t, i: 0.1, sha="another")
    with pytest.raises(ValueError, match="other asks other questions than before"):
        compare.compare({**pair, "other": other}, 64)
    with pytest.raises(ValueError, match="no memory of N = 128 slots"):
        compare.compare(pair, 128)
    with pytest.raises(ValueError, match="at least two runs"):
        compare.compare({"one": pair["before"]}, 64)
    with pytest.raises(ValueError, match="holds no run of `latentmem eval retention`"):
        compare.compare({**pair, "nothing": tmp_path}, 64)


def test_the_command_writes_table_numbers_and_picture(pair, tmp_path, monkeypatch, capsys):
    folders = [f"{name}={path}" for name, path in pair.items()]
    monkeypatch.setattr("sys.argv", ["latentmem", "eval", "compare", *folders, "-N", "64", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.app()
    assert end.value.code == 0
    assert "| after | 4 (4) | 0.80 [0.80, 0.80] | 0.55" in capsys.readouterr().out
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "## Token accuracy, paired differences" in table and "eval compare before=" in table
    assert json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
