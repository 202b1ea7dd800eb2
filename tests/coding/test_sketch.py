"""Sketches: likeness by tables is the likeness that is meant, the same bits in any company, and finds what fits."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from latentmem.coding.sketch import CHUNK, WIDE, Sketch


def sketch_of(d=40, bits=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, scale, sizes = (torch.rand(n, generator=generator) / 50 for n in (d, bits, bits))
    basis = torch.randint(-127, 128, (bits, d), generator=generator, dtype=torch.int8)
    return Sketch(2, mean, basis, scale, sizes)


def directions(n, d=40, seed=1):
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(("n", "T"), [(1, 1), (5, CHUNK + 3), (WIDE + 7, 300)])
def test_likeness_is_what_the_formula_says(n, T):
    sketch, asked, slots = sketch_of(), directions(n, seed=3), directions(T)
    signs = torch.where((slots.double() - sketch.mean) @ sketch.directions.double() > 0, 1.0, -1.0)
    meant = ((asked.double() - sketch.mean) @ sketch.directions.double()) @ (signs * sketch.sizes.double()).T
    sketches = sketch.of(slots)
    assert sketches.shape == (T, 4) and sketches.dtype == torch.uint8
    likeness = sketch.likeness(asked, sketches)
    assert likeness.shape == (n, T) and likeness.dtype == torch.float32
    torch.testing.assert_close(likeness.double(), meant, rtol=1e-4, atol=1e-6)


def test_equal_rows_are_equal_in_any_company():
    sketch, asked, slots = sketch_of(), directions(WIDE + 30, seed=3), directions(2 * CHUNK + 100)
    sketches = sketch.of(slots)
    likeness = sketch.likeness(asked, sketches)
    for i in (0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 99):
        assert torch.equal(sketch.of(slots[i : i + 1])[0], sketches[i])
        assert torch.equal(sketch.likeness(asked, sketches[i : i + 1])[:, 0], likeness[:, i])
    for j in (0, 17, WIDE, WIDE + 29):
        assert torch.equal(sketch.likeness(asked[j : j + 1], sketches)[0], likeness[j])


def test_nothing_is_like_nothing():
    sketch = sketch_of()
    none, some = sketch.of(directions(0)), sketch.of(directions(3))
    assert none.shape == (0, 4)
    assert sketch.likeness(directions(2), none).shape == (2, 0)
    assert sketch.likeness(directions(0), some).shape == (0, 3)


def test_what_is_nearly_the_same_fits_best():
    sketch, slots = sketch_of(d=64, bits=64), directions(500, d=64)
    near = normalize(slots + 0.2 * directions(500, d=64, seed=9), dim=-1)
    fits = sketch.likeness(near, sketch.of(slots)).argmax(1)
    assert (fits == torch.arange(500)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("basis", torch.zeros(31, 40, dtype=torch.int8)),
        ("basis", torch.zeros(32, 41, dtype=torch.int8)),
        ("basis", torch.zeros(32, 40)),
        ("mean", torch.zeros(39)),
        ("sizes", torch.zeros(32, dtype=torch.float64)),
        ("scale", torch.zeros(0)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(part, value):
    with pytest.raises(ValueError, match="a sketch "):
        replace(sketch_of(), **{part: value})
