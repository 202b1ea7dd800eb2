"""Retention: with models whose right table is known, with a real one, over kills and restarts, and as a command."""

import json
import os
import signal
import sys
from collections import Counter
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch

from latentmem import cli
from latentmem.core import memory as memories
from latentmem.core.settings import MemorySettings
from latentmem.evaluate import runner
from latentmem.evaluate.asking import ask
from latentmem.evaluate.data import questions
from latentmem.evaluate.data.sets import Question, QuestionSet, Text
from latentmem.evaluate.protocols import retention
from latentmem.evaluate.protocols.retention import ROWS, Retention, Settings, measure
from latentmem.evaluate.tables import plots, summary
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Style
from latentmem.model.reader import Score
from latentmem.testing import byte_tokenizer, labelled_memory, tiny_model, updated

LENGTH = 20  # words of every text
LAYERS = 4
TOP, BOTTOM = -1.0, -8.0  # log-likelihood of an answer that is known, and of one that is not


def made(texts=4, unrelated=12):
    """Texts of 20 words each; no two of them share a word, and a question shares one word with its text."""

    def text(i):
        golds = [f"gold{i}x{j} crown{i}x{j}" for j in range(2)]
        words = [f"key{i}", *golds[0].split(), *golds[1].split()]
        questions = tuple(
            Question(f"q{i}-{j}", f"what has key{i} number n{j}", (gold, "a synonym")) for j, gold in enumerate(golds)
        )
        return Text(f"text{i}", " ".join([*words, *(f"t{i}w{j}" for j in range(LENGTH - len(words)))]), questions)

    others = (" ".join(f"u{i}w{j}" for j in range(LENGTH)) for i in range(unrelated))
    return QuestionSet("synthetic", "made up", tuple(map(text, range(texts))), tuple(others))


@pytest.fixture(autouse=True)
def unplotted(request, monkeypatch):
    """Plots take longer than all else: only a test that asks for `plotted` draws them."""
    if "plotted" not in request.fixturenames:
        monkeypatch.setattr(plots, "draw", lambda lines, title, path: path.write_bytes(b"no plot"))


@pytest.fixture
def plotted():
    """Plots are drawn."""


# --- models whose answers are known ---------------------------------------------------------------------------------


class Words:
    """Prompts and tokenizer at once: a token is a word, the first of all is the opening."""

    chats, style, opening = True, Style(), [1]

    def __init__(self):
        self.ids = {"nothing": 0, "<opening>": 1}

    def text(self, text):
        return [self.ids.setdefault(word, len(self.ids)) for word in text.split()]

    written = text

    def answer(self, question, answer):
        return self.text(answer)

    def question(self, question, *, bare):
        return [*([] if bare else self.opening), *self.text(question)]

    def decode(self, ids, skip_special_tokens):
        words = list(self.ids)
        return " ".join(words[i] for i in ids)


class StandIn:
    """What `Retention` needs of a model; its memory is a real one, whose slots are the numbers of words.

    Everything that it is asked goes into `asked` as (question, the ids that each layer sees).
    """

    name, identity, tokenizer_identity, adapters, born_full = "stand-in", "none", "words", None, False
    decoder = SimpleNamespace(dtype=torch.float32)
    limit = 1_000  # positions

    def __init__(self, data):
        self.prompts = self.tokenizer = Words()
        self.data, self.asked, self.writes = data, [], 0
        self.of = {tuple(self.prompts.text(q.question)): (t, q) for t in data.texts for q in t.questions}
        self.places = {
            i: place
            for place, text in enumerate([*(t.text for t in data.texts), *data.unrelated])
            for i in self.prompts.text(text)
        }

    def prompts_or_raise(self):
        return self.prompts

    def empty(self, settings):
        plain = MemorySettings(settings.N, settings.K, seed=settings.seed, form="exact")
        assert settings.override(form="exact") == plain  # no other was asked for
        return labelled_memory(LAYERS, settings.N, settings.K, seed=settings.seed)

    def write_ids(self, memory, ids, source):
        self.writes += 1
        for piece in torch.tensor(ids).split(memory.piece):
            new = piece.float()[None, :, None].repeat(LAYERS, 1, 1)
            memory = updated(memory, new, source=source, tokens=len(piece))
        return memory

    def context(self, memory):
        layers = memory.slots[:, :, 0].long().tolist()
        return SimpleNamespace(length=1 + memory.M if memory.M else 0, layers=layers, memory=memory)

    def retrieved(self, context, ids):
        return context

    def text_context(self, ids):
        assert not ids or (ids[0] == 1 and 1 not in ids[1:])
        return SimpleNamespace(length=len(ids), layers=[list(ids[1:])], memory=None, room=self.limit - len(ids))

    def looked_up(self, context, ids):
        """The text and the question, and the share of the text that the context holds, over all layers."""
        assert (ids[0] == 1) == (context.length == 0)  # all begins with the opening, or with a memory
        text, question = self.of[tuple(ids[ids[0] == 1 :])]
        words = set(self.prompts.text(text.text))
        held = sum(len(words & set(layer)) for layer in context.layers)
        return text, question, held / (len(words) * len(context.layers))

    def score_rows(self, context, ids, answers):
        found = []
        for row, answer in zip(ids, answers, strict=True):
            _, question, share = self.looked_up(context, row)
            assert answer == self.prompts.text(question.answers[0])
            right, loglik = self.likely(context, row, answer, share)
            found.append(Score(torch.full((len(answer),), loglik), torch.tensor(right)))
        return found

    def generate_rows(self, context, ids, new_tokens):
        assert new_tokens == 10
        for row in ids:
            self.asked.append((self.looked_up(context, row)[1].id, context))
        return [torch.tensor(self.says(context, row)) for row in ids]


class Knowing(StandIn):
    """Answers right exactly if it sees half of the text, and the more likely, the more of it it sees."""

    def likely(self, context, ids, answer, share):
        return [share >= 0.5] * len(answer), BOTTOM + (TOP - BOTTOM) * share

    def says(self, context, ids):
        _, question, share = self.looked_up(context, ids)
        return self.prompts.text(question.answers[0].upper().lower() if share >= 0.5 else "no idea at all")


class Parrot(StandIn):
    """Says one thing, whatever it sees: the gold answer of the first question."""

    def likely(self, context, ids, answer, share):
        return [i == j for i, j in zip(answer, self.says(context, ids), strict=True)], -2.5

    def says(self, context, ids):
        return self.prompts.text(self.data.texts[0].questions[0].answers[0])


class Mistaken(Knowing):
    """Sees everything, and says what is the right answer to the text's other question."""

    def likely(self, context, ids, answer, share):
        return [False] * len(answer), BOTTOM

    def says(self, context, ids):
        text, question, _ = self.looked_up(context, ids)
        (other,) = (q for q in text.questions if q.id != question.id)
        return self.prompts.text(other.answers[0])


