"""Who may import whom, so that the house keeps its rooms."""

import ast
from pathlib import Path

import pytest

import latentmem

ROOT = Path(latentmem.__file__).parent
ROOMS = {  # room -> rooms of latentmem that it may import
    "core": {"core"},
    "adapters": set(),
    "prompts": set(),
    "testing": {"core"},
    "streaming": set(),
    "quantize": {"core"},
    "model": {"core", "adapters", "prompts", "streaming"},
    "released": {"core", "adapters", "prompts", "model", "loading"},
    "loading": {"core", "adapters", "prompts", "model", "released", "quantize"},
    "chat": {"core", "model", "prompts"},
    "doctor": {"core", "model"},
    "files": {"core", "store"},
    "store": {"core", "model", "prompts", "store", ""},
    "evaluate": {"core", "model", "loading", "evaluate", "store"},
    "train": {"core", "adapters", "prompts", "model", "loading", "train"},
    "serve": {"core", "model", "prompts", "store", "streaming", "files", "serve", ""},
    "cli": {"serve", "cli", "core", "model", "chat", "doctor", "files", "store", "evaluate", "train", ""},
    "__init__": {"core", "chat", "loading", "model", "store"},
}
CORE_MAY_IMPORT = {"torch", "safetensors", "transformers"}


def imports(path):
    """Modules that a file imports, with `TYPE_CHECKING` and local imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}") for alias in node.names)


def room(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path):
    allowed = ROOMS[room(path)]
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "latentmem":
            assert (
                rest[0] if rest and (ROOT / rest[0]).exists() | (ROOT / f"{rest[0]}.py").exists() else ""
            ) in allowed, name


def test_the_core_needs_torch_safetensors_and_transformers_only():
    import sys

    for path in (ROOT / "core").glob("*.py"):
        for name in imports(path):
            first = name.split(".")[0]
            assert first in CORE_MAY_IMPORT | {"latentmem", "__future__"} or first in sys.stdlib_module_names, name


def test_the_surface_is_small_and_importing_it_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, latentmem; assert 'torch' not in sys.modules; print(*latentmem.__all__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["Conversation", "Memory", "MemoryModel", "Store", "__version__", "load"]
