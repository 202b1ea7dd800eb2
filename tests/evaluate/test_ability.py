"""Ability: sets and choices whose answer is known, states of the memory, the table, and the command."""

import math
import sys

import pytest

from latentmem import cli, data
from latentmem.core.settings import MemorySettings
from latentmem.evaluate import protocol
from latentmem.evaluate.data import choices, questions
from latentmem.evaluate.data.choices import Choices, Item, is_right, logliks
from latentmem.evaluate.data.sets import QuestionSet
from latentmem.evaluate.protocols import ability
from latentmem.evaluate.protocols.ability import Ability, Settings, lines, measure
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model

ARTICLES = [f"Article {i} tells of harbour number {i} and of its {i} ships." for i in range(3)]
UNRELATED = [f"Unrelated text number {i}." for i in range(30)]
BLIMP = [{"UID": f"kind{i % 2}", "sentence_good": f"He goes {i}.", "sentence_bad": f"He go {i}."} for i in range(6)]
PIQA = [{"goal": f"open {i}", "sol1": "pull it", "sol2": "push", "label": i % 2} for i in range(4)]
MMLU = [
    {"subject": f"some_art{i % 2}", "question": f"What is {i}?", "choices": list("wxyz"), "answer": i} for i in range(4)
]


@pytest.fixture
def llm(monkeypatch):
    monkeypatch.setattr(ability, "heldout", lambda count, seed: ARTICLES[:count])
    return MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")


@pytest.fixture
def rows(monkeypatch):
    """The three sets as made-up files."""
    files = dict(zip(choices.FILES.values(), (BLIMP, PIQA, MMLU), strict=True))
    monkeypatch.setattr(data, "local_rows", lambda *names: [files[name] for name in names])


# --- the sets -------------------------------------------------------------------------------------------------------


def test_rows_become_items():
    assert choices.blimp(BLIMP)[1] == Item("kind1-1", "", ("He goes 1.", "He go 1."), 0)
    assert choices.piqa(PIQA)[1] == Item("piqa-1", "Question: open 1\nAnswer:", (" pull it", " push"), 1)
    item = choices.mmlu(MMLU)[3]
    assert (item.id, item.options, item.right) == ("some_art1-3", (" A", " B", " C", " D"), 3)
    head = "The following are multiple choice questions (with answers) about some art1."
    assert item.prompt == f"{head}\n\nWhat is 3?\nA. w\nB. x\nC. y\nD. z\nAnswer:"


def test_items_are_drawn_by_seed_and_equally_of_each_part(rows):
    drawn = choices.load("blimp", 4, 0)
    assert sorted(item.id[:5] for item in drawn.items) == ["kind0", "kind0", "kind1", "kind1"]
    assert drawn == choices.load("blimp", 4, 0) and drawn.identity == choices.load("blimp", 4, 0).identity
    assert any(choices.load("blimp", 4, seed).items != drawn.items for seed in range(1, 5))
    with pytest.raises(ValueError, match="piqa has 4 items, and 5 were asked for"):
        choices.load("piqa", 5, 0)
    with pytest.raises(ValueError, match="must be one of blimp, piqa, mmlu, got 'arc'"):
        choices.load("arc", 1, 0)


def test_without_a_folder_the_sets_come_from_the_hub(monkeypatch):
    asked = []

    class Hub:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            rows = {"nyu-mll/blimp": BLIMP, "baber/piqa": PIQA, "cais/mmlu": MMLU}[self.name]
            return lambda *part, split: asked.append((self.name, *part, split)) or rows

        def __exit__(self, *error):
            return False

    datasets = pytest.importorskip("datasets", reason="the hub is read with `datasets`")
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["one", "two"])
    monkeypatch.setattr(data, "local_rows", lambda *names: None)
    monkeypatch.setattr(data, "reading", Hub)
    assert [len(choices.load(name, 4, 0).items) for name in choices.NAMES] == [4, 4, 4]
    assert asked == [
        *(("nyu-mll/blimp", part, "train") for part in ("one", "two")),
        ("baber/piqa", "validation"),
        ("cais/mmlu", "all", "test"),
    ]


def test_the_likelier_option_wins_and_per_character_it_may_be_the_other():
    item = Item("i", "", (" long answer", " short"), 0)
    assert is_right(item, [-11.0, -10.0]) == 0  # summed, the short one is likelier
    assert is_right(item, [-11.0, -10.0], normed=True) == 1  # 1 and 2 nats per character
    assert is_right(item, [-9.0, -10.0]) == 1
    assert is_right(item, [-10.0, -10.0]) == 0  # undecided is wrong


def test_the_likelihood_of_an_option_is_the_models_own(llm):
    items = [Item("pair", "", ("He goes.", "He go."), 0), Item("goal", "To open:", (" pull", " push it"), 1)]
    memory = llm.write(llm.empty(64), "The harbour holds ten ships.", "text")
    for state in (None, memory):
        for item, found in zip(items, logliks(llm, state, items), strict=True):
            for option, value in zip(item.options, found, strict=True):
                ids = [llm.first_token, *llm.prompts.text(item.prompt + option)]
                logits = llm.logits(state or llm.blank(), ids).detach().float().log_softmax(-1)
                start = len(ids) - len(llm.prompts.text(option))
                expected = sum(logits[j - 1, ids[j]].item() for j in range(start, len(ids)))
                assert value == pytest.approx(expected, abs=1e-3)