class Checkpoint(Knowing):
    """Has a full memory of its own."""

    born_full = True

    def empty(self, settings=None):
        full = updated(labelled_memory(LAYERS, 40, 20), torch.zeros(LAYERS, 40, 1), source="pool")
        return replace(full, origins=full.origins - 1, sources=(), updates=0).with_settings(
            seed=settings.seed if settings else 0
        )


def work(llm, settings, folder, data=None):
    """Records of all units, without `measure`."""
    worker = Retention(llm, data or llm.data, settings, folder)
    chained = [unit for chain in worker.chains() for unit in chain]
    return [record for unit in [*worker.units(), *chained] for record in worker.run(unit)]


def cells(records, metric, *keys):
    """Mean of a metric by the given keys of the records."""
    found = {}
    for record in records:
        found.setdefault(tuple(record.get(key) for key in keys), []).append(record[metric])
    return {key: sum(values) / len(values) for key, values in found.items()}


def seen(record):
    """The share of the text that a knowing model saw, from its log-likelihood."""
    return (record["loglik"] - BOTTOM) / (TOP - BOTTOM)


METRICS = {"hit": (1.0, 0.0), "accuracy": (1.0, 0.0), "loglik": (TOP, BOTTOM)}
every_metric = pytest.mark.parametrize("metric", METRICS)


# --- the metric -----------------------------------------------------------------------------------------------------


def test_a_hit_is_any_right_answer_in_what_is_said_in_either_case():
    llm = Knowing(made())
    questions = (
        replace(llm.data.texts[0].questions[0], answers=("Gold", "x")),
        replace(llm.data.texts[0].questions[1], answers=("x", "x", "it is CROWN for sure", "OLD0x1 CR")),
        replace(llm.data.texts[1].questions[0], answers=("gold1x0", "gold1x0 crown1x1")),
        replace(llm.data.texts[1].questions[1], answers=("gold1x0", "crown1x1 gold1x1")),
    )
    llm.score_rows = lambda context, ids, answers: [Score(torch.tensor([-1.0, -2.0]), torch.tensor([True, False]))] * 4
    context = llm.text_context([1, *(i for text in llm.data.texts for i in llm.prompts.text(text.text))])
    answers = ask(llm, context, questions)
    assert [a.said for a in answers] == ["gold0x0 crown0x0", "gold0x1 crown0x1", "gold1x0 crown1x0", "gold1x1 crown1x1"]
    assert [a.hit for a in answers] == [True, True, True, False]
    assert {(a.accuracy, a.loglik) for a in answers} == {(0.5, -1.5)}  # means over the gold answer's tokens


def test_asking_nothing_gives_nothing():
    llm = MemoryModel(tiny_model(), byte_tokenizer())
    assert ask(llm, llm.text_context([]), []) == []


# --- the table of a model whose right one is known ------------------------------------------------------------------


@every_metric
def test_a_model_that_knows_what_it_sees_scores_everything_or_the_floor(tmp_path, metric):
    top, floor = METRICS[metric]
    records = work(Knowing(made()), Settings(steps=(0, 1, 2), capacities=(20, 40)), tmp_path)
    found = cells(records, metric, "row", "N", "fill", "step")
    share = {  # of the text
        ("window", 20, "full"): (1, 0, 0),
        ("window", 40, "full"): (1, 1, 0),
        ("bm25", 20, "full"): (1, 1, 1),
        ("bm25", 40, "full"): (1, 1, 1),
        ("ours", 20, "full"): (1, 0, 0),  # one text takes all 20 slots, the next one takes them again
        ("ours", 20, "empty"): (1, 0, 0),
        ("ours", 40, "empty"): (1, 1, None),
        ("ours", 40, "full"): (1, None, None),  # random drops
    }
    expected = {
        (*key, t): floor + (top - floor) * x for key, row in share.items() for t, x in enumerate(row) if x is not None
    }
    constants = {("floor", 0, "", None): floor, ("oracle", 0, "", None): top}
    constants |= {("dead", N, "full", None): floor for N in (20, 40)}
    assert {key: value for key, value in found.items() if key in expected | constants} == expected | constants
    assert set(found) - set(expected) - set(constants) == {
        ("ours", 40, "empty", 2),
        ("ours", 40, "full", 1),
        ("ours", 40, "full", 2),
    }
    assert Counter(r["row"] for r in records) == {
        **{"floor": 8, "oracle": 8, "dead": 16},  # 8 questions, and 2 capacities
        **{"window": 48, "bm25": 48, "ours": 96},  # and 3 steps, and 2 fills
    }


def test_what_is_said_to_be_left_is_what_the_model_sees(tmp_path):
    records = work(Knowing(made()), Settings(steps=(0, 1, 2, 4), capacities=(20, 30, 40, 50, 70)), tmp_path)
    shares = set()
    for record in records:
        if record["row"] in ("ours", "window", "bm25"):
            assert record["left"] == pytest.approx(seen(record), abs=1e-5)
            shares.add((record["row"], record["left"]))
        assert record["hit"] == record["accuracy"] == (seen(record) >= 0.5)
    assert ("window", 0.5) in shares and {s for row, s in shares if row == "bm25"} == {1.0}
    assert len([s for row, s in shares if row == "ours" and 0 < s < 1]) > 20


def test_slots_are_lost_at_random_as_the_paper_counts(tmp_path):
    records = work(Knowing(made(12)), Settings(steps=(0, 1, 2, 3), capacities=(40,), rows=("ours",)), tmp_path)
    left = cells(records, "left", "fill", "step")
    for t in range(4):
        assert left["full", t] == pytest.approx(memories.survival(40, LENGTH, t), abs=0.05)
        assert left["empty", t] == pytest.approx(memories.survival(40, LENGTH, max(0, t - 1)), abs=0.05)
    at_two = [r["left"] for r in records if (r["fill"], r["step"]) == ("full", 2)]
    assert len(set(at_two)) > 4  # each sample has its own drops


