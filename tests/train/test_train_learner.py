"""What an episode teaches: its loss and gradients against the literal reference, in a memory where texts have ages."""

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import reference
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from test_adapters import write_reference
from torch.nn.functional import cross_entropy, log_softmax, softmax
from torch.utils.checkpoint import CheckpointError, checkpoint

from latentmem.core import memory as memories
from latentmem.core.settings import MemorySettings
from latentmem.core.write import write_exact
from latentmem.decoder.adapters import READ, WRITE, Adapters, insert
from latentmem.decoder.cache import attention_mask, functional_cache
from latentmem.decoder.decoder import Decoder
from latentmem.model.backbone import Trained
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Prompts, Style
from latentmem.testing import byte_tokenizer, tiny_model, updated
from latentmem.train import build
from latentmem.train.build import recompute
from latentmem.train.config import OBJECTIVES, Config, PoolSettings, Source, Steps, Texts
from latentmem.train.data import Apart, Documents, cloze, sentences
from latentmem.train.episode import Episode, Row
from latentmem.train.episodes import REPLY, Episodes
from latentmem.train.facts import UNKNOWN
from latentmem.train.learner import Learner, remember
from latentmem.train.passages import NODS, OPENINGS, PASSAGE
from latentmem.train.scenes import SCENES

N, K, R, ALPHA = 96, 12, 3, 6.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMS = [("exact", 1), ("exact", 3), ("paper", 1)]
TEXTS = ((7, 91, 33, 250, 18, 64, 5), (120, 77, 201, 9, 14), (44, 8, 150, 61, 72, 210, 99, 31, 17))
ROWS = (
    Row((40, 9, 133), (8, 222, 31, 2), 0),
    Row((60,), (61, 90, 14, 100, 7, 7), 1),
    Row((8, 8, 25, 6, 190), (12, 2), 2),
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learner_of(preset="exact", c=1, *, attention="sdpa", dtype=torch.float32, size=0.15, kind="llama", **config):
    """A tiny learner whose adapters, bos and mark are random and not small; of size 0 they change nothing."""
    base = tiny_model(kind, attention=attention, initializer_range=0.15, **config)
    llm = MemoryModel(base.to(dtype), byte_tokenizer())
    llm.adapters = insert(llm.base, r=R, alpha=ALPHA, dropout=0.0, target_modules=TARGETS)
    for i, (_, weight) in enumerate(llm.adapters.parameters()):
        weight.data = (size * random(*weight.shape, seed=i)).to(dtype)
        weight.requires_grad_(True)
    L, d = llm.decoder.L, llm.decoder.d
    trained = {"bos": random(L, 1, d, seed=4), "mark": random(d, seed=5)} if preset == "paper" else {}
    return Learner(llm, PoolSettings(N=N, K=K, preset=preset, compression=c), **trained)


def episode_of(texts=TEXTS, ages=None, *, in_sequence=True, fill=1.0, rows=ROWS, taught=False, seed=0):
    ages = (0,) * len(texts) if ages is None else ages
    return Episode("questions", ("",) * len(texts), texts, ages, in_sequence, fill, rows, taught, seed)


def pool_of(learner, updates=0, *, seed=0):
    """A memory that holds what is left of so many updates of five random slots, each slot with its birth."""
    D = learner.llm.decoder
    pool = memories.empty(
        D.L, D.d, MemorySettings(N, K, learner.settings.preset, learner.settings.compression), dtype=D.dtype
    )
    for i in range(updates):
        pool = updated(pool, random(D.L, 5, D.d, seed=1000 * seed + i + 7).to(D.dtype))
    return pool


def learned(learner):
    """The weights that are trained, by name."""
    return {name: weight for name, weight in learner.named_parameters() if weight.requires_grad}


def gradients(loss, learner):
    weights = learned(learner)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))


def same_gradients(ours, theirs, learner, precision):
    """Each within a part of its own largest entry. None is missing but those of the last layer's write in "exact"."""
    for name, g in theirs.items():
        if learner.settings.preset == "exact" and ".2." in name and WRITE in name:  # its output is no slot
            assert ours[name] is None and g is None, name
        else:
            assert g.abs().max() > 0 and (ours[name] - g).abs().max() <= precision * g.abs().max(), name


# --- the loss and its gradients -------------------------------------------------------------------------------------


def at_answers(logits, rows=ROWS):
    """The logits that predict the rows' answers, from each row's [n, vocab], and the answers' tokens."""
    parts = [part[len(row.prompt) - 1 : -1] for part, row in zip(logits, rows, strict=True)]
    return torch.cat(parts), torch.tensor([i for row in rows for i in row.answer])


def model_of(learner):
    """The model as its user has it, and an empty memory."""
    llm, of = learner.llm, (N, K, learner.settings.preset, learner.settings.compression)
    if learner.settings.preset == "paper":
        llm = llm.with_trained(Trained(learner.bos, learner.mark, llm.empty(*of)))
    return llm, llm.empty(*of, choice=learner.settings.choice)


def through_the_model(learner, episode):
    """The loss by `new_slots`, `update` and `logits`."""
    llm, start = model_of(learner)
    memory = start
    for text in episode.texts:
        memory = updated(memory, llm.new_slots(memory if episode.in_sequence else start, text))
    return cross_entropy(*at_answers([llm.logits(memory, row.prompt + row.answer) for row in episode.rows]))


def grown(learner, adapter):
    """A plain model with weights W + scale B A, from which gradients flow into A and B."""
    plain = tiny_model(initializer_range=0.15)
    for name, layer in learner.llm.base.named_modules():
        if hasattr(layer, "lora_A"):
            part = plain.get_submodule(name)
            whole = part.weight.detach() + ALPHA / R * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
            del part.weight
            part.weight = whole
    return plain


def through_the_reference(learner, episode):
    """The loss by the literal twin: whole layers over everything that stands in front."""
    write, read, c = grown(learner, WRITE), grown(learner, READ), learner.settings.compression
    slots = learner.first[:, :0]
    for text in episode.texts:
        seen = slots if episode.in_sequence else slots[:, :0]
        if learner.settings.preset == "paper":
            new = reference.write_paper(write, learner.bos, learner.mark, seen, text, K)
        else:
            every = write_reference(write, read, learner.first, seen, list(text))
            new = every[:, reference.last(text, c)]
        slots = torch.cat([slots, new], dim=1)
    rows = (row.prompt + row.answer for row in episode.rows)
    return cross_entropy(*at_answers([reference.read(read, learner.first, slots, row) for row in rows]))


