"""Options that are made from the settings of a memory, so that a new setting is an option by itself."""

import dataclasses

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from latentmem import fields
from latentmem.cli import options
from latentmem.core.settings import LongTermSettings, MemorySettings


def command(chosen_by):
    """A command whose option `--name` stands beside those of a new memory; notes what it gets."""
    app = typer.Typer()

    @app.command()
    @options.of_a_new_memory
    def make(name: str = "m", *, chosen: options.Values) -> None:
        chosen_by.append((name, chosen))

    return app


def test_every_setting_has_an_option_with_its_help():
    parameters = {one.name: one for one in get_command(command([])).params}
    for one in fields.settings_of(MemorySettings):
        if one.name != "longterm":
            assert one.help in parameters[one.name].help
    for one in fields.settings_of(LongTermSettings):
        assert one.help in parameters["longterm" if one.name == "R" else f"longterm_{one.name}"].help
    assert parameters["N"].opts == ["--capacity", "-N"] and parameters["N"].show_default == "1536"
    assert "last, surprise" in parameters["choice"].help


def test_only_what_was_given_comes_to_the_command_and_gives_the_settings():
    got = []
    line = "-N 64 --choice surprise --longterm 8 --longterm-group slot --no-longterm-int8 --quota 0.25 --name a"
    assert CliRunner().invoke(command(got), line.split()).exit_code == 0
    given = {"N": 64, "choice": "surprise", "quota": 0.25}
    given |= {"longterm": 8, "longterm_group": "slot", "longterm_int8": False}
    assert got == [("a", given)]
    part = LongTermSettings(R=8, group="slot")
    given.pop("longterm_int8")
    assert options.settings_from(given) == MemorySettings(N=64, choice="surprise", quota=0.25, longterm=part)
    assert options.settings_from({}) == MemorySettings()
    with pytest.raises(ValueError, match="--longterm-group: there is no long-term part"):
        options.settings_from({"longterm_group": "slot"})


def test_a_new_setting_is_an_option_by_itself(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class More(MemorySettings):
        shade: str | None = fields.setting("the colour of its slots", None, choices=("red", "blue"))

    monkeypatch.setattr(options, "MemorySettings", More)
    got = []
    assert CliRunner().invoke(command(got), ["--shade", "red"]).exit_code == 0
    assert got == [("m", {"shade": "red"})]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"N": 64}, None),
        ({"N": 32}, "N=64, not 32"),
        ({"longterm": 8, "longterm_every": 64}, None),
        ({"longterm": 9}, "longterm=8, not 9"),
        ({"longterm_group": "slot"}, "longterm_group=update, not slot"),
        ({"order": "best-last"}, None),
        ({"order": "written"}, "order=best-last, not written"),
    ],
)
def test_a_memory_that_is_there_keeps_its_settings(given, says):
    made = MemorySettings(N=64, longterm=LongTermSettings(R=8)).complete()
    if says is None:
        return options.require_same("m", made, given)
    with pytest.raises(ValueError, match=says):
        options.require_same("m", made, given)


def test_a_memory_without_a_long_term_part_has_0_slots_of_it():
    options.require_same("m", MemorySettings().complete(), {"longterm": 0})
    with pytest.raises(ValueError, match="longterm=0, not 8"):
        options.require_same("m", MemorySettings().complete(), {"longterm": 8})
