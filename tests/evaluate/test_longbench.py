"""Questions about one long text: the sets' rows, pieces and prompts that are known, each row, table and command."""

import gzip
import json
import sys

import pytest

from latentmem import cli, data
from latentmem.core.settings import MemorySettings
from latentmem.evaluate import asking, scoring
from latentmem.evaluate.protocols import longbench
from latentmem.evaluate.protocols.longbench import Example, Examples, LongBench, Settings, cut, lines, load, measure
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model

STORY = (
    "1 Mary is in the school.\n2 Bill is in the kitchen.\n3 Where is Bill? \tkitchen\t2\n"
    "4 Bill took the milk.\n5 What is Bill carrying? \tmilk,apple\t4\n1 Ann left.\n2 Where is Ann? \tout\t1\n"
)


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(max_position_embeddings=2048), byte_tokenizer(), name="tiny")


def example(i, text="The harbour holds ten ships. " * 10):
    return Example(f"e{i}", f"e{i}", text, f"How many ships {i}?", ("ten", "10"))


# --- the sets -------------------------------------------------------------------------------------------------------


def test_babi_asks_behind_all_sentences_of_the_story_so_far():
    one, two, three = longbench.babi([{"task": "qa1", "text": STORY}])
    assert one == Example(
        "qa1-0-3", "qa1-0", "Mary is in the school. Bill is in the kitchen.", "Where is Bill?", ("kitchen",)
    )
    assert two.text.endswith("kitchen. Bill took the milk.") and two.answers == ("milk, apple",)
    assert (three.group, three.text) == ("qa1-1", "Ann left.")
    assert longbench.babi([{"task": "qa1", "text": STORY.replace("\t", "|")}]) == [one, two, three]
    with pytest.raises(ValueError, match="qa2 holds no question"):
        longbench.babi([{"task": "qa1", "text": STORY}, {"task": "qa2", "text": "1 Mary is in the school."}])
    with pytest.raises(ValueError, match="begins with no number"):
        longbench.babi([{"task": "qa1", "text": "Mary is in the school."}])


def test_rows_of_longbench_and_altqa_become_examples():
    (one,) = longbench.longbench("qasper", [{"input": "why?", "context": "text", "answers": ["a", "b"], "length": 3}])
    assert one == Example("qasper-0", asking.named("text"), "text", "why?", ("a", "b"))
    (other,) = longbench.longbench("qasper", [{"question": "why?", "context": "text", "answers": ["a", "b"]}])
    assert other == one
    (alt,) = longbench.altqa([{"id": 7, "context": "text", "question": "when was it made ", "answer": 1964}])
    assert (alt.id, alt.question, alt.answers) == ("altqa-7", "when was it made?", ("1964",))


def test_what_comes_twice_is_asked_once_and_questions_about_one_text_stand_together():
    rows = [
        {"id": i, "context": c, "question": q, "answer": 4}
        for i, (c, q) in enumerate([("x", "a"), ("x", "a?"), ("x", "b"), ("y", "a")])
    ]
    found = longbench.altqa(rows)
    assert [e.id for e in found] == ["altqa-0", "altqa-2", "altqa-3"]
    assert found[0].group == found[1].group != found[2].group
    two = longbench.longbench("qasper", [{"input": q, "context": "x", "answers": ["a"]} for q in ("why?", "when?")])
    assert two[0].group == two[1].group and two[0].id != two[1].id


