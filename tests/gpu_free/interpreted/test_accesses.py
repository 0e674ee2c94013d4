"""Every load and store of every family's kernels inside its tensor, no two programs at one element,
and as many launches as promised."""

from functools import cache

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from fusedmoe.kernels import network, tiles
from fusedmoe.op import fusion_network
from fusedmoe.testing import Case, build, cases, problem

from ...random_tables import start
from ...test_operations import TABLES as OPERATIONS
from ..interpreter import Operators, watched

CASES = cases()
FORMS = {"a launch a level": 0, "one launch": 1 << 30}

# Those whose gates read the root, their own slot, a hidden layer, an expert: the others take
# minutes.
QUICK = ("every_feature", "adatt_sp-odd", "mmoe-odd", "ple-empty_gate", "cross_stitch-ragged")


def some(names) -> list:
    """The names, those that are not quick marked as slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


@cache
def given(name: str):
    return problem(CASES[name], torch.float32)


def run(problem, mixing: bool = True):
    """Forward and backward of one call, watched; returns the launches' names."""
    lent = [
        (parameter.name, tensor) for parameter, tensor in zip(problem.table.parameters, problem.params, strict=True)
    ]
    with watched(lent) as watch:
        out, weights, saved = network.forward(
            problem.x, problem.params, problem.table, mixing, training=True, backend="triton"
        )
        network.forward(problem.x, problem.params, problem.table, mixing, training=False, backend="triton")
        d_weights = torch.ones_like(weights) if mixing else None
        network.backward(
            torch.ones_like(out), d_weights, problem.x, problem.params, saved, problem.table, backend="triton"
        )
    return watch.launches


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", some(name for name in CASES if name.endswith(("every_feature", "odd", "ragged", "empty_gate", "one_row")))
)
def test_accesses(name, form, monkeypatch):
    monkeypatch.setattr(tiles, "WHOLE_ROWS", FORMS[form])
    run(given(name))


@pytest.mark.parametrize("form", ["a launch a level", pytest.param("one launch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", OPERATIONS)
def test_accesses_of_operations(what, form, monkeypatch):
    monkeypatch.setattr(tiles, "WHOLE_ROWS", FORMS[form])
    run(start(OPERATIONS[what], 11, torch.float32))


def counts(launches: list[str]) -> tuple[int, int, int]:
    """How many launches of the forward, of the row-local backward, and of the parameters'
    gradients."""
    # The forward runs twice, for training and not.
    return (
        launches.count("forward") / 2,
        launches.count("backward_rows"),
        launches.count("gradients") + launches.count("add_chunks"),
    )


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("towers", [(), (6, 1)])
def test_launches(levels, towers, monkeypatch):
    """AdaTT of L levels: L forward, 2 L backward and 2 for all parameters; one and two more for
    towers; one launch in the small form."""
    table = build("adatt_sp", 8, [[8]] * levels, 2, 2, towers=towers)
    monkeypatch.setattr(tiles, "WHOLE_ROWS", 0)
    launches = run(problem(Case(table, 20), torch.float32))
    # A tower of two layers is one launch of two stages, and so is its backward.
    assert counts(launches) == (levels + bool(towers), 2 * levels + bool(towers), 2)
    monkeypatch.setattr(tiles, "WHOLE_ROWS", 1 << 30)
    assert counts(run(problem(Case(table, 20), torch.float32))) == (1, 1, 2)


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_else_runs_on_the_device(grad, monkeypatch):
    # The interpreter's own: copies of arguments from the host, where they are already.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    one = problem(Case(build("adatt_sp", 8, [[8], [8]], 2, 2), 5), torch.float32)
    x, params = one.x.requires_grad_(grad), [p.requires_grad_(grad) for p in one.params]

    def call():
        out = fusion_network(x, params, one.table, backend="triton")
        if grad:
            torch.autograd.grad(out, [x, *params], one.d_out)

    # Plans and addresses go up at the first call.
    call()
    with Operators() as operators:
        call()
    assert operators.names == []


def test_rows_beyond_32_bits(monkeypatch):
    """Rows that lie 2^20 numbers apart: the last ones begin past what 32 bits hold, and the result
    is that of rows side by side."""
    # It would copy the memory onto itself, all of it.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    table = build("mmoe", 16, [[16]], 2, 2)
    one = problem(Case(table, 2300), torch.float32)
    rows = len(one.x)
    # Memory that nobody touches costs nothing.
    memory = torch.from_numpy(np.empty(rows << 20, np.float32))
    far = memory.as_strided((rows, 1, 16), (1 << 20, 16, 1))
    far.copy_(one.x)
    assert rows << 20 > 2**31
    assert torch.equal(
        fusion_network(far, one.params, table, "triton"), fusion_network(one.x, one.params, table, "triton")
    )


def test_rows_too_far_apart_for_a_tile_are_brought_together():
    table = build("mmoe", 16, [[16]], 2, 2)
    one = problem(Case(table, 3), torch.float32)
    far = torch.from_numpy(np.empty(3 << 30, np.float32)).as_strided((3, 1, 16), (1 << 30, 16, 1))
    far.copy_(one.x)
    assert torch.equal(
        fusion_network(far, one.params, table, "triton"), fusion_network(one.x, one.params, table, "triton")
    )


def test_a_table_that_is_too_wide_is_refused():
    table = build("mmoe", 70000, [[4]], 2, 2)
    x, params = torch.zeros(1, 1, 70000), [torch.zeros(p.shape) for p in table.parameters]
    with pytest.raises(
        ValueError,
        match=(
            r"levels\.0\.experts\.0\.0\.weight: the GPU backends expect at most 65536 columns, got 70000; "
            r"use backend"
        ),
    ):
        fusion_network(x, params, table, "triton")


def test_rows_of_a_chunk_beyond_32_bits(monkeypatch):
    """A chunk of the parameters' gradients has more rows than a tile: rows 2^22 numbers apart are
    too far for it."""
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    table = build("mmoe", 8, [[8]], 2, 1)
    one = problem(Case(table, 530), torch.float32)
    far = torch.from_numpy(np.empty(len(one.x) << 22, np.float32)).as_strided(one.x.shape, (1 << 22, 8, 1))
    far.copy_(one.x)
    assert len(one.x) << 22 > 2**31

    def gradients(x):
        params = [p.requires_grad_() for p in one.params]
        return torch.autograd.grad(fusion_network(x, params, table, "triton"), params, one.d_out)

    assert all(map(torch.equal, gradients(far), gradients(one.x)))
