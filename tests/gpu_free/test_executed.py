"""The kernels as the compiler left them: whole networks in executed PTX, every output and gradient
by name, in every dtype and form."""

import re
from functools import cache

import pytest
import torch

from fusedmoe.testing import (
    Case,
    Problem,
    assert_close,
    bound,
    build,
    cases,
    error,
    evaluate,
    expectation,
    problem,
    smoothed,
)

pytest.importorskip("triton", reason="gpu_free: expected the package triton, which compiles without a device, got none")

from fusedmoe.kernels import operator, tiles
from fusedmoe.outputs import Options, for_tasks

from .. import test_operations as test_operations_by_hand
from ..random_tables import start
from . import executed
from .ptx import Counts, KernelFault

CASES = cases()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Up to how many rows all stages are one launch, and from how many on a tile has 128 rows.
FORMS = {"a launch a level": (0, 1 << 30), "tiles of 128 rows": (0, 0), "one launch": (1 << 30, 1 << 30)}
# Widths of whole vectors of 16 bytes, which are copied asynchronously, and others, which are not.
TABLES = {
    "adatt_sp": build("adatt_sp", 24, [[20], [12]], 2, 2, towers=(6, 1)),
    "ple": build("ple", 24, [[20], [12]], 2, 2),
    "mmoe": build("mmoe", 40, [[24]], 2, 3, towers=(1,)),
    "adatt_sp, whole vectors": build("adatt_sp", 96, [[80], [32]], 2, 2),
}
ROWS = 19
ROWWISE = "rowwise_forward", "rowwise_backward"
# Every kind of operation; the last one of an odd width.
OPERATIONS = {
    name: test_operations_by_hand.TABLES[name]
    for name in (
        "LayerNorm",
        "PReLU by column",
        "overlapping columns",
        "attention of experts",
        "static weights by column",
        "a linear map of two experts",
        "columns from an odd one on",
    )
}


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody wrote is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def take(form: str, monkeypatch) -> None:
    """Let the rule choose a form."""
    monkeypatch.setattr(tiles, "WHOLE_ROWS", FORMS[form][0])
    monkeypatch.setattr(tiles, "MANY_ROWS", FORMS[form][1])


def drawn(case: Case, dtype: torch.dtype) -> Problem:
    """In 16 bits without kinks: nearly every row has a pre-activation within rounding of one."""
    return problem(case if dtype == torch.float32 else case._replace(table=smoothed(case.table)), dtype)


@cache
def given(name: str, dtype: torch.dtype) -> Problem:
    return drawn(Case(TABLES[name], ROWS), dtype)


def network(x, params, table):
    out, *weights = operator.run(x, params, table, Options("triton", mixing=True, recompute=False, tasks_apart=False))
    return for_tasks(out, table), tuple(weights)


def lent(one: Problem) -> list[tuple[str, torch.Tensor]]:
    return [(parameter.name, tensor) for parameter, tensor in zip(one.table.parameters, one.params, strict=True)]


def run(one: Problem) -> tuple[dict[str, torch.Tensor | None], dict[str, Counts]]:
    """Outputs and gradients by name, and what the launches of each kernel did together."""
    with executed.executed(lent(one)) as kernels:
        values = evaluate(network, one)
    return values, {name: sum(kernel.launches, Counts()) for name, kernel in kernels.items()}


# Tiles of 128 rows, of dtypes that keep a source, on one table.
LARGE = [("adatt_sp, whole vectors", dtype, "tiles of 128 rows") for dtype in (torch.bfloat16, torch.float16)]
CALLS = [
    (name, dtype, form) for name in TABLES for dtype in DTYPES for form in ("a launch a level", "one launch")
] + LARGE


def slow_but_bfloat16(calls: list[tuple]) -> list:
    """The calls by name; bfloat16, in which the interpreter is weakest, is what `make test` runs."""
    return [
        pytest.param(*call, id="-".join(map(str, call)), marks=[] if torch.bfloat16 in call else [pytest.mark.slow])
        for call in calls
    ]


@pytest.mark.parametrize(("name", "dtype", "form"), slow_but_bfloat16(CALLS))
def test_parity(name, dtype, form, monkeypatch):
    take(form, monkeypatch)
    values, counts = run(given(name, dtype))
    assert_close(values, expectation(given(name, dtype)))
    assert all(count.launches for name, count in counts.items() if name not in ROWWISE)
    assert counts["forward_kernel"].mmas


@pytest.mark.parametrize(("what", "dtype"), slow_but_bfloat16([(w, dtype) for w in OPERATIONS for dtype in DTYPES]))
def test_operations(what, dtype):
    """Row-wise operations, with dropout off; columns in several tiles, in vectors and one by one."""
    one = start(OPERATIONS[what], 11, dtype)
    values, counts = run(one)
    assert_close(values, expectation(one))
    assert all(counts[name].launches for name in ROWWISE)


@pytest.mark.parametrize(
    ("dtype", "form"),
    slow_but_bfloat16([(dtype, form) for dtype in DTYPES for form in ("a launch a level", "one launch")]),
)
def test_inference(dtype, form, monkeypatch):
    """Without gradients to come, hidden layers stay inside their level."""
    take(form, monkeypatch)
    one = drawn(Case(build("adatt_sp", 40, [[24, 20], [16, 12]], 2, 2, towers=(6, 1)), ROWS), dtype)
    with executed.executed(lent(one)) as kernels, torch.no_grad():
        out, weights = network(one.x, one.params, one.table)
    expected = expectation(one)
    ours = {"out": out, **{f"weights.{i}": w for i, w in enumerate(weights)}}
    assert_close(ours, {name: expected[name] for name in ours})
    assert len(kernels["forward_kernel"].launches) == (1 if form == "one launch" else 3)


