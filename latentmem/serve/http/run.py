"""The server as a process: its address, its start and its end."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from latentmem.serve.engine.service import Service
from latentmem.serve.http import static
from latentmem.serve.http.errors import Json, not_ready


def serve(
    make: Callable[[], tuple[FastAPI, Service]],
    at: socket.socket,
    *,
    grace: int = 30,
    on_ready: Callable[[FastAPI], None] = lambda app: None,
) -> None:
    """Load the model and answer until SIGTERM or SIGINT; then finish what runs, and close the service.

    Args:
        make: loads the model, and makes the app and the service that it answers with.
        at: `/health` and the page answer from the beginning, all else when the service has started.
        grace: seconds for requests that run at the end.
    """
    door = _Door()
    server, services, errors = _Server(door, grace), [], []

    def start() -> None:
        try:
            door.app, service = make()
            services.append(service)
            service.start()
            on_ready(door.app)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)
            server.should_exit = True

    starting = threading.Thread(target=start, name="start")
    starting.start()
    try:
        server.run(sockets=[at])
    finally:
        starting.join()
        if services and not errors:
            services[0].close(grace)
    if errors:
        raise errors[0]


class _Door:
    """Shows the page, and says that the app is not there yet, until it is."""

    def __init__(self) -> None:
        self.app: FastAPI | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif not await static.respond(scope, receive, send) and scope["type"] == "http":
            response = Json({"status": "ok"}) if scope["path"] == "/health" else not_ready().response
            await response(scope, receive, send)

    def close(self) -> None:
        """Say from now on that the server is not ready."""
        if self.app is not None:
            self.app.state.latentmem.closing = True


class _Server(uvicorn.Server):
    """Ends on a signal without raising it again, so that the service can be closed; a second one does not wait."""

    def __init__(self, door: _Door, grace: int) -> None:
        bare: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_config": None}
        bare |= dict.fromkeys(("access_log", "server_header", "proxy_headers"), False)
        super().__init__(uvicorn.Config(door, http="h11", timeout_graceful_shutdown=grace, **bare))
        self._door = door

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._door.close()
        self.force_exit, self.should_exit = self.should_exit, True
