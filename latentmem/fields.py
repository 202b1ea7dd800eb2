"""Dataclasses whose fields carry their help and their bounds, for whoever makes options out of them."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One field of a class of settings.

    Args:
        name: of the field.
        type: of its values; None is allowed where `default` is None.
        default: `dataclasses.MISSING` where there is none.
        help: one line for people, without a capital and a full stop.
        least: the smallest number that is allowed; None: unbounded.
        most: the largest number that is allowed; None: unbounded.
        choices: the strings that are allowed; (): any.
    """

    name: str
    type: type
    default: Any
    help: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, value: object) -> None:
        """Refuse a value that this setting can not have.

        Raises:
            ValueError: what was expected, and what came.
        """
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
    """A field of a class of settings; `facts` are more of `Setting`."""
    return field(default=default, metadata={"help": help, **facts})


@cache
def settings_of(kind: Any) -> tuple[Setting, ...]:
    """All settings of a dataclass whose fields are made by `setting`, in order."""
    hints = typing.get_type_hints(kind)
    types = {name: (typing.get_args(hint) or (hint,))[0] for name, hint in hints.items()}  # int of int | None
    return tuple(Setting(f.name, types[f.name], f.default, **f.metadata) for f in dataclasses.fields(kind))


def check(settings: object) -> None:
    """Refuse settings of which one has a value that it can not have; a ValueError."""
    for one in settings_of(type(settings)):  # type: ignore[arg-type]
        one.check(getattr(settings, one.name))