# float32, which the interpreter computes without tf32, and bfloat16; each case in both forms, one in
# each dtype, which alternate.
EVERY = [
    (name, dtype, ("a launch a level", "one launch")[(case + turn) % 2])
    for case, name in enumerate(sorted(CASES))
    for turn, dtype in enumerate((torch.float32, torch.bfloat16))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "form"), EVERY, ids=["-".join(map(str, call)) for call in EVERY])
def test_parity_of_every_case(name, dtype, form, monkeypatch):
    take(form, monkeypatch)
    one = drawn(CASES[name], dtype)
    assert_close(run(one)[0], expectation(one))


def test_split_numbers_are_those_of_one_sum(monkeypatch):
    """A gate's gradient lies beside where its first 11 bits change: another last bit of its sum, in
    another layout, would go with the rest of another."""
    take("one launch", monkeypatch)
    one = drawn(CASES["adatt-odd"], torch.float32)
    assert_close(run(one)[0], expectation(one))


def test_a_wide_product_of_float32():
    """Tensor cores cut instead of rounding: in one chain of MMAs over all of K, errors of one sign
    would add up beyond the bound."""
    one = drawn(Case(build("mmoe", 512, [[32]], 2, 2), ROWS), torch.float32)
    assert_close(run(one)[0], expectation(one))


def test_tf32_where_the_user_allows_it():
    """One product instead of three: the error of 11 bits, which float32's own bound does not take."""
    one = given("adatt_sp, whole vectors", torch.float32)
    precise, counts = run(one)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rough, rough_counts = run(one)
    finally:
        torch.set_float32_matmul_precision(before)
    truth, allowed = expectation(one)["out"]
    assert error(precise["out"], truth) <= allowed < error(rough["out"], truth) <= bound(0.0, truth, torch.float16)
    assert counts["forward_kernel"].mmas > 2 * rough_counts["forward_kernel"].mmas


def test_every_weight_is_read_once_by_each_block(monkeypatch):
    """In one launch a block owns its rows: it streams all weights, in whole, and writes its rows of
    the output."""
    take("one launch", monkeypatch)
    one = given("adatt_sp, whole vectors", torch.bfloat16)
    count = run(one)[1]["forward_kernel"]
    assert count.blocks == 2
    experts = {name: tensor for name, tensor in lent(one) if ".experts." in name and name.endswith("weight")}
    assert experts and {name: count.read[name] for name in experts} == {
        name: count.blocks * tensor.nbytes for name, tensor in experts.items()
    }
    assert count.written["out"] == one.d_out.nbytes


def test_outputs_of_odd_widths():
    """What is read begins at multiples of 16 bytes, and the units of the last level do not: their
    stores are narrower than its loads."""
    one = drawn(Case(build("adatt_sp", 96, [[80], [20]], 2, 2), ROWS), torch.bfloat16)
    assert_close(run(one)[0], expectation(one))


def test_parameters_at_odd_addresses(monkeypatch):
    """Views into one buffer, as flattened parameters are: no vector of 16 bytes begins where they
    do."""
    take("one launch", monkeypatch)
    one = given("adatt_sp, whole vectors", torch.bfloat16)
    odd = one._replace(params=tuple(p.new_empty(p.numel() + 1)[1:].view(p.shape).copy_(p) for p in one.params))
    assert any(p.data_ptr() % 16 for p in odd.params)
    assert_close(run(odd)[0], expectation(one))


def test_a_parameter_that_is_not_lent_is_out_of_bounds():
    one = given("adatt_sp", torch.bfloat16)
    with (
        executed.executed(lent(one)[1:]),
        pytest.raises(KernelFault, match=r"forward \(.*ld\.global.*expected a read of .* inside a buffer"),
    ):
        evaluate(network, one)


# A pattern in the compiled forward, what it is replaced by, and how the executor answers.
MUTANTS = {
    "a copy that is not waited for": (r"cp\.async\.wait_group[^;]*;", "", AssertionError),
    "a store without its mask": (r"@%p\d+ st\.global", "st.global", KernelFault),
    "a product of other bits": (r"\.bf16\.bf16\.", ".f16.f16.", AssertionError),
    "barriers that are missing": (r"bar\.sync\s+0;", "", KernelFault),
    "rows and columns of a matrix exchanged": (r"m8n8\.x4\.shared", "m8n8.x4.trans.shared", AssertionError),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_mutants_of_ptx_are_noticed(fault, monkeypatch):
    pattern, replacement, expected = MUTANTS[fault]
    ptx_for = executed.ptx_for

    def broken(kernel, *rest):
        ptx, shared = ptx_for(kernel, *rest)
        if kernel.__name__ == "forward":
            ptx, count = re.subn(pattern, replacement, ptx)
            assert count
        return ptx, shared

    monkeypatch.setattr(executed, "ptx_for", broken)
    monkeypatch.setattr(executed, "_EXECUTABLES", {})
    one = given("adatt_sp, whole vectors", torch.bfloat16)
    with pytest.raises(expected):
        assert_close(run(one)[0], expectation(one))
