"""Fine-tuning as an editor: one layer, all layers, or LoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from latentmem import container
from latentmem.evaluate.asking import seed_of
from latentmem.evaluate.baselines.editors import ENOUGH, Editor, answer_ids, prompt_ids
from latentmem.evaluate.data.edits import Edit
from latentmem.model.context import Context
from latentmem.model.model import MemoryModel

Change = dict[str, tuple[Tensor, ...]]  # linear layer, as "3.mlp.down_proj" -> factors of what is added to its weight


# --- changes of weights ----------------------------------------------------------------------------------------------


def linears(llm: MemoryModel, part: str) -> dict[str, nn.Linear]:
    """The linear layers of a part of the decoder, such as "3.mlp", without those of adapters, by their names.

    Raises:
        ValueError: there are none.
    """
    inside = llm.decoder.layers.get_submodule(part)
    layers = {n: m for n, m in inside.named_modules(prefix=part) if isinstance(m, nn.Linear) and ".lora_" not in n}
    if not layers:
        raise ValueError(
            f"{part} of {llm.name or 'this model'} has no plain linear layers whose weights could be edited; leave out "
            f"the rows ft, ft-l, lora and rome."
        )
    return layers


def ending(llm: MemoryModel, layer: int) -> tuple[str, nn.Linear]:
    """The linear layer that ends a layer's MLP, and its name.

    Raises:
        ValueError: there is none, or several could be it.
    """
    layers = {n: m for n, m in linears(llm, f"{layer}.mlp").items() if m.out_features == llm.decoder.d}
    if len(layers) != 1:
        raise ValueError(
            f"one linear layer was expected to end the MLP of layer {layer}, and {len(layers)} give {llm.decoder.d} "
            f"numbers; leave out the rows ft, ft-l and rome."
        )
    return next(iter(layers.items()))


@contextlib.contextmanager
def added(llm: MemoryModel, change: Mapping[str, tuple[Tensor, ...]]) -> Iterator[None]:
    """While it lasts each linear layer W of `change` works as W + the product of its factors, in float32.

    Args:
        change: factors, the one that the input meets first in front: (D [out, in],), or (A [r, in], B [out, r]).
    """
    hooks = []
    try:
        for name, factors in change.items():
            hooks.append(llm.decoder.layers.get_submodule(name).register_forward_hook(partial(_add, factors)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(factors: tuple[Tensor, ...], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = inputs[0].float()
    for factor in factors:
        x = linear(x, factor)
    return (output.float() + x).to(output.dtype)


class Weights(Editor):
    """What the ways that change weights have in common; a state is a `Change`.

    Args:
        questions: whether prompts are questions.
    """

    def __init__(self, llm: MemoryModel, questions: bool) -> None:
        super().__init__(llm)
        self.questions = questions

    @contextlib.contextmanager
    def reading(self, state: Change) -> Iterator[Context]:
        with added(self.llm, self.factors(state)):
            yield self.llm.text_context([])

    def factors(self, state: Change) -> Change:
        """What is added to the weights."""
        return state

    def save(self, state: Change, path: Path) -> None:
        container.write(path, {f"{name}/{i}": t for name, factors in state.items() for i, t in enumerate(factors)}, {})

    def load(self, path: Path) -> Change:
        change: Change = {}
        for name, factor in sorted(container.read(path)[0].items()):
            layer = name.rpartition("/")[0]
            change[layer] = (*change.get(layer, ()), factor.to(self.llm.decoder.device))
        return change

    def zeros(self, layer: nn.Linear) -> Tensor:
        """A change of a layer's weight that changes nothing, [out, in]."""
        return torch.zeros(layer.weight.shape, device=layer.weight.device)

    def ids(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt for the plain model, and of its answer."""
        ids = prompt_ids(self.llm, prompt, question=self.questions, bare=False)
        return ids, answer_ids(self.llm, prompt, answer, question=self.questions)

    def logits(self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits of the plain model at these places of each row, [places, vocab] in float32."""
        hidden = self._pass(rows)
        return [self.llm.decoder.logits(row[list(chosen)]).float() for row, chosen in zip(hidden, places, strict=True)]

    def _pass(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """What the decoder's body gives for rows, which are padded at their ends, where they do not look."""
        device = self.llm.decoder.device
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
        with self.llm.using(None):
            output = self.llm.decoder.body(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @contextlib.contextmanager
    def above(self, i: int, rows: Sequence[Sequence[int]]) -> Iterator[None]:
        """While it lasts passes of these rows begin at layer i: the layers below, which nothing changes, are run once.

        What a pass gives is the same to the bit.
        """
        below, taken = self.llm.decoder.layers[:i], []

        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            taken.append(output)
            raise _Taken

        if i:
            with torch.no_grad(), below[-1].register_forward_hook(take), contextlib.suppress(_Taken):
                self._pass(rows)
        try:
            for layer in below:
                layer.forward = lambda *_, **__: taken[0]
            yield
        finally:
            for layer in below:
                layer.__dict__.pop("forward", None)


class Trained(Weights):
    """Adam on the negative log-likelihood of the new answer behind its prompt, anew for every edit.

    Args:
        steps, rate: of Adam; it stops before where the loss is below 0.01 nats per token.
    """

    def __init__(self, llm: MemoryModel, questions: bool, steps: int, rate: float) -> None:
        super().__init__(llm, questions)
        self.steps, self.rate = steps, rate

    def edit(self, state: Change, edit: Edit) -> Change:
        trained = {name: tuple(t.clone().requires_grad_() for t in factors) for name, factors in state.items()}
        params = [t for factors in trained.values() for t in factors]
        optimizer = torch.optim.Adam(params, lr=self.rate, fused=True)  # one pass over millions of weights, not eight
        prompt, answer = self.ids(edit.rewrite.prompt, edit.rewrite.answer)
        row, places = [*prompt, *answer[:-1]], range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        with self.above(min(int(name.partition(".")[0]) for name in trained), [row]):
            for _ in range(self.steps):
                with torch.enable_grad(), added(self.llm, self.factors(trained)):
                    logits = self.logits([row], [places])[0]
                    loss = cross_entropy(logits, torch.tensor(answer, device=logits.device))
                if loss.item() < ENOUGH:
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.bounded(state, trained)
        return {name: tuple(t.detach() for t in factors) for name, factors in trained.items()}

    def bounded(self, before: Change, after: Change) -> None:
        """What is done to a change after each step, in place."""


class FineTuned(Trained):
    """Fine-tuning of the last weight of the last layers' MLPs, free (FT) or within a bound (FT-L).

    Args:
        layers: how many, from the last one on.
        bound: by which no weight may differ from what it was before the edit; None: there is no bound.

    Source: MemoryLLM table 1 and its settings, `down_proj` of the last layer or the last two; Zhu et al. 2020 for the
    bound.
    """

    def __init__(
        self,
        llm: MemoryModel,
        questions: bool,
        layers: int = 1,
        bound: float | None = None,
        steps: int = 25,
        rate: float = 5e-4,
    ) -> None:
        super().__init__(llm, questions, steps, rate)
        self.layers, self.bound = layers, bound

    def start(self, name: str) -> Change:
        last = range(self.llm.decoder.L)[-self.layers :]
        return {name: (self.zeros(m),) for name, m in (ending(self.llm, i) for i in last)}

    @torch.no_grad()
    def bounded(self, before: Change, after: Change) -> None:
        if self.bound is None:
            return
        for name, (change,) in after.items():
            start = before[name][0]
            change.copy_((change - start).clamp(-self.bound, self.bound) + start)


class LowRank(Trained):
    """A LoRA adapter on the attention of all layers: W + alpha / r B A, as PEFT makes and begins it.

    Args:
        rank: r.
        alpha: the scale is alpha / r.

    Source: Hu et al. 2021.
    """

    def __init__(
        self,
        llm: MemoryModel,
        questions: bool,
        rank: int = 8,
        alpha: float = 16,
        steps: int = 25,
        rate: float = 5e-4,
    ) -> None:
        super().__init__(llm, questions, steps, rate)
        self.rank, self.scale = rank, alpha / rank

    def start(self, name: str) -> Change:
        generator = torch.Generator().manual_seed(seed_of(f"0/{name}"))
        change: Change = {}
        for i in range(self.llm.decoder.L):
            for layer, m in linears(self.llm, f"{i}.self_attn").items():
                A = torch.empty(self.rank, m.in_features)
                nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
                A, B = A.to(m.weight.device), torch.zeros(m.out_features, self.rank, device=m.weight.device)
                change[layer] = (A, B)
        return change

    def factors(self, state: Change) -> Change:
        return {name: (A, self.scale * B) for name, (A, B) in state.items()}


class _Taken(Exception):  # noqa: N818 - no error
    """Ends a pass once the layer's input was seen."""
