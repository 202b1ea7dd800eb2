"""A language model with a memory: write, ask, chat, stream, generate, score (letters: `latentmem.core`)."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from latentmem.adapters import READ, WRITE, Adapters, bits, changes
from latentmem.core import attention
from latentmem.core import memory as memories
from latentmem.core.memory import Memory
from latentmem.core.prefix import KV, Decoder, Prefix, attention_mask, functional_cache, memory_cache, read
from latentmem.core.write import first_states, write_exact, write_paper
from latentmem.prompts import Prompts, Style

Ids = Tensor | Sequence[int]
Progress = Callable[[int, int], None]  # (tokens done, tokens in all)
MAX_NEW_TOKENS = 128  # of an answer, unless the caller says otherwise


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
class Score:
    """How likely given tokens are as a continuation.

    Args:
        logprobs: natural log of the probability of each token given all before it, [n].
        hits: whether the token was the most likely one, [n] bool.
    """

    logprobs: Tensor
    hits: Tensor


@dataclass(frozen=True)
class Context:
    """What stands in front of any number of rows: a memory (`MemoryModel.behind`) or text (`MemoryModel.plain`).

    Args:
        length: its positions.
        room: tokens that fit behind it.
        cache: gives a fresh cache over it, which stores the rows' text or not; None where there is nothing.
        adapter: which adapter reads it, if any.
    """

    length: int
    room: int
    cache: Callable[[bool], Cache | None]
    adapter: str | None


class MemoryModel:
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
        first_token: id of the sink; by default bos, else the first id of the chat template.
        identity: hash of the weights; by default `fingerprint(base)`.

    Raises:
        ValueError: an architecture that is not understood.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: Any = None,
        *,
        name: str = "",
        style: Style | None = None,
        adapters: Adapters | None = None,
        trained: Trained | None = None,
        first_token: int | None = None,
        identity: str | None = None,
    ) -> None:
        self.base, self.tokenizer, self.name = base.eval(), tokenizer, name
        self.identity = identity or fingerprint(base)
        base.requires_grad_(False)
        attention.choose(base)
        self.decoder = Decoder(base)
        self.adapters, self.trained = adapters, trained
        self.prompts = Prompts(tokenizer, style) if tokenizer is not None else None
        self.tokenizer_identity = self.prompts.identity if self.prompts else ""
        self._first_token = first_token
        self._first: Tensor | None = None
        self._prefixes: weakref.WeakKeyDictionary[Memory, Prefix] = weakref.WeakKeyDictionary()
        self._stamp = changes(base.parameters())

    # --- memories ---------------------------------------------------------------------------------------------------

    def empty(
        self,
        N: int | None = None,
        K: int | None = None,
        preset: str | None = None,
        compression: int = 1,
        seed: int = 0,
    ) -> Memory:
        """A memory to begin with: one that holds nothing, or, for a released checkpoint, the checkpoint's own pool.

        Args:
            N: slots that a layer can hold; by default 2048, or the largest power of two that fits the context.
            K: slots that one update may write per layer; by default 256, or an eighth of a smaller N.
            preset: "exact" (default) or "paper"; see `core.write`.
            compression: tokens per slot, "exact" only; above 1 only a trained model reads them well.
            seed: determines every random drop.

        Raises:
            ValueError: sizes that do not fit each other, the model's context, or the checkpoint.
        """
        if self.trained is not None:
            pool = self.trained.pool
            asked = {"N": N, "K": K, "preset": preset, "compression": compression}
            for what, value in asked.items():
                if value is not None and value != getattr(pool, what):
                    raise ValueError(
                        f"this checkpoint's memory has {what}={getattr(pool, what)}, got {value}; leave {what} out."
                    )
            return pool if seed == pool.seed else replace(pool, seed=seed)
        preset = preset or "exact"
        if N is None:
            N = 2048
            while N > 8 and self._positions_needed(N, K or min(256, N // 8), preset, compression) > self._limit:
                N //= 2
        K = min(256, max(1, N // 8)) if K is None else K
        memory = memories.empty(
            self.decoder.L,
            self.decoder.d,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
            N=N,
            K=K,
            preset=preset,
            compression=compression,
            seed=seed,
        )
        need = self._positions_needed(N, K, preset, compression)
        if need > self._limit:
            raise ValueError(
                f"a memory of N={N} slots and a text of {memory.piece} tokens need {need} positions, "
                f"and this model has {self._limit}. Choose a smaller N or K."
            )
        return replace(
            memory,
            model=self.identity,
            adapters=self.adapters.identity if self.adapters else "",
            tokenizer=self.tokenizer_identity,
            model_name=self.name,
        )

    def blank(self) -> Memory:
        """A memory without a slot, so that the plain model answers, also for a checkpoint with a pool of its own."""
        start = self.empty()
        slots, births, origins = start.slots[:, :0], start.births[:, :0], start.origins[:, :0]
        return replace(start, slots=slots, births=births, origins=origins)

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
                raise ValueError(
                    f"this memory was written with another {what.removesuffix('s')} "
                    f"({memory.model_name or 'unnamed'}, {theirs[:12] or 'none'}) than this model "
                    f"({self.name or 'unnamed'}, {identity[:12] or 'none'}). Load the model that wrote it, "
                    f"or write the text again."
                )
        if memory.slots.dtype != self.decoder.dtype:
            raise ValueError(
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
        with self._using(WRITE):
            if memory.preset == "paper":
                mark = self.trained.mark if self.trained else memory.slots.new_zeros(memory.d)
                newest = memory.slots.to(self.decoder.device)[:, -memory.K :]
                return write_paper(self.decoder, self.first, mark, newest, tokens, memory.K)
            cache = self._functional(memory) or self._prefix(memory).cache(store=False)
            return write_exact(self.decoder, cache, tokens, memory.compression)

    @torch.no_grad()
    def write_ids(self, memory: Memory, ids: Ids, source: str = "text", progress: Progress | None = None) -> Memory:
        """Write tokens into a memory, in pieces of at most `memory.piece`, one update each.

        Args:
            ids: tokens, [n], n >= 1, written as they are, without any wrapping.
            source: the name under which they are accounted.
            progress: called after each piece with (tokens done, tokens in all).

        Returns:
            The next memory; the given one stays valid.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or a memory of another model.
        """
        tokens = self._ids(ids)
        done = 0
        for piece in tokens.split(memory.piece):
            new = self.new_slots(memory, piece)
            dropped = memories.draw(memory, new.shape[1])
            following = memories.update(
                replace(memory, slots=memory.slots.to(new.device)),
                new,
                dropped=dropped,
                source=source,
                tokens=len(piece),
            )
            with self._using(READ):
                fresh = self.decoder.project_all(new)
            self._prefixes[following] = self._prefix(memory).after(memories.kept(dropped, memory.M), fresh)
            memory = following
            done += len(piece)
            if progress:
                progress(done, len(tokens))
        return memory

    def logits(self, memory: Memory, ids: Ids) -> Tensor:
        """Logits of the next token at every position of `ids` read behind the memory, [n, vocab].

        Differentiable in the memory's slots and in whatever weights have gradients on.
        """
        self.check(memory)
        tokens = self._ids(ids)[None]
        self._fits(memory, tokens.shape[1])
        if memory.M == 0:
            with self._using(None):
                return self.base(input_ids=tokens, use_cache=False).logits[0]
        with self._using(READ):
            cache = self._functional(memory) or self._prefix(memory).cache(store=False)
            mask = attention_mask(cache, tokens)
            return self.base(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=False).logits[0]

    @torch.no_grad()
    def score(self, memory: Memory, ids: Ids, answer: Ids) -> Score:
        """How likely `answer` is after `ids` behind the memory."""
        return self.score_rows(self.behind(memory), [ids], [answer])[0]

    def behind(self, memory: Memory) -> Context:
        """A memory as the context of many rows.

        Raises:
            ValueError: a memory of another model.
        """
        self.check(memory)
        if memory.M == 0:
            return Context(0, self.room(memory), lambda store: None, None)
        prefix = self._prefix(memory)
        return Context(prefix.P, self.room(memory), lambda store: prefix.cache(store=store), READ)

    @torch.no_grad()
    def plain(self, ids: Sequence[int]) -> Context:
        """Text as the context of many rows, read by the plain model: no memory, no adapter; `ids` may be empty."""
        if not len(ids):
            return Context(0, self._limit, lambda store: None, None)
        tokens = self._ids(ids)[None]
        self._fits(self.blank(), tokens.shape[1])
        cache = DynamicCache()
        with self._using(None):
            self.decoder.body(input_ids=tokens, past_key_values=cache, use_cache=True)
        n = tokens.shape[1]
        layers = [_always((layer.keys, layer.values)) for layer in cache.layers]
        return Context(n, self._limit - n, lambda store: memory_cache(layers, n, self.decoder, store=store), None)

    @torch.no_grad()
    def score_rows(self, context: Context, ids: Sequence[Ids], answers: Sequence[Ids]) -> list[Score]:
        """How likely each of B answers is after its own prompt behind one context, in one pass.

        Args:
            ids: B prompts, [n] each.
            answers: B answers, [n] each.

        Raises:
            ValueError: empty rows, or prompt and answer do not fit into the model's context.
        """
        if not ids:
            return []
        pairs = [(self._ids(i), self._ids(a)) for i, a in zip(ids, answers, strict=True)]
        rows = [torch.cat(pair) for pair in pairs]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # right: no row looks at its padding
        self._fits_behind(context, tokens.shape[1])
        keep = tokens.shape[1] - min(len(prompt) for prompt, _ in pairs) + 1
        with self._using(context.adapter):
            cache = context.cache(False)
            logits = self.base(
                input_ids=tokens,
                attention_mask=attention_mask(cache, tokens),
                past_key_values=cache,
                use_cache=False,
                logits_to_keep=keep,
            ).logits
        scores = []
        for row, (prompt, target) in zip(logits, pairs, strict=True):
            start = len(prompt) - 1 - (tokens.shape[1] - keep)
            found = row[start : start + len(target)].float()
            logprobs = found.log_softmax(-1).gather(1, target[:, None])[:, 0]
            scores.append(Score(logprobs, found.argmax(-1) == target))
        return scores

    @torch.no_grad()
    def generate_rows(self, context: Context, ids: Sequence[Ids], max_new_tokens: int) -> list[Tensor]:
        """Greedy continuations of B prompts behind one context, at once.

        Args:
            ids: B prompts, [n] each; they are padded on the left.
            max_new_tokens: at most so many tokens are made for each.

        Returns:
            B tensors of new ids, [at most max_new_tokens] each; one that ended early holds its end token, then padding.

        Raises:
            ValueError: empty rows, or prompt and answer do not fit into the model's context.
        """
        rows = [self._ids(i) for i in ids]
        output: list[Tensor] = [torch.empty(0)] * len(rows)
        for alike in self._padded_together(rows, context):
            for i, continued in zip(
                alike, self._continue([rows[i] for i in alike], context, max_new_tokens), strict=True
            ):
                output[i] = continued
        return output

    def _padded_together(self, rows: list[Tensor], context: Context) -> list[list[int]]:
        """Which rows go in one pass: all, or those of one length where padding would stand inside a sliding window.

        Transformers counts a window in columns, so padding between context and text hides a part of the context.
        """
        kinds = getattr(self.base.config.get_text_config(), "layer_types", None) or ()
        windows = "sliding_attention" in kinds or getattr(self.base.config.get_text_config(), "sliding_window", None)
        if not windows or not context.length:
            return [list(range(len(rows)))] if rows else []
        lengths = dict.fromkeys(len(row) for row in rows)
        return [[i for i, row in enumerate(rows) if len(row) == length] for length in lengths]

    def _continue(self, rows: list[Tensor], context: Context, max_new_tokens: int) -> list[Tensor]:
        n = max(len(row) for row in rows)
        self._fits_behind(context, n, max_new_tokens)
        pad = self._pad_id()
        tokens = torch.stack([torch.nn.functional.pad(row, (n - len(row), 0), value=pad or 0) for row in rows])
        mask = torch.ones(len(rows), context.length + n, dtype=torch.long, device=tokens.device)
        for line, row in zip(mask, rows, strict=True):
            line[context.length : context.length + n - len(row)] = 0
        with self._using(context.adapter):
            output = self.base.generate(
                input_ids=tokens,
                attention_mask=mask,
                past_key_values=context.cache(True),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        return list(output[:, n:])

    @torch.no_grad()
    def generate_ids(self, memory: Memory, ids: Ids, cache: Cache | None = None, **generate_kwargs: Any) -> Any:
        """Transformers' own `generate` behind the memory: greedy, sampling, beams, streaming.

        Args:
            ids: the prompt, [n].
            cache: of this memory and of a text already read (`text_cache`), to go on from; then `ids` is what follows.
            generate_kwargs: as in `generate`; greedy unless `do_sample=True`.

        Returns:
            What `generate` returns: prompt and continuation, [rows, n + new].

        Raises:
            ValueError: memory, prompt and answer do not fit into the model's context.
        """
        self.check(memory)
        tokens = self._ids(ids)[None]
        if "generation_config" not in generate_kwargs:
            generate_kwargs.setdefault("do_sample", False)
            if "max_length" not in generate_kwargs:
                generate_kwargs.setdefault("max_new_tokens", MAX_NEW_TOKENS)
        if self.base.generation_config.pad_token_id is None and generate_kwargs.get("pad_token_id") is None:
            generate_kwargs["pad_token_id"] = self._pad_id()
        if cache is None:
            cache = self.text_cache(memory)
        settings = generate_kwargs.get("generation_config") or self.base.generation_config
        new, longest, beams, rows = (
            generate_kwargs.get(key) or getattr(settings, key, None) or 0
            for key in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")
        )
        past = cache.get_seq_length() - self.positions(memory) if cache is not None else 0
        if past and max(beams, rows) > 1:
            raise ValueError("a cache that already holds text has one row: beams and several answers need a fresh one.")
        self._fits(memory, past + tokens.shape[1], new or max(0, longest - tokens.shape[1]))
        with self._using(READ if memory.M else None):
            return self.base.generate(
                input_ids=tokens,
                attention_mask=attention_mask(cache, tokens),
                past_key_values=cache,
                **generate_kwargs,
            )

    def text_cache(self, memory: Memory) -> Cache | None:
        """A fresh cache with the memory and no text in it; None for an empty memory: the plain model makes its own."""
        return self._prefix(memory).cache() if memory.M else None

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
        memory: Memory | Sequence[Memory],
        text: str | Sequence[str],
        source: str = "text",
        role: str | None = None,
        progress: Progress | None = None,
    ) -> Memory | list[Memory]:
        """Write a text into a memory, or each of several texts into a memory of its own, one after another.

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
        pairs, many = _pairs(memory, text)
        ids = [self.prompts_or_raise().written(t, role) for _, t in pairs]
        after = [self.write_ids(m, i, source, progress) for (m, _), i in zip(pairs, ids, strict=True)]
        return after if many else after[0]

    @overload
    def ask(self, memory: Memory, question: str, **generate_kwargs: Any) -> str: ...

    @overload
    def ask(self, memory: Sequence[Memory], question: Sequence[str], **generate_kwargs: Any) -> list[str]: ...

    def ask(
        self, memory: Memory | Sequence[Memory], question: str | Sequence[str], **generate_kwargs: Any
    ) -> str | list[str]:
        """Answer a question with a memory, or each of several with its own, one after another.

        Greedy, at most 128 new tokens, unless `generate_kwargs` says otherwise.

        Raises:
            ValueError: an empty question, lists of different lengths, a question that does not fit into the model's
                context, or options that give more than one answer.
        """
        if generate_kwargs.get("num_return_sequences", 1) != 1 or generate_kwargs.get("return_dict_in_generate"):
            raise ValueError("`ask` gives one answer as text; use `generate_ids` for several, or for scores.")
        pairs, many = _pairs(memory, question)
        prompts = [self.prompts_or_raise().question(q, bare=m.M > 0) for m, q in pairs]
        outputs = [self.generate_ids(m, p, **generate_kwargs) for (m, _), p in zip(pairs, prompts, strict=True)]
        answers = [self._decode(output[0, len(p) :]) for output, p in zip(outputs, prompts, strict=True)]
        return answers if many else answers[0]

    def stream(self, memory: Memory, question: str, **generate_kwargs: Any) -> Iterator[str]:
        """Answer a question piece by piece; leaving the loop stops the generation."""
        prompt = self.prompts_or_raise().question(question, bare=memory.M > 0)
        return self.stream_ids(memory, prompt, **generate_kwargs)

    def stream_ids(self, memory: Memory, ids: Ids, **generate_kwargs: Any) -> Iterator[str]:
        """Continue token ids and give the text piece by piece; the arguments are those of `generate_ids`."""
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        self.prompts_or_raise()
        left = threading.Event()

        class Left(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
                return torch.full((input_ids.shape[0],), left.is_set(), device=input_ids.device, dtype=torch.bool)

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        criteria = StoppingCriteriaList([*generate_kwargs.pop("stopping_criteria", []), Left()])
        failed: list[BaseException] = []

        def run() -> None:
            try:
                self.generate_ids(memory, ids, streamer=streamer, stopping_criteria=criteria, **generate_kwargs)
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            left.set()
            thread.join()
        if failed:
            raise failed[0]

    @torch.no_grad()
    def text_of(self, memory: Memory) -> Tensor:
        """The tokens that layer 0 still holds, [M] ids, oldest first; -1 for a slot that is no embedding.

        A slot of layer 0 in the preset "exact" is the embedding of its token: a memory gives its text away.
        """
        self.check(memory)
        table = torch.nn.functional.normalize(self.base.get_input_embeddings().weight.float(), dim=1)
        slots = torch.nn.functional.normalize(memory.slots[0].to(table), dim=1)
        found = [(part @ table.T).max(dim=1) for part in slots.split(256)]
        return torch.cat([ids.where(likeness > 0.99, -1) for likeness, ids in found])

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def first(self) -> Tensor:
        """What stands in front of the slots in each layer, [L, 1, d]: the checkpoint's bos, or the sink."""
        self._forget_if_changed()
        first = self._first
        if first is None:
            if self.trained:
                first = self.trained.bos
            else:
                token = self._first_token
                if token is None:
                    token = self.prompts_or_raise().first_token if self.prompts else self.base.config.bos_token_id
                if token is None:
                    raise ValueError("this model has no tokenizer and no bos token: give `first_token`.")
                with torch.no_grad(), self._using(None):
                    first = first_states(self.decoder, token)
            self._first = first
        return first

    def positions(self, memory: Memory) -> int:
        """P, the positions that a memory takes in front of the text: sink or bos and M, or 0 if it is empty."""
        return self.first.shape[1] + memory.M if memory.M else 0

    def _prefix(self, memory: Memory) -> Prefix:
        """Keys and values of [first ; slots], made once per memory and derived from the parent's where it was there."""
        self._forget_if_changed()
        prefix = self._prefixes.get(memory)
        if prefix is None:
            with torch.no_grad(), self._using(READ):
                prefix = read(self.decoder, self.first, memory.slots.detach().to(self.decoder.device))
            self._prefixes[memory] = prefix
        return prefix

    def _forget_if_changed(self) -> None:
        """Drop what was derived from weights that were changed in place since, by an optimizer for example."""
        stamp = changes(self.base.parameters())
        if stamp != self._stamp:
            self._prefixes.clear()
            self._first, self._stamp = None, stamp

    def _functional(self, memory: Memory) -> Cache | None:
        """The prefix with gradients, if there is anything to differentiate."""
        if not torch.is_grad_enabled():
            return None
        if not (memory.slots.requires_grad or any(p.requires_grad for p in self.base.parameters())):
            return None

        def reading(kv: Callable[[], KV]) -> Callable[[], KV]:
            def under_read() -> KV:
                with self._using(READ):
                    return kv()

            return under_read

        hidden = torch.cat([self.first, memory.slots.to(self.decoder.device)], dim=1)
        return functional_cache(self.decoder, hidden, reading)

    def _using(self, adapter: str | None) -> contextlib.AbstractContextManager[None]:
        """Around every pass: under this adapter, and without what a pass that was broken off has left."""
        attention.begin()
        return self.adapters.use(adapter) if self.adapters else contextlib.nullcontext()

    def _ids(self, ids: Ids) -> Tensor:
        """Check token ids and bring them to [n] on the model's device."""
        tokens = torch.as_tensor(ids, device=self.decoder.device)
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
        return self._limit - (1 + M if M else 0)

    @property
    def _limit(self) -> int:
        return getattr(self.base.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

    @staticmethod
    def _positions_needed(N: int, K: int, preset: str, compression: int) -> int:
        """Positions of the longest pass: a question behind all slots, or one piece behind what a write sees."""
        seen, piece = (K, memories.PAPER_PIECE) if preset == "paper" else (N, K * compression)
        return 1 + max(N + 1, seen + piece)

    def _pad_id(self) -> int | None:
        """The id that fills rows which ended: the model's own, else its end token."""
        config = self.base.generation_config
        eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        return config.pad_token_id if config.pad_token_id is not None else eos

    def _fits_behind(self, context: Context, n: int, new: int = 0) -> None:
        if context.room < n + new:
            raise ValueError(
                f"the text takes {n} tokens and the answer up to {new}, and behind this context of {context.length} "
                f"positions there is room for {context.room}. Shorten the text, or use a smaller memory."
            )

    def _fits(self, memory: Memory, n: int, new: int = 0) -> None:
        room = self.room(memory)
        if n + new > room:
            raise ValueError(
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


def _always(kv: KV) -> Callable[[], KV]:
    return lambda: kv


def _pairs(memory: Memory | Sequence[Memory], text: str | Sequence[str]) -> tuple[list[tuple[Memory, str]], bool]:
    """One memory and one text, or as many of both: (pairs, whether they were lists)."""
    if isinstance(memory, Memory) and isinstance(text, str):
        return [(memory, text)], False
    if isinstance(memory, Memory) or isinstance(text, str) or len(memory) != len(text):
        raise ValueError("give one memory and one text, or lists of the same length.")
    return list(zip(memory, text, strict=True)), True


def fingerprint(model: PreTrainedModel) -> str:
    """Identity of a model's weights: a hash over names, shapes and 256 values of every weight, rounded to bfloat16.

    Weights of adapters are left out. Reading all bytes of a large model at every start would take minutes.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("inv_freq"))]
    for name, tensor in tensors:
        if "lora_" in name:
            continue
        step = max(1, tensor.numel() // 256)
        digest.update(f"{name.replace('.base_layer', '')} {list(tensor.shape)}".encode())
        digest.update(bits(tensor.detach().reshape(-1)[::step][:256]))
    return digest.hexdigest()
