"""How fast is a memory, beside plain transformers with an equally long cache, and one that has to read the text first?

All peers run the same weights in the same process, dtype and threads, in turns; what is printed is the median of each,
the ratio of the medians, the first run, which warms up, and this machine's own limit: what the multiplications take at
its matrix rate, and how often it can read all weights and memories in a second. The peak of the memory is measured in
processes of their own. Memories hold random slots and prompts random tokens: nothing here depends on what is said.

    python benchmarks/speed.py                          # the packaged model, minutes
    python benchmarks/speed.py --held 0 1024 --batch 1 8 --runs 3 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

import latentmem
from latentmem.core.memory import Memory
from latentmem.decoder import linear
from latentmem.model.model import MemoryModel

PROMPT, NEW = 20, 16  # tokens of a question, and of an answer behind its first token


class Peer:
    """The same weights as plain transformers runs them: its own attention, no hook."""

    def __init__(self, llm: MemoryModel) -> None:
        self.model = copy.deepcopy(llm.base)
        linear.undo(self.model)
        self.model.set_attn_implementation("sdpa")
        for part in self.model.modules():
            part._forward_pre_hooks.clear()

    @torch.no_grad()
    def cache(self, llm: MemoryModel, memories: list[Memory]) -> DynamicCache | None:
        """An equally long cache with the very keys and values of these memories."""
        if not memories[0].M:
            return None
        cache = DynamicCache()
        prefixes = [llm.prefix(memory) for memory in memories]
        for i in range(llm.decoder.L):
            keys, values = (torch.cat(some) for some in zip(*(p.front.layers[i]() for p in prefixes), strict=True))
            cache.update(keys, values, i)
        return cache

    @torch.no_grad()
    def read(self, cache: DynamicCache | None, ids: torch.Tensor) -> None:
        """One pass of the body over text behind the cache, as a write is."""
        past = cache.get_seq_length() if cache else 0
        mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long)
        self.model.get_decoder()(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def generate(self, cache: DynamicCache | None, ids: torch.Tensor, new: int) -> None:
        past = cache.get_seq_length() if cache else 0
        mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long)
        more = {"past_key_values": cache} if cache else {}
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        self.model.generate(input_ids=ids, attention_mask=mask, **more, **options)


def seconds(run: Callable[[Any], Any], prepare: Callable[[], Any]) -> float:
    ready = prepare()
    start = time.perf_counter()
    run(ready)
    return time.perf_counter() - start


def in_turns(runs: int, *pairs: tuple[Callable[[Any], Any], Callable[[], Any]]) -> list[float]:
    """The median seconds of several ways, run in turns; the first turn is warming up."""
    return turns(runs, *pairs)[0]


def turns(runs: int, *pairs: tuple[Callable[[Any], Any], Callable[[], Any]]) -> tuple[list[float], list[float]]:
    """`in_turns`, and the seconds of the first turn."""
    first, *times = [[seconds(run, prepare) for run, prepare in pairs] for _ in range(runs + 1)]
    return [statistics.median(column) for column in zip(*times, strict=True)], first


def remembering(llm: MemoryModel, M: int, B: int, N: int, K: int) -> list[Memory]:
    """B memories of M random slots each, with their keys and values."""
    found = []
    for i in range(B):
        empty = llm.empty(N=N, K=K, seed=i)
        draw = torch.Generator().manual_seed(i)
        slots = torch.randn(llm.decoder.L, M, llm.decoder.d, generator=draw).to(llm.decoder.dtype)
        births = torch.ones(llm.decoder.L, M, dtype=torch.int32)
        memory = replace(empty, slots=slots, births=births, origins=births - 2)
        if M:
            llm.prefix(memory).rotated  # noqa: B018 - made once per memory
        found.append(memory)
    return found


def random_ids(B: int, n: int) -> torch.Tensor:
    return torch.randint(1000, 40_000, (B, n), generator=torch.Generator().manual_seed(n))


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Limits:
    """This machine's own: multiplications of large matrices, and reading more than its caches hold."""

    def __init__(self, llm: MemoryModel) -> None:
        dtype, config = llm.decoder.dtype, llm.base.config
        layer = torch.nn.Linear(2048, 2048, bias=False, dtype=dtype).requires_grad_(False)
        a, big = torch.randn(2048, 2048).to(dtype), torch.randn(128 * 2**20 // 4)
        product = []
        for kind in (torch.nn.Linear, linear.Linear):
            layer.__class__ = kind
            product.append(min(seconds(lambda _: layer(a), lambda: None) for _ in range(5)))
        self.flops = 2 * 2048**3 / min(product)  # a second
        self.bytes = 2**27 / min(seconds(lambda _: big.sum(), lambda: None) for _ in range(5))  # a second
        self.matrices = sum(p.numel() for p in llm.decoder.layers.parameters() if p.ndim == 2)
        self.head = llm.base.get_output_embeddings().weight.numel()
        self.size = dtype.itemsize
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.width, self.L = head_width(config), llm.decoder.L
        self.name = str(dtype)[6:]

    def writing(self, M: int, n: int) -> float:
        """Seconds of all multiplications of n tokens behind M slots."""
        return 2 * n * (self.matrices + 2 * self.L * self.heads * self.width * (M + n / 2)) / self.flops

    def held(self, M: int) -> int:
        """Bytes of one memory's keys and values."""
        return 2 * self.L * M * self.shared * self.width * self.size

    def decoding(self, M: int, B: int) -> float:
        """Tokens a second, if for each token of all rows the weights and all memories are read once."""
        return B * self.bytes / (self.size * (self.matrices + self.head) + B * self.held(M))

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.0f} GFLOP/s in {self.name}, {self.bytes / 2**30:.1f} GiB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", help="int8: ours only; the peers stay as they are")
    parser.add_argument("--held", type=int, nargs="+", default=[0, 1024, 4096], help="slots that a memory holds")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="memories at once")
    parser.add_argument("--texts", type=int, nargs="+", default=[128, 512], help="tokens of a text that is written")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--largest", type=float, default=6.0, help="GiB of keys, values and slots; more is left out")
    parser.add_argument("--peak", nargs=3, metavar=("WHO", "M", "B"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak(args, args.peak[0], int(args.peak[1]), int(args.peak[2])))
        return
    exact = latentmem.load(args.model, dtype=args.dtype, device="cpu", adapters=None)
    peer = Peer(exact)
    llm = (
        latentmem.load(args.model, dtype=args.dtype, device="cpu", adapters=None, quantize=args.quantize)
        if args.quantize
        else exact
    )
    limits = Limits(exact)
    given = " ".join(f"--{k} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in vars(args).items() if v)
    print(f"`python benchmarks/speed.py {given}`, {date.today()}, {torch.get_num_threads()} of {os.cpu_count()} cores,")
    print(f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__};")
    print(f"this machine: {limits}; medians of {args.runs} runs in turns\n", flush=True)
    writing(llm, peer, limits, args)
    reading(llm, peer, limits, args)
    together(llm, args)
    peaks(args, limits)


def writing(llm: MemoryModel, peer: Peer, limits: Limits, args: argparse.Namespace) -> None:
    print("## Write a text (one update)\n")
    print(
        "| slots held | tokens | ours, ms | equally long cache, ms | ratio | at the matrix rate, ms | first run, ms |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for M in args.held:
        for n in args.texts:
            (memory,) = remembering(llm, M, 1, M + n, n)
            ids = random_ids(1, n)
            cache = peer.cache(llm, [memory])
            (ours, theirs), (first, _) = turns(
                args.runs,
                (lambda _, m=memory, i=ids: llm.write_ids(m, i[0]), lambda: None),
                (lambda c, i=ids: peer.read(c, i), lambda c=cache: copy.deepcopy(c)),
            )
            row = [f"{x * 1e3:.0f}" for x in (ours, theirs, limits.writing(M, n), first)]
            print(f"| {M} | {n} | {row[0]} | {row[1]} | {ours / theirs:.2f} | {row[2]} | {row[3]} |", flush=True)


def reading(llm: MemoryModel, peer: Peer, limits: Limits, args: argparse.Namespace) -> None:
    print(f"\n## First token behind a question of {PROMPT} tokens, and tokens per second after it\n")
    head = "first: ours, ms | equally long cache, ms | ratio | reads the text, ms | times faster | first run, ms"
    print(f"| slots held | memories | {head} |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rest = ["| slots held | memories | ours, tokens/s | equally long cache, tokens/s | ours / cache | ours / M = 0 | "]
    rest[0] += "at the memory rate, tokens/s | the same / M = 0 |"
    rest.append("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    alone: dict[int, float] = {}
    for M in args.held:
        for B in args.batch:
            slots = M * llm.decoder.L * llm.decoder.d * llm.decoder.dtype.itemsize
            needed = B * (slots + 3 * limits.held(M)) / 2**30
            if needed > args.largest:
                print(f"| {M} | {B} | left out: {needed:.1f} GiB | | | | | |", flush=True)
                continue
            memories = remembering(llm, M, B, max(M, 8), 8)
            cache, ids = peer.cache(llm, memories), random_ids(B, PROMPT)
            whole = torch.cat([random_ids(B, M), ids], dim=1)

            def fresh(cache: DynamicCache | None = cache) -> DynamicCache | None:
                return copy.deepcopy(cache)

            ways = [
                (answering(llm, memories, ids, 1), lambda: None),
                (answering(llm, memories, ids, 1 + NEW), lambda: None),
                (lambda c, i=ids: peer.generate(c, i, 1), fresh),
                (lambda c, i=ids: peer.generate(c, i, 1 + NEW), fresh),
            ]
            if B == 1:
                ways.append((lambda _, i=whole: peer.generate(None, i, 1), lambda: None))
            (first, end, their_first, their_end, *prefill), cold = turns(args.runs, *ways)
            ms = [f"{x * 1e3:.0f}" for x in (first, their_first, cold[0])]
            read = f"{prefill[0] * 1e3:.0f} | {prefill[0] / first:.1f}" if prefill else " | "
            print(f"| {M} | {B} | {ms[0]} | {ms[1]} | {first / their_first:.2f} | {read} | {ms[2]} |", flush=True)
            speed, theirs = B * NEW / (end - first), B * NEW / (their_end - their_first)
            alone.setdefault(B, speed)
            row = f"| {M} | {B} | {speed:.1f} | {theirs:.1f} | {speed / theirs:.2f} | {speed / alone[B]:.2f} |"
            most = limits.decoding(M, B)
            same = f"{most:.1f} | {most / limits.decoding(args.held[0], B):.2f}"
            rest.append(f"{row} {' | ' if args.quantize else same} |")  # which bytes are read is known of exact weights
    print("\n" + "\n".join(rest))


def answering(llm: MemoryModel, memories: list[Memory], ids: torch.Tensor, new: int) -> Callable[[Any], Any]:
    options = {"max_new_tokens": new, "min_new_tokens": new}
    if len(memories) == 1:
        return lambda _: llm.generate_ids(memories[0], ids[0], **options)
    return lambda _: llm.generate_ids(memories, list(ids), **options)


def together(llm: MemoryModel, args: argparse.Namespace) -> None:
    print(f"\n## Answers of {NEW} tokens from different memories, in one batch and one after another\n")
    print("| slots held | memories | one batch, s | one after another, s | times faster |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for M in [m for m in args.held if 0 < m <= 1024]:
        for B in [b for b in args.batch if b > 1]:
            memories, ids = remembering(llm, M, B, max(M, 8), 8), random_ids(B, PROMPT)
            each = [answering(llm, [memory], ids[i : i + 1], NEW) for i, memory in enumerate(memories)]
            one, many = in_turns(
                max(1, args.runs // 2),
                (answering(llm, memories, ids, NEW), lambda: None),
                (lambda _, each=each: [run(None) for run in each], lambda: None),
            )
            print(f"| {M} | {B} | {one:.1f} | {many:.1f} | {many / one:.1f} |", flush=True)


def peaks(args: argparse.Namespace, limits: Limits) -> None:
    """What a process holds more than the model's weights while it answers, each in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        return
    print("\n## Peak of the memory above the loaded model, while answering, GiB\n")
    print("| slots held | memories | ours | equally long cache | keys and values of the memories |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for M in args.held:
        for B in args.batch:
            if B * limits.held(M) * 4 / 2**30 > args.largest:
                continue
            found = []
            for who in ("ours", "cache"):
                command = [sys.executable, __file__, "--model", args.model, "--dtype", args.dtype]
                command += ["--peak", who, str(M), str(B)]
                command += ["--quantize", args.quantize] if args.quantize and who == "ours" else []
                found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(f"| {M} | {B} | {found[0]:.2f} | {found[1]:.2f} | {B * limits.held(M) / 2**30:.2f} |", flush=True)


def peak(args: argparse.Namespace, who: str, M: int, B: int) -> float:
    llm = latentmem.load(args.model, dtype=args.dtype, device="cpu", adapters=None, quantize=args.quantize)
    peer = Peer(llm) if who == "cache" else None
    ids = random_ids(B, PROMPT)

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line for line in lines if line.startswith(field)).split()[1]) / 2**20

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    if peer is None:
        answering(llm, remembering(llm, M, B, max(M, 8), 8), ids, NEW)(None)
    else:
        config, cache = llm.base.config, DynamicCache()
        for i in range(llm.decoder.L if M else 0):
            shape = (B, config.num_key_value_heads, M, head_width(config))
            cache.update(torch.randn(shape, dtype=llm.decoder.dtype), torch.randn(shape, dtype=llm.decoder.dtype), i)
        peer.generate(cache if M else None, ids, NEW)
    return status("VmHWM") - before


if __name__ == "__main__":
    main()
