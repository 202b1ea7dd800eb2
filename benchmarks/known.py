"""How well `DrawnOn.known` tells whether what was asked stands in the memory: its weights, and how often it errs.

    python benchmarks/known.py --n 60 --lists 2 --out records.jsonl          # asks, fits on one half, tests the other
    python benchmarks/known.py --records records.jsonl --weights known.json  # fits again, and writes the weights

Kinds of questions; a memory of either half has none of the other's texts.

    paragraphs   ten of twenty Wikipedia paragraphs are written into one memory, and questions are about all twenty
    first, third, exact   facts of a person, one or two notes (`benchmarks/facts.py`); written
    near         the notes tell something similar, of another person or thing; not written
    never        nothing that was asked was ever told; not written
"""

import argparse
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import facts as notes  # the scripts beside this one
import torch
from remembering import lists

import latentmem
from latentmem.core.memory import Memory
from latentmem.model.known import Evidence, signs
from latentmem.model.model import MemoryModel
from latentmem.model.provenance import abstains

KINDS = ("third", "first", "exact", "near", "never")
NEW_TOKENS = 24
Record = dict[str, Any]


class Heard(Evidence):
    """Keeps what the estimate is made of."""

    last: tuple[float, ...] = ()

    def known(self, *told: Any) -> float:
        Heard.last = signs(*told)
        return 0.5


def asked(llm: MemoryModel, memory: Memory, question: str, **facts: Any) -> Record:
    answer, Heard.last = llm.ask(memory, question, max_new_tokens=NEW_TOKENS), ()
    if answer:
        llm.drawn_on(memory, question, answer)
    return {"question": question, "answer": answer, "signs": Heard.last, **facts}


def records(llm: MemoryModel, n: int, count: int) -> Iterator[Record]:
    """Questions of both halves, by turns of a memory."""
    for kind in KINDS:
        for number, item in enumerate(notes.sample(kind, n, 30)):
            memory = llm.empty()
            for note in item.notes:
                memory = llm.write(memory, note)
            for ask in item.asks:
                told = kind not in ("near", "never")
                yield asked(llm, memory, ask.question, kind=kind, number=number, known=told, test=number % 2 == 1)
    for number, texts in enumerate(lists(llm, 20, 2 * count)):
        memory = llm.empty()
        for text in texts[::2]:
            memory = llm.write(memory, text.text, source=text.id)
        for i, text in enumerate(texts):
            for question in text.questions:
                facts = {"kind": "paragraphs", "number": number, "known": i % 2 == 0, "test": number % 2 == 1}
                yield asked(llm, memory, question.question, **facts)


def fitted(some: list[Record]) -> list[float]:
    """Weights by logistic regression."""
    x = torch.tensor([[1.0, *r["signs"]] for r in some], dtype=torch.float64)
    y = torch.tensor([float(r["known"]) for r in some], dtype=torch.float64)
    spread = x.std(0).where(x.std(0) > 0, 1.0)
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        out = torch.nn.functional.binary_cross_entropy_with_logits(x / spread @ w, y, reduction="sum")
        out = out + 0.01 * w[1:].square().sum()
        out.backward()
        return out

    optimizer.step(loss)
    return [round(float(v), 4) for v in w.detach() / spread]


def show(some: list[Record], evidence: Evidence) -> None:
    """How often the estimate is on the wrong side, of the answers to one half that say something, by kind."""
    print("| asked about | written | n | the model abstains | answers | taken as known |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, told in sorted({(r["kind"], r["known"]) for r in some}):
        mine = [r for r in some if (r["kind"], r["known"]) == (kind, told)]
        silent = [float(abstains(r["answer"])) for r in mine]
        answered = [r for r in mine if r["signs"] and not abstains(r["answer"])]
        sums = (sum(w * s for w, s in zip(evidence.weights, (1.0, *r["signs"]), strict=True)) for r in answered)
        known = notes.estimate([float(one > 0) for one in sums], [r["number"] for r in answered])
        share = notes.estimate(silent, [r["number"] for r in mine])
        print(f"| {kind} | {'yes' if told else 'no'} | {len(mine)} | {share} | {len(answered)} | {known} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=60, help="questions of each kind of notes, both halves")
    parser.add_argument("--lists", type=int, default=2, help="of twenty paragraphs, of each half")
    parser.add_argument("--out", type=Path, default=Path("known.jsonl"), help="records, a line each")
    parser.add_argument("--records", type=Path, help="of an earlier run: nothing is asked")
    parser.add_argument("--weights", type=Path, help="file for the weights, JSON")
    options = parser.parse_args()
    llm = latentmem.load(dtype="float32")
    llm.evidence = Heard("", "", (0.0,) * 5)
    if options.records is None:
        with options.out.open("w") as file:
            for i, one in enumerate(records(llm, options.n, options.lists)):
                print(json.dumps(one), file=file, flush=True)
                print(f"\r{i + 1} questions", end="", flush=True)
    some = [json.loads(line) for line in (options.records or options.out).read_text().splitlines()]
    answered = [one for one in some if one["signs"] and not abstains(one["answer"])]
    identities = llm.identities
    evidence = Evidence(
        identities["model"], identities["adapters"], tuple(fitted([r for r in answered if not r["test"]]))
    )
    print(f"\n{date.today()}, {llm!r}: {len(some)} questions; weights {evidence.weights}")
    show([r for r in some if r["test"]], evidence)
    if options.weights:
        facts = {"model": evidence.model, "adapters": evidence.adapters, "weights": evidence.weights}
        options.weights.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
