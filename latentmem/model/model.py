"""A language model with a memory: write, ask, stream, generate, score (letters: `latentmem.core`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from transformers import Cache

from latentmem.core.memory import Memory
<<<<<<< HEAD
from latentmem.decoder.cache import Front
from latentmem.files import snapshot as _snapshot  # noqa: F401 - gives `Memory` its `save` and `load`
from latentmem.model import beginning, context, generating, provenance, scoring, writing
from latentmem.model.backbone import Backbone, Ids
from latentmem.model.context import Context
from latentmem.model.prompts import Message
from latentmem.model.scoring import Score
from latentmem.model.writing import Progress
=======
from latentmem.core.read import Prefix, read
from latentmem.core.write import first_states, write_exact, write_exact_rows, write_paper
from latentmem.decoder import attention, linear
from latentmem.decoder.adapters import READ, WRITE, Adapters, bits, changes
from latentmem.decoder.attention import KV
from latentmem.decoder.cache import KVPrefix, MemoryCache, attention_mask, functional_cache, memory_cache
from latentmem.decoder.decoder import Decoder
from latentmem.errors import OtherModelError, TooLongError
from latentmem.files import snapshot as _snapshot  # noqa: F401 - gives `Memory` its `save` and `load`
from latentmem.longterm import longterm as longterms
from latentmem.longterm.search import Projectors, Retrieval, RetrievedPrefix, Retriever
from latentmem.model import streaming
from latentmem.model.prompts import Message, Prompts, Style
>>>>>>> bb14a36 (Long-term memory and decoder: classes and methods are named after the noun that is meant)

Texts = str | Sequence[str]
Memories = Memory | Sequence[Memory]


<<<<<<< HEAD
class MemoryModel(Backbone):
=======
@dataclass(frozen=True)
class Trained:
    """What a released checkpoint adds to its base model.

    Args:
        bos: what stands first in each layer, [L, 1, d].
        mark: what a write adds to the last K positions of each layer, [d].
        pool: the checkpoint's own memory.
    """

    bos: Tensor
    mark: Tensor
    pool: Memory


@dataclass(frozen=True)
class Shape:
    """The memory that trained adapters were trained with: what `empty` makes unless told otherwise.

    Args:
        N, K, compression, choice: as in `Memory`.
    """

    N: int
    K: int
    compression: int
    choice: str = "last"


@dataclass(frozen=True)
class Score:
    """How likely given tokens are as a continuation.

    Args:
        logprobs: natural log of the probability of each token given all before it, [n].
        hits: whether the token was the most likely one, [n] bool.
        likeliest: the token that was the most likely one, [n].
    """

    logprobs: Tensor
    hits: Tensor
    likeliest: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


@dataclass(frozen=True)
class Context:
    """What stands in front of rows: memories (`MemoryModel.behind`) or text (`MemoryModel.plain`).

    Args:
        fronts: one for any number of rows, or one for each row; None where nothing stands in front.
        rooms: tokens that fit behind each.
        adapter: which adapter reads them, if any.
        searched: the memories whose long-term part is still to be searched for what a row asks; () or one for each.
    """

    fronts: tuple[KVPrefix | None, ...]
    rooms: tuple[int, ...]
    adapter: str | None
    searched: tuple[Memory | None, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Positions of each front, with what will be retrieved."""
        searched = self.searched or (None,) * len(self.fronts)
        both = zip(self.fronts, searched, strict=True)
        return [(front.P if front else 0) + (memory.R if memory else 0) for front, memory in both]

    @property
    def length(self) -> int:
        """Positions of the longest front."""
        return max(self.lengths)

    @property
    def room(self) -> int:
        """Tokens that fit behind every front."""
        return min(self.rooms)

    def of(self, rows: Sequence[int]) -> Context:
        """The context of these rows."""
        if len(self.fronts) == 1:
            return self
        searched = tuple(self.searched[i] for i in rows) if self.searched else ()
        return Context(tuple(self.fronts[i] for i in rows), tuple(self.rooms[i] for i in rows), self.adapter, searched)


class MemoryModel:
>>>>>>> bb14a36 (Long-term memory and decoder: classes and methods are named after the noun that is meant)
    """A transformers decoder that reads and writes memories; made by `latentmem.load`.

    The model is fixed and holds no memory: memories are values that go in and come out. What is derived from a memory
    (its keys and values) is kept as long as that memory is referenced somewhere.

    Args:
        base: the plain transformers model; its weights are frozen here.
        tokenizer: its tokenizer, or None: then only the methods that take token ids work.
        name: how it was loaded; written into its memories as a hint.
        style: how texts and questions are put.
        adapters: the write/read pair inside `base`, if any.
        trained: bos, mark and pool of a released checkpoint, if any.
        shape: of the memory that the adapters were trained with, if it is known.
        projectors: a trained retriever of a long-term memory, if any.
        first_token: id of the sink; by default bos, else the first id of the chat template.
        identity: hash of the weights; by default `fingerprint(base)`.

    Raises:
        ValueError: an architecture that is not understood.
    """

<<<<<<< HEAD
=======
    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: Any = None,
        *,
        name: str = "",
        style: Style | None = None,
        adapters: Adapters | None = None,
        trained: Trained | None = None,
        shape: Shape | None = None,
        projectors: Projectors | None = None,
        first_token: int | None = None,
        identity: str | None = None,
    ) -> None:
        self.base, self.tokenizer, self.name = base.eval(), tokenizer, name
        self.identity = identity or fingerprint(base)
        base.requires_grad_(False)
        attention.choose(base)
        linear.choose(base)
        self.decoder = Decoder(base)
        self.adapters, self.trained, self.shape = adapters, trained, shape
        self.retriever = Retriever(self.decoder, projectors)
        self.prompts = Prompts(tokenizer, style) if tokenizer is not None else None
        self.tokenizer_identity = self.prompts.identity if self.prompts else ""
        self._first_token = first_token
        self._first: Tensor | None = None
        self.prefix_bytes: int | None = None  # up to which keys and values are kept; None: as long as their memories
        self._prefixes: weakref.WeakKeyDictionary[Memory, Prefix] = weakref.WeakKeyDictionary()
        self._stamp = self._state()

    def with_trained(self, trained: Trained | None) -> MemoryModel:
        """The same model, weights and adapters with another bos, mark and pool; nothing is copied."""
        other = copy.copy(self)
        other.trained, other._first, other._prefixes = trained, None, weakref.WeakKeyDictionary()
        return other

>>>>>>> bb14a36 (Long-term memory and decoder: classes and methods are named after the noun that is meant)
    # --- memories ---------------------------------------------------------------------------------------------------

    def empty(
        self,
        N: int | None = None,
        K: int | None = None,
        preset: str | None = None,
        compression: int | None = None,
        seed: int = 0,
        choice: str | None = None,
        longterm: int | Mapping[str, Any] | None = None,
    ) -> Memory:
        """A memory to begin with: one that holds nothing, or, for a released checkpoint, the checkpoint's own pool.

        What is not given is as the adapters were trained; without adapters as follows.

        Args:
            N: slots that a layer can hold; by default 2048, or the largest power of two that fits the context.
            K: slots that one update may write per layer; by default 256, or an eighth of a smaller N.
            preset: "exact" (default) or "paper"; see `core.write`.
            compression: tokens per slot, by default 1, "exact" only; above 1 only a trained model reads them well.
            seed: determines every random drop.
            choice: which token of c becomes a slot, by default "last" of each group; "surprise" those of a piece that
                were expected least.
            longterm: R, the slots that a question takes from what the memory has dropped, or a mapping with it and more
                fields of `longterm.LongTerm`; by default what is dropped is lost.

        Raises:
            ValueError: sizes that do not fit each other, the model's context, or the checkpoint.
        """
        return beginning.empty(self, N, K, preset, compression, seed, choice, longterm)

    def blank(self) -> Memory:
        """A memory without a slot, so that the plain model answers, also for a checkpoint with a pool of its own."""
