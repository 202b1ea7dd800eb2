"""What every request passes: first who asks, from where and how much; at its end the log and the metrics.

The log and Prometheus get one line of JSON, and numbers; never a text, a question or a key.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TextIO

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentmem.serve.http import static
from latentmem.serve.http.errors import Refused, not_ready, refusal
from latentmem.serve.http.keys import EVERYONE, Key, Keys
from latentmem.serve.http.state import AppState, RequestLog, media_type

OPEN = ("/health", "/ready")  # no key, at any time
LOADING = (*OPEN, "/metrics", "/openapi.json")  # also while the server is not ready
LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?")
ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
WRITE = re.compile(r"/v1/memories/[^/]+/write")
IMPORT = re.compile(r"/v1/memories/[^/]+/import")
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
METHODS = ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS")
KINDS = {
    "/v1/memories/{id}/ask": "ask",
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/memories/{id}/write": "write",
}


class Gate:
    """The outermost layer of the app: every request passes it, and comes into the log and the metrics.

    Without keys everybody may do everything; then only this machine's own programs are let in, no web pages.
    """

    def __init__(self, app: ASGIApp, state: AppState, keys: Keys | None, log: Log, metrics: Metrics) -> None:
        self.app, self.state, self.keys, self.log, self.metrics = app, state, keys, log, metrics
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1000})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if await static.respond(scope, receive, send):
            return None
        headers, start, status = Headers(scope=scope), time.monotonic(), 0
        own_id = headers.get("x-request-id", "")
        request = scope["latentmem.log"] = RequestLog(own_id if ID.fullmatch(own_id) else uuid.uuid4().hex)

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _mark(message, request)
            await send(message)

        self._running += 1
        try:
            self._admit(scope, headers, request)
            await self.app(scope, self._bounded(scope, headers, receive, start), send_marked)
        except Exception as error:  # noqa: BLE001 - nothing of it is told to the client
            if not isinstance(error, Refused):
                self.log.error(request, error)
            if status:
                raise _BrokenOff from None  # the response can not be ended properly any more
            await refusal(error).response(scope, receive, send_marked)
        finally:
            self._running -= 1
            route = getattr(scope.get("route"), "path", "unknown") if "endpoint" in scope else "unknown"
            for book in (self.log, self.metrics):
                book.request(request, scope["method"], route, status or 499, time.monotonic() - start)

    def _admit(self, scope: Scope, headers: Headers, request: RequestLog) -> None:
        """Refuse who may not come in."""
        path = scope["path"]
        if path in OPEN:
            return
        if self.keys is not None and self.keys.required:
            key = self._key(headers)
        else:
            key = EVERYONE
            _require_local(scope, headers)
        scope["latentmem.key"], request.key = key, key.name
        if not self.state.ready and path not in LOADING:
            raise not_ready()
        if self._running > self.state.limits.requests:
            raise Refused(429, "too many requests run.", "rate_limit_exceeded", headers={"retry-after": "1"})

    def _key(self, headers: Headers) -> Key:
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        key = self.keys.find(secret.strip()) if self.keys is not None else None
        if scheme.lower() == "bearer" and key is not None:
            return key
        message = "a valid key is needed: `Authorization: Bearer lm-...`; `latentmem keys add` makes one."
        raise Refused(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _bounded(self, scope: Scope, headers: Headers, receive: Receive, start: float) -> Receive:
        """Receive no more of a body than is allowed, and no longer.

        What has come is taken also after the deadline: the client is late, never the server that was busy.
        """
        limits = self.state.limits
        most = limits.upload if IMPORT.fullmatch(scope["path"]) else limits.body
        if WRITE.fullmatch(scope["path"]) and media_type(headers) == "multipart/form-data":
            most = max(most, limits.file)
        too_large = Refused(413, f"the body may have {most} bytes; send less.", "too_large")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        received, whole = 0, False

        async def receive_bounded() -> Message:
            nonlocal received, whole
            if whole:
                return await receive()
            coming = asyncio.ensure_future(receive())
            try:  # `wait`, because `wait_for` with no time left does not look at the socket at all
                await asyncio.wait({coming}, timeout=max(0.0, start + limits.seconds - time.monotonic()))
                if not coming.done():
                    raise Refused(408, "the body did not come in time.", "timeout")
                message = coming.result()
            finally:
                coming.cancel()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if received > most:
                    raise too_large
            return message

        return receive_bounded


class _BrokenOff(Exception):  # noqa: N818 - tells the server to cut the connection
    """A response that broke off."""


def _mark(message: Message, request: RequestLog) -> None:
    headers = MutableHeaders(scope=message)
    headers["x-request-id"] = request.id
    headers["x-content-type-options"] = "nosniff"
    headers.setdefault("cache-control", "no-store")


def _require_local(scope: Scope, headers: Headers) -> None:
    """Let in programs of this machine, and no web page that a browser of this machine shows."""
    host, origin = headers.get("host", ""), headers.get("origin")
    if not LOCAL.fullmatch(host):
        raise Refused(403, "without keys this server answers only to localhost, 127.0.0.1 and [::1].", "foreign_host")
    foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if foreign or (origin is not None and origin != f"{scope['scheme']}://{host}"):
        raise Refused(403, "without keys this server does not answer to other web pages.", "foreign_origin")
    if scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE"):
        return
    kind = media_type(headers)
    raw = IMPORT.fullmatch(scope["path"]) and kind in ("application/zip", "application/octet-stream")
    if kind not in ("application/json", "multipart/form-data", "") and not raw:
        raise Refused(415, "a body must be application/json or multipart/form-data.", "unsupported_media_type")
    if kind == "" and headers.get("content-length", "0") != "0":
        raise Refused(415, "a body needs its Content-Type: application/json.", "unsupported_media_type")


# --- the log and the metrics ------------------------------------------------------------------------------------------


class Log:
    """Lines of JSON, by default to standard error as it is when a line is written."""

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
    """Numbers for Prometheus; `now` gives what the server does now, name -> number."""

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


HELP = {  # of what the service does now
    "prefix_bytes": "Keys and values of whole memories on the model's device.",
    "hot_bytes": "Keys and values on the model's device: of whole memories, and of updates that questions have found.",
    "warm_bytes": "Memories that are open: slots, births, origins, and codes of updates.",
    "cold_bytes": "Objects in the store, which hold all memories.",
}


class _Now(Collector):
    """What the server does when Prometheus asks."""

    def __init__(self, now: Callable[[], dict[str, float]]) -> None:
        self._now = now

    def collect(self) -> Iterator[Metric]:
        for name, value in self._now().items():
            about = HELP.get(name, "Of the service, now.")
            yield GaugeMetricFamily(f"latentmem_service_{name}", about, value=value)
