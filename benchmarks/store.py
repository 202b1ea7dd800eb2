"""What a store costs: bytes per write and per version, and the times of open, write, rollback and fork.

    python benchmarks/store.py
    python benchmarks/store.py --model smollm2-135m --memories 20

Every time stands beside something plain on the same disk: a write beside the same write without a store, what is put on
disk beside a flushed file of as many bytes, what is read beside `torch.load` of the same tensors. Then memories are
opened in turn under a byte budget of a tenth of their size. Give `--folder` on the disk that is meant.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

import latentmem
from latentmem.core.memory import Memory
from latentmem.model.model import MemoryModel
from latentmem.store import Store
from latentmem.testing import byte_tokenizer, tiny_model, updated


def timed(runs: int, *ways: Callable[[], object]) -> list[float]:
    """Median seconds of each way, taken in turns."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(runs):
        for way, found in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def flushed(path: Path, count: int) -> Callable[[], None]:
    """A function that writes a file of `count` bytes and flushes it."""
    data = os.urandom(count)

    def write() -> None:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return write


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:  # noqa: PTH123 - no regular file
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def full(llm: MemoryModel, seed: int) -> Memory:
    """A memory that is full of random slots: what stands in it does not matter here."""
    memory = llm.empty(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    while memory.N > memory.M:
        new = torch.randn(memory.L, memory.K, memory.d, generator=generator).to(memory.slots)
        memory = updated(memory, new, source="random", tokens=memory.K)
    return memory


def row(what: str, seconds: float, plain: str, plain_seconds: float) -> None:
    print(f"| {what} | {seconds * 1e3:.1f} | {plain} | {plain_seconds * 1e3:.1f} | {seconds / plain_seconds:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny (random weights), or what `latentmem.load` takes")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--writes", type=int, default=32, help="of which bytes are counted")
    parser.add_argument("--memories", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where the store is made; by default the temporary folder")
    args = parser.parse_args()
    if args.model == "tiny":
        llm = MemoryModel(tiny_model(max_position_embeddings=8192), byte_tokenizer(), name="tiny")
    else:
        llm = latentmem.load(args.model, dtype=torch.float32)
    memory = full(llm, 0)
    options = f"--model {args.model} --runs {args.runs} --writes {args.writes} --memories {args.memories}"
    print(f"`python benchmarks/store.py {options}`, {date.today()},")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory.slots.dtype},")
    print(f"L {memory.L}, d {memory.d}, N {memory.N}, K {memory.K}: {memory.slots.nbytes / 1e6:.2f} MB of slots\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        budget(memory, Path(folder), args.memories)  # first: later freed memory would hide what it takes
        sizes(llm, memory, Path(folder), args.writes)
        times(llm, memory, Path(folder), args.runs)


def sizes(llm: MemoryModel, memory: Memory, folder: Path, count: int) -> None:
    """Bytes of versions, by the length of the text."""
    print(f"| a write of | delta | snapshot | a version, mean of {count} | in the database | delta / slots it adds |")
    print("|" + " --- |" * 6)
    for n in (16, memory.K):
        store = Store(folder / f"sizes {n}")
        store.create("m", memory)
        for i in range(count):
            store.write(llm, "m", [4 + (i + j) % 200 for j in range(n)], f"source {i}")
        written = [version.bytes for version in store.history("m")[1:]]
        store.close()
        database = (folder / f"sizes {n}" / "store.db").stat().st_size / count
        slots = n * memory.L * memory.d * memory.slots.element_size()
        low, high = min(written), max(written)
        cells = (low, high, statistics.mean(written) + database, database)
        print(f"| {n} tokens | {' | '.join(f'{cell / 1e3:.1f} kB' for cell in cells)} | {low / slots:.2f} |")
    print()


def times(llm: MemoryModel, memory: Memory, folder: Path, runs: int) -> None:
    """Times beside plain ones."""
    print("| what | ms | beside | ms | ratio |")
    print("|" + " --- |" * 5)
    ids = [4 + i % 200 for i in range(memory.K)]
    store = Store(folder / "times", snapshot_every=10**6)
    store.create("m", memory)
    store.write(llm, "m", ids)
    delta = store.history("m")[-1].bytes
    live = [store.open("m")]

    def write_live() -> None:
        live[0] = llm.write_ids(live[0], ids)

    def write_stored() -> None:
        store.write(llm, "m", ids)

    put = flushed(folder / "plain", delta)
    stored, alone, plain = timed(runs, write_stored, write_live, put)
    row(f"write of {memory.K} tokens", stored, "the same without a store", alone)
    row("of it for the store", stored - alone, f"a flushed file of its {delta / 1e3:.0f} kB", plain)
    small = flushed(folder / "small", 4096)
    acknowledged, plain = timed(runs, lambda: store.append("m", ids), small)
    row("append (acknowledged, not applied)", acknowledged, "a flushed file of 4 kB", plain)
    store.close()

    store = Store(folder / "read")
    store.create("m", memory)
    for _ in range(15):
        store.write(llm, "m", ids)
    torch.save({"slots": memory.slots, "births": memory.births, "origins": memory.origins}, folder / "plain.pt")

    def cold(version: int) -> None:
        opened = Store(folder / "read")
        opened.open("m", version)
        opened.close()

    first, last, cached, plain = timed(
        runs, lambda: cold(0), lambda: cold(15), lambda: store.open("m"), lambda: torch.load(folder / "plain.pt")
    )
    row("open, cold, a snapshot", first, "`torch.load` of the same tensors", plain)
    row("open, cold, a snapshot and 15 deltas", last, "the same", plain)
    row("open, cached", cached, "the same", plain)
    count = iter(range(10**6))
    fork, rollback, plain = timed(
        runs, lambda: store.fork("m", f"f{next(count)}"), lambda: store.rollback("m", 3), small
    )
    row("fork", fork, "a flushed file of 4 kB", plain)
    row("rollback", rollback, "the same", plain)
    store.close()


def budget(memory: Memory, folder: Path, count: int) -> None:
    """Memories opened in turn under a byte budget."""
    size = sum(t.nbytes for t in (memory.slots, memory.births, memory.origins))
    allowed = size * max(2, count // 10)
    store = Store(folder / "many", cache_bytes=allowed)
    for i in range(count):
        store.create(f"m{i}", replace(memory, slots=memory.slots + i))
    store.close()
    before = resident()
    store = Store(folder / "many", cache_bytes=allowed)
    start, most = time.perf_counter(), 0
    for i in range(count):
        opened = store.open(f"m{i}")
        assert opened.slots[0, 0, 0] == memory.slots[0, 0, 0] + i
        most = max(most, resident() - before)
    seconds = (time.perf_counter() - start) / count
    print(
        f"{count} memories of {size / 1e6:.1f} MB opened in turn under {allowed / 1e6:.0f} MB: "
        f"{seconds * 1e3:.1f} ms each, {most / 1e6:.0f} MB more in memory at most, {most / allowed:.2f} of the budget\n"
    )


if __name__ == "__main__":
    main()
