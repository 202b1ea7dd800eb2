"""Settings of a memory: each stands in one place, with its help and its bounds, and a memory holds them complete."""

from dataclasses import MISSING, dataclass, replace

import pytest

from latentmem import longterm as longterms
from latentmem.core.memory import empty
from latentmem.core.presets import EXACT, PAPER, PAPER_PIECE, PRESETS
from latentmem.core.settings import LongTermSettings, MemorySettings, settings_of
from latentmem.fields import check, setting


@pytest.mark.parametrize("kind", [MemorySettings, LongTermSettings])
def test_every_setting_has_a_line_of_help_and_a_default_that_is_allowed(kind):
    for one in settings_of(kind):
        assert one.help and one.help[0].islower() and not one.help.endswith("."), one.name
        if one.default is not MISSING:
            one.check(one.default)
    assert [one.name for one in settings_of(kind)] == list(kind.__dataclass_fields__)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"N": 0}, "N=0"),
        ({"N": "8"}, "N must be int, got '8'"),
        ({"N": True}, "N must be int, got True"),
        ({"N": 4, "K": 5}, "K=5, N=4"),
        ({"preset": "papers"}, "exact, paper, got 'papers'"),
        ({"choice": "first"}, "last, surprise, got 'first'"),
        ({"preset": "paper", "compression": 2}, "'exact': got 2"),
        ({"seed": 1 << 63}, "seed .*got seed=9223372036854775808"),
        ({"seed": None}, "seed must be int"),
        ({"quota": 1.5}, r"quota .* between 0 and 1, got quota=1\.5"),
        ({"quota": float("nan")}, "between 0 and 1"),
        ({"longterm": {"limit": 3}}, "R, or a mapping with R of R, limit"),
        ({"longterm": {"R": 3, "size": 3}}, "got {'R': 3, 'size': 3}"),
        ({"longterm": -1}, "R=-1"),
        ({"order": "newest"}, "written, best-last, best-only, got 'newest'"),
        ({"order": "best-last", "longterm": {"R": 4, "group": "slot"}}, "'update', got 'slot'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MemorySettings.of(values)


def test_a_memory_holds_its_settings_complete():
    assert empty(1, 1).settings == MemorySettings(2048, 256, "exact", 1, "last", 0, 0.5, None)
    memory = empty(1, 1, MemorySettings(N=16, preset="paper", quota=1))
    assert memory.settings == MemorySettings(16, 2, "paper", 1, "last", 0, 1.0)
    assert (memory.N, memory.K, memory.preset, memory.quota, memory.rules) == (16, 2, "paper", 1.0, PAPER)
    other = memory.with_settings(seed=5)
    assert (other.seed, memory.seed, other.N) == (5, 0, 16)


def test_what_is_not_given_is_taken_from_elsewhere():
    trained = MemorySettings(64, 8, "exact", 2, "surprise", seed=9)
    asked = MemorySettings(N=32, choice="last", longterm=LongTermSettings(4))
    assert asked.filled(trained) == MemorySettings(32, 8, "exact", 2, "last", 0, 0.5, LongTermSettings(4))
    assert trained.override(N=None, K=4, longterm=None) == MemorySettings(64, 4, "exact", 2, "surprise", seed=9)


def test_no_slots_are_no_long_term_part():
    assert MemorySettings(longterm=LongTermSettings(0)).complete().longterm is None
    assert LongTermSettings.of(None) is None and LongTermSettings.of(3) == LongTermSettings(3)


def test_a_memory_with_a_long_term_part_of_updates_is_read_best_last():
    assert empty(1, 1).reading_order == "written" and not empty(1, 1).needs_search
    assert empty(1, 1, MemorySettings(order="best-only")).reading_order == "best-only"
    for longterm, order in ((LongTermSettings(3), "best-last"), (LongTermSettings(3, group="slot"), "written")):
        memory = empty(1, 1)
        memory = replace(memory, longterm=longterms.empty(1, longterm))
        assert memory.reading_order == order and memory.with_settings(order="written").reading_order == "written"


def test_any_dataclass_may_have_settings():
    @dataclass(frozen=True)
    class Run:
        steps: int = setting("how long it runs", least=1)
        name: str | None = setting("what it is called", None, choices=("a", "b"))

    assert [(one.name, one.type, one.choices) for one in settings_of(Run)] == [
        ("steps", int, ()),
        ("name", str, ("a", "b")),
    ]
    check(Run(1))
    with pytest.raises(ValueError, match=r"steps \(how long it runs\) must be at least 1, got steps=0"):
        check(Run(0))
    with pytest.raises(ValueError, match="a, b, got 'c'"):
        check(Run(1, "c"))


def test_the_presets_differ_as_their_table_says():
    assert {"exact": EXACT, "paper": PAPER} == PRESETS
    assert (EXACT.piece(8, 3), PAPER.piece(8, 1)) == (24, PAPER_PIECE)
    assert (EXACT.slots_seen(64, 8), PAPER.slots_seen(64, 8)) == (64, 8)
    assert [EXACT.slots_of(n, 8, 3) for n in (1, 3, 4, 24)] == [1, 1, 2, 8]
    assert [PAPER.slots_of(n, 8, 1) for n in (1, 512)] == [8, 8]