@pytest.mark.parametrize("stream", [False, True])
def test_where_knowing_goes_with_the_slots_the_bound_is_met(tmp_path, stream):
    settings = Settings(steps=(0, 1, 2), capacities=(40, 50), rows=("floor", "oracle", "ours"), stream=stream)
    lines = measure(Knowing(made(6)), made(6), settings, tmp_path / "run")
    rows = {
        (x.N, x.fill): x for x in lines if (x.kind, x.row, x.metric, x.filtered) == ("row", "ours", "loglik", False)
    }
    bounds = {(x.N, x.fill): x for x in lines if (x.kind, x.metric) == ("bound", "loglik")}
    fills = ("full",) if stream else ("full", "empty")
    assert set(rows) == set(bounds) == {(N, fill) for N in (40, 50) for fill in fills}
    for key, row in rows.items():
        assert list(row.cells) == list(bounds[key].cells) == [0, 1, 2]
        for t, cell in row.cells.items():
            bound = bounds[key].cells[t]
            assert (bound.mean, bound.low, bound.high) == pytest.approx((cell.mean, cell.low, cell.high), abs=1e-5)
    shares = {t: cell.mean for t, cell in rows[40, "full"].cells.items()}
    assert shares[0] == TOP and shares[0] > shares[1] > shares[2] > BOTTOM


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [Parrot, Mistaken])
def test_a_model_that_knows_nothing_scores_the_floor_in_every_row(tmp_path, model, stream):
    data = made()
    lines = measure(model(data), data, Settings(steps=(0, 1, 2), capacities=(20, 40), stream=stream), tmp_path / "run")
    records = [record for part in finished(tmp_path / "run").values() for record in part]
    hits = {"q0-0"} if model is Parrot else set()
    assert {r["question"] for r in records if r["hit"]} == hits and {r["row"] for r in records} == set(ROWS)
    by_question = {(r["question"], r["hit"], r["accuracy"], r["loglik"], r["said"]) for r in records}
    assert len(by_question) == 8  # the same in every row
    kinds = Counter()
    for line in lines:
        for cell in line.cells.values():
            kinds[line.kind] += 1
            floor = {"hit": len(hits) / 8, "accuracy": len(hits) / 8, "loglik": BOTTOM if model is Mistaken else -2.5}
            if line.kind in ("row", "bound") and not line.filtered:
                assert cell.mean == floor[line.metric]
            elif line.kind == "paired":
                assert (cell.mean, cell.low, cell.high) == (0, 0, 0)
            elif line.filtered:
                assert (cell.mean, cell.low, cell.high) == (0, 0, 0)  # the one hit was known closed book
            elif line.kind == "relative":
                assert cell.mean == 1
    assert kinds["paired"] and kinds["bound"] and bool(kinds["relative"]) == bool(hits)


def test_all_samples_get_the_same_other_texts_in_one_order_and_a_filler_that_is_none_of_them(tmp_path):
    llm = Knowing(made(3, 12))
    work(llm, Settings(steps=(0, 1, 2, 4), capacities=(60,), rows=("dead", "ours")), tmp_path)
    newest = Counter()  # (the text that was asked for, the text whose word is the last slot)
    for question, context in llm.asked:
        (last,) = {layer[-1] for layer in context.layers}
        newest[int(question[1]), llm.places.get(last)] += 1
        names = [source.name for source in context.memory.sources]
        if "filler" in names:
            assert names in (["filler"], ["filler", "target"], ["filler", "target", "unrelated"])
            others = {llm.places[i] for layer in context.layers for i in layer if i} - {int(question[1]), 3, 4, 5, 6}
            assert others <= {7, 8, 9}  # the first three behind the four that are kept for the steps
    # two questions, full and empty at first, at the steps 0, 1, 2 and 4; dead slots are no text's
    asked = {(text, place): 4 for text in range(3) for place in (text, 3, 4, 6)}
    assert newest == asked | {(text, None): 2 for text in range(3)}


def test_a_checkpoint_keeps_its_own_pool_and_capacity(tmp_path):
    records = work(Checkpoint(made()), Settings(steps=(0, 1, 2), capacities=(20, 70), fills=("empty",)), tmp_path)
    assert {(r["N"], r["fill"]) for r in records} == {(0, ""), (40, "full")}
    assert {r["M"] for r in records if r["row"] == "ours"} == {40}
    found = cells(records, "hit", "row", "step")
    assert {key: found[key] for key in found if key[0] != "ours"} == {
        **{("floor", None): 0, ("dead", None): 0, ("oracle", None): 1},
        **{("window", 0): 1, ("window", 1): 1, ("window", 2): 0},
        **{("bm25", t): 1 for t in range(3)},
    }
    assert all(r["left"] == pytest.approx(seen(r), abs=1e-5) for r in records if r["row"] == "ours")


def test_bm25_is_not_given_a_text_that_shares_no_word_with_the_question():
    library = [f"town{i} cat sat on mats{i}" for i in range(8)]
    assert retention._find(library, ["which cat lives in town5?"]) == [library[5]]
    for question in ("who is it?", "zebra crossing?"):  # the newest text is the one that was asked for at step 0
        assert retention._find(library, [question]) != [library[-1]]


def test_a_question_for_which_bm25_finds_nothing_is_asked_closed_book(tmp_path):
    data = made()
    data = replace(
        data, texts=(replace(data.texts[0], questions=(Question("q0-9", "who is it", ("gold0x0",)),)), *data.texts[1:])
    )
    records = work(Knowing(data), Settings(steps=(0,), capacities=(20,), rows=("floor", "bm25")), tmp_path)
    floor, found = (r for r in records if r["question"] == "q0-9")
    assert found["left"] == 0 and found["loglik"] == floor["loglik"] == BOTTOM
    assert {r["left"] for r in records if r["row"] == "bm25" and r["question"] != "q0-9"} == {1}


@pytest.mark.parametrize("stream", [False, True])
def test_the_window_is_no_longer_than_the_model_has_room_for(tmp_path, stream):
    llm = Knowing(made())
    llm.limit = 50 + 1 + 5 + retention.LONGEST_ANSWER  # opening, question, answer
    settings = Settings(steps=(0, 1, 2), capacities=(60,), rows=("window",), stream=stream)
    records = work(llm, settings, tmp_path)
    assert cells(records, "left", "step") == {(0,): 1, (1,): 1, (2,): 0.5}  # 50 words, of texts of 20
    assert all(record["left"] == pytest.approx(seen(record), abs=1e-5) for record in records)
    assert {context.length for _, context in llm.asked} == {51} and {r["N"] for r in records} == {60}


def test_bm25_does_not_depend_on_what_else_is_asked():
    data = made()
    library = [*data.unrelated, *(t.text for t in data.texts)]
    questions = [q.question for t in data.texts for q in t.questions]
    assert retention._find(library, questions) == [t.text for t in data.texts for _ in t.questions]
    assert [retention._find(library, [q])[0] for q in questions] == retention._find(library, questions)


# --- the stream -----------------------------------------------------------------------------------------------------


def test_steps_beyond_fifty_go_to_a_stream():
    assert Settings(steps=(0, 50, 51, 200)).own == (0, 50) and Settings(steps=(0, 50, 51, 200)).streamed == (51, 200)
    assert Settings(steps=(0, 1)).streamed == () and Settings(steps=(0, 1)).own == (0, 1)
    assert Settings(steps=(0, 51), stream=True).own == () and Settings(steps=(0, 51), stream=True).streamed == (0, 51)
    assert Settings(steps=(60,)).own == ()


