"""Many memories, each with a secret of its own, asked all at once: does each answer its own, and as it does alone?

    python benchmarks/isolation.py
    python benchmarks/isolation.py --memories 200 --batch 32 --texts docs/concepts/store.md

Every memory holds one paragraph of a text (so that they differ in length) and its secret. All are asked at once through
the server's service, in mixed batches that are joined and left all the time. Every pass of the model is watched: the
logits of each row beside those of the same tokens behind the same memory, read alone.
"""

import argparse
import platform
import random
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

import latentmem
from latentmem import MemorySettings, Store
from latentmem.model.batch import Batch, Row
from latentmem.serve.engine.answer import Sampling
from latentmem.serve.engine.service import Service
from latentmem.serve.settings import Sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--memories", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--texts", type=Path, default=Path(__file__).parent.parent / "docs" / "concepts" / "store.md")
    options = parser.parse_args()
    llm = latentmem.load(options.model, dtype=torch.float32)
    draw = random.Random(0)
    paragraphs = [p for p in options.texts.read_text(encoding="utf-8").split("\n\n") if 100 < len(p) < 600]
    codes = draw.sample(range(1000, 10000), options.memories)

    seen: dict[Row, list[torch.Tensor]] = {}
    read = Batch._read

    def watched(batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        logits = read(batch, tokens)
        for row, scores in zip(batch.rows, logits, strict=True):
            if not batch.reads:
                seen.setdefault(row, []).append(scores)
        return logits

    Batch._read = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        service = Service(llm, store, Sizes(options.batch, options.memories, 2 * options.memories))
        service.start()
        start = time.perf_counter()
        for i, code in enumerate(codes):
            service.create(f"m{i}", MemorySettings(seed=i)).result()
            text = f"{draw.choice(paragraphs)}\n\nThe secret code is {code}."
            service.write(f"m{i}", text).done.result()
        wrote, start = time.perf_counter() - start, time.perf_counter()
        order = draw.sample(range(options.memories), options.memories)
        question = "What is the secret code?"
        readings = [  # the seed, of which a greedy answer makes no use, says whose row it is
            service.ask(f"m{i}", question, Sampling(12, seed=i)) for i in order
        ]
        answers = ["".join(piece.text for piece in reading) for reading in readings]
        asked = time.perf_counter() - start
        own = sum(str(codes[i]) in answer for i, answer in zip(order, answers, strict=True))
        others = sum(
            any(str(code) in answer for code in codes if code != codes[i])
            for i, answer in zip(order, answers, strict=True)
        )
        memories = [store.open(f"m{i}") for i in range(options.memories)]
        alone, worst, tokens = 0, 0.0, 0
        for row, logits in seen.items():
            i = row.generator.initial_seed()
            made = [int(scores.argmax()) for scores in logits]
            behind = llm.logits(memories[i], [*row.ids, *made[:-1]])[len(row.ids) - 1 :]
            worst = max(worst, (torch.stack(logits)[: len(behind)] - behind).abs().max().item())
            tokens += len(behind)
            alone += str(codes[i]) in llm.ask(memories[i], question, max_new_tokens=12)
        service.close()
    print(f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, {options.model}, float32")
    print(f"{options.memories} memories, batches of up to {options.batch}")
    print(f"all written in {wrote:.0f} s, all asked in {asked:.1f} s")
    print(f"answers with the own code: {own}; with another's: {others}; with the own code when asked alone: {alone}")
    print(
        f"largest difference of a logit from the same row alone: {worst:.1e} over {tokens} tokens of {len(seen)} rows"
    )


if __name__ == "__main__":
    main()
