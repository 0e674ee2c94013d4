"""Row-wise operations and shared parameters by the CUDA kernels: hand-written tables in every dtype
and form, watched, under every schedule."""

from contextlib import ExitStack
from functools import cache, partial

import numpy as np
import pytest
import torch

from fusedmoe.graph import NOTHING
from fusedmoe.kernels import bound as bindings
from fusedmoe.kernels import operator, tiles
from fusedmoe.op import fusion_network
from fusedmoe.outputs import Options
from fusedmoe.reference import forward
from fusedmoe.testing import Case, Problem, assert_close, evaluate, expectation, problem
from fusedmoe.testing.measure import eager

from ...philox import dropped
from ...random_tables import start
from ...rowwise_tables import TABLES, drops, without_kinks
from ..extension import control
from ..watched import watched

NETWORK = partial(fusion_network, backend="cuda", return_mixing_weights=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows up to which dense segments that follow each other are one launch; rows of a chunk of the
# parameters' gradients.
FORMS = {"a launch a level": (0, 16), "one launch": (1 << 30, 16), "one chunk": (1 << 30, 1024)}
HERE = [*((dtype, "a launch a level") for dtype in DTYPES), *((torch.float32, form) for form in list(FORMS)[1:])]
ROWS = 37
SEEDS = [0, 7, -1234567890123456789]
SCHEDULES = [(1, False), (2, True)]


@cache
def expected(name: str, dtype: torch.dtype) -> tuple[Problem, dict]:
    table = TABLES[name] if dtype == torch.float32 else without_kinks(TABLES[name])
    given = problem(Case(table, ROWS), dtype)
    return given, expectation(given)


def check(call, given: Problem, wanted: dict) -> list[str]:
    """Output and every gradient, by kernels that touch what they were given and nothing else; return the
    launches."""
    found = []

    def network(x, params, table):
        lent = [(parameter.name, tensor) for parameter, tensor in zip(table.parameters, params, strict=True)]
        found.append(watching.enter_context(watched(lent)))
        return call(x, params, table)

    with ExitStack() as watching:
        assert_close(evaluate(network, given), wanted)
    return found[0].names


def check_table(name: str, dtype: torch.dtype, form: str, monkeypatch) -> list[str]:
    whole, chunk = FORMS[form]
    monkeypatch.setattr(tiles, "WHOLE_ROWS", whole)
    monkeypatch.setattr(bindings, "CHUNK", chunk)
    return check(NETWORK, *expected(name, dtype))


@pytest.mark.parametrize(("dtype", "form"), HERE, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_tables(name, dtype, form, monkeypatch):
    launches = check_table(name, dtype, form, monkeypatch)
    assert {"rowwise_forward", "rowwise_backward"} <= {*launches} or name.startswith("shares")


@pytest.mark.slow
@pytest.mark.parametrize("seed, eager", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_schedules(name, dtype, seed, eager, monkeypatch):
    control().fusedmoe_schedule(seed, eager)
    try:
        check_table(name, dtype, "a launch a level", monkeypatch)
    finally:
        control().fusedmoe_schedule(0, False)


@pytest.mark.slow
def test_rows_beyond_32_bits():
    """As in test_matrix.py."""
    given = start(TABLES["copies"], 2100, torch.float32)
    far = torch.from_numpy(np.empty(len(given.x) << 20, np.float32)).as_strided(given.x.shape, (1 << 20, 32, 1))
    far.copy_(given.x)
    with torch.no_grad():
        assert torch.equal(NETWORK(far, given.params, given.table)[0], NETWORK(given.x, given.params, given.table)[0])


def dropping(monkeypatch, seed: int | None) -> None:
    """Let the reference's forward, differentiated by autograd, drop what this seed says."""

    def mlp(run, place, of, level, params):
        h = forward.read(run, of.sources, level)
        for stage in of.stages:
            z = forward._head(stage, h, params).z
            slope = forward.own(stage.slope, params)
            h = forward.apply(stage.activation, z) if slope is None else torch.where(z > 0, z, slope * z)
            if stage.stream != NOTHING and seed is not None:
                h = dropped(h, seed, stage.stream, stage.dropout)
        return h

    monkeypatch.setattr(forward, "_mlp", mlp)


def with_seed(seed: int | None):
    given = None if seed is None else torch.tensor([seed])

    def network(x, params, table):
        out, *weights = operator.run(x, params, table, Options("cuda", True, False, False), given)
        return out, tuple(weights)

    return network


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_is_philox(seed, dtype, monkeypatch):
    given = start(drops(9, 21), ROWS, dtype)
    dropping(monkeypatch, seed)
    check(with_seed(seed), given, expectation(given, eager))


def test_without_a_seed_nothing_is_dropped(monkeypatch):
    given = start(drops(9, 21), ROWS, torch.float32)
    dropping(monkeypatch, None)
    assert_close(evaluate(with_seed(None), given), expectation(given, eager))


def test_a_dropped_number_is_zero_whatever_it_is():
    """Infinity times zero is NaN."""
    given = start(drops(9, 21), ROWS, torch.float32)
    given.params[0].fill_(torch.inf)
    found = evaluate(with_seed(7), given)
    kept = evaluate(with_seed(None), given)
    assert found["out"].isfinite().sum() > kept["out"].isfinite().sum()


def test_a_seed_on_the_wrong_place_is_refused():
    given = start(drops(9, 21), 3, torch.float32)
    options = Options("cuda", False, False, False)
    wrong = {r"seed: expected .*\[1\]": torch.tensor([1, 2]), "seed: expected dtype Long": torch.tensor([1.0])}
    for said, seed in wrong.items():
        with pytest.raises(RuntimeError, match=said):
            operator.run(given.x, given.params, given.table, options, seed)
