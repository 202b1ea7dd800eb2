"""Effects: perplexity and abstention with answers that are known, on a tiny model, and as a command."""

import json
import math

import pytest

from latentmem import data
from latentmem.core.settings import MemorySettings
from latentmem.evaluate.data import questions
from latentmem.evaluate.data.sets import Question, QuestionSet, Text
from latentmem.evaluate.protocols import effects
from latentmem.evaluate.protocols.effects import Settings, lines, measure
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model

ARTICLES = [f"Article {i} tells of harbour number {i} and of its {i} ships." for i in range(3)]


def made():
    texts = tuple(
        Text(f"t{i}", f"House {i} is red. Its owner is Ada{i}.", (Question(f"q{i}", f"Who owns {i}?", (f"Ada{i}",)),))
        for i in range(3)
    )
    return QuestionSet("squad", "made up", texts, tuple(f"Unrelated text number {i}." for i in range(20)))


@pytest.fixture
def llm(monkeypatch):
    wrong = {text.text: (Question(f"w{text.id}", "Who sold it?", ("no answer",)),) for text in made().texts}
    monkeypatch.setattr(effects, "heldout", lambda count, seed: ARTICLES[:count])
    monkeypatch.setattr(effects, "unanswerable", lambda texts: wrong)
    return MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")


def record(kind, text, nll, tokens):
    return {"kind": kind, "text": text, "nll": nll, "tokens": tokens}


def test_perplexity_is_exp_of_all_nats_over_all_tokens_and_its_ratio_is_paired():
    plain = [record("plain", "a", 10.0, 10), record("plain", "b", 40.0, 20)]
    full = [record("full", "a", 11.0, 10), record("full", "b", 42.0, 20)]
    found = {line.name: line.estimate for line in lines([*plain, *full])}
    assert found["perplexity, plain"].mean == pytest.approx(math.exp(50 / 30))
    assert found["perplexity, full / plain"].mean == pytest.approx(math.exp(3 / 30))
    low, high = found["perplexity, full / plain"].low, found["perplexity, full / plain"].high
    assert (low, high) == (pytest.approx(math.exp(0.1)), pytest.approx(math.exp(0.1)))  # both texts: 0.1 per token
    assert "perplexity, empty / plain" not in found


def test_abstention_is_counted_for_each_kind_of_question():
    def asked(kind, abstains, text):
        return {
            "kind": kind,
            "way": "memory",
            "text": text,
            "question": text,
            "abstains": abstains,
            "hit": 1 - abstains,
        }

    records = [asked("answered", 0, "a"), asked("answered", 1, "b")]
    records += [asked("never written", 1, "a"), asked("never written", 1, "b")]
    found = {line.name: line.estimate.mean for line in lines(records)}
    assert found == {
        "abstains, answered, memory": 0.5,
        "hits, answered, memory": 0.5,
        "abstains, never written, memory": 1.0,
    }


def test_behind_an_empty_memory_text_is_as_likely_as_in_the_plain_model(llm, tmp_path):
    found = {
        line.name: line.estimate
        for line in measure(llm, made(), Settings(MemorySettings(32), texts=3), tmp_path / "run")
    }
    ratio = found["perplexity, empty / plain"]
    assert (ratio.mean, ratio.low, ratio.high) == (1.0, 1.0, 1.0)
    assert found["perplexity, full / plain"].mean != 1.0
    assert {name for name in found if name.startswith("abstains")} == {
        f"abstains, {kind}, {way}" for kind in effects.KINDS for way in ("memory", "floor")
    }
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert dict(summary["lines"])["perplexity, plain"]["n"] == 3
    assert "| perplexity, plain | 3 (3) |" in (tmp_path / "run" / "table.md").read_text()


def test_who_says_that_it_does_not_know_abstains_whatever_the_apostrophe(llm, monkeypatch, tmp_path):
    said = iter(["I don\u2019t know.", "Ada", "i DON'T know that", "No"] * 100)

    def ask(llm, context, some):
        from latentmem.evaluate.asking import Answer

        return [Answer(hit=False, accuracy=0.0, loglik=0.0, said=next(said)) for _ in some]

    monkeypatch.setattr(effects, "ask", ask)
    worker = effects.Effects(llm, made(), Settings(MemorySettings(32), texts=3))
    records = worker.run(("abstention", 0))
    assert [r["abstains"] for r in records] == [1, 0, 1, 0, 1, 0]
    assert [(r["kind"], r["way"]) for r in records] == [(k, w) for w in ("memory", "floor") for k in effects.KINDS]


def test_the_memory_is_full_of_unrelated_texts_and_never_of_those_that_are_asked(llm):
    worker = effects.Effects(llm, made(), Settings(MemorySettings(64), texts=2))
    memory = worker._full
    assert memory.M == 64 and [source.name for source in memory.sources] == ["unrelated"]


def test_another_question_needs_another_folder(llm, tmp_path):
    measure(llm, made(), Settings(MemorySettings(32), texts=2), tmp_path / "run")
    with pytest.raises(ValueError, match=r"settings\.memory\.N is 32 there and 64 here"):
        measure(llm, made(), Settings(MemorySettings(64), texts=2), tmp_path / "run")


def test_held_out_articles_are_drawn_by_seed_and_too_few_are_said(monkeypatch):
    rows = [{"text": f"text {i}"} for i in range(5)]
    monkeypatch.setattr(data, "local_rows", lambda *names: [rows[:2], rows[2:]])
    assert questions.heldout(3, 0) == questions.heldout(3, 0) != questions.heldout(3, 1)
    with pytest.raises(ValueError, match="5 held-out articles, and 6 were asked for"):
        questions.heldout(6, 0)


def test_unanswerable_questions_are_kept_by_their_text(monkeypatch):
    rows = [{"id": str(i), "context": f"text {i % 2}", "question": f"q{i}"} for i in range(4)]
    monkeypatch.setattr(data, "local_rows", lambda *names: [rows])
    found = questions.unanswerable({"text 0"})
    assert {text: [q.question for q in some] for text, some in found.items()} == {"text 0": ["q0", "q2"]}
