"""Invented texts in the place of sets of the hub: a dry run measures time and memory with them, and fetches nothing."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from latentmem import data
from latentmem.train.config import Config, Source
from latentmem.train.data import like_a_hub_name

COUNT = 200  # documents in the place of a set
SENTENCE, TOKENS = "The mill {} of Veld was built in {} by Tessel Quill, a joiner from Lower Veld, for house {}.", 32


def on_hub(source: Source) -> bool:
    """Whether a source has to be fetched: it is neither here nor below LATENTMEM_DATA, and is a set of the hub."""
    here = any(place.exists() or glob.glob(str(place)) for place in data.places(source.path))  # noqa: PTH207
    return not here and not source.optional and bool(source.hub or like_a_hub_name(source.path))


def local(config: Config, folder: Path) -> tuple[Config, dict[str, str]]:
    """The config with invented texts, files in `folder`, for sets of the hub, and with no such set to stay apart from.

    Returns:
        the config, and for each of its new paths the name of the set.
    """
    sources, names = list(config.data), dict[str, str]()
    for i, source in enumerate(sources):
        if on_hub(source):
            path = folder / f"{i}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in _rows(config)), encoding="utf-8")
            sources[i], names[str(path)] = replace(source, path=str(path), hub=None), source.hub or source.path
    apart = tuple(source for source in config.apart if not on_hub(source))
    return replace(config, data=tuple(sources), apart=apart), names


def _rows(config: Config) -> Iterator[dict[str, object]]:
    """Rows for both kinds of sources: half have about `texts.longest` tokens, half a sentence, some a title."""
    titles = config.watch.titles
    for i in range(COUNT):
        titled = bool(titles) and i % 4 == 0
        count = 1 if i % 4 < 2 else max(1, config.texts.longest // TOKENS)
        text = " ".join(SENTENCE.format(i + j, 1500 + (7 * i + j) % 400, i + j) for j in range(count))
        title = titles[i // 4 % len(titles)] if titled else ""
        for j in range(min(count, 5)):
            question, answer = f"When was the mill {i + j} built?", f"{1500 + (7 * i + j) % 400}"
            yield {"title": title, "text": text, "context": text, "question": question, "answers": [answer]}
