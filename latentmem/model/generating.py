"""Answers token by token, behind one memory or behind several at once.

Transformers' `generate` reads the options: it makes the processors of logits and the criteria that end an answer. The
tokens are made by `Batch`, also for the server. Only what makes no token after another (beams, speculation) and what
gives more than tokens runs in transformers' own loop, behind one memory after another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerationMode

from latentmem.core.memory import Memory
from latentmem.decoder.adapters import READ
from latentmem.decoder.cache import MemoryCache
from latentmem.longterm.search import RetrievedPrefix
from latentmem.model.backbone import Ids
from latentmem.model.batch import Batch, Detokenizer, Row
from latentmem.model.context import Context
from latentmem.model.reader import Reader

MAX_NEW_TOKENS = 128  # of an answer, unless the caller says otherwise
LOOKING_BACK = ("no_repeat_ngram_size", "min_length", "logits_processor", "exponential_decay_length_penalty")
OWN_LOOP = ("streamer", "return_dict_in_generate", "custom_generate")  # what transformers' own loop is needed for


class Options:
    """Options of transformers' `generate`: greedy and at most 128 new tokens, unless the caller says otherwise.

    Args:
        kwargs: as in `generate`.

    Raises:
        ValueError: `use_cache=False`.
    """

    def __init__(self, llm: Reader, kwargs: dict[str, Any]) -> None:
        self.kwargs = dict(kwargs)
        self._config = kwargs.get("generation_config") or llm.base.generation_config
        if "generation_config" not in kwargs:
            self.kwargs.setdefault("do_sample", False)
            if "max_length" not in kwargs:
                self.kwargs.setdefault("max_new_tokens", MAX_NEW_TOKENS)
        if False in (kwargs.get("use_cache"), getattr(kwargs.get("generation_config"), "use_cache", None)):
            raise ValueError("use_cache=False: a memory is read through the cache; leave it on.")
        if self.get("pad_token_id") is None:
            self.kwargs["pad_token_id"] = _pad_id(llm)
        criteria = list(kwargs.get("stopping_criteria") or [])
        if kwargs.get("stop_strings"):
            tokenizer = self.kwargs.pop("tokenizer", llm.tokenizer)
            criteria.append(StopStringCriteria(tokenizer, self.kwargs.pop("stop_strings")))
        self.kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)

    def get(self, name: str) -> Any:
        """An option of the caller, or else of the model."""
        value = self.kwargs.get(name)
        return getattr(self._config, name, None) if value is None else value

    @property
    def answers(self) -> int:
        """Answers to each prompt."""
        return self.get("num_return_sequences") or 1

    @property
    def pad(self) -> int:
        """The id in front of shorter prompts, and behind shorter answers."""
        return self.get("pad_token_id") or 0

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        ends = self.get("eos_token_id")
        return [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()

    def new(self, n: int) -> int:
        """Tokens that an answer to a prompt of n tokens may have."""
        return self.get("max_new_tokens") or max(0, (self.get("max_length") or 0) - n)

    @property
    def stepwise(self) -> bool:
        """Whether each pass makes the next token of each answer, and nothing else is asked for."""
        config = copy.deepcopy(self._config)
        config.update(**{name: value for name, value in self.kwargs.items() if hasattr(config, name)})
        mode = config.get_generation_mode(self.kwargs.get("assistant_model"))
        plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        return plain and not any(map(self.get, (*OWN_LOOP, "stop_strings")))

    @property
    def looks_back(self) -> bool:
        """Whether a row's next token depends on the length or the tokens of its prompt: there padding counts."""
        penalty = self.get("repetition_penalty") not in (None, 1.0)
        of_all = self.get("max_length") is not None and self.get("max_new_tokens") is None
        return penalty or of_all or any(map(self.get, LOOKING_BACK))


