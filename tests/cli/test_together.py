"""A server and other programs write into one memory at once and are killed: nothing acknowledged is lost or doubled."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from typer.testing import CliRunner

import latentmem
from latentmem import cli

httpx = pytest.importorskip("httpx", reason="the server's extra is not installed")
pytest.importorskip("fastapi", reason="the server's extra is not installed")
from serving import HANG, wait  # noqa: E402 - it needs both

MAIN = "from latentmem.cli import main; main()"
WRITER = """
import sys, latentmem
llm, store = latentmem.load(sys.argv[1], device="cpu"), latentmem.Store(sys.argv[2], timeout=300)
for number in range(8):
    store.write(llm, "shared", f"line {number} of {sys.argv[3]}", source=sys.argv[3])
    print(f"line {number} of {sys.argv[3]}", flush=True)
    sys.stdin.readline()  # goes on when it is told to
"""


@pytest.fixture
def start(home, tmp_path):
    """Start programs, of which none outlives the test; what one says on standard error is in a file of its name."""
    programs = []

    def program(name, *command):
        errors = (tmp_path / name).open("w")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        programs.append(subprocess.Popen([sys.executable, "-c", *map(str, command)], env=os.environ, **pipes))
        errors.close()
        return programs[-1]

    yield program
    for one in programs:
        one.kill()
        one.communicate()


def test_programs_that_are_killed_lose_and_double_nothing(home, tiny_folder, tmp_path, start):
    store = latentmem.Store(home / "store")
    store.create("shared", latentmem.load(str(tiny_folder), device="cpu").empty(N=64, K=16))
    server = start("server", MAIN, "serve", tiny_folder, "--port", 0, "--device", "cpu")
    writers = [start(name, WRITER, tiny_folder, home / "store", name) for name in ("one", "two")]
    told = []
    wait(lambda: "answers at http" in (tmp_path / "server").read_text())
    url = (tmp_path / "server").read_text().split("answers at ")[1].split(";")[0]
    with httpx.Client(base_url=url, timeout=HANG) as http:
        for number in range(4):
            for writer in writers:  # these go on while the server writes
                told.append(writer.stdout.readline().strip())
                writer.stdin.write("\n")
                writer.stdin.flush()
            text = f"line {number} of the server"
            assert http.post("/v1/memories/shared/write", json={"text": text, "source": "http"}).status_code == 200
            told.append(text)
            if number == 1:
                writers[0].kill()
                told += [line.strip() for line in writers.pop(0).stdout]
    server.kill()
    server.wait()
    told.append(writers[0].stdout.readline().strip())
    writers[0].kill()
    writers[0].wait()
    command = ["write", "one more line", "-m", "shared", "--model", str(tiny_folder), "--device", "cpu"]
    result = CliRunner().invoke(cli.app, command)  # needs no repair
    assert result.exit_code == 0, result.output
    texts = Counter(version.text for version in store.history("shared") if version.event == "write")
    assert all(texts[text] == 1 for text in [*told, "one more line"]) and set(texts.values()) == {1}
    assert len(texts) <= len(told) + 1 + 2  # of each killed writer at most the line that was not acknowledged
    assert sum(source.tokens for source in store.open("shared").sources) == sum(len(text) for text in texts)
    store.close()
