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
from latentmem.train.episode import Episode
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


class Arithmetic:
    """Floating point operations of episodes behind a run's pool."""

    def __init__(self, run: Run) -> None:
        self.run, self.model, self.settings = run, run.llm.base.config, run.learner.settings
        sizes = {n: p.numel() for n, p in run.learner.named_parameters() if ".layers." in n and p.ndim == 2}
        frozen = {n: size for n, size in sizes.items() if ".lora_" not in n}
        trained = {n: size for n, size in sizes.items() if f".{READ}." in n}  # the other adapter is as large
        self.layer, self.pair = sum(frozen.values()), sum(trained.values())
        self.kv, self.kv_pair = (
            sum(s for n, s in part.items() if "k_proj" in n or "v_proj" in n) for part in (frozen, trained)
        )
        m = self.model
        head_dim = getattr(m, "head_dim", 0) or m.hidden_size // m.num_attention_heads
        self.mix = 2 * 2 * m.num_attention_heads * head_dim * m.num_hidden_layers  # a score and a sum, of two tokens
        self.first = run.learner.first.shape[1]

    def through(self, rows: list[int], before: int, learns: bool, adapter: bool = True, still: int = 0) -> float:
        """Rows of so many tokens through the layers behind slots, of which `still` need no gradient."""
        n, pairs = sum(rows), sum(n * before + n * (n + 1) / 2 for n in rows)
        back = 2 * (self.layer + 2 * self.pair) * n + self.mix * (2 * pairs - n * still) if learns else 0.0
        return 2 * (self.layer + adapter * self.pair) * n + self.mix * pairs + back

    def slots(self, n: int, learns: bool, fresh: int = 0) -> float:
        """Keys and values of n slots under an adapter; `fresh` ones need a gradient themselves."""
        back = 4 * self.kv_pair * n + 2 * self.kv * fresh if learns else 0.0
        return 2 * (self.kv + self.kv_pair) * n + back

    def head(self, n: int, learns: bool) -> float:
        """Logits of n tokens."""
        return (4 if learns else 2) * self.model.vocab_size * self.model.hidden_size * n

    def taught(self, episode: Episode) -> float:
        """What the plain model reads as teacher, and says as a reply."""
        total, answers = 0.0, sum(len(row.answer) for row in episode.rows)
        opening = len(self.run.llm.prompts_or_raise().opening) if episode.replies else 1
        for row in episode.rows if episode.taught else ():
            text = len(episode.texts[row.about]) if row.about is not None else 0
            asked = [opening + text + len(row.prompt) + len(row.answer)]
            total += (2 if episode.replies else 1) * self.through(asked, 0, False, adapter=False)  # a reply comes first
        return total + (episode.taught + bool(episode.replies)) * self.head(answers, False)

    def written(self, episode: Episode, M: int, learns: bool) -> tuple[float, list[int], int]:
        """What is written behind M slots; the slots of each text, and the slots that stand before them at the end."""
        learner, settings, N = self.run.learner, self.settings, self.run.pool.N
        total, own, c = 0.0, [0] * len(episode.texts), learner._tokens_per_slot(episode)
        for i, n in enumerate(map(len, episode.texts)):
            new = sum(own) if learns and episode.in_sequence else 0
            if settings.preset == "paper":
                m = min(settings.K, M + new)
                carried = min(max(settings.K - n, 0), m)
                before = self.first + m - carried
                total += self.through([n + carried], before, learns) + self.slots(before, learns, m)
                own[i] = min(settings.K, n + m)
            else:
                total += self.through([n], self.first + M + new, learns, still=M)
                total += self.slots(self.first + new, learns, new)
                total += self.slots(M, False) if episode.from_pool or not i else 0.0
                total += self.head(n - 1, False) if settings.choice == "surprise" and c > 1 else 0.0
                own[i] = -(-n // c)
            M = M if learns else min(N, M + own[i])
        return total, own, M

    def needed(self, episode: Episode) -> float:
        """All of an episode."""
        learner, pool = self.run.learner, self.run.pool
        episode = learner._replied(episode) if episode.replies else episode
        learns = not episode.from_pool
        total, own, M = self.written(episode, learner._part(pool, episode).M if learns else pool.M, learns)
        ages = zip(own, episode.ages, strict=True)
        fresh = sum(max(1, round(survival(pool.N, min(k, pool.N - 1), age) * k)) for k, age in ages) if learns else 0
        rows, before = [len(row.prompt) + len(row.answer) for row in episode.rows], self.first + M + fresh
        read = self.through(rows, before, True) + self.slots(before, True, fresh)
        return self.taught(episode) + total + read + self.head(sum(len(row.answer) for row in episode.rows), True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    config = configs.load(args.config, [*args.set, "watch.probe=0"])
    with tempfile.TemporaryDirectory() as folder:
        run = Run(dataclasses.replace(config, apart=()), Path(folder))
    arithmetic, number, seconds, tokens, operations = Arithmetic(run), 0, 0.0, 0, 0.0
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
            operations += arithmetic.needed(episode)
    rate = peak(run.llm.decoder.dtype, run.accelerator.device)
    print(f"{run.llm.name}, {config.dtype}, {torch.get_num_threads()} threads, {args.episodes} episodes, full pool")
    print(f"trained        {tokens / seconds:8.0f} tokens/s")
    print(f"bound          {tokens / (operations / rate):8.0f} tokens/s at {rate / 1e9:.0f} GFLOP/s")
    print(f"trained/bound  {operations / rate / seconds:8.2f}")


if __name__ == "__main__":
    main()
