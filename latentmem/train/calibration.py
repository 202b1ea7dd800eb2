"""A coder (`latentmem.coding`) from text: what keys and values are like, and how far the answers depend on them.

1  texts are written into a memory, piece by piece, until it holds `SLOTS`
2  mean and covariance of the keys and values of each group of layers; some of them are kept as a sample
3  behind the memory the model reads parts of these texts again, as if it were asked for them, and the text that
   comes next; at each position a token is drawn from what it expects. The gradient g of that token's log likelihood
   by the keys and values gives the Fisher information F = mean of g g' in each layer: its own answers are the labels
4  again from 1, until all texts are read; the sums are a file, so that a run goes on where it was stopped
5  `fit` makes the coder of the sums
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from latentmem import container
from latentmem.coding import rans
from latentmem.coding.coder import LARGEST, ZERO, Coder, Group
from latentmem.coding.sketch import BITS, Sketch
from latentmem.core.memory import Memory
from latentmem.core.settings import MemorySettings
from latentmem.decoder.adapters import READ
from latentmem.decoder.attention import KV
from latentmem.decoder.cache import Prefix, memory_cache
from latentmem.errors import DamagedError
from latentmem.model.context import placed
from latentmem.model.model import MemoryModel

SLOTS = 1536  # that a memory of the calibration holds
SIZE = 5  # layers of a group
STEP = 0.005  # of a coefficient; see docs
ROWS = 4  # texts that are read at once with gradients
PASSES = 4  # of them behind each memory
ASKED = 48  # tokens of a text that is read again
SAMPLE = 256  # slots of each memory that are kept for the tables
MOST = 20_480  # of them in all
COUNTED = 8192  # of them that tables are counted from
REGULAR = 0.2  # share of its mean that is added to the diagonal of F
FORMAT = "latentmem sums 1"
REMEDY = "Restore it from a copy, or remove it and begin anew."
COUNTS = ("tokens", "answers", "memories", "about")  # what a file's header says of sums
WHOLE = ("sample", "direction", "directions", "searched")  # sums that are one tensor
KINDS = 64  # of tables
ESCAPE = 1 / 8192  # share of a value up to which it has no symbol
RARE = 0.06  # share of values other than 0 from which on a coefficient is coded


@dataclass
class Sums:
    """What calibration has seen so far.

    Args:
        first: of each group's keys and values, [D] float64.
        second: of their products, [D, D] float64.
        fisher: of each layer, sum of g g', [width, width] float32; that of layer 0 is empty.
        sample: keys and values of some slots, [m, sum of all widths] bfloat16.
        direction: of the directions by which slots are searched, [d] float64.
        directions: of their products, [d, d] float64.
        searched: some of them, [m, d] bfloat16.
        tokens: slots seen.
        answers: tokens drawn.
        memories: memories that were filled.
        about: what they are sums of: model, texts.
    """

    first: list[Tensor]
    second: list[Tensor]
    fisher: list[Tensor]
    sample: Tensor
    direction: Tensor
    directions: Tensor
    searched: Tensor
    tokens: int = 0
    answers: int = 0
    memories: int = 0
    about: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the sums to a file, atomically."""
        tensors = {f"first.{i}": t for i, t in enumerate(self.first)} | {
            f"second.{i}": t for i, t in enumerate(self.second)
        }
        tensors |= {f"fisher.{i}": t for i, t in enumerate(self.fisher)}
        tensors |= {name: getattr(self, name) for name in WHOLE}
        text = json.dumps({name: getattr(self, name) for name in COUNTS}, sort_keys=True)
        container.write(path, tensors, {"format": FORMAT, "sums": text, "checksum": _checksum(text, tensors)})

    @staticmethod
    def load(path: Path) -> Sums:
        """Read the sums back.

        Raises:
            DamagedError: the file is missing, not complete, altered, or none of this version.
        """
        tensors, header = container.read(path)
        if header.get("format") != FORMAT:
            raise DamagedError(f"{path} holds no sums: expected {FORMAT!r}, got {header.get('format')!r}. {REMEDY}")
        if _checksum(header.get("sums", ""), tensors) != header.get("checksum"):
            raise DamagedError(f"{path} is damaged: its checksum does not match. {REMEDY}")

        def listed(name: str) -> list[Tensor]:
            return [tensors[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in tensors))]

        others: dict[str, Any] = {name: tensors[name] for name in WHOLE} | json.loads(header["sums"])
        others["directions"] = others["directions"].double()  # float32 in older files, as `second`
        return Sums(listed("first"), [t.double() for t in listed("second")], listed("fisher"), **others)


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    return container.checksum(text, {name: tensors[name].contiguous() for name in sorted(tensors)})