def asked(
    llm: Reader, memory: Memory | Sequence[Memory], ids: Ids | Sequence[Ids], options: Options, cache: Cache | None
) -> tuple[Context, Sequence[Ids]]:
    """The context and the prompts of what is asked behind one memory, or behind several.

    Args:
        cache: of one memory and of a text already read, to go on from.

    Raises:
        ValueError: lists of different lengths, or what only one memory takes.
    """
    if isinstance(memory, Memory):
        if cache is None:
            return llm.context(memory), [ids]  # type: ignore[list-item]
        llm.check(memory)
        front = cache.fronts[0] if isinstance(cache, MemoryCache) else None
        text = cache.get_seq_length() - (front.P if front else 0)
        return Context((front,), (llm.room(memory) - text,), READ), [ids]  # type: ignore[list-item]
    single = [name for name in ("streamer", "return_dict_in_generate") if options.get(name)]
    if cache is not None or single:
        names = ", ".join(["cache"] * (cache is not None) + single)
        raise ValueError(f"{names}: this takes one memory, not a list.")
    if len(memory) != len(ids):
        raise ValueError(f"give as many prompts as memories: got {len(ids)} and {len(memory)}.")
    return llm.context(memory) if len(memory) else Context((), (), None), list(ids)


def generate(
    llm: Reader, context: Context, ids: Sequence[Ids], options: Options, cache: Cache | None = None
) -> list[Any]:
    """Each prompt with its answers, [answers, n + new], padded behind shorter ones; or what `generate` returns.

    Args:
        ids: B prompts, [n] each.
        cache: as in `_passes`.
    """
    prompts = [llm.ids(i) for i in ids]
    several = max(options.answers, options.get("num_beams") or 1) > 1
    if several and cache is not None and cache.get_seq_length() > context.length:
        raise ValueError("a cache that already holds text has one row: beams and several answers need a fresh one.")
    if not options.stepwise:
        return [_alone(llm, context.of([i]), prompt, options, cache) for i, prompt in enumerate(prompts)]
    outputs: dict[int, Tensor] = {}
    for numbers, batch, steps in _passes(llm, context, prompts, options, cache):
        for _ in steps:
            pass
        for k, i in enumerate(numbers):
            answers = [torch.tensor(row.said) for row in batch.rows[k * options.answers : (k + 1) * options.answers]]
            new = pad_sequence(answers, batch_first=True, padding_value=options.pad).to(prompts[i])
            outputs[i] = torch.cat([prompts[i].expand(len(new), -1), new], dim=1)
    return [outputs[i] for i in range(len(prompts))]


def stream(
    llm: Reader, context: Context, ids: Sequence[Ids], options: Options, cache: Cache | None = None
) -> Iterator[tuple[int, str]]:
    """Pieces of the answers to B prompts as they come: (number of the prompt, text); arguments as in `generate`.

    With the option `repeats=False` an answer ends before the first sentence that it has said already.

    Raises:
        ValueError: options that do not give one answer, token by token.
    """
    if options.answers > 1:
        raise ValueError(f"a stream gives one answer to each question, got num_return_sequences={options.answers}.")
    if not options.stepwise:
        raise ValueError("a stream takes one token after another: leave out num_beams, speculation and streamer.")
    prompts, tokenizer = [llm.ids(i) for i in ids], llm.prompts_or_raise().tokenizer
    repeats = options.kwargs.pop("repeats", True)
    for numbers, batch, steps in _passes(llm, context, prompts, options, cache):
        texts = {row: Detokenizer(tokenizer, repeats=repeats) for row in batch.rows}
        number_of = dict(zip(batch.rows, numbers, strict=True))
        for rows in steps:
            for row in rows:
                text, piece = texts[row], texts[row].add(row.token)
                piece += text.rest() if row.ended else ""
                row.ended |= text.stopped
                if piece:
                    yield number_of[row], piece


Pass = tuple[list[int], Batch, Iterator[list[Row]]]  # numbers of prompts, their rows, and at each step who has a token


