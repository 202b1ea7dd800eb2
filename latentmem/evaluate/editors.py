"""Ways to change a fact that a model holds: a memory, text in the context, fine-tuning, LoRA, a rank-one edit (ROME).

Every way has the same verbs. `start` gives a state in which nothing is edited, `edit` the state after one more edit,
`reading` the context in which prompts are scored, `save` and `load` keep a state on disk. A state is a value, and the
model's own weights are never touched: what an edit adds to them is a tensor of its own in float32, which a linear
layer adds to what it gives while `reading` lasts. So an edit is undone to the bit by leaving it, and it is not rounded
away in a model that runs in bfloat16.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, linear

from latentmem.core.memory import Memory
from latentmem.evaluate.asking import in_context, written
from latentmem.evaluate.edits import Edit, EditSet, Probe
from latentmem.evaluate.passages import indexed, nearest, searcher
from latentmem.model import Context, MemoryModel

ENOUGH = 0.01  # nats per token: the loss at which fine-tuning stops before its last step, as in ROME's released code
PASS = 512  # tokens of text that go through the model at once
Change = dict[str, tuple[Tensor, ...]]  # linear layer, as "3.mlp.down_proj" -> factors of what is added to its weight


class Way(Protocol):
    """One way to edit; a state is whatever it needs."""

    def start(self, name: str) -> Any:
        """A state without edits; `name` seeds whatever is drawn."""

    def edit(self, state: Any, edit: Edit) -> Any:
        """The state after one more edit; the given one stays valid."""

    def reading(self, state: Any) -> AbstractContextManager[Context]:
        """The context in which prompts are scored, for as long as it lasts."""

    def save(self, state: Any, path: Path) -> None:
        """Keep a state in a file."""

    def load(self, path: Path) -> Any:
        """A state from a file."""


# --- prompts: the same ids for every way -----------------------------------------------------------------------------


def prompt_ids(llm: MemoryModel, prompt: str, *, question: bool, bare: bool) -> list[int]:
    """Ids of a question as the model is asked, or of the beginning of a sentence as it stands.

    Args:
        bare: something stands in front: a memory, or text with the opening.
    """
    prompts = llm.prompts_or_raise()
    if question:
        return prompts.question(prompt, bare=bare)
    return [*([] if bare else prompts.opening), *prompts.text(prompt)]


def answer_ids(llm: MemoryModel, prompt: str, answer: str, *, question: bool) -> list[int]:
    """Ids of an answer as it stands behind its prompt."""
    prompts = llm.prompts_or_raise()
    if question:
        return prompts.answer(prompt, answer)
    before, both = prompts.text(prompt), prompts.text(f"{prompt} {answer}")
    return both[len(before) :] if both[: len(before)] == before else prompts.text(f" {answer}")


def last_of(llm: MemoryModel, ids: Sequence[int], prompt: str, subject: str) -> int:
    """The place in `ids`, which hold the prompt, of the last token of the subject.

    Raises:
        ValueError: the prompt does not hold the subject, or its ids do not decode to it.
    """
    if subject not in prompt:
        raise ValueError(
            f"a rank-one edit needs the subject in the prompt: {subject!r} is not in {prompt!r}; leave out rome."
        )
    until = prompt[: prompt.index(subject) + len(subject)]
    for i in range(len(ids)):
        if until in llm.tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False):
            return i
    raise ValueError(
        f"the tokenizer of this model does not give {prompt!r} back, so its subject can not be found; leave out rome."
    )


# --- the plain model, and text in its context ------------------------------------------------------------------------


class Plain:
    """The plain model, which no edit changes."""

    def __init__(self, llm: MemoryModel) -> None:
        self.llm = llm

    def start(self, name: str) -> None:
        return None

    def edit(self, state: None, edit: Edit) -> None:
        return None

    def reading(self, state: None) -> AbstractContextManager[Context]:
        return contextlib.nullcontext(self.llm.plain([]))

    def save(self, state: None, path: Path) -> None:
        path.touch()

    def load(self, path: Path) -> None:
        return None


class InContext:
    """The sentence of an edit in the context of the plain model; a state is the text's token ids."""

    def __init__(self, llm: MemoryModel) -> None:
        self.llm = llm

    def text(self, edit: Edit) -> str:
        """What stands in front of a prompt."""
        return edit.sentence

    def start(self, name: str) -> tuple[int, ...]:
        return ()

    def edit(self, state: tuple[int, ...], edit: Edit) -> tuple[int, ...]:
        return (*state, *written(self.llm, self.text(edit)))

    def reading(self, state: tuple[int, ...]) -> AbstractContextManager[Context]:
        return contextlib.nullcontext(in_context(self.llm, state))

    def save(self, state: tuple[int, ...], path: Path) -> None:
        path.write_text(" ".join(map(str, state)), encoding="utf-8")

    def load(self, path: Path) -> tuple[int, ...]:
        return tuple(map(int, path.read_text(encoding="utf-8").split()))


