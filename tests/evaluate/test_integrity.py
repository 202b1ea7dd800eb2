"""Integrity: facts, drift and tables with answers that are known; streams that are broken off; fine-tuning."""

import gzip
import json
import math
import sys
import time
from itertools import count
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

from latentmem import cli
from latentmem.core.memory import Memory
from latentmem.core.settings import MemorySettings
from latentmem.evaluate import stats
from latentmem.evaluate.baselines.tuned import Tuned
from latentmem.evaluate.data import synthetic
from latentmem.evaluate.protocols import integrity
from latentmem.evaluate.protocols.integrity import Integrity, Settings, drift, lines, measure, notes
from latentmem.evaluate.tables import plots
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model

ARTICLES = [f"Article {i} tells of harbour number {i} and of its {i} ships." for i in range(3)]
SMALL = {
    "memory": MemorySettings(1024),
    "every": 2,
    "age": 3,
    "stretch": 4,
    "checkpoint": 4,
    "texts": 2,
    "tokens": 40,
    "pairs": 0,
}


@pytest.fixture(autouse=True)
def made_up(request, monkeypatch):
    """Articles that need no data, and no plots where no test asks for them."""
    monkeypatch.setattr(integrity, "heldout", lambda count, seed: ARTICLES[:count])
    if "plotted" not in request.fixturenames:
        monkeypatch.setattr(plots, "panels", lambda some, x, title, path: path.write_bytes(b"no plot"))


@pytest.fixture
def plotted():
    """Plots are drawn."""


def tiny(dtype=torch.float32):
    return MemoryModel(tiny_model(max_position_embeddings=2048).to(dtype), byte_tokenizer(), name="tiny")


def finished(folder):
    """Records by unit, without the times that they took."""
    found = {}
    for line in (folder / "records.jsonl").read_text().splitlines():
        one = json.loads(line)
        found[tuple(one["unit"])] = [{k: v for k, v in r.items() if k != "seconds"} for r in one["records"]]
    return found


# --- facts ----------------------------------------------------------------------------------------------------------


def test_a_fact_is_one_sentence_with_its_question_and_a_function_of_seed_and_index():
    for i in range(200):
        text = synthetic.fact(0, i)
        (question,) = text.questions
        assert text == synthetic.fact(0, i) != synthetic.fact(1, i)
        assert question.answers[0] in text.text and text.text.count(".") == 1
        who = question.question.rstrip("?").split()
        assert any(word in text.text for word in who if word[0].isupper() and word not in ("In", "What", "Who"))


def test_no_two_facts_of_a_long_stretch_are_about_the_same_person_so_none_contradict_each_other():
    people = {synthetic._person(0, i) for i in range(130_000)}  # beyond the names of three syllables
    assert len(people) == 130_000
    assert all(synthetic._person(0, i) in synthetic.fact(0, i).text for i in range(124_900, 125_100))
    assert len({synthetic.fact(0, i).questions[0].question for i in range(20_000)}) == 20_000


def test_a_fact_has_at_most_32_tokens_also_after_a_million(packaged):
    count = packaged.prompts.text
    lengths = [
        len(count(synthetic.fact(0, i).text)) for start in (0, 124_000, 1_000_000) for i in range(start, start + 700)
    ]
    assert max(lengths) <= integrity.FACT


# --- numbers whose answer is known ----------------------------------------------------------------------------------


