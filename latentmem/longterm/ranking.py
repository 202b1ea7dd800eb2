"""Which stored slots, or updates, fit a question best."""

from __future__ import annotations

from torch import Tensor

# --- retrieval --------------------------------------------------------------------------------------------------------


def best(fits: Tensor, there: Tensor, orders: Tensor, R: int) -> Tensor:
    """The R slots of a layer that fit best, the oldest first.

    Args:
        fits: [S].
        there: which of them hold a slot, [S] bool.
        orders: the lower, the older, [S].

    Returns:
        [R] indices.
    """
    found = fits.masked_fill(~there, float("-inf")).topk(R).indices.sort().values
    # equally old ones, as there are in released checkpoints alone, stand as the released code puts them: last first
    return found.flip(0)[orders[found].flip(0).argsort(stable=True)]


def marks(fits: Tensor, births: Tensor) -> Tensor:
    """How well what each update wrote fits, from how well its slots fit, in one layer.

    For each token that asks, the best slot of an update counts, less the mean over updates; the more it stands out
    among them (in units of their spread), the more it counts. So words that all texts have in common decide nothing.

    Args:
        fits: [n, S].
        births: the update of each slot, from 0 without gaps; -1 for what is not there, [S].

    Returns:
        [updates up to the newest that is there]; -inf for one of which nothing is there.
    """
    there = births >= 0
    index = births[there].long()
    top = fits.new_full((len(fits), int(index.max()) + 1 if len(index) else 0), float("-inf"))
    top.scatter_reduce_(1, index.expand(len(fits), -1), fits[:, there], "amax")
    some = top > float("-inf")
    count = some.sum(1, keepdim=True).clamp(min=1)
    beyond = top - top.where(some, 0).sum(1, keepdim=True) / count
    spread = (beyond.where(some, 0).square().sum(1, keepdim=True) / count).sqrt()
    return (beyond * beyond.abs() / (spread + 1e-6)).where(some, float("-inf")).mean(0)


def together(rank: Tensor, births: Tensor, there: Tensor, orders: Tensor, R: int) -> Tensor:
    """R slots of a layer: all of the best update, then of the next, of the last one the first; oldest first.

    Args:
        rank: of each update, 0 for the best.
        births: the update of each slot, [S].
        there, orders: as in `best`.
    """
    mine = rank[births.clamp(min=0).long()].masked_fill(~there, len(rank))
    first = orders.argsort(stable=True)
    found = first[mine[first].argsort(stable=True)][:R]
    return found[orders[found].argsort(stable=True)]