class Demonstrations(InContext):
    """IKE: the sentence of an edit behind demonstrations of how a new fact is to be used.

    The demonstrations are made of those other records whose sentences BM25 finds nearest, the nearest last. Of eight of
    them one shows that the new fact's own prompt gets the new answer, three that another prompt for it does, and four
    that a prompt about something else keeps its answer. None holds a prompt that the edit is measured with. Behind them
    the new fact is shown once with its own prompt, and then said again, as in the released code.

    Args:
        data: the records.
        count: of demonstrations; fewer where there are not so many records.

    Raises:
        ValueError: bm25s is not installed.

    Source: Zheng et al. 2023 (IKE), section 3: 32 demonstrations, copied, updated and retained 1 : 3 : 4.
    """

    KINDS = ("copy", *["update"] * 3, *["retain"] * 4)

    def __init__(self, llm: MemoryModel, data: EditSet, count: int = 32) -> None:
        super().__init__(llm)
        self.data, self.count, self.bm25s = data, count, searcher("ike")

    def text(self, edit: Edit) -> str:
        asked = {probe.prompt for probe in edit.probes}
        shown: list[str] = []
        for i in self._nearest(edit):
            other, kind = self.data.edits[i], self.KINDS[len(shown) % len(self.KINDS)]
            probe = {"copy": other.rewrite, "update": other.rephrased[0], "retain": other.unrelated[0]}[kind]
            if other.id == edit.id or asked & {probe.prompt, other.rewrite.prompt}:
                continue
            shown.append(f"New Fact: {other.sentence}\n{probe.prompt} {probe.answer}\n\n")
            if len(shown) == self.count:
                break
        fact = f"New Fact: {edit.sentence}\n"
        return "".join([*reversed(shown), f"{fact}{edit.sentence}\n\n", fact])

    def _nearest(self, edit: Edit) -> list[int]:
        """Records by how near their sentences are, the nearest first: twice as many as are shown."""
        asked = self.bm25s.tokenize([edit.sentence], stopwords="en", show_progress=False)
        k = min(len(self.data.edits), 2 * self.count + 1)
        return [int(i) for i in self._index.retrieve(asked, k=k, show_progress=False).documents[0]]

    @cached_property
    def _index(self) -> Any:
        return indexed([edit.sentence for edit in self.data.edits])


class Retrieved:
    """The sentences of all edits, of which each prompt sees the one that BM25 finds; a state is the sentences.

    The newest of equals is taken, also where a prompt shares no word with any: behind one edit it is `InContext`.

    Raises:
        ValueError: bm25s is not installed.
    """

    def __init__(self, llm: MemoryModel) -> None:
        self.llm, self._index = llm, lru_cache(maxsize=1)(indexed)
        searcher()  # an error now, if it is not installed, and not after hours

    def start(self, name: str) -> tuple[str, ...]:
        return ()

    def edit(self, state: tuple[str, ...], edit: Edit) -> tuple[str, ...]:
        return (*state, edit.sentence)

    def parts(self, state: tuple[str, ...], probes: Sequence[Probe]) -> list[tuple[tuple[str, ...], Sequence[Probe]]]:
        """The states with nothing but the sentence that is found for a prompt, each with the probes that see it."""
        if len(state) < 2:
            return [(state, probes)]
        found: dict[tuple[str, ...], list[Probe]] = {}
        for probe, i in zip(probes, nearest(self._index(state), [probe.prompt for probe in probes]), strict=True):
            found.setdefault((state[i],), []).append(probe)
        return list(found.items())

    def reading(self, state: tuple[str, ...]) -> AbstractContextManager[Context]:
        return contextlib.nullcontext(in_context(self.llm, [i for text in state for i in written(self.llm, text)]))

    def save(self, state: tuple[str, ...], path: Path) -> None:
        path.write_text(json.dumps(state), encoding="utf-8")

    def load(self, path: Path) -> tuple[str, ...]:
        return tuple(json.loads(path.read_text(encoding="utf-8")))


