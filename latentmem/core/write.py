"""Writing: text in, new slots out, by one stock forward pass with a hook per layer (letters: `latentmem.core`).

`latentmem.core.presets` says in what the two presets differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from latentmem.decoder.cache import attention_mask, functional_cache
from latentmem.decoder.decoder import Decoder
from latentmem.decoder.hooks import layers_seen

AT_ONCE = 256  # tokens whose surprise is computed at once: each takes as many numbers as the vocabulary has words


def _run(decoder: Decoder, ids: Tensor, cache: Cache | None, **placed: Tensor) -> Tensor:
    placed = placed or {"attention_mask": attention_mask(cache, ids)}
    return decoder.body(input_ids=ids, **placed, past_key_values=cache, use_cache=False).last_hidden_state


def first_states(decoder: Decoder, token: int) -> Tensor:
    """The sink: hidden states of the model's own first token at the input of each layer, [L, 1, d]."""
    with layers_seen(decoder) as seen:
        _run(decoder, torch.tensor([[token]], device=decoder.device), None)
    return torch.cat(seen)


@torch.no_grad()
def surprise(decoder: Decoder, hidden: Tensor, ids: Tensor) -> Tensor:
    """-log p of each of n tokens after those before it, [n], 0 for the first; `hidden` [n, d] is the body's output."""
    parts = [hidden.new_zeros(1, dtype=torch.float32)]
    for states, following in zip(hidden[:-1].split(AT_ONCE), ids[1:].split(AT_ONCE), strict=True):
        parts.append(torch.nn.functional.cross_entropy(decoder.logits(states).float(), following, reduction="none"))
    return torch.cat(parts)


def write_exact(
    decoder: Decoder, cache: Cache, ids: Sequence[Tensor], choices: Sequence[tuple[int, str]], **placed: Tensor
) -> list[Tensor]:
    """New slots of the preset "exact", of B texts in one pass: the layers' inputs at one token of c.

    Args:
        cache: over [sink ; all slots] of one memory for all texts, or of one for each, not storing.
        ids: B texts, [n] each; they are padded on the right, and no text looks at its padding.
        choices: c and choice of each. "last" takes the last token of each group of c; "surprise" those tokens of the
            text that were expected least after the tokens before them, in their order.
        placed: `attention_mask` and `position_ids` of the padded texts behind several memories.

    Returns:
        B tensors [L, ceil(n / c), d].
    """
    with layers_seen(decoder) as seen:
        output = _run(decoder, torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True), cache, **placed)
    slots = []
    for row, (text, (c, choice)) in enumerate(zip(ids, choices, strict=True)):
        n, k = len(text), -(-len(text) // c)
        if choice == "surprise" and c > 1:
            least_expected = surprise(decoder, output[row, :n], text).argsort(descending=True, stable=True)
            at = least_expected[:k].sort().values
        else:
            at = (torch.arange(k, device=text.device) * c + c - 1).clamp(max=n - 1)
        slots.append(torch.stack([hidden[row, at] for hidden in seen]))
    return slots


def write_paper(decoder: Decoder, bos: Tensor, mark: Tensor, newest: Tensor, ids: Tensor, K: int) -> Tensor:
    """New slots of the preset "paper": the layers' outputs at the last K positions.

        positions   bos | newest slots | text             K of them become slots; `mark` is added to their inputs
        n >= K      bos | m slots      | n - K   K
        n <  K      bos | m - (K - n)  |   K - n | n      the last old slots travel along, and come back rewritten

    Args:
        bos: what stands first in each layer, [L, 1, d].
        mark: [d].
        newest: the newest min(K, M) slots, [L, m, d].
        ids: n tokens, [n].

    Returns:
        [L, min(K, n + m), d]: K slots, or fewer while the memory and the text together hold fewer.

    Source: MemoryLLM section 3.1.2 and figure 3; the released `inject_memory`.
    """
    n, m = ids.shape[0], newest.shape[1]
    carried = min(max(K - n, 0), m)
    marked = min(K, n + carried)
    prefix, travelling = newest[:, : m - carried], newest[:, m - carried :]

    def change(i: int, hidden: Tensor) -> Tensor:
        hidden = torch.cat([travelling[i][None].to(hidden.dtype), hidden[:, carried:]], dim=1)
        return torch.cat([hidden[:, :-marked], hidden[:, -marked:] + mark], dim=1)

    cache = functional_cache(decoder, torch.cat([bos, prefix], dim=1))
    padded = torch.cat([ids.new_zeros(carried), ids])  # the carried positions' embeddings are replaced by `change`
    with layers_seen(decoder, change, outputs=True) as seen:
        _run(decoder, padded[None], cache)
    return torch.cat(seen)[:, -marked:]
