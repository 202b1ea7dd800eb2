"""Means with bootstrap intervals; what is drawn anew are the texts, because questions of one text stand together."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = (2.5, 97.5)  # percent


@dataclass(frozen=True)
class Estimate:
    """A mean and the 95% interval around it.

    Args:
        n: questions behind it.
        texts: texts that these questions belong to, which were drawn anew.
    """

    mean: float
    low: float
    high: float
    n: int
    texts: int

    def as_json(self) -> dict[str, float | None]:
        """The fields as plain data; JSON has no infinity: an interval that has no end has None there."""
        return {name: number if math.isfinite(number) else None for name, number in asdict(self).items()}


def mean(values: Sequence[float], groups: Sequence[Hashable]) -> Estimate | None:
    """The mean of values, with the interval over their groups; None for fewer than two groups."""
    return ratio(values, [1.0] * len(values), groups)


def ratio(above: Sequence[float], below: Sequence[float], groups: Sequence[Hashable]) -> Estimate | None:
    """Sum over sum, with the interval over groups; with ones below it is the mean.

    Args:
        above, below: one value per question.
        groups: the text of each question.

    Returns:
        None for fewer than two groups, or where `below` sums to 0: there is no interval, so there is no result.
    """
    top, bottom = _sums(above, groups), _sums(below, groups)
    if len(top) < 2 or not bottom.sum():
        return None
    drawn = _drawn(len(top))
    with np.errstate(divide="ignore", invalid="ignore"):
        means = top[drawn].sum(1) / bottom[drawn].sum(1)
    return _estimate(top.sum() / bottom.sum(), means[np.isfinite(means)], len(above), len(top))


Means = np.ndarray[Any, np.dtype[np.float64]]


def of_means(
    statistic: Callable[[Means], Means], columns: Sequence[Sequence[float]], groups: Sequence[Hashable]
) -> Estimate | None:
    """A number that is made of several means, with the interval over groups: all columns are drawn anew together.

    Args:
        statistic: from means [..., columns] to numbers [...].
        columns: of each, one value per question.
        groups: the text of each question.

    Returns:
        None for fewer than two groups, or where the number is not finite; an end of the interval may be infinite.

    Raises:
        ValueError: columns of different lengths.
    """
    if any(len(column) != len(groups) for column in columns):
        lengths = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"every column has one value per question: got {lengths} values and {len(groups)} groups.")
    tops = np.stack([_sums(column, groups) for column in columns], axis=-1)
    counts = _sums([1.0] * len(groups), groups)
    if len(counts) < 2:
        return None
    drawn = _drawn(len(counts))
    values = statistic(tops[drawn].sum(1) / counts[drawn].sum(1)[:, None])
    return _estimate(statistic(tops.sum(0) / counts.sum()), values[~np.isnan(values)], len(groups), len(counts))


def _drawn(groups: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Which groups each resample holds, [RESAMPLES, groups]."""
    return np.random.default_rng(0).integers(0, groups, (RESAMPLES, groups))


def _estimate(best: Any, values: Means, n: int, texts: int) -> Estimate | None:
    """A number with the interval of its resamples; None where it is not finite."""
    if not np.isfinite(best):
        return None
    # nothing lies between a number and infinity
    low, high = np.percentile(values, LEVEL, method="linear" if np.isfinite(values).all() else "closest_observation")
    return Estimate(float(best), float(low), float(high), n, texts)


def harmonic(means: Means) -> Means:
    """The harmonic mean over the last axis, [..., k] -> [...]; 0 where one of them is 0."""
    with np.errstate(divide="ignore"):
        harmonics: Means = means.shape[-1] / (1 / means).sum(-1)
    return harmonics


def _sums(values: Sequence[float], groups: Sequence[Hashable]) -> Means:
    sums: dict[Hashable, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value
    return np.array([sums[group] for group in sorted(sums, key=str)])  # the same draws in whatever order they came


def slope(x: Sequence[float], y: Sequence[float], groups: Sequence[Hashable]) -> Estimate | None:
    """How much y grows with one unit of x, by least squares, with the interval over groups.

    Args:
        x, y: one value per point.
        groups: of each point, such as the window of a stream; points of one group stand together.

    Returns:
        None for fewer than two groups, or where x does not vary.
    """
    middle = float(np.mean(x)) if len(x) else 0.0
    near = [value - middle for value in x]
    columns = ([1.0] * len(x), near, y, [a * b for a, b in zip(near, y, strict=True)], [a * a for a in near])
    sums = np.stack([_sums(column, groups) for column in columns], axis=-1)
    if len(sums) < 2:
        return None

    def steep(total: Means) -> Means:
        n, sum_x, sum_y, sum_xy, sum_xx = np.moveaxis(total, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            steepness: Means = (n * sum_xy - sum_x * sum_y) / (n * sum_xx - sum_x**2)
        return steepness

    slopes = steep(sums[_drawn(len(sums))].sum(1))
    return _estimate(steep(sums.sum(0)), slopes[np.isfinite(slopes)], len(x), len(sums))


def exp(estimate: Estimate | None) -> Estimate | None:
    """An estimate of a logarithm as one of the number itself."""
    if estimate is None:
        return None
    mean, low, high = (math.exp(x) for x in (estimate.mean, estimate.low, estimate.high))
    return replace(estimate, mean=mean, low=low, high=high)


# --- of records: dictionaries with numbers by metric, and the text that the number belongs to -------------------------

Record = dict[str, Any]
Cell = Mapping[Any, Record]  # by question


def mean_of(records: Iterable[Record], metric: str, group: str = "text") -> Estimate | None:
    """The mean of a metric over records, with the interval over what stands in their field `group`."""
    chosen = list(records)
    return mean([r[metric] for r in chosen], [r[group] for r in chosen])


def less(cell: Cell, other: Cell, metric: str) -> tuple[list[float], list[str]]:
    """A metric in one cell less that in the other, question by question where both have it, and the texts."""
    both = [key for key in cell if key in other]
    return [cell[key][metric] - other[key][metric] for key in both], [cell[key]["text"] for key in both]


def difference(cell: Cell, other: Cell, metric: str) -> Estimate | None:
    """The mean difference of two cells, paired by question."""
    return mean(*less(cell, other, metric))


def quotient(cell: Cell, other: Cell, metric: str) -> Estimate | None:
    """The mean of a metric in one cell over that in the other, for the questions that both have."""
    both = [key for key in cell if key in other]
    groups = [cell[key]["text"] for key in both]
    return ratio([cell[key][metric] for key in both], [other[key][metric] for key in both], groups)


def perplexity(cell: Cell, plain: Cell | None = None) -> Estimate | None:
    """The perplexity of texts, from records {nll, tokens} by text; with `plain` over that of the plain model."""
    texts = [text for text in cell if plain is None or text in plain]
    nll = [cell[text]["nll"] - (0.0 if plain is None else plain[text]["nll"]) for text in texts]
    return exp(ratio(nll, [cell[text]["tokens"] for text in texts], texts))
