"""The CUDA backward on the emulator: every gradient by name against the expectation, in every dtype, form and kind of row, column and chunk."""

from functools import cache

import pytest
import torch

from fusedmoe.testing import Case, Problem, assert_close, build, cases, evaluate, expectation, problem, smoothed

pytest.importorskip("triton", reason="cuda_on_cpu: expected the package triton, whose launches the kernels stand in for, got none")

from fusedmoe.kernels import network as launches
from fusedmoe.kernels import operator, tiles
from fusedmoe.op import for_tasks
from fusedmoe.reference.operator import by_level

from .cuda_on_cpu import backward, library

CASES = cases()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Up to how many rows all stages are one launch.
FORMS = {"a launch a level": 0, "one launch": 1 << 30}
# Widths of whole vectors of 16 bytes, which are copied asynchronously, and others, which are not.
TABLES = {
    "adatt_sp": build("adatt_sp", 24, [[20], [12]], 2, 2, towers=(6, 1)),
    "ple": build("ple", 24, [[20], [12]], 2, 2),
    "mmoe": build("mmoe", 40, [[24]], 2, 3, towers=(1,)),
    "adatt_sp, whole vectors": build("adatt_sp", 96, [[80], [32]], 2, 2),
}
ROWS = 19
QUICK = ("every_feature", "adatt-empty_gate", "ple-ragged", "cross_stitch-tiny", "customized_sharing-odd")


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody wrote is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def take(form: str, monkeypatch, chunk: int = tiles.CHUNK) -> None:
    """Let the rule choose a form, and chunks of so many rows."""
    monkeypatch.setattr(tiles, "WHOLE_ROWS", FORMS[form])
    monkeypatch.setattr(tiles, "MANY_ROWS", 1 << 30)
    monkeypatch.setattr(launches, "CHUNK", chunk)


def drawn(case: Case, dtype: torch.dtype) -> Problem:
    """In 16 bits without kinks: nearly every row has a pre-activation within rounding of one."""
    return problem(case if dtype == torch.float32 else case._replace(table=smoothed(case.table)), dtype)


@cache
def given(name: str, dtype: torch.dtype, rows: int = ROWS) -> Problem:
    return drawn(Case(TABLES[name], rows), dtype)


@cache
def expected(name: str, dtype: torch.dtype, rows: int = ROWS):
    return expectation(given(name, dtype, rows))


def network(x, params, table):
    out, weights = operator.run(x, params, table, True)
    return for_tasks(out, table), by_level(weights, table)


def run(one: Problem, schedule: library.Schedule = library.Schedule()) -> tuple[dict[str, torch.Tensor | None], list[str]]:
    """Outputs and gradients by name, and the backward's launches."""
    lent = [(parameter.name, tensor) for parameter, tensor in zip(one.table.parameters, one.params, strict=True)]
    with backward.emulated(lent, schedule) as ran:
        values = evaluate(network, one)
    return values, ran.launches


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_parity(name, dtype, form, monkeypatch):
    take(form, monkeypatch)
    values, ran = run(given(name, dtype))
    assert_close(values, expected(name, dtype))
    levels = len(launches.lower(TABLES[name]).groups)
    assert ran[-1] == "gradients" and ran.count("gradients") == 1 and (form == "one launch") == (len(ran) == 2)
    assert len(ran) <= 2 * levels + 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [16, 64])
def test_chunks(chunk, dtype, form, monkeypatch):
    """Parts of several chunks, the last one ragged, are added in their order: the same bits whoever comes last."""
    take(form, monkeypatch, chunk)
    one, wanted = given("adatt_sp, whole vectors", dtype, 83), expected("adatt_sp, whole vectors", dtype, 83)
    first, _ = run(one)
    assert_close(first, wanted)
    second, _ = run(one, library.Schedule(seed=5, eager=True))
    assert all(torch.equal(first[name], second[name]) for name in wanted if first[name] is not None)


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_schedules(dtype, seed, eager, monkeypatch):
    take("one launch", monkeypatch, 16)
    values, _ = run(given("adatt_sp", dtype), library.Schedule(seed, eager))
    assert_close(values, expected("adatt_sp", dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(CASES)])
def test_parity_of_every_case(name, dtype, form, monkeypatch):
    take(form, monkeypatch)
    one = drawn(CASES[name], dtype)
    assert_close(run(one)[0], expectation(one))
