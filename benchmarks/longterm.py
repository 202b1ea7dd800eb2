"""What a long-term memory costs: time to write, time to the first token of an answer, bytes, by the slots stored.

    python benchmarks/longterm.py
    python benchmarks/longterm.py --stored 1000 10000 --dtype bfloat16

Slots are random: what stands in them does not matter here. Everything stands beside a memory without a long-term part
that shows an answer as many slots, N + R, and beside a copy of as many bytes as a search has to read.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date

import torch

import latentmem
from latentmem import longterm
from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings
from latentmem.decoder.adapters import READ
from latentmem.longterm import blocks
from latentmem.longterm.blocks import StoredSlots
from latentmem.model.model import MemoryModel
from latentmem.testing import updated


def timed(runs: int, *ways: Callable[[], object]) -> list[float]:
    """Median seconds of each way, taken in turns, after one that does not count."""
    seconds: list[list[float]] = [[] for _ in ways]
    for run in range(runs + 1):
        for way, found in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            if run:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def full(llm: MemoryModel, N: int) -> Memory:
    """A memory full of random slots."""
    memory = llm.empty(N=N, K=256)
    generator = torch.Generator().manual_seed(0)
    while memory.M < memory.N:
        new = torch.randn(memory.L, min(256, memory.N - memory.M), memory.d, generator=generator).to(memory.slots)
        memory = updated(memory, new, source="random")
    return memory


def with_stored(memory: Memory, S: int, R: int, int8: bool) -> Memory:
    """The memory with a store of S random slots, as 150 of them were written at once."""
    store = longterm.empty(memory.L, LongTermSettings(R, limit=1 << 40, int8=int8), memory.M)
    generator, start = torch.Generator().manual_seed(1), 0
    while start < S:
        k = min(blocks.BLOCK, S - start)
        slots = torch.randn(memory.L, k, memory.d, generator=generator).to(memory.slots)
        births = (torch.arange(start, start + k, dtype=torch.int32) // 150).expand(memory.L, k)
        orders = torch.arange(start, start + k).expand(memory.L, k)
        slots = blocks.packed(slots) if int8 else slots
        stored = StoredSlots(slots, births, torch.zeros_like(births), orders, None)
        store = replace(store, ranges=blocks.extended(store.ranges, stored))
        start += k
    before = -(-S // 150)
    return replace(memory, longterm=store, births=memory.births + before, updates=memory.updates + before)


def search(llm: MemoryModel, memory: Memory, ids: torch.Tensor) -> None:
    """What an answer does before its first token to find what it takes."""
    assert memory.longterm is not None
    with torch.no_grad(), llm.using(READ):
        llm.retriever.retrieve(memory, llm.prefix(memory), ids, torch.ones(len(ids), dtype=torch.bool))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="what `latentmem.load` takes")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--stored", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("-N", type=int, default=1536)
    parser.add_argument("-R", type=int, default=512)
    parser.add_argument("--question", type=int, default=24, help="tokens of a question")
    parser.add_argument("--int8", action="store_true", help="slots are stored in 8 bits")
    args = parser.parse_args()
    llm = latentmem.load(args.model, dtype=args.dtype)
    generator = torch.Generator().manual_seed(2)
    vocabulary = llm.base.get_input_embeddings().weight.shape[0]
    text, ids = (torch.randint(100, vocabulary, (n,), generator=generator) for n in (256, args.question))
    bare, wide = full(llm, args.N), full(llm, args.N + args.R)
    said = f"--stored {' '.join(map(str, args.stored))} --dtype {args.dtype} --runs {args.runs}{' --int8' * args.int8}"
    print(f"`python benchmarks/longterm.py {said}`, {date.today()},")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {args.model}:")
    print(f"L {bare.L}, d {bare.d}, N {args.N}, R {args.R}, a write of {len(text)} tokens, a question of {len(ids)}\n")
    columns = "slots stored | bytes stored | for the search | a write / without | search | copy of what it reads | "
    columns += "first token, search included | / one of N + R slots"
    print(f"| {columns} |\n|{' --- |' * 8}")
    for S in args.stored:
        memory = with_stored(bare, S, args.R, args.int8)
        store = longterm.of(memory)
        assert store is not None
        write, plain = timed(args.runs, lambda m=memory: llm.write_ids(m, text), lambda: llm.write_ids(bare, text))
        keys = torch.empty(S * len(llm.retriever.layers_searched), bare.d, dtype=llm.decoder.dtype)
        found, copied, first, beside = timed(
            args.runs,
            lambda m=memory: search(llm, m, ids),
            keys.clone,
            lambda m=memory: llm.generate_ids(m, ids, max_new_tokens=1),
            lambda: llm.generate_ids(wide, ids, max_new_tokens=1),
        )
        cells = [f"{S:,}", f"{store.nbytes / 1e6:,.0f} MB", f"{keys.nbytes / 1e6:,.0f} MB", f"{write / plain:.2f}"]
        cells += [f"{found * 1e3:.0f} ms", f"{copied * 1e3:.0f} ms", f"{first * 1e3:.0f} ms", f"{first / beside:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