@pytest.mark.parametrize(("steps", "stream"), [((0, 1, 51), False), ((51, 53), False), ((0, 1, 3), True)])
def test_texts_of_a_stream_are_asked_at_their_age(tmp_path, steps, stream):
    data = made(24 if stream else 4)
    settings = Settings(steps=steps, capacities=(40,), stream=stream)
    llm = Knowing(data)
    records = work(llm, settings, tmp_path)
    streamed = [r for r in records if r.get("stream")]
    ages = settings.streamed
    assert {r["step"] for r in records if "step" in r and not r.get("stream")} == set(settings.own)
    every = [q.id for text in data.texts for q in text.questions]
    expected = {(row, t, question): 1 for row in ("window", "bm25", "ours") for t in ages for question in every}
    assert Counter((r["row"], r["step"], r["question"]) for r in streamed) == expected
    for record in streamed:
        assert record["left"] == pytest.approx(seen(record), abs=1e-5)
        assert record.get("M", 40) == record["N"] and ("M" in record) == (record["row"] == "ours")
        if record["row"] == "window":
            assert record["left"] == (LENGTH * (record["step"] + 1) <= record["N"])
        assert record["row"] != "bm25" or record["left"] == 1

    llm.asked.clear()
    only = replace(settings, rows=("ours",))
    asked = [(r["question"], r["step"]) for r in work(llm, only, tmp_path) if r.get("stream")]
    later = len(data.texts) + min(max(steps), len(data.unrelated) * 3 // 4)  # later steps begin with the first again
    for (question, age), (of, context) in zip(asked, llm.asked[-len(asked) :], strict=True):
        newest = {llm.places[layer[-1]] for layer in context.layers}
        place = int(question.split("-")[0][1:]) + age
        while place >= later:
            place -= later - len(data.texts)
        assert question == of and newest == {place}


def test_a_stream_is_one_memory_in_which_texts_follow_each_other(tmp_path):
    llm = Knowing(made(24))
    worker = Retention(llm, llm.data, Settings(steps=(0, 3), capacities=(80,), rows=("ours",), stream=True), tmp_path)
    assert [len(chain) for chain in worker.chains()] == [2]  # 24 texts and 3 more, in segments of 20
    for unit in worker.chains()[0]:
        worker.run(unit)
    memory = memories.Memory.load(tmp_path / "stream-80-1.safetensors")
    assert [s.name for s in memory.sources] == ["filler", *(f"text{i}" for i in range(24)), "unrelated"]
    assert llm.writes == 4 + 24 + 3 and memory.updates == 4 + 24 + 3


def interrupted(kind, monkeypatch, llm):
    """Break off once, in one of several places."""
    if kind == "between two units":
        return {"progress": lambda done, total: stop() if done == 1 else None}
    if kind == "within a segment":
        original, start = llm.write_ids, llm.writes

        def write_ids(*args):
            return stop() if llm.writes - start == 30 else original(*args)

        monkeypatch.setattr(llm, "write_ids", write_ids)
    else:
        add, calls = runner.Folder.add, []

        def broken(self, unit, records):
            calls.append(unit)
            if len(calls) < 2:
                return add(self, unit, records)
            if kind == "while a line is written":
                with self.records.open("a") as file:
                    file.write('{"unit": ["stream", "ours", 40, 1], "records": [{"row": "our')
            return stop()

        monkeypatch.setattr(runner.Folder, "add", broken)
    return {}


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "kind", ["between two units", "within a segment", "before a line is written", "while a line is written"]
)
def test_a_stream_that_was_killed_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, kind):
    data, settings = made(), Settings(steps=(0, 2, 51), capacities=(40,))
    whole = measure(Knowing(data), data, settings, tmp_path / "whole")
    llm = Knowing(data)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        measure(llm, data, settings, tmp_path / "parts", **interrupted(kind, patch, llm))
    done, units = finished(tmp_path / "parts"), counted(monkeypatch)
    assert list(done) == [("stream", "ours", 40, 0)]
    assert measure(llm, data, settings, tmp_path / "parts") == whole
    assert finished(tmp_path / "parts") == finished(tmp_path / "whole")
    assert set(units) == set(finished(tmp_path / "whole")) - set(done) and len(units) == len(set(units))
    assert not list(tmp_path.glob("*/stream-*")) and not list(tmp_path.glob("*/.stream-*"))


def test_a_stream_keeps_no_more_memories_than_it_needs(tmp_path):
    llm = Knowing(made(90))
    worker = Retention(llm, llm.data, Settings(steps=(0,), capacities=(40,), rows=("ours",), stream=True), tmp_path)
    for unit in worker.chains()[0]:
        worker.run(unit)
        assert len(list(tmp_path.iterdir())) <= 2


# --- a real model ---------------------------------------------------------------------------------------------------

LEADING = (  # a template with the bos in front of all, so that text in the context begins with the sink of a memory
    "{{ bos_token }}{% for m in messages %}({{ m['role'] }}) {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}(assistant) {% endif %}"
)


def small(texts=3):
    """Short texts for a model with a token per byte."""
    towns, colours = ("Zorum", "Velka", "Barin", "Ostel"), ("blue", "red", "green", "black")
    chosen = tuple(
        Text(
            f"house{i}",
            f"The house in {towns[i]} is {colours[i]}.",
            (
                Question(f"h{i}-0", f"Which colour has the house in {towns[i]}?", (colours[i],)),
                Question(f"h{i}-1", f"Where is the {colours[i]} house?", (towns[i], f"in {towns[i]}")),
            ),
        )
        for i in range(texts)
    )
    others = tuple(f"Ship {i} sailed to port {i * 37 % 11} with {i * 53 % 29} men." for i in range(16))
    return QuestionSet("synthetic", "made up", chosen, others)


def filler(llm, data, settings, N):
    """The texts that fill a memory: behind those that are kept for the steps."""
    texts, slots = [], 0
    for text in data.unrelated[max(settings.steps) :]:
        if slots < N:
            texts.append(text)
            slots += len(llm.prompts.text(text))
    return texts


@pytest.fixture(scope="module")
def llm():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LEADING
    return MemoryModel(tiny_model(), tokenizer)


@torch.no_grad()
def plainly(llm, before, question, answer, bare=True):
    """Token accuracy and log-likelihood of an answer behind text, by the plain model on all of it."""
    prompts = llm.prompts
    target = prompts.text(answer if prompts.chats else f" {answer}")  # "Answer: gold"
    ids = [*before, *prompts.question(question, bare=bare), *target]
    logits = llm.base(torch.tensor([ids])).logits[0, -len(target) - 1 : -1]
    picked = logits.log_softmax(-1)[range(len(target)), target]
    return (logits.argmax(-1) == torch.tensor(target)).double().mean().item(), picked.mean().item()


