"""Which passages BM25 ranks first for a question (English stop words left out, no stemming)."""

from __future__ import annotations

from collections.abc import Sequence


def ranked(library: Sequence[str], questions: Sequence[str], k: int) -> list[list[int]]:
    """Indices of the k best passages for each question, the best first; those that share no word with it are left out.

    Raises:
        ValueError: bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise ValueError(
            "the row 'bm25' needs bm25s: run `pip install 'latentmem[eval]'`, or leave the row out."
        ) from None
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(library), stopwords="en", show_progress=False), show_progress=False)
    asked = bm25s.tokenize(list(questions), stopwords="en", show_progress=False)
    best = index.retrieve(asked, k=min(k, len(library)), show_progress=False)
    rows = zip(best.documents, best.scores, strict=True)
    return [[int(i) for i, score in zip(places, scores, strict=True) if score > 0] for places, scores in rows]
