"""Reading: slots as keys and values in front of the text (letters: `latentmem.core`).

Layer l attends over [first_l ; M_l ; h_l], and only the text h_l asks. So a memory is a prefix of keys and values, at
positions 0 .. P-1, with the text behind it. There are two forms of it:

    inference   `Prefix` holds keys and values that were projected once, when the slots were written. Keys are kept
                unrotated: after a drop they are gathered and rotated to their new positions, never projected again.
    training    `functional_cache` projects inside each layer's own forward, so gradients reach slots and weights.

`Decoder` learns from the layers themselves how they make keys and values out of hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentmem.decoder.cache import Prefix
from latentmem.decoder.decoder import Decoder


def read(decoder: Decoder, first: Tensor, slots: Tensor) -> Prefix:
    """Project a memory's prefix from nothing: [first ; slots], with whichever adapter is active.

    Args:
        decoder: what projects.
        first: hidden states of sink or bos at the input of each layer, [L, s, d].
        slots: [L, M, d].

    Source: MemoryLLM section 3.1.1.
    """
    heads = decoder.project_all(first)
    prefix = Prefix(decoder, [keys for keys, _ in heads], [values for _, values in heads], first.shape[1])
    if not slots.shape[1]:
        return prefix
    return prefix.after(torch.zeros(decoder.L, 0, dtype=torch.long), decoder.project_all(slots))
