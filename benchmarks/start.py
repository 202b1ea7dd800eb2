"""How long does `latentmem ask` take from a cold process, beyond importing torch and transformers?

Each run is a new process that first imports torch and transformers with what any chat with this model needs, and then
runs `latentmem ask`. What is counted starts after these imports: our own imports, reading and verifying weights and
memory, projecting keys and values, and the answer, to its first and to its last word.

    python benchmarks/start.py --runs 5
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

TEXT = Path(__file__).parent.parent / "docs" / "concepts" / "paper.md"
QUESTION = "Who is the author of MemoryLLM?"
CHILD = """
import io, json, sys, time
start = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
imported = time.perf_counter()

class Watched(io.StringIO):
    first = None
    def write(self, text):
        if text.strip() and self.first is None:
            Watched.first = time.perf_counter()
        return super().write(text)

shown, sys.stdout = sys.stdout, Watched()
from latentmem.cli import main
try:
    main()
except SystemExit:
    pass
end = time.perf_counter()
answer, sys.stdout = sys.stdout.getvalue().strip(), shown
print(json.dumps([imported - start, Watched.first - imported, end - imported, answer]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    cli = [sys.executable, "-c", "from latentmem.cli import main; main()"]
    with tempfile.TemporaryDirectory() as home:
        os.environ["LATENTMEM_HOME"] = home
        note = "MemoryLLM was written by Yu Wang and others."
        subprocess.run([*cli, "write", note, "-m", "small"], check=True, capture_output=True)
        subprocess.run([*cli, "write", str(TEXT), str(TEXT), "-m", "full"], check=True, capture_output=True)
        print(f"`python benchmarks/start.py --runs {args.runs}`, {date.today()}, {os.cpu_count()} cores, float32,")
        print(f"seconds: median (minimum to maximum) of {args.runs} processes\n")
        print("| memory | torch and transformers | then to the first word | then to the end | answer |")
        print("|" + " --- |" * 5)
        for memory in ("small", "full"):
            command = [sys.executable, "-c", CHILD, "ask", QUESTION, "-m", memory]
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                for _ in range(args.runs)
            ]
            cells = [
                f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})"
                for c in zip(*(r[:3] for r in runs), strict=True)
            ]
            print(f"| {memory} | {' | '.join(cells)} | {runs[0][3]} |", flush=True)


if __name__ == "__main__":
    main()
