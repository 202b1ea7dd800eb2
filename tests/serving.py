"""For the tests of the server: an engine that says what it is told to, and a server that really listens."""

import contextlib
import io
import json
import threading
import time

import httpx
import uvicorn

import latentmem
from latentmem.serve.engine.answer import Piece
from latentmem.serve.engine.service import Service
from latentmem.serve.http.app import create_app
from latentmem.serve.http.gate import Log
from latentmem.serve.settings import Sizes

WORDS = ["the ", "door ", "is ", "blue"]
HANG = 300  # seconds after which nothing comes any more


class Scripted:
    """Stands in for the engine: gives `words` for every answer, as soon as `go` is set.

    Attributes:
        asked: (ids, sampling) of all answers.
        answers: all of them.
    """

    def __init__(self):
        self.words, self.go, self.error, self.finishes = WORDS, threading.Event(), None, True
        self.asked, self.answers = [], []
        self.go.set()
        self._threads = []

    def start(self):
        pass

    def stop(self):
        self.go.set()
        for thread in self._threads:
            thread.join()

    def stats(self):
        return {"rows": 0}

    def call(self, action):
        return action()

    def submit(self, answer, memory, ids, sampling):
        self.asked.append((list(ids), sampling))
        self.answers.append(answer)
        self._threads.append(threading.Thread(target=self._say, args=(answer, len(ids), sampling)))
        self._threads[-1].start()

    def _say(self, answer, count, sampling):
        answer.prompt_tokens = count
        while not self.go.wait(0.005):
            if answer.cancelled:
                return answer.give(None)
        if self.error is not None:
            return answer.give(self.error)
        for choice in range(sampling.n):
            for word in self.words:
                answer.completion_tokens += 1
                answer.give(Piece(choice, word))
            if self.finishes:
                answer.give(Piece(choice, "", "stop"))
        return answer.give(None)


class Running:
    """A server at `url`, what it logs and what is behind it."""

    def __init__(self, service, keys=None, limits=None, engine=None):
        self.service, self.engine, self._log = service, engine, io.StringIO()
        self.app = create_app(service, keys, limits, log=Log(self._log))
        config = uvicorn.Config(self.app, port=0, lifespan="off", log_config=None, access_log=False, http="h11")
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        wait(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=HANG)
        self.model = self.app.state.latentmem.model

    def close(self):
        self.http.close()
        self.server.should_exit = True
        if self.engine is not None:
            self.engine.go.set()
        self._thread.join()
        self.service.close()

    def lines(self):
        """What was logged."""
        return [json.loads(line) for line in self._log.getvalue().splitlines()]

    def __call__(self, method, path, body=None, **options):
        """One request -> (status, body)."""
        if isinstance(body, dict):
            options["json"] = body
        elif body is not None:
            options["content"] = body
            options["headers"] = {"content-type": "application/json", **options.get("headers", {})}
        response = self.http.request(method, path, **options)
        kind = response.headers.get("content-type", "")
        return response.status_code, response.json() if kind == "application/json" else response.content


@contextlib.contextmanager
def running(llm, path, keys=None, limits=None, *, scripted=True, memories=(), **options):
    """A server with a store of its own, with some memories that hold "the door is blue"."""
    store = latentmem.Store(path)
    for name in memories:
        store.create(name, llm.empty(N=64, K=16))
        store.write(llm, name, "the door is blue", source="notes")
    engine = Scripted() if scripted else None
    service = Service(llm, store, Sizes(**options), engine=engine)
    service.start()
    server = Running(service, keys, limits, engine)
    try:
        yield server
    finally:
        server.close()
        store.close()


def wait(condition, seconds=HANG):
    """Wait until something is so; only what hangs takes longer, on any machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
