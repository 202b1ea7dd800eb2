"""Who may import whom, so that the house keeps its rooms: no arrow runs back up, and no modules import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import latentmem

ROOT = Path(latentmem.__file__).parent
USING_MODELS = set(
    "version errors fields data disk container decoder core longterm files model loading".split()  # noqa: SIM905
)
ROOMS = {  # room -> the rooms below that it may import, next to its own; the order is from the bottom up
    "version": set(),
    "errors": set(),
    "documents": {"errors"},
    "fields": set(),
    "splitmix": set(),
    "data": set(),
    "disk": set(),
    "container": {"disk", "errors"},
    "written": set(),
    "decoder": {"errors"},
    "core": {"errors", "fields", "splitmix", "written", "decoder"},
    "coding": {"disk", "errors", "container", "written", "decoder", "core"},
    "longterm": {"errors", "written", "decoder", "core", "coding"},
    "files": {"disk", "errors", "container", "written", "core", "coding", "longterm"},
    "testing": {"core"},
    "model": {"errors", "documents", "written", "decoder", "core", "coding", "longterm", "files"},
    "loading": {"disk", "errors", "container", "decoder", "core", "coding", "longterm", "files", "model"},
    "store": {
        "version",
        "documents",
        "disk",
        "errors",
        "container",
        "written",
        "core",
        "coding",
        "longterm",
        "files",
        "model",
    },
    "train": {*USING_MODELS, "coding"},
    "evaluate": {*USING_MODELS, "store"},
    "serve": {
        "version",
        "disk",
        "errors",
        "documents",
        "fields",
        "container",
        "core",
        "longterm",
        "files",
        "model",
        "loading",
        "store",
    },
    "__init__": {"version", "core", "files", "model", "loading", "store"},
    "cli": {
        "__init__",
        "version",
        "errors",
        "documents",
        "fields",
        "core",
        "longterm",
        "model",
        "loading",
        "store",
        "train",
        "evaluate",
        "serve",
    },
}
CORE_MAY_IMPORT = {"torch", "transformers"}
LONGEST_FILE, LONGEST_FUNCTION = 500, 40  # lines
FILES = sorted(ROOT.rglob("*.py"))


def module(path):
    """The dotted name of a file."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def imports(path):
    """Modules that a file imports, with `TYPE_CHECKING` and local imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def room(path):
    """The first folder or file below the package."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below(path):
    allowed = ROOMS[room(path)] | {room(path)}
    for name in imports(path):
        if name.split(".")[0] == "latentmem":
            assert room(MODULES[name]) in allowed, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


def test_the_rooms_stand_in_order():
    order = list(ROOMS)
    for i, name in enumerate(order):
        assert ROOMS[name] <= set(order[:i]), name


def test_no_modules_import_each_other():
    arrows = {name: {n for n in imports(path) if n in MODULES and n != name} for name, path in MODULES.items()}
    while arrows:
        last = {name for name, targets in arrows.items() if not targets & set(arrows)}
        assert last, f"a circle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in last}


def test_the_core_needs_torch_and_transformers_only():
    for path in (ROOT / "core").glob("*.py"):
        for name in imports(path):
            first = name.split(".")[0]
            assert first in CORE_MAY_IMPORT | {"latentmem", "__future__"} or first in sys.stdlib_module_names, name


def test_the_surface_is_small_and_importing_it_does_not_import_torch():
    code = "import sys, latentmem; assert 'torch' not in sys.modules; print(*latentmem.__all__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["Conversation", "Memory", "MemoryModel", "MemorySettings", "Store", "__version__", "load"]


def test_the_surface_is_what_dir_shows_and_is_typed():
    assert dir(latentmem) == sorted(latentmem.__all__)
    assert all(getattr(latentmem, name) for name in dir(latentmem))
    assert (ROOT / "py.typed").is_file()
