"""A server that is killed under load: what it acknowledged is there afterwards, once, and in its order."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

httpx = pytest.importorskip("httpx", reason="the server's extra is not installed")
pytest.importorskip("fastapi", reason="the server's extra is not installed")
from serving import HANG, wait  # noqa: E402 - it needs both

KILLS = int(os.environ.get("LATENTMEM_KILLS", "2"))
CLIENTS = 6


@contextmanager
def started(model, home, log):
    """A server as a process of its own, and its address."""
    command = [sys.executable, "-c", "from latentmem.cli import main; main()", "serve", str(model), "--port", "0"]
    with log.open("w") as errors:
        server = subprocess.Popen(command, env=os.environ | {"LATENTMEM_HOME": str(home)}, stderr=errors)
    try:
        wait(lambda: "answers at http" in log.read_text() or server.poll() is not None)
        said = log.read_text()
        assert server.poll() is None, said
        yield server, said.split("answers at ")[1].split(";")[0]
    finally:
        server.kill()
        server.wait()


def write(url, client, acknowledged, stop):
    """Write line after line, each with a key of its own; those that the server acknowledged are noted."""
    with httpx.Client(base_url=url, timeout=HANG) as http:
        while not stop.is_set():
            number = len(acknowledged)
            body = {"text": f"line {number} of client {client}", "source": f"s{number % 3}", "wait": number % 2 == 0}
            try:
                response = http.post(
                    f"/v1/memories/m{client % 2}/write", json=body, headers={"Idempotency-Key": f"{client}-{number}"}
                )
            except httpx.HTTPError:
                return
            if response.status_code in (200, 202):
                acknowledged.append(body["text"])
            elif response.status_code == 429:
                time.sleep(0.1)
            else:
                return


def test_no_acknowledged_write_is_lost_when_the_server_is_killed(tiny_folder, tmp_path):
    home, draw = tmp_path / "home", random.Random(0)
    acknowledged = [[] for _ in range(CLIENTS)]
    for kill in range(KILLS + 1):
        with started(tiny_folder, home, tmp_path / f"log-{kill}") as (server, url):
            with httpx.Client(base_url=url, timeout=HANG) as http:
                for name in ("m0", "m1"):
                    assert http.post("/v1/memories", json={"id": name, "N": 64, "K": 16}).status_code == (
                        409 if kill else 201
                    )
                    found = texts(http, name)
                    for client in range(CLIENTS):
                        if client % 2 == int(name[1]):
                            own = [text for text in found if text.endswith(f"client {client}")]
                            numbers = [int(text.split()[1]) for text in own]
                            assert set(acknowledged[client]) <= set(own)
                            assert numbers == sorted(set(numbers))  # none twice, all in order
                            assert len(own) <= len(acknowledged[client]) + 1  # and at most the one that was cut off
                            acknowledged[client][:] = own
                    assert http.post(f"/v1/memories/{name}/ask", json={"question": "?"}).status_code == 200
            if kill == KILLS:
                break
            stop, enough = threading.Event(), sum(map(len, acknowledged)) + 10
            clients = [
                threading.Thread(target=write, args=(url, client, acknowledged[client], stop))
                for client in range(CLIENTS)
            ]
            for client in clients:
                client.start()
            wait(lambda enough=enough: sum(map(len, acknowledged)) > enough)  # on a slow machine, too
            time.sleep(draw.random() / 2)
            os.kill(server.pid, signal.SIGKILL)
            stop.set()
            for client in clients:
                client.join()
    assert sum(map(len, acknowledged)) > 10 * KILLS


def texts(http, name):
    """The texts of all versions of a memory that are in it, oldest first."""
    found, after = [], None
    while True:
        page = http.get(
            f"/v1/memories/{name}/history",
            params={"text": True, "limit": 100} | ({"after": after} if after is not None else {}),
        ).json()
        for version in page["data"]:
            if version["event"] == "write":
                assert version["state"] == "applied", json.dumps(version)
                found.append(version["text"])
        if not page["has_more"]:
            return found
        after = page["data"][-1]["version"]
