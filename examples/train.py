"""Teach a model to use its memory, on invented texts: no hub, no data set; ten minutes on two cores.

`latentmem train config.yaml --out run` does the same; killed at any moment, the same command goes on.
"""

# %%
import json
import os
import tempfile
from pathlib import Path

import latentmem
from latentmem.train import config, loop

MODEL, STEPS = os.environ.get("LATENTMEM_MODEL", "smollm2-135m"), int(os.environ.get("STEPS", "40"))
FIRST, LAST = ("Ada", "Bo", "Cyra", "Dag", "Edda", "Finn", "Gro"), ("Brix", "Lund", "Okafor", "Torvald", "Vance")
TRADES = ("plumber", "baker", "joiner", "pilot", "weaver")
rows = []
for i in range(210):
    name, trade = f"{FIRST[i % 7]} {LAST[i % 5]}", TRADES[i // 7 % 5]
    text = f"House number {i} belongs to {name}, who came to the town in {1900 + i} and works as a {trade}."
    for question, answer in ((f"Who owns house {i}?", name), (f"What is the trade of {name}?", trade)):
        rows.append({"title": "held out" if i < 20 else "", "context": text, "question": question, "answers": [answer]})

# %%
folder = Path(tempfile.mkdtemp())
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
settings = {"model": MODEL, "data": [{"path": str(folder / "rows.jsonl"), "kind": "questions"}]}
settings |= {"objectives": {"recall": 1}, "texts": {"shortest": 8, "longest": 128}, "memory": {"N": 512, "K": 128}}
settings |= {"steps": {"total": STEPS}, "watch": {"probe": 0, "titles": ["held out"], "tensorboard": False}}
run = loop.Run(config.build(config.Config, settings, ""), folder / "run")
run.train(lambda done, total, row: print(f"step {done} of {total}: loss {row['loss']:.2f}") if done % 5 == 0 else None)

# %%
for adapters in (None, str(folder / "run" / "adapters.safetensors")):
    llm, asked = latentmem.load(MODEL, adapters=adapters), rows[:40]  # of the 20 texts that were held out
    memories = llm.write([llm.empty() for _ in asked], [row["context"] for row in asked])
    answers = llm.ask(memories, [row["question"] for row in asked], max_new_tokens=12)
    right = sum(answer == row["answers"][0] for answer, row in zip(answers, asked, strict=True))
    print("trained:" if adapters else "untrained:", right, "of", len(asked), f"right to the letter; {answers[0]!r}")
