"""Writing: text in, new slots out, in the two presets (letters: `latentmem.core`).

    exact   slots are what each layer gets as INPUT. A layer's keys and values are computed from its input, so these
            slots lose nothing. The text sees the sink and the whole memory.
    paper   slots are what each layer gives as OUTPUT at the last K positions, to whose inputs the learned vector
            `mark` is added. The text sees bos and the newest K slots. If the text has fewer than K tokens, the last
            old slots travel along as queries and come back rewritten.

Both are one stock forward pass with a hook per layer.
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
    """How little each token was expected after those before it: its negative log-probability, [n]; 0 for the first.

    Args:
        hidden: what the body gave for the n tokens, [n, d].
        ids: the tokens, [n].
    """
    parts = [hidden.new_zeros(1, dtype=torch.float32)]
    for some, then in zip(hidden[:-1].split(AT_ONCE), ids[1:].split(AT_ONCE), strict=True):
        parts.append(torch.nn.functional.cross_entropy(decoder.logits(some).float(), then, reduction="none"))
    return torch.cat(parts)


def write_exact(decoder: Decoder, cache: Cache, ids: Tensor, compression: int = 1, choice: str = "last") -> Tensor:
    """New slots of the preset "exact": the layers' inputs at one token of c.

    Which ones: "last" takes the last of each group of c tokens, "surprise" those of the whole piece that were expected
    least after what stood before them, in their order.

    Args:
        cache: over [sink ; all slots], not storing.
        ids: n tokens, [n].
        compression: c.
        choice: "last" or "surprise".

    Returns:
        [L, ceil(n / c), d].
    """
    return write_exact_rows(decoder, cache, [ids], [(compression, choice)])[0]


def write_exact_rows(
    decoder: Decoder, cache: Cache, ids: Sequence[Tensor], ways: Sequence[tuple[int, str]], **placed: Tensor
) -> list[Tensor]:
    """`write_exact` of B texts into memories of their own, in one pass.

    Args:
        cache: over one memory for all texts, or one for each, not storing.
        ids: B texts, [n] each; they are padded on the right, and no text looks at its padding.
        ways: compression and choice of each.
        placed: `attention_mask` and `position_ids` of the padded texts, where memories differ in length.

    Returns:
        B tensors [L, ceil(n / c), d].
    """
    with layers_seen(decoder) as seen:
        output = _run(decoder, torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True), cache, **placed)
    found = []
    for row, (text, (c, choice)) in enumerate(zip(ids, ways, strict=True)):
        n = len(text)
        k = -(-n // c)
        if choice == "surprise" and c > 1:
            little = surprise(decoder, output[row, :n], text)
            at = little.argsort(descending=True, stable=True)[:k].sort().values
        else:
            at = (torch.arange(k, device=text.device) * c + c - 1).clamp(max=n - 1)
        found.append(torch.stack([hidden[row, at] for hidden in seen]))
    return found


def write_paper(decoder: Decoder, bos: Tensor, mark: Tensor, newest: Tensor, ids: Tensor, K: int) -> Tensor:
    """New slots of the preset "paper": the layers' outputs at the last K positions.

    Args:
        bos: what stands first in each layer, [L, 1, d].
        mark: what is added to the last K positions at the input of each layer, [d].
        newest: the newest min(K, M) slots, [L, m, d].
        ids: n tokens, [n].

    Returns:
        [L, min(K, n + m), d]: K slots, or fewer while the memory and the text together hold fewer.

    Source: MemoryLLM section 3.1.2 and figure 3; the released `inject_memory`.
    """
    n, m = ids.shape[0], newest.shape[1]
    carried = min(max(K - n, 0), m)  # a short text takes the last old slots along as queries
    marked = min(K, n + carried)
    seen_as_prefix, travelling = newest[:, : m - carried], newest[:, m - carried :]

    def change(i: int, hidden: Tensor) -> Tensor:
        hidden = torch.cat([travelling[i][None].to(hidden.dtype), hidden[:, carried:]], dim=1)
        return torch.cat([hidden[:, :-marked], hidden[:, -marked:] + mark], dim=1)

    cache = functional_cache(decoder, torch.cat([bos, seen_as_prefix], dim=1))
    padded = torch.cat([ids.new_zeros(carried), ids])  # the carried positions' embeddings are replaced by `change`
    with layers_seen(decoder, change, outputs=True) as seen:
        _run(decoder, padded[None], cache)
    return torch.cat(seen)[:, -marked:]
