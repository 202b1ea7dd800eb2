"""Editing: metrics of known answers, edits of both sets, sequences, tables, and the command on a tiny model."""

import gzip
import inspect
import json
import os
import re
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from latentmem import cli
from latentmem.cli.evaluation import editing as command
from latentmem.core.memory import Memory
from latentmem.core.settings import MemorySettings
from latentmem.evaluate.baselines.editors import Unwritten
from latentmem.evaluate.baselines.passages import indexed, nearest
from latentmem.evaluate.data import edits
from latentmem.evaluate.data.edits import Edit, EditSet, Probe
from latentmem.evaluate.protocols import editing
from latentmem.evaluate.protocols.editing import ROWS, Editing, Settings, lines, markdown, measure, metrics, spread
from latentmem.evaluate.tables import plots
from latentmem.model.backbone import Trained
from latentmem.model.model import MemoryModel
from latentmem.model.reader import Score
from latentmem.testing import byte_tokenizer, tiny_model

ARTICLES = tuple(f"Article {i} tells of harbour number {i}, of its {i} ships and of all who sail." for i in range(6))
UNRELATED = tuple(f"Unrelated text number {i}." for i in range(20))


def asked(i, new="Bo", true="Cy"):
    return Edit(
        f"e{i}",
        f"Aud{i}",
        Probe(f"Who taught Aud{i}?", f"{new}{i}"),
        (Probe(f"Aud{i}'s teacher?", f"{new}{i}"),),
        (Probe(f"how long is river {i}?", f"{i} miles"),),
        (Probe(f"Whose pupil is the pupil of {new}{i}?", f"Dee{i}"),) if i % 2 else (),
    )


def begun(i):
    new, true = f"Bo{i}", f"Cy{i}"
    return Edit(
        f"c{i}",
        f"Aud{i}",
        Probe(f"Aud{i} was taught by", new, true),
        (Probe(f"The teacher of Aud{i} is", new, true), Probe(f"Aud{i}, pupil of", new, true)),
        tuple(Probe(f"Person{i}{j} was taught by", true, new) for j in range(3)),
    )


def made(n=6, name="zsre"):
    one = asked if name == "zsre" else begun
    return EditSet(name, "made up", tuple(map(one, range(n))), UNRELATED, ARTICLES)


@pytest.fixture
def llm():
    return MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")


@pytest.fixture
def released():
    """A model with random bos, mark and a pool of 12 slots, as a released checkpoint has them."""
    llm, generator = MemoryModel(tiny_model(), byte_tokenizer(), name="tiny"), torch.Generator().manual_seed(0)
    L, d = llm.decoder.L, llm.decoder.d
    slots, bos, mark = (torch.randn(shape, generator=generator) for shape in ((L, 12, d), (L, 1, d), (d,)))
    old = torch.zeros(L, 12, dtype=torch.int32)
    pool = Memory(
        slots, old, old - 1, MemorySettings(12, 4, "paper"), model=llm.identity, tokenizer=llm.tokenizer_identity
    )
    return llm.with_trained(Trained(bos, mark, pool))


@pytest.fixture
def quick(monkeypatch):
    """Few steps of everything that is trained."""
    from latentmem.evaluate.baselines import rome as romes
    from latentmem.evaluate.baselines import tuning as tunings

    for way in (tunings.FineTuned, tunings.LowRank, romes.RankOne):
        original = way.__init__

        def init(self, *args, original=original, **kwargs):
            original(self, *args, **{**kwargs, "steps": 2})

        monkeypatch.setattr(way, "__init__", init)


# --- metrics --------------------------------------------------------------------------------------------------------


def token_score(hits, likeliest=None):
    hits = torch.tensor(hits, dtype=torch.bool)
    return Score(torch.zeros(len(hits)), hits, torch.tensor(likeliest or [0] * len(hits)))


def likelihood(*logprobs):
    return Score(
        torch.tensor(logprobs), torch.zeros(len(logprobs), dtype=torch.bool), torch.tensor([7] * len(logprobs))
    )


def test_questions_are_measured_by_the_share_of_right_tokens():
    edit = asked(1)
    scores = {
        edit.rewrite: (token_score([1, 1, 0, 1]),),
        edit.rephrased[0]: (token_score([1, 0]),),
        edit.unrelated[0]: (token_score([0, 0, 1], [4, 5, 6]),),
        edit.portability[0]: (token_score([1, 1]),),
    }
    found = metrics(edit, scores, [torch.tensor([4, 9, 6])], [torch.tensor([1, 2, 3])])
    assert found == {
        "efficacy": 0.75,
        "generalization": 0.5,
        "specificity": pytest.approx(1 / 3, abs=1e-6),
        "locality": pytest.approx(2 / 3, abs=1e-6),  # of three tokens two are said as before, right or wrong
        "as plain": 0.0,
        "portability": 1.0,
    }