# --- a memory --------------------------------------------------------------------------------------------------------


class Written:
    """The sentence of each edit is written into a memory; a state is the memory.

    Args:
        begin: gives the memory before all edits.
        seed: of the drops, together with the name that a state is started with.
    """

    def __init__(self, llm: MemoryModel, begin: Callable[[], Memory], seed: int = 0) -> None:
        self.llm, self.begin, self.seed = llm, begin, seed

    def start(self, name: str) -> Memory:
        return replace(self.begin(), seed=drawn(self.seed, name))

    def edit(self, state: Memory, edit: Edit) -> Memory:
        return self.llm.write_ids(state, written(self.llm, edit.sentence), edit.id)

    def reading(self, state: Memory) -> AbstractContextManager[Context]:
        return contextlib.nullcontext(self.llm.behind(state))

    def save(self, state: Memory, path: Path) -> None:
        state.save(path)

    def load(self, path: Path) -> Memory:
        return Memory.load(path)


class Unwritten(Written):
    """The memory as it is before all edits: what the memory and its adapters change without the fact."""

    def edit(self, state: Memory, edit: Edit) -> Memory:
        return state


# --- changes of weights ----------------------------------------------------------------------------------------------


def linears(llm: MemoryModel, part: str) -> dict[str, nn.Linear]:
    """The linear layers of a part of the decoder, such as "3.mlp", without those of adapters, by their names.

    Raises:
        ValueError: there are none.
    """
    inside = llm.decoder.layers.get_submodule(part)
    found = {n: m for n, m in inside.named_modules(prefix=part) if isinstance(m, nn.Linear) and ".lora_" not in n}
    if not found:
        raise ValueError(
            f"{part} of {llm.name or 'this model'} has no plain linear layers whose weights could be edited; leave out "
            f"the rows ft, ft-l, lora and rome."
        )
    return found


def ending(llm: MemoryModel, layer: int) -> tuple[str, nn.Linear]:
    """The linear layer that ends a layer's MLP, and its name.

    Raises:
        ValueError: there is none, or several could be it.
    """
    found = {n: m for n, m in linears(llm, f"{layer}.mlp").items() if m.out_features == llm.decoder.d}
    if len(found) != 1:
        raise ValueError(
            f"one linear layer was expected to end the MLP of layer {layer}, and {len(found)} give {llm.decoder.d} "
            f"numbers; leave out the rows ft, ft-l and rome."
        )
    return next(iter(found.items()))


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


