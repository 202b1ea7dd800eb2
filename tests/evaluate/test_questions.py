"""Sets of texts with questions: what they hold, what the filters leave out, and what is said when data is missing."""

import gzip
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from latentmem.evaluate.data import questions, synthetic

REAL = Path(os.environ.get("LATENTMEM_DATA") or "nowhere")
SQUAD = ("squad/eval_titles.jsonl.gz", "squad/train_13_titles.jsonl.gz")
NQ = ("nq/eval.jsonl.gz",)


def words(text):
    """A token is a word."""
    return len(text.split())


def long(n, *, about="mill", holds="Aurelia"):
    """A text of n words that begins with `holds`."""
    return " ".join([holds, *(f"{about}{i}" for i in range(n - words(holds)))])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Write files of rows into a folder of data and point LATENTMEM_DATA at it."""

    def write(files):
        monkeypatch.setenv("LATENTMEM_DATA", str(tmp_path))
        for name, rows in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    return write


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` package that gives what a test puts into it by name; what was asked for is in `.asked`."""
    monkeypatch.delenv("LATENTMEM_DATA", raising=False)
    module = ModuleType("datasets")
    module.there, module.asked = {}, []

    def load_dataset(name, *args, **kwargs):
        module.asked.append((name, args, kwargs))
        found = module.there[name]
        if isinstance(found, Exception):
            raise found
        return found

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


class Streamed:
    """Rows that come one by one, and may fail on the way."""

    def __init__(self, rows, error=None):
        self.rows, self.error, self.taken = rows, error, None

    def __iter__(self):
        yield from self.rows
        if self.error:
            raise self.error

    def take(self, n):
        self.taken = n
        return Streamed(self.rows[:n], self.error)


def squad_rows(texts=12, per_text=3, *, title="Valleys"):
    return [
        {
            "id": f"{title}-{i}-{j}",
            "title": f"{title} {i}",
            "context": f"{title} {i}: the river is named Aar{i} and its {per_text} bridges are Old{i}, Mid{i}, New{i}.",
            "question": f"Which bridge of {title} {i} has the number {j}?",
            "answers": {"text": [("Old", "Mid", "New")[j % 3] + str(i), "a bridge"]},
        }
        for i in range(texts)
        for j in range(per_text)
    ]


def nq_row(i, context, answers=("Aurelia",), title=None):
    title = title or f"Page {i}"
    return {"id": i, "title": title, "context": context, "question": f"who is number {i}", "answers": list(answers)}


def nq_rows(fitting=8, others=6):
    good = [nq_row(i, long(20 + i, about=f"good{i}x")) for i in range(fitting)]
    return good + [
        nq_row(100 + i, long(20 + i, about=f"other{i}x"), ["an answer of six whole words"]) for i in range(others)
    ]


def drawn(name, *, count=words, n=6, per_text=1, seed=0):
    return questions.load(name, count, questions=n, per_text=per_text, seed=seed)


# --- synthetic ------------------------------------------------------------------------------------------------------


def test_a_synthetic_text_is_a_pure_function_of_seed_and_index():
    first = [synthetic.text(3, i) for i in range(50)]
    backwards = [synthetic.text(3, i) for i in reversed(range(50))]
    assert first == backwards[::-1] and len({t.text for t in first}) == 50
    assert not {t.text for t in first} & {synthetic.text(4, i).text for i in range(50)}
    assert all(a.questions != synthetic.text(4, i).questions for i, a in enumerate(first))


def test_no_two_synthetic_people_share_a_name():
    border = len(synthetic.SYLLABLES) ** 3
    starts = {a for a in synthetic.SYLLABLES for b in synthetic.SYLLABLES if a != b and b.startswith(a)}
    assert not starts and len(set(synthetic.SYLLABLES)) == len(synthetic.SYLLABLES)  # so a name has one reading
    for seed in (0, 1, 12_345):
        indices = [*range(3000), *range(border - 1500, border + 1500)]
        names = {synthetic.text(seed, i).text.split()[0] for i in indices[:: 1 if seed == 0 else 7]}
        assert len(names) == len(indices[:: 1 if seed == 0 else 7])
    assert len({synthetic._person(0, i) for i in range(border)}) == border
    assert synthetic.text(0, border - 1) != synthetic.text(0, border)


@pytest.mark.parametrize("seed", [0, 7])
def test_synthetic_questions_name_the_person_and_have_their_answers_in_the_text(seed):
    for i in (*range(300), 50**3 - 1, 50**3, 50**3 + 1):
        text = synthetic.text(seed, i)
        who = text.text.split()[0]
        assert text.text.startswith(f"{who} is a ") and len(text.questions) == len(synthetic.FACTS) == 5
        assert len({q.id for q in text.questions}) == len({q.question for q in text.questions}) == 5
        for question in text.questions:
            (answer,) = question.answers
            assert who in question.question and answer in text.text and answer not in question.question


