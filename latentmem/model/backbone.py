"""The model under the verbs: its weights, adapters and identity, and what is derived from them for a memory."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from latentmem import longterm as longterms
from latentmem.coding.codec import codec_of
from latentmem.core.memory import Memory
from latentmem.core.read import read
from latentmem.core.settings import MemorySettings
from latentmem.core.write import first_states
from latentmem.decoder import attention, linear
from latentmem.decoder.adapters import READ, Adapters, bits, changes
from latentmem.decoder.cache import KVPrefix, Prefix, functional_cache
from latentmem.decoder.decoder import Decoder
from latentmem.errors import OtherModelError, TooLongError
from latentmem.longterm.search import Projectors, Retrieval, Retriever
from latentmem.model.known import Evidence
from latentmem.model.prompts import Prompts, Style

Ids = Tensor | Sequence[int]


@dataclass(frozen=True)
class Trained:
    """What a released checkpoint adds to its base model.

    Args:
        bos: what stands first in each layer, [L, 1, d].
        mark: what a write adds to the last K positions of each layer, [d].
        pool: the checkpoint's own memory.
    """

    bos: Tensor
    mark: Tensor
    pool: Memory


class Prefixes:
    """Keys and values of memories that are still referenced somewhere, the least recently used first.

    Args:
        limit: bytes up to which they are kept; None: as long as their memories.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._kept: weakref.WeakKeyDictionary[Memory, Prefix] = weakref.WeakKeyDictionary()

    def get(self, memory: Memory) -> Prefix | None:
        """The prefix of a memory, if it is kept."""
        return self._kept.get(memory)

    def keep(self, memory: Memory, prefix: Prefix) -> None:
        """Keep a prefix as the most recently used one; beyond `limit` bytes the least recently used ones go."""
        self._kept.pop(memory, None)  # a dictionary orders its keys by when they came
        self._kept[memory] = prefix
        if self.limit is None:
            return
        items = self._items()
        surplus = sum(kept.nbytes for _, kept in items) - self.limit
        for old, kept in items[:-1]:
            if surplus <= 0:
                return
            self._kept.pop(old, None)
            surplus -= kept.nbytes

    def clear(self) -> None:
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for _, prefix in self._items())

    @property
    def memories(self) -> list[Memory]:
        """The memories whose prefixes are kept, the least recently used first."""
        return [memory for memory, _ in self._items()]

    def _items(self) -> list[tuple[Memory, Prefix]]:
        while True:
            with contextlib.suppress(RuntimeError):  # a memory has just died in another thread
                return list(self._kept.items())