def _passes(
    llm: Reader, context: Context, prompts: list[Tensor], options: Options, cache: Cache | None
) -> Iterator[Pass]:
    """Rows that go together, one batch after another.

    Args:
        cache: over the context of one prompt, to go on from the text in it.
    """
    lengths = [len(prompt) for prompt in prompts]
    for numbers in context.passes(lengths, slides=llm.decoder.slides, exact=options.looks_back):
        part, n = context.of(numbers), max(lengths[i] for i in numbers)
        for i, room in zip(numbers, part.rooms_of(len(numbers)), strict=True):
            llm.check_room(room, lengths[i], options.new(n))
        part = llm.retrieved(part, [prompts[i] for i in numbers])
        fronts = part.fronts * (len(numbers) // len(part.fronts))
        rows = [
            Row(prompts[i], front) for i, front in zip(numbers, fronts, strict=True) for _ in range(options.answers)
        ]
        own = cache or part.cache(llm.decoder, store=True) or DynamicCache(config=llm.base.config.get_text_config())
        batch = Batch(llm, rows, adapter=part.adapter, cache=own, pad=options.pad)
        yield numbers, batch, _steps(llm, batch, options)


def _steps(llm: Reader, batch: Batch, options: Options) -> Iterator[list[Row]]:
    """One token more for each row at each step, until all have ended; the rows that took one."""

    @torch.no_grad()
    def loop(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
    ) -> Iterator[list[Row]]:
        ids = input_ids

        def choose(logits: Tensor) -> list[int]:
            nonlocal ids
            scores = logits_processor(ids, logits)
            draws = generation_config.do_sample
            tokens = torch.multinomial(scores.softmax(-1), 1) if draws else scores.argmax(-1, keepdim=True)
            ended = torch.tensor([[row.ended] for row in batch.rows], device=ids.device)
            ids = torch.cat([ids, tokens.masked_fill(ended, options.pad)], dim=1)
            return tokens[:, 0].tolist()

        while growing := [row for row in batch.rows if not row.ended]:
            batch.advance(choose)
            for row, ends in zip(batch.rows, stopping_criteria(ids, None).tolist(), strict=True):
                row.ended |= ends
            yield growing

    each = slice(None, None, options.answers)  # `generate` makes a row for each answer
    yield from llm.base.generate(
        input_ids=batch.ids[each], attention_mask=batch.mask[each], custom_generate=loop, **options.kwargs
    )


def _alone(llm: Reader, context: Context, prompt: Tensor, options: Options, cache: Cache | None) -> Any:
    """Transformers' own loop behind one memory."""
    n = len(prompt)
    llm.check_room(context.room, n, options.new(n))
    context = llm.retrieved(context, [prompt])
    cache = cache or context.cache(llm.decoder, store=True)
    past = cache.get_seq_length() if cache is not None else 0
    with llm.using(context.reader):
        return llm.base.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones(1, past + n, dtype=torch.long, device=prompt.device),
            past_key_values=cache,
            **_searching(llm, cache, n, options),
        )


def _searching(llm: Reader, cache: Cache | None, n: int, options: Options) -> dict[str, Any]:
    """Options by which a long-term memory is searched again while answers behind n tokens grow.

    The first answer that goes on is what is searched for.
    """
    if not isinstance(cache, MemoryCache):
        return options.kwargs
    front = cache.fronts[0]
    if not isinstance(front, RetrievedPrefix) or not front.every:
        return options.kwargs
    ends, searched = torch.tensor(options.ends, device=llm.decoder.device), 0

    def again(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        nonlocal searched
        times = (ids.shape[1] - n) // front.every  # some ways to generate make several tokens at once
        if times > searched:
            searched = times
            growing = ids[~torch.isin(ids[:, n:], ends).any(1)]
            if len(growing) and llm.search_again(front, growing[0, -front.every :]):
                cache.changed()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    criteria = StoppingCriteriaList([again, *options.kwargs["stopping_criteria"]])
    return {**options.kwargs, "stopping_criteria": criteria}


def _pad_id(llm: Reader) -> int | None:
    """The id that fills rows which ended: the model's own, else its end token."""
    config = llm.base.generation_config
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return config.pad_token_id if config.pad_token_id is not None else eos
