"""What a run keeps on disk from one step to the next: whose folder it is, and checkpoints; complete or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from latentmem import container
from latentmem.core.memory import Memory
from latentmem.disk import replace_bytes, replace_folder
from latentmem.errors import DamagedError
from latentmem.train.config import Config

STATE, KEY = "state.safetensors", "run"  # the file of weights and optimizer; of its header: the counts, as JSON
PACKAGES = ("latentmem", "torch", "transformers", "peft", "accelerate")
State = dict[str, Tensor]  # "model.NAME" -> a trained weight, "optimizer.KEY.NAME" -> what the optimizer knows of it


def claim(out: Path, config: Config) -> None:
    """Say in a folder what is trained there.

    Raises:
        ValueError: the folder holds another run, or something else.
    """
    file, mine = out / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if not file.exists():
        # A run that was killed right here has left a part of the file.
        if any(path.name != ".lock" and not path.name.startswith(f".{file.name}.") for path in out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no run; choose another folder.")
        versions = {name: version(name) for name in PACKAGES}
        replace_bytes(file, json.dumps({"config": mine, "versions": versions}, indent=1))
        return
    theirs = _completed(json.loads(file.read_text(encoding="utf-8"))["config"], config)
    different = [key for key in mine if key != "watch" and mine[key] != theirs.get(key)]  # watching teaches nothing
    if different:
        raise ValueError(
            f"{out} holds a run with other settings ({', '.join(different)}). Choose another folder, or remove it."
        )


def _completed(values: dict[str, Any], config: Config) -> dict[str, Any]:
    """The values of a run's config; a setting that is newer than the run has its default."""
    kinds: dict[str, Any] = {name: type(p) for name, p in vars(config).items() if dataclasses.is_dataclass(p)}
    defaults = {name: json.loads(json.dumps(dataclasses.asdict(kind()))) for name, kind in kinds.items()}
    return values | {name: default | values.get(name, {}) for name, default in defaults.items()}


@contextlib.contextmanager
def writing(what: str, out: Path) -> Iterator[None]:
    """Say what could not be written, and what to do; a ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{what} could not be written to {out}: {error.strerror or error}. "
            f"The checkpoint before it is still there: make room, and give the same command."
        ) from None


def newest(out: Path) -> Path | None:
    """The folder of the newest checkpoint."""
    folders = [folder for folder in out.glob("checkpoint-*") if (folder / STATE).is_file()]
    return max(folders, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def save(out: Path, counts: Mapping[str, Any], state: State, pool: Memory, rank: int, wait: Callable[[], None]) -> None:
    """Write a checkpoint and remove those before it.

    Args:
        counts: "step", and all else that the next step needs and that is no tensor; JSON.
        state: whole, on rank 0.
        pool: of this process.
        wait: until all processes are there.

    Raises:
        ValueError: a full disk; the checkpoint before is still there.
    """
    name = f"checkpoint-{counts['step']}"
    folder, temporary = out / name, out / f".{name}"
    with writing(f"the checkpoint of step {counts['step']}", out):
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            container.write(temporary / STATE, state, {KEY: json.dumps(counts)})
        wait()
        pool.save(temporary / f"pool-{rank}.safetensors")
        wait()
        if rank == 0:
            replace_folder(temporary, folder)
            for old in out.glob("checkpoint-*"):
                if old != folder:
                    shutil.rmtree(old)


def load(folder: Path, rank: int, world: int) -> tuple[dict[str, Any], State, Memory]:
    """Counts, state and this process's pool of a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, or of another number of processes.
    """
    state, header = _intact(folder / STATE, container.read)
    counts = json.loads(header[KEY])
    if counts["world"] != world:
        raise ValueError(
            f"{folder.parent} was trained by {counts['world']} processes, and these are {world}: the order of the "
            f"texts would change. Start as many, or begin in another folder."
        )
    return counts, state, _intact(folder / f"pool-{rank}.safetensors", Memory.load)


def _intact(file: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(file)
    except (OSError, ValueError) as error:
        raise DamagedError(
            f"{file} is damaged, and the run can not go on from it ({error}). Restore it from a copy, or remove "
            f"{file.parent.parent} and begin anew."
        ) from None


def gather(learner: nn.Module, optimizer: torch.optim.Optimizer, *, rank: int = 0, world: int = 1) -> State:
    """Trained weights and the optimizer's state, whole, on rank 0; nothing on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=world > 1, ignore_frozen_params=True)
    model: Any = get_model_state_dict(learner, options=options)
    known: Any = get_optimizer_state_dict(learner, optimizer, options=options)
    if rank:
        return {}
    trained = {name for name, weight in learner.named_parameters() if weight.requires_grad}
    state = {f"model.{name}": tensor for name, tensor in model.items() if name in trained}
    for name, values in known["state"].items():
        if values["step"]:  # else it never had a gradient, such as a write adapter whose layer's output is no slot
            state |= {f"optimizer.{key}.{name}": torch.as_tensor(value) for key, value in values.items()}
    return state


def restore(learner: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Put back what `gather` gave."""
    options = StateDictOptions(full_state_dict=True, strict=False, ignore_frozen_params=True)
    weights: Any = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    set_model_state_dict(learner, weights, options=options)
    known: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("optimizer."):
            key, parameter = name.removeprefix("optimizer.").split(".", 1)
            known.setdefault(parameter, {})[key] = tensor
    groups: Any = get_optimizer_state_dict(learner, optimizer, options=options)["param_groups"]
    whole: Any = {"state": known, "param_groups": groups}
    set_optimizer_state_dict(learner, optimizer, whole, options=options)
    for name, weight in learner.named_parameters():
        if weight.requires_grad and name not in known:
            optimizer.state.pop(weight, None)  # torch has made one up
