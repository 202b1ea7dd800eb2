"""Linear layers on the CPU: the products of torch's own by faster kernels, and torch's own wherever they learn."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear as slow

from latentmem.decoder import linear
from latentmem.decoder.linear import FEW, Linear
from latentmem.testing import tiny_model

pytestmark = pytest.mark.skipif(linear._one_dnn is None, reason="this torch has no oneDNN")


def made(inside, outside, bias, dtype=torch.float32):
    torch.manual_seed(inside + outside)
    layer = nn.Linear(inside, outside, bias=bias, dtype=dtype).requires_grad_(False)
    layer.__class__ = Linear
    return layer


@pytest.fixture
def fast(monkeypatch):
    """Counts which of the faster ways is taken."""
    taken = []
    one_dnn, bmm = linear._one_dnn, torch.bmm
    monkeypatch.setattr(linear, "_one_dnn", lambda *args: (taken.append("one_dnn"), one_dnn(*args))[1])
    monkeypatch.setattr(torch, "bmm", lambda *args: (taken.append("halves"), bmm(*args))[1])
    return taken


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, FEW, FEW + 1, 20, 129])
@pytest.mark.parametrize(("inside", "outside"), [(8, 6), (64, 192), (576, 64), (7, 5), (1, 1), (96, 1)])
def test_it_equals_torchs_own(fast, inside, outside, rows, bias):
    layer = made(inside, outside, bias)
    x = torch.randn(rows, inside)
    expected = slow(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    for given in (x, x[None], x.view(rows, 1, inside), torch.stack([x, x], 1)[:, 0], x.t().contiguous().t()):
        fast.clear()
        y = layer(given)
        assert fast == (["halves"] if rows <= FEW and outside % 2 == 0 else ["one_dnn"])
        assert y.shape == (*given.shape[:-1], outside) and y.dtype == torch.float32
        assert (y.view(rows, outside) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_a_rows_bits_do_not_depend_on_the_other_rows():
    layer = made(64, 192, True)
    for rows in (2, FEW, FEW + 1, 40):
        x = torch.randn(rows, 64)
        other = torch.cat([x[:1], torch.randn(rows - 1, 64)])
        assert torch.equal(layer(x)[0], layer(other)[0])


def test_gradients_are_torchs_own(fast):
    layer, x = made(8, 6, True), torch.randn(3, 8, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, slow(x, layer.weight, layer.bias)) and y.requires_grad
    layer.weight.requires_grad_()
    assert layer(x.detach()).requires_grad and not fast
    with torch.no_grad():
        assert not layer(x).requires_grad and fast == ["halves"]


def test_a_bias_learns_alone_and_gradients_are_taken_forwards(fast):
    layer, x = made(8, 6, True), torch.randn(20, 8)
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((6,), 20.0)) and not fast
    layer.requires_grad_(False)
    for rows in (1, 20):
        value, slope = torch.func.jvp(layer, (x[:rows],), (torch.ones(rows, 8),))
        assert (slope - layer.weight.sum(1)).abs().max() < 1e-5 and value.shape == (rows, 6) and not fast


def test_other_dtypes_autocast_and_no_rows_are_torchs_own(fast):
    half = made(8, 6, True, torch.bfloat16)
    x = torch.randn(20, 8)
    assert torch.equal(half(x.bfloat16()), slow(x.bfloat16(), half.weight, half.bias))
    layer = made(8, 6, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(torch.zeros(2, 0, 8)).shape == (2, 0, 6) and not fast
    for wrong in (x[:, :7], x[:2, :4]):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(wrong)
    assert layer.to("meta")(x.to("meta")).device.type == "meta" and not fast


def test_a_model_gives_the_same_logits_and_can_be_changed_back(monkeypatch):
    monkeypatch.setattr(linear.platform, "machine", lambda: "x86_64")
    model = tiny_model("llama").eval().requires_grad_(False)
    names = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    ids = torch.arange(3, 23)[None]
    before = model(ids).logits
    linear.choose(model)
    assert [name for name, part in model.named_modules() if type(part) is Linear] == names and len(names) > 10
    assert all(
        (model(some).logits - before[:, : some.shape[1]]).abs().max() < 1e-5 for some in (ids, ids[:, :1], ids[:, :3])
    )
    again = copy.deepcopy(model)
    linear.undo(again)
    assert torch.equal(again(ids).logits, before)
    assert not any(type(part) is Linear for part in again.modules()) and type(model.lm_head) is Linear


def test_other_machines_keep_torchs_own(monkeypatch):
    monkeypatch.setattr(linear.platform, "machine", lambda: "aarch64")
    layer = nn.Sequential(nn.Linear(2, 2))
    linear.choose(layer)
    assert type(layer[0]) is nn.Linear
