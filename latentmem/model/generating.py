"""Answers token by token, through transformers' `generate`: behind one memory, or behind several at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteriaList

from latentmem.core.memory import Memory
from latentmem.decoder.adapters import READ
from latentmem.decoder.cache import MemoryCache, attention_mask
from latentmem.longterm.search import RetrievedPrefix
from latentmem.model import streaming
from latentmem.model.backbone import Backbone, Ids
from latentmem.model.context import Context, behind, fits_behind, retrieved, search_again, text_cache

Streamer = Callable[[list[int], Collection[int]], Any]  # (rows of a pass, end tokens) -> what takes their tokens
MAX_NEW_TOKENS = 128  # of an answer, unless the caller says otherwise


@torch.no_grad()
def generate_rows(
    llm: Backbone, context: Context, ids: Sequence[Ids], streamer: Streamer | None = None, **generate_kwargs: Any
) -> list[Tensor]:
    """Transformers' `generate` for B prompts, in as few passes as are right.

    Args:
        streamer: made for the rows of each pass.

    Returns:
        For each prompt [answers, n + new]: the prompt and its continuations, up to where the last of them ended.
    """
    prompts = [llm.ids(i) for i in ids]
    outputs: dict[int, Tensor] = {}
    settings = generate_kwargs.get("generation_config") or llm.base.generation_config

    def option(name: str) -> Any:
        value = generate_kwargs.get(name)
        return getattr(settings, name, None) if value is None else value

    ends = option("eos_token_id")
    ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
    if option("pad_token_id") is None:
        generate_kwargs["pad_token_id"] = _pad_id(llm)
    pad = option("pad_token_id") or 0
    one = any(map(option, ("prompt_lookup_num_tokens", "assistant_model")))  # transformers takes one row
    lengths = [len(prompt) for prompt in prompts]
    exact = any(_looks_back(option))
    for rows in context.passes(lengths, 1 if one else None, slides=llm.decoder.slides, exact=exact):
        part, n = context.of(rows), max(lengths[i] for i in rows)
        for i, room in zip(rows, part.rooms_of(len(rows)), strict=True):
            fits_behind(llm, room, lengths[i], option("max_new_tokens") or max(0, (option("max_length") or 0) - n))
        text = torch.ones(len(rows), n, dtype=torch.long, device=llm.decoder.device)
        for line, i in zip(text, rows, strict=True):
            line[: n - lengths[i]] = 0
        part = retrieved(llm, part, [prompts[i] for i in rows])
        cache = part.cache(llm.decoder, store=True)
        with llm.using(part.reader):
            output = llm.base.generate(
                input_ids=torch.stack([_padded(prompts[i], n, pad) for i in rows]),
                attention_mask=part.mask(text),
                past_key_values=cache,
                streamer=streamer(rows, ends) if streamer else None,
                **_searching(llm, cache, n, generate_kwargs),
            )
        criteria = option("stopping_criteria") or option("stop_strings")
        for i, answers in zip(rows, output.unflatten(0, (len(rows), -1)), strict=True):
            answers = _ended(answers[:, n - lengths[i] :], lengths[i], ends)
            outputs[i] = _unpadded(answers, lengths[i], pad) if criteria and pad not in ends else answers
    return [outputs[i] for i in range(len(prompts))]


@torch.no_grad()
def generate_one(llm: Backbone, memory: Memory, ids: Ids, cache: Cache | None, generate_kwargs: dict[str, Any]) -> Any:
    """`MemoryModel.generate_ids` behind one memory."""
    llm.check(memory)
    tokens = llm.ids(ids)[None]
    _set_defaults(generate_kwargs)
    if llm.base.generation_config.pad_token_id is None and generate_kwargs.get("pad_token_id") is None:
        generate_kwargs["pad_token_id"] = _pad_id(llm)
    if cache is None:
        cache = text_cache(llm, memory, tokens, None)
    settings = generate_kwargs.get("generation_config") or llm.base.generation_config
    new, longest, beams, rows = (
        generate_kwargs.get(key) or getattr(settings, key, None) or 0
        for key in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")
    )
    past = cache.get_seq_length() - llm.positions(memory) if cache is not None else 0
    if past and max(beams, rows) > 1:
        raise ValueError("a cache that already holds text has one row: beams and several answers need a fresh one.")
    llm.fits(memory, past + tokens.shape[1], new or max(0, longest - tokens.shape[1]))
    with llm.using(READ if memory.holds else None):
        return llm.base.generate(
            input_ids=tokens,
            attention_mask=attention_mask(cache, tokens),
            past_key_values=cache,
            **_searching(llm, cache, tokens.shape[1], generate_kwargs),
        )


def generate_many(
    llm: Backbone,
    memory: Sequence[Memory],
    ids: Sequence[Ids],
    cache: Cache | None,
    generate_kwargs: dict[str, Any],
    streamer: Streamer | None = None,
) -> list[Tensor]:
    """`MemoryModel.generate_ids` behind several memories."""
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
    return generate_rows(llm, behind(llm, memory), ids, streamer, **generate_kwargs) if len(ids) else []


def stream_one(llm: Backbone, memory: Memory, ids: Ids, generate_kwargs: dict[str, Any]) -> Iterator[str]:
    """`MemoryModel.stream_ids` behind one memory."""
    tokenizer = llm.prompts_or_raise().tokenizer
    criteria, cache = generate_kwargs.pop("stopping_criteria", []), generate_kwargs.pop("cache", None)

    def generate(give: Callable[[str], None], left: streaming.Left) -> None:
        generate_kwargs["streamer"] = streaming.Pieces(tokenizer, give, skip_prompt=True)
        generate_kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, left])
        generate_one(llm, memory, ids, cache, generate_kwargs)

    return streaming.stream(generate)


def stream_many(
    llm: Backbone, memory: Sequence[Memory], ids: Sequence[Ids], generate_kwargs: dict[str, Any]
) -> Iterator[tuple[int, str]]:
    """`MemoryModel.stream_ids` behind several memories."""
    tokenizer = llm.prompts_or_raise().tokenizer
    criteria = generate_kwargs.pop("stopping_criteria", [])

    def generate(give: Callable[[tuple[int, str]], None], left: streaming.Left) -> None:
        def streamer(rows: list[int], ends: Collection[int]) -> streaming.Rows:
            left.check()
            return streaming.Rows(tokenizer, rows, ends, give)

        generate_kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, left])
        generate_many(llm, memory, ids, None, generate_kwargs, streamer)

    return streaming.stream(generate)


def _searching(llm: Backbone, cache: Cache | None, n: int, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate` by which long-term memories are searched again while answers behind n tokens grow.

    Of several answers behind one memory the first that goes on is what is searched for.
    """
    if not isinstance(cache, MemoryCache):
        return generate_kwargs
    due = [(i, front) for i, front in enumerate(cache.fronts) if isinstance(front, RetrievedPrefix) and front.every]
    if not due:
        return generate_kwargs
    settings = generate_kwargs.get("generation_config") or llm.base.generation_config
    ends = generate_kwargs.get("eos_token_id") or settings.eos_token_id
    ended = torch.as_tensor([] if ends is None else ends, device=llm.decoder.device).reshape(-1)
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
                changed |= search_again(llm, front, alive[0, -front.every :])
        if changed:
            cache.changed()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    criteria = [again, *(generate_kwargs.get("stopping_criteria") or [])]
    return {**generate_kwargs, "stopping_criteria": StoppingCriteriaList(criteria)}


