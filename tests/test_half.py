"""float16 on the cpu backend: stored in 16 bits, computed in 32, rounded once."""

from functools import partial

import pytest
import torch
from torch import library

from fusedmoe.backends import INTERPRETED
from fusedmoe.codec import encode
from fusedmoe.dtype import row
from fusedmoe.families import ple, single_task
from fusedmoe.op import fusion_network
from fusedmoe.testing import (
    NEIGHBOURS,
    Case,
    assert_close,
    bound,
    cases,
    eager,
    error,
    evaluate,
    expectation,
    neighbour,
    problem,
    smoothed,
)

from .cuda_on_cpu.extension import KIND

CASES = cases()
BACKENDS = ("triton",) if INTERPRETED else ("cuda",) if KIND else ("cpu", "reference")
HALF, SINGLE = torch.float16, torch.float32
FORWARD, BACKWARD = torch.ops.fusedmoe.network_cpu, torch.ops.fusedmoe.network_cpu_backward
fused = partial(fusion_network, return_mixing_weights=True)


def outputs(given, text: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """The operator's outputs and all gradients, computed from the same float16 numbers."""
    x, *params = (t.to(HALF).to(dtype) for t in (given.x, *given.params))
    out, weights, saved = FORWARD(x, params, text, True, True, None)
    assert saved.dtype == SINGLE
    generator = torch.Generator().manual_seed(0)
    d_out, d_weights = (torch.randn(t.shape, generator=generator).to(HALF).to(dtype) for t in (out, weights))
    needs = "1" + "".join(str(int(p.live)) for p in given.table.parameters)
    return [out, weights, *BACKWARD(d_out, d_weights, x, params, saved, text, needs, None)]


@pytest.mark.parametrize("name", sorted(CASES))
def test_half_is_the_single_result_rounded_once(name):
    """Bit for bit, outputs and every gradient."""
    given = problem(CASES[name], SINGLE)
    text = encode(given.table)
    for half, single in zip(outputs(given, text, HALF), outputs(given, text, SINGLE), strict=True):
        assert half.dtype == HALF and torch.equal(half, single.to(HALF))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_parity(name, backend):
    """Elementwise, without kinks: in float16 nearly every row has a pre-activation within rounding
    of one."""
    given = problem(CASES[name]._replace(table=smoothed(CASES[name].table)), HALF)
    assert_close(evaluate(partial(fused, backend=backend), given), expectation(given))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(name for name in CASES if name.endswith(("every_feature", "odd", "one_row"))))
def test_parity_in_the_norm(name, backend):
    """With kinks: the same rule for the norms of outputs and gradients, on which one row on the
    other side of a kink weighs little.

    Whether a row crosses a kink is a matter of luck: so there are many rows, and plain torch's
    error is the largest of a few draws, as in `testing.expectation`.
    """
    given = problem(CASES[name]._replace(rows=400), SINGLE).to(HALF)
    draws = [given, *(neighbour(given, seed) for seed in range(NEIGHBOURS))]
    runs = [(evaluate(eager, draw), evaluate(eager, draw.to(torch.float64))) for draw in draws]
    ours, (_, truth) = evaluate(partial(fused, backend=backend), given), runs[0]
    for key, exact in truth.items():
        if exact is None:
            assert ours[key] is None, key
            continue
        off_plain = max(float((plain[key].double() - own[key]).norm()) for plain, own in runs)
        assert float((ours[key].double() - exact).norm()) <= 2 * off_plain + 8 * row(HALF).roundoff * float(
            exact.norm()
        ), key


def test_overflow_and_nan_are_those_of_a_cast():
    """What float16 cannot hold is infinite in the output alone: inside, it is a number like others."""
    table = single_task(2, [[2, 1]], 1, activation="identity")
    x = torch.tensor([[300.0, 0.0], [float("nan"), 0.0], [1e-4, 0.0]], dtype=HALF)[:, None]
    wide, back = torch.tensor([[300.0, 0.0], [0.0, 0.0]], dtype=HALF), torch.tensor([[1.0, 0.0]], dtype=HALF)
    narrow = torch.tensor([[2.0**-10, 0.0]], dtype=HALF)
    zeros = [torch.zeros(2, dtype=HALF), torch.zeros(1, dtype=HALF)]
    out = fusion_network(x, [wide, zeros[0], back, zeros[1]], table, "cpu").flatten()
    assert out[0] == float("inf") and out[1].isnan() and out[2].isfinite()
    assert fusion_network(x, [wide, zeros[0], narrow, zeros[1]], table, "cpu").flatten()[0] == 300 * 300 * 2.0**-10


@pytest.mark.parametrize("name", ["every_feature", "ple-tiny"])
def test_the_operator_is_registered_for_it(name):
    given = problem(CASES[name], SINGLE).to(HALF)
    x, params = given.x.requires_grad_(), [p.requires_grad_() for p in given.params]
    library.opcheck(FORWARD.default, (x, params, encode(given.table), True, True, None))


def test_second_derivatives_are_computed_in_single():
    table = ple(4, [[3]], 2, 1, 1, activation="silu")
    given = problem(Case(table, 5), HALF)

    def penalty(dtype):
        x, *params = (t.to(dtype).requires_grad_() for t in (given.x, *given.params))
        out = fusion_network(x, params, table, "cpu")
        grads = torch.autograd.grad(out, params, given.d_out.to(dtype), create_graph=True)
        return torch.autograd.grad(grads, x, [torch.ones_like(g) for g in grads])[0]

    half, single = penalty(HALF), penalty(SINGLE)
    assert half.dtype == HALF
    assert error(half, single) <= bound(0.0, single, HALF)


def test_a_parameter_of_another_dtype_is_refused():
    table = ple(4, [[3]], 2, 1, 1)
    given = problem(Case(table, 5), SINGLE)
    params = [given.params[0], *(p.half() for p in given.params[1:])]
    with pytest.raises(TypeError, match=r"weight: expected torch.float16, the dtype of x, got torch.float32"):
        fusion_network(given.x.half(), params, table, "cpu")
    with pytest.raises(RuntimeError, match=r"params\[[0-9]+\]: expected dtype"):
        FORWARD(given.x.half(), params, encode(table), False, False, None)
