"""Which stored slots, or updates, fit a question best."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NEVER = float("-inf")  # fit of a slot, or mark of an update, that is not there


def best_slots(fits: Tensor, occupied: Tensor, orders: Tensor, R: int) -> Tensor:
    """The R slots of a layer that fit best, of places [S] that are occupied: [R] indices, the lowest order first."""
    places = fits.masked_fill(~occupied, NEVER).topk(R).indices.sort().values
    # equally old ones, as there are in released checkpoints alone, stand as the released code puts them: last first
    return places.flip(0)[orders[places].flip(0).argsort(stable=True)]


def marks(fits: Tensor, updates: Tensor, count: int) -> Tensor:
    """How well each update fits a question, from how well its slots fit the question's tokens, in one layer.

        best[n, u]    = the largest of fits[n, slots of u]
        beyond[n, u]  = best[n, u] - mean over u of best[n, u]
        spread[n]     = root of the mean over u of beyond[n, u]^2
        mark[u]       = mean over n of beyond[n, u] * |beyond[n, u]| / spread[n]

    Each token votes for updates by its best slot there. A vote counts more if that update stands out, so words that are
    common to all texts have no effect.

    Args:
        fits: [n, S].
        updates: the update of each slot, 0 .. count - 1; -1: no slot, [S].

    Returns:
        [count]; -inf for an update that has no slot here.
    """
    slots = updates >= 0
    best = fits.new_full((len(fits), count), NEVER)
    best.scatter_reduce_(1, updates[slots].expand(len(fits), -1), fits[:, slots], "amax")
    held = best > NEVER

    def mean(values: Tensor) -> Tensor:
        return values.where(held, 0).sum(1, keepdim=True) / held.sum(1, keepdim=True).clamp(min=1)

    beyond = best - mean(best)
    spread = mean(beyond.square()).sqrt()
    return (beyond * beyond.abs() / (spread + 1e-6)).where(held, NEVER).mean(0)


def numbered(births: Tensor, updates: int) -> tuple[Tensor, int]:
    """Updates of which a slot is left, numbered from 0 in their order: of most that ever were nothing is left.

    Args:
        births: the update of each slot, -1: no slot, [L, s].
        updates: the largest birth that can be.

    Returns:
        The number of each slot's update, -1: no slot, [L, s] int64; and how many numbers there are.
    """
    shifted = births.long() + 1
    present = torch.zeros(updates + 2, dtype=torch.bool)
    present[shifted.flatten()] = True
    present[0] = False
    return torch.where(shifted > 0, present.cumsum(0)[shifted] - 1, -1), int(present.sum())


def ordered(rows: Tensor) -> Tensor:
    """Stable order of each row of [L, m]: numpy's sort is many times faster where a row is a few ascending runs."""
    return torch.from_numpy(np.argsort(rows.numpy(), axis=1, kind="stable"))


def arranged(how: str, orders: Tensor, ranks: Tensor, sizes: Tensor, R: int) -> list[Tensor]:
    """In which order each layer reads [retrieved ; its own slots], or which of them.

        written      as they were written
        best-last    the best updates that have R slots together, at least one, stand last, the best one at the end
        best-only    worst first, and as many at the end are read as any layer takes of the best update

    Args:
        how: `Memory.reading_order`.
        orders: indices that put them as they were written, [L, m].
        ranks: of the update of each, 0 for the best, [L, m].
        sizes: slots of the updates, the best first.
    """
    last = 0  # so many updates stand last
    if how == "best-last":
        last = max(1, int((sizes.cumsum(0) <= R).sum()))
    elif how == "best-only":
        last = len(sizes)
    lifted = (last - ranks).clamp(min=0).gather(1, orders)  # 0 of the others, `last` of the best
    arranged = orders.gather(1, ordered(lifted))
    if how == "best-only" and ranks.shape[1]:  # the best update that some layer can take
        arranged = arranged[:, -int((ranks == ranks.min()).sum(1).max()) :]
    return list(arranged)


def slots_of_best(rank: Tensor, updates: Tensor, orders: Tensor, R: int) -> Tensor:
    """R slots of a layer: all of the best update, then of the next, of the last one the oldest.

    Args:
        rank: of each update, 0 for the best.
        updates: the update of each slot, -1: no slot, [S].
        orders: the lower, the older, [S].

    Returns:
        [R] indices, the oldest first.
    """
    ranks = rank[updates.clamp(min=0)].masked_fill(updates < 0, len(rank))
    oldest_first = orders.argsort(stable=True)
    places = oldest_first[ranks[oldest_first].argsort(stable=True)][:R]
    return places[orders[places].argsort(stable=True)]
