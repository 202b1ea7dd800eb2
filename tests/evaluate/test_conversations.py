"""Conversations: scores whose value is known, LoCoMo's schema, what is written and seen in each row, the command."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from latentmem import cli
from latentmem.core.settings import MemorySettings
from latentmem.evaluate import asking, scoring
from latentmem.evaluate.baselines import passages
from latentmem.evaluate.protocols import conversations
from latentmem.evaluate.protocols.conversations import (
    Conversations,
    Session,
    Settings,
    dialogue,
    lines,
    load,
    measure,
    pieces,
)
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model


def talk(name="talk-1"):
    """A dialogue in LoCoMo's schema; session 10 comes after session 2."""
    turn = {"speaker": "Ada", "dia_id": "D1:1", "text": "I bought a red boat."}
    other = {"speaker": "Bo", "dia_id": "D1:2", "text": "Look!", "blip_caption": "a green hat", "img_url": ["x"]}
    conversation = {"speaker_a": "Ada", "speaker_b": "Bo", "session_11_date_time": "never"}
    for number, some in ((10, [other]), (1, [turn, other]), (2, [turn])):
        conversation |= {f"session_{number}": some, f"session_{number}_date_time": f"{number} May"}
    qa = [{"question": f"q{c}{i}?", "answer": f"red boat {i}", "category": c} for c in (1, 2, 3, 4) for i in range(2)]
    qa.append({"question": "when?", "answer": 2022, "category": 2})
    qa.append({"question": "what hat?", "adversarial_answer": "green", "category": 5})
    return {"sample_id": name, "conversation": conversation, "qa": qa, "observation": {}}


@pytest.fixture(scope="module")
def llm():
    return MemoryModel(tiny_model(max_position_embeddings=2048), byte_tokenizer(), name="tiny")


SMALL = {"memory": MemorySettings(256), "longterm": 64, "new_tokens": 4}


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "golds", "f1", "exact"),
    [
        ("The red boat.", ["red boat"], 1.0, 1),
        ("a red red boat", ["red boat"], 0.8, 0),  # 2 common words of 3 and 2
        ("It was red", ["red boat"], 0.4, 0),
        ("blue", ["red boat"], 0.0, 0),
        ("boat", ["red ship", "the boat"], 1.0, 1),
        ("", ["red boat"], 0.0, 0),
        ("7 May 2023", ["May 7, 2023"], 1.0, 0),  # words without their order
        ("theatre", ["the atre"], 0.0, 0),  # articles are words, not letters
        ("The", ["an"], 1.0, 1),  # nothing is left of either
    ],
)
def test_f1_and_exact_match_are_squads(said, golds, f1, exact):
    assert scoring.f1(said, golds) == pytest.approx(f1)
    assert scoring.exact(said, golds) == exact


def test_saying_that_there_is_no_answer_is_abstaining():
    yes = ["I don\u2019t know.", "i DON'T know that", "It is not mentioned.", "There is no information available"]
    assert [scoring.abstains(said) for said in [*yes, "No", "Mentioned in May", ""]] == [1, 1, 1, 1, 0, 0, 0]


def test_bm25_ranks_passages_and_leaves_out_those_that_share_no_word():
    library = ["the cat sleeps", "a dog barks at a cat", "ships sail"]
    assert passages.ranked(library, ["where is the dog and the cat?", "ships", "moon"], 3) == [[1, 0], [2], []]
    assert passages.ranked(library, ["cat"], 1) == [[0]]


# --- the dialogues --------------------------------------------------------------------------------------------------


def test_sessions_are_in_order_and_a_photo_is_its_caption():
    one = dialogue(talk())
    assert [session.date for session in one.sessions] == ["1 May", "2 May", "10 May"]
    assert one.sessions[0].turns == ("Ada: I bought a red boat.", "Bo: Look! (shares a photo: a green hat)")
    assert [q.answer for q in one.questions if q.category in (2, 5)] == ["red boat 0", "red boat 1", "2022", ""]
    told = {"question": "where?", "answer": "National park; she likes the outdoors", "category": 3}
    assert dialogue({**talk(), "qa": [told]}).questions[0].answer == "National park"
    with pytest.raises(ValueError, match="has the category 7"):
        dialogue({**talk(), "qa": [{"question": "?", "answer": "a", "category": 7}]})


def test_pieces_hold_whole_turns_under_their_date_and_all_of_them_once():
    session = Session("1 May", ("Ada: " + "a" * 20, "Bo: " + "b" * 20, "Ada: " + "c" * 90, "Bo: d"))
    found = pieces(session, len, 85)
    assert [text.split("\n")[0] for text in found] == ["Conversation at 1 May"] * 3
    assert [len(text.split("\n")) - 1 for text in found] == [2, 1, 1]  # the long turn stands alone
    assert [turn for text in found for turn in text.split("\n")[1:]] == list(session.turns)


def test_questions_are_drawn_of_every_category_its_share(tmp_path):
    row = talk()
    row["qa"] = [{"question": f"{i}", "answer": "a", "category": 4 if i < 30 else 1} for i in range(40)]
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([row]))
    (one,) = load(20, 0, file)
    assert sorted(q.category for q in one.questions) == [1] * 5 + [4] * 15
    assert load(20, 0, file) == [one] and load(20, 1, file) != [one]
    assert len(load(100, 0, file)[0].questions) == 40


