"""Who may do what: keys, what they never learn of other memories, and the server as a process."""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import httpx
import pytest
from serving import HANG, Scripted, running, wait

import latentmem
from latentmem import cli
from latentmem.serve.engine.service import Service
from latentmem.serve.http.address import bound, is_loopback
from latentmem.serve.http.app import create_app
from latentmem.serve.http.gate import Log
from latentmem.serve.http.keys import Keys
from latentmem.serve.http.run import _Door, serve
from latentmem.serve.settings import Limits
from latentmem.testing import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def llm():
    return latentmem.MemoryModel(tiny_model(), byte_tokenizer())


@pytest.fixture(scope="module")
def guarded(llm, tmp_path_factory):
    """A server with keys, and the keys."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = Keys(folder / "keys.json")
    given = {
        "alice": keys.add("alice", ["alice", "team-*"]),
        "reader": keys.add("reader", ["alice"], read_only=True),
        "all": keys.add("all", ["*"]),
    }
    with running(llm, folder / "store", keys, memories=["alice", "team-red", "bob"]) as server:
        yield server, given


def by(given, name):
    return {"headers": {"authorization": f"Bearer {given[name]}"}}


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_key_is_kept_as_a_hash_and_found_again(tmp_path):
    keys = Keys(tmp_path / "keys.json")
    assert not keys.required and keys.all() == []
    given = keys.add("alice", ["alice", "team-*"])
    assert re.fullmatch(r"lm-[A-Za-z0-9_-]{43}", given) and given != keys.add("bob", ["bob"], read_only=True)
    text = keys.path.read_text()
    assert given not in text and given[3:] not in text
    assert os.name != "posix" or stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    again = Keys(keys.path)
    alice, bob = again.all()
    assert again.find(given) == alice and alice.writes and not bob.writes and again.required
    assert [alice.may_touch(name) for name in ("alice", "team-red", "Alice", "alice2", "bob")] == [1, 1, 0, 0, 0]
    for wrong in ("", "lm-", given[:-1], given + "x", given.upper(), "\udcff"):
        assert again.find(wrong) is None
    keys.remove("alice")
    assert again.find(given) is None, "another process has removed it"
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["keys.json"]


def test_what_is_no_key_is_refused(tmp_path):
    keys = Keys(tmp_path / "keys.json")
    keys.add("alice", ["alice"])
    for name, patterns, says in [
        ("alice", ["x"], "there is a key 'alice' already"),
        ("a b", ["x"], "can not be a key's name"),
        ("", ["x"], "can not be a key's name"),
        ("bob", [], "needs the memories"),
        ("bob", ["../x"], "no pattern"),
        ("bob", [""], "no pattern"),
    ]:
        with pytest.raises(ValueError, match=says):
            keys.add(name, patterns)
    with pytest.raises(ValueError, match="there is no key 'bob'"):
        keys.remove("bob")


def test_a_damaged_file_lets_nobody_in(tmp_path, capsys):
    keys = Keys(tmp_path / "keys.json")
    given = keys.add("alice", ["alice"])
    good = keys.path.read_text()
    for bad in ("{", "[]", '{"format": "other", "keys": []}', good.replace('"read"', '"root"'), good[:-20]):
        keys.path.write_text(bad)
        assert keys.find(given) is None and keys.required and "damaged" in capsys.readouterr().err
        with pytest.raises(ValueError, match="damaged"):
            Keys(keys.path)
    keys.path.write_text(good)
    assert keys.find(given) is not None
    keys.path.unlink()
    assert keys.find(given) is None and keys.required, "what was closed does not open"
    if os.name == "posix":
        keys.path.write_text(good)
        keys.path.chmod(0o666)
        with pytest.raises(ValueError, match="chmod 600"):
            Keys(keys.path)


# --- over HTTP --------------------------------------------------------------------------------------------------------


def test_without_a_valid_key_nothing_is_told(guarded):
    server, given = guarded
    wrong = [
        {},
        *({"authorization": value} for value in ("Bearer", "Bearer lm-x", f"Basic {given['all']}", given["all"])),
    ]
    for headers in wrong:
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/v1/memories/alice"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
            ("GET", "/nothing"),
            ("POST", "/v1/chat/completions"),
        ):
            response = server.http.request(method, path, headers=headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["type"] == "authentication_error"
    assert server("GET", "/health")[0] == server("GET", "/ready")[0] == 200
    assert server("GET", "/metrics", **by(given, "reader"))[0] == 200
    assert server("GET", "/v1/models", headers={"authorization": f"bearer {given['all']}"})[0] == 200
    assert server("GET", "/v1/models", headers={**by(given, "all")["headers"], "host": "any.example"})[0] == 200


def test_a_body_is_not_read_before_the_key(guarded):
    server, _ = guarded
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/memories/x/import HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\nPK")
        assert client.recv(100).startswith(b"HTTP/1.1 401")


ROUTES = [
    ("GET", "/v1/memories/{}", None),
    ("DELETE", "/v1/memories/{}", None),
    ("POST", "/v1/memories/{}/write", {"text": "x"}),
    ("POST", "/v1/memories/{}/ask", {"question": "?"}),
    ("GET", "/v1/memories/{}/history", None),
    ("GET", "/v1/memories/{}/stats", None),
    ("POST", "/v1/memories/{}/rollback", {"version": 0}),
    ("POST", "/v1/memories/{}/undo", {}),
    ("POST", "/v1/memories/{}/prune", {"keep": 1}),
    ("POST", "/v1/memories/{}/fork", {"id": "team-new"}),
    ("POST", "/v1/memories/{}/forget", {"source": "notes"}),
    ("POST", "/v1/memories/{}/forget", {"source": "notes", "exact": True}),
    ("POST", "/v1/memories/{}/pin", {"source": "notes"}),
    ("POST", "/v1/memories/{}/expire", {"source": "notes", "after": 1}),
    ("GET", "/v1/memories/{}/export", None),
    ("GET", "/v1/models/MODEL@{}", None),
    ("POST", "/v1/chat/completions", {"memory": "{}"}),
    ("POST", "/v1/chat/completions", {"memory": {"id": "{}", "write": True}}),
    ("POST", "/v1/chat/completions", {"memory": "{}", "stream": True}),
    ("POST", "/v1/chat/completions", {"model": "MODEL@{}"}),
    ("POST", "/v1/completions", {"memory": "{}"}),
]


@pytest.mark.parametrize(("method", "path", "body"), ROUTES, ids=lambda value: json.dumps(value).strip('"'))
def test_a_memory_of_others_is_as_one_that_is_not_there(guarded, monkeypatch, method, path, body):
    server, given = guarded
    store = server.service.store
    asked = []
    contains = type(store).__contains__
    monkeypatch.setattr(type(store), "__contains__", lambda self, name: asked.append(name) or contains(self, name))
    find = store._journal.find
    monkeypatch.setattr(store._journal, "find", lambda name: asked.append(name) or find(name))

    def answer(name):
        address = path.replace("{}", name).replace("MODEL", server.model)
        said = body
        if "completions" in path:
            said = {"model": server.model, "messages": [{"role": "user", "content": "?"}], "prompt": "?"}
            said |= json.loads(json.dumps(body).replace("{}", name).replace("MODEL", server.model))
        response = server.http.request(method, address, json=said, **by(given, "alice"))
        told = {what: value for what, value in response.headers.items() if what not in ("date", "x-request-id")}
        return response.status_code, response.text.replace(name, "NAME"), {**told, "content-length": ""}

    others = answer("bob")
    assert "bob" not in asked, "the store is not asked"
    assert others[0] == 404 and others == answer("nob")  # a name that the key may not touch, and that is not there
    assert others[:2] == answer("team-none")[:2]  # one that it may touch, and that is not there
    assert contains(store, "bob") and store.version("bob").version == 1


def test_lists_hold_what_the_key_may_touch(guarded):
    server, given = guarded
    names = {key: [one["id"] for one in server("GET", "/v1/memories", **by(given, key))[1]["data"]] for key in given}
    assert names == {"alice": ["alice", "team-red"], "reader": ["alice"], "all": ["alice", "bob", "team-red"]}


def test_a_user_field_chooses_no_memory_of_others(guarded):
    server, given = guarded
    body = {"model": server.model, "messages": [{"role": "user", "content": "?"}]}
    for user, used in (("bob", None), ("alice", "alice"), ("team-none", None)):
        status, made = server("POST", "/v1/chat/completions", {**body, "user": user}, **by(given, "alice"))
        assert status == 200 and (made.get("memory") or {}).get("id") == used


def test_a_key_that_may_only_read_changes_nothing(guarded):
    server, given = guarded
    before = server.service.store.version("alice").version
    for method, path, body in ROUTES:
        if method == "GET" or "models" in path or "completions" in path or path.endswith("/ask"):
            continue
        status, said = server(method, path.replace("{}", "alice"), body, **by(given, "reader"))
        assert (status, said["error"]["code"]) == (403, "no_rights")
    send = {"content": b"x", **by(given, "reader")}
    for path in ("/v1/memories", "/v1/memories/alice/import"):
        send["headers"]["content-type"] = "application/json" if path == "/v1/memories" else "application/zip"
        send["content"] = b'{"id": "alice"}'
        assert server.http.post(path, **send).status_code == 403
    body = {"model": server.model, "messages": [{"role": "user", "content": "?"}]}
    wish = {**body, "memory": {"id": "alice", "write": True}}
    assert server("POST", "/v1/chat/completions", wish, **by(given, "reader"))[0] == 403
    assert server("POST", "/v1/chat/completions", {**body, "memory": "alice"}, **by(given, "reader"))[0] == 200
    assert server("POST", "/v1/memories/alice/ask", {"question": "?"}, **by(given, "reader"))[0] == 200
    assert server.service.store.version("alice").version == before


def test_names_of_other_memories_are_never_told(guarded):
    server, given = guarded
    mine, all_ = by(given, "alice"), by(given, "all")
    for path in ("/v1/memories", "/v1/memories/alice/fork"):
        taken, free = (server("POST", path, {"id": name}, **mine) for name in ("bob", "nob"))
        assert taken[0] == free[0] == 403 and json.dumps(taken).replace("bob", "nob") == json.dumps(free)
    assert server("POST", "/v1/memories/alice/fork", {"id": "secret"}, **all_)[0] == 201
    for method, path, body, status in [
        ("DELETE", "/v1/memories/alice", None, 409),
        ("POST", "/v1/memories/alice/forget", {"source": "notes", "exact": True}, 403),
        ("POST", "/v1/memories/alice/pin", {"source": "nothing"}, 400),
        ("GET", "/v1/memories/alice/history?text=true", None, 200),
    ]:
        got, said = server(method, path, body, **mine)
        assert got == status and "secret" not in json.dumps(said) and "bob" not in json.dumps(said), said
    status, said = server("GET", "/v1/memories/secret/history", **all_)
    assert said["data"][0]["base"]["id"] == "alice"
    assert server("POST", "/v1/memories/secret/fork", {"id": "team-copy"}, **all_)[0] == 201
    status, said = server("GET", "/v1/memories/team-copy/history", **mine)
    assert said["data"][0]["base"] is None and "secret" not in json.dumps(said)
    gone = server("POST", "/v1/memories/alice/forget", {"source": "notes", "exact": True}, **all_)[1]
    assert gone["rewritten"] == ["alice", "secret", "team-copy"]
    for name in ("team-copy", "secret"):
        assert server("DELETE", f"/v1/memories/{name}", **all_)[0] == 200


def test_who_else_uses_a_memory_is_not_told(guarded):
    server, given = guarded
    store = server.service.store
    store.timeout, before = 0.05, store.timeout
    try:
        with store._locks.memory("alice"):
            status, said = server("POST", "/v1/memories/alice/undo", **by(given, "alice"))
            assert status == 409 and said["error"]["code"] == "in_use" and str(os.getpid()) not in json.dumps(said)
    finally:
        store.timeout = before


def test_a_memory_of_another_model_is_not_described(guarded):
    server, given = guarded
    other = latentmem.MemoryModel(tiny_model(seed=7), byte_tokenizer(), name="/home/somebody/model")
    server.service.store.create("team-other", other.empty(N=64, K=16))
    ask = ("POST", "/v1/memories/team-other/ask", {"question": "?"})
    status, said = server(*ask, **by(given, "alice"))
    assert status == 400 and said["error"]["code"] == "other_model" and "somebody" not in json.dumps(said)
    assert server("GET", "/v1/memories/team-other", **by(given, "alice"))[1]["model"] == "model"
    server("DELETE", "/v1/memories/team-other", **by(given, "alice"))


def test_a_running_server_notices_new_and_removed_keys(llm, tmp_path):
    keys = Keys(tmp_path / "keys.json")
    with running(llm, tmp_path / "store", keys, Limits(), memories=["m"]) as server:
        assert server("GET", "/v1/memories/m")[0] == 200, "no key, no lock"
        given = Keys(tmp_path / "keys.json").add("late", ["m"])
        assert server("GET", "/v1/memories/m")[0] == 401
        mine = {"headers": {"authorization": f"Bearer {given}"}}
        assert server("GET", "/v1/memories/m", **mine)[0] == 200
        assert server.lines()[-1].get("key") in ("late", None)
        Keys(tmp_path / "keys.json").remove("late")
        assert server("GET", "/v1/memories/m", **mine)[0] == 401 == server("GET", "/v1/memories/m")[0]
        assert given not in json.dumps(server.lines())


# --- the commands -----------------------------------------------------------------------------------------------------


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["latentmem", *map(str, args)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_commands_for_keys(home, monkeypatch, capsys):
    assert "No keys yet" in run(monkeypatch, capsys, "keys", "list")[1]
    code, out, _ = run(monkeypatch, capsys, "keys", "add", "alice", "--memories", "alice, team-*")
    given = out.strip()
    assert code == 0 and re.fullmatch(r"lm-[\w-]{43}", given)
    run(monkeypatch, capsys, "keys", "add", "bob", "--memories", "*", "--read-only")
    keys = Keys(home / "keys.json")
    assert keys.find(given).memories == ("alice", "team-*")
    _, out, _ = run(monkeypatch, capsys, "keys", "list")
    assert re.search(r"alice +alice, team-\* +read, write", out) and re.search(r"bob +\* +read *\n", out)
    code, _, err = run(monkeypatch, capsys, "keys", "add", "bob", "--memories", "*")
    assert code == 2 and "there is a key 'bob' already" in err
    assert run(monkeypatch, capsys, "keys", "remove", "alice")[0] == 0 and keys.find(given) is None


def test_other_machines_are_served_only_with_keys(home, monkeypatch, capsys):
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        code, _, err = run(monkeypatch, capsys, "serve", "--host", host)
        assert code == 2 and "latentmem keys add" in err
    assert [is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "0.0.0.0", "::")] == [
        1,
        1,
        1,
        1,
        0,
        0,
    ]


def test_what_is_not_installed_is_named(home, monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("fastapi", "mcp") else find(name))
    code, _, err = run(monkeypatch, capsys, "serve")
    assert code == 2 and "needs fastapi" in err and "'latentmem[serve]'" in err
    code, _, err = run(monkeypatch, capsys, "mcp")
    assert code == 2 and "'latentmem[mcp]'" in err


def test_a_taken_port_is_told_before_the_model_is_loaded(home, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run(monkeypatch, capsys, "serve", "no-model", "--port", taken.getsockname()[1])
    assert code == 1 and "in use" in err


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_server_as_a_process_finishes_what_runs_and_ends(home, tiny_folder, tmp_path):
    environment = {**os.environ, "LATENTMEM_HOME": str(home)}
    command = [sys.executable, "-m", "latentmem.cli", "serve", str(tiny_folder), "--port", "0", "--device", "cpu"]
    command += ["--grace", str(10 * HANG)]
    code = "import sys; from latentmem import cli; sys.argv = ['latentmem', *sys.argv[1:]]; cli.main()"
    command = [sys.executable, "-c", code, *command[3:]]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        said = []
        reader = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")))
        reader.start()
        try:
            wait(lambda: any("curl" in line for line in said) or process.poll() is not None)
            url = re.search(r"answers at (http://127\.0\.0\.1:\d+)", "".join(said))[1]
            with httpx.Client(base_url=url, timeout=HANG) as http:
                assert http.get("/ready").status_code == 200
                model = http.get("/v1/models").json()["data"][0]["id"]
                assert http.post("/v1/memories", json={"id": "m", "N": 64, "K": 16}).status_code == 201
                assert http.post("/v1/memories/m/write", json={"text": "the door", "wait": False}).status_code == 202
                body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 300}
                with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                    lines = response.iter_lines()
                    next(lines)
                    process.send_signal(signal.SIGTERM)
                    assert list(lines)[-2:] == ["data: [DONE]", ""], "what runs is finished"
            assert process.wait(HANG) == 0  # and before its grace is over
        finally:
            process.kill()
            reader.join()
        assert process.stdout.read() == "" and "Traceback" not in "".join(said)
    logged = [json.loads(line) for line in said if line.startswith("{")]
    assert [line["status"] for line in logged] == [200, 200, 201, 202, 200]
    store = latentmem.Store(home / "store")
    assert store.history("m")[1].text == "the door" and not store.pending_count("m")
    store.close()


def test_until_the_model_is_loaded_only_health_answers():
    async def ask(path):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(_Door()), base_url="http://localhost") as http:
            response = await http.get(path)
            return response.status_code, response.json()

    assert asyncio.run(ask("/health")) == (200, {"status": "ok"})
    for path in ("/ready", "/v1/models", "/metrics"):
        status, said = asyncio.run(ask(path))
        assert status == 503 and said["error"]["code"] == "not_ready"


def test_a_model_that_can_not_be_loaded_ends_the_server():
    def make():
        raise ValueError("there is no such model")

    with pytest.raises(ValueError, match="no such model"):
        serve(make, bound("127.0.0.1", 0))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_what_runs_at_the_end_is_not_waited_for_forever(llm, tmp_path):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    store = latentmem.Store(tmp_path)
    engine = Scripted()
    service = Service(llm, store, engine=engine)
    engine.go.clear()
    at, got = bound("127.0.0.1", 0), []
    body = {"model": "latentmem", "messages": [{"role": "user", "content": "?"}]}
    url = f"http://127.0.0.1:{at.getsockname()[1]}"

    def client():
        with contextlib.suppress(httpx.HTTPError):
            got.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=HANG).status_code)

    def told(app):
        thread.start()
        wait(lambda: engine.answers)
        os.kill(os.getpid(), signal.SIGTERM)

    thread, start = threading.Thread(target=client), time.monotonic()
    hang = threading.Timer(HANG, engine.go.set)  # else the answer never ends by itself
    hang.start()
    serve(lambda: (create_app(service, log=Log(io.StringIO())), service), at, grace=1, on_ready=told)
    hang.cancel()
    thread.join()
    store.close()
    assert time.monotonic() - start >= 1 and engine.answers[0].cancelled and 200 not in got