def test_synthetic_facts_come_in_every_order_and_wording():
    texts = [synthetic.text(0, i) for i in range(400)]
    orders = {tuple(sorted(range(5), key=lambda j: t.text.index(t.questions[j].answers[0]))) for t in texts}
    assert len(orders) > 80  # of 120
    for number, (_, *ways) in enumerate(synthetic.FACTS):
        said = [
            [way.format(who=t.text.split()[0], a=t.questions[number].answers[0]) in t.text for way in ways]
            for t in texts
        ]
        assert all(sum(one) == 1 for one in said) and len(ways) == 3
        assert min(sum(way) for way in zip(*said, strict=True)) > 80  # of 133


def test_synthetic_answers_hardly_collide():
    texts = [synthetic.text(0, i) for i in range(1000)]
    for number in range(5):
        given = [t.questions[number].answers[0] for t in texts]
        same = sum(a == b for i, a in enumerate(given) for b in given[:i]) / (len(given) * (len(given) - 1) / 2)
        assert same < 1 / 500
    inside = sum(
        any(a is not b and a.answers[0] in b.answers[0] for a in t.questions for b in t.questions) for t in texts
    )
    assert inside < len(texts) / 100  # a locker's number within a year


def test_a_synthetic_set_has_other_texts_as_targets_than_as_unrelated_ones():
    data = drawn("synthetic", n=40, per_text=5)
    assert len(data.texts) == 8 and len(data.unrelated) == questions.UNRELATED
    assert not {t.text for t in data.texts} & set(data.unrelated)
    assert not {t.text.split()[0] for t in data.texts} & {t.split()[0] for t in data.unrelated}
    assert all(len(t.questions) == 5 for t in data.texts) and data.source == "invented, seed 0"
    assert data == drawn("synthetic", n=40, per_text=5)
    assert data.identity == drawn("synthetic", n=40, per_text=5).identity
    assert data.identity != drawn("synthetic", n=40, per_text=5, seed=1).identity
    assert [len(t.questions) for t in drawn("synthetic", n=3, per_text=2).texts] == [2, 2]


# --- SQuAD and Natural Questions in a folder ------------------------------------------------------------------------


def test_squad_keeps_questions_with_short_answers(folder):
    rows = squad_rows(6)
    rows[0]["answers"]["text"] = ["four words are more", "Old0"]  # the first one counts
    rows[1]["answers"]["text"] = []  # unanswerable
    rows[2]["answers"]["text"] = ["exactly three words"]
    folder({SQUAD[0]: rows, SQUAD[1]: squad_rows(4, title="Hills")})
    data = drawn("squad", n=6)
    kept = {q.id: q for t in data.texts for q in t.questions}
    assert len(data.texts) == 6 and "Valleys-0-2" in kept and not {"Valleys-0-0", "Valleys-0-1"} & set(kept)
    assert kept["Valleys-0-2"].answers == ("exactly three words",)
    assert all(len(q.answers) == 1 for q in kept.values())
    contexts = {row["id"]: row["context"] for row in rows}
    assert all(t.text == contexts[q.id] for t in data.texts for q in t.questions)
    assert sorted(data.unrelated) == sorted({row["context"] for row in squad_rows(4, title="Hills")})


def test_texts_with_too_few_questions_are_left_out(folder):
    folder({SQUAD[0]: squad_rows(5) + squad_rows(4, 2, title="Lakes"), SQUAD[1]: squad_rows(2, title="Hills")})
    three = drawn("squad", n=15, per_text=3)
    assert len(three.texts) == 5 and all(len(t.questions) == 3 and t.text.startswith("Valleys") for t in three.texts)
    assert len(drawn("squad", n=18, per_text=2).texts) == 9
    with pytest.raises(ValueError, match=r"has 5 texts with at least 3 questions.*; 6 were asked for. Ask for fewer"):
        drawn("squad", n=16, per_text=3)


def test_natural_questions_are_filtered_by_tokens(folder):
    rows = [
        nq_row(15, long(15)),
        nq_row(16, long(16, about="b")),
        nq_row(512, long(512, about="c")),
        nq_row(513, long(513, about="d")),
        nq_row(
            4, long(40, about="e", holds="four words are right"), ["four words are right", "five would be too many"]
        ),
        nq_row(5, long(40, about="f", holds="five words are too many"), ["five words are too many"]),
        nq_row(6, long(40, about="g"), ["Cornelia"]),  # not in the text
    ]
    folder({NQ[0]: rows})
    data = drawn("nq", n=3)
    assert {q.id for t in data.texts for q in t.questions} == {"nq-16", "nq-512", "nq-4"}
    assert {q.question for t in data.texts for q in t.questions} == {f"who is number {i}?" for i in (16, 512, 4)}
    assert {t.questions[0].answers for t in data.texts} == {
        ("Aurelia",),
        ("four words are right", "five would be too many"),
    }
    assert sorted(data.unrelated) == sorted(rows[i]["context"] for i in (0, 5, 6))  # 513 is too long for those as well
    with pytest.raises(ValueError, match="nq has 3 texts with at least 1 questions"):
        drawn("nq", n=4)


