"""What one may choose of a memory: every setting with its default, its help and its check in this one place.

The command line, HTTP, training and evaluation derive their options from `settings_of(MemorySettings)`, so a new
setting is one new field here. None means: as the adapters were trained, else by the size of the model (letters:
`latentmem.core`).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from latentmem.core.presets import PRESETS

CHOICES = ("last", "surprise")
GROUPS = ("update", "slot")
RULES = ("oldest", "frequency")
LARGEST = 1 << 24  # slots, tokens per slot


@dataclass(frozen=True)
class Setting:
    """One field of a class of settings, for whoever offers it to people.

    Args:
        name: of the field.
        type: int, float, bool, str or `LongTermSettings`; None is allowed where `default` is None.
        default: `dataclasses.MISSING` where there is none.
        help: one line for people, without a capital and a full stop.
        least, most: the bounds of a number, both included; None: unbounded.
        choices: the values of a string; (): any.
    """

    name: str
    type: type
    default: Any
    help: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, value: object) -> None:
        """Refuse a value that this setting can not have; a ValueError."""
        if value is None and self.default is None:
            return
        if type(value) is not self.type:
            raise ValueError(f"{self.name} must be {self.type.__name__}, got {value!r}.")
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name} must be one of {', '.join(self.choices)}, got {value!r}.")
        least, most = self.least, self.most
        if (least is not None and not value >= least) or (most is not None and not value <= most):  # type: ignore[operator]
            bounds = f"at least {least}" if most is None else f"between {least} and {most}"
            raise ValueError(f"{self.name} ({self.help}) must be {bounds}, got {self.name}={value!r}.")


def setting(help: str, default: Any = dataclasses.MISSING, **facts: Any) -> Any:
    """A field of a class of settings; `facts` as in `Setting`."""
    return field(default=default, metadata={"help": help, **facts})


@cache
def settings_of(kind: type[MemorySettings] | type[LongTermSettings]) -> tuple[Setting, ...]:
    """All settings of a class, in order."""
    hints = typing.get_type_hints(kind)
    types = {name: (typing.get_args(hint) or (hint,))[0] for name, hint in hints.items()}  # int of int | None
    return tuple(Setting(f.name, types[f.name], f.default, **f.metadata) for f in dataclasses.fields(kind))


@dataclass(frozen=True)
class LongTermSettings:
    """How a long-term memory keeps and retrieves what was dropped; see `latentmem.longterm`.

    Raises:
        ValueError: a setting that makes no sense.
    """

    R: int = setting("slots that a question takes of what was dropped; 0: it is lost", least=0, most=LARGEST)
    keep: bool = setting("keep what is dropped; without, a question only puts a memory's own best updates last", True)
    limit: int = setting("bytes of what is kept; what came first goes first", 1 << 30, least=1)
    int8: bool = setting("keep slots in 8 bits, with a scale for every 32 numbers", False)
    group: str = setting("what is retrieved together: whole updates or slots", "update", choices=GROUPS)
    every: int = setting("tokens of an answer after which is searched again; 0: never", 64, least=0)
    rule: str = setting("which slots go first; the released checkpoints count frequencies", "oldest", choices=RULES)
    period: int = setting("slots that are written until the rule frequency counts again", 0, least=0)

    def __post_init__(self) -> None:
        for one in settings_of(LongTermSettings):
            one.check(getattr(self, one.name))
        if self.rule == "frequency" and not self.period:
            raise ValueError("the rule frequency needs a period of at least 1 slot written, got 0.")
        if not self.keep and self.group != "update":
            raise ValueError(f"without `keep` a question finds updates: group must be 'update', got {self.group!r}.")

    @property
    def takes(self) -> int:
        """Slots that each layer retrieves once there are as many."""
        return self.R if self.keep else 0

    @staticmethod
    def of(asked: int | Mapping[str, object] | LongTermSettings | None) -> LongTermSettings | None:
        """Settings from what a caller may give: R alone, or a mapping with R and more of them."""
        if asked is None or isinstance(asked, LongTermSettings):
            return asked
        values: dict[str, Any] = dict(asked) if isinstance(asked, Mapping) else {"R": asked}
        names = [one.name for one in settings_of(LongTermSettings)]
        if set(values) - set(names) or "R" not in values:
            raise ValueError(
                f"a long-term memory is R slots, or a mapping of {', '.join(names)} with R: got {asked!r}."
            )
        return LongTermSettings(**values)


@dataclass(frozen=True)
class MemorySettings:
    """What one may choose of a memory; a memory's own are complete, see `complete`.

    Raises:
        ValueError: a setting that makes no sense, or some that do not belong together.

    Source: MemoryLLM (arXiv 2402.04624) section 3.1; the preset "exact", compression and choice are ours.
    """

    N: int | None = setting("slots that a layer can hold", None, least=1, most=LARGEST)
    K: int | None = setting("slots that one update writes in a layer at most", None, least=1, most=LARGEST)
    preset: str | None = setting("exact: slots are layers' inputs; paper: their outputs", None, choices=tuple(PRESETS))
    compression: int | None = setting("tokens per slot, in the preset exact", None, least=1, most=LARGEST)
    choice: str | None = setting("which of these tokens becomes a slot", None, choices=CHOICES)
    seed: int = setting("determines every random drop", 0, least=-(1 << 63), most=(1 << 63) - 1)
    quota: float = setting("the share of N that pinned slots may take", 0.5, least=0, most=1)
    longterm: LongTermSettings | None = setting("how what is dropped is kept, if it is", None)  # noqa: RUF009

    def __post_init__(self) -> None:
        if type(self.quota) is int:
            object.__setattr__(self, "quota", float(self.quota))
        for one in settings_of(MemorySettings):
            one.check(getattr(self, one.name))
        if self.N is not None and self.K is not None and self.K > self.N:
            raise ValueError(
                f"K, the slots that one update writes, must lie between 1 and the capacity N: got K={self.K}, "
                f"N={self.N}. Make N larger or K smaller."
            )
        if self.compression not in (None, 1) and self.preset is not None and not PRESETS[self.preset].holds_inputs:
            raise ValueError(f"compression is for the preset 'exact': got {self.compression} in {self.preset!r}.")

    @staticmethod
    def of(values: Mapping[str, Any]) -> MemorySettings:
        """Settings from plain values, as they come from a file or a caller; `longterm` as in `LongTermSettings.of`."""
        names = [one.name for one in settings_of(MemorySettings)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"a memory has the settings {', '.join(names)}, got {', '.join(unknown)}.")
        return MemorySettings(**{**values, "longterm": LongTermSettings.of(values.get("longterm"))})

    def filled(self, other: MemorySettings) -> MemorySettings:
        """The same settings, each that is None taken from `other`."""
        names = [one.name for one in settings_of(MemorySettings) if getattr(self, one.name) is None]
        return replace(self, **{name: getattr(other, name) for name in names})

    def override(self, **values: object) -> MemorySettings:
        """The same settings with each of these values that is not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]

    def complete(self) -> MemorySettings:
        """The same settings with a value for each that was None: N=2048, K=256 or an eighth of a smaller N, "exact"."""
        N = 2048 if self.N is None else self.N
        defaults = MemorySettings(N, min(256, max(1, N // 8)), "exact", 1, "last")
        longterm = self.longterm if self.longterm is not None and self.longterm.R else None
        return replace(self.filled(defaults), longterm=longterm)
