"""torch.compile keeps a call whole: one operator forward, one backward, results and gradients those
of the eager call."""

import pytest
import torch
from torch import library

from fusedmoe.codec import encode
from fusedmoe.kernels import registered
from fusedmoe.nn import AdaTTSp
from fusedmoe.op import fusion_network
from fusedmoe.testing import Case, build, problem

TABLE = build("adatt_sp", 6, [[5, 4], [3]], 2, 2, activation="silu", towers=(3, 1))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mixing", [False, True])
def test_the_operators_are_registered_for_it(mixing, recompute):
    given = problem(Case(TABLE, 5), torch.float32)
    x, params = given.x.requires_grad_(), [p.requires_grad_() for p in given.params]
    # Without its run under AOT dispatch, which compares the buffers' padding too, and nobody writes
    # that; the tests below run it.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(
        registered.forward, (x, params, encode(TABLE), True, mixing, recompute, "triton"), test_utils=checks
    )


def test_a_compiled_layer_is_one_graph():
    module = AdaTTSp(8, [[8], [8]], 2, 2, backend="triton")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for rows in (5, 9):
        x = torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(rows)).requires_grad_()
        ours, plain = compiled(x), module(x)
        assert torch.equal(ours, plain)
        wanted = [x, *module.parameters()]
        for a, b in zip(
            torch.autograd.grad(ours.square().sum(), wanted),
            torch.autograd.grad(plain.square().sum(), wanted),
            strict=True,
        ):
            assert torch.equal(a, b)
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))


def test_mixing_weights_are_differentiable_in_it():
    given = problem(Case(TABLE, 5), torch.float32)
    params = [p.requires_grad_() for p in given.params]

    def loss(x):
        out, weights = fusion_network(x, params, TABLE, "triton", return_mixing_weights=True)
        return (out * given.d_out).sum() + sum((w * d).sum() for w, d in zip(weights, given.d_weights, strict=True))

    compiled = torch.compile(loss, backend="aot_eager")
    ours, plain = (torch.autograd.grad(f(given.x), params, allow_unused=True) for f in (compiled, loss))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