class Backbone:
    """A transformers decoder that reads memories; `MemoryModel` adds the verbs, and its docstring the arguments."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "",
        style: Style | None = None,
        adapters: Adapters | None = None,
        trained: Trained | None = None,
        shape: MemorySettings | None = None,
        projectors: Projectors | None = None,
        coder: str = "",
        first_token: int | None = None,
        identity: str | None = None,
    ) -> None:
        self.base, self.name = base.eval(), name
        self.tokenizer: Any = tokenizer
        self.identity = identity or fingerprint(base)
        base.requires_grad_(False)
        attention.choose(base)
        linear.choose(base)
        self.decoder = Decoder(base)
        self.adapters, self.trained, self.shape, self.coder = adapters, trained, shape, coder
        self.defaults: MemorySettings | None = None  # of new memories: `loading.trained.DEFAULTS`
        self.evidence: Evidence | None = None  # of `Tracer.drawn_on`, where it was calibrated
        self.retriever = Retriever(self.decoder, projectors)
        self.prompts = Prompts(tokenizer, style) if tokenizer is not None else None
        self.tokenizer_identity = self.prompts.identity if self.prompts else ""
        self.prefixes = Prefixes()
        self.usual_shares: weakref.WeakKeyDictionary[Prefix, list[tuple[Retrieval | None, Tensor]]]
        self.usual_shares = weakref.WeakKeyDictionary()  # of attention, by what is read; see `Tracer.drawn_on`
        self._first_token = first_token
        self._first: Tensor | None = None
        self._stamp = self._state()

    def __repr__(self) -> str:
        kind, adapters = self.base.config.model_type, ", with adapters" if self.adapters else ""
        sizes = f"L={self.decoder.L}, d={self.decoder.d}, {str(self.decoder.dtype)[6:]} on {self.decoder.device}"
        return f"{type(self).__name__}({self.name or 'unnamed'}: {kind}, {sizes}{adapters})"

    def with_trained(self, trained: Trained | None) -> Self:
        """The same model, weights and adapters with another bos, mark and pool; nothing is copied."""
        other = copy.copy(self)
        other.trained, other._first, other.prefixes = trained, None, Prefixes(self.prefixes.limit)
        return other

    def check(self, memory: Memory) -> None:
        """Refuse a memory that this model can not read.

        Raises:
            OtherModelError: another model, other adapters, another tokenizer or another dtype wrote the memory.
        """
        for what, mine in self.identities.items():
            theirs = getattr(memory, what)
            if theirs != mine:
                raise OtherModelError(
                    f"this memory was written with another {what.removesuffix('s')} "
                    f"({memory.model_name or 'unnamed'}, {theirs[:12] or 'none'}) than this model "
                    f"({self.name or 'unnamed'}, {mine[:12] or 'none'}). Load the model that wrote it, "
                    f"or write the text again."
                )
        mine = str(self.decoder.dtype)[6:]
        if memory.dtype != mine:
            raise OtherModelError(
                f"this memory holds {memory.dtype}, the model runs in {mine}. Load the model with "
                f"dtype={memory.dtype!r}."
            )
        if memory.coder:
            codec_of(memory.coder)

    @property
    def identities(self) -> dict[str, str]:
        """What a memory keeps of its writer: hashes of model, adapters and tokenizer."""
        adapters = self.adapters.identity if self.adapters else ""
        return {"model": self.identity, "adapters": adapters, "tokenizer": self.tokenizer_identity}

    # --- tokens and positions ---------------------------------------------------------------------------------------

    def ids(self, ids: Ids) -> Tensor:
        """Check token ids and bring them to [n] on the model's device.

        Raises:
            ValueError: no tokens, ids that are no integers or lie outside the vocabulary.
        """
        try:
            tokens = torch.as_tensor(ids, device=self.decoder.device)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"token ids must be one list of integers for each memory ({error}).") from None
        if tokens.numel() and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
            raise ValueError(f"token ids must be integers, got {str(tokens.dtype)[6:]}.")
        tokens = tokens.long()
        if tokens.ndim == 2 and tokens.shape[0] == 1:
            tokens = tokens[0]
        if tokens.ndim != 1 or tokens.shape[0] == 0:
            raise ValueError(f"token ids must be [n] with n >= 1, got the shape {list(tokens.shape)}.")
        if tokens.min() < 0 or tokens.max() >= self.decoder.vocabulary:
            raise ValueError(
                f"token ids must lie between 0 and {self.decoder.vocabulary - 1}, got {tokens.min()} to {tokens.max()}."
            )
        return tokens

    def prompts_or_raise(self) -> Prompts:
        """How text becomes token ids.

        Raises:
            ValueError: the model was loaded without a tokenizer.
        """
        if self.prompts is None:
            raise ValueError("this model was loaded without a tokenizer: use the methods that take token ids.")
        return self.prompts

    @property
    def limit(self) -> int:
        """Positions of the model's context."""
        return getattr(self.base.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

    def positions(self, memory: Memory) -> int:
        """P, the positions that a memory takes in front of the text: sink or bos and R + M, or 0 if it is empty.

        In the order "best-only" a question takes fewer of them.
        """
        return 0 if memory.is_empty else self.first.shape[1] + memory.R + memory.M

    def room(self, memory: Memory, more: int = 0) -> int:
        """Tokens of text and answer that fit behind a memory, once `more` slots are written into it."""
        if self.born_full:  # a checkpoint was trained behind its pool
            return self.limit
        M = min(memory.N, memory.M + more)
        R = memory.longterm.settings.R if memory.longterm is not None and more else memory.R
        return self.limit - (1 + R + M if R + M else 0)

    def check_room(self, room: int, n: int, new: int = 0, front: str = "") -> None:
        """Refuse a text of n tokens and `new` more where there is too little room.

        Raises:
            TooLongError: the room that there is.
        """
        if room < n + new:
            front = front or f"this context of {self.limit - room} positions"
            raise TooLongError(
                f"the text takes {n} tokens and the answer up to {new}, and behind {front} "
                f"there is room for {room}. Shorten the text, or use a smaller memory."
            )

    @property
    def tokens_at_once(self) -> int:
        """Tokens that go through in one pass; more bring nothing once they keep the device busy, and take memory."""
        return 1024 if self.decoder.device.type == "cpu" else 16_384

    # --- what stands in front of a text -----------------------------------------------------------------------------

    def using(self, adapter: str | None) -> contextlib.AbstractContextManager[None]:
        """Around every pass: under this adapter."""
        return self.adapters.use(adapter) if self.adapters else contextlib.nullcontext()

    @property
    def first_token(self) -> int:
        """Id of the token whose hidden states are the sink.

        Raises:
            ValueError: there is no tokenizer and no bos token.
        """
        token = self._first_token
        if token is None:
            token = self.prompts_or_raise().first_token if self.prompts else self.base.config.bos_token_id
        if token is None:
            raise ValueError("this model has no tokenizer and no bos token: give `first_token`.")
        return token

    @property
    def first(self) -> Tensor:
        """What stands in front of the slots in each layer, [L, 1, d]: the checkpoint's bos, or the sink."""
        self._forget_if_changed()
        first = self._first
        if first is None:
            if self.trained:
                first = self.trained.bos
            else:
                with torch.no_grad(), self.using(None):
                    first = first_states(self.decoder, self.first_token)
            self._first = first
        return first

    @property
    def mark(self) -> Tensor:
        """What a write of the preset "paper" adds to the positions that become slots, [d]; zeros if untrained."""
        if self.trained is not None:
            return self.trained.mark
        return torch.zeros(self.decoder.d, dtype=self.decoder.dtype, device=self.decoder.device)

    @property
    def born_full(self) -> bool:
        """Whether memories begin with a checkpoint's own pool, which is full."""
        return self.trained is not None

    def prefix(self, memory: Memory) -> Prefix:
        """Keys and values of [first ; slots], made once per memory."""
        self._forget_if_changed()
        prefix = self.prefixes.get(memory)
        if prefix is None:
            with torch.no_grad(), self.using(READ):
                prefix = self._read(memory)
        self.prefixes.keep(memory, prefix)
        return prefix

    def plain_front(self, memory: Memory) -> KVPrefix:
        """[first ; slots] for a question that searches nothing; its rotated keys are kept for the next one."""
        prefix = self.prefix(memory)
        if not prefix.keeps_front:
            _ = prefix.front
            self.prefixes.keep(memory, prefix)  # it is larger now
        return prefix.front

    def _read(self, memory: Memory) -> Prefix:
        """Keys and values of [first ; slots] from nothing."""
        if not memory.settings.by_update:
            return read(self.decoder, self.first, memory.slots.detach().to(self.decoder.device))
        bare = read(self.decoder, self.first, self.first[:, :0])
        kv = self.retriever.decoding.kv(memory, memory.slots[:, :, 0])
        return bare.after(torch.zeros(memory.L, 0, dtype=torch.long), kv)

    def functional(self, memory: Memory, chosen: Retrieval | None = None) -> Cache | None:
        """The prefix with gradients, if there is anything to differentiate; `chosen` of the long-term slots in it."""
        if not torch.is_grad_enabled() or memory.settings.by_update:  # coded updates have no gradient
            return None
        if not (memory.slots.requires_grad or any(p.requires_grad for p in self.base.parameters())):
            return None
        hidden = torch.cat([self.first, memory.slots.to(self.decoder.device)], dim=1)
        if chosen:
            store, s, layers = longterms.searched(memory), self.first.shape[1], []
            for i, (places, order) in enumerate(zip(chosen.places, chosen.order, strict=True)):
                both = torch.cat([self.retriever.slots(store, i, places), hidden[i, s:]])
                layers.append(both[order.to(both.device)])
            hidden = torch.cat([hidden[:, :s], torch.stack(layers)], dim=1)
        return functional_cache(self.decoder, hidden, partial(self.using, READ))

    def _forget_if_changed(self) -> None:
        """Drop what was derived from weights that were changed in place since, by an optimizer for example."""
        stamp = self._state()
        if stamp != self._stamp:
            self.prefixes.clear()
            self.retriever.clear()
            self._first, self._stamp = None, stamp

    def _state(self) -> tuple[int, torch.dtype, torch.device]:
        return changes(self.base), self.decoder.dtype, self.decoder.device


def fingerprint(model: PreTrainedModel) -> str:
    """Identity of a model's weights: a hash over names, shapes and 256 values of every weight, rounded to bfloat16.

    Weights of adapters are left out. Reading all bytes of a large model at every start would take minutes.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("inv_freq"))]
    for name, tensor in tensors:
        if "lora_" in name:
            continue
        step = max(1, tensor.numel() // 256)
        digest.update(f"{name.replace('.base_layer', '')} {list(tensor.shape)}".encode())
        digest.update(bits(tensor.detach().reshape(-1)[::step][:256]))
    return digest.hexdigest()