def test_files_are_read_as_they_come_and_others_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress((json.dumps(talk("x")) + "\n" + json.dumps(talk("y"))).encode())
    )
    assert [one.id for one in load(3, 0, tmp_path / "a.jsonl.gz")] == ["x", "y"]
    (tmp_path / "b.json").write_text('[{"text": "no"}]')
    for name in ("b.json", "missing.json"):
        with pytest.raises(ValueError, match="holds no LoCoMo dialogues"):
            load(3, 0, tmp_path / name)
    monkeypatch.delenv("LATENTMEM_DATA", raising=False)
    with pytest.raises(ValueError, match=r"give it with --file, or set LATENTMEM_DATA"):
        load(3, 0)


# --- the rows -------------------------------------------------------------------------------------------------------


def test_every_row_sees_what_it_should(llm, monkeypatch):
    seen = {}
    worker = Conversations(
        llm, [dialogue(talk())], Settings(MemorySettings(128), longterm=32, new_tokens=4, passages=1)
    )
    monkeypatch.setattr(
        conversations,
        "say",
        lambda _, context, prompts, new_tokens: seen.update(context=context, prompts=prompts) or ["red boat"] * 10,
    )
    contexts = []
    monkeypatch.setattr(
        conversations, "in_context", lambda llm, ids: contexts.append(ids) or asking.in_context(llm, ids)
    )
    whole = [i for _, text in worker._texts(worker.data[0]) for i in llm.prompts.written(text)]
    for row in conversations.ROWS:
        records = worker.run((row, 0))
        length = seen["context"].length
        texts = [llm.tokenizer.decode(prompt) for prompt in seen["prompts"]]
        if row == "floor":
            assert length == 0 and all("boat" not in text for text in texts)
        elif row == "window":
            assert length == min(len(whole), 128) + len(llm.prompts.opening) and contexts[-1] == whole[-128:]
        elif row == "bm25":
            assert length == 0 and "May\nBo: Look! (shares a photo: a green hat)" in texts[-1]
        else:
            assert seen["context"].lengths == ([1 + 128] if row == "memory" else [1 + 96 + 32])
        assert [r["question"] for r in records] == [f"talk-1-{i}" for i in range(10)]
        assert [r["f1"] for r in records[:2]] == [pytest.approx(0.8), pytest.approx(0.8)]
        assert (records[-1]["category"], records[-1]["abstains"], records[-1]["f1"]) == (5, 0, 0.0)


def test_the_memory_holds_the_sessions_under_their_names_in_order(llm):
    worker = Conversations(llm, [dialogue(talk())], Settings(**{**SMALL, "memory": MemorySettings(512)}))
    memory = worker._written("memory", worker.data[0])
    assert [source.name for source in memory.sources] == ["session 1", "session 2", "session 3"]
    assert memory.updates >= 3
    longterm = worker._written("longterm", worker.data[0])
    assert (longterm.N, longterm.longterm.settings.R, longterm.updates) == (448, 64, memory.updates)


def test_the_table_is_by_category_and_adversarial_questions_count_apart():
    def record(row, text, category, f1, abstains=0):
        question = f"{text}-{category}"
        return {
            "row": row,
            "text": text,
            "question": question,
            "category": category,
            "f1": f1,
            "em": 0,
            "abstains": abstains,
        }

    some = [record("memory", t, 1, 0.5) for t in "ab"] + [record("memory", t, 4, 1.0) for t in "ab"]
    some += [record("memory", t, 5, 0.0, 1) for t in "ab"] + [record("floor", t, 1, 0.2) for t in "ab"]
    found = {line.name: line.estimate for line in lines(some)}
    assert found["F1, all but adversarial, memory"].mean == 0.75
    assert found["F1, multi-hop, memory"].mean == 0.5 and found["F1, single-hop, memory"].mean == 1.0
    assert found["abstains, adversarial (right), memory"].mean == 1.0
    assert found["abstains, all others (wrong), memory"].mean == 0.0
    assert found["F1, memory - floor"].mean == pytest.approx(0.3) and found["F1, memory - floor"].n == 2
    assert "F1, temporal, memory" not in found


def test_no_record_holds_a_word_of_the_data_and_rows_are_added(llm, tmp_path):
    data = [dialogue(talk(name)) for name in ("x", "y")]
    measure(llm, data, Settings(**SMALL, rows=("floor",)), tmp_path / "run")
    found = measure(llm, data, Settings(**SMALL, rows=("floor", "memory")), tmp_path / "run")
    assert {line.name for line in found} >= {"F1, all but adversarial, floor", "F1, memory - floor"}
    written = "".join(file.read_text() for file in (tmp_path / "run").glob("*.json*"))
    assert "boat" not in written and "hat" not in written.replace("what", "")
    with pytest.raises(ValueError, match=r"data\.sha256"):
        measure(llm, data[:1], Settings(**SMALL, rows=("floor",)), tmp_path / "run")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"rows": ("judge",)}, "got judge"), ({"longterm": 256}, "between 1 and N - 1 of N=256 slots, got 256")],
)
def test_settings_that_do_not_fit_are_said(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**{**SMALL, **wrong})


def test_the_command(tiny_folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "talks.json"
    file.write_text(json.dumps([talk("x"), talk("y")]))
    options = SimpleNamespace(
        file=file, model=tiny_folder, rows="floor,memory", device="cpu", dtype="float32", workers=1
    )
    args = [f"--{name}={value}" for name, value in vars(options).items()]
    monkeypatch.setattr(
        sys, "argv", ["latentmem", "eval", "conversations", "--out", str(tmp_path / "run"), *args, "-N", "128",
        "--new-tokens=2", "--questions=4"],
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "| F1, memory - floor |" in capsys.readouterr().out