def test_letters_are_read_off_one_pass_as_if_each_were_scored(llm):
    letters, words = Item("l", "Say it:", ("A", "B", "C"), 1), Item("w", "Say it:", ("A", "B", "CC"), 1)
    memory = llm.write(llm.empty(64), "The harbour holds ten ships.", "text")
    for state in (None, memory):
        one, other = logliks(llm, state, [letters, words])
        assert one[:2] == pytest.approx(other[:2], abs=1e-4)


# --- the states and the table ---------------------------------------------------------------------------------------


def test_a_half_full_memory_is_half_full_and_a_full_one_full(llm):
    slots = MemorySettings(65)
    half, full = (protocol.full(llm, slots, UNRELATED, share) for share in (0.5, 1.0))
    assert (half.M, full.M) == (32, 65)
    assert {source.name for source in half.sources} == {"unrelated"}
    with pytest.raises(ValueError, match="too few unrelated texts to fill 65 slots"):
        protocol.full(llm, slots, UNRELATED[:1])


def test_an_empty_memory_is_the_plain_model_and_a_full_one_is_not(llm, rows, tmp_path):
    sets = [choices.load(name, 4, 0) for name in choices.NAMES]
    settings = Settings(MemorySettings(64), texts=2, blimp=4, piqa=4, mmlu=4)
    found = {line.name: line.estimate for line in measure(llm, sets, UNRELATED, settings, tmp_path / "run")}
    assert (found["perplexity, empty / plain"].low, found["perplexity, empty / plain"].high) == (1.0, 1.0)
    assert found["perplexity, full / plain"].mean != 1.0 != found["perplexity, half / plain"].mean
    for name in ("BLiMP", "PIQA", "PIQA, normed", "MMLU"):
        assert (found[f"{name}, empty - plain"].low, found[f"{name}, empty - plain"].high) == (0.0, 0.0)
        assert found[f"{name}, full"].n == 4
    text = (tmp_path / "run" / "records.jsonl").read_text()
    assert "He go" not in text and "pull" not in text


def test_the_table_is_paired_with_the_plain_model():
    def record(task, state, text, **values):
        return {"task": task, "state": state, "text": text, **values}

    some = [record("perplexity", "plain", t, nll=10.0 * n, tokens=10) for n, t in enumerate("ab", 1)]
    some += [record("perplexity", "full", t, nll=10.0 * n + 1, tokens=10) for n, t in enumerate("ab", 1)]
    some += [record("piqa", "plain", t, right=1, normed=0) for t in "ab"]
    some += [record("piqa", "full", t, right=int(t == "a"), normed=1) for t in "ab"]
    found = {line.name: line.estimate for line in lines(some)}
    assert found["perplexity, full / plain"].mean == pytest.approx(math.exp(0.1))
    assert found["PIQA, full"].mean == 0.5 and found["PIQA, full - plain"].mean == -0.5
    assert found["PIQA, normed, full - plain"].mean == 1.0


def test_sets_are_cut_into_batches_and_left_out_at_zero(llm, rows):
    worker = Ability(llm, [choices.load("blimp", 3, 0)], UNRELATED, Settings(texts=0, blimp=3))
    assert worker.units() == [("blimp", 0)]
    many = Choices("piqa", "made up", tuple(choices.piqa(PIQA * 5)))
    assert [unit[1] for unit in Ability(llm, [many], UNRELATED, Settings(texts=0)).units()] == [0, 1, 2]
    with pytest.raises(ValueError, match="blimp=-1"):
        Settings(blimp=-1)


def test_the_packaged_model_prefers_what_is_grammatical(packaged):
    pairs = [
        ("The cats sleep.", "The cats sleeps."),
        ("She has eaten it.", "She has ate it."),
        ("I am here.", "I are here."),
    ]
    items = [Item(str(i), "", pair, 0) for i, pair in enumerate(pairs)]
    assert [is_right(item, found) for item, found in zip(items, logliks(packaged, None, items), strict=True)] == [
        1,
        1,
        1,
    ]


def test_the_command(llm, rows, tiny_folder, tmp_path, monkeypatch, capsys):
    filler = QuestionSet("squad", "made up", (), tuple(UNRELATED))
    monkeypatch.setattr(questions, "load", lambda name, count, **drawn: filler)
    args = ["latentmem", "eval", "ability", "--out", str(tmp_path / "run"), "--model", str(tiny_folder), "--device=cpu"]
    args += ["--texts=2", "--blimp=4", "--piqa=2", "--mmlu=0", "-N", "64", "--dtype=float32", "--workers=1"]
    monkeypatch.setattr(sys, "argv", args)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr().out
    assert not stop.value.code and "| BLiMP, full - plain | 4 (4) |" in out and "MMLU" not in out
