"""How fast a memory is trained, beside the arithmetic bound of this machine.

    python benchmarks/training.py smollm2-135m --episodes 8

The bound: the multiplications that the episodes need, done as fast as the fastest of a few large matrix products in the
same dtype on the same cores. Forwards each weight once per token that is written, read, or seen by the plain model as
teacher, attention over the memory and the text, and keys and values of the slots; backwards, where a gradient flows,
each weight once again, because frozen weights need no gradient (those of the adapter twice), and attention twice. What
is written into the pool itself, as in "recall", and what the teacher sees gets no gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import torch

from latentmem.core.memory import survival
from latentmem.decoder.adapters import READ
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


def needed(run: Run, episode: Episode) -> float:
    """Floating point operations of one episode behind the run's pool."""
    learner, pool, model = run.learner, run.pool, run.llm.base.config
    settings = learner.settings
    episode = learner._replied(episode) if episode.replies else episode
    sizes = {n: p.numel() for n, p in learner.named_parameters() if ".layers." in n and p.ndim == 2}
    frozen = {n: size for n, size in sizes.items() if ".lora_" not in n}
    trained = {n: size for n, size in sizes.items() if f".{READ}." in n}  # the other adapter is as large
    layer, pair = sum(frozen.values()), sum(trained.values())
    kv, kv_pair = (sum(s for n, s in some.items() if "k_proj" in n or "v_proj" in n) for some in (frozen, trained))
    head_dim = getattr(model, "head_dim", 0) or model.hidden_size // model.num_attention_heads
    mix = 2 * 2 * model.num_attention_heads * head_dim * model.num_hidden_layers  # a score and a sum, of two tokens
    first, c = learner.first.shape[1], learner._tokens_per_slot(episode)

    def through(rows: list[int], before: int, learns: bool, adapter: bool = True, still: int = 0) -> float:
        """Rows of so many tokens through the layers behind slots, of which `still` need no gradient."""
        n, pairs = sum(rows), sum(n * before + n * (n + 1) / 2 for n in rows)
        back = 2 * (layer + 2 * pair) * n + mix * (2 * pairs - n * still) if learns else 0.0
        return 2 * (layer + adapter * pair) * n + mix * pairs + back

    def slots(n: int, learns: bool, fresh: int = 0) -> float:
        """Keys and values of n slots under an adapter; `fresh` ones need a gradient themselves."""
        return 2 * (kv + kv_pair) * n + (4 * kv_pair * n + 2 * kv * fresh if learns else 0.0)

    def head(n: int, learns: bool) -> float:
        return (4 if learns else 2) * model.vocab_size * model.hidden_size * n

    total, answers = 0.0, sum(len(row.answer) for row in episode.rows)
    opening = len(run.llm.prompts_or_raise().opening) if episode.replies else 1
    for row in episode.rows if episode.taught else ():
        text = len(episode.texts[row.about]) if row.about is not None else 0
        asked = [opening + text + len(row.prompt) + len(row.answer)]
        total += (2 if episode.replies else 1) * through(asked, 0, False, adapter=False)  # a reply is said first
    total += (episode.taught + bool(episode.replies)) * head(answers, False)

    learns = not episode.from_pool
    M = learner._part(pool, episode).M if learns else pool.M
    own = [0] * len(episode.texts)  # slots of each text
    for i, n in enumerate(map(len, episode.texts)):
        new = sum(own) if learns and episode.in_sequence else 0
        if settings.preset == "paper":
            m = min(settings.K, M + new)
            carried = min(max(settings.K - n, 0), m)
            total += through([n + carried], first + m - carried, learns) + slots(first + m - carried, learns, m)
            own[i] = min(settings.K, n + m)
        else:
            total += through([n], first + M + new, learns, still=M) + slots(first + new, learns, new)
            total += slots(M, False) if episode.from_pool or not i else 0.0
            total += head(n - 1, False) if settings.choice == "surprise" and c > 1 else 0.0
            own[i] = -(-n // c)
        M = M if learns else min(pool.N, M + own[i])
    ages = zip(own, episode.ages, strict=True)
    left = sum(max(1, round(survival(pool.N, min(k, pool.N - 1), age) * k)) for k, age in ages) if learns else 0
    rows = [len(row.prompt) + len(row.answer) for row in episode.rows]
    return total + through(rows, first + M + left, True) + slots(first + M + left, True, left) + head(answers, True)


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
            operations += needed(run, episode)
    rate = peak(run.llm.decoder.dtype, run.accelerator.device)
    print(f"{run.llm.name}, {some.dtype}, {torch.get_num_threads()} threads, {args.episodes} episodes, full pool")
    print(f"trained        {tokens / seconds:8.0f} tokens/s")
    print(f"bound          {tokens / (operations / rate):8.0f} tokens/s at {rate / 1e9:.0f} GFLOP/s")
    print(f"trained/bound  {operations / rate / seconds:8.2f}")


if __name__ == "__main__":
    main()
