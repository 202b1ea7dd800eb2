"""Memories for other programs and people: serve, mcp, keys."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentmem.cli import base, options, printing
from latentmem.cli.base import Adapters, Device, ServedQuantize, app
from latentmem.serve.settings import Limits, Sizes

if TYPE_CHECKING:
    from fastapi import FastAPI

    from latentmem.serve.engine.service import Service
    from latentmem.serve.http.keys import Keys

PANEL = "Serving"
keys = typer.Typer(help="Keys for `latentmem serve`: who may read and write which memories.", no_args_is_help=True)
app.add_typer(keys, name="keys", rich_help_panel=PANEL)

Model = Annotated[str, typer.Argument(help=f"{base.MODELS}.")]
FLAGS = {name: (f"--max-{name}",) for name in ("body", "file", "upload", "text", "n")}


def sized(command: options.Command) -> options.Command:
    """A command with the settings of a server as options in the place of its parameters `sizes` and `limits`."""
    sizes = options.of_settings(Sizes).options
    limits = options.of_settings(Limits, ("messages", "requests"), FLAGS).options
    command = options.replaced(command, "sizes", options.Group(sizes, Sizes))
    return options.replaced(command, "limits", options.Group(limits, Limits))


@dataclass(frozen=True)
class Loading:
    """Options of the model and the store that are served."""

    store: Annotated[Path | None, typer.Option(help="Folder of a store; by default that of the command line.")] = None
    cache_bytes: Annotated[
        int | None, typer.Option(min=0, help="Bytes of opened memories that are kept; by default a quarter of the RAM.")
    ] = None
    quantize: ServedQuantize = None
    adapters: Adapters = "auto"
    device: Device = None

    def service(self, model: str, sizes: Sizes | None = None) -> Service:
        """A service over the store, not started."""
        import torch

        import latentmem
        from latentmem.serve.engine.service import Service, quarter
        from latentmem.store.home import TIMEOUT, home

        cache_bytes = quarter(torch.device("cpu")) if self.cache_bytes is None else self.cache_bytes
        store = latentmem.Store(self.store or home() / "store", cache_bytes=cache_bytes, timeout=TIMEOUT)
        adapters = base.pair(self.adapters)
        llm = latentmem.load(model, device=self.device, quantize=self.quantize, adapters=adapters)
        return Service(llm, store, sizes)


@app.command(rich_help_panel=PANEL)
@options.expanded
@sized
def serve(
    model: Model = base.PACKAGED,
    host: Annotated[str, typer.Option(help="Address; one that others can reach needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")] = 8000,
    *,
    sizes: Sizes,
    limits: Limits,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that running requests get when the server ends.")] = 30,
    loading: Loading,
) -> None:
    """Serve memories over HTTP, with OpenAI's interface and their own; SIGTERM or Ctrl-C ends the server."""
    _require("serve", "fastapi", "uvicorn", "prometheus_client", "python_multipart")
    from latentmem.serve.http.address import bound, is_loopback

    known = _keys(required=not is_loopback(host))
    if not is_loopback(host) and not known.all():
        raise ValueError(
            f"without a key the server may be reached from this machine only, and --host {host} is open to others. "
            f"Make one first: `latentmem keys add NAME --memories 'NAME'`, or leave --host out."
        )
    at = bound(host, port)
    base.check_model(model, loading.adapters)
    from latentmem.serve.http.app import create_app
    from latentmem.serve.http.run import serve as run

    url = f"http://{f'[{host}]' if ':' in host else host}:{at.getsockname()[1]}"

    def make() -> tuple[FastAPI, Service]:
        service = loading.service(model, sizes)
        return create_app(service, known, limits), service

    run(make, at, grace=grace, on_ready=lambda app: _print_address(app.state.latentmem.model, url, known.required))


def _print_address(model: str, url: str, with_key: bool) -> None:
    """Where the model answers, and how to ask it."""
    printing.error(f"{model} answers at {url}; open it in a browser, or ask it, for example:")
    key = " -H 'Authorization: Bearer lm-...'" if with_key else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    typer.echo(f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'", err=True)


@app.command(rich_help_panel=PANEL)
@options.expanded
def mcp(model: Model = base.PACKAGED, *, loading: Loading) -> None:
    """Serve memories as tools of the Model Context Protocol, over standard input and output."""
    _require("mcp", "mcp")
    base.check_model(model, loading.adapters)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the protocol alone
        from latentmem.serve.mcp import create_server

        service = loading.service(model)
        service.start()
    try:
        create_server(service).run()
    finally:
        service.close()


@keys.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the key, for lists and logs.")],
    memories: Annotated[str, typer.Option(help="Memories that the key opens: names and patterns, 'alice,team-*'.")],
    read_only: Annotated[bool, typer.Option("--read-only", help="The key may ask, and change nothing.")] = False,
) -> None:
    """Make a key and print it, once."""
    secret = _keys().add(name, [one.strip() for one in memories.split(",") if one.strip()], read_only=read_only)
    printing.error(f"the key {name!r}; it is kept nowhere, only its hash:")
    typer.echo(secret)


@keys.command("list")
def list_() -> None:
    """List all keys: their names, memories and rights."""
    known = _keys().all()
    if not known:
        typer.echo("No keys yet. `latentmem keys add NAME --memories 'NAME'` makes one.")
        return
    table = printing.table("key", "memories", "rights")
    for key in known:
        table.add_row(printing.text(key.name), printing.text(", ".join(key.memories)), ", ".join(key.rights))
    printing.show(table)


@keys.command()
def remove(name: Annotated[str, typer.Argument(help="Name of the key.")]) -> None:
    """Remove a key, at once."""
    _keys().remove(name)
    typer.echo(f"{name}: removed")


def _keys(required: bool = False) -> Keys:
    from latentmem.serve.http.keys import FILE, Keys
    from latentmem.store.home import home

    return Keys(home() / FILE, required=required)


def _require(extra: str, *modules: str) -> None:
    """Refuse a command whose packages are missing, and say how to install them."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"`latentmem {extra}` needs {', '.join(missing)}: run `pip install 'latentmem[{extra}]'`.")
