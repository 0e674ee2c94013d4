"""The CUDA forward on the emulator: whole networks by the plans that Triton's kernels read, outputs and mixing weights by name."""

from functools import cache

import pytest
import torch

from fusedmoe.backends import INTERPRETED
from fusedmoe.testing import Case, Problem, assert_close, build, cases, expectation, problem, smoothed

pytest.importorskip("triton", reason="cuda: expected the package triton, whose plans the CUDA kernels read, got none")
if INTERPRETED:
    pytest.skip("cuda: the emulated kernels are launched where Triton does not interpret its own", allow_module_level=True)

from fusedmoe.kernels import operator, tiles
from fusedmoe.op import for_tasks
from fusedmoe.reference.operator import by_level

from .cuda_on_cpu.library import Schedule, emulated

CASES = cases()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Up to how many rows all stages are one launch, and from how many on a tile has 128 rows.
FORMS = {"a launch a level": (0, 1 << 30), "tiles of 128 rows": (0, 0), "one launch": (1 << 30, 1 << 30)}
SCHEDULES = [Schedule(seed, eager) for seed in (0, 1, 2) for eager in (False, True)]
TABLES = {
    "whole vectors": build("adatt_sp", 96, [[80], [32]], 2, 2),
    "odd widths": build("adatt_sp", 41, [[27, 35], [13]], 2, 2, towers=(6, 1)),
    "wide": build("mmoe", 264, [[144, 136]], 2, 3),
    "many units": build("ple", 72, [[40, 72], [72]], 7, 1),
}
ROWS = 71


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody wrote is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@cache
def given(name: str, dtype: torch.dtype) -> Problem:
    """In 16 bits without kinks: nearly every row has a pre-activation within rounding of one."""
    case = CASES[name] if name in CASES else Case(TABLES[name], ROWS)
    return problem(case if dtype == torch.float32 else case._replace(table=smoothed(case.table)), dtype)


@cache
def expected(name: str, dtype: torch.dtype) -> dict:
    return {key: value for key, value in expectation(given(name, dtype)).items() if not key.startswith("d_")}


def check(name: str, dtype: torch.dtype, form: str, training: bool, monkeypatch, schedule: Schedule = Schedule()) -> int:
    """Compare every output with its truth; return the number of launches."""
    monkeypatch.setattr(tiles, "WHOLE_ROWS", FORMS[form][0])
    monkeypatch.setattr(tiles, "MANY_ROWS", FORMS[form][1])
    one = given(name, dtype)
    lent = [(parameter.name, tensor) for parameter, tensor in zip(one.table.parameters, one.params, strict=True)]
    with emulated(lent, schedule) as kernel, torch.set_grad_enabled(training):
        x = one.x.clone().requires_grad_(training)
        out, weights = operator.run("triton", x, one.params, one.table, True)
    out, weights = for_tasks(out.detach(), one.table), by_level(weights.detach(), one.table)
    assert_close({"out": out, **{f"weights.{i}": w for i, w in enumerate(weights)}}, expected(name, dtype))
    return kernel.launches


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_parity(name, dtype, form, training, monkeypatch):
    assert check(name, dtype, form, training, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", ["a launch a level", "one launch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(CASES))
def test_parity_of_every_case(name, dtype, form, training, monkeypatch):
    check(name, dtype, form, training, monkeypatch)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: f"seed {one.seed}, {'eager' if one.eager else 'lazy'}")
@pytest.mark.parametrize("form", ["a launch a level", "one launch"])
@pytest.mark.parametrize("name", ["every_feature", "whole vectors"])
def test_any_schedule(name, form, schedule, monkeypatch):
    check(name, torch.bfloat16, form, False, monkeypatch, schedule)
