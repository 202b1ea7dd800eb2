"""Reading a long-term memory: which archived slots a question takes, in which layer (letters: `latentmem.core`).

    by update   the question passes a few of the first layers behind the first position alone; the updates that fit its
                tokens best there are taken whole in every layer, as R allows. Nothing is trained for it.
    by slot     the question passes all layers behind what it retrieves: each layer takes the R slots that fit best

A fit is the likeness (cosine) of what a layer sees of slot and token, after its norm. Coded updates are searched by
update, and a fit is that of a slot's sketch in one of these layers. Queries on unrotated keys, the layers' own
attention, do not find the right text (docs/results/longterm.md). A trained retriever compares what its projectors make
of both, by slot; it comes with the released M+, or can be trained.

Source: M+ (arXiv 2502.00592) section 3.1 and the released `get_ltm`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize, silu

from latentmem import longterm
from latentmem.coding.codec import codec_of, directions
from latentmem.coding.decoding import Decoding
from latentmem.core.memory import Memory
from latentmem.decoder.attention import KV
from latentmem.decoder.cache import KVPrefix, Prefix, attention_mask, memory_cache
from latentmem.decoder.decoder import Decoder
from latentmem.decoder.hooks import layers_seen
from latentmem.longterm.blocks import Block, BlockRange
from latentmem.longterm.longterm import LongTerm
from latentmem.longterm.ranking import NEVER, arranged, best_slots, marks, numbered, ordered, slots_of_best

SHARE = 10  # one layer of so many is searched by update, from the second on: the first sees words, not what they mean
NEAR = 10_000  # likenesses are told apart up to one part in so many


class _LastSearched(Exception):  # noqa: N818 - no error
    """Ends a pass whose later layers are not needed."""


@dataclass(frozen=True, eq=False)
class Retrieval:
    """What a question takes of an archive, and how it stands among the memory's own slots.

    Args:
        places: of each layer the R stored slots, oldest first.
        order: of each layer which of [retrieved ; slots] stands where, [R + M] indices; fewer if some are not read.
        marks: how well each update that is left fits the question, [U]; none where slots are retrieved one by one.
    """

    places: list[Tensor]
    order: list[Tensor]
    marks: Tensor | None = None

    @property
    def R(self) -> int:
        return len(self.places[0])

    @property
    def length(self) -> int:
        """Slots that a question reads in each layer: R + M, or fewer."""
        return len(self.order[0])

    def same(self, other: Retrieval) -> bool:
        """Whether two questions read the same."""
        mine, theirs = [*self.places, *self.order], [*other.places, *other.order]
        return all(map(torch.equal, mine, theirs))


@dataclass(frozen=True, eq=False)
class Projectors:
    """The trained retriever of M+: of each layer two matrices for queries and two for keys, SiLU between them.

    Args:
        query: [(hidden width x d), (width x hidden width)] of each layer.
        key: as `query`.

    Source: M+ section 3.1.2; the released `get_projector`.
    """

    query: Sequence[tuple[Tensor, Tensor]]
    key: Sequence[tuple[Tensor, Tensor]]

    def project(self, pair: tuple[Tensor, Tensor], normed: Tensor) -> Tensor:
        """[s, d] -> [s, width]."""
        return linear(silu(linear(normed, pair[0])), pair[1])


class Retriever:
    """Finds archived slots for one model.

    Args:
        decoder: the model.
        projectors: of a trained retriever, if there is one.
    """

    def __init__(self, decoder: Decoder, projectors: Projectors | None = None) -> None:
        self.decoder, self.projectors = decoder, projectors
        self.decoding = Decoding(decoder)
        self._seen: weakref.WeakKeyDictionary[Block, dict[int, tuple[int, Tensor]]] = weakref.WeakKeyDictionary()

    @property
    def layers_searched(self) -> range:
        """The layers that are searched by update."""
        L = self.decoder.L
        return range(min(1, L - 1), min(L, 1 + -(-L // SHARE)))

    @property
    def layer_sketched(self) -> int:
        """The layer in which sketches are compared: the middle one of those that are searched."""
        return self.layers_searched[len(self.layers_searched) // 2]

    def clear(self) -> None:
        """Forget what was computed with weights that have changed since."""
        self._seen.clear()
        self.decoding.clear()

    @torch.no_grad()
    def new_keys(self, memory: Memory, dropped: Tensor) -> Tensor | None:
        """Keys of a trained retriever for slots [L, count] that a memory drops, [L, count, width]; None: not needed."""
        if self.projectors is None or memory.longterm is None:
            return None
        keys = []
        for i, pair in enumerate(self.projectors.key):
            slots = memory.slots[i].to(self.decoder.device)[dropped[i].to(self.decoder.device)]
            keys.append(self.projectors.project(pair, self.decoder.normed(i, slots)).cpu())
        return torch.stack(keys)

    def _fits(self, i: int, archive: LongTerm, hidden: Tensor) -> Tensor:
        """How well stored slots of layer i fit each of n tokens [n, d] by themselves, [n, S] float32."""
        if self.projectors is None:
            return self._likeness(i, archive, hidden)
        asked = self.projectors.project(self.projectors.query[i], self.decoder.normed(i, hidden))
        keys = [one.stored.keys[i] for one in archive.ranges if one.stored.keys is not None]
        return torch.cat([(asked @ key.to(asked).T).sigmoid().float() for key in keys], dim=1).cpu()

    def _likeness(self, i: int, archive: LongTerm, hidden: Tensor) -> Tensor:
        """The cosine of what layer i sees of all stored slots and of each of n tokens [n, d], [n, S] float32."""
        asked = normalize(self.decoder.normed(i, hidden), dim=-1)
        none = asked.new_empty(len(asked), 0, dtype=torch.float32)
        cosines = [none, *((asked @ self._directions(archive, one, i).T).float() for one in archive.ranges)]
        return (torch.cat(cosines, dim=1).cpu() * NEAR).round() / NEAR  # equal slots fit equally, whatever their block

    def _directions(self, archive: LongTerm, one: BlockRange, i: int) -> Tensor:
        """Slots as layer i sees them, at length 1, [len(one), d]; computed once for each place of a block."""
        block = one.block
        done, directions = self._seen.setdefault(block, {}).get(i, (0, None))
        if directions is None:
            with torch.inference_mode(False):  # others will add to it
                directions = torch.empty(
                    block.room, self.decoder.d, dtype=self.decoder.dtype, device=self.decoder.device
                )
        if done < one.end:
            fresh = archive.slots(one, i, slice(done, one.end), directions)
            directions[done : one.end] = normalize(self.decoder.normed(i, fresh), dim=-1)
            self._seen[block][i] = (one.end, directions)
        return directions[one.start : one.end]

    @torch.no_grad()
    def retrieve(self, memory: Memory, prefix: Prefix, ids: Tensor, asking: Tensor) -> Retrieval:
        """What tokens [n] take of a memory's archive; to be called under the adapter that reads.

        Args:
            asking: which of the tokens say what is asked, and are no frame around it, [n] bool; for a trained
                retriever all count, as it was trained.
        """
        if memory.settings.by_update:
            (hidden,) = self._states(prefix, ids, [self.layer_sketched])
            return self._by_number(memory, hidden[asking])
        archive = longterm.searched(memory)
        if archive.settings.group == "update":
            return self._by_update(memory, archive, self._states(prefix, ids, self.layers_searched), asking)
        return self._by_slot(memory, archive, prefix, ids, asking)

    def _by_slot(self, memory: Memory, archive: LongTerm, prefix: Prefix, ids: Tensor, asking: Tensor) -> Retrieval:
        """The R slots of each layer that fit best, by the mean over the tokens; as in the released code, in front."""
        in_front = torch.arange(archive.most + memory.M)
        retrieval = Retrieval([], [in_front] * self.decoder.L)

        def take(i: int, hidden: Tensor) -> Tensor:
            fits = self._fits(i, archive, hidden[0] if self.projectors is not None else hidden[0][asking]).mean(0)
            retrieval.places.append(best_slots(fits, archive.occupied[i], archive.orders[i], archive.most))
            return hidden

        layer = self.layers(memory, prefix, retrieval)
        layers = [partial(layer, i) for i in range(self.decoder.L)]
        self._pass(KVPrefix(prefix.P + archive.most, layers), ids, take)
        return retrieval

    def _by_update(self, memory: Memory, archive: LongTerm, states: Sequence[Tensor], asking: Tensor) -> Retrieval:
        """The slots of the best updates, the same updates in every layer.

            number   of each slot, archived or not, the number of its update, 0 .. U-1                        [L, S + M]
            mark     how far each update stands out for the tokens that ask, the mean over searched layers    [U]
            rank     0 for the best mark; in each layer the R slots of lowest rank are taken
            order    oldest first, then as `arranged`

        Args:
            states: hidden states of the tokens at the input of each searched layer, [n, d].
        """
        S, (numbers, U) = archive.S, numbered(torch.cat([archive.writers, memory.births], dim=1), memory.updates)
        mark = self._marks(memory, archive, [hidden[asking] for hidden in states], numbers, U)
        best_first = mark.argsort(descending=True, stable=True)
        rank, places, orders, ranks = best_first.argsort(), [], [], []
        for i in range(self.decoder.L):
            places.append(slots_of_best(rank, numbers[i, :S], archive.orders[i], archive.most))
            ranks.append(rank[torch.cat([numbers[i, places[i]], numbers[i, S:]])])
            orders.append(archive.reading_order(memory, i, places[i]))
        seen = numbers[self.layers_searched[0]]
        sizes = seen[seen >= 0].bincount(minlength=U)[best_first]
        arrangement = arranged(memory.reading_order, torch.stack(orders), torch.stack(ranks), sizes, archive.settings.R)
        return Retrieval(places, arrangement, mark)

    def _by_number(self, memory: Memory, hidden: Tensor) -> Retrieval:
        """`_by_update` for coded updates: found by their sketches, in one layer; a slot is a number.

        Args:
            hidden: of the tokens that ask, at the input of the layer that is sketched, [n, d].
        """
        archive, written = longterm.searched_updates(memory), list(memory.written.values())
        births = torch.tensor(list(memory.written), dtype=torch.long)
        sizes = torch.tensor([len(one) for one in written], dtype=torch.long)
        asked = directions(self.decoder.normed(self.layer_sketched, hidden))
        fits = (codec_of(memory.coder).likeness(asked, written) * NEAR).round() / NEAR
        mark = marks(fits, torch.arange(len(written)).repeat_interleave(sizes), len(written))
        best_first = mark.argsort(descending=True, stable=True)
        places = archive.best(memory, births[best_first].tolist())
        both = torch.cat([places, memory.slots[:, :, 0]], dim=1)
        ranks = best_first.argsort()[torch.searchsorted(births, both >> 32)]
        arrangement = arranged(memory.reading_order, ordered(both), ranks, sizes[best_first], archive.settings.R)
        return Retrieval(list(places), arrangement, mark)

    def _marks(self, memory: Memory, archive: LongTerm, asked: list[Tensor], numbers: Tensor, U: int) -> Tensor:
        """The mark of each update, by the slots that were dropped and those that the memory still holds, [U]."""
        total, layers = torch.zeros(U), torch.zeros(U)
        for i, hidden in zip(self.layers_searched, asked, strict=True):
            own = normalize(self.decoder.normed(i, memory.slots[i].to(hidden.device)), dim=-1)
            near = (normalize(self.decoder.normed(i, hidden), dim=-1) @ own.T).float().cpu()
            near = (near * NEAR).round() / NEAR  # as `_likeness`: a slot fits equally in the memory and in its archive
            mark = marks(torch.cat([self._likeness(i, archive, hidden), near], dim=1), numbers[i], U)
            held = mark > NEVER
            total += mark.where(held, 0)
            layers += held
        return (total / layers).where(layers > 0, NEVER)

    def _states(self, prefix: Prefix, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Hidden states of tokens [n] at the input of layers, ascending, behind the first position alone."""
        states: list[Tensor] = []

        def collect(i: int, hidden: Tensor) -> Tensor:
            if i in layers:
                states.append(hidden[0])
            if i == layers[-1]:
                raise _LastSearched
            return hidden

        self._pass(KVPrefix.from_pairs(prefix.first), ids, collect)
        return states

    def _pass(self, front: KVPrefix, ids: Tensor, at: Callable[[int, Tensor], Tensor]) -> None:
        cache = memory_cache([front], self.decoder, store=False) if front.P else None
        mask = attention_mask(cache, ids[None])
        with layers_seen(self.decoder, at):
            try:
                self.decoder.body(input_ids=ids[None], attention_mask=mask, past_key_values=cache, use_cache=False)
            except _LastSearched:
                return

    def layers(self, memory: Memory, prefix: Prefix, retrieval: Retrieval) -> Callable[[int], KV]:
        """Gives rotated keys, and values, of each layer: [first ; retrieved and slots]."""
        taken, s, P = self._taken(memory, retrieval), prefix.s, prefix.s + retrieval.length
        rotate = self.decoder.rotation(torch.arange(P, device=self.decoder.device)[None])

        @torch.no_grad()
        def layer(i: int) -> KV:
            R, order, own = retrieval.R, retrieval.order[i], (prefix.keys[i], prefix.values[i])  # [first ; slots]
            whole = [torch.cat(both, dim=2) for both in zip(taken(i), own, strict=True)] if R else own
            keys, values = _picked(whole, torch.cat([torch.arange(R, R + s), order + s * (order >= R)]))
            return rotate(i, keys), values

        return layer

    def _taken(self, memory: Memory, retrieval: Retrieval) -> Callable[[int], KV]:
        """Gives unrotated keys, and values, of what each layer has retrieved."""
        if not memory.settings.by_update:
            archive = longterm.searched(memory)
            return lambda i: self.decoder.project(i, self.slots(archive, i, retrieval.places[i]))
        rest: dict[int, KV] = {}  # decoded for all layers at once; each asks once

        def layer(i: int) -> KV:
            if i not in rest:
                rest.update(enumerate(self.decoding.kv(memory, torch.stack(retrieval.places))))
            return rest.pop(i)

        return layer

    def slots(self, archive: LongTerm, i: int, places: Tensor) -> Tensor:
        """Stored slots of layer i, [R, d], on the model's device."""
        like = torch.empty(0, self.decoder.d, dtype=self.decoder.dtype, device=self.decoder.device)
        parts, start, order = [like], 0, places.argsort()
        for one in archive.ranges:
            mine = places[order]
            mine = mine[(mine >= start) & (mine < start + len(one))] - start + one.start
            parts.append(archive.slots(one, i, mine, like))
            start += len(one)
        return torch.cat(parts)[order.argsort().to(like.device)]


