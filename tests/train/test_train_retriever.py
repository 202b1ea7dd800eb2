"""The retriever that is trained beside the adapters: its loss against a slow twin, its run, its result in use."""

import json
from dataclasses import replace
from string import ascii_lowercase

import pytest
import torch
from margins import nearly_best
from safetensors.torch import load_file
from test_train_learner import FORMS, ROWS, TEXTS, behind, episode_of, gradients, learner_of, pool_of, read_by
from test_train_loop import all_forgetful, forgetful, in_two, same, sentence, settings, state, write_rows

import latentmem
from latentmem.decoder import adapters as pairs
from latentmem.decoder.hooks import layers_seen
from latentmem.errors import OtherModelError
from latentmem.files import adapters as files
from latentmem.model.prompts import Prompts
from latentmem.testing import byte_tokenizer, updated
from latentmem.train import build, checkpoint, loop
from latentmem.train.build import recompute
from latentmem.train.config import Config, PoolSettings, RetrieverShape, Source, Steps
from latentmem.train.data import Documents
from latentmem.train.episode import Row
from latentmem.train.episodes import Episodes
from latentmem.train.log import lines
from latentmem.train.loop import RESULT, Run
from latentmem.train.retriever import Retriever

WIDTH, HIDDEN = 5, 7
ASKED = (ROWS[0], replace(ROWS[1], prompt=(60, 12)), ROWS[2])  # none is a text that just goes on
NAMES = ("a", "b", "c")


def searching(preset="exact", c=1, weight=0.7, size=3.0, **model):
    """A tiny learner with a random retriever whose scores are neither small nor alike."""
    learner = learner_of(preset, c, **model)
    D = learner.llm.decoder
    learner.retriever = Retriever.fresh(D.L, D.d, HIDDEN, WIDTH, 3, D.device)
    learner.weight = weight
    for weight_ in learner.retriever.parameters():
        weight_.data *= size
    return learner


def episode(*, rows=ASKED, names=NAMES, **kinds):
    from_pool = kinds.pop("from_pool", False)
    return replace(episode_of(rows=rows, **kinds), names=names, from_pool=from_pool)


# --- the loss ---------------------------------------------------------------------------------------------------------


def twin(learner, asked, pool):
    """The retriever's loss by loops over rows, layers, slots and tokens in float64, each row read alone.

    Returns:
        The loss with gradient; for each row and layer how well each slot fits, the best first, and whether it is right.
    """
    llm, (memory, kinds) = learner.llm, slots_of(learner, asked, pool)
    llm = llm if learner.settings.preset == "exact" else behind(learner, pool)[0]
    weights = [
        [(p[0].double(), p[1].double()) for p in some] for some in (learner.retriever.query, learner.retriever.key)
    ]

    def project(pair, x):
        x = pair[0] @ x.double()
        return pair[1] @ (x * x.sigmoid())

    losses, fits = [], []
    for row in asked.rows:
        if row.about is None:
            continue
        with layers_seen(llm.decoder) as hidden, torch.no_grad():
            llm.logits(memory, row.prompt + row.answer)
        for i in range(llm.decoder.L):
            norm, each, fit = llm.decoder.layers[i].input_layernorm, {True: [], False: []}, []
            queries = [project(weights[0][i], norm(hidden[i][0, t]).detach()) for t in range(len(row.prompt))]
            for slot, kind in zip(memory.slots[i], kinds[i], strict=True):
                key = project(weights[1][i], norm(slot).detach())
                p = sum((query * key).sum().sigmoid() for query in queries) / len(queries)
                own = kind == row.about if isinstance(kind, int) or asked.from_pool else False
                each[own].append(-(p if own else 1 - p).log())
                fit.append((p.item(), own))
            if each[True] and each[False]:
                losses += [sum(sum(some) / len(some) for some in each.values()) / 2]
                fits.append(sorted(fit, reverse=True))
    return sum(losses) / len(losses), fits


