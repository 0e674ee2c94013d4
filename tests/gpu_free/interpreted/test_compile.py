"""torch.compile keeps a call whole: one operator forward, one backward, results and gradients those
of the eager call."""

import pytest
import torch
from torch import library

from fusedmoe.activation import Activation
from fusedmoe.codec import encode
from fusedmoe.kernels import operator, registered
from fusedmoe.nn import AdaTTSp
from fusedmoe.op import fusion_network
from fusedmoe.outputs import Options
from fusedmoe.parts import Dropout, Expert, Level, Linear, Static, Unit, from_slots
from fusedmoe.table import Table
from fusedmoe.testing import Case, build, problem

from ...random_tables import start

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
        registered.forward, (x, params, encode(TABLE), True, mixing, recompute, "triton", None), test_utils=checks
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_the_operators_take_a_seed(recompute):
    """Results and gradients under torch.compile are those of eager calls with the same seed, and not with
    another one."""
    ops = (Linear(6), Dropout(0.4), Linear(6), Activation("tanh"), Dropout(0.3))
    table = Table(TABLE.inputs, (Level((Expert(from_slots(0), ops),), (Unit(static=Static((0,), (1.0,))),)),))
    given = start(table, 5, torch.float32)

    def run(seed, compiled):
        x, params = given.x.clone().requires_grad_(), [p.clone().requires_grad_() for p in given.params]

        def call(x, params, seed):
            return registered.forward(x, params, encode(table), True, False, recompute, "triton", seed)[0]

        out = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(x, params, seed)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *params])]

    eager = run(torch.tensor([3]), compiled=False)
    assert all(map(torch.equal, eager, run(torch.tensor([3]), compiled=True)))
    assert not torch.equal(eager[0], run(torch.tensor([4]), compiled=True)[0])
    x = given.x.clone().requires_grad_()
    options = Options("triton", mixing=False, recompute=recompute, tasks_apart=False)
    out, *_ = operator.run(x, given.params, table, options, torch.tensor([3]))
    assert torch.equal(out, eager[0]) and torch.equal(torch.autograd.grad(out.square().sum(), x)[0], eager[1])


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
