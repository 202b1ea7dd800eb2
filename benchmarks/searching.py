"""What a search costs in a memory of coded updates: time to the first token, by the tokens stored.

    python benchmarks/searching.py --stored 1000 10000 100000

Beside it the first token behind a memory that searches nothing and shows an answer as many slots, N + R, its keys and
values in RAM as those of the searched memory. *new* is a question about other updates each time, *again* the same
question once more, whose updates are still decoded. A text of 4,000 tokens is written; more tokens are copies of its
updates, since what they say does not matter here.
"""

import argparse
from dataclasses import replace
from datetime import date

import torch
from longterm import timed  # the script beside this one

import latentmem
from latentmem.core.memory import Memory
from latentmem.decoder.adapters import READ
from latentmem.evaluate.data import synthetic
from latentmem.longterm.updates import UpdateArchive
from latentmem.model.model import MemoryModel
from latentmem.written import Written, numbered


def written(llm: MemoryModel, memory: Memory, tokens: int) -> Memory:
    for i in range(10_000):
        if memory.tokens >= tokens:
            break
        memory = llm.write(memory, " ".join(synthetic.text(5, 4 * i + j).text for j in range(4)), source="text")
    return memory


def with_stored(memory: Memory, tokens: int) -> Memory:
    """The memory with copies of its updates in front, until so many tokens are stored."""
    own, copies = list(memory.written.values()), list[Written]()
    count = sum(map(len, own))
    while count < tokens:
        one = own[len(copies) % len(own)]
        copies.append(Written(one.source, dict(one.tensors)))
        count += len(one)
    before = len(copies)
    updates = dict(enumerate([*copies, *own], 1))
    births = memory.births + before
    assert memory.longterm is not None
    archive = UpdateArchive.restored(memory.longterm.settings, 1, updates, births)
    slots = numbered(births, memory.slots[:, :, 0] & 0xFFFFFFFF)
    moved = {"slots": slots, "births": births, "written": updates, "longterm": archive}
    return replace(memory, updates=memory.updates + before, **moved)


def first_token(llm: MemoryModel, memory: Memory, question: str) -> None:
    llm.generate_ids(memory, llm.prompts_or_raise().question(question, bare=True), max_new_tokens=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--stored", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    llm = latentmem.load(options.model, dtype=options.dtype)
    memory = written(llm, llm.empty(), 4000)
    plain = written(llm, llm.empty(memory.N + memory.R, longterm=0, form="exact"), memory.N + memory.R + 256)
    first_token(llm, plain, "Who?")
    asked = [synthetic.text(5, i).questions[0].question for i in range(0, 40, 3)]
    print(f"{date.today()}, {llm!r}, {torch.get_num_threads()} threads, {options.runs} runs in turns")
    print(f"searched: N={memory.N}, R={memory.R}; plain: {plain.M} slots of hidden states")
    print("| tokens stored | plain | searched, new | ratio | searched, again | ratio | of it the search |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for tokens in options.stored:
        now, turn = with_stored(memory, tokens), 0
        llm.prefix(now)

        def new() -> None:
            nonlocal turn
            turn += 1
            llm.retriever.decoding.clear()
            first_token(llm, now, asked[turn % len(asked)])  # noqa: B023

        def search() -> None:
            ids = torch.tensor(llm.prompts_or_raise().question(asked[0], bare=True))
            with llm.using(READ):
                llm.retriever.retrieve(now, llm.prefix(now), ids, llm.question_mask(ids))  # noqa: B023

        def again() -> None:
            first_token(llm, now, asked[turn % len(asked)])  # noqa: B023

        base, fresh, more, alone = timed(options.runs, lambda: first_token(llm, plain, asked[0]), new, again, search)
        stored = sum(map(len, now.written.values()))
        cells = f"{base:.3f} s | {fresh:.3f} s | {fresh / base:.2f} | {more:.3f} s | {more / base:.2f} | {alone:.3f} s"
        print(f"| {stored:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