def slots_of(learner, asked, pool):
    """What the rows of an episode read, as a memory, and for each layer and slot the number of its text, or others."""
    llm, memory = behind(learner, pool)
    if asked.from_pool:
        with torch.no_grad():
            for text in asked.texts:
                memory = updated(memory, llm.new_slots(memory, text))
        first = memory.updates - len(asked.texts) + 1
        return memory, [[birth - first for birth in births] for births in memory.births.tolist()]
    _, slots, read = read_by(learner, asked, pool)
    old = torch.zeros(slots.shape[:2], dtype=torch.int32)
    born = [
        [kind if kind != "pool" else ("pool", int(pool.births[i, n])) for kind, n in read[i]] for i in range(pool.L)
    ]
    return replace(memory, slots=slots, births=old, origins=old - 1), born


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("way", [{"ages": (9, 3, 0)}, {"in_sequence": False}, {"from_pool": True}], ids=str)
@pytest.mark.parametrize(("preset", "c"), FORMS)
def test_the_loss_and_its_gradients_are_those_of_the_slow_twin(preset, c, way, again):
    if again and preset == "paper" and not build.HOOKS_STAY:
        pytest.skip("refused")
    learner = searching(preset, c)
    rows = (*ASKED, replace(ASKED[1], about=None), replace(ASKED[2], about=-3 if "from_pool" in way else 1))
    asked, pool = episode(rows=rows, **way), pool_of(learner, 40)
    theirs, fits = twin(learner, asked, pool)
    if again:
        recompute(learner)
    ours = learner(asked, pool)
    assert ours.search == pytest.approx(theirs.item(), abs=1e-5)
    right = [[own for _, own in some] for some in fits]
    assert ours.precision == pytest.approx(sum(sum(some[: sum(some)]) / sum(some) for some in right) / len(right))
    assert ours.precision < 1 and all(some[0][0] - some[-1][0] > 0.05 for some in fits)
    weights = list(learner.retriever.parameters())
    by_hand = torch.autograd.grad(0.7 * theirs, weights)
    ours.loss.backward()
    for weight, g in zip(weights, by_hand, strict=True):
        assert g.abs().max() > 0 and (weight.grad - g).abs().max() <= 1e-4 * g.abs().max()


@pytest.mark.parametrize("way", [{}, {"from_pool": True}, {"taught": True}], ids=str)
@pytest.mark.parametrize(("preset", "c"), FORMS)
def test_the_adapters_learn_nothing_from_it(preset, c, way):
    alone, learner = learner_of(preset, c), searching(preset, c)
    asked, pool = episode(ages=(9, 3, 0), **way), pool_of(learner, 40)
    plain, both = alone(asked, pool), learner(asked, pool)
    assert both.search is not None and both.accuracy == plain.accuracy
    assert (both.loss - plain.loss).item() == pytest.approx(0.7 * both.search, rel=1e-4)
    ours, theirs = gradients(both.loss, learner), gradients(plain.loss, alone)
    for name, g in theirs.items():
        assert (g is None and ours[name] is None) or torch.equal(ours[name], g), name
    assert all(a.equal(b) for a, b in zip(both.new_slots, plain.new_slots, strict=True))


def test_neither_padding_nor_answers_ask():
    learner = searching()
    pool = pool_of(learner, 40)
    short, long = replace(ASKED[2], prompt=(8, 8)), Row(tuple(range(20, 60)), (7, 7, 9), 1)
    one, other, both = (learner(episode(rows=rows), pool).search for rows in ((short,), (long,), (short, long)))
    assert both == pytest.approx((one + other) / 2, abs=1e-5) and abs(one - other) > 1e-3
    said = replace(short, answer=(99, 100, 2, 31, 7, 6))
    assert learner(episode(rows=(said,)), pool).search == pytest.approx(one, abs=1e-5)
    assert learner(episode(rows=(replace(short, prompt=(8, 9)),)), pool).search != pytest.approx(one, abs=1e-4)


def test_text_that_goes_on_asks_by_a_random_part_of_itself():
    learner = searching()
    pool, row = pool_of(learner), Row((8,), (61, 90, 14, 100), 1)
    found = {s: learner._searches(pool, episode(rows=(row,), seed=s))[0].tokens for s in range(60)}
    assert set(found.values()) == {1, 2, 3, 4}  # of its five tokens; the released code leaves out the last
    seed = next(s for s, n in found.items() if n == 3)
    as_prompt = replace(row, prompt=(8, 61, 90), answer=(14, 100))
    ours, theirs = (learner(episode(rows=(r,), seed=seed), pool).search for r in (row, as_prompt))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_pieces_of_one_document_are_found_together():
    learner, row = searching(), ASKED[0]
    pool = pool_of(learner)
    apart, joined = (learner(episode(rows=(row,), names=names), pool).search for names in (NAMES, ("a", "b", "a")))
    every = learner(episode(rows=(row, replace(row, about=2)), names=("a", "b", "a")), pool).search
    assert joined == pytest.approx(every, abs=1e-5) and joined != pytest.approx(apart, abs=1e-4)