def test_sets_are_drawn_by_seed_and_babi_of_all_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTMEM_DATA", str(tmp_path))
    (tmp_path / "long").mkdir()
    with gzip.open(tmp_path / "long" / "babi_en_test.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"task": f"qa{i}", "text": STORY}) + "\n" for i in range(3)))
    found = load("babi", 4, 0)
    assert sorted({e.id.split("-")[0] for e in found.examples[:3]}) == ["qa0", "qa1", "qa2"]
    assert len(found.examples) == 4 and found == load("babi", 4, 0) != load("babi", 4, 1)
    with pytest.raises(ValueError, match="babi, got 'squad'"):
        load("squad", 1, 0)
    monkeypatch.delenv("LATENTMEM_DATA")
    with pytest.raises(ValueError, match=r"altqa is read from the folder LATENTMEM_DATA"):
        load("altqa", 1, 0)


def test_longbench_comes_from_the_hub(monkeypatch):
    asked = []

    class Hub:
        def __enter__(self):
            return lambda name, split: (
                asked.append((name, split))
                or [{"question": "q?", "context": str(i), "answers": ["a"]} for i in range(3)]
            )

        def __exit__(self, *error):
            return False

    monkeypatch.setattr(data, "reading", lambda name: Hub())
    assert len(load("musique", 2, 0).examples) == 2 and asked == [("musique", "test")]


# --- the rows -------------------------------------------------------------------------------------------------------


def test_pieces_are_cut_from_the_end():
    assert [list(p) for p in cut(range(7), 3)] == [[0], [1, 2, 3], [4, 5, 6]]
    assert [list(p) for p in cut(range(6), 3)] == [[0, 1, 2], [3, 4, 5]]
    assert list(cut([], 3)) == []


def test_a_memory_holds_all_of_a_short_text_and_all_but_the_end_of_a_long_one(llm, monkeypatch):
    worker, wrote = LongBench(llm, [], Settings(MemorySettings(512), length=700)), []
    write = llm.write_ids
    monkeypatch.setattr(llm, "write_ids", lambda memory, ids, source: wrote.extend(ids) or write(memory, ids, source))
    short = example(0)
    context, prompt = worker._memory("altqa", short)
    asked = llm.prompts.question(short.question, bare=True)
    assert prompt == asked and context.length == 1 + len(llm.prompts.written(short.text))
    assert wrote == llm.prompts.written(short.text)
    wrote.clear()
    long = example(1, "".join(f"{i:3d}" for i in range(300)))
    context, prompt = worker._memory("musique", long)
    asked, ids = llm.prompts.question(long.question, bare=True), llm.prompts.text(long.text)
    tail = 512 - 32 - len(asked)
    assert prompt == [*ids[-tail:], *asked]
    kept = 700 - 32 - len(asked)
    assert context.length == 1 + kept - tail and wrote == ids[-kept:-tail]


def test_a_text_that_fits_into_the_prompt_leaves_the_memory_empty(llm):
    worker = LongBench(llm, [], Settings(MemorySettings(64)))
    context, prompt = worker._memory("musique", example(0, "Ten ships."))
    assert context.length == 0
    assert prompt == [
        *llm.prompts.opening,
        *llm.prompts.text("Ten ships."),
        *llm.prompts.question("How many ships 0?", bare=True),
    ]


def test_every_other_row_sees_what_it_should(llm, monkeypatch):
    seen = {}
    monkeypatch.setattr(longbench, "in_context", lambda llm, ids: seen.update(ids=ids) or asking.in_context(llm, ids))
    text = " ".join(["ships"] * 3 + [f"w{i}" for i in range(97)] + [f"v{i}" for i in range(150)])
    worker = LongBench(llm, [], Settings(MemorySettings(64), passages=1))
    opening, whole = len(llm.prompts.opening), llm.prompts.written(text)
    first = llm.prompts.written(" ".join(text.split()[:100]))
    for row, ids in {"floor": [], "window": whole[-64:], "oracle": whole, "bm25": first}.items():
        context = worker._plain(row, "altqa", example(0, text))[0]
        assert seen["ids"] == ids and context.length == len(ids) + opening * bool(ids), row
    tight = MemoryModel(tiny_model(max_position_embeddings=512), byte_tokenizer(), name="tiny")
    context, prompt = LongBench(tight, [], Settings(MemorySettings(64)))._plain("oracle", "altqa", example(0, text))
    assert context.length + len(prompt) + longbench.ANSWER["altqa"] == 512
    assert seen["ids"] == whole[-len(seen["ids"]) :]  # its end, as far as there is room


def test_no_row_knows_more_of_a_long_text_than_the_memory(llm, monkeypatch):
    seen = {}
    monkeypatch.setattr(longbench, "in_context", lambda llm, ids: seen.update(ids=ids) or asking.in_context(llm, ids))
    long = example(1, " ".join(f"w{i}" for i in range(300)))
    worker = LongBench(llm, [], Settings(MemorySettings(64), length=600, passages=1))
    asked, ids = llm.prompts.question(long.question, bare=True), llm.prompts.text(long.text)
    kept = llm.tokenizer.decode(ids[-(600 - 32 - len(asked)) :])
    worker._plain("oracle", "musique", long)
    assert seen["ids"] == llm.prompts.written(kept)
    worker._plain("window", "musique", long)
    assert seen["ids"] == llm.prompts.written(kept)[-(64 + 512 - 32 - len(asked)) :]  # as many as slots and prompt
    worker._plain("bm25", "musique", Example("e", "e", long.text, "Where is w3?", ("x",)))
    assert not seen["ids"]  # it is cut away


def test_an_answer_is_scored_against_the_best_of_the_right_ones(llm, monkeypatch):
    worker = LongBench(llm, [Examples("altqa", "made up", (example(0),))], Settings(MemorySettings(512)))
    monkeypatch.setattr(llm.tokenizer, "decode", lambda ids, skip_special_tokens: " It is ten. ", raising=False)
    (record,) = worker.run(("floor", "altqa", 0))
    assert (record["f1"], record["em"], record["hit"]) == (0.5, 0, 1)
    assert set(record) == {"row", "set", "text", "question", "f1", "em", "hit"}
    assert scoring.within("There are 17.", ["7"]) == 0 and scoring.within("There are 7.", ["7"]) == 1


def test_the_table_is_by_set_and_the_mean_over_longbench_is_said():
    def record(row, name, i, value):
        return {"row": row, "set": name, "text": f"{i}", "question": f"{name}-{i}", "f1": value, "em": 0, "hit": 1}

    some = [record("memory", "qasper", i, 0.5) for i in range(2)] + [
        record("floor", "qasper", i, 0.1) for i in range(2)
    ]
    some += [record("memory", "musique", i, 0.1) for i in range(2)] + [
        record("memory", "babi", i, 1.0) for i in range(2)
    ]
    found = {line.name: line.estimate for line in lines(some)}
    assert found["F1, qasper, memory"].mean == 0.5 and found["F1, babi, memory"].mean == 1.0
    assert found["F1, qasper, memory - floor"].mean == pytest.approx(0.4)
    assert longbench.notes(some)[-1] == "memory: mean F1 over 2 of LongBench's sets 30.0%."


def test_a_run_goes_on_and_rows_are_added(llm, tmp_path):
    sets = [Examples("altqa", "made up", tuple(map(example, range(2))))]
    measure(llm, sets, Settings(MemorySettings(512), rows=("floor",)), tmp_path / "run")
    found = measure(llm, sets, Settings(MemorySettings(512), rows=("floor", "memory")), tmp_path / "run")
    assert "F1, altqa, memory - floor" in {line.name for line in found}
    assert "ships" not in (tmp_path / "run" / "records.jsonl").read_text()


def test_f1_is_that_of_the_harness():
    metrics = pytest.importorskip(
        "lm_eval.tasks.longbench.metrics",
        reason="lm-evaluation-harness is not installed, or without what its LongBench needs",
        exc_type=ImportError,
    )
    for said, gold in (
        ("The red boat.", "red boat"),
        ("a red red boat", "red boat"),
        ("7 May", "May 7, 2023"),
        ("x", "y"),
    ):
        assert scoring.f1(said, [gold]) == pytest.approx(metrics.qa_f1_score(said, gold))


@pytest.mark.parametrize(
    ("wrong", "sentence"), [({"rows": ("judge",)}, "got judge"), ({"length": 100}, "length must be 512 or more")]
)
def test_settings_that_do_not_fit_are_said(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**wrong)


def test_the_command(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        longbench, "load", lambda name, n, seed: Examples(name, "made up", tuple(map(example, range(n))))
    )
    args = [
        "latentmem",
        "eval",
        "longbench",
        "--out",
        str(tmp_path / "run"),
        "--model",
        str(tiny_folder),
        "--device=cpu",
    ]
    args += ["--data=babi", "--examples=2", "--rows=floor,memory", "-N", "400", "--dtype=float32", "--workers=1"]
    monkeypatch.setattr(sys, "argv", args)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and "| F1, babi, memory - floor | 2 (2) |" in capsys.readouterr().out
