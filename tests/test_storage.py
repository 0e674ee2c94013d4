"""Layers over tensors without memory: an error that says which, never a crash; and zeros that never
had any."""

from contextlib import nullcontext

import pytest
import torch

import fusedmoe
from fusedmoe.families import adatt_sp
from fusedmoe.functional import fusion_network
from fusedmoe.nn import AdaTTSp

from .test_backward import BYTES, free, halve

TABLE = adatt_sp(12, [[8], [8]], 2, 2, towers=(4, 1))


def layer() -> AdaTTSp:
    return AdaTTSp(12, [[8], [8]], 2, 2).eval()


@pytest.mark.parametrize("lose", [free, halve])
def test_layers(lose):
    module = layer()
    lose(next(module.parameters()))
    with pytest.raises(ValueError, match=BYTES):
        module(torch.randn(5, 2, 12))


@pytest.mark.parametrize("lose", [free, halve])
@pytest.mark.parametrize("what", ["x", "parameter", "packed"])
def test_frozen_layers(what, lose):
    module, x = layer(), torch.randn(5, 2, 12)
    fusedmoe.freeze(module)
    lose({"x": x, "parameter": next(module.parameters()), "packed": module._binding.frozen.packed}[what])
    thawed = pytest.warns(UserWarning, match="no longer frozen") if what == "parameter" else nullcontext()
    with torch.inference_mode(), thawed, pytest.raises((ValueError, RuntimeError), match=BYTES):
        module(x)


def test_zeros_that_have_no_memory_are_zeros():
    """`torch._efficientzerotensor`, which forward-mode differentiation makes: eager computes with
    it."""
    x, params = torch.randn(5, 2, 12), [torch.randn(p.shape).requires_grad_() for p in TABLE.parameters]
    zeros = torch._efficientzerotensor
    torch.testing.assert_close(
        fusion_network(zeros(x.shape), params, TABLE, "cpu"), fusion_network(torch.zeros_like(x), params, TABLE, "cpu")
    )
    given = [zeros(p.shape) if i == 2 else p for i, p in enumerate(params)]
    expected = [torch.zeros_like(p) if i == 2 else p for i, p in enumerate(params)]
    torch.testing.assert_close(fusion_network(x, given, TABLE, "cpu"), fusion_network(x, expected, TABLE, "cpu"))
    out = fusion_network(x, params, TABLE, "cpu")
    out.backward(zeros(out.shape))
    assert all(p.grad is not None and not p.grad.any() for p in params)
    frozen = layer()
    before = frozen(torch.zeros(5, 2, 12))
    fusedmoe.freeze(frozen)
    with torch.inference_mode():
        assert torch.equal(frozen(zeros((5, 2, 12))), before)
