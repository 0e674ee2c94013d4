"""The CUDA backward on the emulator: every gradient by name against the expectation, in every dtype, form and kind of row, column and chunk."""

from functools import cache

import pytest
import torch

from fusedmoe.testing import Case, Problem, assert_close, bound, build, cases, eager, error, evaluate, expectation, problem, smoothed

pytest.importorskip("triton", reason="cuda_on_cpu: expected the package triton, whose launches the kernels stand in for, got none")

from fusedmoe.kernels import network as launches
from fusedmoe.kernels import operator, tiles
from fusedmoe.op import for_tasks
from fusedmoe.reference.operator import by_level

from .cuda_on_cpu import backward, standing

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
    "ragged columns": build("adatt_sp", 70, [[67], [9]], 2, 2, towers=(5, 1)),
    "reads of two pieces": build("mmoe", 24, [[16]], 2, 20),
    "units for narrow tiles": build("mmoe", 48, [[40]], 6, 3),
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
    out, weights = operator.run("triton", x, params, table, True)
    return for_tasks(out, table), by_level(weights, table)


def lent(one: Problem) -> list[tuple[str, torch.Tensor]]:
    return [(parameter.name, tensor) for parameter, tensor in zip(one.table.parameters, one.params, strict=True)]


def run(one: Problem, schedule: standing.Schedule = standing.IN_ORDER) -> tuple[dict[str, torch.Tensor | None], list[str]]:
    """Outputs and gradients by name, and the backward's launches."""
    with backward.emulated(lent(one), schedule) as ran:
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
    second, _ = run(one, standing.Schedule(seed=5, eager=True))
    assert all(torch.equal(first[name], second[name]) for name in wanted if first[name] is not None)


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_schedules(dtype, seed, eager, monkeypatch):
    take("one launch", monkeypatch, 16)
    values, _ = run(given("adatt_sp", dtype), standing.Schedule(seed, eager))
    assert_close(values, expected("adatt_sp", dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradients_of_mixing_weights(dtype):
    one = given("adatt_sp", dtype)
    one = one._replace(d_weights=tuple(map(torch.zeros_like, one.d_weights)))
    wanted = {name: value for name, value in expectation(one).items() if not name.startswith("weights")}

    def alone(x, params, table):
        return for_tasks(operator.run("triton", x, params, table, False)[0], table), ()

    with backward.emulated(lent(one)):
        assert_close(evaluate(alone, one), wanted)


def test_more_parameters_than_an_argument_holds():
    one = drawn(Case(build("mmoe", 8, [[8]], 1, 230), 3), torch.float32)
    assert len(one.params) > backward.ADDRESSES
    assert_close(run(one)[0], expectation(one))


def test_parameters_at_odd_addresses():
    """Views into one buffer, as flattened parameters are: no vector of 16 bytes begins where they do."""
    one = given("adatt_sp, whole vectors", torch.bfloat16)
    odd = one._replace(params=tuple(p.new_empty(p.numel() + 1)[1:].view(p.shape).copy_(p) for p in one.params))
    assert any(p.data_ptr() % 16 for p in odd.params)
    assert_close(run(odd)[0], expected("adatt_sp, whole vectors", torch.bfloat16))


def test_tf32_where_the_user_allows_it():
    """One product instead of three."""
    one = given("adatt_sp, whole vectors", torch.float32)
    before = torch.get_float32_matmul_precision()
    products = []
    for allowed in ("highest", "high"):
        torch.set_float32_matmul_precision(allowed)
        try:
            standing.take_counts()
            values, _ = run(one)
        finally:
            torch.set_float32_matmul_precision(before)
        products.append(standing.take_counts().products)
        truth, _ = expected("adatt_sp, whole vectors", torch.float32)["d_x"]
        assert error(values["d_x"], truth) <= bound(0.0, truth, torch.float32 if allowed == "highest" else torch.float16)
    assert products[0] == 3 * products[1]


def test_an_infinite_gradient_stops_where_a_relu_is_off():
    one = given("mmoe", torch.float32)
    d_out = one.d_out.clone()
    d_out[3] = float("inf")
    one = one._replace(d_out=d_out)
    truth = evaluate(eager, one)
    for name, value in run(one)[0].items():
        assert value is None or torch.equal(value.isfinite(), truth[name].isfinite()), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(CASES)])
def test_parity_of_every_case(name, dtype, form, monkeypatch):
    take(form, monkeypatch)
    one = drawn(CASES[name], dtype)
    assert_close(run(one)[0], expectation(one))
