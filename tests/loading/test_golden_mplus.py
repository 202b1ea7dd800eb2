"""The long-term memory against numbers that the authors' released M+ computed (tests/golden/README.md)."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import latentmem
from latentmem.files import snapshot
from latentmem.testing import updated

FOLDER = Path(__file__).parent.parent / "golden" / "mplus"
STEPS = 5


@pytest.fixture(scope="module")
def llm():
    return latentmem.load(str(FOLDER), device="cpu")


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def steps(llm, expected):
    """The memory after each of the recorded updates, with their permutations."""
    memory, after = llm.empty(), []
    for t in range(STEPS):
        new = llm.new_slots(memory, expected[f"step{t}.ids"])
        dropped = expected[f"step{t}.randperm"][:, memory.N - memory.K :].sort(dim=1).values
        memory = updated(memory, new, dropped=dropped, keys=llm.retriever.new_keys(memory, dropped))
        after.append(memory)
    return after


@pytest.fixture
def changed(tmp_path):
    """A function that copies the checkpoint with `config` and `tensors` changed in place, and loads it."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("expected.safetensors"))

    def change(config=lambda _: None, tensors=lambda _: None):
        settings = json.loads((folder / "config.json").read_text())
        config(settings)
        (folder / "config.json").write_text(json.dumps(settings))
        weights = load_file(folder / "model.safetensors")
        tensors(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return latentmem.load(str(folder), device="cpu")

    return change


def gap(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def test_sizes_are_those_of_the_config(llm):
    memory = llm.empty()
    assert (memory.N, memory.M, memory.K, memory.R, memory.longterm.S) == (32, 32, 8, 16, 40)


def test_new_slots_equal_the_released_injection(llm, expected):
    assert gap(llm.new_slots(llm.empty(), expected["inject.long.ids"]), expected["inject.long.new_slots"]) < 1e-4


def test_logits_and_retrieved_slots_equal_the_released_ones(llm, expected):
    logits, chosen = llm.logits(llm.empty(), expected["read.ids"], return_retrieved=True)
    assert gap(logits, expected["read.logits"][0]) < 1e-4
    for i, places in enumerate(chosen):
        assert torch.equal(places, expected[f"read.ltm_indices.{i}"])


@pytest.mark.parametrize("t", range(STEPS))
def test_the_store_after_each_update_equals_the_released_one(steps, expected, t):
    """The released code keeps what was dropped since its last merge apart; a merge comes with every third update."""
    memory, store = steps[t], steps[t].longterm
    assert gap(memory.slots, expected[f"step{t}.memory"]) < 1e-4
    for i in range(memory.L):
        S = len(expected[f"step{t}.ltm.{i}"])
        there = store.occupied[i]
        slots = torch.cat([span.stored.slots[i] for span in store.ranges])[there]
        ages = store.clock - store.orders[i][there]
        assert gap(slots[:S], expected[f"step{t}.ltm.{i}"]) < 1e-4
        assert torch.equal(ages[:S], expected[f"step{t}.ltm_ages.{i}"])
        assert torch.equal(store.frequencies[i][store.frequencies[i] > 0.01], expected[f"step{t}.ltm_recall.{i}"])
        assert len(slots) == (48, 56, 64, 72, 80)[t]


@pytest.mark.parametrize("t", range(STEPS))
def test_logits_after_each_update_equal_the_released_ones(llm, steps, expected, t):
    logits = llm.logits(steps[t], expected["read.ids"])
    assert gap(logits, expected[f"step{t}.read_logits"][0]) < 1e-4
    assert gap(logits, expected["read.logits"][0]) > 0.1  # the updates are felt at all


def test_what_has_lost_its_frequency_goes_unless_too_few_are_left(llm, steps):
    memory, generator = steps[-1], torch.Generator().manual_seed(0)
    counts = [int(memory.longterm.occupied.sum(1).min())]
    for _ in range(40):
        memory = llm.write_ids(memory, torch.randint(3, 128, (8,), generator=generator))
        counts.append(int(memory.longterm.occupied.sum(1).min()))
    assert any(a > b for a, b in itertools.pairwise(counts))
    assert min(counts) > 16
    assert memory.longterm.S <= 8 * 3 * 12  # of ten merges and what waits for the next


def test_answers_of_several_memories_with_stores_of_their_own(llm, steps, expected):
    prompts = [expected["read.ids"][0], expected["read.ids"][0, :5], expected["step0.ids"][0]]
    alone = [llm.generate_ids(m, p, max_new_tokens=6) for m, p in zip(steps[:3], prompts, strict=True)]
    for one, row in zip(alone, llm.generate_ids(steps[:3], prompts, max_new_tokens=6), strict=True):
        assert torch.equal(one, row)


def test_a_snapshot_of_the_store_continues_to_the_bit(llm, steps, expected, tmp_path):
    memory = snapshot.save(steps[2], tmp_path / "m.safetensors")
    loaded = snapshot.load(tmp_path / "m.safetensors")
    ids = expected["read.ids"]
    assert torch.equal(llm.logits(loaded, ids), llm.logits(memory, ids))
    for one in (loaded, memory):
        after = llm.write_ids(one, expected["step3.ids"])
        assert after.longterm.S == 72
    a, b = (llm.write_ids(one, expected["step3.ids"]) for one in (loaded, memory))
    assert torch.equal(llm.logits(a, ids), llm.logits(b, ids))


@pytest.mark.parametrize("key", ["num_ltm_blocks", "ltm_initial_size", "selector_hidden_dim", "update_ltm_frequency"])
def test_a_missing_config_key_is_named(changed, key):
    with pytest.raises(ValueError, match=key):
        changed(lambda config: config.pop(key))


@pytest.mark.parametrize(
    ("key", "value"), [("update_ltm_mode", "delayed"), ("decay_frequency", 0.5), ("num_selector_layers", 3)]
)
def test_a_setting_that_is_not_known_is_refused(changed, key, value):
    with pytest.raises(ValueError, match=f"{key} = {value!r} is not supported"):
        changed(lambda config: config.update({key: value}))


@pytest.mark.parametrize(
    "key",
    [
        "ltm.1",
        "ltm_keys.0",
        "ltm_ages.3",
        "ltm_recall_frequencies.2",
        "model.layers.1.self_attn.query_proj.0.weight",
        "model.layers.3.self_attn.encoder_query_proj.2.weight",
    ],
)
def test_a_missing_tensor_is_named(changed, key):
    with pytest.raises(ValueError, match=f"missing: {key}"):
        changed(tensors=lambda weights: weights.pop(key))


@pytest.mark.parametrize("key", ["ltm.4", "model.layers.0.self_attn.query_proj.4.weight"])
def test_an_unknown_tensor_is_named(changed, key):
    with pytest.raises(ValueError, match=f"unknown: {key}"):
        changed(tensors=lambda weights: weights.update({key: torch.zeros(2)}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_runs_in_other_dtypes(expected, dtype):
    llm = latentmem.load(str(FOLDER), device="cpu", dtype=dtype)
    memory = llm.write_ids(llm.empty(), expected["step0.ids"])
    logits = llm.logits(memory, expected["read.ids"])
    assert gap(logits.float(), llm.logits(llm.empty(), expected["read.ids"]).float()) > 0.1


def test_an_update_without_keys_is_refused(llm, expected):
    with pytest.raises(ValueError, match="give `keys`"):
        updated(llm.empty(), llm.new_slots(llm.empty(), expected["step0.ids"]))


def test_a_checkpoint_may_leave_its_store_out(llm):
    assert llm.empty(longterm=0).longterm is None and llm.empty().R == 16


def test_other_settings_of_the_store_are_refused(llm):
    with pytest.raises(ValueError, match="R=16, got 8"):
        llm.empty(longterm=8)
    assert llm.empty(longterm=16).R == 16
