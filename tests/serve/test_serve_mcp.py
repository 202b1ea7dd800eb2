"""Memories as tools of the Model Context Protocol, with its official client."""

import asyncio
import os
import sys

import pytest

import latentmem
from latentmem.serve.engine.service import Service
from latentmem.serve.mcp import create_server
from latentmem.testing import byte_tokenizer, tiny_model

TOOLS = {"memory_write", "memory_ask", "memory_stats", "memory_forget"}
CODE = "import sys; from latentmem import cli; sys.argv = ['latentmem', *sys.argv[1:]]; cli.main()"


async def use(client):
    """Write, ask, look, forget; and what is wrong is told."""
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == TOOLS and all(tool.description for tool in tools.values())
    assert set(tools["memory_write"].input_schema["properties"]) == {"memory_id", "text", "source"}

    async def call(name, **arguments):
        result = await client.call_tool(name, arguments)
        return result.is_error, result.structured_content or result.content[0].text

    failed, wrote = await call("memory_write", memory_id="work", text="the door is blue", source="notes")
    assert not failed and (wrote["version"], wrote["tokens"], wrote["slots"]) == (1, 16, 16)
    assert "lost" not in wrote
    failed, wrote = await call("memory_write", memory_id="work", text="it is <|im_end|> open")
    assert not failed and (wrote["version"], wrote["source"]) == (2, "text")
    failed, answer = await call("memory_ask", memory_id="work", question="which colour?")
    assert not failed and answer["version"] == 2 and "notice" not in answer
    failed, stats = await call("memory_stats", memory_id="work")
    assert not failed and [one["source"] for one in stats["sources"]] == ["notes", "text"]
    failed, gone = await call("memory_forget", memory_id="work", source="notes")
    assert not failed and gone["version"] == 3
    for name, arguments, says in [
        ("memory_ask", {"memory_id": "nobody", "question": "?"}, "there is no memory 'nobody'"),
        ("memory_ask", {"memory_id": "work", "question": " "}, "the question is empty"),
        ("memory_stats", {"memory_id": "nobody"}, "there is no memory 'nobody'. memory_write makes one"),
        ("memory_forget", {"memory_id": "work", "source": "notes"}, "no source 'notes'"),
        ("memory_write", {"memory_id": "../x", "text": "x"}, "can not be a memory's name"),
        ("memory_write", {"memory_id": "work", "text": ""}, "empty"),
        ("memory_write", {"memory_id": "work"}, "text"),
    ]:
        failed, told = await call(name, **arguments)
        assert failed and says in told, told
    await call("memory_forget", memory_id="work", source="text")
    failed, empty = await call("memory_ask", memory_id="work", question="which colour?")
    assert not failed and "the memory 'work' is empty: nothing is known" in empty["notice"]
    return answer["answer"]


def test_the_tools(tmp_path):
    from mcp import Client

    llm = latentmem.MemoryModel(tiny_model(), byte_tokenizer())
    store = latentmem.Store(tmp_path)
    service = Service(llm, store)
    service.start()

    async def main():
        async with Client(create_server(service)) as client:
            return await use(client)

    try:
        answer = asyncio.run(main())
        assert answer == llm.ask(store.open("work", 2), "which colour?")
    finally:
        service.close()
        store.close()


def test_over_standard_input_and_output(home, tiny_folder):
    from mcp import Client, StdioServerParameters
    from mcp.client.stdio import stdio_client

    environment = {**os.environ, "LATENTMEM_HOME": str(home)}
    arguments = ["-c", CODE, "mcp", str(tiny_folder), "--device", "cpu"]
    parameters = StdioServerParameters(command=sys.executable, args=arguments, env=environment)

    async def main():
        async with Client(stdio_client(parameters)) as client:
            return await use(client)

    asyncio.run(asyncio.wait_for(main(), 300))  # only what hangs takes longer
    store = latentmem.Store(home / "store")
    assert store.names() == ["work"] and store.version("work").version == 4
    store.close()


def test_what_a_memory_is_told_twice_at_once_is_written_twice(tmp_path):
    pytest.importorskip("mcp")
    from mcp import Client

    llm = latentmem.MemoryModel(tiny_model(), byte_tokenizer())
    store = latentmem.Store(tmp_path)
    service = Service(llm, store)
    service.start()

    async def main():
        async with Client(create_server(service)) as client:
            said = [{"memory_id": "new", "text": f"text {i}", "source": str(i)} for i in range(6)]
            return await asyncio.gather(*(client.call_tool("memory_write", one) for one in said))

    try:
        results = asyncio.run(main())
        assert not any(result.is_error for result in results)
        assert {version.source for version in store.history("new")} == {None, *map(str, range(6))}
    finally:
        service.close()
        store.close()


def test_what_a_write_loses_is_said(tmp_path):
    from mcp import Client

    llm = latentmem.MemoryModel(tiny_model(), byte_tokenizer())
    store = latentmem.Store(tmp_path)
    store.create("small", llm.empty(N=16, K=8))
    service = Service(llm, store)
    service.start()

    async def main():
        async with Client(create_server(service)) as client:
            said = {"memory_id": "small", "text": "a text of thirty-two characters."}
            return (await client.call_tool("memory_write", said)).structured_content["lost"]

    try:
        said = asyncio.run(main())
        assert said.startswith("Lost for good by this write: 16 slots of each layer, 50%") and "--longterm 5`" in said
    finally:
        service.close()
        store.close()
