"""An agent with memory tools: what any client of the Model Context Protocol does, by hand.

The client starts `latentmem mcp` and talks to it over standard input and output. `pip install 'latentmem[mcp]'`.
"""

# %%
import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

SERVER = StdioServerParameters(command="latentmem", args=["mcp"], env=dict(os.environ))
CALLS = (
    ("memory_write", {"text": "The bell of the chapel was cast in Ghent.", "source": "bell"}),
    ("memory_write", {"text": "The captain of the ferry is Mira Okafor.", "source": "ferry"}),
    ("memory_ask", {"question": "Who is the captain of the ferry?"}),
    ("memory_forget", {"source": "ferry"}),
    ("memory_stats", {}),
)


async def main():
    """List the tools, then call them as an agent would."""
    async with Client(stdio_client(SERVER)) as client:
        print("tools:", ", ".join(tool.name for tool in (await client.list_tools()).tools))
        for tool, arguments in CALLS:
            result = await client.call_tool(tool, {"memory_id": "agent", **arguments})
            print(tool, arguments, "->", result.structured_content or result.content[0].text)


# %% In a thread of its own, because a notebook has a loop already.
with ThreadPoolExecutor() as pool:
    pool.submit(asyncio.run, main()).result()
