"""What a memory of coded updates answers, beside the same memory of hidden states: paired, written through.

    python benchmarks/forms.py --data squad --questions 400 --forms exact int8 coded
    python benchmarks/forms.py --data squad --questions 400 --forms exact coded --longterm 512 --capacity 1536
    python benchmarks/forms.py --data strings --questions 200 --forms exact coded

Texts are written one after another into one memory of each form. The questions about a text are asked right after it
was written, and after so many others; every form gets the same texts and questions. A question counts by the share of
its answer's tokens that the model would say next, each after the right ones before it.

    squad        Wikipedia paragraphs, answers of at most 3 tokens, 3 questions a text
    synthetic    invented facts, as in `latentmem eval retention`
    strings      one line a text, asked once all are written: phone numbers, IBANs, hashes, prices, versions,
                 coordinates; hit: the greedy answer
                 holds the string

KL is that of the next token at each place of the answer, hidden states against the form, in nats.
"""

import argparse
import random
from collections import defaultdict
from datetime import date
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import latentmem
from latentmem.core.memory import Memory
from latentmem.evaluate import stats
from latentmem.evaluate.data import questions
from latentmem.model.context import placed
from latentmem.model.model import MemoryModel

SEED, NEW_TOKENS, AT_ONCE = 2026, 24, 10
EXACT = "exact"


class Asked(NamedTuple):
    question: str
    answer: str


class Told(NamedTuple):
    id: str
    text: str
    asked: list[Asked]


def _digits(draw: random.Random, n: int) -> str:
    return "".join(draw.choice("0123456789") for _ in range(n))


def _line(draw: random.Random, i: int) -> Told:
    """A sentence with an exact string, and what asks for it."""
    who = f"{draw.choice(('Kar', 'Bel', 'Tor', 'Mun', 'Val', 'Sten'))}{draw.choice(('wick', 'mere', 'dale', 'stow'))}"
    kinds = (
        ("phone number of the clinic in", lambda: f"+{_digits(draw, 2)} {_digits(draw, 3)} {_digits(draw, 6)}"),
        (
            "IBAN of the club in",
            lambda: f"DE{_digits(draw, 2)} {_digits(draw, 4)} {_digits(draw, 4)} {_digits(draw, 4)}",
        ),
        ("commit hash of the build in", lambda: "".join(draw.choice("0123456789abcdef") for _ in range(8))),
        ("price of the lamp in", lambda: f"{draw.randrange(11, 990)}.{_digits(draw, 2)} euros"),
        ("version of the program in", lambda: f"{draw.randrange(20)}.{draw.randrange(40)}.{draw.randrange(90)}"),
        (
            "position of the tower in",
            lambda: f"{draw.randrange(89)}.{_digits(draw, 4)} N, {_digits(draw, 2)}.{_digits(draw, 4)} E",
        ),
    )
    what, make = kinds[i % len(kinds)]
    value = make()
    return Told(f"line {i}", f"The {what} {who} is {value}.", [Asked(f"What is the {what} {who}?", value)])


def told(llm: MemoryModel, name: str, count: int) -> list[Told]:
    """Texts with so many questions together."""
    if name == "strings":
        draw = random.Random(SEED)
        return [_line(draw, i) for i in range(count)]
    some = questions.load(name, lambda s: len(llm.tokenizer(s, add_special_tokens=False)["input_ids"]),
                          questions=count, per_text=3, seed=0)  # fmt: skip
    return [Told(t.id, t.text, [Asked(q.question, q.answers[0]) for q in t.questions]) for t in some.texts]


def expected(llm: MemoryModel, memory: Memory, asked: list[Asked]) -> list[tuple[Tensor, Tensor]]:
    """Of each question the log probabilities at each place of its answer, [n, vocab], and the answer's tokens [n]."""
    prompts = llm.prompts_or_raise()
    rows = [(torch.tensor(prompts.question(a.question, bare=True)), torch.tensor(prompts.answer(a.question, a.answer)))
            for a in asked]  # fmt: skip
    context = llm.retrieved(llm.context(memory), [question for question, _ in rows])
    tokens = pad_sequence([torch.cat(row) for row in rows], batch_first=True)
    with torch.no_grad(), llm.using(context.reader):
        logits = llm.base(
            input_ids=tokens,
            **placed(context.lengths, torch.ones_like(tokens)),
            past_key_values=context.cache(llm.decoder, store=False),
            use_cache=False,
        ).logits
    both = zip(logits, rows, strict=True)
    return [(row[len(q) - 1 : len(q) - 1 + len(a)].float().log_softmax(-1), a) for row, (q, a) in both]


