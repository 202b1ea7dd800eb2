"""The paper literally: hidden states concatenated layer by layer, no cache, no hooks, nothing clever.

Every layer runs as a whole over [prefix ; text], with a mask in which a position sees itself and what stands before
it, and the outputs of the prefix are thrown away. Slow, and wasteful on purpose: it is what the fast path must equal.
Letters as in `latentmem.core`; nothing of `latentmem` is imported.
"""

import torch


def _layer(model, i, hidden, positions):
    """Layer i over hidden [1, T, d] at the given positions [1, T], causal."""
    body = model.get_decoder()
    T = hidden.shape[1]
    layer_types = getattr(body.config, "layer_types", None)
    everywhere = "sliding_attention" if getattr(body.config, "sliding_window", None) else "full_attention"
    kind = layer_types[i] if layer_types else everywhere
    at = torch.arange(T)
    sees = at[None, :] <= at[:, None]
    if kind == "sliding_attention":
        sees &= at[None, :] > at[:, None] - body.config.sliding_window
    mask = torch.zeros(T, T).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
    try:
        cos_sin = body.rotary_emb(hidden, positions, kind)
    except TypeError:
        cos_sin = body.rotary_emb(hidden, positions)
    out = body.layers[i](hidden, attention_mask=mask, position_ids=positions, position_embeddings=cos_sin)
    return out[0] if isinstance(out, tuple) else out


def _embed(model, ids):
    """What layer 0 gets: some models scale their embeddings."""
    scale = getattr(model.config, "embedding_multiplier", 1.0)  # granite; gemma's embedding does it itself
    return model.get_input_embeddings()(torch.as_tensor(ids)[None]) * scale


def _head(model, hidden):
    body = model.get_decoder()
    norm = body.norm if hasattr(body, "norm") else body.final_layernorm
    logits = model.lm_head(norm(hidden))[0]
    logits = logits * getattr(model.config, "logit_scale", 1.0) / getattr(model.config, "logits_scaling", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def read(model, first, slots, ids):
    """Logits [n, vocab] of ids [n] behind [first ; slots]: first [L, s, d], slots [L, M, d]."""
    hidden = _embed(model, ids)
    n = hidden.shape[1]
    for i in range(len(model.get_decoder().layers)):
        full = torch.cat([first[i][None], slots[i][None], hidden], dim=1)
        positions = torch.arange(full.shape[1])[None]
        hidden = _layer(model, i, full, positions)[:, -n:]
    return _head(model, hidden)


def sink(model, token):
    """Hidden states of the first token at the input of each layer, [L, 1, d]."""
    hidden, inputs = _embed(model, [token]), []
    for i in range(len(model.get_decoder().layers)):
        inputs.append(hidden[0])
        hidden = _layer(model, i, hidden, torch.zeros(1, 1, dtype=torch.long))
    return torch.stack(inputs)


def last(ids, c):
    """Which ceil(n/c) of n tokens become slots: the last of each group of c."""
    return [min(g + c, len(ids)) - 1 for g in range(0, len(ids), c)]


def surprise(model, first, slots, ids, c):
    """Which ceil(n/c) of n tokens become slots: those whose -log p is greatest; the first token's is 0."""
    logp = torch.log_softmax(read(model, first, slots, ids), -1)
    little = [0.0] + [-logp[t - 1, ids[t]].item() for t in range(1, len(ids))]
    return sorted(sorted(range(len(ids)), key=lambda t: -little[t])[: -(-len(ids) // c)])


def write_exact(model, first, slots, ids, c=1, choice="last"):
    """New slots [L, ceil(n/c), d]: each layer's input at the chosen tokens; the text sees all of the memory."""
    chosen = surprise(model, first, slots, ids, c) if choice == "surprise" else last(ids, c)
    hidden, new = _embed(model, ids), []
    n = hidden.shape[1]
    for i in range(len(model.get_decoder().layers)):
        new.append(torch.stack([hidden[0, t] for t in chosen]))
        full = torch.cat([first[i][None], slots[i][None], hidden], dim=1)
        hidden = _layer(model, i, full, torch.arange(full.shape[1])[None])[:, -n:]
    return torch.stack(new)


def write_paper(model, first, mark, slots, ids, K):
    """New slots [L, K, d]: each layer's output at the last K positions of [first ; newest K slots ; text]."""
    hidden, new = _embed(model, ids), []
    n = hidden.shape[1]
    for i in range(len(model.get_decoder().layers)):
        newest = slots[i, max(0, slots.shape[1] - K) :][None]
        full = torch.cat([first[i][None], newest, hidden], dim=1)
        last = min(K, newest.shape[1] + n)  # bos is no slot
        marked = torch.cat([full[:, :-last], full[:, -last:] + mark], dim=1)
        out = _layer(model, i, marked, torch.arange(full.shape[1])[None])
        new.append(out[0, -last:])
        hidden = out[:, -n:]
    return torch.stack(new)
