"""Forgetting: residues whose answer is known, both ways on a tiny model with a real store, and as a command."""

import json
import sys

import pytest

from latentmem import cli
from latentmem.core.settings import MemorySettings
from latentmem.evaluate import asking
from latentmem.evaluate.data import questions
from latentmem.evaluate.data.sets import Question, QuestionSet, Text
from latentmem.evaluate.protocols import forget
from latentmem.evaluate.protocols.forget import Forget, Settings, lines, measure
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model


def made(count=5):
    texts = tuple(
        Text(
            f"t{i}",
            f"House {i} is red. Its owner is Ada{i}.",
            tuple(Question(f"q{i}{j}", f"Who owns {i}{j}?", (f"Ada{i}",)) for j in range(2)),
        )
        for i in range(count)
    )
    return QuestionSet("squad", "made up", texts, tuple(f"Unrelated text number {i}." for i in range(40)))


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def records(llm):
    return Forget(llm, made(), Settings(MemorySettings(300))).run(("forget", 1))


def asked(state, text, question, accuracy, about="target"):
    facts = {"kind": "asked", "state": state, "about": about, "sample": text, "text": text, "question": question}
    return {**facts, "hit": int(accuracy == 1), "accuracy": accuracy, "loglik": -2.0 + accuracy}


def test_the_residue_is_what_is_left_minus_what_was_never_written_question_by_question():
    known = {"before": (1.0, 0.8), "dropped": (0.6, 0.4), "replayed": (0.2, 0.0), "control": (0.2, 0.0)}
    some = [asked(s, text, f"q-{text}", v) for s, two in known.items() for text, v in zip("ab", two, strict=True)]
    found = {line.name: line.estimate for line in lines(some)}
    for metric in ("token accuracy", "log-likelihood per token"):
        assert found[f"known before forgetting (before - control): {metric}"].mean == pytest.approx(0.8)
        assert found[f"residue, dropped - control: {metric}"].mean == pytest.approx(0.4)
        assert found[f"residue, dropped - control: {metric}"].low == pytest.approx(0.4)  # both texts alike
        assert found[f"residue, replayed - control: {metric}"].mean == pytest.approx(0.0)
        assert found[f"share of what was known that is left, dropped: {metric}"].mean == pytest.approx(0.5)
        assert found[f"share of what was known that is left, replayed: {metric}"].mean == pytest.approx(0.0)


def test_what_the_others_lose_is_paired_with_before():
    some = [asked(s, t, f"o{t}", v, "other") for s, v in (("before", 0.9), ("dropped", 0.7)) for t in "ab"]
    found = {line.name: line.estimate for line in lines(some)}
    assert found["the others, before: token accuracy"].mean == pytest.approx(0.9)
    assert found["the others, dropped - before: token accuracy"].mean == pytest.approx(-0.2)
    assert not any("residue" in name for name in found)


def test_a_text_that_stays_in_several_samples_counts_once_for_the_interval():
    some = [
        {**asked(s, sample, f"o{t}", v, "other"), "text": t}
        for s, v in (("before", 0.9), ("dropped", 0.7))
        for sample in "abcd"
        for t in "xyz"
    ]
    found = {line.name: line.estimate for line in lines(some)}
    for name in ("the others, before: token accuracy", "the others, dropped - before: token accuracy"):
        assert (found[name].n, found[name].texts) == (12, 3)


def test_a_replayed_memory_is_the_one_that_never_held_the_text(records):
    memories = {r["state"]: r for r in records if r["kind"] == "memory"}
    assert (memories["replayed"]["same"], memories["dropped"]["same"]) == (1, 0)
    assert memories["replayed"]["gone"] == memories["dropped"]["gone"] == 1
    assert memories["replayed"]["M"] == 300 > memories["dropped"]["M"]
    by = {(r["state"], r["about"], r["question"]): r for r in records if r["kind"] == "asked"}
    for (state, about, question), r in by.items():
        if state == "replayed":
            assert r["loglik"] == pytest.approx(by["control", about, question]["loglik"], abs=1e-4)
    before, control = by["before", "target", "q10"], by["control", "target", "q10"]
    assert before["loglik"] != control["loglik"]


def test_all_states_are_asked_the_same_and_the_others_are_others(records):
    targets = {s: [r["question"] for r in records if forget._is(r, "target", s)] for s in forget.STATES}
    assert set(map(tuple, targets.values())) == {("q10", "q11")}
    others = {s: [r["question"] for r in records if forget._is(r, "other", s)] for s in forget.STATES}
    assert all(r["sample"] == "t1" and r["text"] == f"t{r['question'][1]}" for r in records if r["kind"] == "asked")
    assert others.pop("floor") == []
    assert set(map(tuple, others.values())) == {tuple(f"q{i}{j}" for i in (2, 3, 4, 0) for j in range(2))}


def test_what_is_asked_sees_the_text_before_and_never_after(llm, monkeypatch):
    seen = []

    def ask(llm, context, some, *, new_tokens):
        seen.append([q.id for q in some])
        return [asking.Answer(hit=False, accuracy=0.0, loglik=0.0, said="") for _ in some]

    monkeypatch.setattr(forget, "ask", ask)
    behind = []
    monkeypatch.setattr(llm, "context", behind.append, raising=False)
    Forget(llm, made(), Settings(MemorySettings(300))).run(("forget", 0))
    names = [[source.name for source in memory.sources] for memory in behind]
    assert names[0] == ["unrelated", "t1", "target", "t2", "t3", "t4"]
    assert names[1:] == [["unrelated", "t1", "t2", "t3", "t4"]] * 3
    assert len(seen) == 5


def test_a_run_goes_on_and_holds_no_text_of_the_set(llm, tmp_path):
    found = measure(llm, made(), Settings(MemorySettings(300)), tmp_path / "run")
    records = tmp_path / "run" / "records.jsonl"
    whole = records.read_text()
    assert "House" not in whole and "Ada" not in whole and "said" not in whole
    records.write_text("".join(whole.splitlines(keepends=True)[:2]))
    again = measure(llm, made(), Settings(MemorySettings(300)), tmp_path / "run")

    def timeless(lines):
        return [line for line in lines if not line.name.startswith("seconds")]

    assert timeless(again) == timeless(found)
    assert {line.name: line.estimate for line in found}["memories equal to the control to the bit, replayed"].mean == 1
    settings = json.loads((tmp_path / "run" / "summary.json").read_text())["settings"]
    assert settings["behind"] == 3


def test_too_few_texts_and_bad_numbers_are_said(llm):
    with pytest.raises(ValueError, match="a sample takes 5 texts, and there are 3"):
        Forget(llm, made(3), Settings())
    with pytest.raises(ValueError, match="got 0 and 2"):
        Settings(behind=0)


def test_the_command(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(questions, "UNRELATED", 10)
    args = ["latentmem", "eval", "forget", "--out", str(tmp_path / "run"), "--model", str(tiny_folder), "--device=cpu"]
    args += [
        "--data=synthetic",
        "--texts=3",
        "--per-text=5",
        "--behind=1",
        "-N",
        "700",
        "--dtype=float32",
        "--workers=1",
    ]
    monkeypatch.setattr(sys, "argv", [*args, "--new-tokens=2"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "| residue, dropped - control: token accuracy | 15 (3) |" in capsys.readouterr().out
