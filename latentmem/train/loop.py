"""The steps of a run, on one process or many: checkpoints, logs, the live curve; what was lost to a kill is done again.

A folder holds one run:

    config.json            what is trained, and who trained when with which versions
    log.jsonl              one line per step: loss, accuracy, tokens, seconds, names of the texts; points of the curve
    checkpoint-STEP/       adapters, optimizer and pool after that many steps; only the newest is kept
    adapters.safetensors   the result
    curves.png             loss, accuracy and the live curve
    tensorboard/           the same numbers for tensorboard
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from latentmem.core import memory as memories
from latentmem.core.memory import Memory
from latentmem.core.presets import PRESETS
from latentmem.core.settings import MemorySettings
from latentmem.decoder import adapters as pairs
from latentmem.decoder.adapters import READ
from latentmem.decoder.hooks import HOOKS_STAY, checkpoint_layers
from latentmem.files import adapters as files
from latentmem.loading import load as loading
from latentmem.model.model import MemoryModel
from latentmem.train import plots
from latentmem.train.config import OBJECTIVES, UNASKED, Config, MemoryShape, RetrieverShape
from latentmem.train.data import Apart, Documents
from latentmem.train.episodes import Episode, Episodes
from latentmem.train.learner import BIRTH, Learner, Outcome, remember
from latentmem.train.log import Log
from latentmem.train.probe import Probe
from latentmem.train.retriever import Retriever

Progress = Callable[[int, int, dict[str, Any]], None]  # (steps done, steps in all, the step's numbers)
RESULT = "adapters.safetensors"
SMALL = 0.1  # nats per token: no smaller loss is what a spike is measured by


class Run:
    """One process of a training run.

    Args:
        config: what is trained.
        out: the folder of the run; one that holds the same run is gone on with.

    Raises:
        ValueError: the folder holds another run or is in use, data or model can not be read.
    """

    def __init__(self, config: Config, out: Path) -> None:
        self.config, self.out = config, out
        parallel = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        cpu = not torch.cuda.is_available()
        self.accelerator = Accelerator(cpu=cpu, kwargs_handlers=parallel, mixed_precision="no")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.llm = begin(config, self.accelerator.device)
        self.origin = self.llm.adapters.identity if config.adapters and self.llm.adapters else ""
        self.sources = [Documents(s, config.seed + i, config.watch.titles) for i, s in enumerate(config.data)]
        prompts, apart = self.llm.prompts_or_raise(), Apart(config.apart)
        self.episodes = Episodes(config, prompts, self.sources, apart, self.world)
        self.learner = learner_of(config, self.llm)
        self.fixed = _fixed(self.learner)
        if config.checkpointing:
            recompute(self.learner)
        self.sharded = config.sharding == "fsdp2" and self.world > 1
        self.model: nn.Module = self._spread()
        self.parameters = {name: p for name, p in self.learner.named_parameters() if p.requires_grad}
        s = config.steps
        finds = [p for name, p in self.parameters.items() if name.startswith(pairs.RETRIEVER)]
        reads = [p for name, p in self.parameters.items() if f".{READ}." in name]
        writes = [
            p for name, p in self.parameters.items() if f".{READ}." not in name and not name.startswith(pairs.RETRIEVER)
        ]
        shares = ((reads, 1.0), (writes, s.write), (finds, config.retriever.lr / s.lr))
        self.groups = [(some, share) for some, share in shares if some]
        self.optimizer = torch.optim.AdamW(
            [{"params": some} for some, _ in self.groups],  # each has its share of the rate
            lr=s.lr,
            betas=(s.betas[0], s.betas[1]),
            weight_decay=s.weight_decay,
        )
        self.pool = _empty_pool(config, self.llm)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.means: dict[str, list[float]] = {}  # objective -> steps that had it, running mean of its loss
        self.probe = (
            Probe(config, self.llm, self.learner, self.sources) if config.watch.probe and not self.rank else None
        )

    def _spread(self) -> nn.Module:
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for layer in self.llm.decoder.layers:
                fully_shard(layer)
            sharded: Any = fully_shard(self.learner)
            return sharded
        return self.accelerator.prepare_model(self.learner) if self.world > 1 else self.learner

    # --- steps ------------------------------------------------------------------------------------------------------

    def train(self, progress: Progress | None = None, stop: int | None = None) -> None:
        """Go on from the newest checkpoint to the last step, and write the result.

        Args:
            progress: called after each step.
            stop: end after so many steps in all, with a checkpoint.

        Raises:
            ValueError: a loss that is not finite or far too high, with the texts of its batch; a full disk.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.out / ".lock") if self.rank == 0 else None
        try:
            if lock:
                lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process trains in {self.out}; wait for it, or choose another folder.") from None
        try:
            self._train(progress, self.config.steps.total if stop is None else min(stop, self.config.steps.total))
        finally:
            if lock:
                lock.release()

    def _train(self, progress: Progress | None, last: int) -> None:
        total = self.config.steps.total
        if self.rank == 0:
            _claim(self.out, self.config)
        self.accelerator.wait_for_everyone()
        self._resume()
        with Log(self.out, self.step, self.config.watch.tensorboard) if self.rank == 0 else nullcontext() as log:
            if self.step == 0 and self.probe and log:
                log.add({"step": 0, "curve": self.probe.run()})
            while self.step < last:
                if self.config.began(self.step) == self.step:
                    self._begin()
                row = self._one_step()
                if log:
                    log.add(row)
                if progress and self.rank == 0:
                    progress(self.step, total, row)
                every = self.config.watch.probe
                if every and (self.step % every == 0 or self.step == total):
                    if self.probe and log:
                        log.add({"step": self.step, "curve": self.probe.run()})
                    self.accelerator.wait_for_everyone()
                if self.step % self.config.watch.checkpoint == 0 or self.step == last:
                    self._checkpoint()
        if self.step == total:
            self._export()

    def _numbers(self, step: int) -> list[int]:
        """Numbers of the episodes that this process does in a step."""
        each = self.config.steps.episodes
        return [(step * self.world + self.rank) * each + i for i in range(each)]

    def _one_step(self) -> dict[str, Any]:
        start = time.perf_counter()
        episodes = [self.episodes[number] for number in self._numbers(self.step)]
        outcomes: list[Outcome] = []
        for i, episode in enumerate(episodes):
            wait = i + 1 < len(episodes) and not self.sharded
            torch.manual_seed(episode.seed)  # of dropout
            with self.accelerator.no_sync(self.model) if wait else nullcontext():
                outcome: Outcome = self.model(episode, self.pool, self._passes(episode))
                factor = self.config.steps.unrelated if episode.objective in UNASKED else 1.0
                (factor * outcome.loss / len(episodes)).backward()
            outcomes.append(outcome)
            self._remember(outcome)
        losses = [float(outcome.loss.detach()) for outcome in outcomes]
        mine = [sum(losses) / len(losses), sum(o.accuracy for o in outcomes) / len(losses), self._clip()]
        mine.append(sum(episode.written + episode.read for episode in episodes))
        for name in OBJECTIVES:
            some = [x for episode, x in zip(episodes, losses, strict=True) if episode.objective == name]
            mine += [sum(some), len(some)]
        searched = [outcome for outcome in outcomes if outcome.search is not None]
        mine += [sum(o.search or 0.0 for o in searched), sum(o.found for o in searched), len(searched)]
        loss, accuracy, norm, mean, *parts, search, found, searches = self._everywhere(*mine)
        each = {name: x / n for name, x, n in zip(OBJECTIVES, parts[::2], parts[1::2], strict=True) if n}
        self._check(loss, norm, each, episodes)
        for group, (_, share) in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = share * rate(self.config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        tokens = round(mean * self.world)
        took = time.perf_counter() - start
        self.seconds, self.tokens = self.seconds + took, self.tokens + tokens
        return {
            "step": self.step,
            "loss": round(loss, 5),
            "accuracy": round(accuracy, 4),
            **({"retriever": round(search / searches, 5), "found": round(found / searches, 4)} if searches else {}),
            "norm": round(norm, 4),
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens": tokens,
            "seconds": round(took, 3),
            "objectives": [episode.objective for episode in episodes],
            "texts": [name for episode in episodes for name in episode.names],
        }

    def _passes(self, episode: Episode) -> list[int]:
        """`Learner.passes` that every process has to make: where weights are sharded as many as any of them needs."""
        passes = torch.tensor(self.learner.passes(episode), device=self.accelerator.device)
        if self.sharded:
            torch.distributed.all_reduce(passes, torch.distributed.ReduceOp.MAX)
        return passes.tolist()

    def _remember(self, outcome: Outcome) -> None:
        for slots in outcome.new_slots:
            self.pool = remember(self.pool, slots)

    def _clip(self) -> float:
        """Cut the gradients of the adapters, and those of the retriever; the norm of all before."""
        norms = []
        for finds in (False, True):
            some = [p for name, p in self.parameters.items() if name.startswith(pairs.RETRIEVER) == finds]
            norm: Any = nn.utils.clip_grad_norm_(some, self.config.steps.clip)
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        return math.hypot(*norms)

    def _everywhere(self, *mine: float) -> list[float]:
        """The means of numbers over all processes."""
        numbers = torch.tensor(mine, device=self.accelerator.device, dtype=torch.float64)
        if self.world > 1:
            numbers = self.accelerator.reduce(numbers, "mean")
        return numbers.tolist()

    def _check(self, loss: float, norm: float, each: dict[str, float], episodes: list[Episode]) -> None:
        """Refuse a step whose loss makes no sense, by the running mean of its own objective: they differ tenfold."""
        s = self.config.steps
        known = {name: mean for name, (steps, mean) in self.means.items() if steps >= s.patience}
        high = any(value > s.spike * max(SMALL, known.get(name, math.inf)) for name, value in each.items())
        if not math.isfinite(loss) or not math.isfinite(norm) or high:
            names = ", ".join(name for episode in episodes for name in episode.names)
            kinds = ", ".join(episode.objective for episode in episodes)
            before = ", ".join(f"{self.means[name][1]:.4g}" for name in each if name in self.means) or "none"
            raise ValueError(
                f"step {self.step + 1}: the loss is {loss:.4g} (so far about {before}) and the gradient's norm "
                f"{norm:.4g}, in the objective {kinds} with the texts {names}. The step was not taken; the newest "
                f"checkpoint is in {self.out}. Look at these texts, or lower steps.lr."
            )
        for name, value in each.items():
            steps, mean = self.means.get(name, (0, value))
            self.means[name] = [steps + 1, 0.95 * mean + 0.05 * value]

    def _begin(self) -> None:
        """A new pool; if it is to be full from birth, texts of the data are written into it, without gradient."""
        self.pool = _empty_pool(self.config, self.llm)
        number = -1
        while self.config.memory.birth == "full" and self._everywhere(self.pool.M < self.pool.N)[0] > 0:
            number += 1
            episode = self.episodes[number * self.world + self.rank]
            torch.manual_seed(episode.seed)  # of dropout
            with torch.no_grad():
                self._remember(self.model(dataclasses.replace(episode, fill=1.0), self.pool, self._passes(episode)))

    # --- on disk ----------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        """Everything that the next step needs, all or nothing."""
        folder, temporary = self.out / f"checkpoint-{self.step}", self.out / f".checkpoint-{self.step}"
        tensors = self._gather()
        with self._room(f"the checkpoint of step {self.step}"):
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                save_file(tensors, temporary / "state.safetensors")
                facts = {"step": self.step, "means": self.means, "seconds": self.seconds, "tokens": self.tokens}
                (temporary / "state.json").write_text(json.dumps({**facts, "world": self.world}))
            self.accelerator.wait_for_everyone()
            self.pool.save(temporary / f"pool-{self.rank}.safetensors")
            self.accelerator.wait_for_everyone()
            if self.rank == 0:
                for file in temporary.iterdir():
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
                for old in self.out.glob("checkpoint-*"):
                    if old != folder:
                        shutil.rmtree(old)

    @contextmanager
    def _room(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:  # the library does not say a full disk's number
            raise ValueError(
                f"{what} could not be written to {self.out}: {getattr(error, 'strerror', None) or error}. "
                f"The checkpoint before it is still there: make room, and give the same command."
            ) from None

    def _gather(self) -> dict[str, Tensor]:
        """Trained weights and the optimizer's state, whole, on rank 0; nothing on the others."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=self.world > 1, ignore_frozen_params=True)
        model: Any = get_model_state_dict(self.learner, options=options)
        optimizer: Any = get_optimizer_state_dict(self.learner, self.optimizer, options=options)
        if self.rank:
            return {}
        found = {f"model.{name}": tensor for name, tensor in model.items() if name in self.parameters}
        for name, state in optimizer["state"].items():
            if not state["step"]:
                continue  # never had a gradient, such as the write adapter of a last layer whose output is no slot
            found |= {f"optimizer.{key}.{name}": torch.as_tensor(value) for key, value in state.items()}
        return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}

    def _resume(self) -> None:
        newest = _newest(self.out)
        if newest is None:
            return
        facts = self._intact(newest / "state.json", lambda file: json.loads(file.read_text()))
        if facts["world"] != self.world:
            raise ValueError(
                f"{self.out} was trained by {facts['world']} processes, and these are {self.world}: the order of the "
                f"texts would change. Start as many, or begin in another folder."
            )
        tensors: dict[str, Tensor] = self._intact(newest / "state.safetensors", load_file)
        pool: Memory = self._intact(newest / f"pool-{self.rank}.safetensors", Memory.load)
        options = StateDictOptions(full_state_dict=True, strict=False, ignore_frozen_params=True)
        weights: Any = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        set_model_state_dict(self.learner, weights, options=options)
        state: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                key, parameter = name.removeprefix("optimizer.").split(".", 1)
                state.setdefault(parameter, {})[key] = tensor
        groups: Any = get_optimizer_state_dict(self.learner, self.optimizer, options=options)["param_groups"]
        whole: Any = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(self.learner, self.optimizer, whole, options=options)
        for name, weight in self.parameters.items():
            if name not in state:
                self.optimizer.state.pop(weight, None)  # torch has made one up
        self.step, self.means = facts["step"], facts.get("means", {})
        self.seconds, self.tokens = facts["seconds"], facts["tokens"]
        self.pool = dataclasses.replace(pool, slots=pool.slots.to(self.accelerator.device), version="", parent="")

    def _intact(self, file: Path, read: Callable[[Path], Any]) -> Any:
        try:
            return read(file)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{file} is damaged, and the run can not go on from it ({error}). Restore it from a copy, or remove "
                f"{self.out} and begin anew."
            ) from None

    def _export(self) -> None:
        """The adapters in bfloat16, with what belongs to them."""
        tensors = self._gather()
        if self.rank == 0:
            with self._room("the result"):
                more = {"from": self.origin, "steps": self.step, "tokens": self.tokens}
                result(self.out / RESULT, self.config, self.llm, {**self.fixed, **tensors}, more)
            plots.draw({self.out.name: self.out}, self.out / "curves.png")


def rehearse(config: Config, episodes: int = 3) -> dict[str, Any]:
    """What a run would be, by counting and by doing a few episodes behind a full pool; nothing is learned or written.

    Returns:
        documents and questions of each source, trained weights, steps, tokens, seconds and bytes, by expectation.

    Raises:
        ValueError: as `Run`; the live curve has nothing to ask.
    """
    run, s = Run(config, Path()), config.steps
    some = [run.episodes[number] for number in range(min(100, s.total * s.episodes * run.world))]
    tokens = sum(episode.written + episode.read for episode in some) / len(some)
    pool, took = run.pool, []
    while pool.M < pool.N:
        pool = remember(pool, torch.randn(pool.L, min(pool.K, pool.N), pool.d, device=pool.slots.device))
    for episode in some[:episodes]:
        start = time.perf_counter()
        run.learner(dataclasses.replace(episode, fill=1.0), pool).loss.backward()
        took.append(time.perf_counter() - start)
    trained = sum(p.numel() for p in run.parameters.values())
    states = 2 * 4 * trained // (run.world if run.sharded else 1)  # of AdamW, float32, made by the first step
    return {
        "sources": [(d.source.path, d.source.kind, len(d), sum(len(x.questions) for x in d.all)) for d in run.sources],
        "trained": trained,
        "frozen": sum(p.numel() for p in run.learner.parameters()) - trained,
        "steps": s.total,
        "tokens": round(tokens * s.total * s.episodes * run.world),
        "seconds": min(took) * s.total * s.episodes,  # the first one is slower
        "bytes": _peak() + states,
    }


def _peak() -> int:
    """The most memory that this process held so far, in bytes: of the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def result(path: Path, config: Config, llm: MemoryModel, tensors: dict[str, Tensor], more: dict[str, Any]) -> None:
    """Write trained adapters, from a run's state."""
    m = config.memory  # an update in use is as long as the longest in training
    K = min(m.K, PRESETS[m.preset].slots_of(config.texts.longest, m.K, m.compression))
    own = {
        name.removeprefix("model."): t.to(torch.bfloat16) for name, t in tensors.items() if name.startswith("model.")
    }
    facts = {
        "model": llm.identity,
        "model_name": llm.name,
        "r": config.lora.r,
        "alpha": config.lora.alpha,
        "target_modules": list(config.lora.target_modules),
        "memory": {"preset": m.preset, "N": m.N, "K": K, "compression": m.compression, "choice": m.choice},
        "birth": BIRTH if PRESETS[m.preset].born_full else "",
        **({"retriever": config.retriever.sizes} if config.retriever.width else {}),
        **more,
    }
    files.save(path, {name.removeprefix("base."): tensor for name, tensor in own.items()}, facts)


# --- what a run is made of --------------------------------------------------------------------------------------------


def begin(config: Config, device: torch.device) -> MemoryModel:
    """The model with its adapters in float32: those that the config names, or fresh ones, the same for the same seed.

    Raises:
        ValueError: adapters to go on from that have another rank, scale or place than the config says, or a retriever
            of another size.
    """
    llm = loading.load(config.model, dtype=config.dtype, device=device, adapters=config.adapters)
    lora = config.lora
    if config.adapters:
        _go_on(config, llm)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            llm.adapters = pairs.insert(
                llm.base, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, target_modules=list(lora.target_modules)
            )
    assert llm.adapters is not None
    for _, weight in llm.adapters.parameters():
        weight.data = weight.data.float()
        weight.requires_grad_(not config.retriever.alone)
    if lora.dropout:
        llm.base.train()
    return llm


def _go_on(config: Config, llm: MemoryModel) -> None:
    if llm.adapters is None:
        raise ValueError(f"adapters: {config.adapters!r}, and {config.model} comes with none. Give a file, or null.")
    layer, own = llm.adapters.layers[0], {name.split(".lora_")[0].split(".")[-1] for name in pairs.weights(llm.base)}
    found = [layer.r[READ], layer.lora_alpha[READ], sorted(own)]
    asked = [config.lora.r, config.lora.alpha, sorted({name.split(".")[-1] for name in config.lora.target_modules})]
    if found != asked:
        raise ValueError(f"lora (r, alpha, target_modules) must be as in {config.adapters!r}: {found}, got {asked}.")
    if llm.born_full != PRESETS[config.memory.preset].born_full:
        raise ValueError(f"memory.preset is {config.memory.preset!r}, and {config.adapters!r} are of the other one.")
    if llm.retriever.projectors is not None:
        first, second = llm.retriever.projectors.query[0]
        sizes, mine = {"width": len(second), "hidden": len(first)}, config.retriever.sizes
        if mine != sizes:
            raise ValueError(f"retriever must be as in {config.adapters!r}: {sizes}, got {mine}.")


def learner_of(config: Config, llm: MemoryModel) -> Learner:
    """The learner for a config; in "paper", bos begins as the sink and mark as zeros, unless they are trained."""
    m = config.memory
    first, mark, marked = llm.first, llm.mark, not PRESETS[m.preset].holds_inputs
    learner = Learner(
        llm,
        preset=m.preset,
        K=m.K,
        compression=m.compression,
        choice=m.choice,
        bos=first.detach().clone() if marked else None,
        mark=mark.detach().clone() if marked else None,
        retriever=_retriever_of(config, llm),
        weight=config.retriever.weight,
    )
    for part in (learner.bos, learner.mark):
        if part is not None:
            part.requires_grad_(not config.retriever.alone)
    return learner


def _retriever_of(config: Config, llm: MemoryModel) -> Retriever | None:
    """The retriever of the adapters that are gone on from, or else a fresh one."""
    known, sizes = llm.retriever.projectors, config.retriever.sizes
    if not config.retriever.width:
        return None
    if known is not None:
        return Retriever(known.query, known.key)
    return Retriever.fresh(llm.decoder.L, llm.decoder.d, **sizes, seed=config.seed, device=llm.decoder.device)


def _fixed(learner: Learner) -> dict[str, Tensor]:
    """What is not trained of adapters, bos and mark, under the names of a run's state."""
    still = {name: p for name, p in learner.named_parameters() if not p.requires_grad}
    return {f"model.{n}": p.detach().clone() for n, p in still.items() if ".lora_" in n or n in ("bos", "mark")}


def _empty_pool(config: Config, llm: MemoryModel) -> Memory:
    m = config.memory
    return memories.empty(
        llm.decoder.L,
        llm.decoder.d,
        MemorySettings(m.N, m.K, m.preset, m.compression, m.choice, config.seed),
        dtype=llm.decoder.dtype,
        device=llm.decoder.device,
    )


def recompute(learner: Learner) -> None:
    """Gradient checkpointing of each layer, replayed under the adapter of its forward pass and behind its memory.

    Raises:
        ValueError: the preset "paper" with a transformers that recomputes a layer without what was done to its input.
    """
    if not learner.rules.holds_inputs and not HOOKS_STAY:
        raise ValueError(
            f"checkpointing of the preset 'paper' needs a newer transformers than {transformers.__version__}, "
            f"5.23 for example. Install it, or set checkpointing to false."
        )
    adapters = learner.llm.adapters
    assert adapters is not None
    learner.base.train()  # transformers recomputes in training mode only; the adapters' dropout is as configured

    checkpoint_layers(learner.llm.decoder, adapters)


def rate(config: Config, step: int) -> float:
    """The learning rate of a step, 0 the first: up linearly, level, and down linearly to 0 at the end."""
    s = config.steps
    up = min(1.0, (step + 1) / max(1, s.warmup))
    down = min(1.0, (s.total - step) / max(1, round(s.decay * s.total)))
    return s.lr * min(up, down)


def _newest(out: Path) -> Path | None:
    found = [folder for folder in out.glob("checkpoint-*") if (folder / "state.json").is_file()]
    return max(found, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _claim(out: Path, config: Config) -> None:
    """Say in the folder what is trained there, or refuse one that holds another run."""
    file, mine = out / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if file.exists():
        theirs = json.loads(file.read_text())["config"]
        for key, kind in (("memory", MemoryShape), ("retriever", RetrieverShape)):  # of before there were all keys
            theirs[key] = dataclasses.asdict(kind()) | theirs.get(key, {})
        free = {"watch"}  # changes nothing of what is learned
        different = [key for key in mine if key not in free and mine[key] != theirs.get(key)]
        if different:
            raise ValueError(
                f"{out} holds a run with other settings ({', '.join(different)}). Choose another folder, or remove it."
            )
        return
    temporary = file.with_suffix(".new")  # may be there: of a run that was killed right here
    others = [path for path in out.iterdir() if path.name not in (".lock", temporary.name)]
    if others:
        raise ValueError(f"{out} is not empty and holds no run; choose another folder.")
    temporary.write_text(json.dumps({"config": mine, "versions": _versions()}, indent=1))
    temporary.replace(file)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("latentmem", "torch", "transformers", "peft", "accelerate")}