def test_rows_whose_text_is_gone_are_left_out():
    learner = searching()
    pool = pool_of(learner, 120)
    lost = int(pool.births.min()) - 1
    gone = replace(ASKED[0], about=lost - 121)  # of the texts that come, the first is written in the 121st update
    one, both, none = (
        learner(episode(rows=rows, from_pool=True), pool) for rows in (ASKED[1:2], (ASKED[1], gone), (gone,))
    )
    assert both.search == pytest.approx(one.search, abs=1e-5) and both.precision == one.precision
    assert none.search is None and none.loss.requires_grad
    whole = replace(episode(rows=(ASKED[0],), texts=TEXTS[:1]), names=("a",), fill=0.0)
    assert learner(whole, pool).search is None  # nothing to tell it from


def test_without_a_search_its_gradients_are_zeros():
    """Processes that share weights wait for each other's gradients."""
    learner = searching()
    rows = tuple(replace(row, about=None) for row in ASKED)
    outcome, plain = (one(episode(rows=rows), pool_of(one)) for one in (learner, learner_of()))
    assert outcome.search is None and outcome.loss == plain.loss
    found = gradients(outcome.loss, learner)
    mine = [g for name, g in found.items() if name.startswith(pairs.RETRIEVER)]
    assert len(mine) == 4 * 3 and all(g is not None and not g.any() for g in mine)


def test_large_scores_have_a_loss_and_a_gradient():
    learner = searching(size=30.0)
    outcome = learner(episode(), pool_of(learner, 40))
    found = gradients(outcome.loss, learner)
    assert 20 < outcome.search < float("inf") and all(g.isfinite().all() for g in found.values() if g is not None)


def test_what_the_layers_see_is_noted_once_and_freed_of_the_graph(monkeypatch):
    learner, noted = searching(), []
    recompute(learner)
    monkeypatch.setattr(Retriever, "forward", lambda self, seen: noted.append(seen))
    learner(episode(), pool_of(learner, 40)).loss.backward()
    (seen,) = noted
    assert len(seen.asked) == len(seen.keys) == 3 and not any(t.requires_grad for t in (*seen.asked, *seen.keys))
    tokens = sum(len(row.prompt) for row in ASKED)
    assert {t.shape[0] for t in seen.asked} == {tokens} and {t.shape[0] for t in seen.keys} == {seen.texts.shape[1]}


# --- which text of the pool a row is about ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Articles, and paragraphs with two questions each."""
    folder = tmp_path_factory.mktemp("data")
    articles = [{"title": f"A{i}", "text": " ".join(sentence(i, j) for j in range(6))} for i in range(40)]
    asked = [
        {
            "title": f"Q{i}",
            "context": f"{NAMES[i % 3]}{i} built mill {i}. It stands in Veld.",
            "question": f"Who built mill {i}, {word}?",
            "answers": {"text": [f"{NAMES[i % 3]}{i}"]},
        }
        for i in range(36)
        for word in ("tell me", "please")
    ]
    return (
        Source(str(write_rows(folder / "text.jsonl", articles))),
        Source(str(write_rows(folder / "questions.jsonl", asked)), "questions"),
    )


@pytest.fixture
def config(tiny_folder, data):
    return replace(settings(tiny_folder, data), retriever=RetrieverShape(WIDTH, HIDDEN, lr=1e-2))


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw", lambda *_: None)
        yield