@pytest.mark.parametrize("name", questions.NAMES)
def test_the_draw_depends_on_the_seed_alone(folder, name):
    folder({SQUAD[0]: squad_rows(), SQUAD[1]: squad_rows(title="Hills"), NQ[0]: nq_rows(12, 12)})
    data, again, other = (drawn(name, seed=seed) for seed in (0, 0, 1))
    assert data == again and data.identity == again.identity and data.name == name
    assert data.identity != other.identity
    assert [t.id for t in data.texts] != [t.id for t in other.texts] and data.unrelated != other.unrelated
    if name != "synthetic":  # a larger set begins with the smaller one
        assert drawn(name, n=8).texts[:6] == data.texts and set(other.unrelated) == set(data.unrelated)
        assert [t.id for t in data.texts] != [t.id for t in sorted(data.texts, key=lambda t: t.text)]


def test_no_unrelated_text_shares_a_title_with_a_target(folder):
    rows = [*nq_rows(4, 4), nq_row(200, long(30, about="twin"), ["Cornelia"], title="Page 0")]
    folder({NQ[0]: rows})
    for seed in range(3):
        data = drawn("nq", n=2, seed=seed)  # also of targets that were not drawn
        assert sorted(data.unrelated) == sorted(row["context"] for row in rows[4:8])


@pytest.mark.parametrize("name", ["squad", "nq"])
def test_no_unrelated_text_is_a_target_even_where_the_data_repeats_itself(folder, name):
    train, nq = squad_rows(4, title="Hills"), nq_rows(4, 4)
    train.append({**squad_rows(1)[0], "title": "Hills 9"})
    nq.append({**nq[0], "id": 300, "title": "Page 300", "answers": ["an answer of six whole words"]})
    folder({SQUAD[0]: squad_rows(4), SQUAD[1]: train, NQ[0]: nq})
    data = drawn(name, n=4)
    assert len(data.texts) == 4 and len(data.unrelated) >= 4
    assert not {t.text for t in data.texts} & set(data.unrelated)


def test_unrelated_texts_are_different_and_of_512_tokens_at_most(folder):
    train = [
        {**squad_rows(1)[0], "context": context}
        for context in (long(512, about="a"), long(513, about="b"), long(20), long(20))
    ]
    folder({SQUAD[0]: squad_rows(3), SQUAD[1]: train})
    assert sorted(drawn("squad", n=3).unrelated) == sorted([long(512, about="a"), long(20)])


def test_missing_data_and_unknown_names_are_one_sentence(folder):
    folder({})
    for name, path in (("squad", SQUAD[0]), ("nq", NQ[0])):
        with pytest.raises(ValueError, match=f"LATENTMEM_DATA is .*{path} is not there.*unset it"):
            drawn(name)
    folder({SQUAD[0]: squad_rows()})
    with pytest.raises(ValueError, match=SQUAD[1]):
        drawn("squad")
    with pytest.raises(ValueError, match="must be one of squad, nq, synthetic, got 'trivia'"):
        drawn("trivia")


# --- the hub --------------------------------------------------------------------------------------------------------


def hub_row(i, tokens, long_answers, short_answers, title="Page"):
    """A row as google-research-datasets/natural_questions has it; tokens in angle brackets are HTML."""
    return {
        "id": str(i),
        "document": {
            "title": f"{title} {i}",
            "tokens": {"token": tokens, "is_html": [t.startswith("<") for t in tokens]},
        },
        "question": {"text": f"who is number {i}", "tokens": []},
        "annotations": {
            "id": [str(j) for j in range(len(long_answers))],
            "long_answer": [{"start_token": a, "end_token": b, "candidate_index": 0} for a, b in long_answers],
            "short_answers": [{"start_token": [], "end_token": [], "text": texts} for texts in short_answers],
            "yes_no_answer": [-1] * len(long_answers),
        },
    }


