"""Invented facts: the same for the same number, answers stand in the notes, near misses do not, what is held out stays
out; and what episodes make of them."""

import os
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from latentmem.model.prompts import Prompts, Style
from latentmem.testing import byte_tokenizer
from latentmem.train import config, facts
from latentmem.train.config import Config, PoolSettings, Source, Steps, Texts
from latentmem.train.data import Apart, Documents
from latentmem.train.episodes import Episodes
from latentmem.train.facts import UNKNOWN, scene
from latentmem.train.scenes import SCENES
from latentmem.train.words import HELD, TRAIN, Draw, Split, grammar, is_held, relations

NEW = Split(words=True, wordings=True, relations=True)
COUNT = 400


@cache
def scenes(split=TRAIN, **kwargs):
    return [scene(0, number, split, **kwargs) for number in range(COUNT)]


def words(text):
    return re.findall(r"\w+", text.lower())


def test_a_scene_is_a_function_of_seed_number_and_split():
    assert scenes() == [scene(0, number) for number in range(COUNT)]
    others = [scene(1, 0), scene(0, 1), scene(0, 0, HELD), scene(0, 0, NEW)]
    assert scene(0, 0) not in others and len({str(other) for other in others}) == 4


@pytest.mark.parametrize("split", [TRAIN, HELD, NEW, Split(words=True), Split(wordings=True)])
def test_answers_stand_in_the_note_that_the_question_is_about(split):
    for notes, asks in scenes(split):
        assert notes and asks and len({ask.question for ask in asks}) == len(asks)
        for ask in asks:
            if ask.kind != "near":
                assert ask.answer.lower() in notes[ask.about].lower(), (notes, ask)


@pytest.mark.parametrize("split", [TRAIN, HELD, NEW])
def test_near_misses_are_answered_by_no_note(split):
    """No question with an answer is among them, and what they ask for is told of nobody of that name."""
    near = 0
    for number in range(COUNT):
        teller = facts._Teller(0, number, split)
        teller.begin(3, ())
        teller.tell(3, 0.35)
        told = {(who, key.relation, key.word) for key in teller.values for who in key.who}
        for _ in range(5):
            ask = teller.near()
            if ask is None:
                continue
            near += 1
            assert ask.answer == UNKNOWN and ask.kind == "near"
            for who, relation, word in told:
                key = facts.Key(("I",) if who == "I" else (who,), relation, word)
                assert ask.question not in {teller.question(key) for _ in range(3)}
    assert near > COUNT


def test_less_than_a_third_of_the_questions_are_near_misses():
    kinds = Counter(ask.kind for one in scenes() for ask in one.asks)
    assert 0.2 < kinds["near"] / kinds.total() < 1 / 3
    assert min(kinds.values()) > 0.02 * kinds.total() and set(kinds) == {"plain", "exact", "now", "before", "near"}


def test_near_misses_are_asked_in_the_wordings_of_all_others():
    def openings(near):
        return Counter(words(ask.question)[0] for one in scenes() for ask in one.asks if (ask.kind == "near") == near)

    near, other = openings(True), openings(False)
    assert all(other[word] > 0 for word, count in near.items() if count > 5)


def test_half_of_the_questions_have_other_words_than_the_statement():
    frame = set(words(" ".join([*grammar()["frames"], *grammar()["openers"], *grammar()["now"]])))
    frame |= set(
        words("i me my you is are am do does did a an the of to in on for by with where when which who how much")
    )
    apart = shared = 0
    for notes, asks in scenes():
        for ask in asks:
            if ask.kind in ("plain", "exact", "now"):
                said = set(words(notes[ask.about]))
                own = [w for w in words(ask.question) if w not in frame and not w[:1].isupper()]
                names = {w.lower() for w in re.findall(r"\b[A-Z]\w+", ask.question)[1:]}
                new = [w for w in own if w not in said and w not in names]
                apart, shared = apart + bool(new), shared + (not new)
    assert apart > shared


def test_every_relation_is_asked_in_ten_wordings_and_more():
    assert len(relations()) >= 20
    for name in relations():
        teller = facts._Teller(0, 1, TRAIN)
        word = "sofa" if "of" in grammar()["relations"][name] else ""
        key = facts.Key(("I",), name, word)
        assert len({teller.question(key) for _ in range(300)}) >= 10, name


def test_the_newest_of_several_statements_is_the_answer():
    kinds: Counter[str] = Counter()
    for notes, asks in scenes(only=("code", "phone"), changes=1.0):
        for ask in asks:
            whole = re.compile(rf"(?<!\d){re.escape(ask.answer)}(?!\d)")
            if ask.kind == "now":  # of four digits some come twice
                kinds["told again"] += any(map(whole.search, notes[ask.about + 1 :]))
            kinds[ask.kind] += 1
    assert kinds["now"] > COUNT and kinds["before"] > COUNT / 4 and kinds["told again"] < 0.03 * kinds["now"]


def test_exact_strings_keep_their_letters():
    for notes, asks in scenes(only=("password", "mail", "plate", "serial")):
        for ask in asks:
            if ask.kind == "exact":
                assert ask.answer in notes[ask.about] and not notes[ask.about].startswith(ask.answer)


# --- what is held out -------------------------------------------------------------------------------------------------


def test_of_every_list_some_words_are_held_out():
    for kind, some in grammar()["words"].items():
        held = [word for word in some if is_held(word)]
        assert len(set(some)) == len(some) and 3 <= len(held) < len(some) / 2, kind


