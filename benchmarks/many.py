"""Many memories in one store, and one memory of a million tokens: bytes, times, and whether the right text is found.

    python benchmarks/many.py memories --count 1000 --real 24 --hot 100 --asks 120
    python benchmarks/many.py tokens --real 20000 --stored 10000 100000 1000000

memories   Each holds 1,024 tokens of synthetic texts, in a store as the server has it: the memories that were used last
           stay open, and the keys and values of `hot` of them stay in RAM. Random ones are asked. `real` memories are
           written by the model, each with texts of its own. The others repeat the codes of these under sources of their
           own, so that every object has another hash and no two memories share one: bytes and times are those of
           different memories, and only what they say comes again.
tokens     `real` tokens are written, each text a write. The updates beyond are copies of them, each with sketches of
           tokens that are drawn from all that were written: they are found by a search, and say nothing. So a copy can
           hold the very words of a question, but not all words of one text. A question is right where its text is the
           best update. Bytes are those of a store with one object for each update.

Times are CPU time of the process, with one thread that of a machine without other work; the clock stands beside them.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from searching import first_token  # the script beside this one

import latentmem
from latentmem import longterm
from latentmem.core import memory as memories
from latentmem.core.memory import Memory, Update
from latentmem.decoder.adapters import READ
from latentmem.evaluate.data import synthetic
from latentmem.longterm.updates import UpdateArchive
from latentmem.model.model import MemoryModel
from latentmem.written import Source, Written, numbered

SEED = 11


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of some work, and those of the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - clock


def median(times: Sequence[tuple[float, float]]) -> float:
    """Of CPU time."""
    return statistics.median(cpu for cpu, _ in times)


def said(name: str, times: Sequence[tuple[float, float]]) -> str:
    columns = [sorted(column) for column in zip(*times, strict=True)]
    cells = [f"{column[int(q * (len(column) - 1) + 0.5)]:.3f} s" for column in columns for q in (0.5, 0.95)]
    return f"| {name} | {len(times)} | {' | '.join(cells)} |"


# --- many memories ----------------------------------------------------------------------------------------------------


class Repeating:
    """A model for the store that writes updates which were computed already."""

    def __init__(self, llm: MemoryModel, written: Sequence[Written]) -> None:
        self._llm, self._written = llm, written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def write_ids(self, memory: Memory, ids: list[int], source: str, progress: Any, updates: Any) -> Memory:
        for one in self._written:
            change = Update.drawn(memory, Written(source, one.tensors), source, len(one))
            memory = memories.update(memory, change)
            updates(change)
        return memory


def tokens_of(llm: MemoryModel, i: int, slots: int) -> list[int]:
    """So many tokens of texts of memory i."""
    text = " ".join(synthetic.text(SEED, 20 * i + j).text for j in range(20))
    return llm.tokens(text, "raw")[:slots]


def filled(llm: MemoryModel, folder: Path, count: int, real: int, slots: int) -> latentmem.Store:
    store, written = latentmem.Store(folder), list[list[Written]]()
    for i in range(count):
        store.create(f"m{i}", llm.empty(N=slots))
        writer: Any = llm if i < real else Repeating(llm, written[i % real])
        store.write(writer, f"m{i}", tokens_of(llm, i, slots), source=f"notes of {i}")
        if i < real:
            written.append(list(store.open(f"m{i}").written.values()))
            llm.prefixes.clear()
    store.close()
    return latentmem.Store(folder)


def many_memories(llm: MemoryModel, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = filled(llm, Path(folder), options.count, options.real, options.slots)
        print(f"{options.count} memories of {options.slots} slots made in {time.perf_counter() - start:.0f} s")
        coder = next(Path(folder).glob(f"objects/??/{llm.coder}*")).stat().st_size
        disk = bytes_of(Path(folder)) - coder
        each = disk / options.count
        print(f"disk: {disk:,} bytes, {each:,.0f} a memory, {each / options.slots:,.0f} a token; coder {coder:,}")
        print(f"10,000 memories, by arithmetic: {10_000 * each / 1e9:.1f} GB")
        hot, draw = random.Random(0).sample(range(options.count), options.hot), random.Random(1)

        def ask(i: int) -> None:
            question = synthetic.text(SEED, 20 * i + draw.randrange(5)).questions[0].question
            first_token(llm, store.open(f"m{i}"), question)

        ask(hot[0])
        one, warm = llm.prefix(store.open(f"m{hot[0]}")).nbytes, store.nbytes()[0]
        print(f"a slot in RAM: {one / options.slots:,.0f} bytes hot, {warm / options.slots:,.0f} warm")
        llm.prefixes.limit = (options.hot + 1) * one
        warming = [seconds(partial(ask, i)) for i in hot[1:]]
        in_use = [seconds(lambda: ask(draw.choice(hot[-options.hot // 2 :]))) for _ in range(options.asks // 3)]
        anyone = [seconds(lambda: ask(draw.randrange(options.count))) for _ in range(options.asks)]
        print(f"hot: {len(llm.prefixes.memories)} of {one:,} bytes; open: {store.nbytes()[0]:,} bytes")
        print("| first token | n | p50 | p95 | p50, clock | p95, clock |\n| --- | --- | --- | --- | --- | --- |")
        print(said("of a memory that nobody has asked yet", warming))
        print(said(f"of one of the {options.hot} hot ones", in_use))
        print(said(f"of any of the {options.count}", anyone))
        print(said("(the overview of all memories)", [seconds(store.overview)]))
        store.close()


# --- one large memory -------------------------------------------------------------------------------------------------


def with_copies(memory: Memory, tokens: int) -> Memory:
    """The memory with copies of its updates in front, until so many tokens are stored."""
    own, draw = list(memory.written.values()), torch.Generator().manual_seed(0)
    sketches, copies = torch.cat([one.tensors["sketch"] for one in own]), list[Written]()
    count = sum(map(len, own))
    while count < tokens:
        one = own[len(copies) % len(own)]
        others = sketches[torch.randint(len(sketches), (len(one),), generator=draw)]
        copies.append(Written(f"copy {len(copies)}", {**one.tensors, "sketch": others}))
        count += len(one)
    return renumbered(memory, [*copies, *own], [Source(one.source, len(one), len(one)) for one in copies])


def renumbered(memory: Memory, updates: Sequence[Written], more: Sequence[Source]) -> Memory:
    """The memory with these updates, its own at the end, and more sources."""
    before = len(updates) - len(memory.written)
    written, births = dict(enumerate(updates, 1)), memory.births + before
    assert memory.longterm is not None
    archive = UpdateArchive.restored(memory.longterm.settings, 1, written, births)
    slots = numbered(births, memory.slots[:, :, 0] & 0xFFFFFFFF)
    moved = {"slots": slots, "births": births, "written": written, "longterm": archive}
    return replace(memory, updates=memory.updates + before, sources=(*memory.sources, *more), **moved)


def best(llm: MemoryModel, memory: Memory, question: str) -> str:
    """The source of the update that stands last, nearest to the question."""
    ids = torch.tensor(llm.prompts_or_raise().question(question, bare=True))
    with llm.using(READ):
        retrieval = llm.retriever.retrieve(memory, llm.prefix(memory), ids, llm.question_mask(ids))
    both = torch.cat([retrieval.places[0], memory.slots[0, :, 0]])
    return memory.written[int(both[retrieval.order[0][-1]] >> 32)].source


def one_large(llm: MemoryModel, options: argparse.Namespace) -> None:
    memory, texts, sizes = llm.empty(longterm={"R": 512, "limit": 1 << 40}), [], list[Memory]()
    while memory.tokens < options.real:
        texts.append(synthetic.text(SEED, len(texts)))
        memory = llm.write(memory, texts[-1].text, source=texts[-1].id)
        if memory.tokens >= 10_000 and not sizes:
            sizes.append(memory)
    asked = [(text.id, text.questions[0].question) for text in texts[: len(sizes[0].written)]][: options.questions]
    print(f"{len(texts)} texts, {memory.tokens:,} tokens written; {len(asked)} questions about the first 10,000 tokens")
    print("| tokens | updates | right text first | search | first token | bytes in RAM | on disk | opening |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for now in [*sizes, *(with_copies(memory, tokens) for tokens in options.stored if tokens > memory.tokens)]:
        llm.prefix(now)
        searches = [seconds(partial(best, llm, now, question)) for _, question in asked[:9]]
        right = sum(best(llm, now, question) == name for name, question in asked)
        first = [seconds(partial(first_token, llm, now, question)) for _, question in asked[:7]]
        with tempfile.TemporaryDirectory() as folder:
            store = latentmem.Store(folder)
            store.create("m", now)
            store.close()
            disk = bytes_of(Path(folder)) - next(Path(folder).glob(f"objects/??/{llm.coder}*")).stat().st_size
            opening = seconds(lambda: latentmem.Store(folder).open("m"))
        stored, archive = sum(map(len, now.written.values())), longterm.searched_updates(now)
        cells = f"{right} of {len(asked)} | {median(searches):.3f} s | {median(first):.3f} s"
        cells += f" | {archive.nbytes:,} | {disk:,} ({disk / stored:,.0f} a token) | {opening[0]:.1f} s"
        print(f"| {stored:,} | {len(now.written):,} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memories", "tokens"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--real", type=int, help="memories, or tokens, that the model writes: 24, or 20,000")
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--hot", type=int, default=100)
    parser.add_argument("--asks", type=int, default=120)
    parser.add_argument("--stored", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args()
    options.real = options.real or (24 if options.what == "memories" else 20_000)
    llm = latentmem.load(options.model, dtype=options.dtype)
    print(f"{date.today()}, {llm!r}, {torch.get_num_threads()} threads")
    (many_memories if options.what == "memories" else one_large)(llm, options)


if __name__ == "__main__":
    main()
