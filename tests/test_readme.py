"""What the README shows, runs."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from latentmem import cli
from latentmem.loading.hub import SUPPORTED

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/how-to/shell.md", "docs/reference/models.md")
README, SHELL, MODELS = ((ROOT / page).read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_python_block_runs(page, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latentmem.loading.load.load", lambda name: trained)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.strip() and (tmp_path / "work.safetensors").is_file()


def test_every_command_and_option_that_is_shown_exists():
    commands = get_command(cli.app).commands
    pages = [[line.split() for line in page.splitlines() if line.startswith("latentmem ")] for page in (README, SHELL)]
    assert pages[0] and {words[1] for words in pages[1]} == set(commands)
    for words in [*pages[0], *pages[1]]:
        command = commands[words[1]]
        command = command.commands[words[2]] if hasattr(command, "commands") else command
        options = {option for parameter in command.params for option in parameter.opts}
        assert {w for w in words if re.fullmatch(r"--[a-z-]+", w)} - options <= {"--text;", "--json"}


def test_the_supported_decoders_are_listed():
    listed = re.search(r"Supported decoders \(`model_type`\): (.*?)\. For each", MODELS, re.DOTALL)
    assert tuple(listed[1].replace("\n", " ").split(", ")) == SUPPORTED
    assert f"[{len(SUPPORTED)} families]" in README


def test_the_readme_can_be_read_at_once():
    assert len(README.split()) <= 900


def test_the_lowest_transformers_that_is_tested_is_the_lowest_that_is_allowed():
    root = Path(__file__).parent.parent
    allowed = re.search(r'"transformers>=([\d.]+),', (root / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert re.search(r"LOWEST := ([\d.]+)#", (root / "Makefile").read_text(encoding="utf-8"))[1] == allowed