def test_the_slope_of_a_line_is_its_own_and_its_interval_is_a_point():
    x = [float(i) for i in range(12)]
    found = stats.slope(x, [3 - 0.5 * value for value in x], [i // 3 for i in range(12)])
    assert (found.mean, found.low, found.high) == (pytest.approx(-0.5), pytest.approx(-0.5), pytest.approx(-0.5))
    assert (found.n, found.texts) == (12, 4)


def test_a_slope_of_noise_contains_zero_and_without_two_windows_there_is_none():
    draw = Random(0)
    y = [float(draw.random() < 0.5) for _ in range(40)]
    found = stats.slope(list(range(40)), y, [i // 4 for i in range(40)])
    assert found.low <= 0 <= found.high and found.low < found.high
    assert stats.slope([1.0, 2.0], [1.0, 2.0], ["a", "a"]) is None
    assert stats.slope([1.0, 1.0], [1.0, 2.0], ["a", "b"]) is None
    assert stats.slope([], [], []) is None


def asked(at, accuracy, age=0, row="memory"):
    facts = {"kind": "asked", "row": row, "at": at, "age": age, "question": f"q{at}-{age}", "left": 1.0}
    return {**facts, "hit": int(accuracy == 1), "accuracy": accuracy, "loglik": -1.0}


def slots(at, norms, broken=0):
    return {"kind": "slots", "row": "memory", "at": at, "N": 40, "M": 40, "K": 4.0, "norms": norms, "broken": broken}


def test_drift_is_looked_for_after_ten_times_n_over_k_and_is_the_slope_of_what_follows():
    early = [asked(at, 1.0) for at in range(10, 101, 10)]  # N/K = 10: up to 100 nothing counts
    late = [asked(at, 0.5 + at / 10_000) for at in range(110, 401, 10)]
    some = [slots(at, [2.0 * at, 100.0]) for at in range(20, 401, 20)]
    found = dict(drift([*early, *late, *some], "memory"))
    assert integrity.settled(some) == (10.0, 100)
    assert found["drift of the token accuracy asked at once, per 10000 updates"].mean == pytest.approx(1.0)
    norm = found["drift of the mean slot norm (1: no change of norm), per 10000 updates"]
    middle = sum(range(120, 401, 20)) / 15  # the first layer grows by 1 / middle per update, the second does not
    assert norm.mean == pytest.approx(10_000 / middle / 2)
    assert norm.low > 0


def test_the_variance_of_slot_norms_has_its_value_and_its_drift_as_the_norm_has():
    def look(at, norms, variances):
        return {**slots(at, norms), "variances": variances}

    looks = range(20, 401, 20)  # N/K = 10: from 120 on
    some = [look(at, [1.0, 3.0], [8.0 - at / 100, 2.0]) for at in looks]
    found = dict(drift(some, "memory"))
    middle = 8 - sum(range(120, 401, 20)) / 15 / 100  # the first layer loses 0.01 per update, the second nothing
    e = found["drift of the variance of slot norms (1: no change of variance), per 10000 updates"]
    assert e.mean == pytest.approx(-10_000 * 0.01 / middle / 2) and e.high < 0
    assert found["drift of the mean slot norm (1: no change of norm), per 10000 updates"].mean == pytest.approx(0)
    table = {line.name: line.estimate for line in lines(some)}
    value = table["memory: variance of slot norms, mean over layers, after 100 updates"]
    assert value.mean == pytest.approx((middle + 2) / 2) and (value.n, value.texts) == (15, 15)
    assert table["memory: mean slot norm, mean over layers, after 100 updates"].mean == 2.0
    assert table["memory: drift of the variance of slot norms (1: no change of variance), per 10000 updates"] == e
    said = notes(some, Settings(rows=("memory",), updates=400))
    assert said[-1].startswith("memory, drift of the variance of slot norms") and said[-1].endswith(": drift.")
    without = {name for name, _ in drift([slots(at, [1.0]) for at in looks], "memory")}
    assert not any("variance" in name for name in without) and len(without) == 1  # records that do not have it


def test_the_records_that_are_published_hold_the_variance_of_slot_norms():
    folder = Path(__file__).parent.parent.parent / "docs" / "results" / "integrity"
    with gzip.open(folder / "records.jsonl.gz", "rt") as file:
        records = [record for line in file for record in json.loads(line)["records"]]
    found = {line.name: line.estimate for line in lines(records)}
    assert found["memory: variance of slot norms, mean over layers, after 1333 updates"].n == 94
    e = found["memory: drift of the variance of slot norms (1: no change of variance), per 10000 updates"]
    assert e.n == 94 and e.low < e.mean < e.high
    norm = found["memory: drift of the mean slot norm (1: no change of norm), per 10000 updates"]
    assert (round(norm.mean, 3), round(norm.low, 3), round(norm.high, 3)) == (0.0, -0.001, 0.0)  # as published


def test_how_hard_a_fact_is_by_itself_is_taken_off_the_drift():
    hard = [asked(at, 1.0 - at / 1000) for at in range(110, 401, 10)]  # later facts are harder, the memory is not worse
    alone = [{**asked(at, 1.0 - at / 1000 - 0.25), "kind": "alone"} for at in range(110, 401, 10)]
    some = [slots(at, [1.0]) for at in range(20, 401, 20)]
    found = dict(drift([*hard, *alone, *some], "memory"))
    assert found["drift of the token accuracy asked at once, per 10000 updates"].mean == pytest.approx(-10)
    name = "asked at once, less the same fact alone in an empty memory"
    assert found[f"drift of the token accuracy {name}, per 10000 updates"].mean == pytest.approx(0)
    table = {line.name: line.estimate for line in lines([*hard, *alone, *some])}
    assert table[f"memory, {name}: token accuracy"].mean == pytest.approx(0.25)


def test_drift_of_too_few_windows_is_none():
    some = [slots(at, [1.0]) for at in range(20, 161, 20)]
    assert all(estimate is None for _, estimate in drift([asked(120, 1.0), *some], "memory"))


def test_the_notes_say_what_was_reached_what_is_broken_and_whether_there_is_drift():
    flat = [asked(at, 1.0 if at % 20 else 0.0) for at in range(110, 401, 10)]
    some = [slots(at, [1.0 + at / 1000], broken=at // 400) for at in range(20, 401, 20)]
    speed = {"kind": "speed", "row": "memory", "at": 400, "updates": 400, "seconds": 4.0}
    said = notes([*flat, *some, speed], Settings(rows=("memory",), updates=600))
    assert said[0] == "memory: 400 of 600 updates were reached."
    assert "replaced 40.0 times" in said[1] and "1 numbers in its slots were NaN or infinite" in said[1]
    accuracy, norm = said[2], said[3]
    assert "after update 100" in accuracy and "no drift found, the interval contains 0" in accuracy
    assert norm.endswith(": drift.")


def test_a_stream_that_is_too_short_says_so():
    said = notes(
        [slots(50, [1.0]), {"kind": "speed", "row": "memory", "at": 50}], Settings(rows=("memory",), updates=200)
    )
    assert said[-1] == "memory: drift is looked for after 100 updates (10 N/K), which were not reached."


def test_the_exponential_mean_weighs_an_update_by_0_9999_for_each_that_followed():
    records = [asked(100, 1.0), asked(10_100, 0.0), {**asked(20_100, 1.0), "hit": 0}]
    found = {line.name: line.estimate for line in lines(records)}
    weights = [0.9999**20_000, 0.9999**10_000, 1.0]
    expected = (weights[0] + weights[2]) / sum(weights)
    assert found["memory, asked at once: token accuracy, exponential mean"].mean == pytest.approx(expected)
    assert found["memory, asked at once: token accuracy"].mean == pytest.approx(2 / 3)
    assert found["memory, asked at once: hits, exponential mean"].mean == pytest.approx(weights[0] / sum(weights))


def test_each_window_has_the_questions_of_its_part():
    records = [{**asked(at, float(at > 500)), "hit": int(at <= 500)} for at in range(10, 1001, 10)]
    found = {line.name: line.estimate for line in lines(records)}
    name = "memory, asked at once: token accuracy, updates"
    assert (found[f"{name} 401 to 500"].mean, found[f"{name} 501 to 600"].mean) == (0.0, 1.0)
    assert found[f"{name} 401 to 500"].n == 10
    assert found["memory, asked at once: hits, updates 401 to 500"].mean == 1.0


def test_checkpoints_are_compared_with_the_plain_model_text_by_text():
    def reading(row, at, text, nll):
        return {"kind": "read", "row": row, "at": at, "text": text, "nll": nll, "tokens": 10}

    def pair(row, at, text, right):
        return {"kind": "pair", "row": row, "at": at, "text": text, "right": right}

    records = [reading("plain", 0, "a", 10.0), reading("plain", 0, "b", 30.0)]
    records += [reading("memory", 8, "b", 32.0), reading("memory", 8, "a", 12.0)]
    records += [
        pair("plain", 0, "x", 1),
        pair("plain", 0, "y", 1),
        pair("memory", 8, "x", 1),
        pair("memory", 8, "y", 0),
    ]
    found = {line.name: line.estimate for line in lines(records)}
    assert found["memory: perplexity / plain after 8"].mean == pytest.approx(math.exp(0.2))
    assert found["memory: BLiMP - plain after 8"].mean == -0.5


def test_of_many_checkpoints_ten_are_shown_with_the_last():
    records = [{"kind": "read", "text": t, "nll": 1.0, "tokens": 2, "row": "plain", "at": 0} for t in "ab"]
    records += [{**r, "row": "memory", "at": at} for at in range(1, 32) for r in records[:2]]
    names = [line.name for line in lines(records) if "perplexity" in line.name]
    assert len(names) == 10 and names[-1] == "memory: perplexity / plain after 31"


# --- the stream -----------------------------------------------------------------------------------------------------


def test_slots_are_looked_at_layer_by_layer_and_broken_numbers_counted():
    values = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[math.nan, 0.0], [math.inf, 0.0]]])
    zeros = torch.zeros(2, 2, dtype=torch.int32)
    before = Memory(values, zeros, zeros, MemorySettings(8, 2))
    after = Memory(values, zeros, zeros, MemorySettings(8, 2), updates=2, sources=(integrity_source(3),))
    record = integrity._slots(after, before, 2)
    assert (record["norms"][0], record["variances"][0], record["broken"], record["K"]) == (3.0, 8.0, 2, 1.5)


def integrity_source(slots):
    from latentmem.core.memory import Source

    return Source("facts", 0, slots)


def test_a_stream_asks_at_once_and_at_the_age(tmp_path):
    worker = Integrity(tiny(), Settings(**SMALL, updates=8), tmp_path)
    records = [r for k in range(2) for r in worker.run(("memory", k))]
    found = [(r["at"], r["age"], r["question"]) for r in records if r["kind"] == "asked"]
    assert found == [
        (2, 0, "fact-0-1"),
        *((at, age, f"fact-0-{at - 1 - age}") for at in (4, 6, 8) for age in (0, 3)),
    ]
    memory = Memory.load(tmp_path / "memory-1.safetensors")
    assert (memory.updates, memory.sources[0].name) == (8, "facts")
    assert [r["at"] for r in records if r["kind"] == "read"] == [4, 4, 8, 8]


def test_each_fact_is_asked_alone_too(tmp_path):
    records = Integrity(tiny(), Settings(**{**SMALL, "every": 1, "updates": 4}), tmp_path).run(("memory", 0))
    alone = {r["at"]: r["loglik"] for r in records if r["kind"] == "alone"}
    among = {r["at"]: r["loglik"] for r in records if r["kind"] == "asked" and r["age"] == 0}
    assert alone[1] == among[1] and all(alone[at] != among[at] for at in (2, 3, 4)) and len(alone) == 4


def test_what_is_left_of_a_fact_is_counted_in_its_own_slots(tmp_path):
    settings = Settings(**{**SMALL, "stretch": 40, "checkpoint": 40, "every": 40, "age": 30, "updates": 40})
    worker = Integrity(tiny(), settings, tmp_path)
    left = {r["age"]: r["left"] for r in worker.run(("memory", 0)) if r["kind"] == "asked"}
    memory = Memory.load(tmp_path / "memory-0.safetensors")
    bytes_of = len(synthetic.fact(0, 9).text)  # asked when 30 others were written behind it
    assert memory.M == memory.N and left[0] == 1.0
    assert left[30] == pytest.approx((memory.births == 10).double().sum().item() / (3 * bytes_of)) and left[30] < 1


def test_in_a_large_memory_all_of_a_fact_is_left(tmp_path):
    worker = Integrity(tiny(), Settings(**SMALL, updates=4), tmp_path)
    assert {r["left"] for r in worker.run(("memory", 0)) if r["kind"] == "asked"} == {1.0}


def test_a_fact_that_takes_two_updates_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Choose a larger capacity"):
        Integrity(tiny(), Settings(**{**SMALL, "memory": MemorySettings(64), "updates": 4}), tmp_path).run(
            ("memory", 0)
        )


def test_a_stream_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    settings = Settings(**SMALL, updates=12, ft_updates=8, lr=1e-3)
    measure(tiny(), settings, tmp_path / "whole")
    original, calls = Integrity._due, count()

    def killed(self, *args):
        if next(calls) == 13:  # in the middle of a stretch
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Integrity, "_due", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny(), settings, tmp_path / "broken")
    assert "stopped before its end" in (tmp_path / "broken" / "table.md").read_text()
    there = set(finished(tmp_path / "broken"))
    assert there == {("plain", 0), ("ft", 0), ("ft", 1), ("memory", 0)}
    measure(tiny(), settings, tmp_path / "broken")
    assert finished(tmp_path / "broken") == finished(tmp_path / "whole")
    one, other = (Memory.load(tmp_path / name / "memory-2.safetensors") for name in ("whole", "broken"))
    assert torch.equal(one.slots, other.slots) and torch.equal(one.births, other.births)


def test_what_was_kept_and_is_lost_is_made_again(tmp_path):
    settings = Settings(**SMALL, updates=12, ft_updates=12, lr=1e-3)
    worker = Integrity(tiny(), settings, tmp_path)
    whole = {(row, k): worker.run((row, k)) for row in ("memory", "ft") for k in range(3)}
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    again = Integrity(tiny(), settings, tmp_path)

    def timeless(records):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in records]

    for row in ("memory", "ft"):
        assert timeless(again.run((row, 2))) == timeless(whole[row, 2])


def test_a_stream_is_made_longer_in_the_same_folder(tmp_path):
    measure(tiny(), Settings(**SMALL, rows=("memory",), updates=12), tmp_path / "whole")
    measure(tiny(), Settings(**SMALL, rows=("memory",), updates=8), tmp_path / "run")
    measure(tiny(), Settings(**SMALL, rows=("memory",), updates=12), tmp_path / "run")
    assert finished(tmp_path / "run") == finished(tmp_path / "whole")
    assert [file.name for file in (tmp_path / "run").glob("memory-*")] == ["memory-2.safetensors"]


def test_when_the_time_is_up_what_was_reached_is_the_result(tmp_path, monkeypatch):
    times = iter([0.0, 0.0, 10.0, 30.0, 70.0])  # begun; and as it goes on
    monkeypatch.setattr(
        integrity, "time", SimpleNamespace(monotonic=lambda: next(times), perf_counter=time.perf_counter)
    )
    measure(tiny(), Settings(**SMALL, rows=("memory",), updates=400), tmp_path / "run", minutes=1)
    said = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert said["notes"][0] == "memory: 8 of 400 updates were reached." and "stopped" not in said["title"]


def test_what_a_stretch_without_a_record_left_does_not_remove_what_the_next_one_needs(tmp_path):
    worker = Integrity(tiny(), Settings(**SMALL), tmp_path)
    for k in range(4):
        (tmp_path / f"memory-{k}.safetensors").touch()
    worker.clear([("memory", 0), ("memory", 2), ("ft", 1)])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["memory-2.safetensors", "memory-3.safetensors"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"rows": ("memory", "lora")}, "rows must be some of memory, ft, got memory, lora"),
        ({"rows": ()}, "got none"),
        ({"updates": 10}, "updates must be a multiple of the stretch, 4, got 10"),
        ({"checkpoint": 6}, "checkpoint must be a multiple"),
        ({"every": 0}, "got every=0"),
        ({"lr": 0.0}, "lr=0"),
    ],
)
def test_settings_that_do_not_fit_are_said(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**{**SMALL, "updates": 8, "ft_updates": 8, **wrong})