def groups_of(widths: Sequence[int], size: int = SIZE) -> list[list[int]]:
    """All layers but the first in groups of neighbours of equal width."""
    groups: list[list[int]] = []
    for i in range(1, len(widths)):
        if not groups or len(groups[-1]) == size or widths[groups[-1][0]] != widths[i]:
            groups.append([])
        groups[-1].append(i)
    return groups


class Calibration:
    """Collects `Sums` over memories of texts."""

    def __init__(self, llm: MemoryModel, sums: Sums | None = None) -> None:
        self.llm = llm
        with torch.no_grad(), llm.using(READ):
            one = torch.zeros(llm.decoder.L, 1, llm.decoder.d, dtype=llm.decoder.dtype, device=llm.decoder.device)
            self.like = [(k[:, :, :0].cpu(), v[:, :, :0].cpu()) for k, v in llm.decoder.project_all(one)]
        self.widths = [k.shape[1] * k.shape[3] + v.shape[1] * v.shape[3] for k, v in self.like]
        self.groups = groups_of(self.widths)
        self.sums = sums or self._nothing()

    @property
    def empty(self) -> Memory:
        """The memory that is filled."""
        return self.llm.empty(settings=MemorySettings(preset="exact", compression=1, form="exact"))

    @property
    def slots(self) -> int:
        """Tokens that one memory takes."""
        return min(SLOTS, self.empty.N)

    def kv(self, sample: Tensor) -> list[KV]:
        """Keys and values [1, heads, m, head width] of rows of the sample [m, ...]; the first layer's are zeros."""
        rows = [sample.new_zeros(len(sample), self.widths[0]), *sample.split(self.widths[1:], 1)]
        pairs = []
        for row, (keys, values) in zip(rows, self.like, strict=True):
            parts = row.split([side.shape[1] * side.shape[3] for side in (keys, values)], 1)
            heads = [part.unflatten(1, (side.shape[1], -1)) for part, side in zip(parts, (keys, values), strict=True)]
            pairs.append((heads[0].transpose(0, 1)[None], heads[1].transpose(0, 1)[None]))
        return pairs

    def _nothing(self) -> Sums:
        wide = [sum(self.widths[i] for i in group) for group in self.groups]
        zeros = [torch.zeros(w, dtype=torch.float64) for w in wide]
        squares = [torch.zeros(w, w, dtype=torch.float64) for w in wide]
        fisher = [torch.zeros(w if i else 0, w if i else 0) for i, w in enumerate(self.widths)]
        none = torch.zeros(0, sum(self.widths[1:]), dtype=torch.bfloat16)
        d = self.llm.decoder.d
        direction, directions = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        return Sums(zeros, squares, fisher, none, direction, directions, torch.zeros(0, d, dtype=torch.bfloat16))

    def see(self, texts: Sequence[Tensor], following: Tensor) -> None:
        """Take one memory of some texts, and the text that comes after them, into the sums."""
        llm, memory = self.llm, self.empty
        for ids in texts:
            memory = llm.write_ids(memory, ids)
        prefix, s = llm.prefix(memory), llm.prefix(memory).s
        rows = _rows(prefix.keys, prefix.values, s)
        for group, first, second in zip(self.groups, self.sums.first, self.sums.second, strict=True):
            x = torch.cat([rows[i] for i in group], 1)
            first += x.double().sum(0)
            _add_products(second, x)
        generator = torch.Generator().manual_seed(self.sums.memories)
        chosen = torch.randperm(memory.M, generator=generator)[: min(SAMPLE, MOST - len(self.sums.sample))]
        fresh = torch.cat(rows[1:], 1)[chosen].bfloat16()
        self.sums.sample = torch.cat([self.sums.sample, fresh])
        layer = llm.retriever.layer_sketched
        directions = normalize(llm.decoder.normed(layer, memory.slots[layer]).float(), dim=-1).cpu()
        self.sums.direction += directions.double().sum(0)
        _add_products(self.sums.directions, directions)
        self.sums.searched = torch.cat([self.sums.searched, directions[chosen].bfloat16()])
        parts = [ids[at : at + ASKED] for ids, at in self._parts(texts, following, generator)]
        for start in range(0, len(parts), ROWS):
            self._depend(memory, prefix, parts[start : start + ROWS], generator)
        self.sums.tokens += memory.M
        self.sums.memories += 1

    def _parts(
        self, texts: Sequence[Tensor], following: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, int]]:
        for number in range(ROWS * PASSES):
            i = int(torch.randint(len(texts) + (number % ROWS == 0), (1,), generator=generator))
            ids = texts[i] if i < len(texts) else following
            yield ids, int(torch.randint(max(1, len(ids) - ASKED), (1,), generator=generator))

    def _depend(self, memory: Memory, prefix: Prefix, parts: Sequence[Tensor], generator: torch.Generator) -> None:
        """Add how the model's own answers depend on keys and values: one backward pass for some rows of text."""
        llm, s = self.llm, prefix.s
        keys = [k.detach().clone().requires_grad_() for k in prefix.keys]
        values = [v.detach().clone().requires_grad_() for v in prefix.values]
        tokens = pad_sequence(list(parts), batch_first=True)
        with torch.enable_grad(), llm.using(READ):
            front = Prefix(prefix.decoder, keys, values, s).front
            cache, at = memory_cache([front], llm.decoder, store=False), placed([front.P], torch.ones_like(tokens))
            logits = llm.base(input_ids=tokens, **at, past_key_values=cache, use_cache=False).logits.float()
            there = torch.arange(tokens.shape[1])[None] < torch.tensor([len(p) for p in parts])[:, None]
            logprobs = logits[there.to(logits.device)].log_softmax(-1)
            drawn = torch.multinomial(logprobs.detach().exp().cpu(), 1, generator=generator).to(logits.device)
            gradients = torch.autograd.grad(logprobs.gather(1, drawn).sum(), [*keys[1:], *values[1:]])
        n = len(keys) - 1
        for fisher, g in zip(self.sums.fisher[1:], _rows(gradients[:n], gradients[n:], s), strict=True):
            fisher += g.T @ g
        self.sums.answers += int(there.sum())


