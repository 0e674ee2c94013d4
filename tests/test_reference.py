"""Second link of the chain: the reference's hand-derived backward equals PyTorch's autograd of its
forward."""

import math

import pytest
import torch

from fusedmoe.activation import DEFAULT_PARAMETER, PARAMETRIC, Activation
from fusedmoe.families import mmoe, ple
from fusedmoe.parts import Expert, Gate, Input, Level, Linear, Static, Unit, from_slots
from fusedmoe.reference.activation import apply, pullback
from fusedmoe.reference.operator import backward, forward
from fusedmoe.table import Table
from fusedmoe.testing import Case, assert_close, bound, cases, error, evaluate, expectation, problem

from . import oracle

CASES = cases()


class Pair(torch.autograd.Function):
    """The reference's forward with its own backward in place of autograd's."""

    @staticmethod
    def forward(ctx, table, x, *params):
        ctx.table = table
        ctx.save_for_backward(x, *params)
        out, weights = forward(x, params, table)
        return out, *weights

    @staticmethod
    def backward(ctx, d_out, *d_weights):
        x, *params = ctx.saved_tensors
        d_x, d_params = backward(x, params, ctx.table, d_out, d_weights)
        return None, d_x, *d_params


def by_hand(x, params, table):
    """The pair as a network: output arranged for the tasks, mixing weights."""
    out, *weights = Pair.apply(table, x, *params)
    if table.graph.tasks:
        out = torch.stack([torch.cat([out[:, u] for u in units], -1) for units in table.graph.tasks], 1)
    return out, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(CASES))
def test_backward_equals_autograd(name, dtype):
    given = problem(CASES[name], dtype)
    assert_close(evaluate(by_hand, given), expectation(given))


@pytest.mark.parametrize(
    "name", ["every_feature", "mmoe-tiny", "ple-tiny", "adatt-tiny", "cross_stitch-tiny", "omoe-one_expert"]
)
def test_gradcheck_twice(name):
    given = problem(Case(CASES[name].table, 2))
    x, *params = (t.requires_grad_() for t in (given.x, *given.params))

    def network(x, *params):
        out, weights = by_hand(x, params, given.table)
        return out, *(w for w in weights if w.requires_grad)

    assert torch.autograd.gradcheck(network, (x, *params), fast_mode=True)
    assert torch.autograd.gradgradcheck(network, (x, *params), fast_mode=True)


def test_weights_without_gradient():
    """None in place of an upstream gradient of mixing weights means zero."""
    given = problem(CASES["every_feature"])
    zeros = [torch.zeros_like(d) for d in given.d_weights]
    d_out = torch.ones_like(forward(given.x, given.params, given.table)[0])
    with_none = backward(given.x, given.params, given.table, d_out, [None] * len(zeros))
    with_zeros = backward(given.x, given.params, given.table, d_out, zeros)
    assert torch.equal(with_none[0], with_zeros[0])
    for p, a, b in zip(given.table.parameters, with_none[1], with_zeros[1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b), p.name


def test_gradient_of_weights_outside_reads_is_ignored():
    given = problem(CASES["ple-odd"])
    table = given.table
    d_out = torch.zeros_like(forward(given.x, given.params, table)[0])
    outside = [torch.full_like(d, math.nan) for d in given.d_weights]
    for level, d in zip(table.levels, outside, strict=True):
        for u, unit in enumerate(level.units):
            d[:, u, list(unit.reads)] = 0.0
    d_x, d_params = backward(given.x, given.params, table, d_out, outside)
    assert not d_x.any()
    assert not any(d.any() for d in d_params if d is not None)


@pytest.mark.parametrize("name", ["every_feature", "adatt-odd", "mmoe-empty_gate", "cgc-empty_gate"])
def test_gradients_are_none_exactly_where_nothing_depends(name):
    given = problem(CASES[name])
    out, weights = forward(given.x, given.params, given.table)
    _, d_params = backward(given.x, given.params, given.table, torch.ones_like(out), [None] * len(weights))
    assert [d is not None for d in d_params] == [p.live for p in given.table.parameters]


def test_dead_units_have_no_weights():
    given = problem(CASES["every_feature"])
    _, weights = forward(given.x, given.params, given.table)
    for level, w in zip(given.table.graph.levels, weights, strict=True):
        for u, unit in enumerate(level.units):
            assert bool(w[:, u].any()) == (unit.computed and len(unit.reads) > 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(value):
    given = problem(Case(CASES["adatt-odd"].table, 6))
    x = given.x.clone()
    x[2, 0, 3] = value
    clean = evaluate(by_hand, given)
    dirty = evaluate(by_hand, given._replace(x=x))
    others = [0, 1, 3, 4, 5]
    assert not dirty["out"][2].isfinite().all()
    for name in ("out", "d_x", "weights.0", "weights.1"):
        assert torch.equal(dirty[name][others], clean[name][others]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_the_units_that_read_it(value):
    table = ple(5, [[4]], 2, 1, 1)
    given = problem(Case(table, 3))
    params = [p.clone() for p in given.params]
    # Expert 0 is task 0's own: task 1 reads experts 1 and 2.
    params[0][:] = value
    clean = evaluate(by_hand, given)
    dirty = evaluate(by_hand, given._replace(params=tuple(params)))
    assert not dirty["out"][:, 0].isfinite().all()
    assert torch.equal(dirty["out"][:, 1], clean["out"][:, 1])
    for name in ("d_levels.0.experts.1.0.weight", "d_levels.0.gates.1.weight", "d_levels.0.gates.1.bias"):
        assert torch.equal(dirty[name], clean[name]), name


def test_softmax_over_nothing_is_zero():
    given = problem(CASES["mmoe-empty_gate"])
    out, (weights,) = forward(given.x, given.params, given.table)
    assert not out[:, 0].any()
    assert not weights[:, 0].any()
    ones = torch.ones(len(weights), dtype=weights.dtype)
    assert error(weights[:, 1].sum(-1), ones) <= bound(0.0, ones, ones.dtype)


def test_static_weights_without_a_gate_mix_alone():
    units = (Unit(static=Static((0, 2), (2.0, -1.0))), Unit(Gate((from_slots(0),), (1,)), Static((1,), (0.5,))))
    table = Table((Input(1, 3),), (Level((Expert(from_slots(0), (Linear(2),)),) * 3, units),))
    given = problem(Case(table, 4))
    y = [given.x[:, 0] @ given.params[2 * e].T + given.params[2 * e + 1] for e in range(3)]
    out, (weights,) = forward(given.x, given.params, table)
    expected = torch.stack([2 * y[0] - y[2], 1.5 * y[1]], 1)
    assert error(out, expected) <= bound(0.0, expected, out.dtype)
    assert torch.equal(weights[0], torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.5, 0.0]], dtype=weights.dtype))


