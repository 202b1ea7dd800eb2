"""What one may choose of a memory: each setting with its default, its help and its bounds (letters: `latentmem.core`).

The command line, HTTP, training and evaluation derive their options from here, so a new setting is one new field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentmem.core.presets import PRESETS
from latentmem.fields import Setting, check, setting, settings_of

__all__ = ["CHOICES", "OF_USE", "LongTermSettings", "MemorySettings", "Setting", "settings_of"]
CHOICES, ORDERS = ("last", "surprise"), ("written", "best-last", "best-only")
FORMS = ("exact", "int8", "coded")
OF_USE = ("seed", "quota", "longterm", "order", "form")  # settings that training does not fix
LARGEST = 1 << 24  # slots, tokens per slot


@dataclass(frozen=True)
class LongTermSettings:
    """How a long-term memory keeps and retrieves what was dropped; see `latentmem.longterm`.

    Raises:
        ValueError: a setting that makes no sense.
    """

    R: int = setting("slots that a question takes of what was dropped; 0: it is lost", least=0, most=LARGEST)
    limit: int | None = setting("bytes of what is kept; by default 256 MiB, of hidden states 1 GiB", None, least=1)
    int8: bool = setting("keep slots in 8 bits, with a scale for every 32 numbers", False)
    group: str = setting("what is retrieved together: whole updates or slots", "update", choices=("update", "slot"))
    every: int = setting("tokens of an answer after which is searched again; 0: never", 64, least=0)
    rule: str = setting("what goes first; checkpoints count frequencies", "oldest", choices=("oldest", "frequency"))
    period: int = setting("slots that are written until the rule frequency counts again", 0, least=0)

    def __post_init__(self) -> None:
        check(self)
        if self.rule == "frequency" and not self.period:
            raise ValueError("the rule frequency needs a period of at least 1 slot written, got 0.")

    @staticmethod
    def of(asked: int | Mapping[str, object] | LongTermSettings | None) -> LongTermSettings | None:
        """Settings from what a caller may give: R alone, or a mapping with R and more of them."""
        if asked is None or isinstance(asked, LongTermSettings):
            return asked
        values: dict[str, Any] = dict(asked) if isinstance(asked, Mapping) else {"R": asked}
        names = [one.name for one in settings_of(LongTermSettings)]
        if set(values) - set(names) or "R" not in values:
            raise ValueError(f"a long-term memory is R, or a mapping with R of {', '.join(names)}: got {asked!r}.")
        return LongTermSettings(**values)


@dataclass(frozen=True)
class MemorySettings:
    """What one may choose of a memory; None: as the adapters were trained, or what `complete` says.

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
    order: str | None = setting("read as written, best updates last, or the best one only", None, choices=ORDERS)
    form: str | None = setting("what is kept: hidden states, keys and values in 8 bits, or codes", None, choices=FORMS)

    def __post_init__(self) -> None:
        if type(self.quota) is int:
            object.__setattr__(self, "quota", float(self.quota))
        check(self)
        if self.N is not None and self.K is not None and self.K > self.N:
            raise ValueError(
                f"K, the slots that one update writes, must lie between 1 and the capacity N: got K={self.K}, "
                f"N={self.N}. Make N larger or K smaller."
            )
        if self.compression not in (None, 1) and self.preset is not None and not PRESETS[self.preset].holds_inputs:
            raise ValueError(f"compression is for the preset 'exact': got {self.compression} in {self.preset!r}.")
        if self.order not in (None, "written") and self.longterm is not None and self.longterm.group != "update":
            raise ValueError(f"the order {self.order!r} is one of updates: group must be 'update', got 'slot'.")
        if self.by_update and self.preset is not None and not PRESETS[self.preset].holds_inputs:
            raise ValueError(f"the form {self.form!r} is for the preset 'exact': {self.preset!r} keeps hidden states.")

    @staticmethod
    def of(values: Mapping[str, object]) -> MemorySettings:
        """Settings from plain values, as they come from a file or a caller; `longterm` as in `LongTermSettings.of`."""
        asked: Any = values.get("longterm")
        return MemorySettings(**{**values, "longterm": LongTermSettings.of(asked)})  # type: ignore[arg-type]

    @property
    def by_update(self) -> bool:
        """Whether updates are kept coded, each once, and a slot is the number of its place in one of them."""
        return self.form not in (None, "exact")

    @property
    def reading_order(self) -> str:
        """How a question reads the slots: as was chosen, else best-last where a long-term part retrieves updates."""
        by_update = self.longterm is not None and self.longterm.group == "update"
        return self.order or ("best-last" if by_update else "written")

    def filled(self, other: MemorySettings) -> MemorySettings:
        """The same settings, each that is None taken from `other`."""
        return other.override(**{one.name: getattr(self, one.name) for one in settings_of(MemorySettings)})

    def override(self, **values: object) -> MemorySettings:
        """The same settings with each of these values that is not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]

    def complete(self) -> MemorySettings:
        """The same settings with a value for each that was None: N=2048, K=256 or an eighth of a smaller N, "exact"."""
        N = 2048 if self.N is None else self.N
        form = self.form if self.by_update else None
        complete = replace(self.filled(MemorySettings(N, min(256, max(1, N // 8)), "exact", 1, "last")), form=form)
        return complete if self.longterm is None or self.longterm.R else replace(complete, longterm=None)
