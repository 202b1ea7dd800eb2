"""The documentation: its generated pages hold what the code has, and the files at the root link to what is there."""

import importlib.util
import re
from pathlib import Path

import pytest
from typer.main import get_command

import latentmem
from latentmem import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages_of_the_docs", ROOT / "tools" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(path, command):
    if not hasattr(command, "commands"):
        yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves((*path, name), inner)


def test_the_page_of_the_command_line_has_every_command_and_option(pages):
    page = pages.cli_page()
    sections = {match[1]: match[2] for match in re.finditer(r"(?ms)^### `(.*?)`[^\n]*\n(.*?)(?=^### |\Z)", page)}
    for path, command in leaves(("latentmem",), get_command(cli.app)):
        section = sections[" ".join(path)]
        for parameter in command.params:
            names = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
            assert all(re.search(rf"`[^`]*{re.escape(name)}\b", section) for name in names), (path, names)


def test_the_options_of_a_new_memory_show_its_defaults():
    from latentmem.loading.trained import DEFAULTS
    from latentmem.longterm.longterm import LongTerm
    from latentmem.longterm.updates import UpdateArchive

    shown = {one.name: one.show_default for one in get_command(cli.app).commands["write"].params}
    assert shown["N"] == f"{DEFAULTS.N}" and DEFAULTS.form in shown["form"]
    assert shown["longterm"] == f"{DEFAULTS.longterm.R}"
    (limit,) = [one for one in get_command(cli.app).commands["write"].params if one.name == "longterm_limit"]
    assert f"by default {UpdateArchive.LIMIT >> 20} MiB, of hidden states {LongTerm.LIMIT >> 30} GiB" in limit.help


def test_the_page_of_the_interface_has_every_address_and_object(pages):
    page = pages.http_page()
    for address in ("POST /v1/chat/completions", "POST /v1/memories/{id}/write", "GET /metrics"):
        assert f"### `{address}`" in page
    named, defined = set(re.findall(r"\(#object-(\w+)\)", page)), set(re.findall(r"\{ #object-(\w+) \}", page))
    assert named <= defined and {"Write", "Error", "MemoryInfo"} <= named


def test_the_page_of_the_package_has_every_public_name(pages):
    page = pages.python_page()
    names = [name for name in latentmem.__all__ if not name.startswith("__")]
    assert re.findall(r"(?m)^::: latentmem\.([A-Za-z]\w*)$", page)[0] == "load"
    assert all(f"::: latentmem.{name}\n" in page for name in names)


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.md")))
def test_the_links_of_a_file_at_the_root_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_test_that_a_page_names_exists():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for name in re.findall(r"\btests/[a-z_/]+\.py", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_table_of_the_papers_sentences_names_code_that_exists():
    table = (ROOT / "docs" / "concepts" / "code.md").read_text(encoding="utf-8").split("| --- |\n")[1]
    named = re.findall(r"`([\w/]+(?:\.py|/))`(?: `(\w+)`)?", table)
    assert len(named) > 10
    for place, name in named:
        path = ROOT / place if place.startswith("tests/") else ROOT / "latentmem" / place
        assert path.exists(), place
        assert not name or re.search(rf"(class|def) {name}\b", path.read_text(encoding="utf-8")), f"{name} in {place}"


def shown():
    """Every command line of a code block of the docs: (page, words)."""
    for page in (ROOT / "docs").rglob("*.md"):
        for block in re.findall(r"(?ms)^```\n(.*?)^```", page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split(" # ")[0].removeprefix("$ ").split()
                if words[:1] == ["latentmem"] and page.name not in ("cli.md", "python.md", "http.md"):
                    yield page.name, words[1:]


def test_every_command_and_option_that_a_page_shows_exists():
    for page, words in shown():
        command = get_command(cli.app)
        while hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        unknown = {word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)} - options
        assert not unknown, f"{page}: {command.name} has no {sorted(unknown)}"


def test_every_page_is_in_the_navigation():
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    listed = set(re.findall(r'= "([^"]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8")))
    generated = {f"reference/{name}.md" for name in ("python", "cli", "http", "settings")}
    tables = {page for page in pages if re.fullmatch(r"results/[^/]+/.*", page)}  # linked from the pages of the results
    assert listed == pages - tables | generated
