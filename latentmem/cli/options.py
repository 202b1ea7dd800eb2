"""Options of a command, made from a dataclass: a field's help, type and default stand in the dataclass alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from functools import wraps
from typing import Annotated, Any, NamedTuple

import typer

from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.fields import Setting, settings_of

Command = Callable[..., None]
Values = dict[str, Any]  # name of an option -> its value
Flags = Mapping[str, Sequence[str]]  # name of an option -> how it is written, where that is not --name
FLAGS: Flags = {"N": ("--capacity", "-N"), "K": ("--per-update", "-K")}
PART = "longterm"  # begins the names of the settings of a long-term part; alone it is R
REMEMBERING = {  # `loading.trained.DEFAULTS` of new memories, as help shows them
    "N": "1536",
    "form": "coded, without a coder int8",
    PART: "512",
}


class Group(NamedTuple):
    """Options that belong together, and what a command gets for their values."""

    options: Sequence[inspect.Parameter]
    build: Callable[..., Any]


def replaced(command: Command, parameter: str, group: Group) -> Command:
    """A command with options in the place of one of its parameters, which becomes `group.build(**values)`."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    line = [option for one in own for option in (group.options if one.name == parameter else [one])]
    line.sort(key=lambda one: one.default is not one.empty or is_dataclass(one.annotation))  # required options first
    signature = inspect.Signature([option.replace(kind=option.KEYWORD_ONLY) for option in line], return_annotation=None)

    @wraps(command)
    def called(**values: Any) -> None:
        bound = signature.bind(**values)
        bound.apply_defaults()
        own = {option.name: bound.arguments.pop(option.name) for option in group.options}
        command(**{parameter: group.build(**own)}, **bound.arguments)

    called.__signature__ = signature  # type: ignore[attr-defined]
    return called


def expanded(command: Command) -> Command:
    """A command with the fields of each dataclass among its parameters as options in that parameter's place.

    The fields are annotated with `typer.Option`, as parameters of a command are.
    """
    for one in inspect.signature(command, eval_str=True).parameters.values():
        if isinstance(one.annotation, type) and is_dataclass(one.annotation):
            fields = list(inspect.signature(one.annotation, eval_str=True).parameters.values())
            command = replaced(command, one.name, Group(fields, one.annotation))
    return command


def of_settings(kind: type, leave_out: Collection[str] = (), flags: Flags = FLAGS) -> Group:
    """An option for each `setting` of a dataclass; a command gets their values."""
    settings = {one.name: one for one in settings_of(kind) if one.name not in leave_out}

    def build(**values: Any) -> Values:
        return {name: _parsed(settings[name], value, flags) for name, value in values.items()}

    return Group([_option(name, one, flags, default=one.default) for name, one in settings.items()], build)


# --- settings of a memory ---------------------------------------------------------------------------------------------


def of_memory(
    defaults: MemorySettings,
    leave_out: Collection[str] = (),
    flags: Flags = FLAGS,
    help: Mapping[str, str] | None = None,
    title: str = "",
    shown_defaults: Mapping[str, str] | None = None,
    shown: str = "",
) -> Group:
    """An option for each setting of a memory; a command gets the values that are given, by the names of the options.

    Args:
        defaults: are shown.
        leave_out: names of options; "longterm" stands for the whole long-term part.
        help: by the name of a setting, in the place of its own.
        title: begins the help.
        shown_defaults: by the name of an option, shown in the place of its own.
        shown: in the place of all of them.
    """
    options = []
    for (name, one, default), (_, _, own) in zip(_settings(defaults.complete()), _settings(defaults), strict=True):
        if name in leave_out or (PART in leave_out and name.startswith(PART)):
            continue
        part = ["long-term part"] if name.startswith(f"{PART}_") else []
        begin = "".join(f"{', '.join([title, *part] if title else part)}: " if title or part else "")
        one = replace(one, help=(help or {}).get(name, one.help))
        usual = default if own is not None else f"as the adapters were trained, else {default}"
        usual = "" if default is None else usual  # the help says it
        shown_here = shown or (shown_defaults or {}).get(name, usual)
        options.append(_option(name, one, flags, begin, default=None, shown=shown_here))

    def build(**values: Any) -> Values:
        return {name: value for name, value in values.items() if value is not None}

    return Group(options, build)


