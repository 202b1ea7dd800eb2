"""What is trained, on what and how: a YAML file, changed by `--set a.b=c` -> checked dataclasses."""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentmem.core.presets import PRESETS
from latentmem.core.settings import OF_USE, MemorySettings
from latentmem.fields import setting, settings_of

OBJECTIVES = (
    *("new_knowledge", "continuous", "forgetting", "repetition", "distillation", "questions"),
    *("recall", "unknown", "unrelated", "chat", "facts", "talk", "everyday"),
)
UNASKED = ("unrelated", "chat", "everyday")  # objectives whose rows are about no text
KINDS = ("text", "questions")
CONFIGS = Path(__file__).parent / "configs"
Rule = tuple[object, str]  # what must be true, and the sentence that is said otherwise


@dataclass(frozen=True)
class PoolSettings(MemorySettings):
    """The memory that is trained, with other defaults, and how its pool begins.

    An untrained write of "paper" makes slots that the next write can not make anything of; with the `restarts`
    [1, 2, 4, 0] writes that follow one another become many only while they are learned.
    """

    N: int = setting("slots that a layer can hold", 2048)
    K: int = setting("slots that one update writes at most; in paper exactly", 256)
    preset: str = setting("exact or paper", "exact")
    compression: int = setting("tokens per slot, exact only, of memories by default and of the live curve", 1)
    choice: str = setting("which token of c becomes a slot", "last")
    compressions: tuple[int, ...] = setting("one of these is drawn for each episode; empty: always `compression`", ())
    birth: str = setting("empty, or full: texts of the data are written into the pool before the first step", "empty")
    restarts: tuple[int, ...] = setting(
        "of equal parts of the run: steps after which the pool begins anew; 0: never", ()
    )

    def __post_init__(self) -> None:
        self.settings()

    def settings(self) -> MemorySettings:
        """The settings of the memory alone.

        Raises:
            ValueError: as `MemorySettings`.
        """
        return MemorySettings(**{one.name: getattr(self, one.name) for one in settings_of(MemorySettings)})

    @property
    def drawn(self) -> tuple[int, ...]:
        """The numbers of tokens per slot, of which each episode draws one."""
        return self.compressions or (self.compression,)


@dataclass(frozen=True)
class Lora:
    """The write and the read adapter."""

    r: int = setting("rank", 16)
    alpha: float = setting("the scale is alpha / r", 32.0)
    dropout: float = setting("on the inputs of the adapters", 0.0)
    target_modules: tuple[str, ...] = setting("linear layers with one", ("q_proj", "k_proj", "v_proj", "o_proj"))


@dataclass(frozen=True)
class RetrieverShape:
    """The retriever of a long-term memory, trained beside the adapters; the adapters learn nothing from it."""

    width: int = setting("of its queries and keys; 0: no retriever is trained", 0)
    hidden: int = setting("between its two layers; 0: twice the width", 0)
    weight: float = setting("factor of its loss", 1.0)
    lr: float = setting("its highest learning rate; it rises and falls as that of the adapters", 1e-3)
    alone: bool = setting("the adapters stay as they are, and only the retriever is trained", False)

    @property
    def sizes(self) -> dict[str, int]:
        """Width and hidden width, as they stand in a result."""
        return {"width": self.width, "hidden": self.hidden or 2 * self.width}


@dataclass(frozen=True)
class Source:
    """One set of training data."""

    path: str = setting("a folder of texts or a .jsonl(.gz) file, here or in `$LATENTMEM_DATA`; or a hub set")
    kind: str = setting("text (documents), or questions (rows with context, question and answers as in SQuAD)", "text")
    weight: float = setting("how often a text is drawn from it, relative to the other sources", 1.0)
    subset: str | None = setting("of a hub set", None)
    split: str = setting("of a hub set", "train")
    leave_out: tuple[str, ...] = setting("titles that are not trained on", ())
    hub: str | None = setting("the same set on the hub, taken where `path` is not there", None)
    optional: bool = setting("of `apart`: passed over where it is not there", False)


@dataclass(frozen=True)
class Texts:
    """How documents become episodes."""

    at_once: int = setting("texts that one episode writes", 4)
    shortest: int = setting("tokens of a text at least", 32)
    longest: int = setting("tokens of a text at most", 256)
    rows: int = setting("questions that are read behind one memory; of longer rows there are fewer", 8)
    continuation: int = setting("tokens of a continuation at most; a repetition has half as many", 96)
    in_sequence: float = setting("share of episodes that write a text behind the ones before it, not beside them", 0.5)
    recent: float = setting("share of texts that are asked at once; the others have an age of up to `oldest`", 0.4)
    oldest: int = setting("updates between a text and its questions at most", 50)
    least_left: float = setting("expected share of a text's slots that is left at least: bounds the age", 0.15)
    grow: float = setting("share of all steps over which the part of the pool that is read grows; 0: the whole", 0.0)
    most_pieces: int = setting("pieces of a document in `continuous`, reached at the end of training", 4)
    near: float = setting(
        "share of `unknown` questions about another paragraph of the article of a text in memory", 0.0
    )


