"""A server under load: what it can do at most, and what 50 clients get when they ask for more.

    python benchmarks/serve.py
    python benchmarks/serve.py --clients 50 --minutes 10 --level 20

Every client has a memory of its own: the start of docs/concepts/paper.md and a secret. It asks for the secret, and
every tenth time writes a line instead; its answer is right if it holds its own secret, and wrong in the worst way if it
holds another's. First the load rises until no more is answered (the peak); then all clients go on for the given time
without a pause, where the server refuses what does not fit (429, and they wait as long as it says). Last, the peer: the
same questions without a memory, the text in each prompt, as any server answers them.
"""

import argparse
import asyncio
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import httpx

TEXT = Path(__file__).parent.parent / "docs" / "concepts" / "paper.md"
QUESTION = "What is the secret code?"
LATE = 60.0  # seconds after which an answer comes too late


@dataclass
class Counts:
    """What happened in one phase."""

    seconds: float = 0.0
    asks: list[float] = field(default_factory=list)  # seconds of each
    writes: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0
    faults: set[str] = field(default_factory=set)
    own: int = 0
    others: int = 0

    @property
    def done(self) -> int:
        return len(self.asks) + len(self.writes)

    @property
    def late(self) -> int:
        return sum(seconds > LATE for seconds in (*self.asks, *self.writes))

    @property
    def rate(self) -> float:
        return self.done / self.seconds

    def row(self, name: str) -> str:
        offered = (self.done + self.refused + self.failed) / self.seconds
        share = self.refused / max(1, self.refused + self.done)
        times = [_at(some, q) for some in (self.asks, self.writes) for q in (0.5, 0.95)]
        found = f"{self.own}/{len(self.asks)}"
        return (
            f"| {name} | {offered:.2f} | {self.rate:.2f} | {self.late} | {share:.0%} | {' | '.join(times)} | {found} "
            f"| {self.others} | {self.failed} |"
        )


