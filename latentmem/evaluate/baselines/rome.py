"""ROME: a rank-one edit of one linear layer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from latentmem.evaluate.baselines.editors import ENOUGH, PASS, last_of, prompt_ids
from latentmem.evaluate.baselines.tuning import Change, Weights, _Taken, added, ending
from latentmem.evaluate.data.edits import Edit
from latentmem.model.model import MemoryModel

RATE = 1.0  # of Adam
KL = 0.0625  # weight of the divergence for "<subject> is a"
DECAY = 1e-3  # weight of the vector's length, relative to that of what came out before


class RankOne(Weights):
    """ROME: the smallest change of one MLP's last weight that gives the subject's key a new value.

    Key: what goes into that layer at the subject's last token, mean over the prompt alone and behind a few other
    beginnings. Value: what comes out there, plus a vector that is found by Adam, so that the new answer is likely
    behind all of them and what is said of the subject in general changes little. See `rank_one` for the change.

    Args:
        articles: texts for the second moments of keys, and for the beginnings.
        layer: by default a quarter of the way up.
        tokens: of the articles, for the second moments.
        beginnings: how many, of 8 words each.
        steps: of Adam; it stops before where the answer is below 0.05 nats per token.
        clamp: the longest vector, relative to what came out before.

    Raises:
        ValueError: no linear layer, or several, that end an MLP; fewer tokens than a key has numbers.

    Source: Meng et al. 2022 (ROME), section 3.1; KL and clamp as in its released code, RATE and DECAY are ours.
    """

    def __init__(
        self,
        llm: MemoryModel,
        questions: bool,
        articles: Sequence[str],
        layer: int | None = None,
        tokens: int = 50_000,
        beginnings: int = 2,
        steps: int = 20,
        clamp: float = 4.0,
    ) -> None:
        super().__init__(llm, questions)
        self.layer = llm.decoder.L // 4 if layer is None else layer
        self.name, self.down = ending(llm, self.layer)
        self.articles, self.tokens, self.beginnings = articles, tokens, beginnings
        self.steps, self.clamp = steps, clamp

    def start(self, name: str) -> Change:
        _ = self.moments  # made once, before the first edit
        return {self.name: (self.zeros(self.down),)}

    def edit(self, state: Change, edit: Edit) -> Change:
        prompts = self._prompts(edit)
        key = self.key(edit)
        with added(self.llm, self.factors(state)):
            more = self.value(edit, prompts)
        change = state[self.name][0] + rank_one(self.moments, key, more)
        return {self.name: (change,)}

    def key(self, edit: Edit) -> Tensor:
        """k, [f]: what goes into the layer at the subject's last token, mean over beginnings."""
        keys = []
        for prompt in self._prompts(edit):
            ids, _ = self.ids(prompt, edit.rewrite.answer)
            keys.append(self._inputs(ids)[last_of(self.llm, ids, prompt, edit.subject)])
        return torch.stack(keys).mean(0)

    def value(self, edit: Edit, prompts: Sequence[str]) -> Tensor:
        """v - W k, [d]: what is added to what comes out of the layer, so that the new answer is likely."""
        rows, asked, places = self._rows(edit, prompts)
        _, answer = self.ids(edit.rewrite.prompt, edit.rewrite.answer)
        target = torch.tensor(answer, device=self.down.weight.device)
        more = torch.zeros(self.down.out_features, device=target.device, requires_grad=True)
        outputs: list[Tensor] = []  # what comes out at these places without the vector

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            each = range(len(places))
            if not outputs:
                outputs.append(output[each, places].detach().float())
            mask = torch.zeros(output.shape[:2], device=output.device)
            mask[each, places] = 1
            return (output.float() + mask[..., None] * more).to(output.dtype)

        optimizer, before = torch.optim.Adam([more], lr=RATE), None
        with self.down.register_forward_hook(hook), self.above(self.layer, rows):
            for _ in range(self.steps):
                with torch.enable_grad():
                    *predictions, said = self.logits(rows, asked)
                    wanted = torch.stack([cross_entropy(logits, target) for logits in predictions]).mean()
                    now = said[0].log_softmax(-1)
                    before = now.detach() if before is None else before
                    length = outputs[0][:-1].mean(0).norm()
                    held = kl_div(before, now, log_target=True, reduction="sum")
                    loss = wanted + KL * held + DECAY * more.norm() / length**2
                if wanted.item() < 5 * ENOUGH:
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    more.mul_(torch.clamp(self.clamp * length / more.norm(), max=1.0))
        return more.detach()

    def _rows(self, edit: Edit, prompts: Sequence[str]) -> tuple[list[list[int]], list[range], list[int]]:
        """Each prompt with the new answer, and last "subject is a": (ids, where is predicted, the subject's end)."""
        _, answer = self.ids(edit.rewrite.prompt, edit.rewrite.answer)
        rows, asked, places = [], [], []
        for prompt in prompts:
            ids, _ = self.ids(prompt, edit.rewrite.answer)
            rows.append([*ids, *answer[:-1]])
            asked.append(range(len(ids) - 1, len(rows[-1])))
            places.append(last_of(self.llm, ids, prompt, edit.subject))
        about = f"{edit.subject} is a"
        general = prompt_ids(self.llm, about, question=False, bare=False)
        rows.append(general)
        asked.append(range(len(general) - 1, len(general)))
        places.append(last_of(self.llm, general, about, edit.subject))
        return rows, asked, places

    @cached_property
    def moments(self) -> Tensor:
        """C, [f, f] in float64: the mean of k k^T over the articles' tokens."""
        prompts, count, f = self.llm.prompts_or_raise(), 0, self.down.in_features
        total, each = torch.zeros(f, f, dtype=torch.float64), -(-self.tokens // max(1, len(self.articles)))
        for article in self.articles:
            ids = prompts.text(article)[:each]
            for i in range(0, len(ids), PASS):
                keys = self._inputs([*prompts.opening, *ids[i : i + PASS]]).double().cpu()
                total += keys.T @ keys
                count += len(keys)
        if count < f:
            raise ValueError(
                f"the second moments of keys of {f} numbers need at least as many tokens, and the articles have "
                f"{count}; give more of them, or leave out the row rome."
            )
        return total / count

    def _prompts(self, edit: Edit) -> list[str]:
        """The prompt alone, and behind other beginnings."""
        beginnings = [" ".join(article.split()[:8]) for article in self.articles[: self.beginnings]]
        return [edit.rewrite.prompt, *(f"{beginning}. {edit.rewrite.prompt}" for beginning in beginnings)]

    @torch.no_grad()
    def _inputs(self, ids: Sequence[int]) -> Tensor:
        """What goes into the layer, [n, f] in float32; the layers behind it are not run."""
        taken: list[Tensor] = []

        def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            taken.append(inputs[0][0].float())
            raise _Taken

        with self.down.register_forward_pre_hook(take), contextlib.suppress(_Taken):
            self._pass([ids])
        return taken[0]


def rank_one(C: Tensor, k: Tensor, more: Tensor) -> Tensor:
    """The change D of a weight with D k = more that changes what comes out for other keys least.

    D = more (C^-1 k)^T / (k^T C^-1 k): of all D with D k = more the one with the least mean |D x|^2 over keys x.

    Args:
        C: second moments of keys, [f, f].
        k: the key, [f].
        more: what is to be added for it, [d].

    Returns:
        [d, f] in float32.

    Source: Meng et al. 2022 (ROME), equation 2.
    """
    direction = torch.linalg.solve(C.double(), k.to(C).double())
    share = direction / (direction @ k.to(C).double())
    return torch.outer(more.to(C).double(), share).float().to(more.device)
