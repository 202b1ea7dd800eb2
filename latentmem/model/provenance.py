"""What an answer drew on: sources, and sentences of what was written (letters: `latentmem.core`).

    share   of the attention to the memory that each slot of a layer gets while the answer is said              [L, P]
    usual   the share that the slot gets, at the same place, while a neutral question is not answered           [L, P]
    drawn   share * log(share / (2 * usual)), 0 where that is below 0                                           [L, P]

The first slots get most of the attention whatever is asked, so shares alone name the first text. What is drawn, divided
by the sum of all, adds up: over the slots of a source, of an update, or of a sentence.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from latentmem import longterm
from latentmem.coding.decoding import ids_of
from latentmem.core.memory import Memory
from latentmem.decoder.attention import watching
from latentmem.longterm.search import Retrieval
from latentmem.model.backbone import Ids
from latentmem.model.batch import Detokenizer
from latentmem.model.prompts import Message
from latentmem.model.reader import Reader

NEUTRAL = ("What is this about?", "I don't know.")  # a question and an answer that draw on no text more than on others
TIMES = 2  # as much as usual is what any slot may get by chance
LEAST = 1e-6  # a share of attention below which shares are not told apart
PASSAGES = 3  # updates of which sentences are quoted, at most
BESIDE = 0.5  # of the best one, which another update or sentence reaches that is quoted beside it
KEPT = 8  # retrievals of a memory of which the usual shares are kept
SENTENCE = re.compile(r"\S.*?(?:[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[」』”’）]*|$)", re.MULTILINE)


@dataclass(frozen=True)
class Passage:
    """Sentences of one update that an answer drew on.

    Args:
        source: the name under which they were written; "" = older than the memory.
        text: the sentences, " … " between those that were written apart; "" where the memory does not hold every token
            of the update: hidden states of which some were dropped, compressed, or of the preset "paper".
        share: of all that the answer drew on, the share of the update.
    """

    source: str
    text: str
    share: float


@dataclass(frozen=True)
class DrawnOn:
    """What an answer drew on.

    Args:
        sources: name of each source -> share; "" is what is older than the memory. They add up to 1.
        passages: of the updates that the answer drew on most, the largest share first.
        known: estimate from 0 to 1 that what was asked stands in the memory (`latentmem.model.known`); None where no
            weights are there for this model and adapters, or the memory is not searched by update.
    """

    sources: dict[str, float]
    passages: tuple[Passage, ...] = ()
    known: float | None = None


class Tracer(Reader):
    """The verbs of `MemoryModel` that say where an answer came from."""

    def attended(self, memory: Memory, ids: Ids, answer: Ids) -> Tensor:
        """Which slots are attended to: the share of attention that each gets while the answer is said.

        Args:
            ids: what was asked.
            answer: what was said.

        Returns:
            [L, R + M] float32 on the CPU, the R long-term slots first that the question takes; the mean over heads and
            over the answer's tokens. What is missing to 1 in a layer went to the first position and to the text itself.

        Raises:
            ValueError: no ids, a memory of another model, or an attention that shows no weights.
        """
        return self._attended(memory, ids, answer, self.retrieve(memory, self.ids(ids)))[0]

    @torch.no_grad()
    def _attended(self, memory: Memory, ids: Ids, answer: Ids, chosen: Retrieval | None) -> tuple[Tensor, Tensor]:
        """`attended` behind the long-term slots `chosen`, and the log probability of each token of the answer, [n]."""
        asked, said = self.ids(ids), self.ids(answer)
        start = self.first.shape[1]  # made by a pass of its own, which is not watched
        with watching(self.base) as layers:
            logits = self._logits(memory, torch.cat([asked, said]), chosen)[-len(said) - 1 : -1]
        likely = logits.float().log_softmax(-1).gather(1, said[:, None].to(logits.device))[:, 0].cpu()
        if len(layers) != self.decoder.L:
            raise ValueError(f"the attention of {self.name} gave weights in {len(layers)} of {self.decoder.L} layers.")
        P = start + (chosen.length if chosen else memory.M)
        mass = torch.stack([layer[-len(said) - 1 : -1, start:P].mean(0) for layer in layers]).cpu()
        if chosen is not None:
            mass = torch.zeros(memory.L, memory.R + memory.M).scatter(1, torch.stack(chosen.order), mass)
        return mass, likely

    def sources_of(self, memory: Memory, question: str | list[Message], answer: str) -> dict[str, float]:
        """Which sources an answer drew on, as in `drawn_on`: name -> share; an empty memory has none."""
        return self.drawn_on(memory, question, answer).sources

    def drawn_on(self, memory: Memory, question: str | list[Message], answer: str) -> DrawnOn:
        """Which sources and passages an answer drew on: what it attended to more than a neutral question does.

        The neutral question is read once for a memory, and of a searched one once for each choice of slots.

        Args:
            question: as `ask` puts it; or the messages of a chat, of which the last was answered.
            answer: what was said.

        Returns:
            Shares of sources, and passages; of an empty memory nothing.

        Raises:
            ValueError: as `attended`.
        """
        if memory.is_empty:
            return DrawnOn({})
        prompts = self.prompts_or_raise()
        if isinstance(question, str):
            asked, said = prompts.question(question, bare=True), prompts.answer(question, answer)
        else:
            asked, said = prompts.chat(question, bare=True), prompts.text(answer if prompts.chats else f" {answer}")
        chosen = self.retrieve(memory, self.ids(asked))
        mass, likely = self._attended(memory, asked, said, chosen)
        drawn, amount = _beyond(mass, self._usual(memory, chosen))
        origins, births = memory.origins, memory.births
        if memory.longterm is not None and chosen:
            places = torch.stack(chosen.places)
            origins = torch.cat([longterm.sources_of(memory, places), origins], dim=1)
            births = torch.cat([longterm.births_of(memory, places), births], dim=1)
        names = {i: source.name for i, source in enumerate(memory.sources)}
        older = {-1: ""} if (origins < 0).any() else {}
        shares = {name: drawn[origins == i].sum().item() for i, name in {**older, **names}.items()}
        known = None
        if self.evidence and chosen is not None and chosen.marks is not None:
            known = self.evidence.known(amount, likely, chosen.marks, memory.M + memory.R)
            known = 0.0 if abstains(answer) else known
        return DrawnOn(shares, tuple(self._passages(memory, drawn, births, chosen)), known)

    def _usual(self, memory: Memory, chosen: Retrieval | None) -> Tensor:
        """`attended` of the neutral question behind the same slots at the same places."""
        kept = self.usual_shares.setdefault(self.prefix(memory), [])
        for other, mass in kept:
            if chosen is None or (other is not None and other.same(chosen)):
                return mass
        (question, answer), prompts = NEUTRAL, self.prompts_or_raise()
        asked, said = prompts.question(question, bare=True), prompts.answer(question, answer)
        kept.append((chosen, self._attended(memory, asked, said, chosen)[0]))
        del kept[:-KEPT]
        return kept[-1][1]

    # --- passages ---------------------------------------------------------------------------------------------------

    def _passages(self, memory: Memory, drawn: Tensor, births: Tensor, chosen: Retrieval | None) -> Iterator[Passage]:
        """Sentences of the updates that were drawn on most."""
        shares = torch.zeros(memory.updates + 1).index_add(0, births.flatten().int(), drawn.flatten())
        best = shares.topk(min(PASSAGES, len(shares)))
        for share, number in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if share < max(BESIDE * float(best.values[0]), LEAST):
                return
            ids, weights = self._tokens(memory, number, drawn, chosen)
            yield Passage(_source(memory, number), self._quote(ids.tolist(), weights.tolist()), share)

    def _tokens(self, memory: Memory, number: int, drawn: Tensor, chosen: Retrieval | None) -> tuple[Tensor, Tensor]:
        """The tokens of an update, [k], and what was drawn of each, [k]; none where the memory has lost some."""
        none = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        if memory.compression > 1 or not memory.rules.holds_inputs or not number:
            return none
        if memory.settings.by_update:
            slots = memory.slots[:, :, 0]
            slots = torch.cat([torch.stack(chosen.places), slots], 1) if chosen else slots
            mine, ids = slots >> 32 == number, memory.written[number].tensors["ids"]
            return ids, torch.zeros(len(ids)).index_add(0, slots[mine] & 0xFFFFFFFF, drawn[mine])
        mine = memory.births == number
        source = next((i for i in memory.origins[mine][:1].tolist() if i >= 0), None)
        if source is None or memory.slots_left()[source].min() < memory.sources[source].slots:
            return none
        return self._embedded(memory.slots[0][mine[0]]), drawn[:, memory.R :][mine].view(memory.L, -1).sum(0)

    def _quote(self, ids: Sequence[int], weights: Sequence[float]) -> str:
        """The sentences of an update that were drawn on most."""
        text, ends, detokenizer = "", [], Detokenizer(self.prompts_or_raise().tokenizer)
        for token in ids:
            text += detokenizer.add(int(token))
            ends.append(len(text))
        text += detokenizer.rest()
        spans = [match.span() for match in SENTENCE.finditer(text)]
        drawn = [sum(w for w, end in zip(weights, ends, strict=True) if a < end <= b) for a, b in spans]
        quoted = [i for i, weight in enumerate(drawn) if weight >= BESIDE * max(drawn)]
        sentences = [text[spans[i][0] : spans[i][1]].strip() for i in quoted]
        gaps = ["", *(" " if b == a + 1 else " … " for a, b in itertools.pairwise(quoted))]
        return "".join(map("".join, zip(gaps, sentences, strict=False)))

    @torch.no_grad()
    def text_of(self, memory: Memory) -> Tensor:
        """The tokens that layer 0 still holds, [M] ids, oldest first; -1 for a slot that is no embedding.

        A slot of layer 0 in the preset "exact" is the embedding of its token, or its id: a memory gives its text away.
        """
        self.check(memory)
        if memory.settings.by_update:
            return ids_of(memory, memory.slots[0, :, 0])
        return self._embedded(memory.slots[0])

    @torch.no_grad()
    def _embedded(self, slots: Tensor) -> Tensor:
        """The tokens of which slots [m, d] of layer 0 are the embeddings, [m]; -1 of others."""
        table = normalize(self.base.get_input_embeddings().weight.float(), dim=1)
        nearest = [(part @ table.T).max(dim=1) for part in normalize(slots.to(table), dim=1).split(256)]
        return torch.cat([ids.where(likeness > 0.99, -1) for likeness, ids in nearest])


def abstains(answer: str) -> bool:
    """Whether an answer says that it does not know, in the words in which trained memories say so."""
    return answer.strip().casefold().replace("’", "'").startswith(NEUTRAL[1].casefold().rstrip("."))


def _beyond(mass: Tensor, usual: Tensor) -> tuple[Tensor, float]:
    """What slots are attended to beyond what is usual, or else how much of it: shares of 1, [L, P], and the sum."""
    shares, usual = (part / part.sum(1, keepdim=True).clamp(min=LEAST) for part in (mass, usual))
    ratio = shares.clamp(min=LEAST) / usual.clamp(min=LEAST)
    drawn = shares * (ratio / TIMES).log().clamp(min=0)
    amount = drawn.sum().item() / len(drawn)
    drawn = drawn if drawn.any() else ratio
    return drawn / drawn.sum(), amount


def _source(memory: Memory, number: int) -> str:
    """The source of an update; "" if that is older than the memory."""
    if number in memory.written:
        return memory.written[number].source
    archive = longterm.of(memory)
    columns = [(memory.births, memory.origins)]
    if isinstance(archive, longterm.LongTerm):
        columns.append((archive.births, archive.origins))
    index = next((int(o[b == number][0]) for b, o in columns if (b == number).any()), -1)
    return memory.sources[index].name if index >= 0 else ""
