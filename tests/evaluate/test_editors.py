"""Ways to edit: each against its definition, undone to the bit, and kept on disk."""

import contextlib
import copy
import hashlib

import pytest
import torch

from latentmem.decoder import adapters
from latentmem.evaluate.baselines import editors
from latentmem.evaluate.baselines import tuning as tunings
from latentmem.evaluate.baselines.editors import Demonstrations, InContext, Plain, Retrieved, Written
from latentmem.evaluate.baselines.rome import RankOne, rank_one
from latentmem.evaluate.baselines.tuning import FineTuned, LowRank
from latentmem.evaluate.data.edits import Edit, EditSet, Probe
from latentmem.model.model import MemoryModel
from latentmem.testing import byte_tokenizer, tiny_model

ARTICLES = tuple(f"Article {i} tells of harbour number {i}, of its {i} ships and of all who sail." for i in range(6))
EDIT = Edit("e0", "Aud Ling", Probe("Who taught Aud Ling?", "Bo"), (Probe("Aud Ling's teacher?", "Bo"),), ())


def made(i):
    return Edit(
        f"e{i}",
        f"Person{i}",
        Probe(f"Who taught Person{i} in town{i % 3}?", f"Teacher{i}"),
        (Probe(f"Whose pupil was Person{i}?", f"Teacher{i}"),),
        (Probe(f"how long is river {i}?", f"{i} miles"),),
    )


def tiny(*, inserted=False, dtype=torch.float32, **config):
    base = tiny_model(**config).to(dtype)
    pair = (
        adapters.insert(base, r=2, alpha=4, dropout=0.0, target_modules=["q_proj", "down_proj"]) if inserted else None
    )
    return MemoryModel(base, byte_tokenizer(), name="tiny", adapters=pair)


@pytest.fixture
def llm():
    return tiny()


def ids(llm, edit):
    prompts = llm.prompts
    return prompts.question(edit.rewrite.prompt, bare=False), prompts.answer(edit.rewrite.prompt, edit.rewrite.answer)


def scored(llm, way, state, edit=EDIT):
    prompt, answer = ids(llm, edit)
    with way.reading(state) as context:
        return llm.score_rows(context, [prompt], [answer])[0].logprobs


def ways(llm):
    data = EditSet("zsre", "made up", tuple(map(made, range(12))), (), ARTICLES)
    return {
        "none": Plain(llm),
        "context": InContext(llm),
        "bm25": Retrieved(llm),
        "ike": Demonstrations(llm, data, count=3),
        "memory": Written(llm, lambda: llm.empty(64)),
        "ft": FineTuned(llm, True, steps=3, rate=0.01),
        "ft-l": FineTuned(llm, True, layers=2, bound=1e-3, steps=3, rate=0.01),
        "lora": LowRank(llm, True, rank=2, alpha=4, steps=3, rate=0.01),
        "rome": RankOne(llm, True, ARTICLES, steps=3),
    }


