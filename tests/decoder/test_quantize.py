"""Linear layers in 8 bits: what is replaced, and that answers stay near those of the exact model."""

from pathlib import Path

import pytest
import torch
from test_adapters import adapted
from torch import nn

import latentmem
from latentmem.decoder.linear import quantize
from latentmem.testing import tiny_model

GOLDEN = Path(__file__).parent.parent / "golden" / "memoryllm"
TEXT, QUESTION = list(range(10, 40)), [3, 4, 5, 6]


def test_all_linear_layers_but_those_of_keys_and_values_are_replaced():
    model = tiny_model()
    exact = {name for name, part in model.named_modules() if type(part) is nn.Linear}
    quantize(model, "int8")
    left = {name for name, part in model.named_modules() if type(part) is nn.Linear}
    assert left == {name for name in exact if name.endswith(("k_proj", "v_proj", "down_proj"))} and len(left) == 9
    assert "lm_head" in exact - left and len(exact - left) == 3 * 4 + 1


def test_answers_are_near_those_of_the_exact_model(tiny_folder):
    exact, rounded = latentmem.load(str(tiny_folder)), latentmem.load(str(tiny_folder), quantize="int8")
    assert rounded.identity == f"int8-{exact.identity}" and rounded.decoder.dtype == torch.float32
    memories = [llm.write_ids(llm.empty(N=16, K=6), TEXT) for llm in (exact, rounded)]
    logits = [llm.logits(m, QUESTION).detach() for llm, m in zip((exact, rounded), memories, strict=True)]
    difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert 0 < difference < 0.2
    for answer in (rounded.generate_ids(memories[1], QUESTION, max_new_tokens=5), rounded.ask(memories[1], "Who?")):
        assert len(answer)
    with pytest.raises(ValueError, match="another model"):
        exact.logits(memories[1], QUESTION)


def test_keys_and_values_do_not_depend_on_what_is_projected_beside_them(tiny_folder):
    llm = latentmem.load(str(tiny_folder), quantize="int8")
    memory = llm.write_ids(llm.empty(N=16, K=6), TEXT)
    kept = llm.prefix(memory)
    llm.prefixes.clear()
    assert all(map(torch.equal, kept.keys, llm.prefix(memory).keys))


def test_adapters_stay_exact_and_work():
    llm = adapted()
    before = llm.logits(llm.write_ids(llm.empty(N=64, K=16), TEXT), QUESTION).detach()
    quantize(llm.base, "int8")
    llm.prefixes.clear()
    after = llm.logits(llm.write_ids(llm.empty(N=64, K=16), TEXT), QUESTION).detach()
    assert 0 < (before - after).abs().max() / before.abs().max() < 0.3
    lora = {type(part) for name, part in llm.base.named_modules() if name.split(".")[-2:-1] in (["lora_A"], ["lora_B"])}
    assert lora == {nn.Linear}


def test_a_released_checkpoint_reads_its_own_pool():
    exact, rounded = (latentmem.load(str(GOLDEN), device="cpu", quantize=kind) for kind in (None, "int8"))
    logits = [llm.logits(llm.write_ids(llm.empty(), TEXT), QUESTION).detach() for llm in (exact, rounded)]
    assert 0 < (logits[0] - logits[1]).abs().max() / logits[0].abs().max() < 0.3
    with pytest.raises(ValueError, match=r"another model \(.*, int8-.*\) than this model"):
        exact.check(rounded.empty())


def test_what_can_not_be_quantized_is_refused(tiny_folder):
    for options, sentence in (
        ({"quantize": "int4"}, "quantize must be one of int8, got 'int4'"),
        ({"quantize": "int8", "dtype": "bfloat16"}, "this model is bfloat16 on cpu"),
    ):
        with pytest.raises(ValueError, match=sentence):
            latentmem.load(str(tiny_folder), **options)