@pytest.mark.parametrize("chat", ["bos in front", "bos in every turn", "none"])
def test_a_memory_that_is_not_full_answers_as_the_text_itself(tmp_path, llm, chat):
    if chat != "bos in front":
        llm = MemoryModel(llm.base, byte_tokenizer(chat=chat != "none"))
    data = small()
    records = work(
        llm,
        Settings(steps=(0, 1, 2), capacities=(256,), fills=("empty",), rows=("oracle", "ours"), new_tokens=6),
        tmp_path,
        data,
    )
    said = {(r["row"], r.get("step"), r["question"]): r for r in records}
    texts = [f"Context: {t.text}" if chat == "none" else t.text for t in data.texts]
    others = [f"Context: {t}" if chat == "none" else t for t in data.unrelated]
    for text, own in zip(data.texts, texts, strict=True):
        for question in text.questions:
            oracle = said["oracle", None, question.id]
            opening = [1] if chat == "bos in front" else []
            read = plainly(llm, [*opening, *llm.prompts.text(own)], question.question, question.answers[0])
            assert (oracle["accuracy"], oracle["loglik"]) == pytest.approx(read, abs=1e-3)
            for t in range(3):
                ids = [i for passage in (own, *others[:t]) for i in llm.prompts.text(passage)]
                read = plainly(llm, [1, *ids], question.question, question.answers[0])
                ours = said["ours", t, question.id]
                assert (ours["accuracy"], ours["loglik"]) == pytest.approx(read, abs=1e-3)
                assert ours["left"] == 1 and ours["M"] == len(ids)
            if chat == "bos in front":  # then the law holds from record to record
                ours = said["ours", 0, question.id]
                assert (ours["said"], ours["hit"], ours["accuracy"]) == (
                    oracle["said"],
                    oracle["hit"],
                    oracle["accuracy"],
                )
                assert ours["loglik"] == pytest.approx(oracle["loglik"], abs=1e-3)


def test_the_floor_is_the_plain_model_on_the_question_alone(tmp_path, llm):
    data = small()
    for record in work(llm, Settings(steps=(0,), capacities=(64,), rows=("floor",)), tmp_path, data):
        (question,) = (q for t in data.texts for q in t.questions if q.id == record["question"])
        read = plainly(llm, [], question.question, question.answers[0], bare=False)
        assert (record["accuracy"], record["loglik"]) == pytest.approx(read, abs=1e-3)


def test_the_window_is_the_last_tokens_of_all_and_bm25_the_text_itself(tmp_path, llm):
    data = small()
    settings = Settings(steps=(0, 1, 2), capacities=(64,), rows=("oracle", "window", "bm25"), new_tokens=3)
    records = work(llm, settings, tmp_path, data)
    said = {(r["row"], r.get("step"), r["question"]): r for r in records}
    for text in data.texts:
        for question in text.questions:
            for t in settings.steps:
                passages = (*filler(llm, data, settings, 64), text.text, *data.unrelated[:t])
                ids = [i for passage in passages for i in llm.prompts.text(passage)]
                read = plainly(llm, [1, *ids[-64:]], question.question, question.answers[0])
                found = said["window", t, question.id]
                assert (found["accuracy"], found["loglik"]) == pytest.approx(read, abs=1e-3)
                alike = said["bm25", t, question.id]
                assert {**alike, "row": "oracle"} | {"N": 0, "fill": ""} == {
                    **said["oracle", None, question.id],
                    **{"step": t, "left": 1.0},
                }


def test_what_is_measured_is_what_write_and_ask_give(tmp_path, llm):
    data = small(2)
    settings = Settings(
        steps=(0, 2), capacities=(64,), memory=MemorySettings(K=32, seed=5), rows=("dead", "ours"), new_tokens=6
    )
    records = work(llm, settings, tmp_path, data)
    said = {(r["row"], r["fill"], r.get("step"), r["question"]): r for r in records}
    full = llm.empty(N=64, K=32, seed=5)
    for text in filler(llm, data, settings, 64):
        full = llm.write(full, text)
    assert full.M == 64
    dead = replace(full, slots=torch.zeros_like(full.slots))
    for text in data.texts:
        by_fill = {}
        for fill, start in (("full", full), ("empty", llm.empty(N=64, K=32, seed=5))):
            memory = llm.write(start.with_settings(seed=retention._seed(5, text.id)), text.text)
            by_fill[fill, 0] = memory
            by_fill[fill, 2] = llm.write(llm.write(memory, data.unrelated[0]), data.unrelated[1])
        for question in text.questions:
            behind = {("ours", *key): memory for key, memory in by_fill.items()} | {("dead", "full", None): dead}
            for key, memory in behind.items():
                score = llm.score(
                    memory, llm.prompts.question(question.question, bare=True), llm.prompts.text(question.answers[0])
                )
                record = said[(*key, question.id)]
                assert record["said"] == llm.ask(memory, question.question, max_new_tokens=6)
                assert record["loglik"] == pytest.approx(score.logprobs.mean().item(), abs=1e-4)
                assert record["accuracy"] == pytest.approx(score.hits.double().mean().item(), abs=1e-6)
                assert record["hit"] == any(a.lower() in record["said"].lower() for a in question.answers)


def test_results_depend_neither_on_other_samples_nor_on_the_order_of_work(tmp_path, llm):
    data, settings = small(2), Settings(steps=(0, 2), capacities=(64,), new_tokens=2)
    worker = Retention(llm, data, settings, tmp_path)
    together = {unit: worker.run(unit) for unit in worker.units()}
    shuffled = worker.units()
    Random(0).shuffle(shuffled)
    again = Retention(llm, data, settings, tmp_path)
    assert {unit: again.run(unit) for unit in shuffled} == together
    for i, text in enumerate(data.texts):
        alone = Retention(llm, replace(data, texts=(text,)), settings, tmp_path)
        for unit in alone.units():
            assert alone.run(unit) == together[*unit[:3], i]


def test_the_seed_decides_every_drop(tmp_path, llm):
    data = small(2)
    settings = Settings(steps=(0, 1), capacities=(64,), rows=("floor", "window", "ours"), new_tokens=2)
    first, same, other = (
        work(llm, replace(settings, memory=MemorySettings(K=512, seed=seed)), tmp_path, data) for seed in (0, 0, 1)
    )
    assert first == same
    assert [r for r in first if r["row"] != "ours"] == [r for r in other if r["row"] != "ours"]
    full = [
        (a, b) for a, b in zip(first, other, strict=True) if a.get("step") == 1 and a["fill"] == "full" and "M" in a
    ]
    assert full and all(a["loglik"] != b["loglik"] for a, b in full)
    assert len({retention._seed(seed, name) for seed in range(20) for name in ("a", "b", "stream")}) == 60


