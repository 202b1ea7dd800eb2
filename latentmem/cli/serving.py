"""Memories for other programs: serve, mcp, keys."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentmem.cli import base
from latentmem.cli.base import Adapters, Device, ServedQuantize, app

if TYPE_CHECKING:
    from fastapi import FastAPI

    from latentmem.serve.engine.service import Service
    from latentmem.serve.http.keys import Keys

PANEL = "Serving"
keys = typer.Typer(help="Keys for `latentmem serve`: who may read and write which memories.", no_args_is_help=True)
app.add_typer(keys, name="keys", rich_help_panel=PANEL)

Model = Annotated[str, typer.Argument(help="smollm2-135m, a folder, a .gguf file or a hub id.")]
StorePath = Annotated[Path | None, typer.Option("--store", help="A store; by default that of the command line.")]
Batch = Annotated[int, typer.Option(min=1, help="Answers that are made together.")]
Waiting = Annotated[int, typer.Option(min=1, help="Questions that may wait or run; more are refused with 429.")]
Changes = Annotated[int, typer.Option(min=1, help="Writes and other changes that may wait.")]
CacheBytes = Annotated[
    int | None,
    typer.Option(min=0, help="Memories that were opened are kept up to this size; by default a quarter of the RAM."),
]


@app.command(rich_help_panel=PANEL)
def serve(
    model: Model = base.PACKAGED,
    host: Annotated[str, typer.Option(help="Address; other than this machine's own only with keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    store: StorePath = None,
    batch: Batch = 32,
    waiting: Waiting = 256,
    changes: Changes = 256,
    cache_bytes: CacheBytes = None,
    prefix_bytes: Annotated[
        int | None, typer.Option(min=0, help="Their keys and values on the device; by default a quarter of it.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request.")] = 4 << 20,
    max_upload: Annotated[int, typer.Option(min=1024, help="Bytes of a memory that is imported.")] = 1 << 30,
    max_text: Annotated[int, typer.Option(min=1, help="Characters of text in a request.")] = 1_000_000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for, in tokens.")] = 4096,
    max_n: Annotated[int, typer.Option("--max-n", min=1, help="Answers to one request.")] = 8,
    seconds: Annotated[float, typer.Option(min=1, help="Until a request is given up.")] = 300,
    grace: Annotated[int, typer.Option(min=0, help="Seconds for requests that run when the server ends.")] = 30,
    quantize: ServedQuantize = None,
    adapters: Adapters = "auto",
    device: Device = None,
) -> None:
    """Serve memories over HTTP, with OpenAI's interface and their own; SIGTERM or Ctrl-C ends it."""
    _needs("serve", "fastapi", "uvicorn", "prometheus_client", "python_multipart")
    from latentmem.serve.http.app import Limits, create_app
    from latentmem.serve.http.run import bound, is_loopback
    from latentmem.serve.http.run import serve as run

    known = _keys(required=not is_loopback(host))
    if not is_loopback(host) and not known.all():
        raise ValueError(
            f"without a key the server may be reached from this machine only, and --host {host} is open to others. "
            f"Make one first: `latentmem keys add NAME --memories 'NAME'`, or leave --host out."
        )
    at = bound(host, port)
    limits = Limits(body=max_body, upload=max_upload, text=max_text, n=max_n, max_tokens=max_tokens, seconds=seconds)
    where = f"[{host}]" if ":" in host else host
    url = f"http://{where}:{at.getsockname()[1]}"

    def make() -> tuple[FastAPI, Service]:
        sizes = {"batch": batch, "waiting": waiting, "changes": changes, "prefix_bytes": prefix_bytes}
        service = _service(model, store, cache_bytes, device, quantize, adapters, **sizes)
        return create_app(service, known, limits), service

    def show_address(app: FastAPI) -> None:
        name = app.state.latentmem.model
        needs = " -H 'Authorization: Bearer lm-...'" if known.required else ""
        base.error(f"{name} answers at {url}; open it in a browser, or ask it, for example:")
        body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        typer.echo(f"curl {url}/v1/chat/completions{needs} -H 'Content-Type: application/json' -d '{body}'", err=True)

    run(make, at, grace=grace, on_ready=show_address)


@app.command(rich_help_panel=PANEL)
def mcp(
    model: Model = base.PACKAGED,
    store: StorePath = None,
    cache_bytes: CacheBytes = None,
    quantize: ServedQuantize = None,
    adapters: Adapters = "auto",
    device: Device = None,
) -> None:
    """Serve memories as tools of the Model Context Protocol, over standard input and output."""
    _needs("mcp", "mcp")
    with contextlib.redirect_stdout(sys.stderr):  # nothing but the protocol is said there
        from latentmem.serve.mcp import create_server

        service = _service(model, store, cache_bytes, device, quantize, adapters)
        service.start()
    try:
        create_server(service).run()
    finally:
        service.close()


@keys.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the key, for lists and logs.")],
    memories: Annotated[str, typer.Option(help="Memories that it may touch: names and patterns, 'alice,team-*'.")],
    read_only: Annotated[bool, typer.Option("--read-only", help="It may ask, and change nothing.")] = False,
) -> None:
    """Make a key and print it, once."""
    given = _keys().add(name, [one.strip() for one in memories.split(",") if one.strip()], read_only=read_only)
    base.error(f"the key {name!r}; it is kept nowhere, only its hash:")
    typer.echo(given)


@keys.command("list")
def list_() -> None:
    """List all keys: their names, memories and rights."""
    known = _keys().all()
    if not known:
        typer.echo("No keys yet. `latentmem keys add NAME --memories 'NAME'` makes one.")
        return
    table = base.table("key", "memories", "rights")
    for key in known:
        table.add_row(base.text(key.name), base.text(", ".join(key.memories)), ", ".join(key.rights))
    base.show(table)


@keys.command()
def remove(name: Annotated[str, typer.Argument(help="Name of the key.")]) -> None:
    """Take a key away, at once."""
    _keys().remove(name)
    typer.echo(f"{name}: removed")


def _keys(required: bool = False) -> Keys:
    from latentmem.serve.http.keys import FILE, Keys
    from latentmem.store import home as files

    return Keys(files.home() / FILE, required=required)


def _service(
    model: str,
    path: Path | None,
    cache_bytes: int | None,
    device: str | None,
    quantize: str | None,
    adapters: str,
    **sizes: Any,
) -> Service:
    """A service over the store of the command line, or another."""
    import torch

    import latentmem
    from latentmem.serve.engine.service import Service, quarter
    from latentmem.store import home as files

    cache_bytes = quarter(torch.device("cpu")) if cache_bytes is None else cache_bytes
    store = latentmem.Store(path or files.home() / "store", cache_bytes=cache_bytes, timeout=files.TIMEOUT)
    llm = latentmem.load(model, device=device, quantize=quantize, adapters=base.pair(adapters))
    return Service(llm, store, **sizes)


def _needs(extra: str, *modules: str) -> None:
    """A ValueError that says how to install what is missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(
            f"`latentmem {extra}` needs {', '.join(missing)}: "
            f"pip install -c constraints.txt '.[{extra}]' in latentmem's folder."
        )
