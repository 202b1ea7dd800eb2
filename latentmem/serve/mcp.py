"""Memories as tools of the Model Context Protocol, for one user, over standard input and output."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import asdict

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from latentmem.model.model import MemoryModel
from latentmem.serve.engine.engine import Sampling
from latentmem.serve.engine.service import Busy, Missing, Service, Taken
from latentmem.store import Store, check_name
from latentmem.version import __version__

Facts = dict[str, object]
INSTRUCTIONS = (
    "Long-term memories by name. Write what is worth remembering as short plain sentences, and ask in plain words; a "
    "memory that is full forgets old things little by little."
)


def create_server(service: Service, sampling: Sampling | None = None) -> MCPServer:
    """The tools; `run()` serves them.

    Args:
        service: what does the work; whoever makes it starts and closes it.
        sampling: how answers are made.
    """
    server = MCPServer("latentmem", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING")

    @server.tool()
    @_told
    def memory_write(memory_id: str, text: str, source: str = "text") -> Facts:
        """Write a text into a memory; the memory is made if it is not there.

        `source` is a name under which the text can be forgotten later.
        """
        check_name(memory_id)
        if memory_id not in service.store:
            with contextlib.suppress(Taken):  # by somebody else meanwhile
                service.create(memory_id).result()
        done = service.write(memory_id, text, source).done.result()
        sizes = {"slots": done.made.get("M"), "capacity": done.made.get("N")}
        return {"memory_id": memory_id, "version": done.version, "source": source, "tokens": done.tokens, **sizes}

    @server.tool()
    @_told
    def memory_ask(memory_id: str, question: str) -> Facts:
        """Answer a question with what a memory holds."""
        check_name(memory_id)
        reading = service.ask(memory_id, question, sampling or Sampling())
        answer = "".join(piece.text for piece in reading).strip()
        return {"memory_id": memory_id, "version": reading.version, "answer": answer}

    @server.tool()
    @_told
    def memory_stats(memory_id: str) -> Facts:
        """How full a memory is, its sources, and how much of each is left."""

        def found(store: Store, llm: MemoryModel) -> Facts:
            _there(store, memory_id)
            version = store.apply(llm, memory_id)
            memory, sources = store.open(memory_id, version), store.stats(memory_id, version=version)
            told = [asdict(one) | {"expires": one.expires and one.expires.isoformat()} for one in sources]
            sizes = {"slots": memory.M, "capacity": memory.N}
            return {"memory_id": memory_id, "version": version, **sizes, "sources": told}

        return service.change(found).result()

    @server.tool()
    @_told
    def memory_forget(memory_id: str, source: str) -> Facts:
        """Drop what is left of a source from a memory. Older versions of the memory keep it."""

        def forgotten(store: Store, llm: MemoryModel) -> Facts:
            _there(store, memory_id)
            store.apply(llm, memory_id)
            return {"memory_id": memory_id, "version": store.forget(memory_id, source), "forgotten": source}

        return service.change(forgotten).result()

    return server


def _there(store: Store, name: str) -> None:
    check_name(name)
    if name not in store:
        raise Missing(f"there is no memory {name!r}; memory_write makes one.")


def _told(tool: Callable[..., Facts]) -> Callable[..., Facts]:
    """Tell the client what was wrong with a call."""

    @functools.wraps(tool)
    def telling(*args: object, **kwargs: object) -> Facts:
        try:
            return tool(*args, **kwargs)
        except (ValueError, Busy, Missing) as error:
            raise ToolError(str(error)) from error

    return telling