def test_no_rows():
    given = problem(Case(mmoe(3, [[2]], 2, 2), 0))
    out, (weights,) = forward(given.x, given.params, given.table)
    d_x, d_params = backward(given.x, given.params, given.table, out, [weights])
    assert (out.shape, weights.shape, d_x.shape) == ((0, 2, 2), (0, 2, 2), (0, 1, 3))
    assert all(d.shape == p.shape and not d.any() for d, p in zip(d_params, given.table.parameters, strict=True))


POINTS = [0.0, -0.0, 1e-9, -1e-9, 0.3, -0.7, 2.0, -3.0, 8.0, -8.0, 19.9, 20.1]
KINDS = [
    Activation(name, parameter)
    for name, usual in DEFAULT_PARAMETER.items()
    for parameter in ((usual, 0.3, -0.2) if name in PARAMETRIC else (usual,))
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_activation_and_its_derivatives(kind):
    z = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    y = apply(kind, z)
    expected = torch.tensor(
        [oracle.ACTIVATIONS[kind.name](value, kind.parameter) for value in POINTS], dtype=torch.float64
    )
    assert error(y, expected) <= bound(0.0, expected, y.dtype)
    d = torch.linspace(-1, 2, len(POINTS), dtype=torch.float64)
    (once,) = torch.autograd.grad(y, z, d, create_graph=True)
    ours = pullback(kind, z, d)
    assert error(ours, once) <= bound(0.0, once, y.dtype)
    if kind.name not in ("identity", "relu", "leaky_relu"):
        (twice,) = torch.autograd.grad(once, z, torch.ones_like(z))
        (ours_twice,) = torch.autograd.grad(ours, z, torch.ones_like(z))
        # elu has no second derivative at 0.
        assert error(ours_twice[2:], twice[2:]) <= bound(0.0, twice, y.dtype)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_activation_passes_what_is_not_finite_as_autograd_does(kind):
    z = torch.tensor([math.nan, math.inf, -math.inf, -1.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = apply(kind, z)
    assert y[0].isnan()
    for d in (torch.ones_like(z), torch.full_like(z, math.nan)):
        (expected,) = torch.autograd.grad(y, z, d, retain_graph=True)
        # PyTorch's elu'(NaN) is NaN in its vector code and 1 in its scalar code, by the place in
        # the tensor; ours is NaN.
        known = z.isfinite() | z.isinf() if kind.name == "elu" else torch.ones_like(z, dtype=torch.bool)
        assert torch.equal(pullback(kind, z, d)[known].isnan(), expected[known].isnan())