def test_held_out_words_are_in_no_scene_of_training():
    lists = grammar()["words"]
    for kind in ("first", "town", "job", "make", "food", "word"):
        for split in (TRAIN, HELD):
            teller = Draw(0, 0, split)
            drawn = {teller.word(kind) for _ in range(500)} | {teller.invented("last") for _ in range(100)}
            assert all(is_held(word) == split.words for word in drawn)
        assert {is_held(word) for word in lists[kind]} == {True, False}


def test_held_out_wordings_and_relations_are_in_no_scene_of_training():
    def patterns(split):
        """Questions and statements as templates, of fixed words."""
        found = set()
        for number in range(150):
            teller = facts._Teller(3, number, Split(wordings=split))
            for name in relations():
                relation = grammar()["relations"][name]
                key = facts.Key(("I",), name, "WORD" if "of" in relation else "")
                question = teller.question(key)
                found.add(
                    (
                        name,
                        re.sub(
                            r"^(Tell me|Quick question|Remind me|Do you still know|I forgot): |^Sorry, ", "", question
                        ).lower(),
                    )
                )
        return found

    trained, held = patterns(False), patterns(True)
    assert len(trained) > 400 and len(held) > 150 and not trained & held
    assert len(relations(held=True)) >= 4 and not set(relations()) & set(relations(held=True))


def test_everyday_questions_are_apart_as_well():
    trained, held = ({facts.everyday(0, i, split)[0] for i in range(1500)} for split in (TRAIN, HELD))
    assert len(trained) > 300 and len(held) > 30 and not trained & held


@pytest.mark.skipif(not os.environ.get("LATENTMEM_DATA"), reason="LATENTMEM_DATA is not set")
def test_no_scene_shares_13_words_in_a_row_with_an_evaluation_set():
    apart = Apart(config.load("smollm2-135m-facts").apart)
    for one in scenes():
        assert not any(map(apart.clashes, [*one.notes, *(ask.question for ask in one.asks)]))


# --- episodes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.jsonl"
    file.write_text('{"text": "Nothing is asked about the houses of Oslo here, and they are red."}\n')

    def of(objective, chat=1.0, **texts):
        made = Config(
            memory=PoolSettings(N=4096, K=1024, compressions=(2, 4)),
            objectives={objective: 1.0, "chat": 0.0},
            data=(Source(str(file)),),
            texts=Texts(shortest=8, longest=1000, rows=12, **texts),
            steps=Steps(total=100),
        )
        return Episodes(
            made,
            Prompts(byte_tokenizer(), Style(wrap="user", question="{question} Answer briefly.")),
            [Documents(made.data[0], 0)],
        )

    return of


def text(ids):
    return byte_tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("objective", SCENES)
def test_an_episode_is_a_function_of_the_seed_and_its_number(objective, episodes):
    one, other = episodes(objective), episodes(objective)
    assert [one[i] for i in range(20)] == [other[i] for i in reversed(range(20))][::-1]
    seeded = episodes(objective)
    seeded = Episodes(replace(seeded.config, seed=1), seeded.prompts, seeded.sources)
    assert one[0].texts != seeded[0].texts


@pytest.mark.parametrize("objective", SCENES)
def test_scenes_are_written_one_token_per_slot_and_leave_the_pool_as_it_is(objective, episodes):
    some = [episodes(objective)[i] for i in range(60)]
    for episode in some:
        assert episode.from_pool and episode.in_sequence and 0 <= episode.fill < 1 and episode.compression == 1
        assert episode.texts and episode.rows and len(episode.rows) <= 13 and len(episode.ages) == len(episode.texts)
        assert all(len(ids) <= 1000 for ids in episode.texts)
    assert len({episode.fill for episode in some}) > 5 and any(episode.fill == 0 for episode in some)


def test_answers_of_facts_are_in_the_text_that_a_row_is_about(episodes):
    forms, chats = Counter(), Counter()
    for number in range(80):
        episode = episodes("facts")[number]
        answered = [row for row in episode.rows if row.about is not None]
        assert len(answered) > 0 or {text(row.answer) for row in episode.rows} == {UNKNOWN}
        for row in episode.rows:
            answer = text(row.answer)
            assert row.answer[-1] == byte_tokenizer().eos_token_id
            assert answer in text(episode.texts[row.about]) if row.about is not None else answer == UNKNOWN
            chats["Answer briefly." not in text(row.prompt)] += 1
        forms[len(episode.texts) == 1, episode.last is not None] += 1
        if episode.last is not None:
            assert {row.about for row in answered} == {episode.last}
    assert min(forms[True, False], forms[False, False], forms[False, True]) > 4
    assert 0.2 < chats[True] / chats.total() < 0.5


def test_answers_of_a_talk_are_in_the_memory_or_in_the_turns(episodes):
    places = Counter()
    for number in range(60):
        episode = episodes("talk")[number]
        memory = " ".join(map(text, episode.texts))
        for row in episode.rows:
            prompt, answer = text(row.prompt), text(row.answer)
            if answer != UNKNOWN:
                assert answer in memory or answer in prompt
                places["memory" if row.about is not None else "turns"] += 1
                assert row.about is None or answer in text(episode.texts[row.about])
    assert min(places["memory"], places["turns"]) > 40


def test_everyday_questions_are_answered_by_the_plain_model(episodes):
    for number in range(20):
        episode = episodes("everyday")[number]
        assert episode.taught and episode.replies > 0 and all(row.answer == () for row in episode.rows)
        assert all(row.about is None for row in episode.rows)