def _add_products(total: Tensor, x: Tensor) -> None:
    """Add x'x of rows [m, D] to a total [D, D] float64; float32 multiplies what is left of the rows less their mean."""
    mean = x.mean(0)
    rest, products = x - mean, torch.outer(mean.double(), x.double().sum(0))
    total += (rest.T @ rest).double()
    total += products + products.T
    total -= len(x) * torch.outer(mean.double(), mean.double())


def _rows(keys: Sequence[Tensor], values: Sequence[Tensor], s: int) -> list[Tensor]:
    """Keys and values of the slots in each layer, [M, width] float32."""
    pairs = zip(keys, values, strict=True)
    return [torch.cat([part[0, :, s:].transpose(0, 1).flatten(1) for part in pair], 1).float().cpu() for pair in pairs]


def fit(calibration: Calibration, step: float, about: dict[str, str], bits: int = BITS) -> Coder:
    """The coder of what was seen, with sketches of so many bits, or of as many as the model's width allows."""
    sums, groups, samples = calibration.sums, [], []
    starts, sample = np.cumsum([0, *calibration.widths[1:]]), thinned(sums.sample, COUNTED)
    for number, layers in enumerate(calibration.groups):
        mean = sums.first[number] / sums.tokens
        covariance = sums.second[number].double() / sums.tokens - torch.outer(mean, mean)
        fisher = torch.stack([_regular(sums.fisher[i].double() / sums.answers) for i in layers])
        x = sample[:, starts[layers[0] - 1] : starts[layers[-1]]].float() - mean.float()
        group, z = _group(tuple(layers), mean, covariance, fisher, x, step)
        groups.append(group)
        samples.append((z / step).round())
    whole = torch.cat(samples, 1)
    if not whole.shape[1]:
        raise ValueError(f"no coefficient is as large as the step {step}: choose a smaller one. No text is read again.")
    return Coder(groups, step, tables_of(whole), sketch_of(sums, calibration.llm.retriever.layer_sketched, bits), about)


