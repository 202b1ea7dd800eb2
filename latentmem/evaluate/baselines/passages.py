"""Which passages BM25 ranks first for a question (English stop words left out, no stemming)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def searcher(row: str = "bm25") -> Any:
    """The module bm25s.

    Raises:
        ValueError: it is not installed, and this row needs it.
    """
    try:
        import bm25s
    except ImportError:
        raise ValueError(
            f"the row {row!r} needs bm25s: run `pip install 'latentmem[eval]'`, or leave the row out."
        ) from None
    return bm25s


def indexed(library: Sequence[str]) -> Any:
    """An index over passages.

    Raises:
        ValueError: bm25s is not installed.
    """
    bm25s = searcher()
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(library), stopwords="en", show_progress=False), show_progress=False)
    return index


def ranked(library: Sequence[str], questions: Sequence[str], k: int) -> list[list[int]]:
    """Indices of the k best passages for each question, the best first; those that share no word with it are left out.

    Raises:
        ValueError: bm25s is not installed.
    """
    index = indexed(library)
    asked = searcher().tokenize(list(questions), stopwords="en", show_progress=False)
    best = index.retrieve(asked, k=min(k, len(library)), show_progress=False)
    rows = zip(best.documents, best.scores, strict=True)
    return [[int(i) for i, score in zip(places, scores, strict=True) if score > 0] for places, scores in rows]


def nearest(index: Any, questions: Sequence[str]) -> list[int]:
    """Index of the best passage for each question; of equals the last, and so the last of all where no word is shared.

    Args:
        index: of at least one passage, by `indexed`.
    """
    asked = searcher().tokenize(list(questions), stopwords="en", return_ids=False, show_progress=False)
    last = index.scores["num_docs"] - 1
    return [last - int(index.get_scores(words)[::-1].argmax()) if words else last for words in asked]
