"""No gradient is less accurate than plain PyTorch's: the rule over random tables that are wide,
deep, and have gates which are nearly decided, and for what those showed: activations, and sums over
rows.
"""

import itertools
import os
import subprocess
import sys
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from fusedmoe import _C
from fusedmoe import dtype as dtypes
from fusedmoe.activation import DEFAULT_PARAMETER, activation
from fusedmoe.op import fusion_network
from fusedmoe.parts import Expert, Input, Level, Linear, Static, Unit, from_slots, mlp
from fusedmoe.table import Table
from fusedmoe.testing import Problem, assert_parity, bound, eager, error, evaluate

from .random_tables import decided, start, tables
from .test_parity import BACKENDS

WIDE = st.integers(1, 60)
ROWS = st.integers(1, 70) | st.integers(70, 600)
FACTORS = st.sampled_from([1.0, 4.0, 16.0, 64.0])
SEEDS = st.integers(0, 2**20)
BIAS = "d_levels.0.experts.0.0.bias"
HERE = [name for name, here in _C.isas() if here]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def on(backend: str):
    return partial(fusion_network, backend=backend, return_mixing_weights=True)


def check(table, dtype, rows, factor, seed) -> None:
    given = decided(start(table, rows, dtype, seed), factor)
    assume(not underflows(given))
    assert_parity(on("cpu"), given)


def underflows(given: Problem) -> bool:
    """Whether some result is so small that the rule's relative bound lies below the least normal number
    of the dtype that is computed in: there rounding is absolute, and AVX-512's and AMX's products of
    bfloat16 take what is below it for zero."""
    computed = torch.float64 if given.x.dtype == torch.float64 else torch.float32
    least = torch.finfo(computed).tiny / (8 * dtypes.row(given.x.dtype).roundoff)
    sizes = [
        float(t.abs().max()) for t in evaluate(eager, given.to(torch.float64)).values() if t is not None and t.numel()
    ]
    return any(0 < size < least for size in sizes)


def alone(kind: str, z: torch.Tensor) -> Problem:
    """A network that is one activation, on the numbers z [B]: one expert of width 1 under a static
    weight of 1."""
    expert = Expert(from_slots(0), mlp((1,), activation(kind), bias=False))
    table = Table((Input(1, 1),), (Level((expert,), (Unit(static=Static((0,), (1.0,))),)),))
    z = z[:, None, None]
    return Problem(table, z, (torch.ones(1, 1),), torch.ones_like(z), (torch.zeros_like(z),))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", sorted(DEFAULT_PARAMETER))
def test_activations_in_every_binade(kind, backend):
    """Output and gradient of numbers of one sign between two powers of 2 by the rule: what is small
    beside 1 must be right by itself."""
    # From 8 on, gelu_tanh has no digits left in float64, of which PyTorch takes 1 + tanh.
    steps, firsts = (
        1 + torch.arange(64) / 64,
        [sign * 2.0**exponent for exponent in range(-6, 3) for sign in (-1.0, 1.0)],
    )
    given = alone(kind, torch.cat([first * steps for first in firsts]))
    ours, plain, truth = evaluate(on(backend), given), evaluate(eager, given), evaluate(eager, given.to(torch.float64))
    for name in ("out", "d_x"):
        parts = zip(firsts, *(values[name].split(len(steps)) for values in (ours, plain, truth)), strict=True)
        for first, part, of_plain, exact in parts:
            allowed = bound(error(of_plain, exact), exact, torch.float32)
            assert error(part, exact) <= allowed, f"{name} of {kind} from {first} to {2 * first}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", sorted(DEFAULT_PARAMETER))
def test_activations_pass_what_is_not_a_number(kind, backend):
    given = alone(kind, torch.tensor([float("nan"), 1.0, float("nan")]))
    # Not the gradient: of elu PyTorch's is 1 there.
    assert evaluate(on(backend), given)["out"].isnan().flatten().tolist() == [True, False, True]


def equal_rows(rows: int, width: int, seed: int) -> Problem:
    """One linear map of an x of one number; every row of x and of the upstream gradient is the
    same, so that no rounding error makes up for another."""
    level = Level((Expert(from_slots(0), (Linear(width),)),), (Unit(static=Static((0,), (1.0,))),))
    table = Table((Input(1, 1),), (level,))
    generator = torch.Generator().manual_seed(seed)
    x, d_out = (torch.randn(1, 1, size, generator=generator).repeat(rows, 1, 1) for size in (1, width))
    return Problem(table, x, (torch.ones(width, 1), torch.zeros(width)), d_out, (torch.zeros(rows, 1, 1),))


@pytest.mark.parametrize("isa", HERE)
def test_sums_of_equal_rows(isa):
    """Under every ISA, whose vectors and with them chains differ; each needs a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.test_accuracy"],
        env={**os.environ, "FUSEDMOE_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.stdout == f"{isa} checked\n", result.stderr


def check_sums_of_equal_rows() -> None:
    """The gradient of a bias, around the vectors and the chunks of rows that it is added by."""
    for rows, width, seed in itertools.product((15, 63, 255, 256, 511), (1, 7, 40), range(6)):
        assert_parity(on("cpu"), equal_rows(rows, width, seed), [BIAS])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@quick
@given(tables(WIDE, 8), ROWS, FACTORS, SEEDS)
def test_random_tables(dtype, table, rows, factor, seed):
    check(table, dtype, rows, factor, seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(quick, max_examples=300)
@given(tables(WIDE, 8), ROWS, FACTORS, SEEDS)
def test_many_random_tables(dtype, table, rows, factor, seed):
    check(table, dtype, rows, factor, seed)


if __name__ == "__main__":
    check_sums_of_equal_rows()
    print(_C.isa(), "checked")
