"""How fast a memory is trained, beside the arithmetic bound of this machine.

    python benchmarks/training.py smollm2-135m --episodes 8

The bound: the multiplications that the episodes need (each weight once per token forwards and once backwards, because
frozen weights need no gradient; attention over the memory and the text forwards and twice backwards), done as fast as
the fastest of a few large matrix products in the same dtype on the same cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import torch

from latentmem.train import config as configs
from latentmem.train.episodes import Episode
from latentmem.train.loop import Run


def peak(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """Floating point operations per second in a large product, the best of five."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def needed(run: Run, episode: Episode, M: int) -> float:
    """Floating point operations of one episode behind M slots, forwards and backwards."""
    model = run.llm.base.config
    layers = sum(p.numel() for n, p in run.learner.named_parameters() if ".layers." in n and p.ndim == 2)
    width = model.num_attention_heads * (
        getattr(model, "head_dim", 0) or model.hidden_size // model.num_attention_heads
    )
    tokens = episode.written + episode.read
    mixing = 2 * 2 * width * model.num_hidden_layers * tokens * M  # scores and sums over the memory
    head = model.vocab_size * model.hidden_size * sum(len(row.answer) for row in episode.rows)
    return 4 * layers * tokens + 3 * mixing + 4 * head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    some = configs.load(args.config, [*args.set, "watch.probe=0"])
    with tempfile.TemporaryDirectory() as folder:
        run = Run(dataclasses.replace(some, apart=()), Path(folder))
    number, seconds, tokens, operations = 0, 0.0, 0, 0.0
    while run.pool.M < run.pool.N:  # as most of a training goes on
        with torch.no_grad():
            run._remember(run.learner(dataclasses.replace(run.episodes[number], fill=0.0), run.pool))
        number += 1
    for i in range(args.episodes + 1):
        episode = run.episodes[number + i]
        start = time.perf_counter()
        outcome = run.learner(episode, run.pool)
        outcome.loss.backward()
        took = time.perf_counter() - start
        if i:  # the first one is slower
            seconds, tokens = seconds + took, tokens + episode.written + episode.read
            operations += needed(run, episode, int(episode.fill * run.pool.M))
    rate = peak(run.llm.decoder.dtype, run.accelerator.device)
    print(f"{run.llm.name}, {some.dtype}, {torch.get_num_threads()} threads, {args.episodes} episodes, full pool")
    print(f"trained        {tokens / seconds:8.0f} tokens/s")
    print(f"bound          {tokens / (operations / rate):8.0f} tokens/s at {rate / 1e9:.0f} GFLOP/s")
    print(f"trained/bound  {operations / rate / seconds:8.2f}")


if __name__ == "__main__":
    main()