def _set_defaults(generate_kwargs: dict[str, Any]) -> None:
    """Greedy and a bound for the answer, unless the caller says otherwise."""
    if "generation_config" not in generate_kwargs:
        generate_kwargs.setdefault("do_sample", False)
        if "max_length" not in generate_kwargs:
            generate_kwargs.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    settings = generate_kwargs.get("generation_config")
    if False in (generate_kwargs.get("use_cache"), getattr(settings, "use_cache", None)):
        raise ValueError("use_cache=False: a memory is read through the cache; leave it on.")


def _pad_id(llm: Backbone) -> int | None:
    """The id that fills rows which ended: the model's own, else its end token."""
    config = llm.base.generation_config
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return config.pad_token_id if config.pad_token_id is not None else eos


def _looks_back(option: Callable[[str], Any]) -> Iterator[bool]:
    """Options by which a row's next token depends on the length or the tokens of its prompt: there padding counts."""
    yield option("repetition_penalty") not in (None, 1.0)
    yield option("max_length") is not None and option("max_new_tokens") is None
    names = ("no_repeat_ngram_size", "min_length", "logits_processor", "exponential_decay_length_penalty")
    yield from (bool(option(name)) for name in names)


def _padded(prompt: Tensor, n: int, pad: int) -> Tensor:
    return torch.nn.functional.pad(prompt, (n - len(prompt), 0), value=pad)


def _ended(rows: Tensor, start: int, ends: Sequence[int]) -> Tensor:
    """Rows [answers, n], without what follows the end token of the last that ends; answers begin at `start`."""
    if not ends:
        return rows
    stops = torch.isin(rows[:, start:], torch.tensor(ends, device=rows.device))
    last = torch.where(stops.any(1), stops.int().argmax(1) + 1, stops.shape[1]).max() if stops.shape[1] else 0
    return rows[:, : start + int(last)]


def _unpadded(rows: Tensor, start: int, pad: int) -> Tensor:
    """Rows without the padding at the end of all of them: they were stopped by something else than an end token."""
    held = (rows[:, start:] != pad).any(0).nonzero()
    return rows[:, : start + (int(held[-1]) + 1 if len(held) else 0)]
