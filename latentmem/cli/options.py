"""Options of a command, made from a dataclass: a field's help, type and default stand in the dataclass alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from latentmem.core.settings import LongTermSettings, MemorySettings, Setting, settings_of

Command = Callable[..., None]
Values = dict[str, Any]  # name of an option -> what was given
FLAGS = {"N": ("--capacity", "-N"), "K": ("--per-update", "-K")}  # of settings whose option has another name
PART = "longterm"  # begins the names of the settings of a long-term part; alone it is R


def replaced(
    command: Command, parameter: str, options: Sequence[inspect.Parameter], build: Callable[..., Any]
) -> Command:
    """A command with options in the place of one of its parameters, which becomes `build(**values)` of them."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    line = [option for one in own for option in (options if one.name == parameter else [one])]
    names = [option.name for option in options]
    signature = inspect.Signature([option.replace(kind=option.KEYWORD_ONLY) for option in line], return_annotation=None)

    @wraps(command)
    def called(**values: Any) -> None:
        bound = signature.bind(**values)
        bound.apply_defaults()
        own = {parameter: build(**{name: bound.arguments.pop(name) for name in names})}
        command(**own, **bound.arguments)

    called.__signature__ = signature  # type: ignore[attr-defined]
    return called


def expanded(command: Command) -> Command:
    """A command with the fields of each dataclass among its parameters as options in that parameter's place.

    The fields are annotated with `typer.Option`, as parameters of a command are.
    """
    for one in inspect.signature(command, eval_str=True).parameters.values():
        if isinstance(one.annotation, type) and is_dataclass(one.annotation):
            fields = list(inspect.signature(one.annotation, eval_str=True).parameters.values())
            command = replaced(command, one.name, fields, one.annotation)
    return command


# --- settings of a memory ---------------------------------------------------------------------------------------------


def of_a_new_memory(command: Command) -> Command:
    """Give a command an option for each setting of a memory in the place of its parameter `chosen`.

    The parameter gets the values that were given, by the names of their options.
    """
    options = [_option(name, one, default) for name, one, default in _settings()]
    return replaced(command, "chosen", options, _given)


def settings_from(chosen: Mapping[str, Any]) -> MemorySettings:
    """The settings that options stand for; None where no option was given."""
    parts = {name.removeprefix(PART).removeprefix("_") or "R": v for name, v in chosen.items() if name.startswith(PART)}
    own = {name: value for name, value in chosen.items() if not name.startswith(PART)}
    return MemorySettings.of({**own, PART: parts or None})


def require_same(name: str, settings: MemorySettings, chosen: Mapping[str, Any]) -> None:
    """Refuse options that are not as the memory was made."""
    longterm = settings.longterm
    for option, one, default in _settings():
        value = getattr(longterm, one.name, default) if option.startswith(PART) else getattr(settings, one.name)
        if option in chosen and chosen[option] != value:
            raise ValueError(
                f"the memory {name!r} was made with {option}={value}, not {chosen[option]}. Leave it out, or choose a "
                f"new name."
            )


def _settings() -> Iterator[tuple[str, Setting, Any]]:
    """Name of the option, the setting, and its default for a new memory."""
    complete = MemorySettings().complete()
    for one in settings_of(MemorySettings):
        if one.type is not LongTermSettings:
            yield one.name, one, getattr(complete, one.name, one.default)
    for one in settings_of(LongTermSettings):
        yield (PART, one, 0) if one.name == "R" else (f"{PART}_{one.name}", one, one.default)


def _option(name: str, one: Setting, default: Any) -> inspect.Parameter:
    dashed = name.replace("_", "-")
    flags = (f"--{dashed}/--no-{dashed}",) if one.type is bool else FLAGS.get(name, (f"--{dashed}",))
    help = f"New memory{', its long-term part' if name.startswith(f'{PART}_') else ''}: {one.help}"
    if one.choices and not all(choice in one.help for choice in one.choices):
        help += f": {', '.join(one.choices)}"
    shown = {True: "yes", False: "no"}[default] if one.type is bool else str(default)
    option: Any = typer.Option(*flags, help=f"{help}.", show_default=shown)
    annotation = Annotated.__class_getitem__((one.type | None, option))  # type: ignore[attr-defined]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _given(**values: Any) -> Values:
    return {name: value for name, value in values.items() if value is not None}
