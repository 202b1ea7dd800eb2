"""Reading a long-term memory: which stored slots a question takes, in which layer (letters: `latentmem.core`).

    by update   the question passes a few of the first layers behind the first position alone; what fits its tokens best
                there, update by update, is taken whole in every layer, as R allows. Nothing is trained for it.
    by slot     the question passes all layers behind what it retrieves: each layer takes the R slots that fit best

Fits are likenesses (cosines) of what the layers see of slot and token, after their norm. Queries on unrotated keys, the
layers' own attention, do not find the right text (docs/results/longterm.md). A trained retriever compares what its
projectors make of both, by slot; it comes with the released M+, or can be trained.

Source: M+ (arXiv 2502.00592) section 3.1 and the released `get_ltm`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from latentmem.core.memory import Memory
from latentmem.core.read import Prefix
from latentmem.decoder.attention import KV
from latentmem.decoder.cache import KVPrefix, attention_mask, memory_cache
from latentmem.decoder.decoder import Decoder
from latentmem.decoder.hooks import layers_seen
from latentmem.longterm import longterm
from latentmem.longterm.blocks import Block, BlockRange
from latentmem.longterm.longterm import LongTerm, written
from latentmem.longterm.ranking import best, marks, together

SHARE = 10  # one layer of so many is searched by update, from the second on: the first sees words, not what they mean
NEAR = 10_000  # likenesses are told apart up to one part in so many


class _Enough(Exception):  # noqa: N818 - no error
    """Ends a pass whose later layers are not needed."""


@dataclass(frozen=True, eq=False)
class Retrieval:
    """What a question takes of a store, and how it stands among the memory's own slots.

    Args:
        places: of each layer the R stored slots, oldest first.
        order: of each layer which of [retrieved ; slots] stands where, [R + M] indices.
    """

    places: list[Tensor]
    order: list[Tensor]

    @property
    def R(self) -> int:
        return len(self.places[0])

    def same(self, other: Retrieval) -> bool:
        """Whether two questions read the same."""
        mine, theirs = [*self.places, *self.order], [*other.places, *other.order]
        return all(map(torch.equal, mine, theirs))


@dataclass(frozen=True, eq=False)
class Projectors:
    """The trained retriever of M+: of each layer two matrices for queries of a reader, of a writer, and for keys.

    Args:
        query, key: [(hidden width x d), (width x hidden width)] of each layer.
        writer: queries of a text that is written; the released code uses them to choose what is dropped, if asked to.
        activation: between the two.

    Source: M+ section 3.1.2; the released `get_projector`.
    """

    query: Sequence[tuple[Tensor, Tensor]]
    key: Sequence[tuple[Tensor, Tensor]]
    writer: Sequence[tuple[Tensor, Tensor]]
    activation: Callable[[Tensor], Tensor]

    def project(self, pair: tuple[Tensor, Tensor], normed: Tensor) -> Tensor:
        """[s, d] -> [s, width]."""
        return linear(self.activation(linear(normed, pair[0])), pair[1])


class Retriever:
    """What finds stored slots for one model.

    Args:
        decoder: the model.
        projectors: of a trained retriever, if there is one.
    """

    def __init__(self, decoder: Decoder, projectors: Projectors | None = None) -> None:
        self.decoder, self.projectors = decoder, projectors
        self._keys: weakref.WeakKeyDictionary[Block, dict[int, tuple[int, Tensor]]] = weakref.WeakKeyDictionary()

    @property
    def layers_searched(self) -> range:
        """The layers that are searched by update."""
        L = self.decoder.L
        return range(min(1, L - 1), min(L, 1 + -(-L // SHARE)))

    def normed(self, i: int, hidden: Tensor) -> Tensor:
        """What layer i sees of hidden states."""
        layer: Any = self.decoder.layers[i]
        return layer.input_layernorm(hidden) if hasattr(layer, "input_layernorm") else hidden

    @torch.no_grad()
    def new_keys(self, memory: Memory, dropped: Tensor) -> Tensor | None:
        """What a trained retriever makes of slots [L, count] of a memory that go to its store, [L, count, width]."""
        if self.projectors is None or memory.longterm is None or not memory.longterm.settings.keep:
            return None
        found = []
        for i, pair in enumerate(self.projectors.key):
            slots = memory.slots[i].to(self.decoder.device)[dropped[i].to(self.decoder.device)]
            found.append(self.projectors.project(pair, self.normed(i, slots)).cpu())
        return torch.stack(found)

    def fits(self, i: int, store: LongTerm, hidden: Tensor) -> Tensor:
        """How well stored slots of layer i fit each of n tokens [n, d] by themselves, [n, S] float32."""
        if self.projectors is not None:
            asked = self.projectors.project(self.projectors.query[i], self.normed(i, hidden))
            keys = [span.stored.keys[i] for span in store.ranges if span.stored.keys is not None]
            return torch.cat([(asked @ key.to(asked).T).sigmoid().float() for key in keys], dim=1).cpu()
        return self.likeness(i, store, hidden)

    def likeness(self, i: int, store: LongTerm, hidden: Tensor) -> Tensor:
        """The cosine of what layer i sees of all stored slots and of each of n tokens [n, d], [n, S] float32."""
        asked = normalize(self.normed(i, hidden), dim=-1)
        near = [(asked @ self._seen(store, span, i).T).float() for span in store.ranges]
        found = torch.cat([asked.new_empty(len(asked), 0, dtype=torch.float32), *near], dim=1).cpu()
        return (found * NEAR).round() / NEAR  # equal slots fit equally, however the store is cut into blocks

    def _seen(self, store: LongTerm, span: BlockRange, i: int) -> Tensor:
        """Slots as layer i sees them, at length 1, [len(span), d]; made once for each place of a block."""
        block = span.block
        made = self._keys.setdefault(block, {})
        done, keys = made.get(i, (0, None))
        if keys is None:
            with torch.inference_mode(False):  # others will add to it
                keys = torch.empty(block.room, self.decoder.d, dtype=self.decoder.dtype, device=self.decoder.device)
        if done < span.end:
            fresh = store.slots(span, i, slice(done, span.end), keys)
            keys[done : span.end] = normalize(self.normed(i, fresh), dim=-1)
            made[i] = (span.end, keys)
        return keys[span.start : span.end]

    def clear(self) -> None:
        """Forget what was made with weights that have changed since."""
        self._keys.clear()

    # --- what a question takes ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def retrieve(self, memory: Memory, prefix: Prefix, ids: Tensor, asking: Tensor) -> Retrieval:
        """What tokens [n] take of a memory's store that holds something; to be called under the adapter that reads.

        Args:
            asking: which of the tokens say what is asked, and are no frame around it, [n] bool; for a trained
                retriever all count, as it was trained.
        """
        store, L = longterm.of(memory), self.decoder.L
        assert store is not None
        if store.settings.group == "update":
            return self._by_update(memory, store, self._heard(prefix, ids), asking)
        in_front = torch.arange(store.most + memory.M)  # as in the released code
        found = Retrieval([], [in_front] * L)

        def at(i: int, hidden: Tensor) -> Tensor:
            found.places.append(self.by_slot(i, store, hidden[0] if self.projectors is not None else hidden[0][asking]))
            return hidden

        layers = [partial(self.layer, prefix, store, found, i) for i in range(L)]
        self._pass(KVPrefix(prefix.P + store.most, layers), ids, at)
        return found

    def by_slot(self, i: int, store: LongTerm, hidden: Tensor) -> Tensor:
        """The R slots of layer i that fit n tokens [n, d] best, by the mean over the tokens."""
        fits = self.fits(i, store, hidden).mean(0)
        return best(fits, store.occupied[i], store.column("orders")[i], store.most)

    def _by_update(self, memory: Memory, store: LongTerm, heard: Sequence[Tensor], asking: Tensor) -> Retrieval:
        """An update is marked by all of its slots, those that the memory still holds as well.

        Those that are marked best stand last, nearest to the question, each with all of its slots together, as many as
        have R slots; all others in front of them in the order in which they were written. Without a store that is all
        that a search does.
        """
        there = store.occupied
        births = torch.cat([store.writers, memory.births], dim=1).long() + 1
        known = torch.zeros(memory.updates + 2, dtype=torch.bool)
        known[births.flatten()] = True
        known[0] = False
        births = torch.where(births > 0, known.cumsum(0)[births] - 1, -1)  # of most that ever were nothing is left
        count = int(known.sum())
        S, total, layers = store.S, torch.zeros(count), torch.zeros(count)
        for i, hidden in zip(self.layers_searched, heard, strict=True):
            asked = hidden[asking]
            own = normalize(self.normed(i, memory.slots[i].to(hidden.device)), dim=-1)
            near = (normalize(self.normed(i, asked), dim=-1) @ own.T).float().cpu()
            mark = marks(torch.cat([self.likeness(i, store, asked), near], dim=1), births[i])
            some = mark > float("-inf")
            total[: len(mark)] += mark.where(some, 0)
            layers[: len(mark)] += some
        total = (total / layers).where(layers > 0, float("-inf"))
        best_first = total.argsort(descending=True, stable=True)
        i = self.layers_searched[0]
        sizes = births[i][births[i] >= 0].bincount(minlength=len(total))[best_first]
        last = max(1, int((sizes.cumsum(0) <= (store.most if store.settings.keep else store.settings.R)).sum()))
        rank = best_first.argsort()
        found = Retrieval([], [])
        for i in range(self.decoder.L):
            places = together(rank, births[i, :S], there[i], store.column("orders")[i], store.most)
            found.places.append(places)
            found.order.append(
                arranged(memory, store, i, places, rank[torch.cat([births[i, places], births[i, S:]])], last)
            )
        return found

    def _heard(self, prefix: Prefix, ids: Tensor) -> list[Tensor]:
        """Hidden states of tokens [n] at the input of the layers that are searched, behind the first position alone."""
        heard: list[Tensor] = []

        def at(i: int, hidden: Tensor) -> Tensor:
            if i in self.layers_searched:
                heard.append(hidden[0])
            if i == self.layers_searched[-1]:
                raise _Enough
            return hidden

        self._pass(KVPrefix(prefix.s, [partial(_same, kv) for kv in prefix.first]), ids, at)
        return heard

    def _pass(self, front: KVPrefix, ids: Tensor, at: Callable[[int, Tensor], Tensor]) -> None:
        cache = memory_cache([front], self.decoder, store=False) if front.P else None
        mask = attention_mask(cache, ids[None])
        with layers_seen(self.decoder, at):
            try:
                self.decoder.body(input_ids=ids[None], attention_mask=mask, past_key_values=cache, use_cache=False)
            except _Enough:
                return

    # --- what stands in front of a question ---------------------------------------------------------------------------

    def prefix(self, memory: Memory, prefix: Prefix, chosen: Retrieval, asked: Tensor) -> RetrievedPrefix:
        """[first ; retrieved and slots] in front of a row that asks `asked`, [n] ids."""
        return RetrievedPrefix.of(self, memory, prefix, chosen, asked)

    def slots(self, store: LongTerm, i: int, places: Tensor) -> Tensor:
        """Stored slots of layer i, [R, d], on the model's device."""
        like = torch.empty(0, self.decoder.d, dtype=self.decoder.dtype, device=self.decoder.device)
        found, start = [like], 0
        order = places.argsort()
        for span in store.ranges:
            mine = places[order]
            mine = mine[(mine >= start) & (mine < start + len(span))] - start + span.start
            found.append(store.slots(span, i, mine, like))
            start += len(span)
        return torch.cat(found)[order.argsort().to(like.device)]

    @torch.no_grad()
    def layer(self, prefix: Prefix, store: LongTerm, chosen: Retrieval, i: int) -> KV:
        """Rotated keys, and values, of layer i: [first ; retrieved and slots]."""
        own, s = [old[i][:, :, prefix.s :] for old in (prefix.keys, prefix.values)], prefix.s
        if chosen.R:
            new = self.decoder.project(i, self.slots(store, i, chosen.places[i]))
            own = [torch.cat(both, dim=2) for both in zip(new, own, strict=True)]
        order = chosen.order[i].to(own[0].device)
        keys, values = (some.index_select(2, order) for some in own)
        positions = torch.arange(s, s + len(order), device=keys.device)[None]
        first_keys, first_values = prefix.first[i]
        keys = torch.cat([first_keys, self.decoder.rotate(i, keys, positions)], dim=2)
        return keys, torch.cat([first_values, values], dim=2)


