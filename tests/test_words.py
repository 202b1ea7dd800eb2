"""Names say what a thing is: bare verbs and pronouns name no variable, argument, function or class of the package."""

import ast
from pathlib import Path

import pytest

import latentmem

ROOT = Path(latentmem.__file__).parent
NAMES = {"found", "some", "made", "says", "told", "given", "gone", "left"}
CLASSES = {"Some", "Gone", "Told", "Way", "How", "Talk", "Reading"}
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
LIST = Path(__file__).parent / "words.txt"  # "file: names" that still wait for a noun; the list only ever shrinks
NOT_YET = {file: set(names.split()) for file, names in (line.split(":") for line in LIST.read_text().splitlines())}


def bound(tree):
    """Every name that a file gives to something: variables, arguments, functions, classes, imports, captures."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname


def bare(path):
    return set(bound(ast.parse((ROOT / path).read_text(encoding="utf-8")))) & (NAMES | CLASSES)


@pytest.mark.parametrize("path", FILES)
def test_no_bare_name_is_bound(path):
    names = bare(path) - NOT_YET.get(path, set())
    assert not names, f"latentmem/{path} names something {sorted(names)}: use the noun that is meant."


def test_the_list_of_names_that_still_wait_only_shrinks():
    done = {path: names - (bare(path) if path in FILES else set()) for path, names in NOT_YET.items()}
    assert not any(done.values()), "`python tests/test_words.py` takes off tests/words.txt what nobody needs any more."


@pytest.mark.parametrize(
    "code",
    [
        "found = 1",
        "for some in (): pass",
        "[made for made in ()]",
        "def says(): pass",
        "def f(*told): pass",
        "lambda given: 1",
        "class Way: pass",
        "class A:\n    left: int",
        "class A:\n    def left(self): pass",
        "try: pass\nexcept E as gone: pass",
        "import a as found",
        "self.found = 1",
        "if (found := 1): pass",
        "with a as (b, some): pass",
    ],
)
def test_every_way_to_bind_a_name_is_seen(code):
    assert set(bound(ast.parse(code))) & (NAMES | CLASSES)


if __name__ == "__main__":
    kept = {path: sorted(bare(path) & names) for path, names in NOT_YET.items() if path in FILES}
    LIST.write_text("".join(f"{path}: {' '.join(names)}\n" for path, names in kept.items() if names))
