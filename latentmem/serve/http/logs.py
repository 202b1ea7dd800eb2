"""What the log and Prometheus get of each request: one line of JSON, and numbers; never a text, a question or a key."""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TextIO

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
METHODS = ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS")
KINDS = {
    "/v1/memories/{id}/ask": "ask",
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/memories/{id}/write": "write",
}


@dataclass
class RequestLog:
    """What is known of one request.

    Args:
        id: of the request.
        key: name of the key.
        memory: the one that was chosen.
        prompt_tokens, completion_tokens, written_tokens: tokens that were read, made and written.
    """

    id: str
    key: str = ""
    memory: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    written_tokens: int = 0


class Log:
    """Lines of JSON.

    Args:
        to: where they go; by default standard error, as it is when a line is written.
    """

    def __init__(self, to: TextIO | None = None) -> None:
        self._to, self._lock = to, threading.Lock()

    def line(self, **facts: object) -> None:
        facts = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts}
        with self._lock:
            to = self._to or sys.stderr
            to.write(json.dumps(facts) + "\n")
            to.flush()

    def request(self, request: RequestLog, method: str, route: str, status: int, seconds: float) -> None:
        """One request that has ended."""
        facts = {name: value for name, value in asdict(request).items() if value and name != "id"}
        self.line(id=request.id, method=method, route=route, status=status, ms=round(seconds * 1000, 1), **facts)

    def error(self, request: RequestLog, error: BaseException) -> None:
        """Where this program made an error, without its message, which may hold a text."""
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
        self.line(id=request.id, error=type(error).__name__, where=where[-12:])


class Metrics:
    """Numbers for Prometheus.

    Args:
        now: gives what the server does now, name -> number.
    """

    def __init__(self, now: Callable[[], dict[str, float]]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "latentmem_requests", "Requests that have ended.", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "latentmem_request_seconds", "How long they took.", ["kind"], buckets=BUCKETS, registry=self.registry
        )
        self._busy = Counter("latentmem_busy", "Requests refused because too many waited.", registry=self.registry)
        self._tokens = Counter("latentmem_tokens", "Tokens read, made and written.", ["kind"], registry=self.registry)
        self.registry.register(_Now(now))

    def request(self, request: RequestLog, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request that has ended."""
        self._requests.labels(method if method in METHODS else "other", route, str(status)).inc()
        if route in KINDS and status < 400:
            self._seconds.labels(KINDS[route]).observe(seconds)
        if status == 429:
            self._busy.inc()
        for kind in ("prompt", "completion", "written"):
            self._tokens.labels(kind).inc(getattr(request, f"{kind}_tokens"))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Now(Collector):
    """What the server does when Prometheus asks."""

    def __init__(self, now: Callable[[], dict[str, float]]) -> None:
        self._now = now

    def collect(self) -> Iterator[Metric]:
        for name, value in self._now().items():
            yield GaugeMetricFamily(f"latentmem_service_{name}", "Of the service, now.", value=value)
