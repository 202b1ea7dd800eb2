"""Which wrapping of a written text, and which way to put a question, does the packaged model answer best?

Every question is asked on a memory that holds its paragraph alone (so nothing is forgotten: this measures prompts, not
retention). Questions come from SQuAD's 13 training articles, never from the articles kept for evaluation.

    LATENTMEM_DATA=... python benchmarks/prompts.py --questions 100 --out docs/results/prompts

Goes on where it was stopped: finished rows are kept in OUT.jsonl. Writes OUT.md as well.
"""

import argparse
import gzip
import json
import os
import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.progress import Progress

import latentmem
from latentmem.evaluate.stats import mean
from latentmem.model.prompts import Prompts, Style

WRAPS = ("raw", "system", "user")
BRIEF = "{question}\nAnswer with a few words."
BRIEFLY = "{question} Answer briefly."
QUESTIONS = {
    "plain": Style(),
    "brief": Style(question=BRIEF),
    "plain, no system turn": Style(system=""),
    "briefly, no system turn": Style(question=BRIEFLY, system=""),
    "brief, no system turn": Style(question=BRIEF, system=""),
}


def samples(count: int, seed: int) -> list[dict]:
    """`count` questions over different paragraphs, drawn by seed."""
    folder = os.environ.get("LATENTMEM_DATA")
    if not folder:
        raise SystemExit("set LATENTMEM_DATA to a folder with squad/train_13_titles.jsonl.gz (SQuAD v1.1 dev articles)")
    with gzip.open(Path(folder) / "squad" / "train_13_titles.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    order = np.random.default_rng(seed).permutation(len(rows))
    chosen, contexts = [], set()
    for i in order:
        if rows[i]["context"] not in contexts and len(chosen) < count:
            contexts.add(rows[i]["context"])
            chosen.append(rows[i])
    return chosen


def interval(values: list[float]) -> str:
    """Mean and its 95% bootstrap interval over questions."""
    found = mean(values, range(len(values)))
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def measure(llm: latentmem.MemoryModel, memory: latentmem.Memory, prompt: list[int], answer: str) -> dict[str, float]:
    """Hit of 16 greedy tokens, and accuracy and log-likelihood per token of the gold answer."""
    gold = llm.prompts_or_raise().text(answer)
    score = llm.score(memory, prompt, gold)
    output = llm.generate_ids(memory, prompt, max_new_tokens=16)[0, len(prompt) :]
    said = llm.tokenizer.decode(output, skip_special_tokens=True)
    return {
        "hit": float(answer.lower() in said.lower()),
        "accuracy": score.hits.float().mean().item(),
        "loglik": score.logprobs.mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/prompts"))
    args = parser.parse_args()

    llm = latentmem.load(adapters=None)
    rows = samples(args.questions, args.seed)
    journal = args.out.with_suffix(".jsonl")
    journal.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if journal.exists():
        done = {tuple(r["key"]): r for r in map(json.loads, journal.read_text().splitlines())}
    with Progress() as progress, journal.open("a") as file:
        task = progress.add_task("questions", total=len(rows))
        for row in rows:

            def record(name: tuple[str, str], memory: latentmem.Memory, prompt: list[int], row: dict = row) -> None:
                key = (row["id"], *name)
                if key not in done:
                    done[key] = {"key": key, **measure(llm, memory, prompt, _answer(row))}
                    file.write(json.dumps(done[key]) + "\n")
                    file.flush()

            empty = llm.empty()
            for name, style in QUESTIONS.items():
                llm.prompts = Prompts(llm.tokenizer, style)
                asked = llm.prompts.question(row["question"], bare=False)
                record(("no memory", name), empty, asked)
                together = f"{row['context']}\n\n{row['question']}"
                record(("in the same user turn", name), empty, llm.prompts.question(together, bare=False))
            for wrap in WRAPS:
                if all((row["id"], wrap, name) in done for name in QUESTIONS):
                    continue
                memory = llm.write(empty, row["context"], role=wrap)
                for name, style in QUESTIONS.items():
                    llm.prompts = Prompts(llm.tokenizer, style)
                    record((wrap, name), memory, llm.prompts.question(row["question"], bare=True))
            progress.advance(task)

    ids = {row["id"] for row in rows}
    places = [(where, name) for where in ("no memory", "in the same user turn", *WRAPS) for name in QUESTIONS]
    accuracy = {place: [done[i, *place]["accuracy"] for i in sorted(ids)] for place in places}
    best = max((place for place in places if place[0] in WRAPS), key=lambda place: sum(accuracy[place]))
    columns = ("text is written", "question is put", "hits", "token accuracy", "log-likelihood per token", "paired")
    table = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for place in places:
        found = [done[i, *place] for i in sorted(ids)]
        cells = [interval([r[metric] for r in found]) for metric in ("hit", "accuracy", "loglik")]
        cells.append(interval([a - b for a, b in zip(accuracy[place], accuracy[best], strict=True)]))
        table.append(f"| {' | '.join((*place, *cells))} |")
    table.append(f"\nPaired: token accuracy minus that of '{', '.join(best)}', the best, question by question.")
    text = (
        f"`python benchmarks/prompts.py --questions {args.questions} --seed {args.seed}`, {date.today()}, "
        f"n = {len(rows)} questions, one paragraph each, mean and 95% bootstrap interval; fp32, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, latentmem {latentmem.__version__}, "
        f"{platform.machine()}.\n\n" + "\n".join(table) + "\n"
    )
    args.out.with_suffix(".md").write_text(text)
    print(text)


def _answer(row: dict) -> str:
    return row["answers"]["text"][0]


if __name__ == "__main__":
    main()
