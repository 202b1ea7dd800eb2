"""How a long-term memory finds the right text, and where what it found should stand: the ways that were tried.

    LATENTMEM_DATA=... python benchmarks/retrieval.py --questions 60

SQuAD paragraphs, each an update of its own, are written one after another and dropped into the long-term part.
*Finding*: every way ranks all updates for a question; counted is how often the paragraph that the question is about
comes first, or among the first three. *Placing*: token accuracy of the gold answer with the same slots in three orders.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import latentmem
from latentmem import longterm
from latentmem.core.memory import Memory
from latentmem.decoder.adapters import READ
from latentmem.decoder.cache import KVPrefix, attention_mask, memory_cache
from latentmem.decoder.hooks import layers_seen
from latentmem.evaluate.data import questions as sets
from latentmem.longterm.ranking import marks
from latentmem.longterm.search import Retrieval
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel

SETS = {"1 to 3": range(1, 4), "0": range(1), "2": range(2, 3), "0 to 5": range(6), "6 to 12": range(6, 13)}


def hidden_states(llm: MemoryModel, memory: Memory, ids: Tensor) -> list[Tensor]:
    """What each layer gets of a question behind the first position alone, [n, d] each."""
    prefix = llm.prefix(memory)
    first = [lambda kv=kv: kv for kv in prefix.first]
    cache = memory_cache([KVPrefix(prefix.s, first)], llm.decoder, store=False)
    with torch.no_grad(), llm.using(READ), layers_seen(llm.decoder) as seen:
        mask = attention_mask(cache, ids[None])
        llm.decoder.body(input_ids=ids[None], attention_mask=mask, past_key_values=cache, use_cache=False)
    return [hidden[0] for hidden in seen]


def attended(llm: MemoryModel, i: int, hidden: Tensor, slots: Tensor) -> Tensor:
    """Queries of layer i against unrotated keys of slots, the largest of all heads, [n, S]."""
    attention: Any = llm.decoder.layers[i].self_attn
    with torch.no_grad(), llm.using(READ):
        keys = llm.decoder.project(i, slots)[0][0].float()
        queries = attention.q_proj(llm.decoder.normed(i, hidden)).unflatten(-1, (-1, attention.head_dim))
        queries = queries.transpose(0, 1).float()
    keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    return (queries @ keys.transpose(1, 2)).amax(0)


def plain_mean(fits: Tensor, births: Tensor) -> Tensor:
    """Like `marks`, each token counting as much as any other: in units of its own spread."""
    top = fits.new_full((len(fits), int(births.max()) + 1), float("-inf"))
    top.scatter_reduce_(1, births.long().expand(len(fits), -1), fits, "amax")
    some = top > float("-inf")
    count = some.sum(1, keepdim=True)
    beyond = top - top.where(some, 0).sum(1, keepdim=True) / count
    spread = (beyond.where(some, 0).square().sum(1, keepdim=True) / count).sqrt()
    return (beyond / (spread + 1e-6)).where(some, float("-inf")).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only-int8", action="store_true", help="only slots in 8 bits beside those that are not")
    args = parser.parse_args()
    llm = latentmem.load(args.model, dtype="bfloat16")
    prompts = llm.prompts_or_raise()
    data = sets.load("squad", lambda text: len(prompts.text(text)), questions=200, per_text=5, seed=0)
    print(f"`python benchmarks/retrieval.py --questions {args.questions}`, {date.today()}, {args.model}, bfloat16,")
    print(f"{len(data.texts)} SQuAD paragraphs, {args.questions} questions about them\n")
    asked = [(text.id, question) for text in data.texts for question in text.questions]
    random.Random(0).shuffle(asked)
    if not args.only_int8:
        finding(llm, data, asked[: args.questions])
        placing(llm, data, asked[: args.questions])
    in_8_bits(llm, data, args.questions)


def finding(llm: MemoryModel, data: Any, asked: list[tuple[str, Any]]) -> None:
    prompts = llm.prompts_or_raise()
    memory = llm.empty(N=512, K=512, longterm={"R": 32, "limit": 1 << 40})
    own: dict[str, int] = {}
    for text in data.texts:
        memory = llm.write_ids(memory, prompts.written(text.text), source=text.id)
        own[text.id] = memory.updates
    memory = llm.write_ids(memory, torch.randint(100, 1000, (512,)), source="flood")  # all texts are stored now
    store = longterm.of(memory)
    assert store is not None
    births, ranks = store.births, dict[tuple[str, str, str], list[int]]()
    for name, question in asked:
        ids = torch.tensor(prompts.question(question.question, bare=True))
        hidden, asking = hidden_states(llm, memory, ids), llm.question_mask(ids)
        totals: dict[tuple[str, str, str], Tensor] = {}

        def add(way: str, tokens: str, i: int, mark: Tensor, totals: dict = totals) -> None:
            for layers, some in {**SETS, "all": range(llm.decoder.L)}.items():
                if i in some:
                    totals[way, tokens, layers] = totals.get((way, tokens, layers), 0) + mark

        for i in range(llm.decoder.L):
            slots = torch.cat([span.stored.slots[i] for span in store.ranges])
            theirs = attended(llm, i, hidden[i], slots)
            add("attention of the layer", "all", i, marks(theirs, births[i], memory.updates + 1))
            if i < 13:
                seen, kept = (normalize(llm.decoder.normed(i, some), dim=-1) for some in (hidden[i], slots))
                likeness = seen @ kept.T
                for tokens, some in (("all", torch.ones_like(asking)), ("question", asking)):
                    fits = likeness[some].float()
                    add("likeness, what stands out", tokens, i, marks(fits, births[i], memory.updates + 1))
                    add("likeness, all tokens alike", tokens, i, plain_mean(fits, births[i]))
        for key, total in totals.items():
            ranks.setdefault(key, []).append(int((total > total[own[name]]).sum()))
    print(f"{int(store.occupied.sum(1).min()):,} slots of {memory.updates} updates\n")
    print("| way | tokens | layers | first | among the first three |\n| --- | --- | --- | --- | --- |")
    for (way, tokens, layers), found in ranks.items():
        if way.startswith("likeness") and layers == "all":
            continue
        shares = (sum(rank < k for rank in found) / len(found) for k in (1, 3))
        print(f"| {way} | {tokens} | {layers} | {' | '.join(f'{share:.2f}' for share in shares)} |")


def behind_others(llm: MemoryModel, data: Any, **settings: Any) -> Memory:
    """A full memory into which ten texts and then 24 others were written."""
    memory = llm.empty(N=1536, K=512, longterm={"R": 512, "limit": 1 << 40, **settings})
    for text in [*data.unrelated[60:72], *data.texts[:10], *data.unrelated[:24]]:
        ids = llm.prompts_or_raise().written(text if isinstance(text, str) else text.text)
        memory = llm.write_ids(memory, ids, source="" if isinstance(text, str) else text.id)
    return memory


def in_8_bits(llm: MemoryModel, data: Any, count: int) -> None:
    """The same texts in a long-term part of 8 bits."""
    prompts = llm.prompts_or_raise()
    print(f"\n| stored in | bytes | token accuracy, {count} questions | slots retrieved that are the same |")
    print("| --- | --- | --- | --- |")
    first: list[Tensor] = []
    for int8 in (False, True):
        memory = behind_others(llm, data, int8=int8)
        assert memory.longterm is not None
        found, same = [], []
        for i, question in enumerate([q for text in data.texts[:10] for q in text.questions][:count]):
            ids = llm.ids(prompts.question(question.question, bare=True))
            chosen = llm.retrieve(memory, ids)
            assert chosen is not None
            places = torch.stack(chosen.places)
            first += [] if int8 else [places]
            same.append(sum(len(set(a) & set(b)) for a, b in zip(places.tolist(), first[i].tolist(), strict=True)))
            score = llm.score(memory, ids, prompts.answer(question.question, question.answers[0]))
            found.append(score.hits.double().mean().item())
        share = sum(same) / len(same) / (memory.L * memory.R)
        cells = ("8 bits" if int8 else str(llm.decoder.dtype)[6:], f"{memory.longterm.nbytes / 1e6:.0f} MB")
        print(f"| {cells[0]} | {cells[1]} | {sum(found) / len(found):.3f} | {share:.3f} |", flush=True)


def placing(llm: MemoryModel, data: Any, asked: list[tuple[str, Any]]) -> None:
    """The same slots retrieved, in three orders."""
    prompts, memory = llm.prompts_or_raise(), behind_others(llm, data)
    store = longterm.of(memory)
    assert store is not None

    def in_front(chosen: Retrieval) -> list[Tensor]:
        return [torch.arange(len(order)) for order in chosen.order]

    def as_written(chosen: Retrieval) -> list[Tensor]:
        own = memory.births.long() << 32 | store.places.long()
        return [
            torch.cat([store.orders[i][places], own[i]]).argsort(stable=True) for i, places in enumerate(chosen.places)
        ]

    ways: dict[str, Callable[[Retrieval], list[Tensor]]] = {
        "in front, oldest first (M+)": in_front,
        "where they were written": as_written,
        "the best updates last (ours)": lambda chosen: chosen.order,
    }
    some = [question for text in data.texts[:10] for question in text.questions]
    found: dict[str, list[float]] = {way: [] for way in ways}
    for question in some[: len(asked)]:
        ids = llm.ids(prompts.question(question.question, bare=True))
        answer = prompts.answer(question.question, question.answers[0])
        chosen = llm.retrieve(memory, ids)
        assert chosen is not None
        for way, order in ways.items():
            front = llm.front_with(memory, replace(chosen, order=order(chosen)), ids)
            score = llm.score_rows(Context((front,), (llm.room(memory),), READ), [ids], [answer])[0]
            found[way].append(score.hits.double().mean().item())
    print(f"\n| the same slots, {len(found['where they were written'])} questions | token accuracy |\n| --- | --- |")
    for way, values in found.items():
        print(f"| {way} | {sum(values) / len(values):.3f} |")


if __name__ == "__main__":
    main()