@dataclass(frozen=True)
class Steps:
    """How many steps, how large, and when they stop."""

    total: int = setting("optimizer steps", 400)
    episodes: int = setting("per step and process; their gradients are averaged", 1)
    lr: float = setting("the highest learning rate", 1e-3)
    write: float = setting("share of it at which the write adapter, bos and mark learn", 1.0)
    warmup: int = setting("steps of linear rise", 20)
    decay: float = setting("share of all steps at the end in which the rate falls linearly to 0", 0.3)
    weight_decay: float = setting("of AdamW", 0.0)
    betas: tuple[float, ...] = setting("of AdamW", (0.9, 0.98))
    clip: float = setting("norm to which gradients are cut", 1.0)
    unrelated: float = setting("factor of the losses that are divergences: unrelated, chat and everyday", 1.0)
    spike: float = setting("a loss this many times its objective's running mean stops the training", 8.0)
    patience: int = setting("steps with an objective before its running mean is trusted", 20)


@dataclass(frozen=True)
class Watch:
    """What is recorded while it trains."""

    checkpoint: int = setting("steps between checkpoints", 50)
    probe: int = setting("steps between points of the live retention curve; 0: none", 100)
    titles: tuple[str, ...] = setting("of questions sources: kept out of training, and asked by the probe", ())
    texts: int = setting("that the probe asks for", 8)
    ages: tuple[int, ...] = setting("other texts in between", (0, 5, 10, 20))
    tensorboard: bool = setting("also write tensorboard's files", True)


