"""The preset "paper" against numbers that the authors' released code computed (tests/golden/README.md)."""

import json
import shutil
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

import latentmem
from latentmem.testing import updated

FOLDER = Path(__file__).parent.parent / "golden" / "memoryllm"

OWN = ("memory", "bos_embedding", "new_memory_positional_emb", "initialized")  # what a Llama does not have


@pytest.fixture(scope="module")
def llm():
    return latentmem.load(str(FOLDER), device="cpu")


@pytest.fixture(scope="module")
def plain():
    return latentmem.load(str(FOLDER), device="cpu", adapters=None)


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture
def changed(tmp_path):
    """A function that copies the checkpoint with `config` and `tensors` changed in place, and gives the folder."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("expected.safetensors"))

    def change(config=lambda _: None, tensors=None):
        settings = json.loads((folder / "config.json").read_text())
        config(settings)
        (folder / "config.json").write_text(json.dumps(settings))
        if tensors:
            weights = load_file(folder / "model.safetensors")
            tensors(weights)
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return change


def gap(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def load(folder):
    return latentmem.load(folder, device="cpu")


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["long", "exact", "short", "one"])
def test_new_slots_equal_the_released_injection(llm, expected, text):
    new = llm.new_slots(llm.empty(), expected[f"inject.{text}.ids"])
    assert gap(new, expected[f"inject.{text}.new_slots"]) < 1e-4


def test_logits_behind_the_pool_equal_the_released_ones(llm, expected):
    assert gap(llm.logits(llm.empty(), expected["read.ids"]), expected["read.logits"][0]) < 1e-4


def test_greedy_tokens_equal_the_released_ones(llm, expected):
    prompt, answer = expected["generate.ids"], expected["generate.greedy"]
    new = answer.shape[1] - prompt.shape[1]
    assert torch.equal(llm.generate_ids(llm.empty(), prompt, max_new_tokens=new), answer)


def test_the_pool_is_the_memory_of_the_checkpoint(llm, expected):
    pool = llm.empty()
    assert (pool.N, pool.K, pool.M, pool.preset) == (48, 8, 48, "paper")
    assert torch.equal(pool.slots, expected["update.memory_before"])


def test_update_with_the_recorded_permutation_gives_the_recorded_memory_to_the_bit(llm, expected):
    pool, after = llm.empty(), expected["update.memory_after"]
    dropped = expected["update.randperm"][:, pool.N - pool.K :]
    assert torch.equal(updated(pool, after[:, -pool.K :], dropped=dropped).slots, after)


def test_our_own_new_slots_of_the_update_equal_the_recorded_ones(llm, expected):
    pool = llm.empty()
    assert gap(llm.new_slots(pool, expected["update.ids"]), expected["update.memory_after"][:, -pool.K :]) < 1e-4


def test_logits_after_the_update_equal_the_recorded_ones(llm, expected):
    pool = llm.empty()
    dropped = expected["update.randperm"][:, pool.N - pool.K :]
    memory = updated(pool, llm.new_slots(pool, expected["update.ids"]), dropped=dropped)
    logits = expected["update.read_logits"][0]
    assert gap(llm.logits(memory, expected["read.ids"]), logits) < 1e-4
    assert gap(expected["read.logits"][0], logits) > 0.1  # the update is felt at all


# --- the checkpoint's settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "asked"), [("N", 64), ("K", 4), ("preset", "exact")])
def test_a_checkpoint_refuses_other_settings_of_its_memory(llm, what, asked):
    with pytest.raises(ValueError, match=rf"{what}=.*{asked}"):
        llm.empty(**{what: asked})


def test_a_checkpoint_accepts_its_own_settings_and_any_seed(llm):
    memory = llm.empty(N=48, K=8, preset="paper", seed=7)
    assert memory.seed == 7 and torch.equal(memory.slots, llm.empty().slots)


def test_without_adapters_a_checkpoint_is_a_plain_llama_with_an_empty_memory(plain, expected):
    ids = expected["read.ids"]
    assert type(plain.base).__name__ == "LlamaForCausalLM" and plain.adapters is None and plain.trained is None
    assert not any("lora" in name for name, _ in plain.base.named_parameters())
    memory = plain.empty(N=16, K=4)
    assert memory.M == 0 and memory.preset == "exact"
    with torch.no_grad():
        assert torch.equal(plain.logits(memory, ids), plain.base(input_ids=ids).logits[0])


def test_the_base_of_a_checkpoint_outside_its_adapters_is_that_plain_llama(llm, plain, expected):
    assert llm.identity == plain.identity
    with torch.no_grad():
        ours, theirs = (model.base(input_ids=expected["read.ids"]).logits for model in (llm, plain))
    assert torch.equal(ours, theirs)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["num_blocks", "num_tokens", "add_bos_embedding", "lora_config", "add_decoder_lora"])
def test_a_missing_config_key_is_named(changed, key):
    with pytest.raises(ValueError, match=key):
        load(changed(lambda config: config.pop(key)))


@pytest.mark.parametrize("key", ["r", "lora_alpha", "lora_dropout", "target_modules"])
def test_a_missing_lora_setting_is_named(changed, key):
    with pytest.raises(ValueError, match=rf"lora_config\.{key}"):
        load(changed(lambda config: config["lora_config"].pop(key)))


def test_an_mplus_checkpoint_without_its_other_keys_names_them(changed):
    with pytest.raises(ValueError, match=r"lacks ltm_initial_size, selector_hidden_dim"):
        load(changed(lambda config: config.update(num_ltm_blocks=4)))


def test_unknown_config_keys_are_named(changed):
    with pytest.raises(ValueError, match=r"unknown keys: shrink_to_one_embedding, virtual_num_blocks\."):
        load(
            changed(
                lambda config: config.update(
                    virtual_num_blocks=4, shrink_to_one_embedding=True, tune_special_tokens=False
                )
            )
        )


@torch.no_grad()
def test_a_checkpoint_without_bos_equals_the_reference(changed, plain, expected):
    def tensors(weights):
        del weights["bos_embedding"]
        for key in weights:
            if ".lora_B." in key:
                weights[key].zero_()  # so that the plain model is the reference

    llm = load(changed(lambda config: config.update(add_bos_embedding=False), tensors))
    memory, nothing = llm.empty(), torch.zeros(4, 0, 64)
    ids = expected["read.ids"][0]
    assert llm.positions(memory) == 48
    assert gap(llm.logits(memory, ids), reference.read(plain.base, nothing, memory.slots, ids)) < 1e-5
    for text in ("long", "short"):
        ids = expected[f"inject.{text}.ids"][0]
        theirs = reference.write_paper(plain.base, nothing, llm.trained.mark, memory.slots, ids, 8)
        assert gap(llm.new_slots(memory, ids), theirs) < 1e-5


def test_a_checkpoint_with_one_adapter_writes_and_reads_with_it(changed, expected):
    def one(weights):
        for key in [key for key in weights if ".decoder_adapter." in key]:
            del weights[key]

    llm = load(changed(lambda config: config.update(add_decoder_lora=False), one))
    state = llm.base.state_dict()
    assert all(torch.equal(state[key], state[key.replace(".write.", ".read.")]) for key in state if ".write." in key)
    ids = expected["inject.long.ids"]
    assert gap(llm.new_slots(llm.empty(), ids), expected["inject.long.new_slots"]) < 1e-4


def test_tensors_that_the_config_denies_are_named(changed):
    with pytest.raises(ValueError, match="bos_embedding, which its config"):
        load(changed(lambda config: config.update(add_bos_embedding=False)))


def test_a_pool_size_that_contradicts_the_config_is_refused(changed):
    with pytest.raises(ValueError, match="num_memory_tokens = 40"):
        load(changed(lambda config: config.update(num_memory_tokens=40)))


@pytest.mark.parametrize(
    "key",
    [
        *OWN,
        "lm_head.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(changed, key):
    with pytest.raises(ValueError, match=key):
        load(changed(tensors=lambda weights: weights.pop(key)))


@pytest.mark.parametrize("adapter", ["default", "decoder_adapter"])
def test_a_missing_lora_tensor_is_named(changed, adapter):
    key = "model.layers.2.mlp.up_proj.lora_B"
    with pytest.raises(ValueError, match=rf"missing: {key}"):
        load(changed(tensors=lambda weights: weights.pop(f"{key}.{adapter}.weight")))


@pytest.mark.parametrize("key", ["model.layers.4.mlp.up_proj.weight", "selector.weight"])
def test_an_unknown_tensor_is_named(changed, key):
    with pytest.raises(ValueError, match=rf"unknown: {key}"):
        load(changed(tensors=lambda weights: weights.update({key: torch.zeros(2)})))


def test_an_unknown_lora_tensor_is_named(changed):
    key = "model.layers.0.self_attn.o_proj.lora_A"
    with pytest.raises(ValueError, match=rf"unknown: {key}"):
        load(changed(tensors=lambda weights: weights.update({f"{key}.default.weight": torch.zeros(4, 64)})))


@pytest.mark.parametrize(
    "key",
    [
        *OWN,
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.lora_A.default.weight",
    ],
)
def test_a_tensor_of_a_wrong_shape_is_named(changed, key):
    with pytest.raises(ValueError, match=key.removesuffix(".default.weight")):
        load(changed(tensors=lambda weights: weights.update({key: torch.ones(3, 5)})))


def test_a_pool_that_was_never_written_is_refused(changed):
    with pytest.raises(ValueError, match="initialized"):
        load(changed(tensors=lambda weights: weights.update(initialized=torch.tensor(0, dtype=torch.uint8))))


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_refused_by_name(changed, length):
    folder = changed()
    file = Path(folder, "model.safetensors")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load(folder)


def test_a_folder_without_weights_is_refused_by_name(changed):
    folder = changed()
    Path(folder, "model.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint"):
        load(folder)
