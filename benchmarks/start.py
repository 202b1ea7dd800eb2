"""How long does `latentmem ask` take from a cold process, beyond importing torch and transformers?

Two commands in turn, n times: importing torch and transformers with what any chat with this model needs, and a whole
`latentmem ask` with a model that was unpacked before. The difference is ours: reading and verifying weights and
memory, projecting keys and values, and the answer.

    python benchmarks/start.py --runs 5
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

TEXT = Path(__file__).parent.parent / "docs" / "paper.md"
IMPORTS = "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM"
QUESTION = "Who is the author of MemoryLLM?"


def seconds(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return time.perf_counter() - start, out


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
        print(f"`python benchmarks/start.py --runs {args.runs}`, {date.today()}, {os.cpu_count()} cores, medians\n")
        print("| memory | imports alone, s | whole ask, s | beyond the imports, s | answer |\n|" + " --- |" * 5)
        for memory in ("small", "full"):
            pairs = []
            for _ in range(args.runs):
                imports, _ = seconds([sys.executable, "-c", IMPORTS])
                whole, answer = seconds([*cli, "ask", QUESTION, "-m", memory])
                pairs.append((imports, whole))
            columns = [statistics.median(c) for c in zip(*pairs, strict=True)]
            beyond = statistics.median(whole - imports for imports, whole in pairs)
            print(f"| {memory} | {columns[0]:.2f} | {columns[1]:.2f} | {beyond:.2f} | {answer} |")


if __name__ == "__main__":
    main()
