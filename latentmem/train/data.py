"""Documents to train on, from folders, JSON lines and hub sets; which one comes when is decided by a seed alone."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from latentmem import data
from latentmem.train.config import Source

SUFFIXES = (".txt", ".md")
MOST = 200_000  # rows that are taken from a hub set
GRAM = 13  # words in a row that two texts share only if one is taken from the other
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"(?<=[.!?])[\"”')]*\s+(?=[\"“(A-Z0-9])|\n+")
_CLOSING = ".!?)'" + '"”'
_NO_SUBJECT = frozenset(
    "He She It They This That These Those There Here In On At As However But And His Her Its Their".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Document:
    """A text, with the questions that it answers, if its source has any.

    Args:
        id: where it came from: the source's path and a number.
        title: of the article it belongs to, or "".
        text: as it is.
        questions: (question, answer) each.
    """

    id: str
    title: str
    text: str
    questions: tuple[tuple[str, str], ...] = ()


class Documents:
    """One source's documents, in a new order in each round; the order is a function of seed and number.

    Raises:
        ValueError: the source can not be found or read, or holds no text.
    """

    def __init__(self, source: Source, seed: int, leave_out: Iterable[str] = ()) -> None:
        left_out = {*source.leave_out, *leave_out}
        self.source, self.seed = source, seed
        documents = [document for document in _read(source) if document.text.strip()]
        self.all = [document for document in documents if document.title not in left_out]
        self.left_out = [document for document in documents if document.title in left_out]
        if not self.all:
            raise ValueError(f"{source.path}: there is no text in it that may be trained on.")
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, round_: int) -> np.ndarray:
        return np.random.default_rng([self.seed, round_]).permutation(len(self.all))

    def __getitem__(self, number: int) -> Document:
        """The document that comes as number 0, 1, ...; after all have come once, they come in another order."""
        round_, i = divmod(number, len(self.all))
        return self.all[self._order(round_)[i]]

    def opposite(self, number: int) -> Document:
        """The document that is half a round away from number 0, 1, ... in the same round."""
        round_, i = divmod(number, len(self.all))
        return self.all[self._order(round_)[(i + len(self.all) // 2) % len(self.all)]]

    def __len__(self) -> int:
        return len(self.all)


def _read(source: Source) -> list[Document]:
    place = next((place for place in data.places(source.path) if place.exists()), None)
    if place is None and (source.hub or like_a_hub_name(source.path)):
        return list(_documents(_hub(source), source.hub or source.path, source.kind))
    if place is None:
        raise ValueError(
            f"{source.path}: there is no such file or folder here nor below LATENTMEM_DATA "
            f"({os.environ.get('LATENTMEM_DATA') or 'not set'}), and it is no hub set (owner/name)."
        )
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"{place} holds no {' or '.join(SUFFIXES)} files.")
        return [Document(f"{source.path}/{file.relative_to(place)}", file.stem, _text(file)) for file in files]
    if place.suffix in SUFFIXES:
        return [Document(source.path, place.stem, _text(place))]
    return list(_documents(data.rows_of_lines(place), source.path, source.kind))


def like_a_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).suffix


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} can not be read as UTF-8 text ({error}). Mend it, or take it away.") from None


def _hub(source: Source) -> Iterator[dict[str, Any]]:
    name = source.hub or source.path
    no_package = f"{name} is loaded from the hub with `datasets`: run `pip install 'latentmem[train]'`."
    no_set = "Look at the connection and the source's hub, subset and split, or give a file or folder as path."
    with data.reading(name, no_package, no_set) as hub:
        yield from hub(source.subset, split=source.split, streaming=True).take(MOST)


def _documents(rows: Iterable[dict[str, Any]], name: str, kind: str) -> Iterator[Document]:
    if kind == "text":
        for i, row in enumerate(rows):
            text = row.get("text")
            if not isinstance(text, str):
                raise ValueError(f"row {i + 1} of {name} has no key 'text' with a text; its keys are {', '.join(row)}.")
            yield Document(f"{name}#{i}", str(row.get("title", "")), text)
        return
    contexts: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for i, row in enumerate(rows):
        try:
            answers = row["answers"]
            answers = answers["text"] if isinstance(answers, dict) else answers
            context, question = row["context"], row["question"]
        except (KeyError, TypeError):
            raise ValueError(
                f"row {i + 1} of {name} lacks context, question or answers.text; its keys are {', '.join(row)}."
            ) from None
        questions = contexts.setdefault(context, (str(row.get("title", "")), []))[1]
        if answers:
            questions.append((question.strip(), answers[0].strip()))
    for i, (context, (title, asked)) in enumerate(contexts.items()):
        yield Document(f"{name}#{i}", title, context, tuple(asked))


class Apart:
    """Texts that are kept for evaluation: nothing may be trained on that shares 13 words in a row with them.

    Args:
        sources: every text in every row of them counts, whatever its key.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        grams = {gram for source in sources for text in _strings(source) for gram in _grams(text)}
        self._grams = np.array(sorted(grams), dtype=np.uint64)

    def clashes(self, text: str) -> bool:
        """Whether a text shares 13 words in a row with one of them."""
        if not len(self._grams):
            return False
        mine = np.array(list(_grams(text)), dtype=np.uint64)
        at = np.searchsorted(self._grams, mine).clip(max=len(self._grams) - 1)
        return bool((self._grams[at] == mine).any())


def _strings(source: Source) -> Iterator[str]:
    """Every text in every row of a source; its path may hold `*`."""
    each = (sorted(map(Path, glob.glob(str(place)))) for place in data.places(source.path))  # noqa: PTH207
    files = next((matches for matches in each if matches), [])
    if not files and source.optional:
        return
    if not files or files[0].is_dir() or files[0].suffix in SUFFIXES:
        yield from (document.text for document in _read(source))
        return
    for file in files:
        inside: list[Any] = list(data.rows_of_lines(file))
        while inside:
            value = inside.pop()
            if isinstance(value, str):
                yield value
            elif isinstance(value, (dict, list)):
                inside += value.values() if isinstance(value, dict) else value


def _grams(text: str) -> Iterator[int]:
    words = _WORD.findall(text.lower())
    for i in range(len(words) - GRAM + 1):
        digest = hashlib.blake2b(" ".join(words[i : i + GRAM]).encode(), digest_size=8).digest()
        yield int.from_bytes(digest, "little")


def sentences(text: str) -> list[str]:
    """A text cut where a sentence or a paragraph ends."""
    return [part for part in (piece.strip() for piece in _SENTENCE.split(text)) if part]


def cloze(text: str) -> list[tuple[str, str]]:
    """Questions made from a text: the start of a sentence that names its subject, answered by its end.

    Returns:
        (question, answer) each; the answer is the last two to six words.
    """
    asked = []
    for sentence in sentences(text):
        words = sentence.rstrip(_CLOSING).split()
        if not 9 <= len(words) <= 40 or words[0] in _NO_SUBJECT or not sentence[0].isupper():
            continue
        cut = max(6, len(words) - (2 + len(sentence) % 5))
        if not any(word[:1].isupper() for word in words[1:cut]) and not words[0].istitle():
            continue
        asked.append((f"Complete the sentence: {' '.join(words[:cut])}", " ".join(words[cut:])))
    return asked