@pytest.mark.parametrize(("each", "world"), [(1, 1), (2, 1), (2, 2)])
def test_a_row_of_recall_names_its_text_among_all_that_its_process_wrote(each, world, config):
    objectives = {"recall": 1.0, "unknown": 0.5, "continuous": 1.0, "unrelated": 0.3}
    texts = replace(config.texts, recent=0.2, most_pieces=3, longest=90)
    config = replace(config, objectives=objectives, steps=Steps(total=60 // each, episodes=each), texts=texts)
    sources = [Documents(source, i) for i, source in enumerate(config.data)]
    some = Episodes(config, Prompts(byte_tokenizer()), sources, world=world)
    decode, ages = byte_tokenizer().decode, []
    for rank in range(world):
        written, longest = [], 0
        for number in ((step * world + rank) * each + i for step in range(60 // each) for i in range(each)):
            made = some[number]
            written += made.texts
            longest = max(longest, len(made.texts)) if made.objective == "continuous" else longest
            for row in made.rows if made.from_pool else ():
                if row.about is None:
                    assert made.objective == "unrelated" or "I don't know" in decode(row.answer)
                    continue
                at = len(written) - len(made.texts) + row.about
                said = decode(row.prompt, skip_special_tokens=True).split("\n")[1], decode(row.answer[:-1])
                made_of = f"mill {said[0].removeprefix('Who built mill ').partition(',')[0]}."
                held = " ".join(said).removeprefix("Complete the sentence: ") if "Complete" in said[0] else made_of
                assert at >= 0 and said[1] in decode(written[at]) and held in decode(written[at])
                ages.append(len(made.texts) - 1 - row.about)
        assert longest == 2
    assert 0 in ages and max(ages) > 10


def test_slots_of_the_pool_are_told_apart_by_their_text(config, tmp_path):
    """Through a real run: the slots that count as a row's own are what its text wrote, where they are left."""
    objectives = {"recall": 1.0, "continuous": 0.5, "questions": 0.5}
    config = replace(config, objectives=objectives, memory=PoolSettings(N=256, K=128, birth="full"))
    run, wrote, checked = Run(replace(config, steps=replace(config.steps, total=12, episodes=2)), tmp_path), [], []
    searches, remembers = run.learner._searches, run._remember

    def watched(pool, made):
        found = searches(pool, made)
        for search in found if made.from_pool else ():
            about = made.rows[search.row].about
            assert search.text == pool.updates - (len(made.texts) - 1 - about)
            for i in range(pool.L if about < 0 else 0):
                mine = pool.slots[i][pool.births[i] == search.text]
                checked.append(len(mine))
                assert all((wrote[about][i] == slot).all(-1).any() for slot in mine)
        return found

    run.learner._searches = watched
    run._remember = lambda outcome: (wrote.extend(outcome.new_slots), remembers(outcome))
    run.train()
    assert len(checked) > 30 and sum(n > 0 for n in checked) > len(checked) / 2


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [{}, {"checkpointing": True}, {"memory": PoolSettings(preset="paper", N=48, K=16)}, {"retriever": {"alone": True}}],
    ids=str,
)
def test_a_run_that_stops_after_every_step_is_the_run_that_never_stops(form, config, tmp_path):
    if "retriever" in form:
        form = {"retriever": replace(config.retriever, **form["retriever"])}
    config = replace(config, **form)
    Run(config, tmp_path / "straight").train()
    for step in range(1, config.steps.total + 1):
        Run(config, tmp_path / "stopped").train(stop=step)
    same(*(state(tmp_path / name) for name in ("stopped", "straight")))
    tensors = load_file(checkpoint.newest(tmp_path / "straight") / "state.safetensors")
    assert sum(name.startswith("model.retriever.") for name in tensors) == 12
    assert sum(name.startswith("optimizer.exp_avg.retriever.") for name in tensors) == 12
    assert any("retriever" in row and 0 <= row["found"] <= 1 for row in lines(tmp_path / "straight" / "log.jsonl"))


def test_beside_it_the_adapters_become_what_they_become_without_it(config, tmp_path):
    config = replace(config, steps=replace(config.steps, clip=0.05))
    Run(replace(config, retriever=replace(config.retriever, weight=50.0)), tmp_path / "with").train()
    Run(replace(config, retriever=RetrieverShape()), tmp_path / "without").train()
    ours, theirs = (files.load(tmp_path / name / RESULT) for name in ("with", "without"))
    assert all(torch.equal(ours[0][name], tensor) for name, tensor in theirs[0].items())
    assert len(ours[0]) == len(theirs[0]) + 12 and "retriever" not in theirs[1]
    assert not any("retriever" in row for row in lines(tmp_path / "without" / "log.jsonl"))


def test_two_processes_learn_what_one_learns_from_as_many_episodes(config, tmp_path):
    config = replace(config, objectives={"questions": 1.0, "recall": 1.0, "unrelated": 1.0}, watch=config.watch)
    alone = replace(config.retriever, alone=True)
    ways = {
        "data parallel": config,
        "sharded": replace(config, sharding="fsdp2"),
        "sharded, alone": replace(config, sharding="fsdp2", retriever=alone),
    }
    in_two(all_forgetful, ways, tmp_path / "two")
    for name, two in ways.items():
        one = replace(two, steps=replace(two.steps, episodes=2), sharding="none")
        run = forgetful(one, tmp_path / "one" / name)
        searched = [any(r.about is not None for r in run.episodes[n].rows) for n in range(2 * one.steps.total)]
        assert searched[::2] != searched[1::2]  # at times one process searches, and the other does not
        (ours, facts), (theirs, others) = (state(tmp_path / part / name) for part in ("two", "one"))
        assert ours.keys() == theirs.keys()
        assert max((tensor - theirs[n]).abs().max().item() for n, tensor in ours.items() if "result." not in n) < 1e-5
        for mine, other in zip(facts[2], others[2], strict=True):
            assert mine.get("retriever") == pytest.approx(other.get("retriever"), abs=2e-5)
            assert mine.get("found") == other.get("found")


def told(letter):
    """A text whose letters tell it from others, and a question that is made of them, too."""
    word = 9 * letter
    return {
        "title": letter,
        "context": f"{word} saw {word} {word}.",
        "question": f"{word} {word} {word} {word} {word}?",
    }


@pytest.fixture(scope="module")
def taught(tiny_folder, tmp_path_factory):
    """A run of some more steps over texts that are easily told apart, and its log."""
    folder = tmp_path_factory.mktemp("taught")
    rows = [{**told(letter), "answers": {"text": [9 * letter]}} for letter in ascii_lowercase[:12]]
    config = settings(tiny_folder, (Source(str(write_rows(folder / "told.jsonl", rows)), "questions"),))
    config = replace(
        config,
        objectives={"questions": 0.5, "recall": 0.5},
        texts=replace(config.texts, at_once=3, rows=6, oldest=6),
        steps=Steps(total=90, lr=1e-3, warmup=2),
        retriever=RetrieverShape(16, lr=7e-3),
    )
    run = Run(config, folder / "out")
    run.train()
    return run, [row for row in lines(run.out / "log.jsonl") if "retriever" in row]


def test_it_learns(taught):
    _, log = taught
    first, last = (
        [sum(row[key] for row in some) / 15 for key in ("retriever", "found")] for some in (log[:15], log[-15:])
    )
    assert last[0] < first[0] - 0.1 and last[1] > first[1] + 0.1, (first, last)


def loaded(folder, run, **more):
    return latentmem.load(str(folder), adapters=str(run.out / RESULT), device="cpu", **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_retrieves(taught, tiny_folder, dtype):
    run, _ = taught
    llm, (tensors, facts) = loaded(tiny_folder, run, dtype=dtype), files.load(run.out / RESULT)
    assert facts["retriever"] == {"width": 16, "hidden": 32}
    made = llm.retriever.projectors
    for kind in ("query", "key"):
        for i, pair in enumerate(getattr(made, kind)):
            assert all(w.dtype == dtype for w in pair)
            assert all(torch.equal(w, tensors[f"retriever.{kind}.{i}.{k}"].to(dtype)) for k, w in enumerate(pair))
            own = getattr(run.learner.retriever, kind)[i]
            assert all(torch.equal(w, mine.bfloat16().to(dtype)) for w, mine in zip(pair, own, strict=True))

    memory, letters = llm.empty(N=64, K=32, longterm={"R": 6, "group": "slot"}), "cdefgh"
    for letter in letters:
        memory = llm.write(memory, told(letter)["context"], source=letter)
    stored, shares, silu = memory.longterm, [], torch.nn.functional.silu
    (a, b), (c, d) = ([tensors[f"retriever.{kind}.0.{k}"].to(dtype) for k in (0, 1)] for kind in ("query", "key"))
    slots, norm = torch.cat([span.stored.slots[0] for span in stored.ranges]), llm.decoder.layers[0].input_layernorm
    for i, letter in enumerate(letters[:5]):
        ids = torch.tensor(llm.prompts.question(told(letter)["question"], bare=True))
        logits, chosen = llm.logits(memory, ids, return_retrieved=True)
        assert logits.isfinite().all() and [len(places) for places in chosen] == [6, 6, 6]
        hidden = llm.base.get_input_embeddings()(ids)
        fits = ((silu(norm(hidden) @ a.T) @ b.T) @ (silu(norm(slots) @ c.T) @ d.T).T).sigmoid().mean(0)
        within = 1e-5 if dtype == torch.float32 else 0.05
        assert nearly_best(fits, chosen[0], within) and not nearly_best(fits, (-fits).topk(6).indices, within)
        shares.append((stored.origins[0][chosen[0]] == i).float().mean().item())
    assert sum(shares) / len(shares) > 0.7, shares  # by chance 1 of 6
    other = latentmem.load(str(tiny_folder), adapters=None, device="cpu")
    assert other.retriever.projectors is None


def test_an_8_bit_model_keeps_it(taught, tiny_folder):
    llm = loaded(tiny_folder, taught[0], quantize="int8")
    plain = loaded(tiny_folder, taught[0])
    for mine, theirs in zip(llm.retriever.projectors.key, plain.retriever.projectors.key, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


# --- the result, and what goes on from it -----------------------------------------------------------------------------


def changed(run, folder, change):
    """A copy of a run's result with other tensors or facts."""
    tensors, facts = files.load(run.out / RESULT)
    change(tensors, facts)
    files.save(folder / "changed.safetensors", tensors, facts)
    return folder / "changed.safetensors"


def test_a_memory_belongs_to_its_retriever(taught, tiny_folder, tmp_path):
    run, _ = taught

    def other(tensors, facts):
        tensors["retriever.key.1.0"] = tensors["retriever.key.1.0"] * 1.5

    def none(tensors, facts):
        del facts["retriever"]
        for name in [name for name in tensors if name.startswith("retriever.")]:
            del tensors[name]

    files = [run.out / RESULT, changed(run, tmp_path, other), changed(run, tmp_path, lambda *_: None)]
    one, two, again = (
        latentmem.load(str(tiny_folder), adapters=str(changed(run, tmp_path, how) if how else files[0]), device="cpu")
        for how in (None, other, lambda *_: None)
    )
    bare = latentmem.load(str(tiny_folder), adapters=str(changed(run, tmp_path, none)), device="cpu")
    assert one.adapters.identity == again.adapters.identity
    assert len({llm.adapters.identity for llm in (one, two, bare)}) == 3 and bare.retriever.projectors is None
    assert bare.adapters.identity == run.llm.adapters.identity  # of the pair alone
    memory = one.write(one.empty(N=64, K=32, longterm=4), "a1 built mill 1.")
    again.check(memory)
    with pytest.raises(OtherModelError, match="another adapter"):
        two.check(memory)


FAULTS = {
    "missing": (lambda t, f: t.pop("retriever.query.1.0"), r"retriever\.query\.1\.0"),
    "unknown": (lambda t, f: t.update({"retriever.key.3.0": torch.zeros(1)}), r"retriever\.key\.3\.0"),
    "of another shape": (lambda t, f: t.update({"retriever.key.2.1": torch.zeros(16, 31)}), r"retriever\.key\.2\.1"),
    "of another width": (lambda t, f: f["retriever"].update(width=15), r"retriever\.query\.0\.1, .*key\.2\.1"),
    "not announced": (lambda t, f: f.pop("retriever"), r"retriever\.key\.0\.0, .* \.\.\."),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_retriever_that_does_not_fit_is_refused_by_name(fault, taught, tiny_folder, tmp_path):
    change, named = FAULTS[fault]
    with pytest.raises(ValueError, match=f"do not fit the model: {named}[.]$"):
        latentmem.load(str(tiny_folder), adapters=str(changed(taught[0], tmp_path, change)), device="cpu")


@pytest.fixture
def onward(taught, config):
    """A config that goes on from a retriever and its adapters."""
    run, _ = taught
    return replace(
        run.config,
        adapters=str(run.out / RESULT),
        steps=replace(run.config.steps, total=2),
        retriever=RetrieverShape(16),
    )


def test_a_run_goes_on_with_the_retriever(taught, onward, tmp_path):
    run = Run(onward, tmp_path / "on")
    tensors, _ = files.load(taught[0].out / RESULT)
    mine = {name: p for name, p in run.parameters.items() if name.startswith("retriever.")}
    assert len(mine) == 12 and all(torch.equal(p, tensors[name].float()) for name, p in mine.items())
    assert all(p.dtype == torch.float32 for p in mine.values())
    run.train()
    after, facts = files.load(tmp_path / "on" / RESULT)
    assert not any(torch.equal(after[name], tensors[name]) for name in mine)
    assert facts["from"] == loaded(onward.model, taught[0]).adapters.identity


@pytest.mark.parametrize("sizes", [(0, 0), (8, 32), (16, 31)])
def test_a_retriever_of_another_size_is_refused(sizes, onward):
    other = replace(onward, retriever=RetrieverShape(*sizes))
    with pytest.raises(ValueError, match=r"retriever must be as in .*: \{'width': 16, 'hidden': 32\}, got \{"):
        build.model_of(other, torch.device("cpu"))


@pytest.mark.parametrize("preset", ["exact", "paper"])
def test_it_is_trained_alone_on_adapters_that_stay_as_they_are(preset, config, tmp_path):
    memory = PoolSettings(preset="paper", N=48, K=16) if preset == "paper" else config.memory
    config = replace(config, memory=memory)
    Run(replace(config, retriever=RetrieverShape()), tmp_path / "before").train()
    before, _ = files.load(tmp_path / "before" / RESULT)
    alone = replace(config.retriever, alone=True)
    run = Run(replace(config, adapters=str(tmp_path / "before" / RESULT), retriever=alone), tmp_path / "alone")
    assert all(name.startswith("retriever.") for name in run.parameters) and len(run.optimizer.param_groups) == 1
    first = {name: p.detach().clone() for name, p in run.parameters.items()}
    run.train()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * build.rate(config, 2) / config.steps.lr)
    after, facts = files.load(tmp_path / "alone" / RESULT)
    assert set(after) == {*before, *first} and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(torch.equal(after[name], tensor.bfloat16()) for name, tensor in first.items())
    known = latentmem.load(config.model, adapters=str(tmp_path / "before"), device="cpu")
    llm = latentmem.load(config.model, adapters=str(tmp_path / "alone"), device="cpu")
    assert facts["from"] == known.adapters.identity != llm.adapters.identity
    assert known.retriever.projectors is None and llm.retriever.projectors is not None


def test_alone_no_gradient_is_kept_of_what_is_read(config, tmp_path):
    run = Run(replace(config, retriever=replace(config.retriever, alone=True)), tmp_path)
    seen = []
    run.llm.decoder.layers[1].register_forward_hook(lambda _, __, out: seen.append(out))
    run.train(stop=1)
    assert seen and not any((out[0] if isinstance(out, tuple) else out).requires_grad for out in seen)


def test_it_begins_the_same_for_the_same_seed(config, tmp_path):
    one, two, other = (
        Run(replace(config, seed=seed), tmp_path / str(i)).learner.retriever for i, seed in enumerate((0, 0, 1))
    )
    for mine, theirs, others in zip(*(r.parameters() for r in (one, two, other)), strict=True):
        assert torch.equal(mine, theirs) and not torch.equal(mine, others)
        assert mine.abs().max() <= mine.shape[1] ** -0.5 and 0.4 < (mine.abs() * mine.shape[1] ** 0.5).mean() < 0.6


def test_a_run_of_before_it_could_be_trained_goes_on(config, tmp_path):
    config = replace(config, retriever=RetrieverShape())
    Run(config, tmp_path / "run").train(stop=1)
    file = tmp_path / "run" / "config.json"
    facts = json.loads(file.read_text())
    del facts["config"]["retriever"]
    file.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"other settings \(retriever\)"):
        Run(replace(config, retriever=RetrieverShape(4)), tmp_path / "run").train()
    Run(config, tmp_path / "run").train()


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retriever", "named"),
    [
        ({"width": -1}, "width and retriever.hidden must not be negative"),
        ({"width": 4, "hidden": -1}, "must not be negative"),
        ({"width": 4, "weight": 0.0}, "retriever.weight must be above 0, got 0.0"),
        ({"width": 4, "lr": 0.0}, "retriever.lr must be above 0, got 0.0"),
        ({"alone": True}, "retriever.alone needs a retriever.width above 0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(retriever, named):
    with pytest.raises(ValueError, match=named):
        Config(data=(Source("x"),), retriever=RetrieverShape(**retriever))


def test_something_must_be_asked_about_a_text():
    some = {"data": (Source("x"),), "retriever": RetrieverShape(4)}
    with pytest.raises(ValueError, match="needs an objective that asks about texts; unrelated, chat, everyday do not"):
        Config(objectives={"unrelated": 1.0, "chat": 1.0, "recall": 0.0}, **some)
    assert Config(objectives={"unrelated": 1.0, "unknown": 0.1}, **some).retriever.sizes == {"width": 4, "hidden": 8}