@dataclass(frozen=True, eq=False)
class RetrievedPrefix(KVPrefix):
    """[first ; retrieved and slots] in front of a row; keys and values are computed when a layer first asks for them.

    Args:
        memory: what is read.
        prefix: the memory without its archive.
        retrieval: what each layer takes now; `take` changes it.
        first_retrieval: what each layer took when the prompt was read.
        asked: the prompt, [n] ids.
        computed: keys and values by layer.
    """

    memory: Memory
    prefix: Prefix
    retrieval: Retrieval
    first_retrieval: Retrieval
    asked: Tensor
    computed: dict[int, KV]

    @staticmethod
    def of(
        retriever: Retriever, memory: Memory, prefix: Prefix, retrieval: Retrieval, asked: Tensor
    ) -> RetrievedPrefix:
        computed: dict[int, KV] = {}
        now = Retrieval(list(retrieval.places), list(retrieval.order))
        maker: list[Callable[[int], KV]] = []

        def layer(i: int) -> KV:
            if not computed:
                maker[:] = [retriever.layers(memory, prefix, now)]
            if i not in computed:
                computed[i] = maker[0](i)
            return computed[i]

        layers = [partial(layer, i) for i in range(memory.L)]
        return RetrievedPrefix(prefix.s + retrieval.length, layers, memory, prefix, now, retrieval, asked, computed)

    @property
    def every(self) -> int:
        """Tokens of an answer after which is searched again; 0: never, as where one update only is read."""
        if self.memory.reading_order == "best-only":
            return 0
        return longterm.every(self.memory)

    def reads_like(self, other: KVPrefix) -> bool:
        """Whether a prompt that was read behind this prefix reads the same behind another one of the same memory."""
        return isinstance(other, RetrievedPrefix) and self.first_retrieval.same(other.retrieval)

    def take(self, retrieval: Retrieval) -> bool:
        """Take other slots from now on; False if they are the same."""
        if self.retrieval.same(retrieval):
            return False
        self.retrieval.places[:], self.retrieval.order[:] = retrieval.places, retrieval.order
        self.computed.clear()
        return True


def _picked(whole: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Positions by index [m] of keys and values, [1, heads, n, head width], picked as rows: that is faster."""
    _, heads, n, _ = whole[0].shape
    rows = (torch.arange(0, heads * n, n)[:, None] + index).flatten().to(whole[0].device)
    return [part.reshape(heads * n, -1).index_select(0, rows).view(1, heads, -1, part.shape[3]) for part in whole]
