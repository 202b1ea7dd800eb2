"""What every request passes first: who asks, from where and how much; and last: its line in the log."""

from __future__ import annotations

import asyncio
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentmem.serve.http import static
from latentmem.serve.http.errors import Refused, not_ready, refusal
from latentmem.serve.http.keys import EVERYONE, Key, Keys
from latentmem.serve.http.logs import Log, Metrics, RequestLog
from latentmem.serve.http.state import AppState

OPEN = ("/health", "/ready")  # no key, at any time
LOADING = (*OPEN, "/metrics", "/openapi.json")  # also while the server is not ready
LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?")
ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
IMPORT = re.compile(r"/v1/memories/[^/]+/import")


class Gate:
    """The outermost layer of the app.

    Args:
        app: what is behind the gate.
        state: of the server.
        keys: None: everybody may do everything; then only this machine's own programs are let in, no web pages.
        log, metrics: get every request.
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
        own_id, start, status = Headers(scope=scope).get("x-request-id", ""), time.monotonic(), 0
        request = scope["latentmem.log"] = RequestLog(own_id if ID.fullmatch(own_id) else uuid.uuid4().hex)

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _mark(message, request)
            await send(message)

        self._running += 1
        try:
            await self._pass(scope, receive, send_marked, request, start)
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

    async def _pass(self, scope: Scope, receive: Receive, send: Send, request: RequestLog, start: float) -> None:
        """Let a request in, if it may come in."""
        headers = Headers(scope=scope)
        self._admit(scope, headers, request)
        await self.app(scope, self._bounded(scope, headers, receive, start), send)

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
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    raw = IMPORT.fullmatch(scope["path"]) and kind in ("application/zip", "application/octet-stream")
    if kind not in ("application/json", "multipart/form-data", "") and not raw:
        raise Refused(415, "a body must be application/json or multipart/form-data.", "unsupported_media_type")
    if kind == "" and headers.get("content-length", "0") != "0":
        raise Refused(415, "a body needs its Content-Type: application/json.", "unsupported_media_type")
