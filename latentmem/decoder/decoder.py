"""What the algorithm asks of a transformers decoder: its layers, and the keys and values that each makes."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latentmem.decoder.attention import KV, Memories, hand_over, takes_memories

BLOCK = 128  # rows of one projection; a fixed shape makes a row's bits independent of how many are projected


class _Stop(Exception):  # noqa: N818 - no error
    """Ends an attention module's forward once it has handed over its keys and values."""


class _Probe:
    """A cache that takes the keys and values of one attention module, and stops it or hands a memory over to it."""

    def __init__(self, *, stops: bool) -> None:
        self.stops = stops

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> KV:
        self.kv = (keys, values)
        if self.stops:
            raise _Stop
        self.unread = hand_over(keys, values, Memories([(keys[:, :, :1], values[:, :, :1])], [0]))
        return keys, values

    def get_seq_length(self, *_: object) -> int:
        return 0


class Decoder:
    """A transformers decoder, its layers, and the keys and values that each makes.

    Args:
        model: a decoder with `get_decoder().layers`, rotary positions and one self-attention per layer.

    Raises:
        ValueError: the model is built in another way, with what was missing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.body = model.get_decoder()
        if not hasattr(self.body, "layers") or not hasattr(self.body, "rotary_emb"):
            raise ValueError(f"{self._name}: a decoder with `layers` and `rotary_emb` was expected.")
        self.layers: torch.nn.ModuleList = self.body.layers
        self.L = len(self.layers)
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.d: int = model.get_input_embeddings().weight.shape[1]
        self._by_layer_type = "layer_type" in inspect.signature(self.body.rotary_emb.forward).parameters
        kinds = [self._kind(i) for i in range(self.L)]
        known = {kind: self._understand(kinds.index(kind)) for kind in set(kinds)}
        self._rotated_widths = [known[kind][0] for kind in kinds]  # how much of a head's width each layer rotates
        self._usual_layout = [known[kind][1] for kind in kinds]
        for kind in known if takes_memories(model) else ():
            self._check_reads(kinds.index(kind))

    @property
    def _name(self) -> str:
        return f"{type(self.model).__name__} is not supported"

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def keys_values(self, i: int, hidden: Tensor) -> KV:
        """Keys without rotation, and values, [B, heads, m, head width] each, of what layer i gets, [B, m, d]."""
        return self._project(i, hidden) if self._usual_layout[i] else self._unrotated(i, hidden)

    @property
    def slides(self) -> bool:
        """Whether some layer sees a window of the last positions only."""
        config: Any = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ()
        return "sliding_attention" in kinds or bool(getattr(config, "sliding_window", None))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token from what the body gives, [..., d] -> [..., vocab], scaled and capped."""
        head: Any = self.model.get_output_embeddings()
        config: Any = self.model.config.get_text_config()
        logits = head(hidden)
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def rotate(self, i: int, keys: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys of layer i to positions [B or 1, m], as far as the model rotates them."""
        return self.rotation(positions)(i, keys)

    def rotation(self, positions: Tensor) -> Callable[[int, Tensor], Tensor]:
        """`rotate` for many layers at the same positions: the angles of layers of one type are computed once."""
        known: dict[tuple[Any, ...], KV] = {}

        def rotate(i: int, keys: Tensor) -> Tensor:
            if not self._rotated_widths[i]:
                return keys
            kind = self._layer_type(i), keys.device, keys.dtype
            if kind not in known:
                known[kind] = self._cos_sin(i, keys, positions)
            return self._rotate(i, keys, known[kind], self._rotated_widths[i])

        return rotate

    def _rotate(self, i: int, keys: Tensor, cos_sin: KV, r: int) -> Tensor:
        cos, sin = cos_sin
        apply = sys.modules[type(self.layers[i].self_attn).__module__].apply_rotary_pos_emb
        turned = apply(keys[:, :0, :, :r], keys[..., :r], cos, sin)[1]  # of no queries
        return turned if r == keys.shape[-1] else torch.cat([turned, keys[..., r:]], dim=-1)

    def project(self, i: int, hidden: Tensor) -> KV:
        """`keys_values` of [m, d] in zero-padded blocks of 128 rows, so that equal rows give equal bits."""
        m = hidden.shape[0]
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, -m % BLOCK))
        parts = [self.keys_values(i, block[None]) for block in padded.split(BLOCK)]
        keys, values = (torch.cat(tensors, dim=2)[:, :, :m] for tensors in zip(*parts, strict=True))
        return keys, values

    def project_all(self, slots: Tensor) -> list[KV]:
        """`project` for every layer of [L, m, d]."""
        return [self.project(i, slots[i]) for i in range(self.L)]

    def _project(self, i: int, hidden: Tensor) -> KV:
        """The usual layout: norm, `k_proj`, maybe `k_norm`, `v_proj`; no queries are made in vain, as in `_probed`."""
        layer: Any = self.layers[i]
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        keys, values = (f(x).unflatten(-1, (-1, attention.head_dim)) for f in (attention.k_proj, attention.v_proj))
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _unrotated(self, i: int, hidden: Tensor) -> KV:
        """Any layout: what the layer's own attention hands to its cache when no position turns the keys."""
        cos, sin = self._cos_sin(i, hidden, torch.zeros(1, 1, dtype=torch.long, device=hidden.device))
        shape = (1, hidden.shape[1], cos.shape[-1])
        return self._probed(i, hidden, (torch.ones_like(cos).expand(shape), torch.zeros_like(sin).expand(shape)))

    def _probed(self, i: int, hidden: Tensor, cos_sin: KV) -> KV:
        probe = _Probe(stops=True)
        with contextlib.suppress(_Stop):
            self._attend(i, hidden, cos_sin, probe)
        return probe.kv

    def normed(self, i: int, hidden: Tensor) -> Tensor:
        """What the attention of layer i sees of hidden states."""
        layer: Any = self.layers[i]
        return layer.input_layernorm(hidden) if hasattr(layer, "input_layernorm") else hidden

    def _attend(self, i: int, hidden: Tensor, cos_sin: KV, probe: _Probe) -> None:
        layer: Any = self.layers[i]
        x = self.normed(i, hidden)
        at = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)  # some scale their queries by it
        layer.self_attn(x, position_embeddings=cos_sin, position_ids=at, attention_mask=None, past_key_values=probe)

    def _cos_sin(self, i: int, like: Tensor, positions: Tensor) -> KV:
        return self.body.rotary_emb(like, positions, *((self._layer_type(i),) if self._by_layer_type else ()))

    def _layer_type(self, i: int) -> str | None:
        kinds = getattr(self.body.config, "layer_types", None)
        return kinds[i] if kinds else None

    def _kind(self, i: int) -> str:
        """What tells layer i from others: its classes, and its attention's settings, such as a window."""
        layer: Any = self.layers[i]
        if not hasattr(layer, "self_attn"):
            raise ValueError(f"{self._name}: its layers have no `self_attn`.")
        settings = {
            k: v for k, v in vars(layer.self_attn).items() if isinstance(v, (bool, int, float, str, type(None)))
        }
        settings.pop("layer_idx", None)
        parts = [(name, type(part).__name__) for name, part in layer.named_modules()]
        return f"{parts} {sorted(settings.items())} {self._layer_type(i)}"

    @torch.no_grad()
    def _understand(self, i: int) -> tuple[int, bool]:
        """How much of its keys' width layer i rotates, and whether it has the usual layout.

        Raises:
            ValueError: its unrotated keys and their rotation together do not give the keys that it makes itself.
        """
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(1, 3, self.d, generator=generator).to(self.device, self.dtype)
        positions = torch.tensor([[1, 5, 11]], device=self.device)
        try:
            cos_sin = self._cos_sin(i, x, positions)
            keys = self._probed(i, x, cos_sin)[0]
            plain, values = self._unrotated(i, x)
            direct = False
            with contextlib.suppress(AttributeError, RuntimeError):
                mine = self._project(i, x)
                direct = torch.equal(mine[0], plain) and torch.equal(mine[1], values)
            tolerance = 1e-2 * keys.abs().max()
            if (keys - plain).abs().max() <= 1e-3 * tolerance:
                return 0, direct
            width = cos_sin[0].shape[-1]
            for r in (width, 2 * width):  # most repeat their angles for both halves, some (gpt-oss) do not
                with contextlib.suppress(RuntimeError):
                    if (keys - self._rotate(i, plain, cos_sin, r)).abs().max() <= tolerance:
                        return r, direct
            reason = "its keys are not rotated in a known way"
        except (AttributeError, TypeError, RuntimeError, ValueError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{self._name}: the keys and values of layer {i} can not be taken ({reason}).")

    @torch.no_grad()
    def _check_reads(self, i: int) -> None:
        """Refuse a layer whose attention does not get the very tensors that its cache returns; a ValueError."""
        x, probe = torch.zeros(1, 1, self.d, device=self.device, dtype=self.dtype), _Probe(stops=False)
        with contextlib.suppress(AttributeError, TypeError, RuntimeError, ValueError):
            self._attend(i, x, self._cos_sin(i, x, torch.zeros(1, 1, dtype=torch.long, device=self.device)), probe)
        if probe.unread:
            raise ValueError(f"{self._name}: the attention of layer {i} does not get what its cache hands over.")
