"""The steps of a run, on one process or many: logs, checkpoints, the live curve; what was lost to a kill is done again.

A folder holds one run:

    config.json            what is trained, with which versions
    log.jsonl              one line per step: loss, accuracy, tokens, seconds, names of the texts; points of the curve
    checkpoint-STEP/       adapters, optimizer and pool after that many steps; only the newest is kept
    adapters.safetensors   the result
    curves.png             loss, accuracy and the live curve
    tensorboard/           the same numbers for tensorboard
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from filelock import FileLock, Timeout
from torch import nn

from latentmem.decoder import adapters as pairs
from latentmem.errors import InUseError
from latentmem.train import build, checkpoint, standins
from latentmem.train.config import OBJECTIVES, UNASKED, Config
from latentmem.train.data import Apart, Documents
from latentmem.train.episode import Episode
from latentmem.train.episodes import Episodes
from latentmem.train.learner import Outcome, remember
from latentmem.train.log import Log, draw
from latentmem.train.probe import Probe

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
        self.llm = build.model_of(config, self.accelerator.device)
        self.origin = self.llm.adapters.identity if config.adapters and self.llm.adapters else ""
        self.sources = [Documents(s, config.seed + i, config.watch.titles) for i, s in enumerate(config.data)]
        self.episodes = Episodes(config, self.llm.prompts_or_raise(), self.sources, Apart(config.apart), self.world)
        self.learner = build.learner_of(config, self.llm)
        still = {name: p for name, p in self.learner.named_parameters() if not p.requires_grad}
        self.fixed = {  # of the result, what is not trained
            f"model.{n}": p.detach().clone() for n, p in still.items() if ".lora_" in n or n in ("bos", "mark")
        }
        if config.checkpointing:
            build.recompute(self.learner)
        self.sharded = config.sharding == "fsdp2" and self.world > 1
        self.model: nn.Module = self._spread()
        self.parameters = {name: p for name, p in self.learner.named_parameters() if p.requires_grad}
        self.optimizer = build.optimizer_of(config, self.parameters)
        self.pool = build.pool_of(config, self.llm)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.means: dict[str, list[float]] = {}  # objective -> steps that had it, running mean of its loss
        watches = config.watch.probe and not self.rank
        self.probe = Probe(config, self.llm, self.learner, self.sources) if watches else None

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
        last = self.config.steps.total if stop is None else min(stop, self.config.steps.total)
        try:
            with FileLock(self.out / ".lock", timeout=0) if self.rank == 0 else nullcontext():
                self._train(progress, last)
        except Timeout:
            raise InUseError(f"another process trains in {self.out}; wait for it, or choose another folder.") from None

    def _train(self, progress: Progress | None, last: int) -> None:
        total = self.config.steps.total
        if self.rank == 0:
            checkpoint.claim(self.out, self.config)
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
        """One step of the optimizer; its line of the log."""
        start = time.perf_counter()
        episodes = [self.episodes[number] for number in self._numbers(self.step)]
        row, each = self._learn(episodes)
        self._check(row["loss"], row["norm"], each, episodes)
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * build.rate(self.config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        took = time.perf_counter() - start
        self.step, self.seconds, self.tokens = self.step + 1, self.seconds + took, self.tokens + row["tokens"]
        return {
            "step": self.step,
            **{name: round(value, 4 + (name in ("loss", "retriever"))) for name, value in row.items()},
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(took, 3),
            "objectives": [episode.objective for episode in episodes],
            "texts": [name for episode in episodes for name in episode.names],
        }

    def _learn(self, episodes: Sequence[Episode]) -> tuple[dict[str, Any], dict[str, float]]:
        """Gradients of this process's episodes, cut; numbers of all processes, and the loss of each objective."""
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
            own = [x for episode, x in zip(episodes, losses, strict=True) if episode.objective == name]
            mine += [sum(own), len(own)]
        searched = [outcome for outcome in outcomes if outcome.search is not None]
        mine += [sum(o.search or 0.0 for o in searched), sum(o.precision for o in searched), len(searched)]
        loss, accuracy, norm, tokens, *parts, search, right, searches = self._everywhere(*mine)
        row = {"loss": loss, "accuracy": accuracy}
        row |= {"retriever": search / searches, "found": right / searches} if searches else {}
        each = {name: x / n for name, x, n in zip(OBJECTIVES, parts[::2], parts[1::2], strict=True) if n}
        return row | {"norm": norm, "tokens": round(tokens * self.world)}, each

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
            own = [p for name, p in self.parameters.items() if name.startswith(pairs.RETRIEVER) == finds]
            norm: Any = nn.utils.clip_grad_norm_(own, self.config.steps.clip)
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        return math.hypot(*norms)

    def _everywhere(self, *mine: float) -> list[float]:
        """The means of numbers over all processes."""
        numbers = torch.tensor(mine, device=self.accelerator.device, dtype=torch.float64)
        if self.world > 1:
            numbers = self.accelerator.reduce(numbers, "mean")
        return numbers.tolist()

    def _check(self, loss: float, norm: float, each: dict[str, float], episodes: Sequence[Episode]) -> None:
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
        self.pool = build.pool_of(self.config, self.llm)
        number = -1
        while self.config.memory.birth == "full" and self._everywhere(self.pool.M < self.pool.N)[0] > 0:
            number += 1
            episode = self.episodes[number * self.world + self.rank]
            torch.manual_seed(episode.seed)  # of dropout
            with torch.no_grad():
                self._remember(self.model(replace(episode, fill=1.0), self.pool, self._passes(episode)))

    # --- on disk ----------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        counts = {"step": self.step, "means": self.means, "seconds": self.seconds, "tokens": self.tokens}
        state = checkpoint.gather(self.learner, self.optimizer, rank=self.rank, world=self.world)
        wait = self.accelerator.wait_for_everyone
        checkpoint.save(self.out, {**counts, "world": self.world}, state, self.pool, self.rank, wait)

    def _resume(self) -> None:
        newest = checkpoint.newest(self.out)
        if newest is None:
            return
        counts, state, pool = checkpoint.load(newest, self.rank, self.world)
        checkpoint.restore(self.learner, self.optimizer, state)
        self.step, self.means = counts["step"], counts["means"]
        self.seconds, self.tokens = counts["seconds"], counts["tokens"]
        self.pool = replace(pool, slots=pool.slots.to(self.accelerator.device), version="", parent="")

    def _export(self) -> None:
        state = checkpoint.gather(self.learner, self.optimizer, rank=self.rank, world=self.world)
        if self.rank == 0:
            with checkpoint.writing("the result", self.out):
                more = {"from": self.origin, "steps": self.step, "tokens": self.tokens}
                build.save_result(self.out / RESULT, self.config, self.llm, {**self.fixed, **state}, more)
            draw({self.out.name: self.out}, self.out / "curves.png")


