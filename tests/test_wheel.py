"""The wheel holds the whole package, and works where there is no checkout."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def ran(*command, cwd, **env):
    """The output of a command that has to succeed; it knows no checkout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=env)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built without a network."""
    if importlib.util.find_spec("hatchling") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("hatchling is not installed: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    ran(sys.executable, "-m", "pip", "wheel", *options, ROOT, cwd=folder, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory):
    """The commands of an environment with the wheel, and with what the tests have installed beside this package."""
    folder = tmp_path_factory.mktemp("environment")
    ran(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    installed = next(path for path in sys.path if (Path(path) / "torch").is_dir())
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(installed)
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    ran(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *install, cwd=folder)
    return folder / "bin"


def test_the_wheel_holds_every_file_of_the_package(wheel):
    files = [path for path in (ROOT / "latentmem").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}


def test_the_package_is_imported_from_the_wheel(bin_folder, tmp_path):
    code = "import latentmem; print(latentmem.__file__, *(getattr(latentmem, name) for name in latentmem.__all__))"
    assert ran(bin_folder / "python", "-c", code, cwd=tmp_path).startswith(str(bin_folder.parent))
    assert ran(bin_folder / "latentmem", "--version", cwd=tmp_path).startswith("latentmem ")
    assert "invented facts" in ran(bin_folder / "latentmem", "demo", "--help", cwd=tmp_path)


def test_the_demo_runs_from_the_wheel_and_leaves_the_store_alone(packaged, bin_folder, tmp_path):
    out = ran(bin_folder / "latentmem", "demo", "--device", "cpu", cwd=tmp_path, LATENTMEM_HOME=str(tmp_path / "home"))
    assert "Kvernes" in out and "without memory" in out
    assert any(answer in out for answer in ("Ines Torvald", "Ghent", "4,150"))
    assert not (tmp_path / "home").exists()
