"""The CUDA forward on the emulator: whole networks by the plans that Triton's kernels read, outputs and mixing weights by name."""

from functools import cache

import pytest
import torch

from fusedmoe.backends import INTERPRETED
from fusedmoe.testing import Case, Problem, assert_close, bound, build, cases, error, expectation, problem, smoothed

pytest.importorskip("triton", reason="cuda: expected the package triton, whose plans the CUDA kernels read, got none")
if INTERPRETED:
    pytest.skip("cuda: the emulated kernels are launched where Triton does not interpret its own", allow_module_level=True)

from fusedmoe.kernels import operator, tiles
from fusedmoe.op import for_tasks
from fusedmoe.reference.operator import by_level

from .cuda_on_cpu.standing import IN_ORDER, Schedule, emulated, take_counts

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
    return truth_of(given(name, dtype))


def truth_of(one: Problem) -> dict:
    return {key: value for key, value in expectation(one).items() if not key.startswith("d_")}


def outputs(one: Problem, form: str, monkeypatch, training: bool = False, schedule: Schedule = IN_ORDER) -> dict[str, torch.Tensor]:
    """The output and the mixing weights of each level, by name."""
    monkeypatch.setattr(tiles, "WHOLE_ROWS", FORMS[form][0])
    monkeypatch.setattr(tiles, "MANY_ROWS", FORMS[form][1])
    lent = [(parameter.name, tensor) for parameter, tensor in zip(one.table.parameters, one.params, strict=True)]
    with emulated(lent, schedule) as kernel, torch.set_grad_enabled(training):
        out, weights = operator.run("triton", one.x.clone().requires_grad_(training), one.params, one.table, True)
    assert kernel.launches
    return {"out": for_tasks(out.detach(), one.table), **{f"weights.{i}": w for i, w in enumerate(by_level(weights.detach(), one.table))}}


def check(name: str, dtype: torch.dtype, form: str, training: bool, monkeypatch, schedule: Schedule = IN_ORDER) -> None:
    assert_close(outputs(given(name, dtype), form, monkeypatch, training, schedule), expected(name, dtype))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_parity(name, dtype, form, training, monkeypatch):
    check(name, dtype, form, training, monkeypatch)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_at_odd_addresses(dtype, monkeypatch):
    """Views into one buffer, as flattened parameters are: nothing is copied 16 bytes at a time."""
    one = given("whole vectors", dtype)
    odd = one._replace(params=tuple(p.new_empty(p.numel() + 1)[1:].view(p.shape).copy_(p) for p in one.params))
    assert any(p.data_ptr() % 16 for p in odd.params)
    assert_close(outputs(odd, "a launch a level", monkeypatch), expected("whole vectors", dtype))


@pytest.mark.parametrize("form", ["a launch a level", "one launch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_reads_and_parameters_than_a_tile_and_an_argument_have(dtype, form, monkeypatch):
    """A softmax over 300 experts is computed as many columns at a time as a tile has; addresses beyond 448 stand in memory."""
    one = problem(Case(smoothed(build("mmoe", 8, [[8]], 2, 300)), 21), dtype)
    assert len(one.params) > 448
    assert_close(outputs(one, form, monkeypatch), truth_of(one))


def test_a_wide_product_of_float32(monkeypatch):
    """K = 512: partial sums are added outside of the tensor cores."""
    one = problem(Case(build("mmoe", 512, [[32]], 2, 2), 19), torch.float32)
    assert_close(outputs(one, "a launch a level", monkeypatch), truth_of(one))


def test_tf32_where_the_user_allows_it(monkeypatch):
    """One product instead of three: the error of 11 bits, which float32's own bound does not take."""
    one = given("whole vectors", torch.float32)
    take_counts()
    precise, many = outputs(one, "a launch a level", monkeypatch), take_counts().products
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rough, few = outputs(one, "a launch a level", monkeypatch), take_counts().products
    finally:
        torch.set_float32_matmul_precision(before)
    truth, allowed = expected("whole vectors", torch.float32)["out"]
    assert error(precise["out"], truth) <= allowed < error(rough["out"], truth) <= bound(0.0, truth, torch.float16)
    assert many == 3 * few


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_stay_in_their_rows(dtype, monkeypatch):
    """And where plain torch has infinity, so has the kernel, whatever the rests of split numbers are."""
    table = build("mmoe", 24, [[16]], 2, 2, activation="identity")
    one = problem(Case(table, 20), dtype)
    one.x[3, 0, 5], one.x[7, 0, 1] = float("inf"), float("nan")
    one = one._replace(params=tuple(p.abs() if p.dim() > 1 and p.shape[0] == 16 else p * 0 if p.shape[0] == 2 else p for p in one.params))
    out = outputs(one, "a launch a level", monkeypatch)["out"]
    odd = torch.zeros(len(out), dtype=torch.bool).index_fill(0, torch.tensor([3, 7]), True)
    assert out[~odd].isfinite().all() and out[7].isnan().all() and not out[3].isfinite().any()


def test_one_launch_whose_copies_and_matrices_meet_no_bank_twice(monkeypatch):
    one = given("whole vectors", torch.bfloat16)
    take_counts()
    outputs(one, "one launch", monkeypatch)
    counts = take_counts()
    assert counts.launches == 1 and counts.blocks == -(-len(one.x) // 16) and counts.products
    assert counts.bank_conflicts == 0
