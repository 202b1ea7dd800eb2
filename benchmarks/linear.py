"""Are the linear layers of `latentmem.decoder.linear` faster than torch's own on this machine, and from which rows on?

All matrices of SmolLM2-135M once (random, float32), as torch multiplies them, as halves, by oneDNN, and as our layer
chooses; medians of runs in turns.

    python benchmarks/linear.py --runs 7
"""

from __future__ import annotations

import argparse
import os
from datetime import date

import torch
from speed import in_turns
from torch import nn

from latentmem.decoder import linear

SHAPES = [(192, 576, 60), (576, 576, 60), (1536, 576, 60), (576, 1536, 30), (49152, 576, 1)]  # out, in, how many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 20, 32, 128, 512])
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias=False) for o, i, count in SHAPES for _ in range(count)]
    print(f"`python benchmarks/linear.py --runs {args.runs}`, {date.today()}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} of {os.cpu_count()} cores; medians of {args.runs} runs in turns\n")
    print("| rows | torch's own, ms | halves, ms | oneDNN, ms | ours, ms | torch's own / ours |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    few = linear.FEW
    for rows in args.rows:
        xs = [torch.randn(rows, layer.in_features) for layer in layers]

        def run(kind: type, most: int, xs: list[torch.Tensor] = xs) -> list[torch.Tensor]:
            linear.FEW = most
            for layer in layers:
                layer.__class__ = kind
            return [layer(x) for layer, x in zip(layers, xs, strict=True)]

        ways = [(nn.Linear, few), (linear.Linear, rows), (linear.Linear, 0), (linear.Linear, few)]
        own, halves, one_dnn, ours = in_turns(args.runs, *((lambda _, w=way: run(*w), lambda: None) for way in ways))
        cells = " | ".join(f"{x * 1e3:.0f}" for x in (own, halves, one_dnn, ours))
        print(f"| {rows} | {cells} | {own / ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
