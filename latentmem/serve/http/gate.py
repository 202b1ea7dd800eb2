"""What every request passes first: who asks, from where and how much; and last: its line in the log."""

from __future__ import annotations

import asyncio
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentmem.serve.http import static
from latentmem.serve.http.keys import EVERYONE, Key, Keys
from latentmem.serve.http.logs import Log, Metrics
from latentmem.serve.http.shared import Record, Refused, Shared, loading, refusal

OPEN = ("/health", "/ready")  # no key, at any time
LOADING = (*OPEN, "/metrics", "/openapi.json")  # also while the server is not ready
LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?")
ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
IMPORT = re.compile(r"/v1/memories/[^/]+/import")


class Gate:
    """The outermost layer of the app.

    Args:
        app: what is behind it.
        shared: of the server.
        keys: None: everybody may do everything; then only this machine's own programs are let in, no web pages.
        log, metrics: are told of every request.
    """

    def __init__(self, app: ASGIApp, shared: Shared, keys: Keys | None, log: Log, metrics: Metrics) -> None:
        self.app, self.shared, self.keys, self.log, self.metrics = app, shared, keys, log, metrics
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1000})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if await static.respond(scope, receive, send):
            return None
        headers, start, status = Headers(scope=scope), time.monotonic(), 0
        given = headers.get("x-request-id", "")
        record = Record(given if ID.fullmatch(given) else uuid.uuid4().hex)
        scope["latentmem.record"] = record

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = MutableHeaders(scope=message)
                more["x-request-id"] = record.id
                more["x-content-type-options"] = "nosniff"
                more.setdefault("cache-control", "no-store")
            await send(message)

        self._running += 1
        try:
            try:
                self._admit(scope, headers, record)
                await self.app(scope, self._bounded(scope, headers, receive, start), sending)
            except Exception as error:  # noqa: BLE001 - nothing of it is told to the client
                if not isinstance(error, Refused):
                    self.log.error(record, error)
                if status:
                    raise _Broken from None  # the response can not be ended properly any more
                await refusal(error).response(scope, receive, sending)
        finally:
            self._running -= 1
            route = getattr(scope.get("route"), "path", "unknown") if "endpoint" in scope else "unknown"
            told = (record, scope["method"], route, status or 499, time.monotonic() - start)
            self.log.request(*told)
            self.metrics.request(*told)

    def _admit(self, scope: Scope, headers: Headers, record: Record) -> None:
        """Refuse who may not come in."""
        path = scope["path"]
        if path in OPEN:
            return
        if self.keys is not None and self.keys.required:
            key = self._key(headers)
        else:
            key = EVERYONE
            _from_here(scope, headers)
        scope["latentmem.key"], record.key = key, key.name
        if not self.shared.ready and path not in LOADING:
            raise loading()
        if self._running > self.shared.limits.requests:
            raise Refused(429, "too many requests run.", "rate_limit_exceeded", headers={"retry-after": "1"})

    def _key(self, headers: Headers) -> Key:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = self.keys.find(given.strip()) if self.keys is not None else None
        if scheme.lower() == "bearer" and key is not None:
            return key
        message = "a valid key is needed: `Authorization: Bearer lm-...`; `latentmem keys add` makes one."
        raise Refused(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _bounded(self, scope: Scope, headers: Headers, receive: Receive, start: float) -> Receive:
        """Receive no more of a body than is allowed, and no longer.

        What has come is taken also after the deadline: the client is late, never the server that was busy.
        """
        limits = self.shared.limits
        most = limits.upload if IMPORT.fullmatch(scope["path"]) else limits.body
        too_large = Refused(413, f"the body may have {most} bytes; send less.", "too_large")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        got, whole = 0, False

        async def receiving() -> Message:
            nonlocal got, whole
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
                got += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if got > most:
                    raise too_large
            return message

        return receiving


class _Broken(Exception):  # noqa: N818 - tells the server to cut the connection
    """A response that broke off."""


def _from_here(scope: Scope, headers: Headers) -> None:
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
