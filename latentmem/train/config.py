"""What is trained, on what and how: a YAML file, changed by `--set a.b=c` -> checked dataclasses."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentmem.core.presets import PRESETS
from latentmem.core.settings import CHOICES

OBJECTIVES = (
    "new_knowledge",
    "continuous",
    "forgetting",
    "repetition",
    "distillation",
    "questions",
    "recall",
    "unknown",
    "unrelated",
    "chat",
    "facts",
    "talk",
    "everyday",
)
UNASKED = ("unrelated", "chat", "everyday")  # objectives whose rows are about no text
KINDS = ("text", "questions")
CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class MemoryShape:
    """The memory that is trained; letters as in `latentmem.core`.

    Args:
        preset: "exact" or "paper".
        N: slots that a layer can hold.
        K: slots that one update writes at most; in "paper" exactly.
        compression: tokens per slot, "exact" only.
        compressions: one of these is drawn for each episode instead; empty: always `compression`, which is the one that
            memories get by default and the live curve is for. A number that stands here twice is drawn twice as often.
        choice: which token of c becomes a slot: "last" of each group, or "surprise": those that were expected least.
        birth: "empty", or "full": the pool is filled with texts of the data before the first step.
        restarts: steps after which the pool is begun anew: the run has as many equal parts as there are numbers here,
            each begins with a new pool and has a number of its own; 0 = not again in that part, empty = never at all.
            An untrained write of "paper" makes slots that the next write can not make anything of; with [1, 2, 4, 0]
            writes that follow one another become many only while they are learned.
    """

    preset: str = "exact"
    N: int = 2048
    K: int = 256
    compression: int = 1
    compressions: tuple[int, ...] = ()
    choice: str = "last"
    birth: str = "empty"
    restarts: tuple[int, ...] = ()

    @property
    def drawn(self) -> tuple[int, ...]:
        """What the tokens per slot of an episode are drawn from."""
        return self.compressions or (self.compression,)


@dataclass(frozen=True)
class Lora:
    """The write and the read adapter.

    Args:
        r: rank.
        alpha: the scale is alpha / r.
        dropout: on their inputs.
        target_modules: names of the linear layers that get one.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class RetrieverShape:
    """What finds stored slots of a long-term memory again, trained beside the adapters; they learn nothing from it.

    Args:
        width: of its queries and keys; 0: none is trained.
        hidden: between its two layers; 0: twice the width.
        weight: factor of its loss.
        lr: its highest learning rate; it rises and falls as that of the adapters.
        alone: the adapters stay as they are, and only it is trained.
    """

    width: int = 0
    hidden: int = 0
    weight: float = 1.0
    lr: float = 1e-3
    alone: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Width and hidden width, as they stand in a result."""
        return {"width": self.width, "hidden": self.hidden or 2 * self.width}


@dataclass(frozen=True)
class Source:
    """One set of training data.

    Args:
        path: a folder of text files, a `.jsonl` or `.jsonl.gz` file, or a hub set; a relative path is looked for in
            the working folder and in `$LATENTMEM_DATA`.
        kind: "text" (documents) or "questions" (rows with context, question and answers as in SQuAD).
        weight: how often a text is drawn from it, relative to the other sources.
        subset, split: of a hub set.
        leave_out: titles that are not trained on.
        hub: the same set on the hub, taken where `path` is not there.
        optional: of `apart`: passed over where it is not there.
    """

    path: str
    kind: str = "text"
    weight: float = 1.0
    subset: str | None = None
    split: str = "train"
    leave_out: tuple[str, ...] = ()
    hub: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Texts:
    """How documents become episodes.

    Args:
        at_once: texts that one episode writes.
        shortest, longest: tokens of a text.
        rows: questions that are read behind one memory; of longer rows there are fewer.
        continuation: tokens of a continuation at most; a repetition has half as many.
        in_sequence: share of episodes in which a text is written behind the ones before it, not beside them.
        recent: share of texts that are asked at once; the others have an age of up to `oldest` updates.
        oldest: updates between a text and its questions at most.
        least_left: share of a text's slots that is left at least, by expectation: bounds the age in a small memory.
        grow: share of all steps over which the part of the pool that is read grows to its whole; 0 = whole at once.
        most_pieces: pieces of one document in the objective "continuous", reached at the end of training.
        near: share of the questions of "unknown" without an answer in memory that are about the article of a text that
            is there, where a source has more paragraphs of it.
    """

    at_once: int = 4
    shortest: int = 32
    longest: int = 256
    rows: int = 8
    continuation: int = 96
    in_sequence: float = 0.5
    recent: float = 0.4
    oldest: int = 50
    least_left: float = 0.15
    grow: float = 0.0
    most_pieces: int = 4
    near: float = 0.0


@dataclass(frozen=True)
class Steps:
    """How many steps, how large, and when they stop.

    Args:
        total: optimizer steps.
        episodes: per step and process; their gradients are averaged.
        lr: the highest learning rate.
        write: share of it at which the write adapter learns, and bos and mark.
        warmup: steps of linear rise.
        decay: share of all steps at the end in which the rate falls linearly to 0.
        weight_decay, betas: of AdamW.
        clip: norm to which gradients are cut.
        unrelated: factor of the loss of "unrelated", "chat" and "everyday", divergences that are small beside the
            others' losses.
        spike: a loss this many times its objective's running mean, or one that is not finite, stops the training.
        patience: steps with an objective before its running mean is trusted.
    """

    total: int = 400
    episodes: int = 1
    lr: float = 1e-3
    write: float = 1.0
    warmup: int = 20
    decay: float = 0.3
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.98)
    clip: float = 1.0
    unrelated: float = 1.0
    spike: float = 8.0
    patience: int = 20


@dataclass(frozen=True)
class Watch:
    """What is recorded while it trains.

    Args:
        checkpoint: steps between checkpoints.
        probe: steps between points of the live retention curve; 0 = none.
        titles: of "questions" sources: kept out of training, and asked by the probe.
        texts: that the probe asks for.
        ages: other texts in between.
        tensorboard: also write tensorboard's files.
    """

    checkpoint: int = 50
    probe: int = 100
    titles: tuple[str, ...] = ()
    texts: int = 8
    ages: tuple[int, ...] = (0, 5, 10, 20)
    tensorboard: bool = True


@dataclass(frozen=True)
class Config:
    """One training run.

    Args:
        model: as for `latentmem.load`.
        adapters: trained ones to go on from, as for `latentmem.load`: a file, or "auto" for those that belong to the
            model; null: fresh ones.
        dtype: of the frozen weights; adapters are float32.
        seed: of adapters, data order and every drop.
        checkpointing: recompute activations in the backward pass: less memory, more time.
        sharding: "none", or "fsdp2": weights sharded over all processes.
        objectives: name -> weight; one is drawn for each episode.
        data: sources.
        apart: evaluation sets: a text that shares 13 words in a row with one of them is not trained on.

    Raises:
        ValueError: values that make no sense, each named.
    """

    model: str = "smollm2-135m"
    adapters: str | None = None
    dtype: str = "bfloat16"
    seed: int = 0
    checkpointing: bool = False
    sharding: str = "none"
    memory: MemoryShape = field(default_factory=MemoryShape)
    lora: Lora = field(default_factory=Lora)
    retriever: RetrieverShape = field(default_factory=RetrieverShape)
    objectives: dict[str, float] = field(default_factory=lambda: {"questions": 1.0})
    data: tuple[Source, ...] = ()
    apart: tuple[Source, ...] = ()
    texts: Texts = field(default_factory=Texts)
    steps: Steps = field(default_factory=Steps)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        m, t, s, r = self.memory, self.texts, self.steps, self.retriever
        preset = PRESETS.get(m.preset, PRESETS["exact"])
        piece = preset.piece(m.K, min(m.drawn))
        rules = [
            (self.data, "data: give at least one source."),
            (self.objectives, f"objectives: give at least one of {', '.join(OBJECTIVES)}."),
            (sum(self.objectives.values()) > 0, "objectives: the weights are all 0."),
            (m.preset in PRESETS, f"memory.preset must be one of {', '.join(PRESETS)}, got {m.preset!r}."),
            (m.choice in CHOICES, f"memory.choice must be one of {', '.join(CHOICES)}, got {m.choice!r}."),
            (m.birth in ("empty", "full"), f"memory.birth must be empty or full, got {m.birth!r}."),
            (min((0, *m.restarts)) >= 0, f"memory.restarts must not be negative, got {list(m.restarts)}."),
            (
                len(m.restarts) <= s.total,
                f"memory.restarts has {len(m.restarts)} numbers, and the run {s.total} steps: at most one a step.",
            ),
            (1 <= m.K <= m.N, f"memory.K must lie between 1 and memory.N={m.N}, got {m.K}."),
            (m.compression >= 1, f"memory.compression must be at least 1, got {m.compression}."),
            (min(m.drawn) >= 1, f"memory.compressions must be at least 1, got {list(m.drawn)}."),
            (preset.sees_all or m.compression == 1, "memory.compression is for the preset exact."),
            (preset.sees_all or set(m.drawn) == {1}, "memory.compressions is for the preset exact."),
            (self.adapters != "", "adapters: give a file, auto or null."),
            (not (self.adapters and self.lora.dropout), "lora.dropout must be 0 with adapters to go on from."),
            (r.width >= 0 and r.hidden >= 0, "retriever.width and retriever.hidden must not be negative."),
            (r.weight > 0, f"retriever.weight must be above 0, got {r.weight}."),
            (r.lr > 0, f"retriever.lr must be above 0, got {r.lr}."),
            (r.width or not r.alone, "retriever.alone needs a retriever.width above 0."),
            (
                not r.width or any(self.objectives.get(name) for name in OBJECTIVES if name not in UNASKED),
                f"retriever.width needs an objective that asks about texts; {', '.join(UNASKED)} do not.",
            ),
            (1 <= t.shortest <= t.longest, f"texts: shortest={t.shortest} must not exceed longest={t.longest}."),
            (t.longest <= piece, f"texts.longest={t.longest} is more than one update reads, {piece} tokens."),
            (t.at_once >= 1 and t.rows >= 1, "texts.at_once and texts.rows must be at least 1."),
            (0 < t.least_left <= 1, f"texts.least_left is a share above 0, got {t.least_left}."),
            (0 <= t.grow <= 1, f"texts.grow is a share between 0 and 1, got {t.grow}."),
            (0 <= t.near <= 1, f"texts.near is a share between 0 and 1, got {t.near}."),
            (t.most_pieces >= 2, f"texts.most_pieces must be at least 2, got {t.most_pieces}."),
            (s.total >= 1 and s.episodes >= 1, "steps.total and steps.episodes must be at least 1."),
            (s.lr > 0 and s.clip > 0, "steps.lr and steps.clip must be above 0."),
            (s.write > 0, f"steps.write must be above 0, got {s.write}."),
            (s.unrelated > 0, f"steps.unrelated must be above 0, got {s.unrelated}."),
            (0 <= s.decay <= 1, f"steps.decay is a share between 0 and 1, got {s.decay}."),
            (len(s.betas) == 2, f"steps.betas are two numbers, got {list(s.betas)}."),
            (self.sharding in ("none", "fsdp2"), f"sharding must be none or fsdp2, got {self.sharding!r}."),
            (
                self.sharding == "none" or not self.watch.probe,
                "watch.probe must be 0 with sharding: the curve is measured by one process.",
            ),
            (
                self.sharding == "none" or not self.objectives.get("chat"),
                "objectives.chat must be 0 with sharding: processes would generate replies of unequal length.",
            ),
            (self.watch.checkpoint >= 1, "watch.checkpoint must be at least 1."),
            (list(self.watch.ages) == sorted(set(self.watch.ages)), "watch.ages must be ascending."),
        ]
        for name, weight in self.objectives.items():
            rules += [
                (name in OBJECTIVES, f"objectives: {name!r} is none of {', '.join(OBJECTIVES)}."),
                (weight >= 0, f"objectives.{name} must not be negative, got {weight}."),
            ]
        for i, source in enumerate(self.data):
            rules += [
                (source.kind in KINDS, f"data.{i}.kind must be one of {', '.join(KINDS)}, got {source.kind!r}."),
                (source.weight > 0, f"data.{i}.weight must be above 0, got {source.weight}."),
            ]
        for right, message in rules:
            if not right:
                raise ValueError(message)

    def began(self, step: int) -> int:
        """The step before which the pool of a step was begun."""
        parts, total = self.memory.restarts, self.steps.total
        if not parts:
            return 0
        part = min(step, total - 1) * len(parts) // total
        first, every = -(-part * total // len(parts)), parts[part]
        return first + (step - first) // every * every if every else first


def load(path: str | Path, changes: Sequence[str] = ()) -> Config:
    """Read a config.

    Args:
        path: a YAML file, or the name of one that comes with the package, such as "smollm2-135m".
        changes: "a.b=c" each; the value is read as YAML, and numbers count the items of a list.

    Raises:
        ValueError: no such file, unknown keys, values of another type, or values that make no sense.
    """
    import yaml

    file = Path(path)
    if not file.exists() and (CONFIGS / f"{path}.yaml").is_file():
        file = CONFIGS / f"{path}.yaml"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(known.stem for known in CONFIGS.glob("*.yaml")))
        raise ValueError(f"{path}: {error.strerror}. Give a YAML file, or one of {names}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: keys and values were expected.")
    for change in changes:
        name, sign, value = change.partition("=")
        if not sign or not name:
            raise ValueError(f"--set takes key=value, such as steps.total=100, got {change!r}.")
        try:
            _set(found, name.split("."), yaml.safe_load(value))
        except yaml.YAMLError:
            raise ValueError(f"--set {change}: the value is no YAML.") from None
    return build(Config, found, "")


def _set(inside: Any, keys: list[str], value: Any) -> None:
    key: Any = keys[0]
    if isinstance(inside, list):
        if not key.isdigit() or int(key) >= len(inside):
            raise ValueError(f"--set: there are {len(inside)} items, and {key!r} is none of their numbers.")
        key = int(key)
    elif not isinstance(inside, dict):
        raise ValueError(f"--set: {key!r} has nothing above it that holds keys.")
    elif len(keys) > 1:
        inside.setdefault(key, {})
    if len(keys) == 1:
        inside[key] = value
    else:
        _set(inside[key], keys[1:], value)


def build(kind: Any, value: Any, where: str) -> Any:
    """A value of YAML as `kind`: a dataclass, a tuple, a dict or a plain type.

    Raises:
        ValueError: it is of another type, with the key.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'the config'}: keys and values were expected, got {value!r}.")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(map(str, value)) - set(hints))
        if unknown:
            raise ValueError(
                f"{where or 'the config'} has no key {', '.join(unknown)}; its keys are {', '.join(hints)}."
            )
        parts = {key: build(hints[key], item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
        try:
            made: Any = kind
            return made(**parts)
        except TypeError as error:
            raise ValueError(f"{where}: {str(error).split('() ')[-1]}.") from None
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: a list was expected, got {value!r}.")
        return tuple(build(args[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: keys and values were expected, got {value!r}.")
        return {str(key): build(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is types.UnionType:
        return None if value is None else build(args[0], value, where)
    if kind is float and isinstance(value, str):
        try:
            value = float(value)  # YAML takes 1e-3 for a string
        except ValueError:
            raise ValueError(f"{where}: a number was expected, got {value!r}.") from None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise ValueError(f"{where}: {names.get(kind, kind)} was expected, got {value!r}.")
    return value