def hits(llm: MemoryModel, memory: Memory, asked: list[Asked]) -> list[float]:
    """Of each question whether the greedy answer holds the string."""
    prompts = llm.prompts_or_raise()
    ids = [prompts.question(a.question, bare=True) for a in asked]
    rows = llm.generate_rows(llm.context(memory), ids, NEW_TOKENS)
    said = [llm.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return [float(a.answer in text) for a, text in zip(asked, said, strict=True)]


def shown(values: list[float], groups: list[str], digits: int) -> str:
    estimate = stats.mean(values, groups)
    if estimate is None:
        return "-"
    return f"{estimate.mean:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


class Results:
    """Values by (form, step), in the order of the questions; and the texts that they are about."""

    def __init__(self) -> None:
        self.accuracy: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.likelihood: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.hits: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.kl: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.texts: dict[int, list[str]] = defaultdict(list)

    def add(self, llm: MemoryModel, step: int, text: Told, memories: dict[str, Memory], exactly: bool) -> None:
        base: list[tuple[Tensor, Tensor]] = []
        self.texts[step] += [text.id] * len(text.asked)
        for form, memory in memories.items():
            rows = expected(llm, memory, text.asked)
            base = base or rows
            for (mine, answer), (theirs, _) in zip(rows, base, strict=True):
                self.accuracy[form, step].append((mine.argmax(-1) == answer).double().mean().item())
                self.likelihood[form, step].append(mine.gather(1, answer[:, None]).mean().item())
                self.kl[form, step].append((theirs.exp() * (theirs - mine)).sum(-1).mean().item())
            if exactly:
                self.hits[form, step] += hits(llm, memory, text.asked)

    def show(self, forms: list[str]) -> None:
        print("| texts since | form | n | accuracy | less exact, points | log-lik. less exact | KL mean, max | hits |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for step in sorted(self.texts):
            groups = self.texts[step]
            for form in forms:
                at, base = (form, step), (forms[0], step)
                worse = [100 * (a - b) for a, b in zip(self.accuracy[at], self.accuracy[base], strict=True)]
                less = [a - b for a, b in zip(self.likelihood[at], self.likelihood[base], strict=True)]
                cells = [shown(self.accuracy[at], groups, 3), shown(worse, groups, 1), shown(less, groups, 3)]
                cells.append(f"{sum(self.kl[at]) / len(groups):.4f}, {max(self.kl[at]):.2f}")
                cells.append(shown(self.hits[at], groups, 2) if self.hits[at] else "-")
                print(f"| {step} | {form} | {len(groups)} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--coder", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data", choices=("squad", "synthetic", "strings"), default="squad")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--forms", nargs="+", default=[EXACT, "int8", "coded"])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 5, 10, 20, 50])
    parser.add_argument("--capacity", "-N", type=int, default=2048)
    parser.add_argument("--longterm", type=int, default=0)
    options = parser.parse_args()
    llm = latentmem.load(options.model, dtype=options.dtype, coder=options.coder)
    texts = told(llm, options.data, options.questions)
    memories = {form: llm.empty(options.capacity, longterm=options.longterm, form=form) for form in options.forms}
    results = Results()
    for i in range(len(texts)):
        for form, memory in memories.items():
            memories[form] = llm.write(memory, texts[i].text, source=texts[i].id)
        for step in options.steps if options.data != "strings" else ():
            if step <= i:
                results.add(llm, step, texts[i - step], memories, False)
        print(f"\r{i + 1} of {len(texts)} texts", end="", flush=True)
    if options.data == "strings":
        for i in range(0, len(texts), AT_ONCE):
            some = texts[i : i + AT_ONCE]
            results.add(llm, len(texts), Told(f"lines {i}", "", [t.asked[0] for t in some]), memories, True)
            print(f"\r{i + len(some)} of {len(texts)} questions", end="", flush=True)
    settings = next(iter(memories.values())).settings
    print(f"\n{date.today()}, {llm!r}, {options.data}: {len(texts)} texts, N={settings.N}, R={options.longterm}")
    for form, memory in memories.items():
        sizes = [(one.nbytes, len(one)) for one in memory.written.values()]
        if sizes:
            print(f"{form}: {sum(n for n, _ in sizes) / sum(k for _, k in sizes):.0f} bytes a token with sketch and id")
    results.show(options.forms)


if __name__ == "__main__":
    main()
