"""How fast is a memory beside the authors' released code, at the shape of SmolLM2-135M?

Both run the same random checkpoint (N 1920, K 64, bos, mark, a LoRA pair of rank 8) in float32 with as many threads, each
in a process of its own, in turns. Theirs needs an environment of its own, since it is written for transformers 4:

    git clone https://github.com/wangyu-ustc/MemoryLLM released && git -C released checkout 5acaf52
    python -m venv theirs && theirs/bin/pip install torch==2.13.0 transformers==4.48.2 peft==0.10.0 accelerate==1.2.0 'numpy<2'
    python benchmarks/released.py --python theirs/bin/python --code released

Its file imports a module for flash attention only where that is installed; on a CPU both use torch's own attention.
"""  # noqa: E501 - commands stand on one line

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

BLOCKS, K = 30, 64
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": False,  # as in the released checkpoints
}
TARGETS = ["q_proj", "v_proj", "k_proj", "up_proj", "down_proj", "gate_proj"]
PROMPT, NEW = 20, 16  # tokens of a question, and of an answer behind its first token
TEXTS = (128, 512)


def ids(n: int) -> torch.Tensor:
    return torch.randint(1000, 40_000, (1, n), generator=torch.Generator().manual_seed(n))


# --- in the environment of the released code ------------------------------------------------------------------------


def serve(code: str, folder: str, threads: int) -> None:
    """Make the checkpoint, save it to `folder`, then answer each line of stdin, a job, with its seconds."""
    answers, sys.stdout = sys.stdout, sys.stderr  # the released code prints
    sys.path.insert(0, code)
    torch.set_num_threads(threads)
    from configuration_memoryllm import MemoryLLMConfig  # type: ignore[import-not-found]
    from modeling_memoryllm import MemoryLLM  # type: ignore[import-not-found]

    torch.manual_seed(0)
    lora = {"inference_mode": False, "r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": TARGETS}
    memory = {"num_blocks": BLOCKS, "num_tokens": K, "num_memory_tokens": BLOCKS * K, "drop_memory_per_layer": True}
    config = MemoryLLMConfig(**SHAPE, **memory, add_bos_embedding=True, add_decoder_lora=True, lora_config=lora)
    model = MemoryLLM._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.normal_(std=0.02)
        model.initialized.fill_(1)
    model.save_pretrained(folder)
    jobs: dict[str, Callable[[], Any]] = {
        **{f"write {n}": lambda n=n: model.inject_memory(ids(n), update_memory=True) for n in TEXTS},
        **{f"generate {n}": lambda n=n: generate(model, n) for n in (1, 1 + NEW)},
        "logits": lambda: model(ids(PROMPT), use_cache=False).logits[0, -PROMPT:].tolist(),
        "peak": peak,
    }
    for line in sys.stdin:
        start = time.perf_counter()
        with torch.no_grad():
            result = jobs[line.strip()]()
        seconds = time.perf_counter() - start
        result = result if line.strip() in ("logits", "peak") else None
        print(json.dumps({"seconds": seconds, "result": result}), file=answers, flush=True)


def generate(model: Any, new: int) -> None:
    prompt = ids(PROMPT)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)


# --- here -----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment of the released code")
    parser.add_argument("--code", required=True, help="a folder with the released code")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.code, args.serve, args.threads)
        return
    import latentmem

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        command = [args.python, str(Path(__file__)), "--python", args.python, "--code", args.code]
        command += ["--serve", folder, "--threads", str(args.threads)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def ask(job: str) -> dict[str, Any]:
            print(job, file=child.stdin, flush=True)
            line = child.stdout.readline()  # type: ignore[union-attr]
            if not line:
                raise SystemExit("the released code ended; its error stands above.")
            answer: dict[str, Any] = json.loads(line)
            return answer

        theirs = torch.tensor(ask("logits")["result"])
        llm = latentmem.load(folder, dtype="float32", device="cpu")
        compare(llm, theirs, ask, args)
        child.stdin.close()  # type: ignore[union-attr]
        child.wait()


def compare(llm: Any, theirs: torch.Tensor, ask: Callable[[str], dict[str, Any]], args: argparse.Namespace) -> None:
    memory, prompt = llm.empty(), ids(PROMPT)[0]
    options = [{"max_new_tokens": new, "min_new_tokens": new} for new in (1, 1 + NEW)]
    jobs: dict[str, Callable[[], Any]] = {
        **{f"write {n}": lambda n=n: llm.write_ids(memory, ids(n)[0]) for n in TEXTS},
        **{f"generate {1 + i * NEW}": lambda i=i: llm.generate_ids(memory, prompt, **options[i]) for i in (0, 1)},
    }
    cold: dict[str, tuple[float, float]] = {}
    warm: dict[str, list[tuple[float, float]]] = {job: [] for job in jobs}
    for turn in range(1 + args.runs):
        for job, run in jobs.items():
            start = time.perf_counter()
            run()
            pair = (time.perf_counter() - start, ask(job)["seconds"])
            if turn:
                warm[job].append(pair)
            else:
                cold[job] = pair
    apart = (llm.logits(memory, prompt) - theirs).abs().max().item()  # not earlier: it makes keys and values
    ours, others = ({job: statistics.median(p[i] for p in pairs) for job, pairs in warm.items()} for i in (0, 1))
    given = f"--python theirs/bin/python --code released --runs {args.runs} --threads {args.threads}"  # as above
    print(f"`python benchmarks/released.py {given}`, {date.today()}, ", end="")
    print(f"torch {torch.__version__}, float32; medians of {args.runs} runs in turns; logits apart by {apart:.0e}\n")
    print("| | ours | released code | times faster | cold: ours | cold: released code |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    last = f"generate {1 + NEW}"
    for job in jobs:
        if job == last:
            a, b = (NEW / (side[last] - side["generate 1"]) for side in (ours, others))
            print(f"| decoding, {NEW} tokens | {a:.1f} tokens/s | {b:.1f} tokens/s | {a / b:.1f} | | |")
        else:
            name = "first token" if job == "generate 1" else f"{job} tokens, one update"
            ms = [f"{x * 1e3:.0f} ms" for x in (ours[job], others[job], *cold[job])]
            print(f"| {name} | {ms[0]} | {ms[1]} | {others[job] / ours[job]:.1f} | {ms[2]} | {ms[3]} |")
    gib = peak(), ask("peak")["result"]
    print(f"| peak memory of the process | {gib[0]:.2f} GiB | {gib[1]:.2f} GiB | | | |")


def peak() -> float:
    """The most memory that this process has held, in GiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


if __name__ == "__main__":
    main()
