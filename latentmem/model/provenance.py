"""Where an answer came from: which slots and sources it drew on, and which tokens a memory still holds."""

from __future__ import annotations

import torch
from torch import Tensor

from latentmem import longterm
from latentmem.core.memory import Memory
from latentmem.decoder.attention import watching
from latentmem.longterm.search import Retrieval
from latentmem.model.backbone import Backbone, Ids
from latentmem.model.context import retrieve
from latentmem.model.prompts import Message
from latentmem.model.scoring import logits


@torch.no_grad()
def attended(llm: Backbone, memory: Memory, ids: Ids, answer: Ids) -> tuple[Tensor, Retrieval | None]:
    """`Reader.attended`, with the long-term slots that `ids` have chosen."""
    asked, said = llm.ids(ids), llm.ids(answer)
    chosen = retrieve(llm, memory, asked)
    with watching(llm.base) as layers:
        logits(llm, memory, torch.cat([asked, said])[None], chosen)
    if len(layers) != llm.decoder.L:
        raise ValueError(f"the attention of {llm.name} gave weights in {len(layers)} of {llm.decoder.L} layers.")
    P = llm.positions(memory)
    start = P - memory.M - memory.R
    mass = torch.stack([layer[-len(said) - 1 : -1, start:P].mean(0) for layer in layers]).cpu()
    if chosen:
        mass = mass.gather(1, torch.stack(chosen.order).argsort(1))
    return mass, chosen


@torch.no_grad()
def sources_of(llm: Backbone, memory: Memory, question: str | list[Message], answer: str) -> dict[str, float]:
    """`Reader.sources_of`."""
    if memory.is_empty:
        return {}
    prompts = llm.prompts_or_raise()
    if isinstance(question, str):
        asked, said = prompts.question(question, bare=True), prompts.answer(question, answer)
    else:
        asked, said = prompts.chat(question, bare=True), prompts.text(answer if prompts.chats else f" {answer}")
    mass, chosen = attended(llm, memory, asked, said)
    mass = mass / mass.sum(1, keepdim=True)
    origins = memory.origins
    if (store := longterm.of(memory)) is not None and chosen:
        retrieved = store.origins.gather(1, torch.stack(chosen.places))
        origins = torch.cat([retrieved, origins], dim=1)
    names = {i: source.name for i, source in enumerate(memory.sources)}
    older = {-1: ""} if (origins < 0).any() else {}
    return {name: (mass * (origins == i)).sum(1).mean().item() for i, name in {**older, **names}.items()}


@torch.no_grad()
def text_of(llm: Backbone, memory: Memory) -> Tensor:
    """`Reader.text_of`."""
    llm.check(memory)
    table = torch.nn.functional.normalize(llm.base.get_input_embeddings().weight.float(), dim=1)
    slots = torch.nn.functional.normalize(memory.slots[0].to(table), dim=1)
    nearest = [(part @ table.T).max(dim=1) for part in slots.split(256)]
    return torch.cat([ids.where(likeness > 0.99, -1) for likeness, ids in nearest])
