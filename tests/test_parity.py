"""Third link of the chain: every backend equals the eager reference, output, mixing weights and all
gradients by name."""

from functools import cache, partial

import pytest
import torch
from torch import Tensor

from fusedmoe.backends import BACKENDS as ROWS
from fusedmoe.backends import INTERPRETED
from fusedmoe.op import fusion_network
from fusedmoe.testing import (
    Case,
    assert_close,
    assert_parity,
    build,
    cases,
    eager,
    evaluate,
    expectation,
    problem,
    smoothed,
)

from .cuda_on_cpu.extension import KIND
from .random_tables import decided, leaning

CASES = cases()
# Those that take the tensors of these tests. One that cannot run here fails, with its reason.
# Kernels that are interpreted or emulated have a run of their own.
ALONE = "triton" if INTERPRETED else "cuda" if KIND else None
BACKENDS = [row.name for row in ROWS if (row.devices is None or "cpu" in row.devices) and ALONE in (None, row.name)]
# How one expert gets nearly all the weight of a gate.
DECISIONS = [(leaning, 8)] if ALONE else [(leaning, 8), (leaning, 16), (decided, 16), (decided, 256)]
STRIDED = (
    ["adatt_sp-odd"] if ALONE else sorted(name for name in CASES if name.endswith(("every_feature", "odd", "one_row")))
)
DTYPES = (torch.float32,) if ALONE else (torch.float32, torch.float64)


@cache
def expected(name: str, dtype: torch.dtype):
    """A problem and its expectation, worked out once for all backends."""
    given = problem(CASES[name], dtype)
    return given, expectation(given)


def fused(backend: str):
    """The operator on one backend, as `evaluate` takes a network."""
    return partial(fusion_network, backend=backend, return_mixing_weights=True)


def spread(tensor: Tensor) -> Tensor:
    """The same numbers with the first axis innermost and a gap after each number; NaN stands in the
    gaps."""
    wide = tensor.new_full((*tensor.shape[1:], tensor.shape[0], 2) if tensor.dim() else (2,), float("nan"))
    inner = wide[..., 0].movedim(-1, 0) if tensor.dim() else wide[0]
    return inner.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_parity(name, backend, dtype):
    given, wanted = expected(name, dtype)
    assert_close(evaluate(fused(backend), given), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STRIDED)
def test_parity_of_strided_tensors(name, backend):
    given, wanted = expected(name, torch.float32)
    assert_close(evaluate(fused(backend), given, spread), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["ple", "adatt_sp", "adatt", "cross_stitch"])