COLUMNS = (
    "load",
    "offered/s",
    "answered/s",
    f"after {LATE:.0f} s",
    "429",
    *("ask p50", "p95", "write p50", "p95"),
    *("own secret", "another's", "failed"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def _at(some: list[float], q: float) -> str:
    return f"{sorted(some)[min(len(some) - 1, int(q * len(some)))]:.2f} s" if some else "-"


class Client:
    """One user of the server.

    Args:
        codes: the secrets of all clients; its own is `codes[number]`.
    """

    def __init__(self, http: httpx.AsyncClient, number: int, codes: list[int], text: str) -> None:
        self.http, self.number, self.codes, self.text = http, number, codes, text
        self.name, self.steps, self.random = f"user-{number}", 0, random.Random(number)

    @property
    def secret(self) -> str:
        return f"The secret code is {self.codes[self.number]}."

    async def begin(self) -> None:
        for path, body in (
            ("", {"id": self.name, "seed": self.number}),
            (f"/{self.name}/write", {"text": self.text, "source": "paper"}),
            (f"/{self.name}/write", {"text": self.secret, "source": "secret"}),
        ):
            while (response := await self.http.post(f"/v1/memories{path}", json=body)).status_code == 429:
                await asyncio.sleep(int(response.headers["retry-after"]))
            response.raise_for_status()

    async def step(self, counts: Counts) -> None:
        self.steps += 1
        if self.steps % 10 == 0:
            line = f"On day {self.steps} the visitor took train {self.random.randrange(10_000)}."
            await self._post(counts, counts.writes, f"/v1/memories/{self.name}/write", {"text": line, "source": "log"})
        else:
            body = {"question": QUESTION, "max_tokens": 12}
            await self._post(counts, counts.asks, f"/v1/memories/{self.name}/ask", body)

    async def plain(self, counts: Counts) -> None:
        """The same question with the text in the prompt."""
        messages = [{"role": "user", "content": f"{self.text}\n\n{self.secret}\n\n{QUESTION}"}]
        body = {"model": "smollm2-135m", "messages": messages, "max_tokens": 12}
        await self._post(counts, counts.asks, "/v1/chat/completions", body)

    async def _post(self, counts: Counts, times: list[float], path: str, body: dict) -> None:
        start = time.monotonic()
        try:
            response = await self.http.post(path, json=body)
        except httpx.HTTPError as error:
            counts.failed += 1
            counts.faults.add(repr(error))
            return
        if response.status_code == 429:
            counts.refused += 1
            await asyncio.sleep(int(response.headers["retry-after"]))
        elif response.status_code != 200:
            counts.failed += 1
            counts.faults.add(f"{response.status_code} {response.text[:200]}")
        else:
            times.append(time.monotonic() - start)
            if times is counts.asks:
                found = {i for i, code in enumerate(self.codes) if str(code) in response.text}
                counts.own += self.number in found
                counts.others += bool(found - {self.number})


async def phase(step: Callable[[Client, Counts], Awaitable[None]], clients: list[Client], seconds: float) -> Counts:
    """Let each client go on without a pause for some time; what has begun is finished."""
    counts, start = Counts(), time.monotonic()

    async def go(client: Client) -> None:
        while time.monotonic() - start < seconds:
            await step(client, counts)

    await asyncio.gather(*(go(client) for client in clients))
    counts.seconds = time.monotonic() - start
    for fault in sorted(counts.faults):
        print(fault, file=sys.stderr)
    return counts


async def measure(url: str, options: argparse.Namespace) -> None:
    draw = random.Random(1)
    codes = draw.sample(range(1000, 10000), options.clients)
    text = TEXT.read_text(encoding="utf-8")[: options.characters]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        clients = [Client(http, i, codes, text) for i in range(options.clients)]
        start = time.monotonic()
        await asyncio.gather(*(client.begin() for client in clients))
        print(f"{len(clients)} memories made in {time.monotonic() - start:.0f} s", flush=True)
        print(HEAD, flush=True)
        peak = 0.0
        for count in (1, 4, 8, 16, 32, options.clients):
            found = await phase(Client.step, clients[:count], options.level)
            peak = max(peak, found.rate)
            print(found.row(f"{count} clients"), flush=True)
        long = await phase(Client.step, clients, 60 * options.minutes)
        print(long.row(f"{len(clients)} clients, {options.minutes:g} minutes"), flush=True)
        for count in (1, options.clients):
            plain = await phase(Client.plain, clients[:count], options.level * (1 if count == 1 else 3))
            print(plain.row(f"text in the prompt, {count} clients"), flush=True)
        print(f"answered under load: {long.rate / peak:.0%} of the peak of {peak:.2f}/s")
        print(f"memories answered {long.rate / plain.rate:.1f} times as much as with the text in each prompt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--level", type=float, default=20, help="seconds of each load on the way to the peak")
    parser.add_argument("--waiting", type=int, default=32, help="questions that may wait or run")
    parser.add_argument("--characters", type=int, default=2400, help="of the text in each memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        command = [
            "-c",
            "from latentmem.cli import main; main()",
            "serve",
            options.model,
            "--port",
            "0",
            "--waiting",
            str(options.waiting),
        ]
        with subprocess.Popen(
            [sys.executable, *command], env=os.environ | {"LATENTMEM_HOME": home}, stderr=subprocess.PIPE, text=True
        ) as server:
            assert server.stderr is not None
            line = next(line for line in server.stderr if "answers at http" in line)
            url = line.split("answers at ")[1].split(";")[0]
            threading.Thread(target=server.stderr.read, daemon=True).start()  # its log is not needed
            print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {options.model}, ", end="")
            print(f"a text of {options.characters} characters, at most {options.waiting} wait or run", flush=True)
            try:
                asyncio.run(measure(url, options))
            finally:
                server.terminate()
                server.wait(60)


if __name__ == "__main__":
    main()
