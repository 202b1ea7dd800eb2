"""Training data: its order, questions made from text, and the proof that nothing of the evaluation is trained on."""

import gzip
import json
import os
import re
import sys
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

from latentmem.train import config
from latentmem.train.config import Source
from latentmem.train.data import MOST, Apart, Documents, cloze, sentences
from latentmem.train.episodes import Episodes
from latentmem.train.log import lines

DATA = os.environ.get("LATENTMEM_DATA")
EVALUATION = ("squad/eval_*", "nq/*", "corpus/*_heldout*", "editing/*", "long/*", "conversations/*", "ability/*")
LOGS = Path(__file__).parent.parent.parent / "docs" / "results" / "training"
RUNS = {"smollm2-135m": "c1", "smollm2-135m-mixed": "mixed"}  # their logs


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_folder_of_texts_jsonl_and_questions_are_read_with_their_titles(tmp_path):
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "a.txt").write_text("One text.")
    (tmp_path / "notes" / "deep" / "b.md").write_text("Another text.")
    (tmp_path / "notes" / "c.bin").write_bytes(b"\xff")
    notes = Documents(Source(str(tmp_path / "notes")), 0)
    assert sorted((d.title, d.text) for d in notes.all) == [("a", "One text."), ("b", "Another text.")]
    rows = [{"context": "House 1.", "title": "T", "question": f"q{i}", "answers": {"text": [f"a{i}"]}} for i in "12"]
    rows.append({"context": "House 2.", "title": "U", "question": "q3", "answers": {"text": []}})
    asked = Documents(Source(written(tmp_path / "q.jsonl", rows), kind="questions", leave_out=("U",)), 0)
    assert [(d.title, d.text, d.questions) for d in asked.all] == [("T", "House 1.", (("q1", "a1"), ("q2", "a2")))]
    assert [d.title for d in asked.left_out] == ["U"]


def test_every_document_comes_once_a_round_in_an_order_that_only_the_seed_decides(tmp_path):
    path = written(tmp_path / "t.jsonl", [{"text": f"text {i}"} for i in range(20)])
    one, again, other = (Documents(Source(path), seed) for seed in (3, 3, 4))
    first, second = [one[i].id for i in range(20)], [one[i].id for i in range(20, 40)]
    assert sorted(first) == sorted(second) == sorted(d.id for d in one.all)
    assert first != second
    assert [again[i].id for i in range(40)] == first + second
    assert [other[i].id for i in range(20)] != first


