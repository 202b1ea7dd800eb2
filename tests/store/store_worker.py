"""A process that writes into a store until it is killed: run by test_store_crash.py, not by pytest.

Reads one seed per line, and for each forks a child that works at random. The child says what was acknowledged, one line
each; when it is dead, this process says so.
"""

import os
import random
import sys

import torch

from latentmem.core.settings import MemorySettings
from latentmem.model.model import MemoryModel
from latentmem.store import Store, Turns
from latentmem.testing import byte_tokenizer, tiny_model


def say(*words: object) -> None:
    """One line, whole or not at all."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def work(llm: MemoryModel, folder: str, seed: int) -> None:
    """Write, acknowledge, talk, roll back, fork, prune and forget at random, for ever."""
    rng, store = random.Random(seed), Store(folder, snapshot_every=4, cache_bytes=200_000)
    say("ready")
    for step in range(10**6):
        name, key, what = rng.choice(["a", "b", "c"]), f"{seed}-{step}", rng.random() if step else 0.95 * (seed % 2)
        if name not in store.names():
            store.create(name, llm.empty(24, 8, seed=5))
        if what < 0.38:
            store.write(llm, name, f"text {key}", rng.choice("xyz"), key=key)
            say("written", name, key)
        elif what < 0.48:
            store.prune(name, keep=rng.choice([1, 2, 5]))
            say("pruned", name, key)
        elif what < 0.7:
            store.append(name, f"text {key}", rng.choice("xyz"), key=key)
            say("written", name, key)
        elif what < 0.77:
            if rng.random() < 0.7:  # where little was written, forgetting comes to its end
                name = f"small-{key}"
                store.create(name, llm.empty(24, 8, seed=5))
            store.write(llm, name, f"secret {key}", "gone", key=key)
            say("secret", name, key)
        elif what < 0.83:
            name = rng.choice([n for n in store.names() if n in "abc" or n.startswith("small")])
            store.apply(llm, name)
            if any(v.source == "gone" for v in store.history(name)):
                store.forget_by_replay(llm, name, "gone")
                say("forgotten", name)
        elif what < 0.88:
            done = [v.version for v in store.history(name) if v.state == "applied"]
            store.rollback(name, rng.choice(done))
        elif what < 0.93:
            store.apply(llm, name)
            store.fork(name, f"fork-{key}")
            store.write(llm, f"fork-{key}", f"text {key}", "x", key=key)
            say("written", f"fork-{key}", key)
        elif what < 0.99:
            turns = Turns(store, name, "talk")
            turns.keep(llm, {"role": "user", "content": f"turn {key}"})
            say("said", name, key)
            if rng.random() < 0.5:
                turns.memory(llm)
        else:
            store.sweep()


def main() -> None:
    torch.set_num_threads(1)
    llm = MemoryModel(tiny_model(), byte_tokenizer(), name="tiny")
    llm.defaults = MemorySettings(form=sys.argv[2])
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            work(llm, sys.argv[1], int(line))
        say("child", child)
        os.waitpid(child, 0)
        say("dead")


if __name__ == "__main__":
    main()
