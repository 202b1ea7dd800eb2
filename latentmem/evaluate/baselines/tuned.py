"""The plain model under fine-tuning, text after text: what a memory is compared with in an endless stream.

AdamW on float32 copies of the weights of all linear layers but the output's; embeddings and norms stay. The model's own
weights are lent for as long as a `with` lasts and are what they were, to the bit, when it ends.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from latentmem import container
from latentmem.model.model import MemoryModel

KEPT = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each weight, beside its number of steps


class Tuned:
    """A model's linear weights, fine-tuned: inside a `with` the model has them, outside its own.

    Args:
        llm: the model; without memory and adapters it is what is trained.
        lr: learning rate.
        steps: gradient steps on each text.

    Raises:
        ValueError: no linear layers, or weights that can not be trained.
    """

    def __init__(self, llm: MemoryModel, lr: float, steps: int) -> None:
        self.llm, self.lr, self.steps = llm, lr, steps
        out = llm.base.get_output_embeddings()
        self._weights = {
            f"{name}.weight": part.weight
            for name, part in llm.base.named_modules()
            if isinstance(part, nn.Linear) and "lora_" not in name and part is not out
        }
        if not self._weights or not all(w.is_floating_point() for w in self._weights.values()):
            raise ValueError(
                f"fine-tuning needs linear layers with floating-point weights, and {llm.name} has others: leave its "
                f"row out, or load the model without quantizing it."
            )
        self.masters = {
            name: w.detach().to(torch.float32, copy=True).requires_grad_() for name, w in self._weights.items()
        }
        self._optimizer = torch.optim.AdamW(list(self.masters.values()), lr=lr, weight_decay=0.0, fused=True)
        self._own: dict[str, Tensor] = {}

    def __enter__(self) -> Tuned:
        self._own = {name: w.detach().clone() for name, w in self._weights.items()}
        self._put(self.masters)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put(self._own)
        self._own = {}
        for w in self._weights.values():
            w.requires_grad_(False)
            w.grad = None

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, w in self._weights.items():
            w.copy_(values[name])

    def learn(self, ids: list[int]) -> float:
        """Take the gradient steps on one text and give its cross-entropy per token before them.

        Args:
            ids: the text, [n]; all of it is predicted, behind the token of the sink.
        """
        assert self._own, "only inside a `with`"
        losses = []
        tokens = torch.tensor([[self.llm.first_token, *ids]], device=self.llm.decoder.device)
        for _ in range(self.steps):
            for w in self._weights.values():
                w.requires_grad_()
            with torch.enable_grad(), self.llm.using(None):
                logits = self.llm.base(input_ids=tokens, use_cache=False).logits[0, :-1]
                loss = cross_entropy(logits.float(), tokens[0, 1:])
                loss.backward()
            for name, w in self._weights.items():
                assert w.grad is not None
                self.masters[name].grad = w.grad.float()
                w.grad = None
                w.requires_grad_(False)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._put(self.masters)
            losses.append(loss.item())
        return losses[0]

    def save(self, path: Path) -> None:
        """Write weights and optimizer to one file."""
        tensors = {f"weight.{name}": w.detach() for name, w in self.masters.items()}
        for name, w in self.masters.items():
            state = self._optimizer.state.get(w, {})
            tensors |= {f"{what}.{name}": state[what] for what in (*KEPT, "step") if what in state}
        container.write(path, tensors, {})

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        tensors, _ = container.read(path)
        for name, w in self.masters.items():
            with torch.no_grad():
                w.copy_(tensors[f"weight.{name}"])
            self._optimizer.state[w] = {
                what: tensors[f"{what}.{name}"].to(w.device) for what in (*KEPT, "step") if f"{what}.{name}" in tensors
            }