@dataclass(frozen=True, eq=False)
class RetrievedPrefix(KVPrefix):
    """[first ; retrieved and slots] in front of a row; a layer's keys and values are made when it first asks for them.

    Args:
        recall, memory, prefix: what they are made of.
        chosen: what each layer takes.
        first_retrieval: what it took first, behind which the prompt was read.
        asked: the prompt, [n] ids.
        made: keys and values by layer.
    """

    recall: Retriever
    memory: Memory
    prefix: Prefix
    chosen: Retrieval
    first_retrieval: Retrieval
    asked: Tensor
    made: dict[int, KV]

    @staticmethod
    def of(recall: Retriever, memory: Memory, prefix: Prefix, chosen: Retrieval, asked: Tensor) -> RetrievedPrefix:
        store = longterm.of(memory)
        assert store is not None
        made: dict[int, KV] = {}
        now = Retrieval(list(chosen.places), list(chosen.order))
        make = [partial(recall.layer, prefix, store, now, i) for i in range(len(now.places))]
        layers = [partial(_once, made, i, one) for i, one in enumerate(make)]
        return RetrievedPrefix(prefix.P + chosen.R, layers, recall, memory, prefix, now, chosen, asked, made)

    @property
    def every(self) -> int:
        """Tokens of an answer after which is searched again."""
        assert self.memory.longterm is not None
        return self.memory.longterm.settings.every

    def reads_like(self, other: KVPrefix) -> bool:
        """Whether a prompt that was read behind this front reads the same behind another one of the same memory."""
        return isinstance(other, RetrievedPrefix) and self.first_retrieval.same(other.chosen)

    def take(self, chosen: Retrieval) -> bool:
        """Take other slots from now on; False if they are the same."""
        if self.chosen.same(chosen):
            return False
        self.chosen.places[:], self.chosen.order[:] = chosen.places, chosen.order
        self.made.clear()
        return True


def arranged(memory: Memory, store: LongTerm, i: int, places: Tensor, ranks: Tensor, last: int) -> Tensor:
    """How retrieved slots and the memory's own stand in layer i: the `last` best updates behind all others, best last.

    Args:
        places: of the retrieved slots, oldest first, [R].
        ranks: of the update of each of [retrieved ; slots], 0 for the best, [R + M].
    """
    if store.settings.rule == "oldest":
        own = written(memory.births[i], store.places[i])
        order = torch.cat([store.column("orders")[i][places], own]).argsort(stable=True)
    else:  # orders of another kind
        order = torch.arange(len(ranks))
    lifted = (last - ranks).clamp(min=0)
    return order[lifted[order].argsort(stable=True)]


def _same(kv: KV) -> KV:
    return kv


def _once(made: dict[int, KV], i: int, make: Callable[[], KV]) -> KV:
    if i not in made:
        made[i] = make()
    return made[i]