def test_natural_questions_of_the_hub_become_rows():
    text = "<H1> Towns </H1> <P> The mayor is <B> Ada Lind </B> of Zorum . </P> <P> Nothing here . </P>"
    tokens = text.split()
    rows = [
        hub_row(1, tokens, [(-1, -1), (15, 20), (3, 15), (0, 3)], [[], [], ["Ada Lind", "Ada Lind", "Lind"], ["x"]]),
        hub_row(2, tokens, [(-1, -1), (3, 15)], [["Ada Lind"], []]),  # short without long, long without short
        hub_row(3, tokens, [], []),
        hub_row(4, tokens, [(0, 15)], [["Zorum"]]),
    ]
    assert list(questions.natural_questions(iter(rows))) == [
        {
            "id": "1",
            "title": "Page 1",
            "context": "The mayor is Ada Lind of Zorum .",
            "question": "who is number 1",
            "answers": ["Ada Lind", "Lind"],
        },
        {
            "id": "4",
            "title": "Page 4",
            "context": "Towns The mayor is Ada Lind of Zorum .",
            "question": "who is number 4",
            "answers": ["Zorum"],
        },
    ]


def test_squad_comes_from_the_hub(hub):
    train = Streamed([row for i in range(3) for row in squad_rows(500, 3, title=f"Hills {i}")])
    hub.there = {"rajpurkar/squad_v2": squad_rows(6), "rajpurkar/squad": train}
    data = drawn("squad", n=12, per_text=2)
    assert len(data.texts) == 6 and data.source == "rajpurkar/squad_v2, validation"
    assert len(data.unrelated) == len(set(data.unrelated)) == questions.UNRELATED  # and not more
    assert train.taken and all(text.startswith("Hills") for text in data.unrelated)
    assert {(name, kwargs["split"]) for name, _, kwargs in hub.asked} == {
        ("rajpurkar/squad_v2", "validation"),
        ("rajpurkar/squad", "train"),
    }


def test_natural_questions_come_from_the_hub_as_from_a_folder(hub, folder):
    plain = nq_rows()
    rows = [
        hub_row(row["id"], ["<P>", *row["context"].split(), "</P>"], [(0, words(row["context"]) + 2)], [row["answers"]])
        for row in plain
    ]
    name = "google-research-datasets/natural_questions"
    hub.there = {name: Streamed(rows)}
    data = drawn("nq")
    assert hub.asked == [(name, ("default",), {"split": "validation", "streaming": True})]
    assert data.source == f"{name}, validation"
    folder({NQ[0]: plain})
    assert (drawn("nq").texts, drawn("nq").unrelated) == (data.texts, data.unrelated)


@pytest.mark.parametrize("name", ["squad", "nq"])
def test_a_hub_that_can_not_be_reached_names_the_remedy(hub, name):
    sources = ("rajpurkar/squad_v2", "rajpurkar/squad", "google-research-datasets/natural_questions")
    for error, reason in (
        (ConnectionError("no route to the hub\nand much more"), "no route to the hub"),
        (RuntimeError(), "RuntimeError"),
    ):
        hub.there = dict.fromkeys(sources, error)
        with pytest.raises(ValueError, match=rf"\({reason}\). Set LATENTMEM_DATA .* take 'synthetic'") as found:
            drawn(name)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["squad", "nq"])
def test_a_hub_that_breaks_off_names_the_remedy_too(hub, name):
    broken = Streamed([], ConnectionError("the line went dead"))
    hub.there = {
        "rajpurkar/squad_v2": squad_rows(),
        "rajpurkar/squad": broken,
        "google-research-datasets/natural_questions": broken,
    }
    with pytest.raises(ValueError, match=r"the line went dead.*Set LATENTMEM_DATA"):
        drawn(name)


def test_without_the_package_of_the_hub_the_remedy_is_named(monkeypatch):
    monkeypatch.delenv("LATENTMEM_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("squad", "nq"):
        with pytest.raises(ValueError, match=r"pip install 'latentmem\[eval\]'.*LATENTMEM_DATA.*'synthetic'"):
            drawn(name)
    assert drawn("synthetic", n=5, per_text=5).texts  # needs neither


# --- the real data --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not all((REAL / name).is_file() for name in (*SQUAD, *NQ)), reason="LATENTMEM_DATA holds no SQuAD and no NQ"
)
@pytest.mark.parametrize(("name", "per_text"), [("squad", 5), ("nq", 1)])
def test_the_real_sets_hold_two_hundred_questions(name, per_text):
    def count(text):
        return -(-len(text.encode()) // 4)  # about a token

    data = drawn(name, count=count, n=200, per_text=per_text)
    found = [(t, q) for t in data.texts for q in t.questions]
    assert len(found) == len({q.id for _, q in found}) == 200 and len(data.texts) == 200 // per_text
    assert all(q.question.strip() and q.answers[0] in t.text for t, q in found)
    assert all(1 <= count(q.answers[0]) <= questions.ANSWER[name] for _, q in found)
    assert len(data.unrelated) > 400 and all(text.strip() and count(text) <= 512 for text in data.unrelated)
    assert not {t.text for t in data.texts} & set(data.unrelated)
    if name == "nq":
        assert all(16 <= count(t.text) <= 512 for t in data.texts)
