"""Helpers of a thread that computes are let go, and come back."""

from pathlib import Path

import torch

from latentmem.serve.engine import engine


def test_helpers_that_were_released_come_back():
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    before = a @ b
    assert all(pause(2) == 0 for pause in engine._pauses())
    engine.release_threads()
    assert torch.equal(a @ b, before)
    shipped = list((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    assert len(engine._pauses()) >= (len(shipped) > 0)
