"""Products that do not depend on their company: equal rows give equal bits wherever they stand."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 128  # of one product


def in_blocks(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix in zero-padded blocks of `ROWS`."""
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % ROWS))
    return torch.cat([block @ matrix for block in padded.split(ROWS)])[: len(rows)] if len(rows) else rows @ matrix