def test_a_path_is_looked_for_here_and_below_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTMEM_DATA", str(tmp_path))
    written(tmp_path / "t.jsonl", [{"text": "here"}])
    assert Documents(Source("t.jsonl"), 0)[0].text == "here"
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: there is no such file or folder here nor below"):
        Documents(Source("nowhere.jsonl"), 0)


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` package that gives `.rows` and then `.error`, if it has one; what was asked for is in `.asked`."""
    monkeypatch.delenv("LATENTMEM_DATA", raising=False)
    module = ModuleType("datasets")
    module.rows, module.error, module.asked = [], None, []

    class Streamed:
        def __iter__(self):
            yield from module.rows
            if module.error:
                raise module.error

        def take(self, n):
            module.asked.append(n)
            return islice(self, n)

    def load_dataset(*args, **kwargs):
        module.asked.append((args, kwargs))
        return Streamed()

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_rows_of_the_hub_become_documents(hub):
    hub.rows = [{"id": "7", "title": "Bergen", "text": "One text."}, {"text": "Another text."}, {"text": " "}]
    found = Documents(Source("own/set", subset="old", split="some"), 0)
    assert [(d.id, d.title, d.text) for d in found.all] == [
        ("own/set#0", "Bergen", "One text."),
        ("own/set#1", "", "Another text."),
    ]
    assert hub.asked == [(("own/set", "old"), {"split": "some", "streaming": True}), MOST]
    hub.rows = [
        {"context": "House 1.", "title": "T", "question": f" q{i} ", "answers": {"text": [f"a{i}", "b"]}} for i in "12"
    ]
    asked = Documents(Source("lost/questions.jsonl.gz", "questions", hub="own/asked"), 0)
    assert [(d.id, d.title, d.text, d.questions) for d in asked.all] == [
        ("own/asked#0", "T", "House 1.", (("q1", "a1"), ("q2", "a2")))
    ]
    assert hub.asked[2:] == [(("own/asked", None), {"split": "train", "streaming": True}), MOST]


def test_no_more_of_the_hub_is_taken_than_fits(hub, monkeypatch):
    monkeypatch.setattr("latentmem.train.data.MOST", 2)
    hub.rows = [{"text": f"text {i}"} for i in range(5)]
    assert [d.text for d in Documents(Source("own/set"), 0).all] == ["text 0", "text 1"]


def test_the_hub_is_not_asked_for_what_is_here(hub, tmp_path):
    path = written(tmp_path / "t.jsonl", [{"text": "here"}])
    assert Documents(Source(path, hub="own/set"), 0)[0].text == "here" and not hub.asked


@pytest.mark.parametrize("rows", [[], [{"text": "a text"}]], ids=["at once", "on the way"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [(ConnectionError("no route to the hub\nand much more"), "no route to the hub"), (RuntimeError(), "RuntimeError")],
)
def test_a_hub_that_can_not_be_read_names_the_remedy(rows, error, reason, hub):
    hub.rows, hub.error = rows, error
    with pytest.raises(
        ValueError, match=rf"own/set could .*\({reason}\)\. Look .* a file or folder as path\.$"
    ) as raised:
        Documents(Source("own/set"), 0)
    assert "\n" not in str(raised.value)


def test_without_the_package_of_the_hub_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"own/set is loaded .* run `pip install 'latentmem\[train\]'`"):
        Documents(Source("own/set"), 0)


def test_sentences_end_where_a_new_one_begins():
    text = 'Ada went home. "Why?" she was asked. Rain fell.\nA new paragraph'
    assert sentences(text) == ["Ada went home.", '"Why?" she was asked.', "Rain fell.", "A new paragraph"]


def test_cloze_asks_for_the_end_of_a_sentence_that_names_its_subject():
    text = (
        "The harbour of Bergen was built in the year 1701 by a plumber from Oslo. It was later sold to nobody at all."
    )
    ((question, answer),) = cloze(text)
    start = question.removeprefix("Complete the sentence: ")
    assert f"{start} {answer}." == sentences(text)[0]
    assert 2 <= len(answer.split()) <= 6 and "Bergen" in start


def test_thirteen_words_in_a_row_clash_and_twelve_do_not(tmp_path):
    words = [f"word{i}" for i in range(30)]
    kept = Apart([Source(written(tmp_path / "e.jsonl", [{"deep": [{"text": " ".join(words)}]}]))])
    assert kept.clashes("Before, " + ", ".join(words[5:18]).upper() + " and after")
    assert not kept.clashes("before " + " ".join(words[5:17]) + " after")
    assert not Apart([]).clashes(" ".join(words))
    with pytest.raises(ValueError, match="no such file"):
        Apart([Source("missing/*.jsonl")])
    assert not Apart([Source("missing/*.jsonl", optional=True)]).clashes(" ".join(words))


def test_a_text_that_clashes_is_passed_over_and_the_other_episodes_stay(tmp_path):
    from latentmem.model.prompts import Prompts
    from latentmem.testing import byte_tokenizer

    rows = [{"text": f"The house {i} of Ada number {i} stands in the street {i} of Oslo and is as red as {i} roses."}
            for i in range(40)]  # fmt: skip
    path = written(tmp_path / "t.jsonl", rows)
    some = config.build(
        config.Config,
        {
            "data": [{"path": path}],
            "memory": {"K": 256, "N": 512},
            "texts": {"at_once": 2, "longest": 200, "shortest": 8, "rows": 4},
        },
        "",
    )
    prompts, sources = Prompts(byte_tokenizer()), [Documents(some.data[0], 0)]
    every = Episodes(some, prompts, sources)
    bad = every[3].names[0]
    apart = Apart(
        [Source(written(tmp_path / "e.jsonl", [{"text": next(d.text for d in sources[0].all if d.id == bad)}]))]
    )
    without = Episodes(some, prompts, sources, apart)
    for i in range(10):
        assert bad not in without[i].names
        assert without[i] == every[i] or bad in every[i].names


@pytest.mark.skipif(not DATA, reason="LATENTMEM_DATA is not set: the proof needs the real data sets")
def test_nothing_of_the_evaluation_is_trained_on_by_title_or_by_13_words_in_a_row():
    """The texts of the runs that are packaged are made again from their configs, and compared by other code than its
    own; that they are those that were trained on is in the runs' logs."""
    from latentmem.loading import load as loading

    prompts, apart = loading.load("smollm2-135m", adapters=None).prompts_or_raise(), cache(Apart)
    titles, grams = evaluation()
    assert len(titles) > 1000 and len(grams) > 1_000_000
    for name, log in RUNS.items():
        some = config.load(name)
        sources = [Documents(s, some.seed + i, some.watch.titles) for i, s in enumerate(some.data)]
        assert not {alike(d.title) for source in sources for d in source.all} & titles
        episodes, checked, each = Episodes(some, prompts, sources, apart(some.apart)), 0, some.steps.episodes
        steps = [row for row in lines(LOGS / log / "log.jsonl") if "loss" in row]
        assert len(steps) == some.steps.total
        for step, row in enumerate(steps):
            made = [episodes[step * each + i] for i in range(each)]
            assert [episode.objective for episode in made] == row["objectives"]
            assert [text for episode in made for text in episode.names] == row["texts"]
            for episode in made:
                for ids in {*episode.texts, *(row.prompt + row.answer for row in episode.rows)}:
                    assert not grams_of(prompts.tokenizer.decode(ids)) & grams, (name, step, episode.names)
                    checked += len(ids)
        assert checked > 50_000


def evaluation():
    """Titles and 13-grams of everything that is kept for evaluation."""
    titles, grams = set(), set()
    for pattern in EVALUATION:
        files = sorted(Path(DATA).glob(pattern))
        assert files, pattern
        for file in files:
            with gzip.open(file, "rt", encoding="utf-8") as stream:
                for line in stream:
                    inside = [json.loads(line)]
                    if isinstance(inside[0], dict):
                        titles.add(alike(inside[0].get("title") or ""))
                    while inside:
                        value = inside.pop()
                        if isinstance(value, str):
                            grams |= grams_of(value)
                        elif isinstance(value, (dict, list)):
                            inside += value.values() if isinstance(value, dict) else value
    return titles - {""}, grams


def alike(title):
    return title.replace("_", " ").casefold()


def grams_of(text):
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + 13])) for i in range(len(words) - 12)}