def test_sentences_are_measured_by_which_answer_is_likelier_per_token():
    edit = begun(0)
    new, true = likelihood(-1.0, -1.0, -1.0), likelihood(-1.5)  # -3 together, and still likelier per token
    scores = {
        edit.rewrite: (new, true),
        edit.rephrased[0]: (new, true),
        edit.rephrased[1]: (true, new),
        edit.unrelated[0]: (true, new),
        edit.unrelated[1]: (true, new),
        edit.unrelated[2]: (new, true),
    }
    found = metrics(
        edit, scores, [torch.tensor([7]), torch.tensor([8]), torch.tensor([7, 7, 8])], [torch.tensor([7])] * 3
    )
    assert found == {
        "efficacy": 1.0,
        "generalization": 0.5,
        "specificity": pytest.approx(1 / 3, abs=1e-6),
        "locality": pytest.approx((1 + 0 + 2 / 3) / 3, abs=1e-6),
        "as plain": 1.0,
    }


@pytest.mark.parametrize("name", ["zsre", "counterfact"])
def test_a_worker_measures_what_the_model_itself_says(llm, name, tmp_path):
    data = made(name=name)
    worker = Editing(llm, data, Settings(MemorySettings(32), edits=2, rows=("none",)), tmp_path)
    (record,) = worker.run(("single", "none", 1))
    edit, prompts = data.edits[1], llm.prompts

    def said(probe, answer):
        """(likeliest tokens, ids of the answer, its mean log-probability)"""
        if name == "zsre":
            ids, wanted = prompts.question(probe.prompt, bare=False), prompts.text(answer)
        else:
            ids, wanted = prompts.text(probe.prompt), prompts.text(f" {answer}")
        with torch.no_grad():
            rows = llm.base(torch.tensor([[*ids, *wanted]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        return rows.argmax(-1).tolist(), wanted, rows[range(len(wanted)), wanted].mean().item()

    def right(probe):
        tokens, wanted, first = said(probe, probe.answer)
        if probe.other:
            return float(first > said(probe, probe.other)[2])
        return sum(a == b for a, b in zip(tokens, wanted, strict=True)) / len(wanted)

    kinds = {"efficacy": [edit.rewrite], "generalization": edit.rephrased, "specificity": edit.unrelated}
    for kind, probes in kinds.items():
        assert record[kind] == pytest.approx(sum(map(right, probes)) / len(probes), abs=1e-5)
    assert record["locality"] == 1.0 and record["edit"] == edit.id and (record["T"], record["age"]) == (1, 0)


def test_an_edit_that_is_learned_has_efficacy_one_and_one_that_is_not_has_its_old_locality(llm, tmp_path):
    data = made()
    worker = Editing(llm, data, Settings(MemorySettings(32), edits=2, rows=("none", "ft")), tmp_path)
    worker.ways["ft"].steps, worker.ways["ft"].rate = 100, 0.01
    ft, none = worker.run(("single", "ft", 0))[0], worker.run(("single", "none", 0))[0]  # the unedited model comes last
    assert none["efficacy"] < 0.5 and ft["efficacy"] == 1.0 and none["locality"] == 1.0 > ft["locality"]


# --- units ----------------------------------------------------------------------------------------------------------


def test_every_sequence_together_holds_a_hundred_edits_or_all_there_are(llm, tmp_path):
    rows = ("none", "context", "memory-full", "ft")
    worker = Editing(
        llm, made(364), Settings(MemorySettings(32), edits=2, rows=rows, sequence=(1, 10, 60, 100, 1000)), tmp_path
    )
    units, chains = worker.units(), worker.chains()
    assert units[:4] == [("single", row, 0) for row in rows] and units[4] == ("single", "none", 1)
    assert {u[1:4] for u in units[8:]} == {(r, 10, s) for r in ("none", "memory-full", "ft") for s in range(10)}
    assert [chain[0][1:] for chain in chains] == [
        *((row, 60, 0, 0) for row in ("none", "memory-full", "ft")),
        *((row, 100, 0, 0) for row in ("none", "memory-full", "ft")),
        *((row, 364, 0, 0) for row in ("none", "memory-full", "ft")),  # there are no 1000
    ]
    assert [unit[4] for unit in chains[-1]] == list(range(8))


def test_what_is_measured_of_a_long_sequence_lies_evenly_over_it():
    assert spread(10) == list(range(10)) and spread(100) == list(range(100))
    found = spread(1000)
    assert len(found) == 100 and found[0] == 0 and found[-1] == 999
    assert {b - a for a, b in pairwise(found)} <= {10, 11}


def test_a_sequence_goes_on_from_its_last_segment_and_gives_the_same_as_in_one(llm, tmp_path, monkeypatch, quick):
    settings = Settings(MemorySettings(32), edits=2, rows=("bm25", "memory-full", "ft", "lora", "rome"), sequence=(5,))
    whole = Editing(llm, made(), settings, tmp_path)
    expected = {row: whole.run(("sequence", row, 5, 0, 0)) for row in settings.rows}
    assert [r["edit"] for r in expected["ft"]] == [f"e{i}" for i in range(5)]
    assert [r["age"] for r in expected["ft"]] == [4, 3, 2, 1, 0]
    monkeypatch.setattr(editing, "SEGMENT", 2)
    for chain in Editing(llm, made(), settings, tmp_path).chains():
        row = chain[0][1]
        for unit in chain[:-1]:
            assert Editing(llm, made(), settings, tmp_path).run(unit) == []  # another process each time
        assert Editing(llm, made(), settings, tmp_path).run(chain[-1]) == expected[row]
    assert len(list(tmp_path.iterdir())) == 2 * 5
    for file in tmp_path.iterdir():
        file.unlink()
    assert Editing(llm, made(), settings, tmp_path).run(("sequence", "ft", 5, 0, 2)) == expected["ft"]  # all anew


@pytest.mark.parametrize("name", ["zsre", "counterfact"])
def test_one_edit_that_bm25_finds_is_the_edit_in_the_context(llm, name, tmp_path):
    worker = Editing(llm, made(name=name), Settings(MemorySettings(32), edits=2, rows=("context", "bm25")), tmp_path)
    for i in range(6):
        (context,), (found,) = (worker.run(("single", row, i)) for row in ("context", "bm25"))
        assert {**found, "row": "context", "seconds": context["seconds"]} == context
    assert any(worker.run(("single", "bm25", i))[0]["as plain"] < 1.0 for i in range(6))


def test_of_many_edits_each_prompt_sees_the_one_that_bm25_finds(llm, tmp_path):
    worker = Editing(
        llm, made(), Settings(MemorySettings(32), edits=2, rows=("context", "bm25"), sequence=(4,)), tmp_path
    )
    way, context, edits = worker.ways["bm25"], worker.ways["context"], worker.data.edits
    state = way.start("s")
    for edit in edits[:4]:
        state = way.edit(state, edit)
    rewrite, rephrased, unrelated, portable = edits[1].probes
    assert way.parts(state, edits[1].probes) == [
        ((edits[1].sentence,), [rewrite, rephrased, portable]),  # aud1, bo1
        ((edits[3].sentence,), [unrelated]),  # no word in common: the newest
    ]
    doubled = way.edit(state, Edit("later", "Aud1", rewrite, (rephrased,), ()))
    assert nearest(indexed(doubled), [rewrite.prompt]) == [4]  # the same sentence once more
    (record,) = (r for r in worker.run(("sequence", "bm25", 4, 0, 0)) if r["edit"] == "e1")
    right = {}
    for i in (1, 3):
        with context.reading(context.edit((), edits[i])) as front:
            right[i] = {p: s[0].hits.double().mean().item() for p, s in worker._scores(front, edits[1].probes).items()}
    assert record["efficacy"] == pytest.approx(right[1][rewrite], abs=1e-6)
    assert record["generalization"] == pytest.approx(right[1][rephrased], abs=1e-6)
    assert record["specificity"] == pytest.approx(right[3][unrelated], abs=1e-6)
    assert record["portability"] == pytest.approx(right[1][portable], abs=1e-6)
    assert right[1] != right[3]


def test_bm25_that_is_not_installed_is_said_before_it_begins(llm, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ValueError, match="the row 'bm25' needs bm25s"):
        Editing(llm, made(), Settings(MemorySettings(32), edits=2, rows=("bm25",)), tmp_path)
    Editing(llm, made(), Settings(MemorySettings(32), edits=2, rows=("context",)), tmp_path)


def test_sequences_of_a_memory_forget_and_single_edits_do_not_see_each_other(llm, tmp_path):
    worker = Editing(llm, made(), Settings(MemorySettings(32), edits=3, rows=("memory-empty", "memory-full")), tmp_path)
    one, again = worker.run(("single", "memory-empty", 0)), worker.run(("single", "memory-empty", 1))
    assert {**worker.run(("single", "memory-empty", 0))[0], "seconds": 0} == {**one[0], "seconds": 0}
    assert one[0]["edit"] != again[0]["edit"]
    way = worker.ways["memory-full"]
    assert way.start("e0").M == 32 and way.start("e0").seed != way.start("e1").seed
    assert worker.ways["memory-empty"].start("e0").M == 0
    memory = way.edit(way.start("e0"), worker.data.edits[0])
    assert [source.name for source in memory.sources] == ["unrelated", "e0"]
    other = Editing(llm, made(), Settings(MemorySettings(32), edits=2, rows=("memory-unedited",)), tmp_path)
    unedited = other.ways["memory-unedited"]
    begun = unedited.start("e0")
    assert torch.equal(unedited.edit(begun, worker.data.edits[0]).slots, way.start("e0").slots)
    records = [r for i in range(6) for r in other.run(("single", "memory-unedited", i))]
    assert all(r["locality"] == 1.0 for r in records)  # before the edit the memory was full as well
    assert any(r["as plain"] < 1.0 for r in records)


def test_a_long_term_part_has_the_edits_that_the_memory_has_dropped(llm, tmp_path):
    rows = ("memory-full", "longterm")
    worker = Editing(llm, made(), Settings(MemorySettings(32), edits=2, rows=rows, sequence=(6,)), tmp_path)
    way, edits = worker.ways["longterm"], worker.data.edits
    begun = way.start("e0")
    assert (begun.N, begun.M, begun.longterm.settings.R, begun.longterm.settings.limit) == (24, 24, 8, editing.LIMIT)
    memory = begun
    for edit in edits:
        memory = way.edit(memory, edit)
    written, stored = memory.sources[1:], memory.longterm
    assert [source.name for source in written] == [edit.id for edit in edits]
    for number, source in enumerate(written, 1):
        here, dropped = memory.origins == number, (stored.origins == number) & stored.occupied
        assert dropped.any() and set((here.sum(1) + dropped.sum(1)).tolist()) == {source.slots}
    records = worker.run(("sequence", "longterm", 6, 0, 0))
    assert [r["edit"] for r in records] == [edit.id for edit in edits]
    state = way.start("sequence/6/0")
    for edit in edits:
        state = way.edit(state, edit)
    found = worker._scores(llm.context(state), edits[0].probes)
    assert records[0]["efficacy"] == pytest.approx(found[edits[0].rewrite][0].hits.double().mean().item(), abs=1e-6)
    nothing = Editing(llm, made(), Settings(MemorySettings(32), edits=2, rows=rows), tmp_path)
    nothing.ways["longterm"] = Unwritten(llm, lambda: nothing._longterm)
    assert [nothing.run(("single", "longterm", i))[0]["locality"] for i in range(2)] == [1.0, 1.0]


def test_a_checkpoint_edits_its_own_pool_as_it_comes_and_other_models_have_none(llm, released, tmp_path):
    settings = Settings(MemorySettings(32), edits=2)
    assert settings.rows == tuple(row for row in ROWS if row not in ("bm25", "longterm"))
    assert settings.rows == tuple(inspect.signature(command).parameters["rows"].default.split(","))
    there, here = (Editing(model, made(), settings, tmp_path) for model in (released, llm))
    assert there.rows == [row for row in settings.rows if row != "memory-empty"] and "memory-own" in there.rows
    assert here.rows == [row for row in settings.rows if row != "memory-own"] and "memory-empty" in here.rows
    own, full, pool = there.ways["memory-own"], there.ways["memory-full"], released.trained.pool
    assert torch.equal(own.start("e0").slots, pool.slots) and own.start("e0").seed != own.start("e1").seed
    assert full.start("e0").sources[0].name == "unrelated" and not own.start("e0").sources
    after = own.edit(own.start("e0"), there.data.edits[0])
    assert (after.slots[:, :, None] == pool.slots[:, None]).all(3).sum() == 3 * (12 - 4)  # one update into each layer
    assert [source.name for source in after.sources] == ["e0"]
    found = released.with_trained(replace(released.trained, pool=released.empty(longterm=2)))
    assert Editing(found, made(), replace(settings, rows=("none", "longterm")), tmp_path).rows == ["none"]
    assert Editing(released, made(), replace(settings, rows=("longterm",)), tmp_path)._longterm.longterm.settings.R == 3
    for model, row in ((llm, "memory-own"), (released, "memory-empty"), (found, "longterm")):
        with pytest.raises(ValueError, match=f"only a checkpoint has memory-own; got {row} for tiny"):
            Editing(model, made(), replace(settings, rows=(row,)), tmp_path)


def test_locality_of_an_own_pool_is_what_was_said_behind_it_before(released, tmp_path):
    worker = Editing(released, made(), Settings(edits=2, rows=("memory-own",)), tmp_path)
    written = [worker.run(("single", "memory-own", i))[0] for i in range(6)]
    worker.ways["memory-own"] = Unwritten(released, lambda: released.trained.pool)
    kept = [worker.run(("single", "memory-own", i))[0] for i in range(6)]
    assert all(r["locality"] == 1.0 for r in kept) and any(r["as plain"] < 1.0 for r in kept)
    assert any(r["locality"] < 1.0 for r in written)


# --- tables ---------------------------------------------------------------------------------------------------------


def record(row, edit, efficacy, generalization, specificity, T=1, **more):
    values = {"efficacy": efficacy, "generalization": generalization, "specificity": specificity}
    return {"row": row, "T": T, "sequence": 0, "age": 0, "edit": edit, **values, **more}


def test_the_score_is_the_harmonic_mean_of_the_three_means():
    records = [record("ft", "a", 1.0, 0.25, 0.0), record("ft", "b", 1.0, 0.75, 0.5)]
    found = {(cell.row, cell.metric): cell.estimate for cell in lines(records)}
    assert found["ft", "score"].mean == pytest.approx(3 / (1 + 2 + 4))
    assert (found["ft", "score"].low, found["ft", "score"].high) == (0.0, pytest.approx(3 / (1 + 4 / 3 + 2)))
    assert found["ft", "efficacy"].mean == 1.0 and ("ft", "portability") not in found


def test_the_gain_over_each_row_is_paired_and_relative():
    ours = [record("memory-full", e, 1.0, 1.0, s) for e, s in zip("abc", (0.2, 0.5, 0.8), strict=True)]
    other = [record("ft", e, 1.0, 1.0, s) for e, s in zip("abcd", (0.1, 0.25, 0.4, 1.0), strict=True)]
    worse = [record("lora", e, 0.1, 0.1, 0.1) for e in "abc"]
    cells = lines([*other, *worse, *ours])
    gains = {cell.row: cell.estimate for cell in cells if cell.metric == "gain"}
    assert gains["ft"].mean == pytest.approx((3 / (1 + 1 + 2)) / (3 / (1 + 1 + 4)) - 1) and gains["ft"].n == 3
    assert editing.best_tuned(cells, 1) == "ft" and editing.best_tuned(cells, 10) is None
    table = markdown(cells)
    assert "| ft (the best fine-tuning) | 1 | 3 | 0.500 [" in table and "| lora | 1 | 3 |" in table
    assert "## Edits in sequence" not in table and table.index("| memory-full | 3 |") < table.index("| ft | 4 |")


def test_the_long_term_part_is_put_beside_the_other_rows_too():
    records = [record("longterm", e, 1.0, 1.0, s, T=10) for e, s in zip("abc", (0.2, 0.5, 0.8), strict=True)]
    records += [record("memory-full", e, 1.0, 1.0, 0.25, T=10) for e in "abc"]
    records += [record("lora", e, 0.5, 0.5, 0.5, T=10) for e in "abc"]
    cells = lines(records)
    found = {(c.row, c.metric): c.estimate.mean for c in cells if c.metric in editing.GAINS}
    scores = {"longterm": 3 / (1 + 1 + 2), "memory-full": 3 / (1 + 1 + 4), "lora": 0.5}
    assert found == pytest.approx(
        {
            ("lora", "gain"): scores["memory-full"] / scores["lora"] - 1,
            ("longterm", "gain"): scores["memory-full"] / scores["longterm"] - 1,
            ("lora", "gain of longterm"): scores["longterm"] / scores["lora"] - 1,
            ("memory-full", "gain of longterm"): scores["longterm"] / scores["memory-full"] - 1,
        }
    )
    full, longterm = markdown(cells).split("## The full memory beside")[1].split("## The memory with a long-term part")
    assert "| longterm | 10 | 3 | -0.333 [" in full and "| memory-full | 10 | 3 | 0.500 [" in longterm
    assert "| lora (the best fine-tuning) | 10 | 3 | 0.500 [-0.143" in longterm and "| longterm |" not in longterm


def test_the_picture_shows_each_row_over_the_number_of_edits(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(plots, "panels", lambda some, *more, ticks: shown.update(some, ticks=ticks))
    records = [record(row, e, 1.0, 0.5, 0.5, T=T) for row in ("ft", "longterm") for T in (1, 10, 30) for e in "ab"]
    records += [record("ike", e, 1.0, 1.0, 1.0) for e in "ab"] + [record("lora", e, 0.5, 0.5, 0.5, T=30) for e in "ab"]
    editing.draw(lines(records), "made up", tmp_path / "plot.png")
    assert shown["ticks"] == [1, 10, 30] and "ike" not in shown["score"] and list(shown["score"]) == list(editing.SHOWN)
    points = {row: [(T, e and e.mean) for T, e in some] for row, some in shown["score"].items() if some}
    assert points == {
        "longterm": [(T, pytest.approx(0.6)) for T in (1, 10, 30)],
        "ft": [(T, pytest.approx(0.6)) for T in (1, 10, 30)],
        "lora": [(1, None), (10, None), (30, pytest.approx(0.5))],
    }
    assert set(editing.SHOWN) == set(editing.SEQUENTIAL)


def test_sequences_have_a_table_of_their_own():
    records = [record(row, e, 1.0, 0.5, 0.5, T=T) for row in ("ft", "memory-full") for T in (1, 10) for e in "ab"]
    table = markdown(lines(records))
    single, sequences = table.split("## Edits in sequence, without reset")
    assert "| ft | 2 | 0.600 [0.600, 0.600] | 1.000" in single and "| ft, 10 | 2 | 0.600" in sequences


def test_a_row_that_lost_everything_is_said_and_an_interval_may_have_no_end(tmp_path):
    ours = [record("memory-full", e, 1.0, 1.0, x) for e, x in zip("abcdefghij", (1, 1, 0.3) * 4, strict=False)]
    once = [record("ft", e, 1.0, 1.0, 0.5 if e == "a" else 0.0) for e in "abcdefghij"]
    never = [record("lora", e, 1.0, 1.0, 0.0) for e in "abcdefghij"]
    cells = lines([*ours, *once, *never])
    gain = next(cell.estimate for cell in cells if cell.metric == "gain")
    assert gain.mean < gain.high == float("inf") and gain.low > 0  # a draw without "a" leaves ft nothing
    table = markdown(cells)
    assert "| lora | 1 | 10 | its score is 0 |" in table and ", inf] |" in table


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zsre", "counterfact"])
def test_a_run_of_all_rows_has_an_interval_in_every_cell_and_grows(llm, name, tmp_path, quick):
    settings = Settings(MemorySettings(32), edits=2, rows=ROWS, sequence=(1, 3))
    cells = measure(llm, made(name=name), settings, tmp_path / "run")
    found = {(c.T, c.row, c.metric): c.estimate for c in cells}
    assert not any(row == "memory-own" for _, row, _ in found)
    for row in (row for row in ROWS if row != "memory-own"):
        assert found[1, row, "score"].n == 2
        assert ((3, row, "score") in found) == (row in editing.SEQUENTIAL)
        if row in editing.SEQUENTIAL:
            assert found[3, row, "efficacy"].n == 6
    assert found[1, "none", "locality"].mean == 1.0 == found[3, "none", "locality"].low
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["ids"] == [edit.id for edit in made(name=name).edits]
    assert "said" not in (tmp_path / "run" / "records.jsonl").read_text()
    table = (tmp_path / "run" / "table.md").read_text()
    assert table.startswith("# Model editing, made up\n") and "bootstrap over edits" in table
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert (tmp_path / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "run" / "records.jsonl").read_text()
    more = measure(llm, made(name=name), replace(settings, edits=3, rows=("none", "ft")), tmp_path / "run")
    assert (tmp_path / "run" / "records.jsonl").read_text().startswith(before)
    assert {c.row: c.estimate.n for c in more if (c.T, c.metric) == (1, "score")}["ft"] == 3
    with pytest.raises(ValueError, match=r"settings\.memory\.N is 32 there and 64 here"):
        measure(llm, made(name=name), replace(settings, memory=MemorySettings(64)), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rows": ("none", "grace")}, "rows must be some of none, .*; got grace"),
        ({"rows": ()}, "got none"),
        ({"edits": 1}, "one edit has no interval: take at least 2, got 1"),
        ({"sequence": (0, 1)}, "a sequence has at least one edit"),
        ({"edits": 7}, "made up: 7 edits were asked for. Ask for fewer"),
    ],
)
def test_what_can_not_be_measured_is_said_before_it_begins(llm, tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Editing(llm, made(), Settings(**settings), tmp_path)


def test_a_run_of_a_checkpoint_has_its_own_pool_in_all_tables(released, tmp_path):
    settings = Settings(edits=2, rows=("none", "memory-empty", "memory-own"), sequence=(1, 3))
    cells = measure(released, made(), settings, tmp_path / "run")
    assert {(c.row, c.T) for c in cells} == {(row, T) for row in ("none", "memory-own") for T in (1, 3)}
    table = (tmp_path / "run" / "table.md").read_text()
    assert "| memory-own | 2 |" in table and "| memory-own, 3 | 6 |" in table


# --- the sets -------------------------------------------------------------------------------------------------------

KNOWEDIT = {
    "id": 3,
    "subject": "Aud Ling",
    "prompt": "Who taught Aud Ling?",
    "target_new": " Bo",
    "ground_truth": ["Cy"],
    "rephrase": "Aud Ling's teacher?",
    "locality": [{"prompt": "The town of Aud Ling is", "ground_truth": ["Zorum"]}],
    "locality_nq": {"question": "how long is the river", "answers": ["9 miles", "nine"]},
    "portability": {"Reasoning": [{"prompt": "Who is the teacher of Bo's pupil?", "ground_truth": "Bo "}]},
}
MEND = {
    "subject": "Aud Ling",
    "src": "Who taught Aud Ling?",
    "pred": "Cy",
    "alt": "Bo",
    "answers": ["Cy"],
    "rephrase": "Aud Ling's teacher?",
    "loc": "nq question: how long is the river",
    "loc_ans": "9 miles",
}
COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} was taught by",
        "subject": "Aud Ling",
        "target_new": {"str": "Bo", "id": "Q1"},
        "target_true": {"str": "Cy", "id": "Q2"},
    },
    "paraphrase_prompts": ["The teacher of Aud Ling is", "Aud Ling, pupil of"],
    "neighborhood_prompts": ["Eva was taught by"],
}


def test_records_of_three_formats_become_edits():
    rewrite, rephrased = Probe("Who taught Aud Ling?", "Bo"), (Probe("Aud Ling's teacher?", "Bo"),)
    unrelated = (Probe("how long is the river?", "9 miles"),)
    portable = (Probe("Who is the teacher of Bo's pupil?", "Bo"),)
    assert edits.knowedit(KNOWEDIT) == Edit("3", "Aud Ling", rewrite, rephrased, unrelated, portable)
    true = (Probe("Who taught Aud Ling?", "Cy"), (Probe("Aud Ling's teacher?", "Cy"),))  # the paper writes what is true
    assert edits.mend(5, MEND) == Edit("5", "Aud Ling", *true, unrelated)
    found = edits.counterfact(COUNTERFACT)
    assert found.rewrite == Probe("Aud Ling was taught by", "Bo", "Cy") and found.id == "7"
    assert [p.answer for p in found.rephrased] == ["Bo", "Bo"]
    assert found.unrelated == (Probe("Eva was taught by", "Cy", "Bo"),)
    assert edits.knowedit(KNOWEDIT).sentence == "Who taught Aud Ling? Bo"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of data with three records of each set."""
    root = tmp_path / "data"
    rows = {
        "editing/zsre": [{**KNOWEDIT, "id": i} for i in range(3)],
        "editing/counterfact": [{**COUNTERFACT, "case_id": i} for i in range(3)],
        "squad/eval_titles": [],
        "squad/train_13_titles": [{"context": text} for text in UNRELATED],
        "corpus/wiki2015_heldout": [{"text": f"{ARTICLES[i % 6]} Number {i}."} for i in range(40)],
        "corpus/wiki2018_heldout": [{"text": f"{ARTICLES[i % 6]} Number {i}."} for i in range(40, 60)],
    }
    for name, some in rows.items():
        path = root / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in some)
    monkeypatch.setenv("LATENTMEM_DATA", str(root))
    return root


@pytest.mark.parametrize("name", edits.NAMES)
def test_local_sets_are_drawn_by_seed_and_say_that_they_are_others(folder, name):
    data, other = edits.load(name, seed=0), edits.load(name, seed=1)
    assert sorted(edit.id for edit in data.edits) == ["0", "1", "2"] and set(data.unrelated) == set(UNRELATED)
    assert data == edits.load(name, seed=0) and data.identity != other.identity
    assert data.source.endswith(", 3 records") and ("KnowEdit" in data.source) == (name == "zsre")
    assert len(data.articles) == edits.ARTICLES and data.questions == (name == "zsre")
    with pytest.raises(ValueError, match="must be one of zsre, counterfact, got 'wiki'"):
        edits.load("wiki", seed=0)


class Rows(list):
    """Rows that can be taken from, as a streamed set."""

    def take(self, n):
        return Rows(self[:n])


def test_the_hubs_files_are_mapped_and_cut_as_in_the_paper(monkeypatch):
    from types import ModuleType

    monkeypatch.delenv("LATENTMEM_DATA", raising=False)
    module, counter = ModuleType("datasets"), [{**COUNTERFACT, "case_id": i} for i in range(6)]
    given = {"train": counter[::2], "test": counter[1::2]}

    def load_dataset(name, *args, split, **kwargs):
        if name == "azhx/counterfact":
            return given[split]
        if name == "wangzn2001/Model_Editing_Hurt":
            assert kwargs == {"data_files": "training-data/zsre_mend_eval.json", "streaming": True}
            return Rows([MEND] * 9)
        if name == "Salesforce/wikitext":
            return [{"text": f" = Title {i} =\n" + ARTICLES[0] * 40} for i in range(60)]
        return Rows([{"context": text, "answers": {"text": []}} for text in UNRELATED])

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(edits, "FIRST", {"zsre": 4, "counterfact": 5})
    assert sorted(edit.id for edit in edits.load("zsre", seed=0).edits) == ["0", "1", "2", "3"]
    data = edits.load("counterfact", seed=0)
    assert sorted(edit.id for edit in data.edits) == ["0", "1", "2", "3", "4"]
    assert data.source == "CounterFact, 5 records" and set(data.unrelated) == set(UNRELATED)


@pytest.mark.parametrize(("name", "row"), [("zsre", MEND), ("counterfact", COUNTERFACT)])
def test_the_papers_own_file_comes_before_all_others_and_is_cut_as_there(folder, tmp_path, monkeypatch, name, row):
    monkeypatch.setitem(edits.FIRST, name, 4)
    rows = [{**row, "case_id": i} for i in range(6)]
    original = edits.FILES[name][1]
    (tmp_path / original).write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    data = edits.load(name, seed=0, file=tmp_path / original)
    wanted = edits.mend(0, MEND) if name == "zsre" else edits.counterfact(rows[0])
    assert sorted(edit.id for edit in data.edits) == ["0", "1", "2", "3"]
    assert {replace(edit, id="0") for edit in data.edits} == {wanted}
    assert data.source == f"{'zsRE' if name == 'zsre' else 'CounterFact'}, {original}, 4 records"
    again = edits.load(name, seed=0, file=tmp_path / "lines.json.gz")
    assert again.edits == data.edits and again.unrelated == data.unrelated and "lines.json.gz" in again.source


def test_records_that_not_every_row_can_take_are_left_out_and_counted(folder, tmp_path, llm):
    bad = [{**MEND, "subject": "Eva"}, {**MEND, "answers": [" "]}, {**MEND, "rephrase": ""}, {**MEND, "loc_ans": ""}]
    (tmp_path / "x.json").write_text(json.dumps([MEND, bad[0], MEND, *bad[1:], MEND]))
    data = edits.load("zsre", seed=0, file=tmp_path / "x.json")
    assert sorted(edit.id for edit in data.edits) == ["0", "2", "6"]  # of the file, as before
    assert data.source == "zsRE, x.json, 3 records (4 left out: no subject in the prompt, or nothing to ask)"
    assert data.edits != edits.load("zsre", seed=1, file=tmp_path / "x.json").edits
    worker = Editing(llm, data, Settings(MemorySettings(32), edits=3, rows=("rome",)), tmp_path)
    worker.ways["rome"].steps = 1
    assert [worker.run(("single", "rome", i))[0]["edit"] for i in range(3)] == [edit.id for edit in data.edits]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("zsre", "no json", "x.json holds no records of zsre_mend_eval.json (Expecting value"),
        ("zsre", "[]", "objects with subject (str), src (str), answers (list), rephrase (str), loc (str), loc_ans"),
        ("zsre", json.dumps([MEND, KNOWEDIT]), "were expected, and one is {'id': 3, 'subject': 'Aud Ling'"),
        ("zsre", json.dumps([{**MEND, "answers": "Cy"}]), "answers (list)"),
        ("zsre", json.dumps([MEND, {**MEND, "answers": []}]), "record 1 of"),
        ("zsre", json.dumps([COUNTERFACT]), "holds no records of zsre_mend_eval.json"),
        ("counterfact", json.dumps([MEND]), "holds no records of counterfact.json: objects with case_id (int)"),
        ("counterfact", json.dumps([{**COUNTERFACT, "requested_rewrite": {}}]), "not as in counterfact.json (KeyError"),
    ],
)
def test_a_file_of_another_form_is_refused(folder, tmp_path, name, text, sentence):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        edits.load(name, seed=0, file=tmp_path / "x.json")


def test_every_local_record_can_be_asked_edited_and_found():
    if "LATENTMEM_DATA" not in os.environ:
        pytest.skip("LATENTMEM_DATA is not set: the records of KnowEdit and CounterFact are not here")
    for name, n in (("zsre", 942), ("counterfact", 364)):
        data = edits.load(name, seed=0)
        assert len(data.edits) == n and len({edit.id for edit in data.edits}) == n
        for edit in data.edits:
            assert edit.subject in edit.rewrite.prompt and edit.rewrite.answer and edit.rephrased and edit.unrelated
            assert edit.whole
        assert data.source.endswith(f", {n} records")  # none was left out


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(home, tiny_folder, folder, monkeypatch, capsys):
    """Run `latentmem eval editing` on the tiny model and give (exit code, standard output, standard error)."""

    def command(out, **options):
        given = {"model": tiny_folder, "edits": 2, "rows": "none,memory-full,ft-l", "capacity": 64, "device": "cpu"}
        given |= {"dtype": "float32", "workers": 1, **options}
        args = [f"--{key}={value}" for key, value in given.items()]
        monkeypatch.setattr(sys, "argv", ["latentmem", "eval", "editing", "--out", str(out), *args])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return command


def finished(out):
    found = {}
    for line in (out / "records.jsonl").read_text().splitlines():
        unit = json.loads(line)
        found[tuple(unit["unit"])] = [{**record, "seconds": 0} for record in unit["records"]]
    return found


def test_the_row_bm25_is_added_to_a_run_that_was_made_without_it(run, tmp_path):
    assert run(tmp_path / "run", rows="none,context", sequence="1,3")[0] == 0
    before = (tmp_path / "run" / "records.jsonl").read_text()
    code, out, _ = run(tmp_path / "run", rows="none,context,bm25", sequence="1,3")
    assert code == 0 and "| bm25, 3 | 3 |" in out and "| context, 3 |" not in out
    after = (tmp_path / "run" / "records.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == len(before.splitlines()) + 2 + 1


def test_one_process_and_two_give_the_same_records(run, tmp_path):
    code, out, _ = run(tmp_path / "one", sequence="1,3")
    assert code == 0 and "## One edit at a time" in out and "| memory-full, 3 | 3 |" in out
    assert run(tmp_path / "two", sequence="1,3", workers=2)[0] == 0
    one, two = finished(tmp_path / "one"), finished(tmp_path / "two")
    assert one == two and len(one) == 2 * 3 + 3
    assert "zsRE as in KnowEdit's test split, 3 records" in (tmp_path / "one" / "table.md").read_text()


def test_the_command_reads_the_papers_file(run, tmp_path):
    (tmp_path / "mend.json").write_text(json.dumps([{**MEND, "answers": [f"Cy{i}"]} for i in range(3)]))
    assert run(tmp_path / "run", file=tmp_path / "mend.json", rows="none")[0] == 0
    assert "# Model editing, zsRE, mend.json, 3 records" in (tmp_path / "run" / "table.md").read_text()
    assert len(finished(tmp_path / "run")) == 2
    code, _, err = run(tmp_path / "run", rows="none")  # the folder's own set is another one
    assert code == 2 and 'data.source is "zsRE, mend.json, 3 records" there' in " ".join(err.split())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": "mquake"}, "the set of edits must be one of zsre, counterfact, got 'mquake'"),
        ({"rows": "none,grace"}, "got grace"),
        ({"sequence": "1,x"}, "--sequence takes numbers with commas in between"),
        ({"edits": 4}, "3 records: 4 edits were asked for"),
        ({"file": "missing.json"}, "missing.json holds no records of zsre_mend_eval.json"),
    ],
)
def test_a_command_that_can_not_work_says_why(run, tmp_path, options, sentence):
    code, _, err = run(tmp_path / "run", **options)
    assert code == 2 and sentence in " ".join(err.split()) and "Traceback" not in err
