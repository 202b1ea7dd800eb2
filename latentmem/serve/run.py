"""The server as a process: its address, its start and its end."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from latentmem.serve.service import Service


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach a server at this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; an OSError says why not."""
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048)


def serve(app: FastAPI, service: Service, at: socket.socket, *, grace: int = 30, told: Callable[[], None]) -> None:
    """Start the service and answer until SIGTERM or SIGINT; then finish what runs, and close the service.

    Args:
        app: made by `create_app`.
        service: it is started behind the door: until then `/ready` says no.
        grace: seconds for requests that run at the end.
        told: called when the service is ready.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=grace,
    )
    server, errors = _Server(config), []

    def start() -> None:
        try:
            service.start()
            told()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)
            server.should_exit = True

    starting = threading.Thread(target=start, name="start")
    starting.start()
    try:
        server.run(sockets=[at])
    finally:
        starting.join()
        service.close()
    if errors:
        raise errors[0]


class _Server(uvicorn.Server):
    """Ends on a signal without raising it again, so that the service can be closed; a second one does not wait."""

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
        self.config.app.state.shared.closing = True  # type: ignore[union-attr]
        self.force_exit, self.should_exit = self.should_exit, True
