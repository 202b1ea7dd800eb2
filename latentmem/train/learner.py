"""An episode -> a loss: texts are written with gradient, set into a memory at their age, and asked for.

The memory is real: a pool of everything that was written in the last steps, updated and dropped from as in use
(`core.memory.update`). Its slots carry no gradient; those of the episode's texts do, through the write as well. Before
the rows are read, each text is set behind the slots that are older than it, and is dropped from as if it had aged that
long, so that a model learns in one pass what a memory looks like after fifty updates. How all of these slots are read
is learned; that a write reads the pool, too, is not followed back.

To read alone is learned at a fraction of the cost: in "recall" texts go into the pool without gradient, as in use, and
are asked for out of it in this and in later episodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from latentmem.core import memory as memories
from latentmem.core.memory import Memory, Update
from latentmem.core.presets import PRESETS
from latentmem.core.write import write_exact, write_paper
from latentmem.decoder.adapters import READ, WRITE
from latentmem.decoder.attention import KV
from latentmem.decoder.cache import KVPrefix, attention_mask, memory_cache
from latentmem.decoder.hooks import layers_seen
from latentmem.model.backbone import Trained
from latentmem.model.model import MemoryModel
from latentmem.train.config import PoolSettings
from latentmem.train.episode import Episode, Row
from latentmem.train.retriever import Retriever, Search, Seen

# What a pool of the preset "paper" holds before anything is written into it.
BIRTH = (
    "This is the memory of a language model. It is a pool of vectors of fixed size in every layer. Whatever is read "
    "from now on is written into it, and makes room for itself among what was there before. Nothing has been read yet: "
    "no names, no places, no dates, no numbers. What is asked later is answered from what will have been written here."
)


@dataclass(frozen=True)
class Outcome:
    """What an episode brought.

    Args:
        loss: a scalar with gradient.
        accuracy: share of the answers' tokens that were the most likely ones.
        new_slots: of each text, [L, k, d], without gradient, for the pool.
        search: the retriever's loss, which is in `loss` by its weight; None: no row searched for a text.
        precision: of the slots that fit best, the share that is of the right text.
    """

    loss: Tensor
    accuracy: float
    new_slots: list[Tensor]
    search: float | None = None
    precision: float = 0.0


class Learner(nn.Module):
    """A model with its adapters (and bos and mark of the preset "paper") as one module with one forward.

    Args:
        llm: with fresh or trained adapters.
        settings: of the memory that is trained.
        bos, mark: of the preset "paper"; they become parameters.
        retriever: trained beside the adapters, if any.
        weight: factor of its loss.
    """

    sink: Tensor

    def __init__(
        self,
        llm: MemoryModel,
        settings: PoolSettings,
        *,
        bos: Tensor | None = None,
        mark: Tensor | None = None,
        retriever: Retriever | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        assert llm.adapters is not None
        self.base = llm.base
        self.settings, self.rules = settings, PRESETS[settings.preset]
        self.bos = nn.Parameter(bos.float()) if bos is not None else None
        self.mark = nn.Parameter(mark.float()) if mark is not None else None
        self.retriever, self.weight = retriever, weight
        self._llm = [llm]  # in a list: no submodule
        self.register_buffer("sink", llm.first.detach().clone(), persistent=False)

    @property
    def llm(self) -> MemoryModel:
        return self._llm[0]

    def reader(self) -> MemoryModel:
        """The model as it is used, with the weights of now; in "paper" with an empty pool."""
        if self.bos is not None and self.mark is not None:
            llm, d = self.llm, self.llm.decoder
            pool = memories.empty(d.L, d.d, self.settings.settings(), dtype=d.dtype, device=d.device)
            assert llm.adapters is not None
            of: Any = {"model": llm.identity, "adapters": llm.adapters.identity, "tokenizer": llm.tokenizer_identity}
            mark = self.mark.detach().to(d.dtype)
            return llm.with_trained(Trained(self.first.detach(), mark, replace(pool, model_name=llm.name, **of)))
        return self.llm

    @property
    def first(self) -> Tensor:
        """What stands in front of the slots in each layer, [L, 1, d]."""
        return self.sink if self.bos is None else self.bos.to(self.sink.dtype)

    def passes(self, episode: Episode) -> tuple[int, int, int]:
        """How often an episode goes through the layers before its rows are read.

        Returns:
            Times as teacher, to write without gradient, to write with gradient.
        """
        writes = len(episode.texts) if episode.in_sequence or not self.rules.write_many else 1
        teaches = len(episode.rows) if episode.taught else 0
        return (teaches, writes, 0) if episode.from_pool else (teaches, 0, writes)

    def forward(self, episode: Episode, pool: Memory, at_least: Sequence[int] = (0, 0, 0)) -> Outcome:
        """Write the episode's texts behind a part of the pool, and read its rows.

        Args:
            pool: of the learner's preset and compression; it is not changed.
            at_least: as many `passes` are made, the others for nothing: processes that share their weights gather
                them layer by layer, so all have to go through the layers equally often.
        """
        episode = self._replied(episode) if episode.replies else episode
        taught = self._teach(episode) if episode.taught else None
        idle = [most - mine for most, mine in zip(at_least, self.passes(episode), strict=True)]
        nothing = replace(episode, texts=((self.llm.first_token,),), rows=(Row((self.llm.first_token,), (0,), None),))
        for _ in range(idle[0]):
            self._teach(nothing)
        pool = pool if episode.from_pool and episode.fill == 1 else self._part(pool, episode)
        new, pool = self._remembered(pool, episode) if episode.from_pool else ([], pool)
        for _ in range(idle[1]):
            self._remembered(pool, nothing)
        before = _Pool(self, pool.slots)
        learned = [] if episode.from_pool else self._write(before, episode)
        vain = [self._write(before, nothing)[0].sum() for _ in range(idle[2])]
        cache, slots, texts = self._aged(pool, learned, episode)
        searches = self._searches(pool, episode) if self.retriever is not None else []
        seen = Seen(searches, slots, texts)
        with layers_seen(self.llm.decoder, partial(self._see, seen)) if searches else contextlib.nullcontext():
            logits, answers = self._read(cache, episode.rows)
        accuracy = float((logits.argmax(-1) == answers).float().mean())
        if taught is None:
            loss = nn.functional.cross_entropy(logits.float(), answers)
        else:
            loss = nn.functional.kl_div(logits.float().log_softmax(-1), taught, reduction="batchmean", log_target=True)
        outcome = Outcome(
            sum((0.0 * part for part in vain), loss),
            accuracy,
            [part.detach() for part in [*(new if episode.fill == 1 else []), *learned]],
        )
        return self._searched(outcome, seen) if self.retriever is not None else outcome

    def _part(self, pool: Memory, episode: Episode) -> Memory:
        """What stands of the pool in front of an episode's texts: as much as it says, of the newest."""
        c = self._tokens_per_slot(episode)
        slots = sum(self.rules.slots_of(len(text), self.settings.K, c) for text in episode.texts)
        M = min(int(episode.fill * pool.M), max(0, pool.N - slots))
        if not self.rules.write_many:
            M = max(M, min(pool.M, self.settings.K))
        start = pool.M - M
        return replace(
            pool, slots=pool.slots[:, start:], births=pool.births[:, start:], origins=pool.origins[:, start:]
        )

    @torch.no_grad()
    def _remembered(self, pool: Memory, episode: Episode) -> tuple[list[Tensor], Memory]:
        """New slots of each text, written one after another as in use, and the pool that holds them."""
        new = []
        for text in episode.texts:
            new += self._write(_Pool(self, pool.slots), replace(episode, texts=(text,)))
            pool = remember(pool, new[-1])
        return new, pool

    def _tokens_per_slot(self, episode: Episode) -> int:
        return self.settings.compression if episode.compression is None else episode.compression

    # --- writing ----------------------------------------------------------------------------------------------------

    def _write(self, before: _Pool, episode: Episode) -> list[Tensor]:
        """New slots of each text, [L, k, d], with gradient."""
        device = self.sink.device
        texts = [torch.tensor(text, device=device) for text in episode.texts]
        if not self.rules.write_many:
            return self._write_paper(before, texts, episode.in_sequence)
        new: list[Tensor] = []
        c = self._tokens_per_slot(episode)
        if episode.in_sequence:
            for text in texts:
                cache = self._cache(before, new, None)
                with self._using(WRITE):
                    new.append(write_exact(self.llm.decoder, cache, [text], [(c, self.settings.choice)])[0])
            return new
        with self._using(WRITE):
            cache = self._cache(before, [], None)
            return write_exact(self.llm.decoder, cache, texts, [(c, self.settings.choice)] * len(texts))

    def _write_paper(self, before: _Pool, texts: Sequence[Tensor], in_sequence: bool) -> list[Tensor]:
        new: list[Tensor] = []
        mark = self.mark.to(self.sink.dtype) if self.mark is not None else self.sink.new_zeros(self.sink.shape[-1])
        for text in texts:
            newest = torch.cat([before.slots, *(new if in_sequence else [])], dim=1)[:, -self.settings.K :]
            with self._using(WRITE):
                new.append(write_paper(self.llm.decoder, self.first, mark, newest, text, self.settings.K))
        return new

    # --- reading ----------------------------------------------------------------------------------------------------

    def _aged(self, pool: Memory, new: Sequence[Tensor], episode: Episode) -> tuple[Any, list[Tensor], Tensor]:
        """The pool with each text at its age, dropped from as often as its age says.

        Returns:
            A cache over it, its slots [L, any, d] in another order, and the number of each slot's text, [L, all].
        """
        generator = torch.Generator().manual_seed(episode.seed % (1 << 63))
        keys, fresh, texts = [pool.births.double()], [], [pool.births]
        if episode.last is not None:  # behind all others
            keys[0] += (pool.births == self._number(pool, episode, episode.last)).double() * (pool.updates + 1)
        for i, (slots, age) in enumerate(zip(new, episode.ages[: len(new)], strict=True)):
            L, k, _ = slots.shape
            share = memories.survival(pool.N, min(k, pool.N - 1), age)
            m = max(1, round(share * k))
            stays = torch.rand(L, k, generator=generator).argsort(1)[:, :m].sort(1).values.to(slots.device)
            fresh.append(slots.gather(1, stays[..., None].expand(-1, -1, slots.shape[2])) if m < k else slots)
            keys.append(torch.full((L, m), pool.updates - age + 0.5, dtype=torch.double))
            texts.append(torch.full((L, m), self._number(pool, episode, i), dtype=torch.int32))
        order = torch.cat(keys, dim=1).argsort(dim=1, stable=True)
        old = pool.slots.to(self.sink.device)
        return self._cache(old, fresh, order), [old, *fresh], torch.cat(texts, dim=1)

    def _read(self, cache: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Logits of all answers' tokens, [tokens, vocab], and the tokens, [tokens]."""
        device = self.sink.device
        tokens = pad_sequence([torch.tensor(row.prompt + row.answer) for row in rows], batch_first=True).to(device)
        with self._using(READ):
            hidden = self.llm.decoder.body(
                input_ids=tokens, attention_mask=attention_mask(cache, tokens), past_key_values=cache, use_cache=False
            ).last_hidden_state
        return self._at_answers(hidden, tokens, rows, 0)

    def _at_answers(self, hidden: Tensor, tokens: Tensor, rows: Sequence[Row], lead: int) -> tuple[Tensor, Tensor]:
        at = [(i, lead + len(row.prompt) + j) for i, row in enumerate(rows) for j in range(len(row.answer))]
        row, column = torch.tensor(at, device=hidden.device).T
        return self.llm.decoder.logits(hidden[row, column - 1]), tokens[row, column]

    def _replied(self, episode: Episode) -> Episode:
        """The episode with the plain model's own replies as answers, greedy, each up to an end token and with it."""
        llm = self.llm
        prompts = [[*llm.prompts_or_raise().opening, *row.prompt] for row in episode.rows]
        said = llm.generate_rows(llm.text_context([]), prompts, episode.replies)
        rows = (replace(row, answer=tuple(ids.tolist())) for row, ids in zip(episode.rows, said, strict=True))
        return replace(episode, rows=tuple(rows))

    @torch.no_grad()
    def _teach(self, episode: Episode) -> Tensor:
        """Log-probabilities of the plain model with the row's text in its context, [tokens, vocab]."""
        logits = []
        first = self.llm.prompts_or_raise().opening if episode.replies else [self.llm.first_token]
        for row in episode.rows:
            text = episode.texts[row.about] if row.about is not None else ()
            lead = len(first) + len(text)
            tokens = torch.tensor([[*first, *text, *row.prompt, *row.answer]], device=self.sink.device)
            with self._using(None):
                hidden = self.llm.decoder.body(input_ids=tokens, use_cache=False).last_hidden_state
            logits.append(self._at_answers(hidden, tokens, [row], lead)[0])
        return torch.cat(logits).float().log_softmax(-1)

    # --- the retriever ----------------------------------------------------------------------------------------------

    def _number(self, pool: Memory, episode: Episode, text: int) -> int:
        """How slots of a text are numbered: as the pool's are, by update; pieces of one document go together."""
        if episode.from_pool:
            return pool.updates - len(episode.texts) + 1 + text
        return pool.updates + 1 + episode.names.index(episode.names[text])

    def _searches(self, pool: Memory, episode: Episode) -> list[Search]:
        """The rows that are about a text; by their prompts, or where text just goes on by a random part of it."""
        generator, searches = torch.Generator().manual_seed(episode.seed % (1 << 63)), []
        for i, row in enumerate(episode.rows):
            if row.about is None:
                continue
            n = len(row.prompt)
            if n == 1:  # Source: the released `random_retriever_length`
                n += int(torch.randint(len(row.answer), (), generator=generator))
            searches.append(Search(i, n, self._number(pool, episode, row.about)))
        return searches

    def _see(self, seen: Seen, i: int, hidden: Tensor) -> Tensor:
        """Note what layer i sees, within its own forward, where its weights are whole; without gradient."""
        normed, searches = self.llm.decoder.normed, seen.searches
        with torch.no_grad():
            seen.asked.append(normed(i, torch.cat([hidden[search.row, : search.tokens] for search in searches])))
            seen.keys.append(normed(i, torch.cat([slots[i] for slots in seen.slots])))
        return hidden

    def _searched(self, outcome: Outcome, seen: Seen) -> Outcome:
        """The outcome with the retriever's loss; every weight of it has a gradient, on all processes alike."""
        assert self.retriever is not None
        loss = outcome.loss + 0.0 * torch.stack([part.sum() for part in self.retriever.parameters()]).sum()
        learned = self.retriever(seen) if seen.searches else None
        if learned is None:
            return replace(outcome, loss=loss)
        search, precision = learned
        return replace(outcome, loss=loss + self.weight * search, search=float(search.detach()), precision=precision)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _using(self, name: str | None) -> contextlib.AbstractContextManager[None]:
        assert self.llm.adapters is not None
        return self.llm.adapters.use(name)

    def _cache(self, before: _Pool | Tensor, fresh: Sequence[Tensor], order: Tensor | None) -> Any:
        """A cache over [first ; pool ; fresh slots], or over the slots in another order.

        Args:
            before: the pool; slots [L, M, d] are projected with gradient, like all that is fresh.
            fresh: [L, k, d] each, projected with gradient inside each layer's own forward.
            order: [L, M + all k], which slot stands where.
        """
        decoder, s = self.llm.decoder, self.first.shape[1]
        pooled = before if isinstance(before, _Pool) else None
        slots = before.slots if isinstance(before, _Pool) else before
        hidden = torch.cat([self.first, *([] if pooled else [slots]), *fresh], dim=1)  # first may be learned
        P = s + slots.shape[1] + sum(part.shape[1] for part in fresh)
        positions, places = torch.arange(P, device=hidden.device)[None], None
        if order is not None:  # attention asks for no order among keys: each is rotated to its place where it is
            behind = torch.arange(s).expand(len(order), -1)
            places = torch.cat([behind, s + order.argsort(dim=1)], dim=1).to(hidden.device)

        def kv(i: int) -> KV:
            assert self.llm.adapters is not None
            with self.llm.adapters.use(READ):
                keys, values = decoder.keys_values(i, hidden[i][None])
                if pooled:
                    keys, values = (
                        torch.cat([own[:, :, :s], old, own[:, :, s:]], dim=2)
                        for own, old in zip((keys, values), pooled(i), strict=True)
                    )
            if places is None:
                return decoder.rotate(i, keys, positions), values
            if not decoder.slides:
                return decoder.rotate(i, keys, places[i][None]), values
            back = places[i].argsort()  # a window counts keys as they stand
            return decoder.rotate(i, keys.index_select(2, back), positions), values.index_select(2, back)

        return memory_cache([KVPrefix(P, [partial(kv, i) for i in range(decoder.L)])], decoder, store=False)


def remember(pool: Memory, slots: Tensor) -> Memory:
    """The pool after an update with new slots, [L, k, d]."""
    return memories.update(pool, Update.drawn(pool, slots[:, -min(slots.shape[1], pool.N) :].to(pool.slots.dtype)))


class _Pool:
    """The pool's slots behind which texts are written, projected once, without gradient, in each layer's own forward.

    Args:
        slots: [L, M, d].
    """

    def __init__(self, learner: Learner, slots: Tensor) -> None:
        self.slots, self._decoder = slots.to(learner.sink.device), learner.llm.decoder
        self._made: dict[int, KV] = {}

    def __call__(self, i: int) -> KV:
        """Keys without rotation, and values, of layer i; under the adapter that is active."""
        if i not in self._made:
            with torch.no_grad():
                self._made[i] = self._decoder.keys_values(i, self.slots[i][None])
        return self._made[i]