def of_a_new_memory(command: Command) -> Command:
    """A command with an option for each setting of a new memory in the place of its parameter `chosen`."""
    return replaced(command, "chosen", of_memory(MemorySettings(), title="New memory", shown_defaults=REMEMBERING))


def of_a_rebuilt_memory(command: Command) -> Command:
    """The same for a memory that is written again: what is not given is as it was."""
    return replaced(command, "chosen", of_memory(MemorySettings(), title="New memory", shown="as it was"))


def settings_over(settings: MemorySettings, chosen: Mapping[str, Any]) -> MemorySettings:
    """The settings of a memory, with those that options stand for in their place."""
    parts = {f"{PART}_R" if name == PART else name: value for name, value in chosen.items() if name.startswith(PART)}
    if settings.longterm is None or not parts:
        asked = settings_from(chosen).longterm or settings.longterm
    else:
        asked = replace(settings.longterm, **{name.removeprefix(f"{PART}_"): value for name, value in parts.items()})
    own = {name: value for name, value in chosen.items() if not name.startswith(PART)}
    return replace(settings, longterm=asked, **own)


def settings_from(chosen: Mapping[str, Any]) -> MemorySettings:
    """The settings that options stand for; None where no option was given."""
    parts = {name.removeprefix(PART).removeprefix("_") or "R": v for name, v in chosen.items() if name.startswith(PART)}
    own = {name: value for name, value in chosen.items() if not name.startswith(PART)}
    if parts and "R" not in parts:
        names = ", ".join(f"--{PART}-{name}" for name in parts)
        raise ValueError(
            f"{names}: there is no long-term part; --{PART} R makes one, of which a question takes R slots."
        )
    return MemorySettings.of({**own, PART: parts or None})


def require_same(name: str, settings: MemorySettings, chosen: Mapping[str, Any]) -> None:
    """Refuse options that are not as the memory was made."""
    for option, _, value in _settings(replace(settings, order=settings.reading_order, form=settings.form or "exact")):
        if option in chosen and chosen[option] != value:
            raise ValueError(
                f"the memory {name!r} was made with {option}={value}, not {chosen[option]}. Leave it out, or choose a "
                f"new name."
            )


def _settings(values: MemorySettings) -> Iterator[tuple[str, Setting, Any]]:
    """Name of the option, the setting, and its value."""
    for one in settings_of(MemorySettings):
        if one.type is not LongTermSettings:
            yield one.name, one, getattr(values, one.name, one.default)
    for one in settings_of(LongTermSettings):
        name, default = (PART, 0) if one.name == "R" else (f"{PART}_{one.name}", one.default)
        yield name, one, getattr(values.longterm, one.name, default)


# --- one option -------------------------------------------------------------------------------------------------------


def _option(
    name: str, one: Setting, flags: Flags, title: str = "", *, default: Any, shown: Any = None
) -> inspect.Parameter:
    """An option for a setting.

    Args:
        title: begins the help.
        default: None: not given.
        shown: the default that is shown where `default` is None.
    """
    several = isinstance(one.default, tuple)
    kind: Any = str if several else one.type
    written = _written(name, flags)
    if kind is bool and default is None:
        written, shown = (f"{written[0]}/{written[0].replace('--', '--no-')}",), "yes" if shown else "no"
    text = title + one.help
    if one.choices and not all(choice in text for choice in one.choices):
        text += f": {', '.join(one.choices)}"
    bounds: dict[str, Any] = {"min": one.least, "max": one.most} if kind in (int, float) and shown is None else {}
    show: Any = True if shown is None else str(shown)
    if text.partition(":")[0] not in one.choices:
        text = f"{text[0].upper()}{text[1:]}"
    option: Any = typer.Option(*written, help=f"{text}.", show_default=show, **bounds)
    annotation = Annotated.__class_getitem__((kind if default is not None else kind | None, option))  # type: ignore[attr-defined]
    value = ",".join(map(str, default)) if several else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)


def _written(name: str, flags: Flags) -> Sequence[str]:
    """How an option is written."""
    return flags.get(name, (f"--{name.replace('_', '-')}",))


def _parsed(one: Setting, value: Any, flags: Flags) -> Any:
    """The value of a setting; several values are given with commas in between."""
    if not isinstance(one.default, tuple):
        return value
    try:
        return tuple(one.type(part) for part in value.split(","))
    except ValueError:
        raise ValueError(
            f"{_written(one.name, flags)[0]} takes numbers with commas in between, such as 0,1,5: got {value!r}."
        ) from None