<<<<<<< HEAD
        return beginning.blank(self.empty())
=======
        start = self.empty()
        slots, births, origins = start.slots[:, :0], start.births[:, :0], start.origins[:, :0]
        return replace(start, slots=slots, births=births, origins=origins, longterm=None)

    def _with_longterm(self, pool: Memory, settings: dict[str, Any]) -> Memory:
        """A checkpoint's pool with a long-term memory; one that has its own keeps it."""
        if pool.longterm is None:
            places = torch.arange(pool.M, dtype=torch.int32).expand(pool.L, -1)
            return replace(pool, longterm=replace(longterms.empty(pool.L, **settings), places=places))
        for what, value in settings.items():
            if value != getattr(pool.longterm, what):
                raise ValueError(
                    f"this checkpoint's long-term memory has {what}={getattr(pool.longterm, what)}, got {value}; "
                    f"leave it out."
                )
        return pool

    def check(self, memory: Memory) -> None:
        """Refuse a memory that this model can not read.

        Raises:
            ValueError: it was written by another model, other adapters, another tokenizer or in another dtype.
        """
        mine = {
            "model": self.identity,
            "adapters": self.adapters.identity if self.adapters else "",
            "tokenizer": self.tokenizer_identity,
        }
        for what, identity in mine.items():
            theirs = getattr(memory, what)
            if theirs != identity:
                raise OtherModelError(
                    f"this memory was written with another {what.removesuffix('s')} "
                    f"({memory.model_name or 'unnamed'}, {theirs[:12] or 'none'}) than this model "
                    f"({self.name or 'unnamed'}, {identity[:12] or 'none'}). Load the model that wrote it, "
                    f"or write the text again."
                )
        if memory.slots.dtype != self.decoder.dtype:
            raise OtherModelError(
                f"this memory holds {str(memory.slots.dtype)[6:]}, the model runs in {str(self.decoder.dtype)[6:]}. "
                f"Load the model with dtype={str(memory.slots.dtype)[6:]!r}."
            )

    # --- token ids --------------------------------------------------------------------------------------------------

    def new_slots(self, memory: Memory, ids: Ids) -> Tensor:
        """What one update would write: the new slots of one piece of text, differentiable where gradients are on.

        Args:
            ids: at most `memory.piece` tokens, [n].

        Returns:
            [L, k, d]; "exact": k = ceil(n / c), "paper": k = K once the memory is full.
        """
        self.check(memory)
        tokens = self._ids(ids)
        if len(tokens) > memory.piece:
            raise ValueError(
                f"one update reads at most {memory.piece} tokens, got {len(tokens)}; `write_ids` cuts them."
            )
        with self.using(WRITE):
            if memory.preset == "paper":
                mark = self.trained.mark if self.trained else memory.slots.new_zeros(memory.d)
                newest = memory.slots.to(self.decoder.device)[:, -memory.K :]
                return write_paper(self.decoder, self.first, mark, newest, tokens, memory.K)
            cache = self._functional(memory) or self._prefix(memory).cache(store=False)
            return write_exact(self.decoder, cache, tokens, memory.compression, memory.choice)

    @overload
    def write_ids(self, memory: Memory, ids: Ids, source: str = ..., progress: Progress | None = ...) -> Memory: ...

    @overload
    def write_ids(
        self, memory: Sequence[Memory], ids: Sequence[Ids], source: str = ..., progress: Progress | None = ...
    ) -> list[Memory]: ...

    @torch.no_grad()
    def write_ids(
        self,
        memory: Memory | Sequence[Memory],
        ids: Ids | Sequence[Ids],
        source: str = "text",
        progress: Progress | None = None,
    ) -> Memory | list[Memory]:
        """Write tokens into a memory, in pieces of at most `memory.piece`, one update each.

        Several memories take their texts at once, piece by piece: each as if it were written alone, but for rounding
        (1e-4 in float32), because padding and another batch size round otherwise. The preset "paper" takes its turn
        one memory after another.

        Args:
            ids: tokens, [n], n >= 1, written as they are, without any wrapping; or as many of them as memories.
            source: the name under which they are accounted.
            progress: called after each piece with (tokens done, tokens in all).

        Returns:
            The next memory, or a list of them; the given ones stay valid.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or a memory of another model.
        """
        if isinstance(memory, Memory):
            return self._write_all([memory], [self._ids(ids)], source, progress)[0]  # type: ignore[arg-type]
        return self._write_all(list(memory), [self._ids(i) for i in ids], source, progress)  # type: ignore[arg-type]

    def _write_all(
        self, after: list[Memory], texts: list[Tensor], source: str, progress: Progress | None
    ) -> list[Memory]:
        if len(after) != len(texts):
            raise ValueError(f"give as many texts as memories: got {len(texts)} and {len(after)}.")
        for memory in after:
            self.check(memory)
        pieces = [text.split(memory.piece) for memory, text in zip(after, texts, strict=True)]
        done, total = 0, sum(map(len, texts))
        for number in range(max(map(len, pieces), default=0)):
            waiting = [i for i, some in enumerate(pieces) if number < len(some)]
            together = [i for i in waiting if after[i].preset == "exact"]
            turns = _turns(together, [len(pieces[i][number]) for i in together], self.tokens_at_once)
            for rows in [*turns, *([i] for i in waiting if after[i].preset != "exact")]:
                read = [pieces[i][number] for i in rows]
                for i, new in zip(rows, self._new_slots([after[i] for i in rows], read), strict=True):
                    after[i] = self._following(after[i], new, source, len(pieces[i][number]))
                done += sum(map(len, read))
                if progress:
                    progress(done, total)
        return after

    def _new_slots(self, memories: Sequence[Memory], pieces: Sequence[Tensor]) -> list[Tensor]:
        """`new_slots` of several memories of the preset "exact" in one pass, without gradients."""
        if len(memories) == 1:
            return [self.new_slots(memories[0], pieces[0])]
        context = Context(tuple(self._prefix(m).front for m in memories), (), WRITE)
        tokens = torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
        with self.using(WRITE):
            cache = memory_cache([front for front in context.fronts if front], self.decoder, store=False)
            placed = self._placed(context, tokens)
            return write_exact_rows(
                self.decoder, cache, pieces, [(m.compression, m.choice) for m in memories], **placed
            )

    @property
    def tokens_at_once(self) -> int:
        """Tokens that are written in one pass; more bring nothing once they keep the device busy, and take memory."""
        return 1024 if self.decoder.device.type == "cpu" else 16_384

    def _following(self, memory: Memory, new: Tensor, source: str, tokens: int) -> Memory:
        """The memory after an update, with its prefix derived from the one before."""
        dropped = memories.draw(memory, new.shape[1])
        on_device = replace(memory, slots=memory.slots.to(new.device))
        keys = self.retriever.new_keys(on_device, dropped) if memory.longterm is not None else None
        following = memories.update(on_device, new, dropped=dropped, source=source, tokens=tokens, keys=keys)
        with self.using(READ):
            fresh = self.decoder.project_all(new)
        self._keep(following, self._prefix(memory).after(memories.kept(dropped, memory.M), fresh))
        return following

    @overload
    def logits(self, memory: Memory, ids: Ids, *, return_retrieved: Literal[False] = ...) -> Tensor: ...

    @overload
    def logits(self, memory: Memory, ids: Ids, *, return_retrieved: Literal[True]) -> tuple[Tensor, list[Tensor]]: ...

    def logits(
        self, memory: Memory, ids: Ids, *, return_retrieved: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits of the next token at every position of `ids` read behind the memory, [n, vocab].

        Differentiable in the memory's slots and in whatever weights have gradients on.

        Args:
            return_retrieved: give the long-term slots that `ids` take, too: for each layer the places in its store,
                [R] int64, oldest first.
        """
        tokens = self._ids(ids)
        chosen = self._chosen(memory, tokens)
        logits = self._read(memory, tokens[None], chosen)
        if not return_retrieved:
            return logits
        return logits, chosen.places if chosen else [torch.zeros(0, dtype=torch.long)] * self.decoder.L

    def _chosen(self, memory: Memory, tokens: Tensor) -> Retrieval | None:
        """What tokens [n] take of the long-term memory; None: there is nothing to take."""
        self.check(memory)
        if not memory.needs_search:
            return None
        prefix = self._prefix(memory)
        with torch.no_grad(), self.using(READ):
            return self.retriever.retrieve(memory, prefix, tokens, self._asking(tokens))

    def _asking(self, prompt: Tensor) -> Tensor:
        """Which tokens of a prompt [n] are no part of what the model's template puts around a question, [n] bool."""
        asking = torch.ones(len(prompt), dtype=torch.bool)
        ids = prompt.tolist()
        before, after = self.prompts.frame if self.prompts is not None else ([], [])
        if len(ids) > len(before) + len(after):
            asking[: len(before)] = ids[: len(before)] != before
            asking[len(ids) - len(after) :] = ids[len(ids) - len(after) :] != after
        return asking

    def _read(self, memory: Memory, tokens: Tensor, chosen: Retrieval | None) -> Tensor:
        """`logits` of tokens [1, n] behind a memory and the long-term slots `chosen`."""
        self._fits(memory, tokens.shape[1])
        if not memory.holds:
            with self.using(None):
                return self.base(input_ids=tokens, use_cache=False).logits[0]
        with self.using(READ):
            cache = self._functional(memory, chosen)
            if cache is None:
                cache = memory_cache([self._front(memory, chosen, tokens[0])], self.decoder, store=False)
            mask = attention_mask(cache, tokens)
            return self.base(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=False).logits[0]

    def _front(self, memory: Memory, chosen: Retrieval | None, asked: Tensor) -> KVPrefix:
        prefix = self._prefix(memory)
        return self.retriever.prefix(memory, prefix, chosen, asked) if chosen else prefix.front

    def front(self, memory: Memory, ids: Ids) -> KVPrefix | None:
        """What stands in front of a prompt: a memory with the long-term slots that the prompt takes; None: nothing."""
        asked = self._ids(ids)
        chosen = self._chosen(memory, asked)
        return self._front(memory, chosen, asked) if memory.holds else None

    @torch.no_grad()
    def search_again(self, front: KVPrefix | None, said: Ids) -> bool:
        """Let what was asked and what was answered lately take other long-term slots; whether they are others."""
        if not isinstance(front, RetrievedPrefix):
            return False
        answered = self._ids(said)
        asking = torch.cat([self._asking(front.asked), torch.ones(len(answered), dtype=torch.bool)])
        with self.using(READ):
            ids = torch.cat([front.asked, answered])
            return front.take(self.retriever.retrieve(front.memory, front.prefix, ids, asking))

    @torch.no_grad()
    def score(self, memory: Memory, ids: Ids, answer: Ids) -> Score:
        """How likely `answer` is after `ids` behind the memory."""
        return self.score_rows(self.behind(memory), [ids], [answer])[0]

    @torch.no_grad()
    def attended(self, memory: Memory, ids: Ids, answer: Ids) -> Tensor:
        """Which slots an answer was drawn from: the share of attention that each gets while the answer is said.

        Args:
            ids: what was asked.
            answer: what was said.

        Returns:
            [L, R + M] float32 on the CPU, the R long-term slots first that the question takes; the mean over heads and
            over the answer's tokens. What is missing to 1 in a layer went to the first position and to the text itself.

        Raises:
            ValueError: no ids, a memory of another model, or an attention that shows no weights.
        """
        return self._attended(memory, ids, answer)[0]

    def _attended(self, memory: Memory, ids: Ids, answer: Ids) -> tuple[Tensor, Retrieval | None]:
        asked, said = self._ids(ids), self._ids(answer)
        chosen = self._chosen(memory, asked)
        with attention.watching(self.base) as seen:
            self._read(memory, torch.cat([asked, said])[None], chosen)
        if len(seen) != self.decoder.L:
            raise ValueError(f"the attention of {self.name} gave weights in {len(seen)} of {self.decoder.L} layers.")
        P = self.positions(memory)
        start = P - memory.M - memory.R
        mass = torch.stack([layer[-len(said) - 1 : -1, start:P].mean(0) for layer in seen]).cpu()
        if chosen:
            mass = mass.gather(1, torch.stack(chosen.order).argsort(1))
        return mass, chosen

    @torch.no_grad()
    def sources_of(self, memory: Memory, question: str | list[Message], answer: str) -> dict[str, float]:
        """Which sources an answer drew on: the share of the attention to the memory that went to each.

        Args:
            question: as `ask` puts it; or the messages of a chat, of which the last was answered.
            answer: what was said.

        Returns:
            Name of each source -> share, the mean over layers; "" is what is older than the memory. They add up to 1,
            and an empty memory has none.

        Raises:
            ValueError: as `attended`.
        """
        if not memory.holds:
            return {}
        prompts = self.prompts_or_raise()
        if isinstance(question, str):
            asked, said = prompts.question(question, bare=True), prompts.answer(question, answer)
        else:
            asked, said = prompts.chat(question, bare=True), prompts.text(answer if prompts.chats else f" {answer}")
        mass, chosen = self._attended(memory, asked, said)
        mass = mass / mass.sum(1, keepdim=True)
        origins = memory.origins
        if memory.longterm is not None and chosen:
            retrieved = memory.longterm.column("origins").gather(1, torch.stack(chosen.places))
            origins = torch.cat([retrieved, origins], dim=1)
        names = {i: source.name for i, source in enumerate(memory.sources)}
        older = {-1: ""} if (origins < 0).any() else {}
        return {name: (mass * (origins == i)).sum(1).mean().item() for i, name in {**older, **names}.items()}

    def behind(self, memory: Memory | Sequence[Memory]) -> Context:
        """A memory as the context of many rows, or several as the contexts of as many rows.

        Raises:
            ValueError: a memory of another model.
        """
        some = [memory] if isinstance(memory, Memory) else list(memory)
        if not some:
            raise ValueError("no memory was given; give at least one.")
        for one in some:
            self.check(one)
        fronts = tuple(self._prefix(one).front if one.holds else None for one in some)
        searched = tuple(one if one.needs_search else None for one in some)
        return Context(fronts, tuple(self.room(one) for one in some), READ, searched if any(searched) else ())

    def retrieved(self, context: Context, prompts: Sequence[Ids]) -> Context:
        """The contexts of B prompts, each with what it takes of the long-term memory: searched once for many passes."""
        if not any(context.searched):
            return context
        times = len(prompts) // len(context.fronts)
        rows = zip(prompts, context.searched * times, context.fronts * times, strict=True)
        fronts = tuple(front if memory is None else self.front(memory, ids) for ids, memory, front in rows)
        return Context(fronts, context.rooms * times, context.adapter)

    @torch.no_grad()
    def plain(self, ids: Sequence[int]) -> Context:
        """Text as the context of many rows, read by the plain model: no memory, no adapter; `ids` may be empty."""
        if not len(ids):
            return Context((None,), (self._limit,), None)
        tokens = self._ids(ids)[None]
        self._fits(self.blank(), tokens.shape[1])
        cache = DynamicCache()
        with self.using(None):
            self.decoder.body(input_ids=tokens, past_key_values=cache, use_cache=True)
        n = tokens.shape[1]
        front = KVPrefix(n, [_always((layer.keys, layer.values)) for layer in cache.layers])
        return Context((front,), (self._limit - n,), None)

    @torch.no_grad()
    def score_rows(self, context: Context, ids: Sequence[Ids], answers: Sequence[Ids]) -> list[Score]:
        """How likely each of B answers is after its own prompt behind one context, or each behind its own.

        Args:
            ids: B prompts, [n] each.
            answers: B answers, [n] each.

        Raises:
            ValueError: empty rows, or prompt and answer do not fit into the model's context.
        """
        pairs = [(self._ids(i), self._ids(a)) for i, a in zip(ids, answers, strict=True)]
        scores: list[Score] = [Score(torch.empty(0), torch.empty(0))] * len(pairs)
        for rows in self._together(context, [0] * len(pairs)):
            for i, score in zip(rows, self._scores(context.of(rows), [pairs[i] for i in rows]), strict=True):
                scores[i] = score
        return scores

    def _scores(self, context: Context, pairs: list[tuple[Tensor, Tensor]]) -> list[Score]:
        """`score_rows` in one pass."""
        context = self.retrieved(context, [prompt for prompt, _ in pairs])
        rows = [torch.cat(pair) for pair in pairs]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # right: no row looks at its padding
        for row, room in zip(rows, context.rooms * (len(rows) // len(context.rooms)), strict=True):
            self._fits_behind(room, len(row))
        keep = tokens.shape[1] - min(len(prompt) for prompt, _ in pairs) + 1
        with self.using(_adapter(context)):
            cache = self._cache(context, store=False)
            logits = self.base(
                input_ids=tokens,
                **self._placed(context, tokens),
                past_key_values=cache,
                use_cache=False,
                logits_to_keep=keep,
            ).logits
        scores = []
        for row, (prompt, target) in zip(logits, pairs, strict=True):
            start = len(prompt) - 1 - (tokens.shape[1] - keep)
            found = row[start : start + len(target)].float()
            logprobs = found.log_softmax(-1).gather(1, target[:, None])[:, 0]
            likeliest = found.argmax(-1)
            scores.append(Score(logprobs, likeliest == target, likeliest))
        return scores

    @torch.no_grad()
    def generate_rows(self, context: Context, ids: Sequence[Ids], max_new_tokens: int) -> list[Tensor]:
        """Greedy continuations of B prompts behind one context, or each behind its own, at once.

        Args:
            ids: B prompts, [n] each; they are padded on the left.
            max_new_tokens: at most so many tokens are made for each.

        Returns:
            B tensors of new ids, [at most max_new_tokens] each, up to an end token and with it.

        Raises:
            ValueError: empty rows, or prompt and answer do not fit into the model's context.
        """
        found = self._generate(context, ids, do_sample=False, max_new_tokens=max_new_tokens)
        return [output[0, len(row) :] for output, row in zip(found, ids, strict=True)]

    def _generate(
        self, context: Context, ids: Sequence[Ids], streamer: Streamer | None = None, **generate_kwargs: Any
    ) -> list[Tensor]:
        """Transformers' `generate` for B prompts, in as few passes as are right.

        Args:
            streamer: made for the rows of each pass.

        Returns:
            For each prompt [answers, n + new]: the prompt and its continuations, up to where the last of them ended.
        """
        prompts = [self._ids(i) for i in ids]
        found: list[Tensor] = [torch.empty(0)] * len(prompts)
        settings = generate_kwargs.get("generation_config") or self.base.generation_config

        def option(name: str) -> Any:
            value = generate_kwargs.get(name)
            return getattr(settings, name, None) if value is None else value

        ends = option("eos_token_id")
        ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
        if option("pad_token_id") is None:
            generate_kwargs["pad_token_id"] = self._pad_id()
        pad = option("pad_token_id") or 0
        one = any(map(option, ("prompt_lookup_num_tokens", "assistant_model")))  # transformers takes one row
        lengths = [len(prompt) for prompt in prompts]
        for rows in self._together(context, lengths, 1 if one else ROWS, alone=any(_looks_back(option))):
            some, n = context.of(rows), max(lengths[i] for i in rows)
            for i, room in zip(rows, some.rooms * (len(rows) // len(some.rooms)), strict=True):
                self._fits_behind(room, lengths[i], option("max_new_tokens") or max(0, (option("max_length") or 0) - n))
            text = torch.ones(len(rows), n, dtype=torch.long, device=self.decoder.device)
            for line, i in zip(text, rows, strict=True):
                line[: n - lengths[i]] = 0
            some = self.retrieved(some, [prompts[i] for i in rows])
            cache = self._cache(some, store=True)
            with self.using(_adapter(some)):
                output = self.base.generate(
                    input_ids=torch.stack([_padded(prompts[i], n, pad) for i in rows]),
                    attention_mask=self._mask(some, text),
                    past_key_values=cache,
                    streamer=streamer(rows, ends) if streamer else None,
                    **self._searching(cache, n, generate_kwargs),
                )
            criteria = option("stopping_criteria") or option("stop_strings")
            for i, answers in zip(rows, output.unflatten(0, (len(rows), -1)), strict=True):
                answers = _ended(answers[:, n - lengths[i] :], lengths[i], ends)
                found[i] = _unpadded(answers, lengths[i], pad) if criteria and pad not in ends else answers
        return found

    def _together(
        self, context: Context, lengths: Sequence[int], most: int | None = None, *, alone: bool = False
    ) -> list[list[int]]:
        """Which rows go in one pass: at most `most` (`ROWS`); those without a memory apart, for the plain model.

        Transformers counts a sliding window in columns, so padding between memory and text would hide a part of the
        memory: then only texts of one length go together.

        Args:
            lengths: of each row's text, as far as it is padded on the left.
            alone: nothing may be padded, neither texts nor memories.
        """
        windows = self.decoder.slides
        if len(context.fronts) not in (1, len(lengths)):
            raise ValueError(f"give as many rows as memories: got {len(lengths)} and {len(context.fronts)}.")
        positions = context.lengths * len(lengths) if len(context.fronts) == 1 else context.lengths
        alike: dict[tuple[int, int], list[int]] = {}
        for i, (P, length) in enumerate(zip(positions, lengths, strict=True)):
            kind = (P if alone else min(P, 1), length if alone or (windows and P) else 0)
            alike.setdefault(kind, []).append(i)
        most = most or ROWS
        return [rows[i : i + most] for rows in alike.values() for i in range(0, len(rows), most)]

    def _cache(self, context: Context, *, store: bool) -> Cache | None:
        fronts = [front for front in context.fronts if front]
        return memory_cache(fronts, self.decoder, store=store) if fronts else None

    def _mask(self, context: Context, text: Tensor) -> Tensor:
        """The mask over memories and text, [B, P + n]: shorter memories are padded on the left."""
        P = context.length
        lengths = torch.tensor(context.lengths, device=text.device)[:, None]
        there = torch.arange(P, device=text.device)[None] >= P - lengths
        return torch.cat([there.long().expand(len(text), -1), text], dim=1)

    def _placed(self, context: Context, tokens: Tensor) -> dict[str, Tensor]:
        """Mask and, where memories differ in length, positions of tokens [B, n] without padding on the left."""
        mask = self._mask(context, torch.ones_like(tokens))
        if len(set(context.lengths)) == 1:
            return {"attention_mask": mask}
        start = torch.tensor(context.lengths, device=tokens.device)[:, None]
        return {"attention_mask": mask, "position_ids": start + torch.arange(tokens.shape[1], device=tokens.device)}

    @overload
    def generate_ids(self, memory: Memory, ids: Ids, cache: Cache | None = ..., **generate_kwargs: Any) -> Any: ...

    @overload
    def generate_ids(
        self, memory: Sequence[Memory], ids: Sequence[Ids], cache: None = ..., **generate_kwargs: Any
    ) -> list[Tensor]: ...

    @torch.no_grad()
    def generate_ids(
        self,
        memory: Memory | Sequence[Memory],
        ids: Ids | Sequence[Ids],
        cache: Cache | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Transformers' own `generate` behind a memory, or behind several at once: greedy, sampling, beams, streaming.

        Args:
            ids: the prompt, [n], or as many of them as memories.
            cache: of this memory and of a text already read (`text_cache`), to go on from; then `ids` is what follows.
            generate_kwargs: as in `generate`; greedy unless `do_sample=True`.

        Returns:
            What `generate` returns: prompt and continuation, [rows, n + new]; for several memories a list of such
            tensors, each up to where the last of its rows ended.

        Raises:
            ValueError: memory, prompt and answer do not fit into the model's context, or options that several
                memories do not take.
        """
        if not isinstance(memory, Memory):
            return self._generate_many(memory, ids, cache, generate_kwargs)  # type: ignore[arg-type]
        self.check(memory)
        tokens = self._ids(ids)[None]  # type: ignore[arg-type]
        _set_defaults(generate_kwargs)
        if self.base.generation_config.pad_token_id is None and generate_kwargs.get("pad_token_id") is None:
            generate_kwargs["pad_token_id"] = self._pad_id()
        if cache is None:
            cache = self.text_cache(memory, tokens)
        settings = generate_kwargs.get("generation_config") or self.base.generation_config
        new, longest, beams, rows = (
            generate_kwargs.get(key) or getattr(settings, key, None) or 0
            for key in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")
        )
        past = cache.get_seq_length() - self.positions(memory) if cache is not None else 0
        if past and max(beams, rows) > 1:
            raise ValueError("a cache that already holds text has one row: beams and several answers need a fresh one.")
        self._fits(memory, past + tokens.shape[1], new or max(0, longest - tokens.shape[1]))
        with self.using(READ if memory.holds else None):
            return self.base.generate(
                input_ids=tokens,
                attention_mask=attention_mask(cache, tokens),
                past_key_values=cache,
                **self._searching(cache, tokens.shape[1], generate_kwargs),
            )

    def _searching(self, cache: Cache | None, n: int, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Options of `generate` by which long-term memories are searched again while answers behind n tokens grow.

        Of several answers behind one memory the first that goes on is what is searched for.
        """
        if not isinstance(cache, MemoryCache):
            return generate_kwargs
        due = [(i, front) for i, front in enumerate(cache.fronts) if isinstance(front, RetrievedPrefix) and front.every]
        if not due:
            return generate_kwargs
        from transformers import StoppingCriteriaList

        settings = generate_kwargs.get("generation_config") or self.base.generation_config
        ends = generate_kwargs.get("eos_token_id") or settings.eos_token_id
        ended = torch.as_tensor([] if ends is None else ends, device=self.decoder.device).reshape(-1)
        searched = [0] * len(due)

        def again(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            changed, rows = False, cache.rows(len(ids))
            for k, (i, front) in enumerate(due):
                times = (ids.shape[1] - n) // front.every  # some ways to generate make several tokens at once
                if times <= searched[k]:
                    continue
                searched[k] = times
                mine = ids[[row == i for row in rows]]
                alive = mine[~torch.isin(mine[:, n:], ended).any(1)]
                if len(alive):
                    changed |= self.search_again(front, alive[0, -front.every :])
            if changed:
                cache.changed()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        criteria = [again, *(generate_kwargs.get("stopping_criteria") or [])]
        return {**generate_kwargs, "stopping_criteria": StoppingCriteriaList(criteria)}

    def _generate_many(
        self,
        memory: Sequence[Memory],
        ids: Sequence[Ids],
        cache: Cache | None,
        generate_kwargs: dict[str, Any],
        streamer: Streamer | None = None,
    ) -> list[Tensor]:
        one = [name for name in ("streamer", "return_dict_in_generate") if generate_kwargs.get(name)]
        if cache is not None or one:
            raise ValueError(f"{', '.join(['cache'] * (cache is not None) + one)}: this takes one memory, not a list.")
        if len(memory) != len(ids):
            raise ValueError(f"give as many prompts as memories: got {len(ids)} and {len(memory)}.")
        _set_defaults(generate_kwargs)
        settings = generate_kwargs.get("generation_config")
        if getattr(settings, "return_dict_in_generate", None):
            raise ValueError("return_dict_in_generate: this takes one memory, not a list.")
        answers = generate_kwargs.get("num_return_sequences") or getattr(settings, "num_return_sequences", None) or 1
        if streamer and answers > 1:
            raise ValueError(f"a stream gives one answer to each question, got num_return_sequences={answers}.")
        return self._generate(self.behind(memory), ids, streamer, **generate_kwargs) if len(ids) else []

    def text_cache(self, memory: Memory, ids: Ids | None = None, old: Cache | None = None) -> Cache | None:
        """A cache with the memory and no text in it; None for an empty memory: the plain model makes its own.

        Args:
            ids: what will be asked, and the long-term memory is searched for.
            old: one of this memory with text in it, which is given back where the same stands in front.

        Raises:
            ValueError: no ids for a memory that has a long-term part.
        """
        if not memory.holds:
            return None
        if ids is None and memory.needs_search:
            raise ValueError("this memory has a long-term part, which is searched for what is asked: give `ids`.")
        front = self._prefix(memory).front if ids is None else self.front(memory, ids)
        assert front is not None
        if isinstance(old, MemoryCache):
            there = old.fronts[0]
            if there is front:
                return old
            if isinstance(there, RetrievedPrefix) and there.reads_like(front):
                if there.take(there.first_retrieval):
                    old.changed()
                return old
        return memory_cache([front], self.decoder, store=True)
>>>>>>> bb14a36 (Long-term memory and decoder: classes and methods are named after the noun that is meant)

    # --- text -------------------------------------------------------------------------------------------------------

    @overload
    def write(
        self, memory: Memory, text: str, source: str = ..., role: str | None = ..., progress: Progress | None = ...
    ) -> Memory: ...

    @overload
    def write(
        self,
        memory: Sequence[Memory],
        text: Sequence[str],
        source: str = ...,
        role: str | None = ...,
        progress: Progress | None = ...,
    ) -> list[Memory]: ...

    def write(
        self,
        memory: Memories,
        text: Texts,
        source: str = "text",
        role: str | None = None,
        progress: Progress | None = None,
    ) -> Memory | list[Memory]:
        """Write a text into a memory, or each of several texts into a memory of its own, at once (see `write_ids`).

        Args:
            text: not empty; special tokens in it stay plain text.
            source: the name under which it is accounted, for example a file name.
            role: "raw", or "system", "user", "assistant" for a turn of the chat template; by default the model's style.
            progress: called after each piece with (tokens done, tokens in all).

        Returns:
            The next memory, or a list of them; the given ones stay valid.

        Raises:
            ValueError: an empty text, an unknown role, lists of different lengths, or a memory of another model.
        """
        memories, texts, single = _pairs(memory, text)
        ids = [self.prompts_or_raise().written(one, role) for one in texts]
        if single:
            return self.write_ids(memories[0], ids[0], source, progress)
        return self.write_ids(memories, ids, source, progress)

    @overload
    def ask(self, memory: Memory, question: str, **generate_kwargs: Any) -> str: ...

    @overload
    def ask(self, memory: Sequence[Memory], question: Sequence[str], **generate_kwargs: Any) -> list[str]: ...

    def ask(self, memory: Memories, question: Texts, **generate_kwargs: Any) -> str | list[str]:
        """Answer a question with a memory, or each of several with its own, at once.

        Greedy, at most 128 new tokens, unless `generate_kwargs` says otherwise.

        Raises:
            ValueError: an empty question, lists of different lengths, a question that does not fit into the model's
                context, or options that give more than one answer.
        """
        if generate_kwargs.get("num_return_sequences", 1) != 1 or generate_kwargs.get("return_dict_in_generate"):
            raise ValueError("`ask` gives one answer as text; use `generate_ids` for several, or for scores.")
        memories, prompts, single = self._questions(memory, question)
        if single:
            outputs = [self.generate_ids(memories[0], prompts[0], **generate_kwargs)]
        else:
            outputs = self.generate_ids(memories, prompts, **generate_kwargs)
        answers = [
            self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
            for output, prompt in zip(outputs, prompts, strict=True)
        ]
        return answers[0] if single else answers

    @overload
    def stream(self, memory: Memory, question: str, **generate_kwargs: Any) -> Iterator[str]: ...

    @overload
    def stream(
        self, memory: Sequence[Memory], question: Sequence[str], **generate_kwargs: Any
    ) -> Iterator[tuple[int, str]]: ...

    def stream(
        self, memory: Memories, question: Texts, **generate_kwargs: Any
    ) -> Iterator[str] | Iterator[tuple[int, str]]:
        """Answer a question piece by piece, or several at once; leaving the loop stops the generation.

        Returns:
            Pieces of text; for several questions pairs (number of the question, piece), as they come.
        """
        memories, prompts, single = self._questions(memory, question)
        if single:
            return self.stream_ids(memories[0], prompts[0], **generate_kwargs)
        return self.stream_ids(memories, prompts, **generate_kwargs)

    def _questions(self, memory: Memories, question: Texts) -> tuple[list[Memory], list[list[int]], bool]:
        memories, questions, single = _pairs(memory, question)
        prompts = self.prompts_or_raise()
        ids = [prompts.question(q, bare=m.holds) for m, q in zip(memories, questions, strict=True)]
        return memories, ids, single

    # --- token ids --------------------------------------------------------------------------------------------------

    def new_slots(self, memory: Memory, ids: Ids) -> Tensor:
        """What one update would write: the new slots of one piece of text, differentiable where gradients are on.

        Args:
            ids: at most `memory.piece` tokens, [n].

        Returns:
            [L, k, d]; "exact": k = ceil(n / c), "paper": k = K once the memory is full.
        """
        return writing.new_slots(self, memory, ids)

    @overload
    def write_ids(self, memory: Memory, ids: Ids, source: str = ..., progress: Progress | None = ...) -> Memory: ...

    @overload
    def write_ids(
        self, memory: Sequence[Memory], ids: Sequence[Ids], source: str = ..., progress: Progress | None = ...
    ) -> list[Memory]: ...

    def write_ids(
        self, memory: Memories, ids: Ids | Sequence[Ids], source: str = "text", progress: Progress | None = None
    ) -> Memory | list[Memory]:
        """Write tokens into a memory, in pieces of at most `memory.piece`, one update each.

        Several memories take their texts at once, piece by piece: each as if it were written alone, but for rounding
        (1e-4 in float32), because padding and another batch size round otherwise. The preset "paper" takes its turn
        one memory after another.

        Args:
            ids: tokens, [n], n >= 1, written as they are, without any wrapping; or as many of them as memories.
            source: the name under which they are accounted.
            progress: called after each piece with (tokens done, tokens in all).

        Returns:
            The next memory, or a list of them; the given ones stay valid.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or a memory of another model.
        """
        if isinstance(memory, Memory):
            return writing.write_all(self, [memory], [self.ids(ids)], source, progress)[0]  # type: ignore[arg-type]
        return writing.write_all(self, memory, [self.ids(i) for i in ids], source, progress)  # type: ignore[arg-type]

    @overload
    def generate_ids(self, memory: Memory, ids: Ids, cache: Cache | None = ..., **generate_kwargs: Any) -> Any: ...

    @overload
    def generate_ids(
        self, memory: Sequence[Memory], ids: Sequence[Ids], cache: None = ..., **generate_kwargs: Any
    ) -> list[Tensor]: ...

    def generate_ids(
        self, memory: Memories, ids: Ids | Sequence[Ids], cache: Cache | None = None, **generate_kwargs: Any
    ) -> Any:
        """Transformers' own `generate` behind a memory, or behind several at once: greedy, sampling, beams, streaming.

        Args:
            ids: the prompt, [n], or as many of them as memories.
            cache: of this memory and of a text already read (`text_cache`), to go on from; then `ids` is what follows.
            generate_kwargs: as in `generate`; greedy unless `do_sample=True`.

        Returns:
            What `generate` returns: prompt and continuation, [rows, n + new]; for several memories a list of such
            tensors, each up to where the last of its rows ended.

        Raises:
            ValueError: memory, prompt and answer do not fit into the model's context, or options that several
                memories do not take.
        """
        if isinstance(memory, Memory):
            return generating.generate_one(self, memory, ids, cache, generate_kwargs)  # type: ignore[arg-type]
        return generating.generate_many(self, memory, ids, cache, generate_kwargs)  # type: ignore[arg-type]

    @overload
    def stream_ids(self, memory: Memory, ids: Ids, **generate_kwargs: Any) -> Iterator[str]: ...

    @overload
    def stream_ids(
        self, memory: Sequence[Memory], ids: Sequence[Ids], **generate_kwargs: Any
    ) -> Iterator[tuple[int, str]]: ...

    def stream_ids(self, memory: Memories, ids: Ids | Sequence[Ids], **generate_kwargs: Any) -> Iterator[Any]:
        """Continue token ids and give the text in pieces; arguments as in `generate_ids`, pieces as in `stream`."""
        if isinstance(memory, Memory):
            return generating.stream_one(self, memory, ids, generate_kwargs)  # type: ignore[arg-type]
        return generating.stream_many(self, memory, ids, generate_kwargs)  # type: ignore[arg-type]

    def text_cache(self, memory: Memory, ids: Ids | None = None, old: Cache | None = None) -> Cache | None:
        """A cache with the memory and no text in it; None for an empty memory: the plain model makes its own.

        Args:
            ids: what will be asked, and the long-term memory is searched for.
            old: one of this memory with text in it, which is given back where the same stands in front.

        Raises:
            ValueError: no ids for a memory that has a long-term part.
        """
        return context.text_cache(self, memory, ids, old)

    # --- many rows behind one context -------------------------------------------------------------------------------

    def behind(self, memory: Memories) -> Context:
        """A memory as the context of many rows, or several as the contexts of as many rows.

        Raises:
            ValueError: a memory of another model.
        """
        return context.behind(self, memory)

    def plain(self, ids: Sequence[int]) -> Context:
        """Text as the context of many rows, read by the plain model: no memory, no adapter; `ids` may be empty."""
        return context.plain(self, ids)

    def retrieved(self, context_: Context, prompts: Sequence[Ids]) -> Context:
        """The contexts of B prompts, each with what it takes of the long-term memory: searched once for many passes."""
        return context.retrieved(self, context_, prompts)

    def front(self, memory: Memory, ids: Ids) -> Front | None:
        """What stands in front of a prompt: a memory with the long-term slots that the prompt takes; None: nothing."""
        return context.front_of(self, memory, ids)

    def generate_rows(self, context: Context, ids: Sequence[Ids], max_new_tokens: int) -> list[Tensor]:
        """Greedy continuations of B prompts behind one context, or each behind its own, at once.

        Args:
            ids: B prompts, [n] each; they are padded on the left.
            max_new_tokens: at most so many tokens are made for each.

        Returns:
            B tensors of new ids, [at most max_new_tokens] each, up to an end token and with it.

        Raises:
            ValueError: empty rows, or prompt and answer do not fit into the model's context.
        """
        outputs = generating.generate_rows(self, context, ids, do_sample=False, max_new_tokens=max_new_tokens)
        return [output[0, len(row) :] for output, row in zip(outputs, ids, strict=True)]

    def score_rows(self, context: Context, ids: Sequence[Ids], answers: Sequence[Ids]) -> list[Score]:
        """How likely each of B answers is after its own prompt behind one context, or each behind its own.

        Args:
            ids: B prompts, [n] each.
            answers: B answers, [n] each.

        Raises:
            ValueError: empty rows, or prompt and answer do not fit into the model's context.
        """
        return scoring.score_rows(self, context, ids, answers)

    # --- probabilities and sources ----------------------------------------------------------------------------------

    @overload
    def logits(self, memory: Memory, ids: Ids, *, return_retrieved: Literal[False] = ...) -> Tensor: ...

    @overload
    def logits(self, memory: Memory, ids: Ids, *, return_retrieved: Literal[True]) -> tuple[Tensor, list[Tensor]]: ...

    def logits(
        self, memory: Memory, ids: Ids, *, return_retrieved: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits of the next token at every position of `ids` read behind the memory, [n, vocab].

        Differentiable in the memory's slots and in whatever weights have gradients on.

        Args:
            return_retrieved: give the long-term slots that `ids` take, too: for each layer the places in its store,
                [R] int64, oldest first.
        """
        tokens = self.ids(ids)
        chosen = context.retrieve(self, memory, tokens)
        logits = scoring.logits(self, memory, tokens[None], chosen)
        if not return_retrieved:
            return logits
        return logits, chosen.places if chosen else [torch.zeros(0, dtype=torch.long)] * self.decoder.L

    def score(self, memory: Memory, ids: Ids, answer: Ids) -> Score:
        """How likely `answer` is after `ids` behind the memory."""
        return self.score_rows(self.behind(memory), [ids], [answer])[0]

    def attended(self, memory: Memory, ids: Ids, answer: Ids) -> Tensor:
        """Which slots an answer was drawn from: the share of attention that each gets while the answer is said.

        Args:
            ids: what was asked.
            answer: what was said.

        Returns:
            [L, R + M] float32 on the CPU, the R long-term slots first that the question takes; the mean over heads and
            over the answer's tokens. What is missing to 1 in a layer went to the first position and to the text itself.

        Raises:
            ValueError: no ids, a memory of another model, or an attention that shows no weights.
        """
        return provenance.attended(self, memory, ids, answer)[0]

    def sources_of(self, memory: Memory, question: str | list[Message], answer: str) -> dict[str, float]:
        """Which sources an answer drew on: the share of the attention to the memory that went to each.

        Args:
            question: as `ask` puts it; or the messages of a chat, of which the last was answered.
            answer: what was said.

        Returns:
            Name of each source -> share, the mean over layers; "" is what is older than the memory. They add up to 1,
            and an empty memory has none.

        Raises:
            ValueError: as `attended`.
        """
        return provenance.sources_of(self, memory, question, answer)

    def text_of(self, memory: Memory) -> Tensor:
        """The tokens that layer 0 still holds, [M] ids, oldest first; -1 for a slot that is no embedding.

        A slot of layer 0 in the preset "exact" is the embedding of its token: a memory gives its text away.
        """
<<<<<<< HEAD
        return provenance.text_of(self, memory)
=======
        self.check(memory)
        table = torch.nn.functional.normalize(self.base.get_input_embeddings().weight.float(), dim=1)
        slots = torch.nn.functional.normalize(memory.slots[0].to(table), dim=1)
        found = [(part @ table.T).max(dim=1) for part in slots.split(256)]
        return torch.cat([ids.where(likeness > 0.99, -1) for likeness, ids in found])

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def first_token(self) -> int:
        """Id of the token whose hidden states are the sink.

        Raises:
            ValueError: there is no tokenizer and no bos token.
        """
        token = self._first_token
        if token is None:
            token = self.prompts_or_raise().first_token if self.prompts else self.base.config.bos_token_id
        if token is None:
            raise ValueError("this model has no tokenizer and no bos token: give `first_token`.")
        return token

    @property
    def first(self) -> Tensor:
        """What stands in front of the slots in each layer, [L, 1, d]: the checkpoint's bos, or the sink."""
        self._forget_if_changed()
        first = self._first
        if first is None:
            if self.trained:
                first = self.trained.bos
            else:
                with torch.no_grad(), self.using(None):
                    first = first_states(self.decoder, self.first_token)
            self._first = first
        return first

    def positions(self, memory: Memory) -> int:
        """P, the positions that a memory takes in front of the text: sink or bos and M, or 0 if it is empty."""
        return self.first.shape[1] + memory.R + memory.M if memory.holds else 0

    def _prefix(self, memory: Memory) -> Prefix:
        """Keys and values of [first ; slots], made once per memory and derived from the parent's where it was there."""
        self._forget_if_changed()
        prefix = self._prefixes.get(memory)
        if prefix is None:
            with torch.no_grad(), self.using(READ):
                prefix = read(self.decoder, self.first, memory.slots.detach().to(self.decoder.device))
        self._keep(memory, prefix)
        return prefix

    def _keep(self, memory: Memory, prefix: Prefix) -> None:
        """Keep a memory's prefix as the one that was used last; the first ones go where there are too many bytes."""
        self._prefixes.pop(memory, None)  # the order of a dictionary is that in which keys came
        self._prefixes[memory] = prefix
        if self.prefix_bytes is None:
            return
        kept = self._kept()
        surplus = sum(one.nbytes for _, one in kept) - self.prefix_bytes
        for old, one in kept[:-1]:
            if surplus <= 0:
                return
            self._prefixes.pop(old, None)
            surplus -= one.nbytes

    @property
    def derived_bytes(self) -> int:
        """Bytes of the keys and values that are kept for memories which are still referenced."""
        return sum(prefix.nbytes for _, prefix in self._kept())

    def _kept(self) -> list[tuple[Memory, Prefix]]:
        """What is kept, the first used first."""
        while True:
            with contextlib.suppress(RuntimeError):  # a memory has just died in another thread
                return list(self._prefixes.items())

    def _forget_if_changed(self) -> None:
        """Drop what was derived from weights that were changed in place since, by an optimizer for example."""
        stamp = self._state()
        if stamp != self._stamp:
            self._prefixes.clear()
            self.retriever.clear()
            self._first, self._stamp = None, stamp

    def _state(self) -> tuple[int, torch.dtype, torch.device]:
        return changes(self.base), self.decoder.dtype, self.decoder.device

    def _functional(self, memory: Memory, chosen: Retrieval | None = None) -> Cache | None:
        """The prefix with gradients, if there is anything to differentiate; `chosen` of the long-term slots in it."""
        if not torch.is_grad_enabled():
            return None
        if not (memory.slots.requires_grad or any(p.requires_grad for p in self.base.parameters())):
            return None

        def reading(kv: Callable[[], KV]) -> Callable[[], KV]:
            def under_read() -> KV:
                with self.using(READ):
                    return kv()

            return under_read

        hidden = torch.cat([self.first, memory.slots.to(self.decoder.device)], dim=1)
        if memory.longterm is not None and chosen:
            store, s, layers = memory.longterm, self.first.shape[1], []
            for i, (places, order) in enumerate(zip(chosen.places, chosen.order, strict=True)):
                both = torch.cat([self.retriever.slots(store, i, places), hidden[i, s:]])
                layers.append(both[order.to(both.device)])
            hidden = torch.cat([hidden[:, :s], torch.stack(layers)], dim=1)
        return functional_cache(self.decoder, hidden, reading)

    def using(self, adapter: str | None) -> contextlib.AbstractContextManager[None]:
        """Around every pass: under this adapter, and without what a pass that was broken off has left."""
        attention.begin()
        return self.adapters.use(adapter) if self.adapters else contextlib.nullcontext()

    def _ids(self, ids: Ids) -> Tensor:
        """Check token ids and bring them to [n] on the model's device."""
        try:
            tokens = torch.as_tensor(ids, device=self.decoder.device)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"token ids must be one list of integers for each memory ({error}).") from None
        if tokens.numel() and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
            raise ValueError(f"token ids must be integers, got {str(tokens.dtype)[6:]}.")
        tokens = tokens.long()
        if tokens.ndim == 2 and tokens.shape[0] == 1:
            tokens = tokens[0]
        if tokens.ndim != 1 or tokens.shape[0] == 0:
            raise ValueError(f"token ids must be [n] with n >= 1, got the shape {list(tokens.shape)}.")
        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ValueError(
                f"token ids must lie between 0 and {vocabulary - 1}, got {tokens.min()} to {tokens.max()}."
            )
        return tokens

    def room(self, memory: Memory, more: int = 0) -> int:
        """Tokens of text and answer that fit behind a memory, once `more` slots are written into it."""
        if self.trained:  # a checkpoint was trained behind its pool
            return self._limit
        M = min(memory.N, memory.M + more)
        R = memory.longterm.takes if memory.longterm is not None and more else memory.R
        return self._limit - (1 + R + M if R + M else 0)

    @property
    def _limit(self) -> int:
        return getattr(self.base.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

    @staticmethod
    def _positions_needed(N: int, K: int, preset: str, compression: int, R: int = 0) -> int:
        """Positions of the longest pass: a question behind all slots, or one piece behind what a write sees."""
        seen, piece = (K, memories.PAPER_PIECE) if preset == "paper" else (N, K * compression)
        return 1 + max(R + N + 1, seen + piece)

    def _pad_id(self) -> int | None:
        """The id that fills rows which ended: the model's own, else its end token."""
        config = self.base.generation_config
        eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        return config.pad_token_id if config.pad_token_id is not None else eos

    def _fits_behind(self, room: int, n: int, new: int = 0) -> None:
        if room < n + new:
            raise TooLongError(
                f"the text takes {n} tokens and the answer up to {new}, and behind this context of "
                f"{self._limit - room} positions there is room for {room}. Shorten the text, or use a smaller memory."
            )

    def _fits(self, memory: Memory, n: int, new: int = 0) -> None:
        room = self.room(memory)
        if n + new > room:
            raise TooLongError(
                f"the text takes {n} tokens and the answer up to {new}, and behind this memory of {memory.M} slots "
                f"there is room for {room}. Shorten the text, or use a smaller memory."
            )

    def prompts_or_raise(self) -> Prompts:
        """How text becomes token ids; an error if the model was loaded without a tokenizer."""
        if self.prompts is None:
            raise ValueError("this model was loaded without a tokenizer: use the methods that take token ids.")
        return self.prompts

    def _decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
>>>>>>> bb14a36 (Long-term memory and decoder: classes and methods are named after the noun that is meant)


def _pairs(memory: Memories, text: Texts) -> tuple[list[Memory], list[str], bool]:
    """One memory and one text, or as many of both: (memories, texts, whether it was one of each)."""
    if isinstance(memory, Memory) and isinstance(text, str):
        return [memory], [text], True
    if isinstance(memory, Memory) or isinstance(text, str) or len(memory) != len(text):
        raise ValueError("give one memory and one text, or lists of the same length.")
    return list(memory), list(text), False