@pytest.mark.parametrize(("K", "compression"), [(512, 1), (16, 1), (24, 3)])
def test_a_memory_that_is_full_at_first_stays_full(tmp_path, llm, K, compression):
    data = small(2)
    settings = Settings(
        steps=(0, 1, 2),
        capacities=(64,),
        rows=("ours",),
        memory=MemorySettings(None, K, compression=compression),
        new_tokens=2,
    )
    records = work(llm, settings, tmp_path, data)
    assert {r["M"] / r["N"] for r in records if r["fill"] == "full"} == {1.0}
    for record in records:
        (text,) = (t for t in data.texts if t.id == record["text"])
        slots = 0
        for passage in (text.text, *data.unrelated[: record["step"]]):
            pieces = torch.tensor(llm.prompts.text(passage)).split(min(K, record["N"]) * compression)
            slots += sum(-(-len(piece) // compression) for piece in pieces)
        if record["fill"] == "empty":
            assert record["M"] == min(record["N"], slots)
        assert 0 <= record["left"] <= 1 and (record["left"] == 1 or record["M"] == record["N"])


def test_a_stream_of_a_real_model_goes_on_after_a_kill(tmp_path, llm, monkeypatch):
    monkeypatch.setattr(retention, "SEGMENT", 2)
    data, settings = small(), Settings(steps=(0, 2), capacities=(64,), stream=True, new_tokens=3)
    whole = measure(llm, data, settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measure(llm, data, settings, tmp_path / "parts", progress=lambda done, total: stop() if done == 1 else None)
    assert measure(MemoryModel(llm.base, llm.tokenizer), data, settings, tmp_path / "parts") == whole
    assert finished(tmp_path / "parts") == finished(tmp_path / "whole")
    records = [r for part in finished(tmp_path / "whole").values() for r in part]
    left = cells([r for r in records if r["row"] == "ours"], "left", "row", "step")
    assert left["ours", 0] == 1 and 0 < left["ours", 2] < 0.6


# --- settings -------------------------------------------------------------------------------------------------------


def test_questions_that_leave_no_room_for_a_text_are_refused(tmp_path):
    llm = Knowing(made(4))
    with pytest.raises(ValueError, match="leave no room for a text in this model's context"):
        Retention(llm, llm.data, Settings(steps=(0,), capacities=(40,), rows=("ours",), new_tokens=10**6), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"steps": ()}, "steps must be ascending"),
        ({"steps": (1, 0)}, "got 1, 0"),
        ({"steps": (0, 0)}, "steps must be ascending"),
        ({"steps": (-1, 0)}, "numbers from 0, got -1, 0"),
        ({"rows": ("floor", "roof")}, "rows must be some of floor, dead, oracle, window, bm25, ours, got floor, roof"),
        ({"rows": ()}, "rows must be some of .*got none"),
        ({"fills": ("half",)}, "fills must be some of full, empty, got half"),
        ({"fills": ()}, "fills must be .*got none"),
        ({"rows": ("ours", "ours")}, "rows must be some of .*got ours, ours"),
        ({"capacities": (64, 64)}, "capacities must differ, got 64, 64"),
        ({"fills": ("empty",), "stream": True}, "a stream .*begins with a full memory: add the fill 'full'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**wrong)


def test_too_few_texts_to_fill_a_memory_are_refused_at_once(tmp_path):
    data = made(4, 12)
    with pytest.raises(ValueError, match="too few unrelated texts to fill a memory of N=240 slots; choose a smaller"):
        measure(Knowing(data), data, Settings(steps=(0, 1), capacities=(40, 240)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    work(Knowing(data), Settings(steps=(0, 1), capacities=(220,), rows=("ours",)), tmp_path)


def test_workers_need_to_know_what_to_load(tmp_path):
    data = made()
    with pytest.raises(ValueError, match="more than one worker needs `loading`"):
        measure(Knowing(data), data, Settings(steps=(0, 1), capacities=(40,)), tmp_path / "run", workers=2)


# --- what is left in the folder -------------------------------------------------------------------------------------

QUICK = Settings(steps=(0, 1, 2), capacities=(40,))


def finished(folder):
    """Records by unit, as they stand in the folder."""
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return {tuple(line["unit"]): line["records"] for line in map(json.loads, lines)}


def counted(monkeypatch):
    """A list of the units that are run from now on."""
    run, units = Retention.run, []

    def counting(self, unit):
        units.append(unit)
        return run(self, unit)

    monkeypatch.setattr(Retention, "run", counting)
    return units


def test_a_run_leaves_everything_that_is_needed_to_look_at_it_and_to_check_it(tmp_path, plotted):
    data, calls = made(), []
    llm = Knowing(data)
    says = llm.says
    llm.says = lambda context, ids: llm.prompts.text("<b>no</b> & idea") if context.length == 0 else says(context, ids)
    out = tmp_path / "deep" / "run"
    lines = measure(
        llm, data, QUICK, out, command="latentmem eval this", drawn={"seed": 3}, progress=lambda *x: calls.append(x)
    )
    names = {"config.json", "records.jsonl", "summary.json", "table.md", "plot.png", "report.html"}
    assert {p.name for p in out.iterdir() if p.name != runner.LOCK} == names
    units = Retention(llm, data, QUICK, out).units()
    assert list(finished(out)) == units and calls == [(i, len(units)) for i in range(len(units) + 1)]
    assert [r for part in finished(out).values() for r in part] == work(llm, QUICK, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["config"]["data"] == {"name": "synthetic", "source": "made up", "sha256": data.identity, "seed": 3}
    assert config["config"]["settings"]["steps"] == [0, 1, 2] and config["config"]["model"]["dtype"] == "float32"
    (run,) = config["runs"]
    assert run["command"] == "latentmem eval this" and run["versions"]["torch"] == torch.__version__
    found = json.loads((out / "summary.json").read_text())
    assert (
        found["lines"] == json.loads(json.dumps(summary.as_json(lines)))
        and found["settings"] == config["config"]["settings"]
    )
    assert found["samples"] == [[t.id, [q.id for q in t.questions]] for t in data.texts]
    table = (out / "table.md").read_text()
    assert (
        table.endswith(summary.markdown(lines))
        and "8 questions about 4 texts" in table
        and "```\nlatentmem eval this\n```" in table
    )
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "&lt;b&gt;no&lt;/b&gt; &amp; idea" in page and "<b>" not in page and "http" not in page
    assert "data:image/png;base64," in page and "gold0x0 crown0x0" in page and "ours, t = 2" in page


@pytest.mark.parametrize("cut", [1, 40, 0.3, 0.9])
def test_a_run_whose_last_line_was_torn_does_what_is_missing_and_no_more(tmp_path, monkeypatch, cut):
    data, out = made(), tmp_path / "run"
    lines = measure(Knowing(data), data, QUICK, out)
    whole, written = finished(out), (out / "records.jsonl").read_bytes()
    kept = written[: -cut if cut >= 1 else int(len(written) * cut)]
    assert not kept.endswith(b"\n")
    (out / "records.jsonl").write_bytes(kept)
    units = counted(monkeypatch)
    assert measure(Knowing(data), data, QUICK, out) == lines
    assert units == list(whole)[kept.count(b"\n") :] and 0 < len(units) < len(whole)
    assert finished(out) == whole and (out / "records.jsonl").read_bytes() == written
    units.clear()
    assert measure(Knowing(data), data, QUICK, out, command="once more") == lines and units == []
    assert [run["command"] for run in json.loads((out / "config.json").read_text())["runs"]] == ["", "", "once more"]


ADDED = [  # what is added to the first
    {"rows": ("floor", "bm25", "ours"), "fills": ("full",), "capacities": (20,)},
    {"rows": ("oracle", "ours"), "fills": ("empty",), "capacities": (40,)},
    {"rows": ROWS, "fills": ("empty", "full"), "capacities": (20, 40)},
]


def test_rows_fills_and_capacities_are_added_to_a_folder(tmp_path, monkeypatch):
    data = made()
    whole = measure(Knowing(data), data, replace(QUICK, capacities=(20, 40)), tmp_path / "whole")
    units = counted(monkeypatch)
    for more in ADDED:
        lines = measure(Knowing(data), data, replace(QUICK, **more), tmp_path / "parts")
    assert lines == whole and finished(tmp_path / "parts") == finished(tmp_path / "whole")
    assert len(units) == len(set(units)) == len(finished(tmp_path / "whole"))
    once_more = measure(Knowing(data), data, replace(QUICK, rows=("floor",)), tmp_path / "parts")
    assert once_more == whole and len(units) == len(set(units))  # all that the folder holds


def test_rows_and_capacities_are_added_to_a_stream(tmp_path):
    data, settings = made(), replace(QUICK, stream=True, capacities=(20, 40))
    whole = measure(Knowing(data), data, settings, tmp_path / "whole")
    for more in ADDED:
        lines = measure(Knowing(data), data, replace(settings, **more | {"fills": ("full",)}), tmp_path / "parts")
    assert {(x.N, x.row, x.kind, x.metric) for x in whole} == {(x.N, x.row, x.kind, x.metric) for x in lines}
    assert lines == whole


def test_a_stream_that_was_killed_goes_on_after_another_capacity_was_measured(tmp_path):
    data, settings = made(24), replace(QUICK, stream=True, rows=("floor", "oracle", "ours"))
    whole = measure(Knowing(data), data, replace(settings, capacities=(40, 60)), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measure(Knowing(data), data, settings, tmp_path / "run", progress=lambda done, total: stop() if done else None)
    measure(Knowing(data), data, replace(settings, capacities=(60,)), tmp_path / "run")
    lines = measure(Knowing(data), data, replace(settings, capacities=(40, 60)), tmp_path / "run")
    assert lines == whole and not list((tmp_path / "run").glob("stream-*"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_is_stopped_shows_what_is_finished(tmp_path, stream):
    data, out = made(24 if stream else 4), tmp_path / "run"
    settings = replace(QUICK, stream=stream)

    def until(count):
        with pytest.raises(KeyboardInterrupt):
            measure(Knowing(data), data, settings, out, progress=lambda done, total: stop() if done == count else None)

    until(0)
    assert {p.name for p in out.iterdir() if p.name != runner.LOCK} == {"config.json"}
    if not stream:
        until(6)  # the first text
        assert {p.name for p in out.iterdir() if p.name != runner.LOCK} == {"config.json", "records.jsonl"}
    until(1 if stream else 20)
    assert {"table.md", "summary.json", "plot.png", "report.html"} <= {
        p.name for p in out.iterdir() if p.name != runner.LOCK
    }
    found = json.loads((out / "summary.json").read_text())["lines"]
    texts = {cell["texts"] for line in found for cell in line["cells"].values()}
    assert texts <= ({18, 19, 20} if stream else {2, 3, 4})
    assert measure(Knowing(data), data, settings, out) == measure(Knowing(data), data, settings, tmp_path / "whole")


def test_a_folder_of_another_question_is_refused_and_left_alone(tmp_path):
    data, out = made(), tmp_path / "run"
    measure(Knowing(data), data, QUICK, out)
    before = {p: p.read_bytes() for p in out.iterdir()}
    other_text = replace(data, texts=(*data.texts[:3], replace(data.texts[3], text="other words")))
    renamed = Knowing(data)
    renamed.identity = "other weights"
    for model, asked, settings, what in (
        (
            Knowing(data),
            data,
            replace(QUICK, memory=MemorySettings(K=512, seed=1)),
            "settings.memory.seed is 0 there and 1 here",
        ),
        (Knowing(data), data, replace(QUICK, steps=(0, 1)), r"settings.steps is \[0, 1, 2\] there and \[0, 1\] here"),
        (Knowing(other_text), other_text, QUICK, r"data.sha256 is \S+ there and \S+ here"),
        (renamed, data, QUICK, "model.sha256 is .none. there and .other weights. here"),
        (renamed, other_text, QUICK, "model.sha256 is .* here; data.sha256 is .* here"),
    ):
        with pytest.raises(ValueError, match=f"holds another run: {what}. Choose another folder"):
            measure(model, asked, settings, out)
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_a_folder_that_another_process_works_on_is_refused(tmp_path):
    data, out = made(), tmp_path / "run"

    def meanwhile(done, total):
        with pytest.raises(ValueError, match=r"another process is measuring into .*run: wait for it, or choose"):
            measure(Knowing(data), data, QUICK, out)

    lines = measure(Knowing(data), data, QUICK, out, command="first", progress=meanwhile)
    assert [run["command"] for run in json.loads((out / "config.json").read_text())["runs"]] == ["first"]
    assert measure(Knowing(data), data, QUICK, out) == lines  # it is free again


def test_damaged_files_are_named(tmp_path):
    data, out = made(), tmp_path / "run"
    lines = measure(Knowing(data), data, QUICK, out)
    written = (out / "records.jsonl").read_bytes().splitlines(keepends=True)
    (out / "records.jsonl").write_bytes(b"".join([*written[:3], b'{"unit": [\n', *written[4:]]))
    with pytest.raises(ValueError, match=r"line 4 of .*records.jsonl is damaged; remove it, and the run does its unit"):
        measure(Knowing(data), data, QUICK, out)
    (out / "records.jsonl").write_bytes(b"".join([*written[:3], *written[4:]]))
    assert measure(Knowing(data), data, QUICK, out) == lines
    for other in ('{"model_type": "llama"}', "[1]", "not JSON"):
        (out / "config.json").write_text(other)
        with pytest.raises(ValueError, match=r"config.json was not written by a run; choose another folder"):
            measure(Knowing(data), data, QUICK, out)
        assert (out / "config.json").read_text() == other


class Killed:
    """A worker whose process is killed in the middle of its second unit."""

    def units(self):
        return [("unit", i) for i in range(6)]

    def chains(self):
        return []

    def run(self, unit):
        if unit[1] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return [{"row": "floor"}]


def test_a_worker_that_is_killed_is_one_sentence_and_what_is_finished_is_kept(tmp_path):
    folder = runner.Folder(tmp_path / "run", {})
    with pytest.raises(ValueError, match=r"a worker was killed.* same command with fewer --workers"):
        runner.run(folder, Killed(), Killed, (), 2, lambda done, total: None)
    assert set(folder.done()) <= {("unit", i) for i in range(6)} - {("unit", 1)}


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    data = made()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        measure(Knowing(data), data, QUICK, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    measure(Knowing(data), data, replace(QUICK, rows=("ours",)), tmp_path / "empty")


@pytest.mark.parametrize("rows", [("floor", "oracle"), ("floor", "dead", "oracle"), ("window",), ("ours",), ROWS])
@pytest.mark.parametrize("texts", [1, 2])
def test_a_run_that_has_little_to_show_is_finished_or_refused_before_it_begins(tmp_path, plotted, rows, texts):
    data = made(texts)
    llm = Knowing(data)
    try:
        lines = measure(llm, data, replace(QUICK, rows=rows), tmp_path / "run")
    except ValueError:
        assert not llm.asked
    else:
        assert bool(lines) == (texts > 1) and (tmp_path / "run" / "report.html").exists()


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(home, tiny_folder, monkeypatch, capsys):
    """Run `latentmem eval retention` on the tiny model and give (exit code, standard output, standard error)."""
    monkeypatch.delenv("LATENTMEM_DATA", raising=False)
    monkeypatch.setattr(questions, "UNRELATED", 40)

    def command(out, **options):
        given = {"model": tiny_folder, "questions": 10, "steps": "0,1", "capacity": 64, "device": "cpu"}
        given |= {"dtype": "float32", "workers": 1, "data": "synthetic", **options}
        args = [
            f"--{key.replace('_', '-')}" + (f"={value}" if value is not None else "") for key, value in given.items()
        ]
        monkeypatch.setattr(sys, "argv", ["latentmem", "eval", "retention", "--out", str(out), *args])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return command


def test_one_process_and_two_give_the_same_records(run, tmp_path):
    code, out, _ = run(tmp_path / "one", rows="floor,bm25,ours")
    assert code == 0 and "Token accuracy, N = 64" in out and f"are in {tmp_path / 'one'}" in out.replace("\n", "")
    assert run(tmp_path / "two", rows="floor,bm25,ours", workers=2)[0] == 0
    one, two = finished(tmp_path / "one"), finished(tmp_path / "two")
    assert set(one) == set(two) and len(one) == 2 * 4
    for unit, records in one.items():
        for a, b in zip(records, two[unit], strict=True):
            assert {**a, "loglik": 0} == {**b, "loglik": 0} and a["loglik"] == pytest.approx(b["loglik"], abs=1e-4)
    config = json.loads((tmp_path / "two" / "config.json").read_text())["config"]
    assert config == json.loads((tmp_path / "one" / "config.json").read_text())["config"]
    assert config["data"]["questions"] == 10 and config["settings"]["new_tokens"] == 20
    every = [record for part in one.values() for record in part]
    assert Counter((r["row"], r["fill"], r.get("step")) for r in every) == {
        ("floor", "", None): 10,
        **{(row, fill, t): 10 for row, fill in (("bm25", "full"), ("ours", "full"), ("ours", "empty")) for t in (0, 1)},
    }


def test_a_command_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    assert run(tmp_path / "run", rows="floor,ours", new_tokens=3)[0] == 0
    records = tmp_path / "run" / "records.jsonl"
    written = records.read_bytes()
    records.write_bytes(written[: len(written) // 2])
    units = counted(monkeypatch)
    assert run(tmp_path / "run", rows="floor,ours", new_tokens=3)[0] == 0
    assert records.read_bytes() == written and 0 < len(units) < 6
    code, _, err = run(tmp_path / "run", rows="floor", steps="0,2", new_tokens=3)
    assert (
        code == 2
        and "settings.steps is [0, 1] there and [0, 2] here" in " ".join(err.split())
        and records.read_bytes() == written
    )


def test_a_command_that_is_stopped_says_how_to_go_on(run, tmp_path, monkeypatch):
    original = Retention.run
    monkeypatch.setattr(Retention, "run", lambda self, unit: stop() if unit[-1] == 1 else original(self, unit))
    code, _, err = run(tmp_path / "run", rows="floor,ours", new_tokens=3)
    assert code == 130 and "the same command goes on from there" in " ".join(err.split()) and "Traceback" not in err
    assert len(finished(tmp_path / "run")) == 3
    monkeypatch.setattr(Retention, "run", original)
    assert run(tmp_path / "run", rows="floor,ours", new_tokens=3)[0] == 0 and len(finished(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": "0,x"}, "--steps takes numbers with commas in between, such as 0,1,5: got '0,x'"),
        ({"steps": ""}, "--steps takes numbers"),
        ({"steps": "2,1"}, "steps must be ascending numbers from 0, got 2, 1"),
        ({"steps": "-1,0"}, "got -1, 0"),
        ({"capacity": "64;128"}, "--capacity takes numbers"),
        ({"capacity": "0"}, "N=0"),
        ({"capacity": "1000"}, "Choose a smaller N"),
        ({"per_update": "0"}, "got K=0"),
        ({"rows": "floor,roof"}, "rows must be some of floor, dead, oracle, window, bm25, ours, got floor, roof"),
        ({"rows": ""}, "rows must be some of"),
        ({"fill": "half"}, "fills must be some of full, empty, got half"),
        ({"data": "trivia"}, "the question set must be one of squad, nq, synthetic, got 'trivia'"),
        ({"per_text": "6"}, "synthetic has 0 texts with at least 6 questions"),
        ({"dtype": "int3"}, "int3"),
        ({"model": "no-such-model"}, "unknown model 'no-such-model'"),
        ({"questions": "0"}, "--questions"),
        ({"quick": None}, "--quick chooses --questions, --steps and --capacity itself"),
        ({"workers": "0"}, "--workers"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(run, tmp_path, options, sentence):
    code, out, err = run(tmp_path / "run", **options)
    assert code == 2 and "Traceback" not in err and not (tmp_path / "run").exists()
    assert sentence in " ".join((out + err).replace("│", " ").split())


def test_data_that_is_not_there_is_one_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTMEM_DATA", str(tmp_path))
    code, _, err = run(tmp_path / "run", data="squad")
    assert code == 2 and "squad/eval_titles.jsonl.gz is not there" in err and "Traceback" not in err