@dataclass(frozen=True)
class Config:
    """One training run.

    Raises:
        ValueError: values that make no sense, each named.
    """

    model: str = setting("as for `latentmem.load`", "smollm2-135m")
    adapters: str | None = setting("to go on from: a file, or auto for those of the model; null: fresh ones", None)
    dtype: str = setting("of the frozen weights; adapters are float32", "bfloat16")
    seed: int = setting("of adapters, data order and every drop", 0)
    checkpointing: bool = setting("recompute activations in the backward pass: less memory, more time", False)
    sharding: str = setting("none, or fsdp2: weights sharded over all processes", "none")
    memory: PoolSettings = field(default_factory=PoolSettings)
    lora: Lora = field(default_factory=Lora)
    retriever: RetrieverShape = field(default_factory=RetrieverShape)
    objectives: dict[str, float] = field(default_factory=lambda: {"questions": 1.0})  # weights; an episode draws one
    data: tuple[Source, ...] = ()
    apart: tuple[Source, ...] = setting("for evaluation; no text that shares 13 words in a row is trained on", ())
    texts: Texts = field(default_factory=Texts)
    steps: Steps = field(default_factory=Steps)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        for right, message in itertools.chain(
            self._about_data(), self._about_memory(), self._about_retriever(), self._about_texts(), self._about_steps()
        ):
            if not right:
                raise ValueError(message)

    def _about_data(self) -> Iterator[Rule]:
        yield self.data, "data: give at least one source."
        yield self.objectives, f"objectives: give at least one of {', '.join(OBJECTIVES)}."
        for name, weight in self.objectives.items():
            yield name in OBJECTIVES, f"objectives: {name!r} is none of {', '.join(OBJECTIVES)}."
            yield weight >= 0, f"objectives.{name} must not be negative, got {weight}."
        yield sum(self.objectives.values()) > 0, "objectives: the weights are all 0."
        for i, source in enumerate(self.data):
            yield source.kind in KINDS, f"data.{i}.kind must be one of {', '.join(KINDS)}, got {source.kind!r}."
            yield source.weight > 0, f"data.{i}.weight must be above 0, got {source.weight}."

    def _about_memory(self) -> Iterator[Rule]:
        m, total = self.memory, self.steps.total
        in_use = MemorySettings()
        for name in OF_USE:
            yield getattr(m, name) == getattr(in_use, name), f"memory.{name} is for a memory in use; leave it out."
        yield m.birth in ("empty", "full"), f"memory.birth must be empty or full, got {m.birth!r}."
        yield min((0, *m.restarts)) >= 0, f"memory.restarts must not be negative, got {list(m.restarts)}."
        yield (
            len(m.restarts) <= total,
            f"memory.restarts has {len(m.restarts)} numbers, and the run {total} steps: at most one a step.",
        )
        yield min(m.drawn) >= 1, f"memory.compressions must be at least 1, got {list(m.drawn)}."
        yield PRESETS[m.preset].holds_inputs or set(m.drawn) == {1}, "memory.compressions is for the preset exact."

    def _about_retriever(self) -> Iterator[Rule]:
        r, asks = self.retriever, any(self.objectives.get(name) for name in OBJECTIVES if name not in UNASKED)
        yield self.adapters != "", "adapters: give a file, auto or null."
        yield not (self.adapters and self.lora.dropout), "lora.dropout must be 0 with adapters to go on from."
        yield r.width >= 0 and r.hidden >= 0, "retriever.width and retriever.hidden must not be negative."
        yield r.weight > 0, f"retriever.weight must be above 0, got {r.weight}."
        yield r.lr > 0, f"retriever.lr must be above 0, got {r.lr}."
        yield r.width or not r.alone, "retriever.alone needs a retriever.width above 0."
        yield (
            not r.width or asks,
            f"retriever.width needs an objective that asks about texts; {', '.join(UNASKED)} do not.",
        )

    def _about_texts(self) -> Iterator[Rule]:
        t, m = self.texts, self.memory
        piece = PRESETS[m.preset].piece(m.K, min(m.drawn))
        yield 1 <= t.shortest <= t.longest, f"texts: shortest={t.shortest} must not exceed longest={t.longest}."
        yield t.longest <= piece, f"texts.longest={t.longest} is more than one update reads, {piece} tokens."
        yield t.at_once >= 1 and t.rows >= 1, "texts.at_once and texts.rows must be at least 1."
        yield 0 < t.least_left <= 1, f"texts.least_left is a share above 0, got {t.least_left}."
        yield 0 <= t.grow <= 1, f"texts.grow is a share between 0 and 1, got {t.grow}."
        yield 0 <= t.near <= 1, f"texts.near is a share between 0 and 1, got {t.near}."
        yield t.most_pieces >= 2, f"texts.most_pieces must be at least 2, got {t.most_pieces}."

    def _about_steps(self) -> Iterator[Rule]:
        s, w, alone = self.steps, self.watch, self.sharding == "none"
        yield s.total >= 1 and s.episodes >= 1, "steps.total and steps.episodes must be at least 1."
        yield s.lr > 0 and s.clip > 0, "steps.lr and steps.clip must be above 0."
        yield s.write > 0, f"steps.write must be above 0, got {s.write}."
        yield s.unrelated > 0, f"steps.unrelated must be above 0, got {s.unrelated}."
        yield 0 <= s.decay <= 1, f"steps.decay is a share between 0 and 1, got {s.decay}."
        yield len(s.betas) == 2, f"steps.betas are two numbers, got {list(s.betas)}."
        yield self.sharding in ("none", "fsdp2"), f"sharding must be none or fsdp2, got {self.sharding!r}."
        yield alone or not w.probe, "watch.probe must be 0 with sharding: the curve is measured by one process."
        yield (
            alone or not self.objectives.get("chat"),
            "objectives.chat must be 0 with sharding: processes would generate replies of unequal length.",
        )
        yield w.checkpoint >= 1, "watch.checkpoint must be at least 1."
        yield list(w.ages) == sorted(set(w.ages)), "watch.ages must be ascending."

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
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(known.stem for known in CONFIGS.glob("*.yaml")))
        raise ValueError(f"{path}: {error.strerror}. Give a YAML file, or one of {names}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: keys and values were expected.")
    for change in changes:
        name, sign, value = change.partition("=")
        if not sign or not name:
            raise ValueError(f"--set takes key=value, such as steps.total=100, got {change!r}.")
        try:
            _set(values, name.split("."), yaml.safe_load(value))
        except yaml.YAMLError:
            raise ValueError(f"--set {change}: the value is no YAML.") from None
    return build(Config, values, "")


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
    if origin is types.UnionType:
        return None if value is None else build(args[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is dict:
        return {str(key): build(args[1], item, f"{where}.{key}") for key, item in _mapping(value, where).items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: a list was expected, got {value!r}.")
        return tuple(build(args[0], item, f"{where}.{i}") for i, item in enumerate(value))
    return _plain(kind, value, where)


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the config'}: keys and values were expected, got {value!r}.")
    return value


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(map(str, _mapping(value, where))) - set(hints))
    if unknown:
        raise ValueError(f"{where or 'the config'} has no key {', '.join(unknown)}; its keys are {', '.join(hints)}.")
    parts = {key: build(hints[key], item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    try:
        return kind(**parts)
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).split('() ')[-1]}.") from None
    except ValueError as error:  # it begins with a key
        raise ValueError(f"{where}.{error}".lstrip(".")) from None


def _plain(kind: type, value: Any, where: str) -> Any:
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