def test_parity_of_an_expanded_input(family, backend):
    """One x [B, D] for all slots, stride 0 over them, as leaf of autograd and as a view of one."""
    given = problem(Case(build(family, 9, [[5], [4]], 3, 2), 11), torch.float32)
    given = given._replace(x=given.x[:, :1].expand_as(given.x))
    assert_close(evaluate(fused(backend), given), expectation(given))

    def shared(network):
        return lambda x, params, table: network(x[:, None].expand(-1, table.inputs[0].slots, -1), params, table)

    given = given._replace(x=given.x[:, 0])
    assert_close(evaluate(shared(fused(backend)), given), expectation(given, shared(eager)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", ["expanded over rows", "expanded over units", "one number"])
def test_parity_of_an_expanded_upstream_gradient(backend, upstream):
    """`loss.sum().backward()` hands down strides of 0."""
    given, _ = expected("adatt_sp-odd", torch.float32)
    first = {
        "expanded over rows": given.d_out[:1],
        "expanded over units": given.d_out[:, :1],
        "one number": given.d_out[:1, :1, :1],
    }[upstream]
    given = given._replace(
        d_out=first.expand_as(given.d_out), d_weights=tuple(d[:1].expand_as(d) for d in given.d_weights)
    )
    x, *params = (t.clone().requires_grad_() for t in (given.x, *given.params))
    out, weights = fused(backend)(x, params, given.table)
    grads = torch.autograd.grad([out, *weights], [x, *params], [given.d_out, *given.d_weights], allow_unused=True)
    names = ["d_x", *(f"d_{p.name}" for p in given.table.parameters)]
    wanted = {name: value for name, value in expectation(given).items() if name in names}
    assert_close(dict(zip(names, grads, strict=True)), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ple-ragged"] if ALONE else ["every_feature", "mmoe-odd", "ple-ragged", "adatt-tiny"])
def test_parity_without_mixing_weights(name, backend):
    """The call that does not return mixing weights gives the same output, and gradients that take
    nothing from them."""
    given, _ = expected(name, torch.float32)
    given = given._replace(d_weights=tuple(map(torch.zeros_like, given.d_weights)))
    wanted = {name: value for name, value in expectation(given).items() if not name.startswith("weights")}

    def network(x, params, table):
        return fusion_network(x, params, table, backend=backend), ()

    assert_close(evaluate(network, given), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [2, 9, 64, 129] if ALONE else [2, 7, 8, 9, 16, 17, 31, 64, 129, 300])
def test_parity_of_every_kind_of_block(rows, backend):
    """Row counts around the blocks and vectors of the kernels."""
    given = problem(Case(build("ple", 24, [[33], [18]], 2, 2, activation="silu", towers=(9, 1)), rows), torch.float32)
    assert_close(evaluate(fused(backend), given), expectation(given))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 32, 47, 64, 100])
def test_parity_of_every_kind_of_width(width, backend):
    """Widths around the tiles of the kernels, as input, hidden and output width."""
    given = problem(
        Case(build("mmoe", width, [[width, width]], 2, 3, activation="tanh", gate_widths=(width,)), 21), torch.float32
    )
    assert_close(evaluate(fused(backend), given), expectation(given))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("decide", "by"), DECISIONS)
@pytest.mark.parametrize(
    "name", ["ple-ragged", "adatt_sp-odd"] if ALONE else ["every_feature", "mmoe-odd", "ple-ragged", "adatt_sp-odd"]
)
def test_parity_of_decided_gates(name, decide, by, backend):
    """Where one expert has nearly all the weight, the gradients of the gate are differences far
    smaller than what they are taken of."""
    given = decide(problem(CASES[name]._replace(table=smoothed(CASES[name].table)), torch.float32), by)
    assert_parity(fused(backend), given)
    # The loss that reaches a gate is large and the same for all experts, as when every expert has
    # learned the same: only its differences count.
    shifted = tuple(d + 100 for d in given.d_weights)
    assert_parity(fused(backend), given._replace(d_weights=shifted))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("widths", [[13], [20, 13]], ids=["one layer", "a hidden layer"])
def test_what_is_infinite_stays_where_it_reaches(widths, backend):
    """One task's x has an infinite number, which its experts' sigmoids end: the other task, which
    reads them too, has numbers, and so has its gate's gradient.

    Kernels add 0 times what stands beside a map's columns, which is NaN beside infinity.
    """
    given = problem(Case(build("adatt", 24, [widths], 2, 2, activation="sigmoid"), 19), torch.float32)
    given.x[3, 0, 5] = float("inf")
    given = given._replace(params=tuple(p.abs() for p in given.params))
    ours, plain = evaluate(fused(backend), given), evaluate(eager, given)
    assert (
        plain["out"][3, 1].isfinite().all()
        and not plain["out"][3, 0].isfinite().any()
        and plain["d_levels.0.gates.1.weight"].isfinite().all()
    )
    assert [
        name
        for name, value in plain.items()
        if value is not None and not torch.equal(ours[name].isfinite(), value.isfinite())
    ] == []
    for name in ("out", "d_levels.0.gates.1.weight"):
        torch.testing.assert_close(ours[name].nan_to_num(), plain[name].nan_to_num())
    # Without gradients hidden layers need no memory of their own, and take another way.
    with torch.no_grad():
        assert torch.equal(fused(backend)(*given[1:3], given.table)[0].isfinite(), plain["out"].isfinite())