class Weights:
    """What the ways that change weights have in common; a state is a `Change`.

    Args:
        questions: whether prompts are questions.
    """

    def __init__(self, llm: MemoryModel, questions: bool) -> None:
        self.llm, self.questions = llm, questions

    @contextlib.contextmanager
    def reading(self, state: Change) -> Iterator[Context]:
        with added(self.llm, self.factors(state)):
            yield self.llm.plain([])

    def factors(self, state: Change) -> Change:
        """What is added to the weights."""
        return state

    def save(self, state: Change, path: Path) -> None:
        from safetensors.torch import save_file

        temporary = path.with_name(f".{path.name}.new")
        save_file({f"{name}/{i}": t for name, factors in state.items() for i, t in enumerate(factors)}, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> Change:
        from safetensors.torch import load_file

        found: Change = {}
        for name, factor in sorted(load_file(path, str(self.llm.decoder.device)).items()):
            layer = name.rpartition("/")[0]
            found[layer] = (*found.get(layer, ()), factor)
        return found

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
        return [self.llm.decoder.logits(row[list(some)]).float() for row, some in zip(hidden, places, strict=True)]

    def _pass(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """What the decoder's body gives for rows, which are padded at their ends, where they do not look."""
        device = self.llm.decoder.device
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
        with self.llm.using(None):
            found = self.llm.decoder.body(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        hidden: Tensor = found.last_hidden_state
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
        made = {name: tuple(t.clone().requires_grad_() for t in factors) for name, factors in state.items()}
        params = [t for factors in made.values() for t in factors]
        optimizer = torch.optim.Adam(params, lr=self.rate, fused=True)  # one pass over millions of weights, not eight
        prompt, answer = self.ids(edit.rewrite.prompt, edit.rewrite.answer)
        row, places = [*prompt, *answer[:-1]], range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        with self.above(min(int(name.partition(".")[0]) for name in made), [row]):
            for _ in range(self.steps):
                with torch.enable_grad(), added(self.llm, self.factors(made)):
                    logits = self.logits([row], [places])[0]
                    loss = cross_entropy(logits, torch.tensor(answer, device=logits.device))
                if loss.item() < ENOUGH:
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.bounded(state, made)
        return {name: tuple(t.detach() for t in factors) for name, factors in made.items()}

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
        generator = torch.Generator().manual_seed(drawn(0, name))
        made: Change = {}
        for i in range(self.llm.decoder.L):
            for layer, m in linears(self.llm, f"{i}.self_attn").items():
                A = torch.empty(self.rank, m.in_features)
                nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
                A, B = A.to(m.weight.device), torch.zeros(m.out_features, self.rank, device=m.weight.device)
                made[layer] = (A, B)
        return made

    def factors(self, state: Change) -> Change:
        return {name: (A, self.scale * B) for name, (A, B) in state.items()}


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
        steps, rate: of Adam; it stops before where the answer is below 0.05 nats per token.
        kl: weight of the divergence for "<subject> is a".
        decay: weight of the vector's length, relative to that of what came out before.
        clamp: the longest vector, relative to the same.

    Raises:
        ValueError: no linear layer, or several, that end an MLP; fewer tokens than a key has numbers.

    Source: Meng et al. 2022 (ROME), section 3.1; kl and clamp as in its released code, rate and decay are ours.
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
        rate: float = 1.0,
        kl: float = 0.0625,
        decay: float = 1e-3,
        clamp: float = 4.0,
    ) -> None:
        super().__init__(llm, questions)
        self.layer = llm.decoder.L // 4 if layer is None else layer
        self.name, self.down = ending(llm, self.layer)
        self.articles, self.tokens, self.beginnings = articles, tokens, beginnings
        self.steps, self.rate, self.kl, self.decay, self.clamp = steps, rate, kl, decay, clamp

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
        _, answer = self.ids(edit.rewrite.prompt, edit.rewrite.answer)
        rows, asked, places = [], [], []
        for prompt in prompts:
            ids, _ = self.ids(prompt, edit.rewrite.answer)
            rows.append([*ids, *answer[:-1]])
            asked.append(range(len(ids) - 1, len(rows[-1])))
            places.append(last_of(self.llm, ids, prompt, edit.subject))
        about = f"{edit.subject} is a"
        general = prompt_ids(self.llm, about, question=False, bare=False)
        target = torch.tensor(answer, device=self.down.weight.device)
        places.append(last_of(self.llm, general, about, edit.subject))
        more = torch.zeros(self.down.out_features, device=target.device, requires_grad=True)
        found: list[Tensor] = []  # what comes out at these places without the vector

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            each = range(len(places))
            if not found:
                found.append(output[each, places].detach().float())
            mask = torch.zeros(output.shape[:2], device=output.device)
            mask[each, places] = 1
            return (output.float() + mask[..., None] * more).to(output.dtype)

        optimizer, before = torch.optim.Adam([more], lr=self.rate), None
        rows.append(general)
        asked.append(range(len(general) - 1, len(general)))
        with self.down.register_forward_hook(hook), self.above(self.layer, rows):
            for _ in range(self.steps):
                with torch.enable_grad():
                    *says, said = self.logits(rows, asked)
                    wanted = torch.stack([cross_entropy(logits, target) for logits in says]).mean()
                    now = said[0].log_softmax(-1)
                    before = now.detach() if before is None else before
                    length = found[0][:-1].mean(0).norm()
                    held = kl_div(before, now, log_target=True, reduction="sum")
                    loss = wanted + self.kl * held + self.decay * more.norm() / length**2
                if wanted.item() < 5 * ENOUGH:
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    more.mul_(torch.clamp(self.clamp * length / more.norm(), max=1.0))
        return more.detach()

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
        some = [" ".join(article.split()[:8]) for article in self.articles[: self.beginnings]]
        return [edit.rewrite.prompt, *(f"{beginning}. {edit.rewrite.prompt}" for beginning in some)]

    @torch.no_grad()
    def _inputs(self, ids: Sequence[int]) -> Tensor:
        """What goes into the layer, [n, f] in float32; the layers behind it are not run."""
        found: list[Tensor] = []

        def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0][0].float())
            raise _Taken

        with self.down.register_forward_pre_hook(take), contextlib.suppress(_Taken):
            self._pass([ids])
        return found[0]


class _Taken(Exception):  # noqa: N818 - no error
    """Ends a pass once the layer's input was seen."""


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


def drawn(seed: int, name: str) -> int:
    """A seed for one state, from the seed of the run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