def thinned(rows: Tensor, most: int) -> Tensor:
    """At most so many of some rows, at equal distances."""
    return rows[:: max(1, -(-len(rows) // most))]


def sketch_of(sums: Sums, layer: int, bits: int = BITS) -> Sketch:
    """Sketches along the directions in which what is searched differs most."""
    mean = sums.direction / sums.tokens
    covariance = sums.directions.double() / sums.tokens - torch.outer(mean, mean)
    _, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)  # the smallest first
    basis = vectors.flip(1)[:, : min(bits, len(mean)) // 8 * 8].T
    scale = basis.abs().amax(1) / 127
    eight = (basis / scale[:, None]).round().to(torch.int8)
    rough = Sketch(layer, mean.float(), eight, scale.float(), torch.ones(len(eight)))
    sizes = ((sums.searched.float() - rough.mean) @ rough.directions).abs().mean(0)
    return replace(rough, sizes=sizes)


def _regular(fisher: Tensor) -> Tensor:
    """F with a part of its mean diagonal added, for keys and for values."""
    fisher, half = fisher.clone(), len(fisher) // 2
    for part in (slice(0, half), slice(half, None)):
        block = fisher[part, part]
        block += (REGULAR * block.diagonal().mean() + 1e-12) * torch.eye(len(block), dtype=block.dtype)
    return fisher


def _group(
    layers: tuple[int, ...], mean: Tensor, covariance: Tensor, fisher: Tensor, x: Tensor, step: float
) -> tuple[Group, Tensor]:
    """The transform of a group, and the coefficients of the sample x [m, D]."""
    factor = torch.block_diag(*(torch.linalg.cholesky(one).T for one in fisher))  # A, A'A = F
    spread = factor @ covariance @ factor.T
    _, directions = torch.linalg.eigh((spread + spread.T) / 2)
    directions = directions.flip(1)  # the largest first
    basis = torch.linalg.solve_triangular(factor, directions, upper=True).T  # [D, D] rows: x = z basis
    z = x.double() @ (directions.T @ factor).T
    coded = ((z / step).round() != 0).double().mean(0) > RARE
    basis, z = basis[coded], z[:, coded]
    scale = basis.abs().amax(1) / 127
    eight = (basis / scale[:, None]).round().to(torch.int8)
    group = Group(layers, mean.float(), eight, scale.float(), fisher.bfloat16().float())
    return group, x @ group.analysis


def tables_of(whole: Tensor) -> rans.Tables:
    """What is expected of whole coefficients [m, c]: coefficients of about the same mean size share a table.

    A table is what its coefficients were, smoothed by a Laplace distribution. What is rarer than `ESCAPE` escapes.
    """
    size = whole.abs().mean(0).clamp(min=1e-3)  # [c]
    kinds = ((size / size.min()).log() / (size.max() / size.min()).log().clamp(min=1e-6) * (KINDS - 1)).round().long()
    values = torch.arange(-LARGEST, LARGEST + 1)
    inside = whole.clamp(-ZERO, ZERO).long() + ZERO
    shares = torch.zeros(KINDS, LARGEST + ZERO + 1, dtype=torch.float64)
    for kind in range(KINDS):
        mine = kinds == kind
        mean = size[mine].mean() if mine.any() else size.min()
        laplace = (mean / (1 + mean)) ** values.abs()
        counts = inside[:, mine].flatten().bincount(minlength=2 * ZERO + 1)[1:-1]
        share = (counts + 200 * laplace / laplace.sum()) / (counts.sum() + 200)
        share = (share + share.flip(0)) / 2
        common = int((share[LARGEST:] > ESCAPE).sum())  # of 0, 1, 2 ...: so many have a symbol
        coded = values.abs() < max(1, common)
        shares[kind, 1:] = share.where(coded, 0)
        shares[kind, 0] = max(float(share[~coded].sum()), 1e-6)
    return rans.Tables(rans.whole_counts(shares.numpy()), kinds.numpy().astype(np.uint8))


Progress = Callable[[int, int], None]