@pytest.mark.parametrize(("way", "precision"), [(through_the_model, 5e-5), (through_the_reference, 5e-5)])
@pytest.mark.parametrize("in_sequence", [True, False], ids=["in_sequence", "beside"])
@pytest.mark.parametrize(("preset", "c"), FORMS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_all_gradients_are_those_of(way, precision, in_sequence, preset, c, attention):
    learner, episode = learner_of(preset, c, attention=attention), episode_of(in_sequence=in_sequence)
    ours, theirs = learner(episode, pool_of(learner)).loss, way(learner, episode)
    assert abs(ours - theirs) < 1e-5
    same_gradients(gradients(ours, learner), gradients(theirs, learner), learner, precision)


@pytest.mark.parametrize("in_sequence", [True, False], ids=["in_sequence", "beside"])
def test_least_expected_tokens_are_learned_from_as_the_model_writes_them(in_sequence):
    learner, episode = learner_of("exact", 3), episode_of(in_sequence=in_sequence)
    last = learner(episode, pool_of(learner)).loss
    learner.settings = replace(learner.settings, choice="surprise")
    ours, theirs = learner(episode, pool_of(learner)).loss, through_the_model(learner, episode)
    assert abs(ours - theirs) < 1e-5 and abs(ours - last) > 1e-3
    same_gradients(gradients(ours, learner), gradients(theirs, learner), learner, 5e-5)


@pytest.mark.parametrize(("preset", "c"), FORMS)
def test_writing_beside_each_other_is_not_writing_in_sequence(preset, c):
    learner = learner_of(preset, c)
    beside, behind = (learner(episode_of(in_sequence=way), pool_of(learner)).loss for way in (False, True))
    assert abs(beside - behind) > 1e-3


@pytest.mark.parametrize("in_sequence", [True, False], ids=["in_sequence", "beside"])
@pytest.mark.parametrize(("preset", "c"), FORMS)
@pytest.mark.parametrize("what", ["lora_A.write", "lora_B.write", "lora_B.read", "bos", "mark"])
def test_a_finite_difference_of_the_loss_is_its_gradient(what, preset, c, in_sequence):
    learner = learner_of(preset, c, dtype=torch.float64)  # the loss itself is made in float32
    pool = pool_of(learner, 0 if READ in what else 40)  # that a write reads the pool with it, too, is left out
    episode = episode_of(ages=(9, 3, 0), in_sequence=in_sequence)
    found = {n: g for n, g in gradients(learner(episode, pool).loss, learner).items() if g is not None and what in n}
    if preset == "exact" and what in ("bos", "mark"):
        assert not found
        return
    length = torch.stack([g.norm() for g in found.values()]).norm().item()
    step, losses = 0.003 / length, []  # along the gradient, so that the loss changes by about 0.006
    for sign in (1, -2):
        with torch.no_grad():
            for name, g in found.items():
                learned(learner)[name].add_(sign * step * g / length)
            losses.append(learner(episode, pool).loss.item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(length, rel=2e-3)


# --- ages -----------------------------------------------------------------------------------------------------------

DISTINCT = tuple(tuple(range(10 + 40 * i, 10 + 40 * i + n)) for i, n in enumerate((11, 7, 12)))  # each token once


def read_by(learner, episode, pool):
    """What a pass's rows read: (outcome, slots [L, P, d], for each layer pairs ("pool" or number of text, number))."""
    asked, plain = [], learner._cache
    learner._cache = lambda *args: asked.append(args) or plain(*args)
    try:
        outcome = learner(episode, pool)
    finally:
        del learner._cache
    before, fresh, order = asked[-1]
    every = torch.cat([before, *fresh], dim=1)
    slots = every.gather(1, order[..., None].expand(-1, -1, every.shape[2])).detach()
    kinds = {"pool": pool.slots, **dict(enumerate(outcome.new_slots))}
    where = [
        {slot.numpy().tobytes(): (k, n) for k, all_ in kinds.items() for n, slot in enumerate(all_[i])}
        for i in range(pool.L)
    ]
    return outcome, slots, [[where[i][slot.numpy().tobytes()] for slot in slots[i]] for i in range(pool.L)]


@pytest.mark.parametrize("in_sequence", [True, False], ids=["in_sequence", "beside"])
@pytest.mark.parametrize("ages", [(9, 3, 0), (0, 0, 0), (1, 7, 2), (14, 14, 5)])
@pytest.mark.parametrize(("preset", "c"), FORMS)
def test_a_text_stands_at_its_age_and_is_dropped_from_as_often(preset, c, ages, in_sequence):
    learner = learner_of(preset, c)
    pool = pool_of(learner, 40)
    assert pool.M == N and not torch.equal(pool.births[0], pool.births[1])
    outcome, _, read = read_by(learner, episode_of(DISTINCT, ages, in_sequence=in_sequence), pool)
    room = N - sum(slots.shape[1] for slots in outcome.new_slots)
    for births, labels in zip(pool.births, read, strict=True):
        old = [n for kind, n in labels if kind == "pool"]
        assert old == list(range(N - room, N))  # the newest, in their order
        for text, age in enumerate(ages):
            k = outcome.new_slots[text].shape[1]
            mine = [n for kind, n in labels if kind == text]
            assert mine == sorted(mine) and len(set(mine)) == len(mine) == max(1, round(((N - k) / N) ** age * k))
            places = [at for at, (kind, _) in enumerate(labels) if kind == text]
            assert places == list(range(places[0], places[0] + len(places)))
            born = births.tolist()
            assert all(born[n] <= 40 - age for kind, n in labels[: places[0]] if kind == "pool")
            assert all(born[n] > 40 - age for kind, n in labels[places[-1] :] if kind == "pool")
            behind = {ages[kind] for kind, _ in labels[places[-1] :] if kind != "pool"}
            assert all(other <= age for other in behind)
    if max(ages) > 0:
        assert any(labels != read[0] for labels in read)  # each layer drops its own


@pytest.mark.parametrize("window", [None, 9], ids=["all", "window"])  # a window counts slots in the order of age
@pytest.mark.parametrize(("preset", "c"), FORMS)
def test_what_stands_there_is_what_the_rows_read(preset, c, window):
    learner = learner_of(preset, c, kind="mistral", sliding_window=window)
    outcome, slots, _ = read_by(learner, episode_of(DISTINCT, (9, 3, 0)), pool_of(learner, 40))
    llm, memory = model_of(learner)
    old = torch.zeros(slots.shape[:2], dtype=torch.int32)
    memory = replace(memory, slots=slots, births=old, origins=old - 1)
    with torch.no_grad():
        theirs = cross_entropy(*at_answers([llm.logits(memory, row.prompt + row.answer) for row in ROWS]))
    assert abs(outcome.loss - theirs) < 1e-5


def test_without_a_pool_the_older_text_stands_first():
    learner = learner_of()
    _, _, read = read_by(learner, episode_of(DISTINCT, (1, 7, 2), fill=0.0, in_sequence=False), pool_of(learner, 40))
    assert [list(dict.fromkeys(kind for kind, _ in labels)) for labels in read] == [[1, 2, 0]] * 3


@pytest.mark.parametrize("fill", [0.0, 0.25, 0.5, 1.0])
def test_the_fill_is_the_share_of_the_pool_that_stands_in_front(fill):
    learner = learner_of()
    pool, room = pool_of(learner, 40), N - sum(map(len, DISTINCT))
    _, _, read = read_by(learner, episode_of(DISTINCT, fill=fill), pool)
    assert {sum(kind == "pool" for kind, _ in labels) for labels in read} == {min(int(fill * N), room)}


def test_a_very_old_text_keeps_one_slot():
    learner = learner_of()
    _, _, read = read_by(learner, episode_of(DISTINCT, (500, 500, 500)), pool_of(learner, 40))
    assert all(sum(kind == text for kind, _ in labels) == 1 for labels in read for text in range(3))


def test_what_is_dropped_is_decided_by_the_episodes_seed():
    learner = learner_of()
    pool = pool_of(learner, 40)
    first, again, other = (read_by(learner, episode_of(DISTINCT, (9, 3, 0), seed=s), pool)[2] for s in (1, 1, 2))
    assert first == again != other


# --- the pool -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "c"), FORMS)
def test_a_pass_does_not_change_the_pool(preset, c):
    learner = learner_of(preset, c)
    pool = pool_of(learner, 40)
    before = pool.slots.clone()
    outcome = learner(episode_of(ages=(9, 3, 0)), pool)
    outcome.loss.backward()
    assert torch.equal(pool.slots, before) and pool.slots.grad is None and not pool.slots.requires_grad
    assert not any(slots.requires_grad for slots in outcome.new_slots)
    assert [slots.shape[1] for slots in outcome.new_slots] == (
        [K] * 3 if preset == "paper" else [-(-n // c) for n in (7, 5, 9)]
    )


@pytest.mark.parametrize("from_pool", [False, True])
@pytest.mark.parametrize("in_sequence", [True, False], ids=["in_sequence", "beside"])
@pytest.mark.parametrize("c", [1, 3, 4])
def test_an_episode_is_written_with_its_own_tokens_per_slot(c, in_sequence, from_pool):
    learner, own = learner_of("exact", 2), learner_of("exact", c)
    episode = replace(episode_of(ages=(9, 3, 0), in_sequence=in_sequence), from_pool=from_pool)
    ours, theirs = learner(replace(episode, compression=c), pool_of(learner, 40)), own(episode, pool_of(own, 40))
    assert [slots.shape[1] for slots in ours.new_slots] == [-(-n // c) for n in (7, 5, 9)]
    assert ours.loss == theirs.loss != learner(episode, pool_of(learner, 40)).loss


def behind(learner, pool):
    """The model, and a memory of its own that holds a pool."""
    llm, memory = model_of(learner)
    return llm, replace(pool.with_settings(compression=memory.compression, choice=memory.choice), **identities(memory))


def identities(memory):
    return {name: getattr(memory, name) for name in ("model", "model_name", "adapters", "tokenizer")}


@pytest.mark.parametrize(("preset", "c"), FORMS)
def test_how_the_pool_is_read_is_learned(preset, c):
    learner = learner_of(preset, c)
    pool, asked = pool_of(learner, 40), replace(episode_of(texts=()), from_pool=True)
    llm, memory = behind(learner, pool)
    ours = learner(asked, pool).loss
    theirs = cross_entropy(*at_answers([llm.logits(memory, row.prompt + row.answer) for row in ROWS]))
    assert abs(ours - theirs) < 1e-5
    mine, other = gradients(ours, learner), gradients(theirs, learner)
    same_gradients(
        {n: g for n, g in mine.items() if READ in n}, {n: g for n, g in other.items() if READ in n}, learner, 5e-5
    )
    assert all(g is None for n, g in mine.items() if WRITE in n)


@pytest.mark.parametrize(("preset", "c"), FORMS)
def test_recall_writes_into_the_pool_as_in_use_and_reads_all_of_it(preset, c):
    learner = learner_of(preset, c)
    pool, asked = pool_of(learner, 40), replace(episode_of(), from_pool=True)
    llm, memory = behind(learner, pool)
    with torch.no_grad():
        for text in TEXTS:
            memory = updated(memory, llm.new_slots(memory, text))
        theirs = cross_entropy(*at_answers([llm.logits(memory, row.prompt + row.answer) for row in ROWS]))
    outcome = learner(asked, pool)
    assert abs(outcome.loss - theirs) < 1e-5
    found = gradients(outcome.loss, learner)
    assert all((g is None) == (WRITE in name or name == "mark") for name, g in found.items())
    for slots in outcome.new_slots:
        pool = remember(pool, slots)
    assert torch.equal(pool.births, memory.births) and (pool.slots - memory.slots).abs().max() < 1e-5


@pytest.mark.parametrize("fill", [0.0, 0.5])
def test_a_copy_of_a_part_of_the_pool_is_written_into_and_nothing_stays(fill):
    learner = learner_of()
    pool = pool_of(learner, 40)
    outcome = learner(replace(episode_of(fill=fill), from_pool=True), pool)
    start = pool.M - min(int(fill * pool.M), N - sum(map(len, TEXTS)))
    newest = {name: getattr(pool, name)[:, start:] for name in ("slots", "births", "origins")}
    whole = learner(replace(episode_of(), from_pool=True), replace(pool, **newest))
    assert outcome.new_slots == [] and len(whole.new_slots) == len(TEXTS)
    assert abs(outcome.loss - whole.loss) < 1e-5
    found = gradients(outcome.loss, learner)
    assert all((g is None) == (WRITE in name) for name, g in found.items())


@pytest.mark.parametrize("window", [None, 9], ids=["all", "window"])
def test_the_last_text_is_read_behind_all_others(window):
    learner = learner_of(kind="mistral", sliding_window=window)
    pool = pool_of(learner, 40)
    for last in range(len(TEXTS)):
        episode = replace(episode_of(fill=0.5), from_pool=True, last=last)
        with torch.no_grad():
            _, memory = learner._remembered(learner._part(pool, episode), episode)
            order = (memory.births == 41 + last).int().argsort(dim=1, stable=True)
            slots = memory.slots.gather(1, order[..., None].expand(-1, -1, memory.slots.shape[2]))
            llm, known = model_of(learner)
            old = torch.zeros(slots.shape[:2], dtype=torch.int32)
            known = replace(known, slots=slots, births=old, origins=old - 1)
            theirs = cross_entropy(*at_answers([llm.logits(known, row.prompt + row.answer) for row in ROWS]))
        assert abs(learner(episode, pool).loss - theirs) < 1e-5


@pytest.mark.parametrize(("preset", "c"), FORMS)
def test_the_loss_depends_on_the_pool(preset, c):
    learner = learner_of(preset, c)
    pools = (pool_of(learner), pool_of(learner, 40), pool_of(learner, 40, seed=1))
    losses = [learner(episode_of(), pool).loss.item() for pool in pools]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-3


# --- two adapters in one graph: the traps ---------------------------------------------------------------------------


def write_then_read(base, use):
    """Backward through a write and a read of what it wrote; `use` makes one adapter active."""
    decoder = Decoder(base)
    with use(WRITE):
        new = write_exact(decoder, None, [torch.tensor(TEXTS[0])], [(1, "last")])[0]
    with use(READ):
        ids = torch.tensor([ROWS[0].prompt])
        behind = functional_cache(decoder, new)
        mask = attention_mask(behind, ids)
        hidden = decoder.body(input_ids=ids, attention_mask=mask, past_key_values=behind, use_cache=False)
        loss = (hidden.last_hidden_state * random(1, 3, decoder.d)).sum()
    loss.backward()


def pefts_own():
    """A model with PEFT's own layers and two random adapters."""
    base = tiny_model(initializer_range=0.15)
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS)
    inject_adapter_in_model(config, base, adapter_name=WRITE)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(config, base, adapter_name=READ)
    base.eval()
    for i, (name, weight) in enumerate(base.named_parameters()):
        weight.requires_grad_("lora_" in name)
        if "lora_" in name:
            weight.data = 0.15 * random(*weight.shape, seed=i)
    return base


def test_pefts_own_switch_loses_the_gradients_of_the_write_and_ours_does_not():
    theirs, ours = pefts_own(), pefts_own()
    layers = [layer for layer in theirs.modules() if isinstance(layer, BaseTunerLayer)]

    def set_adapter(name):
        for layer in layers:
            layer.set_adapter(name)
        return nullcontext()

    write_then_read(theirs, set_adapter)
    write_then_read(ours, Adapters(ours).use)
    lost = {n: w.grad for n, w in theirs.named_parameters() if "lora_" in n}
    kept = {n: w.grad for n, w in ours.named_parameters() if "lora_" in n}
    writes = [name for name in kept if WRITE in name and "layers.2." not in name]
    assert len(writes) == 2 * 2 * len(TARGETS)
    assert all(lost[name] is None for name in writes)
    assert all(kept[name].abs().max() > 0 for name in writes)
    for name in kept:
        if READ in name:
            assert torch.equal(lost[name], kept[name])


@pytest.mark.parametrize("taught", [False, True], ids=["answers", "taught"])
@pytest.mark.parametrize("in_sequence", [True, False], ids=["in_sequence", "beside"])
@pytest.mark.parametrize(("preset", "c"), FORMS)
def test_recomputing_activations_changes_no_gradient(preset, c, in_sequence, taught):
    if preset == "paper" and not build.HOOKS_STAY:
        with pytest.raises(ValueError, match="needs a newer transformers than"):
            recompute(learner_of(preset, c))
        return
    episode, found = episode_of(ages=(9, 3, 0), in_sequence=in_sequence, taught=taught), []
    for again in (False, True):
        learner = learner_of(preset, c)
        if again:
            recompute(learner)
        outcome = learner(episode, pool_of(learner, 40))
        outcome.loss.backward()
        found.append((outcome.loss.item(), {n: w.grad for n, w in learned(learner).items()}))
    assert found[0][0] == found[1][0]
    for name, grad in found[0][1].items():
        again = found[1][1][name]
        assert (grad is None and again is None) or (grad - again).abs().max() <= 1e-6 * grad.abs().max(), name


def test_recomputing_really_recomputes():
    learner, passes = learner_of(), []
    recompute(learner)
    learner.llm.decoder.layers[1].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    loss = learner(episode_of(), pool_of(learner)).loss
    assert len(passes) == 4  # three writes and a read
    loss.backward()
    assert len(passes) == 8


def test_the_stock_checkpoint_replays_under_the_wrong_adapter():
    learner, stock = learner_of(), learner_of()
    learner(episode_of(), pool_of(learner)).loss.backward()
    recompute(stock)
    for layer in stock.llm.decoder.layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # transformers' own
    loss = stock(episode_of(), pool_of(stock)).loss
    assert abs(loss - learner(episode_of(), pool_of(learner)).loss) < 1e-6  # nothing tells
    with stock.llm.adapters.use(READ):
        loss.backward()
    right, wrong = ({n: w.grad for n, w in learned(one).items() if w.grad is not None} for one in (learner, stock))
    gaps = {n: ((wrong[n] - g).abs().max() / g.abs().max()).item() for n, g in right.items() if n in wrong}
    assert max(gaps.values()) > 0.1 or right.keys() != wrong.keys()
    loss = stock(episode_of(), pool_of(stock)).loss
    with pytest.raises(CheckpointError):  # and with none active the replay is another graph
        loss.backward()


# --- distillation ---------------------------------------------------------------------------------------------------


def teacher(learner, rows=ROWS):
    """The plain model's logits at the answers, with the row's text in its context."""
    plain, found = tiny_model(initializer_range=0.15), []
    for row in rows:
        text = () if row.about is None else TEXTS[row.about]
        ids = torch.tensor([[learner.llm.first_token, *text, *row.prompt, *row.answer]])
        found.append(plain(input_ids=ids).logits[0, 1 + len(text) :])
    return at_answers(found, rows)[0]


def test_a_student_that_says_what_the_teacher_says_has_no_loss():
    learner = learner_of(size=0.0)  # a memory that holds one whole text is read like the text: the law
    rows = tuple(replace(row, about=0) for row in ROWS)
    episode = episode_of(TEXTS[:1], rows=rows, taught=True)
    for name, weight in learned(learner).items():
        if "lora_A" in name:
            weight.data = 0.15 * random(*weight.shape)  # else there is no gradient at all
    loss = learner(episode, pool_of(learner)).loss
    assert abs(loss) < 1e-5
    assert all(g is None or g.abs().max() < 1e-4 for g in gradients(loss, learner).values())
    assert learner(replace(episode, taught=False), pool_of(learner)).loss > 1


@pytest.mark.parametrize(("preset", "c"), FORMS)
@torch.no_grad()
def test_the_loss_of_distillation_is_the_divergence_from_the_teacher(preset, c):
    learner = learner_of(preset, c)
    outcome, slots, _ = read_by(learner, episode_of(ages=(9, 3, 0), taught=True), pool_of(learner, 40))
    read = grown(learner, READ)
    rows = [reference.read(read, learner.first, slots, row.prompt + row.answer) for row in ROWS]
    p, q = softmax(teacher(learner), -1), at_answers(rows)[0]
    by_hand = (p * (p.log() - log_softmax(q, -1))).sum(-1).mean()
    assert by_hand > 0.1 and abs(outcome.loss - by_hand) < 1e-5


@pytest.mark.parametrize(("preset", "c"), FORMS)
@torch.no_grad()
def test_unrelated_text_is_to_be_read_as_without_a_memory(preset, c):
    learner = learner_of(preset, c)
    rows = tuple(replace(row, about=None) for row in ROWS)
    pool, episode = pool_of(learner, 40), replace(episode_of(rows=rows, taught=True), from_pool=True)
    llm, memory = behind(learner, pool)
    for text in TEXTS:
        memory = updated(memory, llm.new_slots(memory, text))
    said = at_answers([llm.logits(memory, row.prompt + row.answer) for row in rows])[0]
    p = softmax(teacher(learner, rows), -1)
    by_hand = (p * (p.log() - log_softmax(said, -1))).sum(-1).mean()
    assert by_hand > 0.1 and abs(learner(episode, pool).loss - by_hand) < 1e-5


def said_alone(learner, row, n, bos):
    """What the plain model says to one row alone, by `generate`: up to an end token and with it."""
    plain = tiny_model(initializer_range=0.15)
    plain.generation_config.eos_token_id = learner.base.generation_config.eos_token_id
    ids = torch.tensor([[*bos, *row.prompt]])
    mask = torch.ones_like(ids)
    out = plain.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)
    return tuple(out[0, ids.shape[1] :].tolist())


def asked_in_chat(learner, **prompts):
    """An episode of rows without answers, and what the plain model says to each; for some it is cut short by an end."""
    learner.llm.prompts = Prompts(byte_tokenizer(**prompts))
    rows = tuple(Row(prompt, (), None) for prompt in ((40, 9, 133), (60,), (8, 8, 25, 6, 190, 77, 21), (31, 5)))
    bos = tuple(learner.llm.prompts.opening)
    free = [said_alone(learner, row, 6, bos) for row in rows]
    end = next(token for token in free[0][1:] if token not in free[0][:1])
    learner.base.generation_config.eos_token_id = end
    episode = replace(episode_of(rows=rows, taught=True), objective="chat", from_pool=True, replies=6)
    return episode, [said_alone(learner, row, 6, bos) for row in rows], end, bos


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_replies_are_what_the_plain_model_says_to_each_row_alone(chat, again):
    learner = learner_of()
    episode, said, end, _ = asked_in_chat(learner, chat=chat)
    if again:
        recompute(learner)
    answers = [row.answer for row in learner._replied(episode).rows]
    assert answers == said and 2 <= len(said[0]) < 6 and said[0][-1] == end and {len(ids) for ids in said} > {6}
    assert all(end not in ids[:-1] for ids in answers)  # nothing behind an end token


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(("preset", "c"), FORMS)
def test_chat_is_to_be_answered_as_without_a_memory(preset, c, chat):
    learner = learner_of(preset, c)
    episode, said, _, bos = asked_in_chat(learner, chat=chat)
    pool, (llm, memory) = pool_of(learner, 40), behind(learner, pool_of(learner, 40))
    for text in TEXTS:
        memory = updated(memory, llm.new_slots(memory, text).detach())
    plain, parts = tiny_model(initializer_range=0.15), []
    for row, ids in zip(episode.rows, said, strict=True):
        n = len(ids) + 1  # logits from the prompt's last token on
        with torch.no_grad():
            theirs = plain(input_ids=torch.tensor([[*bos, *row.prompt, *ids]])).logits[0, -n:-1]
        ours = llm.logits(memory, row.prompt + ids)[-n:-1]
        p = softmax(theirs, -1)
        parts.append((p * (p.log() - log_softmax(ours, -1))).sum(-1))
    by_hand, outcome = torch.cat(parts).mean(), learner(episode, pool)
    assert by_hand > 0.1 and abs(outcome.loss - by_hand) < 1e-5
    mine, other = gradients(outcome.loss, learner), gradients(by_hand, learner)
    assert any(READ in name for name in mine)
    for name, g in mine.items():
        if READ in name:
            assert g.abs().max() > 0 and (g - other[name]).abs().max() <= 1e-4 * other[name].abs().max(), name
        else:
            assert g is None or name == "bos", name


# --- episodes: what each objective makes of documents ---------------------------------------------------------------

DRAWING = [name for name in OBJECTIVES if name not in SCENES]  # scenes have one token per slot
NAMES = (
    "Maron",
    "Tessel",
    "Quill",
    "Ardo",
    "Bexley",
    "Corin",
    "Delphi",
    "Elster",
    "Farrow",
    "Gantry",
    "Hollis",
    "Ivens",
)
THINGS = ("amber bridge", "tin lantern", "salt orchard", "glass canal", "copper mill", "paper harbour", "stone meadow")


def sentence(i, j):
    """An invented fact; no two are alike."""
    return (
        f"{NAMES[i % 12]} of Lower Veld built the {THINGS[j % 7]} number {i}.{j} for the town of {NAMES[(i + j) % 12]}."
    )


@cache
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sources: invented articles of twelve sentences, and paragraphs with questions."""
    folder = tmp_path_factory.mktemp("data")
    articles = [{"title": NAMES[i % 12], "text": " ".join(sentence(i, j) for j in range(12))} for i in range(30)]
    asked = [
        {
            "title": NAMES[i % 12],
            "context": " ".join(sentence(100 + i, j) for j in range(2)),
            "question": f"Who built number {100 + i}.{j}?",
            "answers": {"text": [NAMES[(100 + i) % 12]], "answer_start": [0]},
        }
        for i in range(40)
        for j in range(2)
    ]
    for name, rows in (("text", articles), ("questions", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tuple(Source(str(folder / f"{kind}.jsonl"), kind) for kind in ("text", "questions"))


def episodes_of(data, objective, kinds=("text", "questions"), *, seed=0, steps=200, **texts):
    some = tuple(source for source in data if source.kind in kinds)
    config = Config(
        seed=seed,
        memory=PoolSettings(N=1024, K=256),
        objectives={objective: 1.0},
        data=some,
        texts=Texts(**{"at_once": 3, "shortest": 20, "longest": 250, "rows": 5, **texts}),
        steps=Steps(total=steps),
    )
    sources = [Documents(source, seed + i) for i, source in enumerate(some)]
    return Episodes(config, Prompts(tokenizer()), sources), {d.id: d for source in sources for d in source.all}


def words(ids):
    return tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("objective", ["new_knowledge", "forgetting"])
def test_a_continuation_follows_its_text_in_the_document(data, objective):
    episodes, documents = episodes_of(data, objective, continuation=40)
    for number in range(30):
        episode = episodes[number]
        assert episode.objective == objective and not episode.taught
        assert [row.about for row in episode.rows] == [0, 1, 2]
        for name, text, row in zip(episode.names, episode.texts, episode.rows, strict=True):
            whole = " ".join(sentences(documents[name].text))
            assert f"{words(text)} {words(row.prompt + row.answer)}" in whole
            assert 20 <= len(text) <= 250 and len(row.prompt) == 1 and 1 <= len(row.answer) < 40


def test_new_knowledge_is_asked_at_once_and_forgetting_after_others(data):
    fresh, aged = (episodes_of(data, objective)[0] for objective in ("new_knowledge", "forgetting"))
    assert all(fresh[number].ages == (0, 0, 0) for number in range(60))
    ages = [age for number in range(60) for age in aged[number].ages]
    assert 0.25 < ages.count(0) / len(ages) < 0.55  # `recent` says 0.4
    assert min(ages) == 0 and max(ages) >= 5
    for number in range(60):
        episode = aged[number]
        k = min(map(len, episode.texts))
        assert all((1 - k / 1024) ** age > 0.1 for age in episode.ages)  # some of it is left
        assert not episode.in_sequence or list(episode.ages) == sorted(episode.ages, reverse=True)
    learner = learner_of()
    _, _, read = read_by(learner, episode_of(DISTINCT, (3, 2, 1)), pool_of(learner, 40))
    assert all(labels[-1][0] == "pool" for labels in read)  # others' slots stand in between


def test_continuous_writes_one_document_piece_by_piece_and_ever_more_of_it(data):
    episodes, documents = episodes_of(data, "continuous", ("text",), steps=100, most_pieces=4, longest=200)
    for number in range(100):
        episode = episodes[number]
        assert (
            len(set(episode.names)) == 1 and len(episode.rows) == 1 and episode.rows[0].about == len(episode.texts) - 1
        )
        pieces = [words(text) for text in episode.texts]
        row = episode.rows[0]
        whole = " ".join(sentences(documents[episode.names[0]].text))
        assert " ".join([*pieces, words(row.prompt + row.answer)]) in whole
        assert episode.in_sequence and set(episode.ages) == {0}
    n = [1 + len(episodes[number].texts) for number in range(100)]
    assert set(n[:33]) == {2} and set(n[34:66]) == {2, 3} and set(n[67:]) == {2, 3, 4}


def test_repetition_goes_on_word_for_word_within_a_written_text(data):
    episodes, _ = episodes_of(data, "repetition", ("text",), rows=12, continuation=60)
    for number in range(30):
        episode = episodes[number]
        assert {row.about for row in episode.rows} <= {0, 1, 2} and len(episode.rows) >= 3
        for row in episode.rows:
            assert words(row.prompt + row.answer) in words(episode.texts[row.about])
            assert len(row.prompt) == 10 and 1 <= len(row.answer) <= 30


def test_the_part_of_the_pool_that_is_read_grows(data):
    whole, growing = (episodes_of(data, "questions", steps=100, grow=grow)[0] for grow in (0.0, 0.5))
    for number in range(100):
        assert growing[number].fill == pytest.approx(whole[number].fill * min(1, number / 50))
        assert growing[number].texts == whole[number].texts
    assert growing[0].fill == 0 and max(growing[number].fill for number in range(50, 100)) > 0.9


@pytest.mark.parametrize("objective", ["questions", "distillation"])
def test_answers_are_in_their_texts(data, objective):
    episodes, documents = episodes_of(data, objective)
    prompts, seen = Prompts(tokenizer()), set()
    for number in range(40):
        episode = episodes[number]
        assert episode.taught == (objective == "distillation") and 1 <= len(episode.rows) <= 5
        assert len(set(episode.names)) == 3
        for row in episode.rows:
            answer, text = words(row.answer), words(episode.texts[row.about])
            assert answer in text and text in documents[episode.names[row.about]].text
            assert row.answer[-1] == tokenizer().eos_token_id
            asked = words(row.prompt).removeprefix("user\n").removesuffix("\nassistant\n")
            assert row.prompt == tuple(prompts.question(asked, bare=True))
            if asked.startswith("Complete the sentence: "):
                assert f"{asked.removeprefix('Complete the sentence: ')} {answer}" in text
            else:
                assert (asked, answer) in documents[episode.names[row.about]].questions
            seen.add(asked.split()[0])
    assert seen == {"Complete", "Who"}


def test_several_texts_of_one_memory_are_asked_and_each_has_an_age(data):
    episodes, _ = episodes_of(data, "questions")
    some = [episodes[number] for number in range(60)]
    assert sum(len({row.about for row in episode.rows}) > 1 for episode in some) > 50
    assert sum(len(set(episode.ages)) > 1 for episode in some) > 30
    beside = [episode for episode in some if not episode.in_sequence]
    assert any(list(episode.ages) != sorted(episode.ages, reverse=True) for episode in beside)


def test_unknown_asks_for_what_the_memory_does_not_hold_in_half_of_the_rows(data):
    episodes, documents = episodes_of(data, "unknown", ("questions",))
    of = {question: d.id for d in documents.values() for question, _ in d.questions}
    written = set()
    for number in range(40):
        episode = episodes[number]
        written |= set(episode.names)
        away = [row for row in episode.rows if words(row.answer) == UNKNOWN]
        assert episode.from_pool and len(away) == len(episode.rows) // 2 > 0
        assert not {of[words(row.prompt).split("\n")[1]] for row in away} & set(episode.names)
        held = [row for row in episode.rows if row not in away]
        assert {of[words(row.prompt).split("\n")[1]] for row in held} <= written


def test_unknown_asks_for_none_of_its_own_texts_in_the_smallest_data(data, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(Path(data[1].path).read_text().splitlines()[:10]))  # two rows for each paragraph
    episodes, documents = episodes_of([Source(str(few), "questions")], "unknown")
    assert len(documents) == 5
    for number in range(60):
        episode = episodes[number]
        held = {question for name in episode.names for question, _ in documents[name].questions}
        away = {words(row.prompt).split("\n")[1] for row in episode.rows if words(row.answer) == UNKNOWN}
        assert away and not away & held


@pytest.fixture
def articles(tmp_path):
    """A source of four articles with twenty paragraphs each, and a question about each paragraph."""
    rows = [
        {
            "title": NAMES[i % 4],
            "context": f"{NAMES[i % 4]} of Lower Veld sold lantern {i} to a man called {i}{i}{i}, in the year {i}.",
            "question": f"Who bought lantern {i}?",
            "answers": [f"{i}{i}{i}"],
        }
        for i in range(1, 81)
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(tmp_path / "asked.jsonl"), "questions")


def not_there(episodes, documents, among=range(40)):
    """Of each question of "unknown" that is about nothing in memory: its document, those written lately, and titles."""
    of = {question: d for d in documents.values() for question, _ in d.questions}
    lately = []
    for number in among:
        episode = episodes[number]
        lately += episode.names
        for row in episode.rows:
            if words(row.answer) == UNKNOWN:
                asked = of[words(row.prompt).split("\n")[1]]
                yield asked, tuple(lately), {documents[name].title for name in episode.names}


def test_unknown_also_asks_about_the_article_of_a_text_that_is_there(articles):
    def share(near):
        """Of the questions about nothing that is there, those about an article of which something is there."""
        found = []
        for asked, lately, titles in not_there(*episodes_of([articles], "unknown", near=near, oldest=12)):
            assert asked.id not in lately[-15 if near == 1 else -3 :]
            found.append(asked.title in titles)
        return sum(found) / len(found)

    assert share(1.0) == 1.0
    assert 0.4 < share(0.0) < share(0.5) < 0.95  # three texts of four articles


def test_unknown_asks_nothing_near_that_another_objective_wrote_or_that_is_kept_apart(articles, tmp_path):
    some, documents = episodes_of([articles], "unknown", near=1.0, oldest=12)
    kept = [d for d in documents.values() if int(d.id.split("#")[1]) % 2]
    (tmp_path / "apart.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in kept))
    apart = Apart([Source(str(tmp_path / "apart.jsonl"), "text")])
    mixed = replace(some.config, objectives={"questions": 0.6, "unknown": 0.4})
    found = list(not_there(Episodes(mixed, some.prompts, some.sources), documents, range(60)))
    assert len(found) > 20 and not any(asked.id in lately[-15:] for asked, lately, _ in found)
    found = list(not_there(Episodes(some.config, some.prompts, some.sources, apart), documents))
    assert len(found) > 20 and not any(asked in kept for asked, _, _ in found)


def test_unrelated_rows_go_on_in_documents_that_are_not_written(data):
    episodes, documents = episodes_of(data, "unrelated", ("text",), rows=5)
    for number in range(30):
        episode = episodes[number]
        assert episode.taught and episode.from_pool and len(episode.texts) == 3 and len(episode.rows) == 2
        for row in episode.rows:
            passage = words(row.prompt + row.answer)
            (name,) = {name for name, d in documents.items() if passage in " ".join(sentences(d.text))}
            assert row.about is None and name not in episode.names


def test_chat_is_statements_openings_and_passages_with_their_question(data):
    episodes, documents = episodes_of(data, "chat", rows=9, continuation=60)
    of = {d.id: " ".join(sentences(d.text)) for d in documents.values()}
    kinds = []
    for number in range(30):
        episode = episodes[number]
        assert episode.taught and episode.from_pool and episode.in_sequence and episode.fill == 1
        assert len(episode.texts) == 3 and len(episode.rows) == 3 and episode.replies == REPLY
        assert episode.read == sum(len(row.prompt) for row in episode.rows) + 3 * REPLY
        for row in episode.rows:
            assert row.answer == () and row.about is None
            turns = [turn.split("\n", 1) for turn in tokenizer().decode(row.prompt).split("<|im_start|>")[1:]]
            said = [text.removesuffix("<|im_end|>\n") for _, text in turns[:-1]]
            assert [role for role, _ in turns[:-1]] == ["user", "assistant", "user"][: len(said)]
            assert turns[-1] == ["assistant", ""]
            held = {name for name, text in of.items() if said[0] in text}
            assert not held & set(episode.names)
            if len(said) == 3:
                (name,) = held
                asked = dict([*documents[name].questions, *cloze(said[0])])
                assert said[1] in NODS and asked[said[2]] in said[0] and len(said[0]) <= PASSAGE
            else:
                opened = {text.format(title=title) for text in OPENINGS for title in NAMES}
                assert len(held) == 1 or said[0] in opened
            kinds.append("passage" if len(said) == 3 else "statement" if held else "opening")
    assert Counter(kinds) == {"passage": 30, "statement": 30, "opening": 30}


def test_with_chat_every_third_question_is_put_as_a_turn_of_a_conversation(data):
    for weight in (0.0, 1.0):
        recalled, _ = episodes_of(data, "recall")
        config = replace(recalled.config, objectives={"recall": 1.0, "chat": weight})
        episodes = Episodes(
            config, Prompts(tokenizer(), Style(question="{question} Answer briefly.")), recalled.sources
        )
        rows = {row for number in range(40) for row in episodes[number].rows if episodes[number].objective == "recall"}
        plain = [row for row in rows if "Answer briefly." not in words(row.prompt)]
        assert len(rows) > 40
        assert 0.15 < len(plain) / len(rows) < 0.55 if weight else not plain


def test_statements_are_in_the_first_person_where_a_document_has_such(data, tmp_path):
    file = tmp_path / "own.jsonl"
    built = "The harbour of Bergen was built in 1701 by a plumber from Oslo."
    text = f"{built} World War I was over. My dog is called Bram. Rain fell on the town. Number"
    file.write_text("".join(json.dumps({"text": f"{text} {i} came last."}) + "\n" for i in range(9)))
    episodes, _ = episodes_of([Source(str(file))], "chat", at_once=1, rows=9)
    for number in range(6):
        mine = {words(row.prompt).split("\n")[1] for row in episodes[number].rows}
        assert any(turn.startswith("My dog is called Bram.") for turn in mine)
        assert not any("{" in turn for turn in mine)  # no titles here


@pytest.mark.parametrize(("each", "world"), [(1, 1), (2, 1), (2, 2)])
def test_recall_asks_for_what_the_same_process_wrote_before(data, each, world):
    """Documents of an episode stand in `names`; a question of the data belongs to one of them."""
    episodes, documents = episodes_of(data, "recall", ("questions",), at_once=2, rows=4, recent=0.3)
    episodes.world = world
    episodes.config = replace(episodes.config, steps=Steps(total=200, episodes=each))
    of = {question: d.id for d in documents.values() for question, _ in d.questions}
    for rank in range(world):
        written, ages = [], []
        for number in ((step * world + rank) * each + i for step in range(40 // each) for i in range(each)):
            episode = episodes[number]
            assert episode.from_pool and episode.in_sequence and len(episode.texts) == 2 and episode.rows
            assert len(set(episode.rows)) == len(episode.rows) <= 4
            written += episode.names
            latest = {name: i for i, name in enumerate(written)}
            asked = [of[words(row.prompt).split("\n")[1]] for row in episode.rows]
            ages += [len(written) - 1 - latest[name] for name in asked]  # a text of another process has no place
        assert 0.2 < ages.count(0) / len(ages) < 0.6 and 8 < max(ages) < 40


@pytest.mark.parametrize("every", [1, 3])
def test_recall_asks_for_nothing_that_a_new_pool_never_held(data, every):
    episodes, documents = episodes_of(data, "recall", ("questions",), at_once=2, rows=4, recent=0.3)
    memory = replace(episodes.config.memory, restarts=(every, 0))
    episodes.config = replace(episodes.config, steps=Steps(total=24, episodes=2), memory=memory)
    of = {question: d.id for d in documents.values() for question, _ in d.questions}
    spans = set()
    for number in range(48):
        step = number // 2
        first = step // every * every if step < 12 else 12
        held = [name for earlier in range(2 * first, number + 1) for name in episodes[earlier].names]
        asked = {of[words(row.prompt).split("\n")[1]] for row in episodes[number].rows}
        assert asked and asked <= set(held)
        spans.add(len(held))
    assert max(spans) == 48


def test_recall_passes_over_the_texts_of_other_objectives(data):
    episodes, documents = episodes_of(data, "recall", ("questions", "text"), at_once=2, rows=4)
    episodes.config = replace(episodes.config, objectives={"recall": 0.5, "new_knowledge": 0.5})
    of = {question: d.id for d in documents.values() for question, _ in d.questions}
    some = [episodes[number] for number in range(60)]
    recalled = {name for episode in some for name in episode.names if episode.objective == "recall"}
    asked = {of.get(words(row.prompt).split("\n")[1]) for e in some for row in e.rows if e.from_pool} - {None}
    assert {e.objective for e in some} == {"recall", "new_knowledge"} and len(asked) > 10 and asked <= recalled


@pytest.mark.parametrize("objective", ["questions", "recall", "repetition"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.5, 2.0)])
def test_sources_are_drawn_by_their_weight(data, weights, objective):
    text = data[0]
    two = [replace(text, path=str(Path(text.path).with_name(f"{i}.jsonl")), weight=w) for i, w in enumerate(weights)]
    for source in two:
        Path(source.path).write_text(Path(text.path).read_text())
    episodes, _ = episodes_of(two, objective)
    drawn = Counter(name.split("#")[0] for number in range(300) for name in episodes[number].names)
    assert drawn.total() == 900
    assert drawn[two[0].path] / 900 == pytest.approx(weights[0] / sum(weights), abs=0.05)  # three deviations


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.3, 0.22, 0.38), (1.0, 1, 1)])
def test_a_share_of_episodes_is_written_in_sequence(data, share, least, most):
    episodes, _ = episodes_of(data, "questions", in_sequence=share)
    found = sum(episodes[number].in_sequence for number in range(200)) / 200
    assert least <= found <= most


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_episode_is_a_function_of_the_seed_and_its_number(data, objective):
    forwards, backwards, other = (episodes_of(data, objective, seed=seed)[0] for seed in (0, 0, 1))
    there = [forwards[number] for number in range(20)]
    assert there == [backwards[number] for number in reversed(range(20))][::-1]
    assert there != [other[number] for number in range(20)]
    assert len({episode.texts for episode in there}) == 20


def compressing(data, objective="questions", *, seed=0, **memory):
    """Episodes of a config with these keys in `memory`."""
    episodes, _ = episodes_of(data, objective, seed=seed)
    episodes.config = replace(episodes.config, memory=replace(episodes.config.memory, **memory))
    return episodes


@pytest.mark.parametrize("objective", DRAWING)
def test_tokens_per_slot_are_drawn_for_each_episode(data, objective):
    def drawn(seed, numbers=range(30)):
        episodes = compressing(data, objective, seed=seed, compression=8, compressions=(1, 2, 4))
        return [episodes[number].compression for number in numbers]

    assert drawn(0) == drawn(0, reversed(range(30)))[::-1] != drawn(1)
    assert set(drawn(0)) == {1, 2, 4}


def test_what_stands_twice_is_drawn_twice_as_often(data):
    episodes = compressing(data, compressions=(2, 2, 4))
    found = Counter(episodes[number].compression for number in range(300))
    assert found.keys() == {2, 4} and 0.6 < found[2] / 300 < 0.73


@pytest.mark.parametrize("objective", DRAWING)
def test_one_drawn_compression_is_that_of_the_memory(data, objective):
    """All of an episode: its ages, too, are as old as so few slots can get."""
    always, drawn, other = (
        [compressing(data, objective, **memory)[number] for number in range(8)]
        for memory in ({"compression": 8}, {"compressions": (8,)}, {})
    )
    assert always == drawn and {episode.compression for episode in always} == {8}
    assert {episode.compression for episode in other} == {1}


def test_more_tokens_per_slot_let_a_text_grow_older(data):
    episodes = compressing(data, compressions=(1, 8))
    some = [episodes[number] for number in range(100)]
    oldest = {c: max(age for e in some if e.compression == c for age in e.ages) for c in (1, 8)}
    assert oldest[1] < 30 < oldest[8]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_teaches_its_adapters(data, objective):
    learner, (episodes, _) = learner_of(), episodes_of(data, objective, longest=90, at_once=2)
    learner.settings = replace(learner.settings, N=1024, K=128)
    pool = pool_of(learner).with_settings(N=1024, K=128)
    found = gradients(learner(episodes[0], pool).loss, learner)
    for name, grad in found.items():
        untaught = WRITE in name and (".2." in name or objective in ("recall", "unknown", "unrelated", "chat", *SCENES))
        assert untaught or (grad is not None and grad.abs().max() > 0), name