# --- fine-tuning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_tuned_weights_are_lent_and_given_back_to_the_bit(dtype):
    llm = tiny(dtype)
    before = {name: w.clone() for name, w in llm.base.named_parameters()}
    tuned, ids = Tuned(llm, lr=1e-2, steps=3), llm.prompts.text("The baker lives in Tor.")
    with tuned:
        losses = [tuned.learn(ids) for _ in range(6)]
        inside = {name: w.clone() for name, w in llm.base.named_parameters()}
    after = dict(llm.base.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(w.requires_grad or w.grad is not None for w in after.values())
    changed = {name for name in before if not torch.equal(before[name], inside[name])}
    assert changed == {name for name in before if "layers" in name and "norm" not in name}
    assert losses[-1] < losses[0]


def test_the_first_step_of_adamw_moves_each_weight_by_the_learning_rate():
    llm = tiny()
    tuned = Tuned(llm, lr=1e-3, steps=1)
    name = "model.layers.1.mlp.up_proj.weight"
    before = tuned.masters[name].detach().clone()
    with tuned:
        tuned.learn(llm.prompts.text("A fact."))
    moved = (tuned.masters[name].detach() - before).abs()
    assert moved.max() == pytest.approx(1e-3, rel=1e-3) and moved.median() == pytest.approx(1e-3, rel=1e-2)


def test_saved_weights_and_optimizer_go_on_as_if_nothing_had_been(tmp_path):
    llm = tiny()
    ids = [llm.prompts.text(synthetic.fact(0, i).text) for i in range(4)]
    one = Tuned(llm, lr=1e-3, steps=1)
    with one:
        losses = [one.learn(i) for i in ids[:2]]
        one.save(tmp_path / "kept.safetensors")
        losses = [one.learn(i) for i in ids[2:]]
    other = Tuned(llm, lr=1e-3, steps=1)
    other.load(tmp_path / "kept.safetensors")
    with other:
        assert [other.learn(i) for i in ids[2:]] == losses
    assert all(torch.equal(w, other.masters[name]) for name, w in one.masters.items())


def test_fine_tuning_in_a_stream_leaves_the_memory_row_as_it_is(tmp_path):
    measure(tiny(), Settings(**SMALL, rows=("memory",), updates=8), tmp_path / "alone")
    measure(tiny(), Settings(**SMALL, updates=8, ft_updates=8, lr=1e-2), tmp_path / "both")
    alone, both = finished(tmp_path / "alone"), finished(tmp_path / "both")
    assert all(both[unit] == records for unit, records in alone.items())
    read = {r["nll"] for r in both["ft", 0] if r["kind"] == "read"}
    assert read and not read & {r["nll"] for r in both["plain", 0]}  # and its weights are others


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_table_picture_and_notes(tiny_folder, tmp_path, monkeypatch, capsys, plotted):
    options = "--updates 8 --ft-updates 8 --stretch 4 --checkpoint 4 --every 2 --age 3 --texts 2 --pairs 0 -N 880"
    monkeypatch.setattr(
        sys, "argv", ["latentmem", "eval", "integrity", "--out", str(tmp_path / "run"), "--model", str(tiny_folder),
        *options.split(), "--dtype", "float32", "--workers", "1", "--device", "cpu"],
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "memory: 8 of 8 updates were reached." in out and "| memory, asked at once: hits | 4 (4) |" in out
    assert "- ft: 8 of 8 updates were reached." in (tmp_path / "run" / "table.md").read_text()
    assert (tmp_path / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")
