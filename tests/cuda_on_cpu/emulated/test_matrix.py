"""Small calls of everything that the CUDA kernels do, in every dtype and form, watched: under each
schedule here, and under the sanitizers and with mutants in runs of their own
(tests/test_cuda_kernels.py). The seed of the run's first schedule is that of its environment.
"""

from contextlib import ExitStack
from functools import cache, partial

import numpy as np
import pytest
import torch

from fusedmoe.kernels import bound as bindings
from fusedmoe.kernels import tiles
from fusedmoe.op import fusion_network
from fusedmoe.testing import Case, Problem, assert_close, build, cases, evaluate, expectation, problem, smoothed

from ..extension import control
from ..watched import watched

NETWORK = partial(fusion_network, backend="cuda", return_mixing_weights=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows up to which all stages are one launch; and rows of a chunk of the parameters' gradients.
FORMS = {"a launch a level": (0, 16), "one launch": (1 << 30, 16)}
# Columns for two tiles, the second one ragged; whole vectors of 16 bytes, and rows of odd lengths;
# hidden layers in towers.
TABLES = {
    "whole vectors": build("adatt_sp", 96, [[80], [32]], 2, 2, activation="silu"),
    "odd": build("ple", 21, [[13], [9]], 2, 2, activation="gelu", towers=(6, 1)),
    "every feature": smoothed(cases()["every_feature"].table),
}
ROWS = 37
SCHEDULES = [(seed, eager) for seed in (1, 2, 3) for eager in (False, True)]


@cache
def expected(name: str, dtype: torch.dtype) -> tuple[Problem, dict]:
    given = problem(Case(TABLES[name], ROWS), dtype)
    return given, expectation(given)


def check(name: str, dtype: torch.dtype, form: str, monkeypatch) -> None:
    """Output and every gradient, by kernels that touch what they were given and nothing else."""
    whole, chunk = FORMS[form]
    monkeypatch.setattr(tiles, "WHOLE_ROWS", whole)
    monkeypatch.setattr(bindings, "CHUNK", chunk)
    given, wanted = expected(name, dtype)

    # `evaluate` takes copies of the parameters: lend those that a call gets.
    def network(x, params, table):
        watching.enter_context(
            watched([(parameter.name, tensor) for parameter, tensor in zip(table.parameters, params, strict=True)])
        )
        return NETWORK(x, params, table)

    with ExitStack() as watching:
        assert_close(evaluate(network, given), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_matrix(name, dtype, form, monkeypatch):
    check(name, dtype, form, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed, eager", SCHEDULES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_matrix_of_schedules(name, dtype, form, seed, eager, monkeypatch):
    control().fusedmoe_schedule(seed, eager)
    try:
        check(name, dtype, form, monkeypatch)
    finally:
        control().fusedmoe_schedule(0, False)


@pytest.mark.slow
def test_rows_beyond_32_bits():
    """Rows that lie 2^20 numbers apart: the last ones begin past what 32 bits hold, and the result
    is that of rows side by side."""
    one = problem(Case(build("mmoe", 16, [[16]], 1, 1), 2100), torch.float32)
    # Memory that nobody touches costs nothing.
    far = torch.from_numpy(np.empty(len(one.x) << 20, np.float32)).as_strided((len(one.x), 1, 16), (1 << 20, 16, 1))
    far.copy_(one.x)
    assert len(one.x) << 20 > 2**31
    with torch.no_grad():
        assert torch.equal(
            fusion_network(far, one.params, one.table, "cuda"), fusion_network(one.x, one.params, one.table, "cuda")
        )
