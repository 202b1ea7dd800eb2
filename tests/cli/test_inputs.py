"""What the arguments of `latentmem write` name: files of any kind, folders, patterns, a pipe, an address."""

import io
import sys

import office
import pytest

from latentmem import cli
from latentmem.cli import inputs


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A folder of notes, in the folder that the command runs in."""
    files = {
        "notes/a.txt": b"the door is blue",
        "notes/old.txt": "die Tür ist blau".encode("cp1252"),
        "notes/deep/b.docx": office.docx("the lease"),
        "notes/deep/picture.png": b"\x89PNG\r\n\x1a\n\0\0",
        "notes/empty.txt": b"",
        "notes/locked.pdf": office.pdf("x", trailer=office.ENCRYPTED),
        "notes/.git/config": b"hidden",
        "other/a.txt": b"another",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "notes"


def test_a_folder_is_its_files_and_what_is_skipped_is_named(notes, capsys):
    texts = inputs.from_files("notes/")
    assert [(name, text) for _, name, text in texts] == [
        ("a.txt", "the door is blue"),
        ("deep/b.docx", "the lease"),
        ("old.txt", "die Tür ist blau"),
    ]
    lines = capsys.readouterr().err.splitlines()
    assert "skipped .git/: hidden" in lines and "skipped empty.txt: is empty: there is nothing to write." in lines
    assert any(line.startswith("skipped deep/picture.png: is not text") for line in lines)
    assert any(line.startswith("skipped locked.pdf: is encrypted") for line in lines)
    assert "notes/old.txt: read as cp1252, which is a guess; --encoding names another." in lines
    assert len(lines) == 5


def test_of_many_skipped_files_there_is_the_count(tmp_path, capsys):
    for i in range(50):
        (tmp_path / f"{i}.bin").write_bytes(b"\0\1")
    (tmp_path / "a.txt").write_text("text")
    assert len(inputs.from_files(str(tmp_path))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-1] == "skipped 30 more"


def test_a_pattern_in_quotes(notes):
    assert [name for _, name, _ in inputs.from_files("notes/*.txt")] == ["a.txt", "old.txt"]
    assert [name for _, name, _ in inputs.from_files(f"{notes}/**/*.docx")] == ["deep/b.docx"]
    for text in ("Is Ada here?", "what is this [really]", "nothing/*.txt"):
        assert inputs.from_files(text) is None


def test_a_pipe_takes_any_kind(monkeypatch):
    for data, text in ((office.docx("the lease"), "the lease"), ("Größe".encode("utf-16"), "Größe")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert inputs.from_files("-") == [("-", "standard input", text)]


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("https://example.org/a.pdf", "is an address, and latentmem opens none"),
        ("notes/locked.pdf", "notes/locked.pdf is encrypted; open it with its password"),
        ("notes/empty.txt", "notes/empty.txt is empty"),
        ("notes/deep/picture.png", "is not text"),
        ("notes/.git", "notes/.git holds no file with a text"),
        ("notes/missing.pdf", "there is no file 'notes/missing.pdf'"),
        ("notes/*.xyz", "there is no file 'notes/*.xyz'"),
    ],
)
def test_what_can_not_be_read_is_one_sentence_and_no_model_is_loaded(notes, monkeypatch, capsys, argument, sentence):
    if argument == "notes/.git":
        (notes / ".git" / "config").unlink()
    monkeypatch.setenv("LATENTMEM_HOME", str(notes.parent / "home"))
    monkeypatch.setattr(cli.base, "load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["latentmem", "write", "notes/a.txt", argument])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and sentence in err and "Traceback" not in err and not out
    assert not list((notes.parent / "home").rglob("*.safetensors"))


def test_an_encoding_is_named(notes, capsys):
    assert inputs.from_files("notes/old.txt", "cp1251") == [("notes/old.txt", "old.txt", "die Tьr ist blau")]
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="no text encoding 'klingon'"):
        inputs.from_files("notes", "klingon")
