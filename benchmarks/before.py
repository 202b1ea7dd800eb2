"""Is this checkout slower than another one, such as the commit before a change?

Each checkout has a process of its own with the packaged model, and both do the same work in turns. What counts is the
processor time of the work on one thread, which other programs disturb least; the ratios are of pairs that ran one after
the other. Two processes of one checkout differ by up to 7% where memory is read (weights lie elsewhere), so several
processes follow each other. The memories are of hidden states, without a long-term part, which every checkout has, but
for the default memory, which is what `llm.empty()` makes there. A start is a whole new process of `latentmem ask`.

    git worktree add ../before COMMIT
    python benchmarks/before.py ../before
    python benchmarks/before.py .           # beside itself: how far two equal checkouts differ
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
WORKER = """
import json, sys, time
import torch
import latentmem
from latentmem.core.memory import Memory

torch.set_num_threads(1)
llm = latentmem.load(dtype=torch.float32)
generator = torch.Generator().manual_seed(0)

def ids(n):
    return torch.randint(10, 40000, (n,), generator=generator)

def made():
    try:
        return llm.empty(N=2048, K=256, form="exact", longterm=0)
    except (TypeError, ValueError):  # a checkout that has one form alone
        return llm.empty(N=2048, K=256)

def filled(M):
    return llm.write_ids(made(), ids(M)) if M else made()

held, full, empty, text, asked = filled(1024), filled(2048), filled(0), ids(256), ids(20)
notes = [llm.write_ids(empty, ids(128)) for _ in range(8)]
usual = llm.write_ids(llm.empty(), ids(2560))
options = {"max_new_tokens": 16, "min_new_tokens": 16}
WORK = {
    "write 256 tokens behind 1,024 slots": lambda: llm.write_ids(held, text),
    "write 256 tokens behind a full 2,048": lambda: llm.write_ids(full, text),
    "first token behind 1,024 slots": lambda: llm.generate_ids(held, asked, max_new_tokens=1),
    "16 tokens behind 1,024 slots": lambda: llm.generate_ids(held, asked, **options),
    "16 tokens behind nothing": lambda: llm.generate_ids(empty, asked, **options),
    "16 tokens behind each of 8 memories": lambda: llm.generate_ids(notes, [asked] * 8, **options),
    "write 256 tokens into the default memory": lambda: llm.write_ids(usual, text),
    "first token behind the default memory": lambda: llm.generate_ids(usual, asked, max_new_tokens=1),
    "one answer, text to text": lambda: llm.ask(held, "Who signed the lease?", max_new_tokens=8),
}
print(json.dumps(list(WORK)), flush=True)
for line in sys.stdin:
    start = time.process_time()
    WORK[line.strip()]()
    print(time.process_time() - start, flush=True)
"""


class Checkout:
    """A process that works with one checkout."""

    def __init__(self, root: Path) -> None:
        self.env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", WORKER]
        self.process = subprocess.Popen(command, cwd=root, env=self.env, stdin=pipe, stdout=pipe, text=True)
        self.work: list[str] = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"the process of {self.env['PYTHONPATH']} ended; its error stands above.")
        return line

    def seconds(self, work: str) -> float:
        """Processor seconds of one piece of work."""
        assert self.process.stdin is not None
        print(work, file=self.process.stdin, flush=True)
        return float(self._line())

    def start(self, home: str) -> float:
        """Processor seconds of `latentmem ask` in a process of its own."""
        env = {**self.env, "LATENTMEM_HOME": home}
        cli = [sys.executable, "-c", "from latentmem.cli import main; main()"]
        if not os.listdir(home):  # noqa: PTH208 - a name, not paths
            subprocess.run([*cli, "write", "Ada Brix signed the lease."], env=env, check=True, capture_output=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*cli, "ask", "Who signed the lease?"], env=env, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def pairs_of(mine: Callable[[], float], theirs: Callable[[], float], runs: int) -> list[tuple[float, float]]:
    """Times of both, one after the other; which of the two goes first changes from run to run."""
    pairs = []
    for i in range(runs + 1):  # the first warms up
        first, second = (mine, theirs) if i % 2 else (theirs, mine)
        times = first(), second()
        pairs.append(times if i % 2 else times[::-1])
    return pairs[1:]


def row(name: str, pairs: list[tuple[float, float]]) -> str:
    """One line of the table."""
    here, there = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    middle, low, high = statistics.median(ratios), ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    return f"| {name} | {there:.3f} | {here:.3f} | {middle:.2f} [{low:.2f}, {high:.2f}] |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--processes", type=int, default=4, help="of each checkout, one after the other")
    parser.add_argument("--runs", type=int, default=4, help="pairs of each row and process")
    args = parser.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {}
    for number in range(args.processes):
        roots = [HERE, args.before.resolve()]
        checkouts = [Checkout(root) for root in (roots if number % 2 else roots[::-1])]
        here, there = checkouts if number % 2 else checkouts[::-1]
        for work in (work for work in here.work if work in there.work):
            rows.setdefault(work, []).extend(
                pairs_of(partial(here.seconds, work), partial(there.seconds, work), args.runs)
            )
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            starts = pairs_of(partial(here.start, one), partial(there.start, other), 1)
        rows.setdefault("`latentmem ask`, a new process", []).extend(starts)
        for checkout in checkouts:
            checkout.process.kill()
        print(f"{number + 1} of {args.processes} pairs of processes", file=sys.stderr)
    given = f"{args.before.name} --processes {args.processes} --runs {args.runs}"
    print(f"`python benchmarks/before.py {given}`, {date.today()}, one thread, float32, processor seconds, medians;")
    print("ratio: median of pairs [a tenth of them is lower, a tenth higher]\n")
    print("| work | before | here | ratio |\n| --- | ---: | ---: | ---: |")
    for work, pairs in rows.items():
        print(row(work, pairs))


if __name__ == "__main__":
    main()
