"""Is what was asked in the memory? An estimate from how an answer was read (letters: `latentmem.core`).

    drawn    what the answer attended to beyond the answer of a neutral question, the mean over layers
    lowest   the smallest log probability of a token of the answer
    fit      the best mark of an update for the question, times log of the number of updates
    size     log of the number of slots that are read

    known = sigmoid(w0 + w1 * log(drawn) + w2 * lowest + w3 * fit + w4 * size)

The weights are fitted to answers of which it is known whether their text was written: `benchmarks/known.py`. An answer
that says that it does not know is no such answer, and its estimate is 0.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from latentmem.errors import DamagedError

LEAST, FEWEST = 1e-3, 32  # of what is drawn, and of slots; below no answer was seen
Signs = tuple[float, float, float, float]


@dataclass(frozen=True)
class Evidence:
    """What an answer of one model with one pair of adapters says of whether its question could be answered.

    Args:
        model, adapters: identities to which the weights belong.
        weights: w0 to w4.
    """

    model: str
    adapters: str
    weights: tuple[float, ...]

    @staticmethod
    def load(path: Path) -> Evidence:
        """Read the weights from a JSON file; a DamagedError if there are none."""
        try:
            facts = json.loads(path.read_text())
            weights = tuple(map(float, facts["weights"]))
            if len(weights) != 5 or not all(map(math.isfinite, weights)):
                raise ValueError(f"expected 5 finite weights, got {weights}")
            return Evidence(str(facts["model"]), str(facts["adapters"]), weights)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{path} is damaged ({error}). Restore it from a copy, or delete it.") from error

    def known(self, drawn: float, likely: Tensor, marks: Tensor, slots: int) -> float:
        """Estimate from 0 to 1 that what was asked stands in the memory.

        Args:
            drawn: the sum over slots, the mean over layers.
            likely: log probability of each token of the answer, [n].
            marks: of all updates, [U].
            slots: that are read.
        """
        total = sum(w * x for w, x in zip(self.weights, (1.0, *signs(drawn, likely, marks, slots)), strict=True))
        return 1 / (1 + math.exp(-max(-50.0, min(50.0, total))))


def signs(drawn: float, likely: Tensor, marks: Tensor, slots: int) -> Signs:
    """What the estimate is made of: log(drawn), lowest, fit, size."""
    fit = max(0.0, float(marks.max())) * math.log(len(marks))
    return math.log(max(drawn, LEAST)), float(likely.min()), fit, math.log(max(slots, FEWEST))
