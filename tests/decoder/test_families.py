"""The law on a tiny random model of every supported family: memory = text in the context, as long as it is not full."""

from dataclasses import replace

import pytest
import reference
import torch
from transformers import AutoConfig

from latentmem.decoder.attention import CUDA, NAME
from latentmem.loading.hub import SUPPORTED, check_supported
from latentmem.model.model import MemoryModel
from latentmem.testing import tiny_model

OPTIONS = {
    "cohere2": {"sliding_window": 8},
    "exaone4": {"sliding_window": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "glm4": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "ministral": {"head_dim": 8, "sliding_window": 8},
    "ministral3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo3": {"sliding_window": 8},
    "phi3": {"rope_scaling": None},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "seed_oss": {"head_dim": 8},
}


def made(family, attention):
    """A tiny model of a family that uses this attention."""
    if family in ("gemma2", "gpt_oss") and attention != "eager":
        pytest.skip(f"transformers has no sdpa for {family}")
    kind = "eager" if attention == "eager" else "sdpa"
    llm = MemoryModel(tiny_model(family, attention=kind, **OPTIONS.get(family, {})), first_token=1)
    llm.base.set_attn_implementation(attention)
    return llm


@pytest.mark.parametrize("attention", ["sdpa", "eager", NAME, CUDA])
@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_the_law_holds_in_one_piece_and_in_many(family, attention):
    llm = made(family, attention)
    model = llm.base
    text, question = list(range(10, 40)), [3, 4, 5, 6]
    plain = model(torch.tensor([[1, *text, *question]])).logits[0, -4:]
    scale = plain.abs().max()
    assert (plain - model(torch.tensor([question])).logits[0]).abs().max() > 0.1 * scale  # the text matters
    for K in (30, 7):
        memory = llm.write_ids(llm.empty(N=64, K=K), text)
        assert memory.M == 30 and memory.updates == -(-30 // K)
        assert (llm.logits(memory, question) - plain).abs().max() < 1e-5 * max(1, scale)
    prompt = torch.tensor([[1, *text, *question]])
    greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    ours = llm.generate_ids(memory, question, max_new_tokens=12)
    assert ours[0, len(question) :].tolist() == greedy[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager", NAME, CUDA])
@pytest.mark.parametrize("family", SUPPORTED)
def test_a_full_memory_equals_the_reference_with_its_gradients(family, attention):
    llm = made(family, attention)
    model = llm.base
    memory = llm.write_ids(llm.empty(N=16, K=6), list(range(10, 40)))
    assert memory.M == 16 and len({tuple(births.tolist()) for births in memory.births}) == llm.decoder.L  # drawn apart
    first = reference.sink(model, 1).detach()
    assert (llm.first - first).abs().max() < 1e-5
    model.requires_grad_(True)
    results = []
    for ours in (True, False):
        slots = memory.slots.clone().requires_grad_()
        if ours:
            now = replace(memory, slots=slots)
            new, logits = llm.new_slots(now, [7, 8, 9, 77, 5]), llm.logits(now, [3, 4, 5, 6])
        else:
            new = reference.write_exact(model, first, slots, [7, 8, 9, 77, 5])
            logits = reference.read(model, first, slots, [3, 4, 5, 6])
        weights = [p for p in model.parameters() if p.ndim > 1]
        generator = torch.Generator().manual_seed(0)
        loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in (new, logits))
        found = torch.autograd.grad(loss, [slots, *weights], allow_unused=True)
        results.append([new, logits, *(torch.zeros(()) if g is None else g for g in found)])
    assert results[1][2].abs().max() > 1e-3
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() < 1e-4 * max(1, theirs.abs().max())


def test_an_unknown_family_is_refused_with_what_is_supported():
    with pytest.raises(ValueError, match=r"'gpt2' are not supported; these are: .*llama"):
        check_supported(AutoConfig.for_model("gpt2"))


@pytest.mark.parametrize(
    ("family", "reasons"),
    [
        ("qwen3_next", ("layers of the kind linear_attention.", "nearest that is supported is qwen3_moe.")),
        ("deepseek_v3", ("keys and values of rank 512 (MLA).",)),
        ("gemma3n", ("share keys and values (15)", "gemma3n_text, beside", "supported is gemma3_text.")),
        ("t5", ("an encoder.",)),
    ],
)
def test_a_family_that_is_refused_is_told_why_and_what_is_nearest(family, reasons):
    with pytest.raises(ValueError, match=f"'{family}' are not supported") as refused:
        check_supported(AutoConfig.for_model(family))
    assert all(reason in str(refused.value) for reason in reasons), refused.value
    assert ("nearest" in str(refused.value)) == (len(reasons) > 1)


def test_positions_that_change_with_the_length_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="'dynamic' are not supported"):
        check_supported(AutoConfig.for_model("llama", rope_parameters=rope))


@pytest.mark.parametrize(("family", "reason"), [("llama4_text", "rotary_emb"), ("gpt_neox", "self_attn")])
def test_a_model_built_in_another_way_is_refused(family, reason):
    with pytest.raises(ValueError, match=f"is not supported: .*{reason}"):
        MemoryModel(tiny_model(family), first_token=1)


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_logits_of_what_the_body_gives_are_those_of_the_model(family):
    llm, ids = made(family, "eager"), torch.tensor([[1, 40, 77, 5, 120]])
    config = llm.base.config
    for name, value in (("logits_scaling", 3.0), ("logit_scale", 0.25), ("final_logit_softcapping", 2.0)):
        if hasattr(config, name):
            setattr(config, name, value)
    if hasattr(llm.base, "logit_scale"):
        llm.base.logit_scale = 0.25  # cohere reads it once
    found = llm.decoder.logits(llm.decoder.body(input_ids=ids).last_hidden_state)
    assert (found - llm.base(input_ids=ids).logits).abs().max() < 1e-5
