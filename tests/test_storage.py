"""Tensors without memory, and saved tensors of another layout: an error that says which, or the same result; never a crash."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import fusedmoe
from fusedmoe.families import adatt_sp
from fusedmoe.functional import fusion_network
from fusedmoe.nn import AdaTTSp

TABLE = adatt_sp(12, [[8], [8]], 2, 2, towers=(4, 1))
BYTES = "expected a storage of [0-9]+ bytes or more, got one of [0-9]+"


def inputs() -> tuple[Tensor, list[Tensor]]:
    return torch.randn(5, 2, 12), [torch.randn(p.shape).requires_grad_() for p in TABLE.parameters]


def free(tensor: Tensor) -> None:
    """What FSDP does to a parameter that it has gathered."""
    tensor.untyped_storage().resize_(0)


def halve(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)


def layer() -> AdaTTSp:
    return AdaTTSp(12, [[8], [8]], 2, 2).eval()


@pytest.mark.parametrize("lose", [free, halve])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
class TestTheOperator:
    def test_x(self, backend, lose):
        x, params = inputs()
        lose(x)
        with pytest.raises(ValueError, match=f"x: {BYTES}"):
            fusion_network(x, params, TABLE, backend)

    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("number", range(len(TABLE.parameters)), ids=[p.name for p in TABLE.parameters])
    def test_a_parameter(self, backend, lose, number, gradients):
        """A bias too: by its address alone one without memory looks like none."""
        x, params = inputs()
        lose(params[number])
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=f"params, {TABLE.parameters[number].name}: {BYTES}"):
            fusion_network(x, params, TABLE, backend)


@pytest.mark.parametrize("lose", [free, halve])
def test_backward(lose):
    """x, a parameter and the upstream gradient, freed after the forward."""
    for what in ("x", "params", "d_out"):
        x, params = inputs()
        out = fusion_network(x, params, TABLE, "cpu")
        d_out = torch.ones_like(out)
        lose({"x": x, "params": params[2], "d_out": d_out}[what])
        with pytest.raises(RuntimeError, match=rf"{what}(\[2\])?: {BYTES}"):
            out.backward(d_out)


@pytest.mark.parametrize("lose", [free, halve])
def test_what_forward_saved(lose):
    x, params = inputs()

    def unpack(saved: Tensor) -> Tensor:
        if saved.dim() == 1 and saved.numel() > 100:
            saved = saved.clone()
            lose(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
        out = fusion_network(x, params, TABLE, "cpu")
        with pytest.raises(RuntimeError, match=f"saved: {BYTES}"):
            out.sum().backward()


@pytest.mark.parametrize("lose", [free, halve])
def test_layers(lose):
    module = layer()
    lose(next(module.parameters()))
    with pytest.raises(ValueError, match=BYTES):
        module(torch.randn(5, 2, 12))


@pytest.mark.parametrize("lose", [free, halve])
def test_frozen_layers(lose):
    for what in ("x", "parameter", "packed"):
        module, x = layer(), torch.randn(5, 2, 12)
        fusedmoe.freeze(module)
        lose({"x": x, "parameter": next(module.parameters()), "packed": module._binding.frozen.packed}[what])
        with torch.inference_mode(), pytest.raises((ValueError, RuntimeError), match=BYTES), pytest.warns() if what == "parameter" else nullcontext():
            module(x)


def test_zeros_that_have_no_memory_are_zeros():
    """`torch._efficientzerotensor`, which forward-mode differentiation makes: eager computes with it."""
    x, params = inputs()
    zeros = torch._efficientzerotensor
    torch.testing.assert_close(fusion_network(zeros(x.shape), params, TABLE, "cpu"), fusion_network(torch.zeros_like(x), params, TABLE, "cpu"))
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


def strided(saved: Tensor) -> Tensor:
    """The same numbers, every second one of a larger tensor."""
    wide = saved.new_full((*saved.shape, 2), float("nan"))
    wide[..., 0] = saved.detach()
    return wide[..., 0]


def shifted(saved: Tensor) -> Tensor:
    """The same numbers, contiguous at an odd address."""
    long = saved.new_empty(saved.numel() + 1)
    long[1:] = saved.detach().flatten()
    return long[1:].view(saved.shape)


def reversed_layout(saved: Tensor) -> Tensor:
    """The same numbers, the first dimension the nearest."""
    order = list(range(saved.dim()))[::-1]
    return saved.detach().permute(order).contiguous().permute(order)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [strided, shifted, reversed_layout])
def test_hooks_of_saved_tensors_may_change_the_layout(layout: Callable[[Tensor], Tensor], dtype, expanded, recompute):
    torch.manual_seed(0)
    x = torch.randn(37, 1, 12).expand(-1, 2, -1) if expanded else torch.randn(37, 2, 12)
    x, params = x.to(dtype), [p.detach().to(dtype).requires_grad_() for p in inputs()[1]]
    x = (x[:, :1].expand(-1, 2, -1) if expanded else x).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out, weights = fusion_network(x, params, TABLE, "cpu", return_mixing_weights=True, recompute=recompute)
        return torch.autograd.grad(out.float().square().sum() + sum(w.float().square().sum() for w in weights), [x, *params])

    expected = step()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, layout):
        got = step()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