def identity(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- undone, kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inserted", [False, True])
def test_every_edit_is_undone_to_the_bit_and_changes_what_is_said_until_then(inserted):
    llm = tiny(inserted=inserted)
    before, plain = identity(llm.base), scored(llm, Plain(llm), None)
    for name, way in ways(llm).items():
        state = way.edit(way.start("e0"), EDIT)
        with_edit = scored(llm, way, state)
        assert torch.equal(with_edit, plain) == (name == "none"), name
        assert identity(llm.base) == before and torch.equal(scored(llm, Plain(llm), None), plain), name
        assert torch.equal(scored(llm, way, state), with_edit), name
        assert not any(p.requires_grad for p in llm.base.parameters())


def test_an_edit_is_undone_when_it_is_broken_off(llm):
    plain, way = scored(llm, Plain(llm), None), ways(llm)["ft"]
    with pytest.raises(KeyboardInterrupt), way.reading(way.edit(way.start("e0"), EDIT)):
        raise KeyboardInterrupt
    assert torch.equal(scored(llm, Plain(llm), None), plain)


@pytest.mark.parametrize("name", ["none", "context", "bm25", "memory", "ft", "ft-l", "lora", "rome"])
def test_a_state_comes_back_from_disk_and_goes_on_as_if_it_had_stayed(llm, name, tmp_path):
    way = ways(llm)[name]
    state = way.edit(way.start("s"), EDIT)
    way.save(state, tmp_path / "state")
    back = way.load(tmp_path / "state")
    assert torch.equal(scored(llm, way, back), scored(llm, way, state))
    again, after = way.edit(back, made(1)), way.edit(state, made(1))
    assert torch.equal(scored(llm, way, again), scored(llm, way, after))


def test_what_is_not_edited_yet_is_the_plain_model(llm):
    plain = scored(llm, Plain(llm), None)
    for name in ("context", "bm25", "memory", "ft", "ft-l", "lora", "rome"):
        way = ways(llm)[name]
        assert torch.equal(scored(llm, way, way.start("e0")), plain), name


def test_a_change_that_bfloat16_can_not_hold_is_not_rounded_away():
    llm = tiny(dtype=torch.bfloat16)
    name, layer = next(iter(tunings.linears(llm, "2.mlp").items()))
    more = torch.full(layer.weight.shape, 1e-4)
    lost = (layer.weight.abs() > 0.1).float()  # where the weight is so large that it would not move
    assert torch.equal(layer.weight * lost, (layer.weight + more.bfloat16()) * lost) and lost.sum() > 100
    x = torch.randn(1, 4, layer.in_features, generator=torch.Generator().manual_seed(0))
    with tunings.added(llm, {name: (more * lost,)}):
        moved = layer(x.bfloat16())
    expected = layer(x.bfloat16()).float() + x.bfloat16().float() @ (more * lost).T
    assert torch.equal(moved, expected.bfloat16()) and not torch.equal(moved, layer(x.bfloat16()))


# --- fine-tuning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "bound"), [(1, None), (2, 4e-3)])
def test_fine_tuning_is_adam_on_the_weights_of_the_last_mlps(llm, layers, bound):
    way = FineTuned(llm, True, layers=layers, bound=bound, steps=5, rate=2e-3)
    change = way.edit(way.start("e0"), EDIT)
    plain, (prompt, answer) = copy.deepcopy(tiny_model()), ids(llm, EDIT)
    parts = [plain.model.layers[i].mlp for i in range(3)[-layers:]]
    weights = [part.down_proj.weight for part in parts]
    first = [w.detach().clone() for w in weights]
    optimizer = torch.optim.Adam(weights, lr=2e-3)
    for _ in range(5):
        logits = plain(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        loss = -logits.log_softmax(-1)[range(len(answer)), answer].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if bound is not None:
            with torch.no_grad():
                for w, w0 in zip(weights, first, strict=True):
                    w.copy_(w0 + (w - w0).clamp(-bound, bound))
    names = [f"{i}.mlp.down_proj" for i in range(3)[-layers:]]
    assert list(change) == names
    for name, w, w0 in zip(names, weights, first, strict=True):
        torch.testing.assert_close(change[name][0], w.detach() - w0, atol=2e-5, rtol=0)
    with way.reading(change) as context:
        mine = llm.score_rows(context, [prompt], [answer])[0].logprobs
    theirs = plain(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(mine, theirs[range(len(answer)), answer].detach(), atol=1e-3, rtol=0)


def test_within_a_bound_no_weight_moves_further_in_one_edit(llm):
    way = FineTuned(llm, True, layers=2, bound=1e-4, steps=4, rate=1e-3)
    one = way.edit(way.start("e0"), EDIT)
    two = way.edit(one, made(1))
    largest = [max(c[n][0].abs().max().item() for n in c) for c in (one, two)]
    assert largest[0] == pytest.approx(1e-4) and largest[1] == pytest.approx(2e-4)


def test_fine_tuning_stops_when_it_has_learned_its_answer(llm, monkeypatch):
    monkeypatch.setattr(tunings, "ENOUGH", 1.0)  # the last layer of this model gets to 0.75 nats
    way, steps = FineTuned(llm, True, steps=200, rate=0.01), []
    monkeypatch.setattr(way, "bounded", lambda before, after: steps.append(1))
    state = way.edit(way.start("e0"), EDIT)
    assert -scored(llm, way, state).mean() < 1.0 < -scored(llm, Plain(llm), None).mean() and 1 < len(steps) < 50
    done = len(steps)
    again = way.edit(state, EDIT)  # it is known: not one step
    assert len(steps) == done and all(torch.equal(again[n][0], state[n][0]) for n in state)


def test_layers_below_an_edit_are_run_once_and_nothing_else_changes(llm, monkeypatch):
    def edited(name):
        way = ways(llm)[name]
        return way.edit(way.edit(way.start("s"), made(1)), EDIT)

    runs = []
    for i, layer in enumerate(llm.decoder.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: runs.append(i))
    mine = {name: edited(name) for name in ("ft", "ft-l", "lora")}
    assert [runs.count(i) for i in range(3)] == [2 + 2 + 6, 2 + 6 + 6, 6 + 6 + 6]  # two edits of three steps each
    assert not any("forward" in layer.__dict__ for layer in llm.decoder.layers)
    monkeypatch.setattr(tunings.Weights, "above", lambda self, i, rows: contextlib.nullcontext())
    for name, change in mine.items():
        theirs = edited(name)
        assert all(torch.equal(a, b) for n in change for a, b in zip(change[n], theirs[n], strict=True)), name


def test_low_rank_is_what_peft_makes_of_the_same_factors(llm):
    from peft import LoraConfig, inject_adapter_in_model

    way = LowRank(llm, True, rank=3, alpha=12, steps=3, rate=0.05)
    begun = way.start("e0")
    assert all(not B.any() and A.shape[0] == 3 for A, B in begun.values())
    first = "0.self_attn.q_proj"
    assert torch.equal(way.start("e0")[first][0], begun[first][0])
    assert not torch.equal(way.start("e1")[first][0], begun[first][0])
    state = way.edit(begun, EDIT)
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    theirs = inject_adapter_in_model(config, tiny_model()).eval()
    with torch.no_grad():
        for name, (A, B) in state.items():
            layer = theirs.model.layers.get_submodule(name)
            bound = layer.lora_A["default"].weight.abs().max()
            assert begun[name][0].abs().max() == pytest.approx(bound.item(), rel=0.2)  # begun alike
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B)
        prompt, answer = ids(llm, EDIT)
        logits = theirs(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(scored(llm, way, state), logits[range(len(answer)), answer], atol=1e-4, rtol=1e-4)


# --- the rank-one edit ----------------------------------------------------------------------------------------------


def test_the_rank_one_change_gives_the_key_its_value_and_moves_other_keys_least():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(200, 6, generator=generator, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 7).double())
    W, k = torch.randn(4, 6, generator=generator, dtype=torch.float64), keys[3] + 1
    v, C = torch.randn(4, generator=generator, dtype=torch.float64), keys.T @ keys / 200
    D = rank_one(C, k, v - W @ k).double()
    torch.testing.assert_close((W + D) @ k, v, atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(D, rtol=1e-5) == 1
    row = D[0] / D[0].norm()
    direction = torch.linalg.inv(C) @ k
    torch.testing.assert_close(row.abs(), (direction / direction.norm()).abs(), atol=1e-6, rtol=1e-5)
    moved = (keys @ D.T).square().sum(1).mean()
    for _ in range(20):  # any other change that does the same for k, because it adds rows orthogonal to k
        more = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        other = D + 0.1 * (more - torch.outer(more @ k, k) / (k @ k))
        torch.testing.assert_close(other @ k, D @ k)
        assert (keys @ other.T).square().sum(1).mean() > moved


def test_an_edit_of_the_model_gives_the_mean_key_its_value_exactly(llm):
    way = RankOne(llm, True, ARTICLES, layer=1, beginnings=3, steps=5)
    assert way.name == "1.mlp.down_proj" and RankOne(llm, True, ARTICLES).layer == 0  # a quarter of three layers
    state = way.edit(way.edit(way.start("e0"), made(1)), EDIT)
    before = way.edit(way.start("e0"), made(1))
    k, W = way.key(EDIT), way.down.weight
    with tunings.added(llm, before):
        more = way.value(EDIT, way._prompts(EDIT))
    D, D0 = state[way.name][0], before[way.name][0]
    torch.testing.assert_close((W + D) @ k, (W + D0) @ k + more, atol=1e-4, rtol=1e-4)
    assert torch.linalg.matrix_rank(D - D0, rtol=1e-4) == 1 and more.norm() > 0
    torch.testing.assert_close(scored(llm, way, state), told(llm, {way.name: W + D}), atol=1e-4, rtol=1e-4)


def told(llm, weights):
    """The answer's likelihood by a model that really has these weights."""
    plain, (prompt, answer) = tiny_model(), ids(llm, EDIT)
    with torch.no_grad():
        for name, weight in weights.items():
            plain.model.layers.get_submodule(name).weight.copy_(weight)
        logits = plain(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits[range(len(answer)), answer]


def test_the_key_is_what_goes_into_the_layer_at_the_subject(llm):
    way, plain = RankOne(llm, True, ARTICLES, layer=1, beginnings=2), tiny_model()
    seen = []
    plain.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    begun = [" ".join(article.split()[:8]) for article in ARTICLES[:2]]
    expected = []
    for prompt in ("Who taught Aud Ling?", *(f"{some}. Who taught Aud Ling?" for some in begun)):
        row = llm.prompts.question(prompt, bare=False)
        place = bytes(i - 4 if i > 3 else 0 for i in row).find(bytes(llm.prompts.text("g?")[j] - 4 for j in range(2)))
        with torch.no_grad():
            plain(torch.tensor([row]))
        expected.append(seen[-1][place])
    torch.testing.assert_close(way.key(EDIT), torch.stack(expected).mean(0), atol=1e-4, rtol=1e-4)


def test_the_second_moments_are_the_mean_over_all_tokens(llm):
    way, plain = RankOne(llm, True, ARTICLES[:2], layer=1), tiny_model()
    seen = []
    plain.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for article in ARTICLES[:2]:
            plain(torch.tensor([[*llm.prompts.opening, *llm.prompts.text(article)]]))
    keys = torch.cat(seen).double()
    torch.testing.assert_close(way.moments, keys.T @ keys / len(keys), atol=1e-5, rtol=1e-4)


def test_the_value_makes_the_answer_likelier_when_it_comes_out_at_the_subject(llm):
    way = RankOne(llm, True, ARTICLES, layer=0, beginnings=0, steps=60, clamp=20)
    more, (prompt, answer) = way.value(EDIT, [EDIT.rewrite.prompt]), ids(llm, EDIT)
    plain, place = tiny_model(), editors.last_of(llm, prompt, EDIT.rewrite.prompt, EDIT.subject)

    def likely():
        with torch.no_grad():
            rows = plain(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return rows[range(len(answer)), answer].mean().item()

    before = likely()
    comes_out = []

    def add(module, inputs, output):
        comes_out.append(output[0, place])
        at = torch.arange(output.shape[1])[:, None] == place
        return output + at * more

    plain.model.layers[0].mlp.down_proj.register_forward_hook(add)
    assert likely() > before + 1
    assert more.norm() <= 20.001 * comes_out[0].norm()
    near = RankOne(llm, True, ARTICLES, layer=0, beginnings=0, steps=60, clamp=0.5).value(EDIT, [EDIT.rewrite.prompt])
    assert near.norm().item() == pytest.approx(0.5 * comes_out[0].norm().item(), rel=1e-3)


def test_a_rank_one_edit_says_what_it_can_not_do(llm):
    way = RankOne(llm, True, ARTICLES[:1], tokens=10)
    with pytest.raises(ValueError, match=r"second moments of keys of 48 numbers need .* the articles have 1\d"):
        way.start("e0")
    with pytest.raises(ValueError, match="'Bea' is not in 'Who taught Aud Ling"):
        editors.last_of(llm, ids(llm, EDIT)[0], EDIT.rewrite.prompt, "Bea")
    with pytest.raises(ValueError, match="does not give 'Who taught Aud Ling"):
        editors.last_of(llm, [5, 6, 7], EDIT.rewrite.prompt, "Aud Ling")
    way.down.__class__ = torch.nn.Identity
    for layer in list(tunings.linears(llm, "0.mlp").values()):
        layer.__class__ = torch.nn.Identity
    with pytest.raises(ValueError, match=r"0\.mlp of tiny has no plain linear layers"):
        RankOne(llm, True, ARTICLES)


@pytest.mark.parametrize("subject", ["Ada", "Zo\u00eb \u00c5ngstr\u00f6m", "\u5317\u4eac"])
def test_the_subject_is_found_to_its_last_token(llm, subject):
    prompt = f"Where was {subject} born, asked {subject}?"
    row = llm.prompts.question(prompt, bare=False)
    place = editors.last_of(llm, row, prompt, subject)
    assert llm.tokenizer.decode(row[: place + 1]).endswith(f"Where was {subject}")


# --- prompts and demonstrations -------------------------------------------------------------------------------------


def test_a_question_is_asked_and_a_sentence_is_gone_on_with(llm):
    asked = editors.prompt_ids(llm, "Who?", question=True, bare=False)
    begun = editors.prompt_ids(llm, "It is", question=False, bare=True)
    assert asked == llm.prompts.question("Who?", bare=False) and begun == llm.prompts.text("It is")
    assert editors.answer_ids(llm, "It is", "red", question=False) == llm.prompts.text(" red")
    assert editors.answer_ids(llm, "Who?", "red", question=True) == llm.prompts.text("red")


def test_demonstrations_are_the_nearest_records_in_three_kinds_and_hold_nothing_that_is_asked(llm):
    edits = [made(i) for i in range(40)]
    twin = Edit("twin", "x", edits[0].rewrite, edits[0].rephrased, edits[0].unrelated)  # asks the same as e0
    data = EditSet("zsre", "made up", (*edits, twin), (), ())
    text = Demonstrations(llm, data, count=16).text(edits[0])
    *shown, own, last = text.split("\n\n")
    fact = "Who taught Person0 in town0? Teacher0"
    assert (own, last) == (f"New Fact: {fact}\n{fact}", f"New Fact: {fact}\n") and len(shown) == 16
    kinds = []
    for part in reversed(shown):
        fact, prompt = part.split("\n")
        who = fact.split()[4]
        assert who != "Person0" and "river 0?" not in prompt
        i = who.removeprefix("Person")
        wanted = {
            "copy": f"Who taught Person{i} in town{int(i) % 3}? Teacher{i}",
            "update": f"Whose pupil was Person{i}? Teacher{i}",
            "retain": f"how long is river {i}? {i} miles",
        }
        kinds.append(next(kind for kind, line in wanted.items() if line == prompt))
    assert kinds == ["copy", *["update"] * 3, *["retain"] * 4] * 2
    near = [part.split("?")[0].split()[-1] for part in shown[-10:]]
    assert set(near) == {"town0"}  # the nearest share the town, and stand last
