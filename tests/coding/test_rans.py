"""The entropy coder: symbols come back to the bit, near the entropy, and damage is seen."""

import numpy as np
import pytest

from latentmem.coding import rans
from latentmem.errors import DamagedError


def tables_of(c, n, seed=0, kinds=12):
    """Tables of c coefficients; of the first kind every second symbol is none."""
    generator = np.random.default_rng(seed)
    peaks = 3.0 * np.exp(-np.abs(np.arange(n) - n // 2)[None] / generator.uniform(0.1, 4, (kinds, 1)))
    peaks[0, ::2] = 0
    return rans.Tables(rans.whole_counts(peaks), generator.integers(0, kinds, c).astype(np.uint8))


def symbols_of(tables, m, seed=1):
    generator = np.random.default_rng(seed)
    shares = tables.counts[tables.kinds] / (1 << rans.BITS)
    rows = [generator.choice(shares.shape[1], size=m, p=row) for row in shares]
    return np.array(rows, np.uint8).reshape(len(shares), m)


@pytest.mark.parametrize("c", [1, 3, 200, 201])
@pytest.mark.parametrize("m", [1, 2, 155])
def test_symbols_come_back(c, m):
    tables = tables_of(c, 33)
    symbols = symbols_of(tables, m)
    (back,) = rans.decode([rans.encode(symbols, tables)], tables)
    assert np.array_equal(back, symbols)


def test_rare_symbols_come_back():
    tables = tables_of(50, 33)
    symbols = np.random.default_rng(0).integers(0, 16, (50, 40)).astype(np.uint8) * 2 + 1
    assert np.array_equal(rans.decode([rans.encode(symbols, tables)], tables)[0], symbols)


def test_many_codes_are_read_at_once():
    tables = tables_of(120, 17)
    many = [symbols_of(tables, m, seed=m) for m in (3, 1, 40, 7)]
    codes = [rans.encode(symbols, tables) for symbols in many]
    for back, symbols in zip(rans.decode(codes, tables), many, strict=True):
        assert np.array_equal(back, symbols)


def test_the_size_is_near_the_entropy():
    tables = tables_of(1000, 33)
    symbols = symbols_of(tables, 300)
    states, words = rans.encode(symbols, tables)
    shares = tables.counts[tables.kinds[:, None], symbols] / (1 << rans.BITS)
    bits = -np.log2(shares).sum()
    assert bits <= 8 * (states.nbytes + words.nbytes) <= 1.01 * bits + 8 * states.nbytes


def test_every_flipped_bit_is_seen():
    tables = tables_of(60, 17)
    symbols = symbols_of(tables, 5)
    states, words = rans.encode(symbols, tables)
    for array in (states, words):
        for bit in range(8 * array.nbytes):
            raw = bytearray(array.tobytes())
            raw[bit // 8] ^= 1 << bit % 8
            broken = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
            code = (broken, words) if array is states else (states, broken)
            try:
                (back,) = rans.decode([code], tables)
            except DamagedError:
                continue
            assert np.array_equal(back, symbols) is False  # no end state can be equal: see below
            raise AssertionError(f"bit {bit} of {array.dtype} was not seen")


def test_a_code_that_is_cut_is_seen():
    tables = tables_of(60, 17)
    states, words = rans.encode(symbols_of(tables, 5), tables)
    with pytest.raises(DamagedError, match="too early"):
        rans.decode([(states, words[:-1])], tables)
    with pytest.raises(DamagedError, match="add up"):
        rans.decode([(states, np.append(words, words[-1:]))], tables)


def test_counts_are_whole():
    counts = rans.whole_counts(np.random.default_rng(0).random((20, 33)) ** 8 + 1e-12)
    assert counts.min() >= 1 and set(counts.sum(1).tolist()) == {1 << rans.BITS}
    kinds = np.zeros(3, np.uint8)
    with pytest.raises(ValueError, match="add up"):
        rans.Tables(counts[:, 1:], kinds)
    with pytest.raises(ValueError, match="there are 20 tables"):
        rans.Tables(counts, kinds + 20)


def test_what_is_never_expected_has_no_count():
    counts = rans.whole_counts(np.array([[0.0, 2.0, 1e-9, 0.0]]))
    assert counts.tolist() == [[0, (1 << rans.BITS) - 1, 1, 0]]