def rehearse(config: Config) -> dict[str, Any]:
    """What a run would be, by counting and by doing a few episodes behind a full pool; nothing is learned or written.

    Nothing is fetched: invented texts stand in for sets of the hub, which are not counted.

    Returns:
        documents and questions of each source (-1: not counted), trained weights, steps, tokens, seconds and bytes, by
        expectation.

    Raises:
        ValueError: as `Run`; the live curve has nothing to ask.
    """
    with tempfile.TemporaryDirectory(prefix="latentmem-") as folder:
        config, sets = standins.local(config, Path(folder))
        run, s = Run(config, Path()), config.steps
    first = [run.episodes[number] for number in range(min(100, s.total * s.episodes * run.world))]
    tokens = sum(episode.written + episode.read for episode in first) / len(first)
    pool, took = run.pool, []
    while pool.M < pool.N:
        pool = remember(pool, torch.randn(pool.L, min(pool.K, pool.N), pool.d, device=pool.slots.device))
    for episode in first[:3]:
        start = time.perf_counter()
        run.learner(replace(episode, fill=1.0), pool).loss.backward()
        took.append(time.perf_counter() - start)
    trained = sum(p.numel() for p in run.parameters.values())
    states = 2 * 4 * trained // (run.world if run.sharded else 1)  # of AdamW, float32, made by the first step
    return {
        "sources": [_counts(documents, sets.get(documents.source.path, "")) for documents in run.sources],
        "trained": trained,
        "frozen": sum(p.numel() for p in run.learner.parameters()) - trained,
        "steps": s.total,
        "tokens": round(tokens * s.total * s.episodes * run.world),
        "seconds": min(took) * s.total * s.episodes,  # the first one is slower
        "bytes": _peak() + states,
    }


def _counts(documents: Documents, name: str) -> tuple[str, str, int, int]:
    """Path, kind, documents and questions of a source; `name` is that of the set of the hub that was not fetched."""
    kind, questions = documents.source.kind, sum(len(one.questions) for one in documents.all)
    return (name, kind, -1, -1) if name else (documents.source.path, kind, len(documents), questions)


def _peak() -> int:
    """The most memory that this process held so far, in bytes: of the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
