"""Coding keys and values: small errors where the answers depend on them, the same bits wherever a token stands."""

import numpy as np
import pytest
import torch

import latentmem
from latentmem import container
from latentmem.coding.coder import Code, Coder
from latentmem.errors import DamagedError
from latentmem.testing import tiny_model
from latentmem.train import calibration


@pytest.fixture(scope="module")
def tiny_llm():
    return latentmem.MemoryModel(tiny_model(), first_token=1)


@pytest.fixture(scope="module")
def calibrated(tiny_llm):
    seen = calibration.Calibration(tiny_llm)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        texts = [torch.randint(3, 100, (n,), generator=generator) for n in (40, 17, 60)]
        seen.see(texts, torch.randint(3, 100, (30,), generator=generator))
    return seen


@pytest.fixture(scope="module")
def coder(calibrated):
    return calibration.fit(calibrated, 1e-3, {"model": "tiny"})


def written(llm, n, seed):
    ids = torch.randint(3, 100, (n,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return ids, llm.decoder.project_all(llm.new_slots(llm.empty(N=256, K=128), ids))


def nothing(kv):
    return [(k[:, :, :0], v[:, :, :0]) for k, v in kv]


def test_decoded_keys_and_values_are_near(tiny_llm, coder):
    ids, kv = written(tiny_llm, 50, seed=9)
    code, back = coder.encode(ids, kv)
    for (k, v), (dk, dv) in list(zip(kv, back, strict=True))[1:]:
        assert dk.shape == k.shape and dv.shape == v.shape
        assert (dv - v).norm() < 0.5 * v.norm()
    assert code.nbytes < 0.5 * sum(k.nbytes + v.nbytes for k, v in kv)


def test_a_smaller_step_is_nearer(tiny_llm, calibrated):
    ids, kv = written(tiny_llm, 50, seed=9)
    errors = []
    for step in (1e-2, 1e-3, 1e-4):
        coder = calibration.fit(calibrated, step, {})
        _, back = coder.encode(ids, kv)
        errors.append(sum(((a - b).norm() ** 2).item() for (a, _), (b, _) in list(zip(kv, back, strict=True))[1:]))
    assert errors[0] > errors[1] > errors[2]


def test_coding_again_changes_nothing(tiny_llm, coder):
    ids, kv = written(tiny_llm, 70, seed=4)
    code, back = coder.encode(ids, kv)
    again, _ = coder.encode(ids, [kv[0], *back[1:]])
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(code.tensors.values(), again.tensors.values(), strict=True)
    )


def test_a_write_goes_on_with_what_a_reader_decodes(tiny_llm, coder):
    for n in (1, 70, 128):
        ids, kv = written(tiny_llm, n, seed=n)
        code, mine = coder.encode(ids, kv)
        theirs = coder.decode([code], nothing(kv))
        for (k, v), (tk, tv) in list(zip(mine, theirs, strict=True))[1:]:
            assert torch.equal(k, tk) and torch.equal(v, tv)


def test_tokens_are_the_same_bits_in_any_company(tiny_llm, coder):
    codes = [coder.encode(*written(tiny_llm, n, seed=n))[0] for n in (20, 3, 101)]
    like = nothing(written(tiny_llm, 1, seed=0)[1])
    together, at = coder.decode(codes, like), 0
    for code in codes:
        alone = coder.decode([code], like)
        for (k, v), (ak, av) in list(zip(together, alone, strict=True))[1:]:
            assert torch.equal(k[:, :, at : at + len(code)], ak) and torch.equal(v[:, :, at : at + len(code)], av)
        at += len(code)


def test_a_file_gives_the_same_coder(tmp_path, tiny_llm, coder):
    coder.save(tmp_path / "coder.safetensors")
    other = Coder.load(tmp_path / "coder.safetensors")
    ids, kv = written(tiny_llm, 30, seed=5)
    code, _ = coder.encode(ids, kv)
    assert other.identity == coder.identity and other.about == coder.about
    assert other.sketch.layer == coder.sketch.layer == tiny_llm.retriever.layer_sketched
    assert all(map(torch.equal, other.sketch.tensors.values(), coder.sketch.tensors.values()))
    assert all(map(torch.equal, other.encode(ids, kv)[0].tensors.values(), code.tensors.values()))
    for (k, v), (ok, ov) in zip(
        coder.decode([code], nothing(kv))[1:], other.decode([code], nothing(kv))[1:], strict=True
    ):
        assert torch.equal(k, ok) and torch.equal(v, ov)


def test_damage_is_said(tmp_path, tiny_llm, coder):
    ids, kv = written(tiny_llm, 30, seed=5)
    code, _ = coder.encode(ids, kv)
    words = code.words.clone()
    words[len(words) // 2] ^= 1
    with pytest.raises(DamagedError, match="damaged"):
        coder.decode([Code(code.ids, code.states, words, code.escapes)], nothing(kv))
    with pytest.raises(DamagedError, match="large coefficients"):
        coder.decode([Code(code.ids, code.states, code.words, torch.zeros(99, dtype=torch.int32))], nothing(kv))
    with pytest.raises(DamagedError, match="no such file"):
        Coder.load(tmp_path / "none")
    data = bytearray(coder.to_bytes())
    with pytest.raises(DamagedError):
        Coder.from_bytes(data[:-8], "a coder")


def test_sums_go_on_from_a_file(tmp_path, tiny_llm, calibrated):
    calibrated.sums.save(tmp_path / "sums")
    other = calibration.Calibration(tiny_llm, calibration.Sums.load(tmp_path / "sums"))
    assert other.sums.tokens == calibrated.sums.tokens and other.sums.memories == 4
    assert (
        calibration.fit(other, 1e-3, {"model": "tiny"}).identity
        == calibration.fit(calibrated, 1e-3, {"model": "tiny"}).identity
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_keys_and_values_that_no_coefficient_holds_are_refused(tiny_llm, coder, number):
    ids, kv = written(tiny_llm, 30, seed=5)
    for side in range(2):
        pair = [part.clone() for part in kv[1]]
        pair[side][0, 0, 7, 1] = number
        with pytest.raises(ValueError, match="not finite, or too large for this coder"):
            coder.encode(ids, [kv[0], tuple(pair), *kv[2:]])


def test_an_update_that_is_not_there_is_damage(tiny_llm):
    memory = tiny_llm.write_ids(tiny_llm.empty(N=8, K=4, form="int8"), [5, 6, 7, 8])
    for numbers in (memory.slots[:, :, 0] + (1 << 32), memory.slots[:, :, 0] - (1 << 32)):
        with pytest.raises(DamagedError, match="does not hold its update"):
            tiny_llm.retriever.decoding.kv(memory, numbers)


def test_escapes_come_back(tiny_llm, coder):
    ids, kv = written(tiny_llm, 30, seed=5)
    large = [kv[0], *((100 * k, 100 * v) for k, v in kv[1:])]
    code, back = coder.encode(ids, large)
    assert len(code.escapes) > 0 and np.isfinite(code.escapes.numpy()).all()
    again, _ = coder.encode(ids, [kv[0], *back[1:]])
    assert torch.equal(again.escapes, code.escapes)


def test_sketches_know_the_text_that_was_seen(tiny_llm, coder):
    sketch, memory = coder.sketch, tiny_llm.empty(N=256, K=128)
    slots = tiny_llm.new_slots(memory, torch.arange(3, 93))[sketch.layer]
    directions = torch.nn.functional.normalize(tiny_llm.decoder.normed(sketch.layer, slots), dim=-1)
    sketches = sketch.of(directions)
    assert sketches.shape == (90, sketch.bits // 8) and sketch.bits == tiny_llm.decoder.d == 32
    assert (sketch.likeness(directions, sketches).argmax(1) == torch.arange(90)).float().mean() > 0.8


def test_a_sketch_of_another_model_is_damage(coder):
    tensors, header = coder._parts()
    tensors["sketch.mean"] = torch.zeros(7)
    with pytest.raises(DamagedError, match="a sketch has"):
        Coder.from_bytes(bytearray(container.to_bytes(tensors, header)), "a coder")
