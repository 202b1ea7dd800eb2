"""Memories as tools of the Model Context Protocol, for one user, over standard input and output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from latentmem.errors import NotFoundError
from latentmem.longterm import losses
from latentmem.serve.engine.answer import Sampling
from latentmem.serve.engine.service import BusyError, Service
from latentmem.store import Store, check_name
from latentmem.store.views import nothing_known
from latentmem.store.writing import WritingModel
from latentmem.version import __version__

Facts = dict[str, object]
INSTRUCTIONS = (
    "Long-term memories by name. Write what is worth remembering as short plain sentences, and ask in plain words; a "
    "memory that is full forgets old things little by little."
)


def create_server(service: Service) -> MCPServer:
    """The tools; `run()` serves them. Whoever makes the service starts and closes it."""
    server = MCPServer("latentmem", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING")
    tools = _Tools(service)
    for tool in (tools.memory_write, tools.memory_ask, tools.memory_stats, tools.memory_forget):
        server.tool()(_errors_to_client(tool))
    return server


class _Tools:
    """One method for each tool: its name, docstring and arguments are what the client sees."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def memory_write(self, memory_id: str, text: str, source: str = "text") -> Facts:
        """Write a text into a memory; the memory is made if it is not there.

        `source` is a name under which the text can be forgotten later. `lost` says what the write dropped for good.
        """
        check_name(memory_id)
        if memory_id not in self._service.store:
            self._service.create(memory_id, exist_ok=True).result()
        version = self._service.write(memory_id, text, source).done.result()
        facts: Facts = {"version": version.version, "source": source, "tokens": version.tokens}
        facts |= {"slots": version.facts.get("M"), "capacity": version.facts.get("N")}
        if slots := version.facts.get("lost"):
            facts["lost"] = losses.sentence(self._service.store.latest(memory_id)[1], slots, memory_id)
        return {"memory_id": memory_id, **facts}

    def memory_ask(self, memory_id: str, question: str) -> Facts:
        """Answer a question with what a memory holds."""
        check_name(memory_id)
        answer = self._service.ask(memory_id, question, Sampling())
        text = "".join(piece.text for piece in answer).strip()
        facts: Facts = {"memory_id": memory_id, "version": answer.version, "answer": text}
        return facts | ({"notice": f"{nothing_known(memory_id)} The model answered by itself."} if answer.empty else {})

    def memory_stats(self, memory_id: str) -> Facts:
        """How full a memory is, its sources, and how much of each is left."""

        def read(store: Store, llm: WritingModel) -> Facts:
            version = store.apply(llm, memory_id)
            memory = store.account(memory_id, version)
            stats = store.stats_of(memory_id, memory)
            sources = [asdict(one) | {"expires": one.expires and one.expires.isoformat()} for one in stats]
            sizes = {"slots": memory.M, "capacity": memory.N}
            return {"memory_id": memory_id, "version": version, **sizes, "sources": sources}

        check_name(memory_id)
        return self._service.change(read).result()

    def memory_forget(self, memory_id: str, source: str) -> Facts:
        """Drop what is left of a source from a memory. Older versions of the memory keep it."""

        def forget(store: Store, llm: WritingModel) -> Facts:
            store.apply(llm, memory_id)
            return {"memory_id": memory_id, "version": store.forget(memory_id, source), "forgotten": source}

        check_name(memory_id)
        return self._service.change(forget).result()


def _errors_to_client(tool: Callable[..., Facts]) -> Callable[..., Facts]:
    """Tell the client what was wrong with a call."""

    @functools.wraps(tool)
    def call(*args: object, **kwargs: object) -> Facts:
        try:
            return tool(*args, **kwargs)
        except NotFoundError as error:
            raise ToolError(f"{error.public} memory_write makes one.") from error
        except (ValueError, BusyError) as error:
            raise ToolError(str(error)) from error

    return call
