"""Every tile of the CUDA kernels on the emulated device, and what a tile may meet: rows, columns,
reads, chunks, addresses, infinities; and what it costs."""

from functools import cache, partial

import pytest
import torch

from fusedmoe.kernels import bound as bindings
from fusedmoe.kernels import tiles
from fusedmoe.op import fusion_network
from fusedmoe.testing import (
    Case,
    Problem,
    assert_close,
    bound,
    build,
    eager,
    error,
    evaluate,
    expectation,
    problem,
    smoothed,
)

from .. import extension

NETWORK = partial(fusion_network, backend="cuda", return_mixing_weights=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Up to how many rows all stages are one launch, and from how many on a tile has 128 rows.
FORMS = {"a launch a level": (0, 1 << 30), "tiles of 128 rows": (0, 0), "one launch": (1 << 30, 1 << 30)}
TABLES = {
    "whole vectors": build("adatt_sp", 96, [[80], [32]], 2, 2),
    "odd widths": build("adatt_sp", 41, [[27, 35], [13]], 2, 2, towers=(6, 1)),
    "wide": build("mmoe", 264, [[144, 136]], 2, 3),
    "many units": build("ple", 72, [[40, 72], [72]], 7, 1),
    "reads of two pieces": build("mmoe", 24, [[16]], 2, 20),
}
ROWS = 71


@cache
def expected(name: str, dtype: torch.dtype) -> tuple[Problem, dict]:
    """In 16 bits without kinks: nearly every row has a pre-activation within rounding of one."""
    table = TABLES[name] if dtype == torch.float32 else smoothed(TABLES[name])
    given = problem(Case(table, ROWS), dtype)
    return given, expectation(given)


@pytest.fixture
def take(monkeypatch):
    """Let the rule choose a form, and chunks of so many rows."""

    def choose(form: str, chunk: int = tiles.CHUNK) -> None:
        for name, rows in zip(("WHOLE_ROWS", "MANY_ROWS"), FORMS[form], strict=True):
            monkeypatch.setattr(tiles, name, rows)
        monkeypatch.setattr(bindings, "CHUNK", chunk)

    return choose


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", TABLES)
def test_parity(table, dtype, form, take):
    take(form)
    given, wanted = expected(table, dtype)
    assert_close(evaluate(NETWORK, given), wanted)
    with torch.no_grad():
        out, weights = NETWORK(given.x, given.params, given.table)
    ours = {"out": out, **{f"weights.{i}": w for i, w in enumerate(weights)}}
    assert_close(ours, {name: wanted[name] for name in ours})


@pytest.mark.parametrize("form", ["a launch a level", "one launch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [16, 64])
def test_chunks(chunk, dtype, form, take):
    """Parts of several chunks, the last one ragged, are added in their order: the same bits whoever
    comes last."""
    take(form, chunk)
    given, wanted = expected("whole vectors", dtype)
    first = evaluate(NETWORK, given)
    assert_close(first, wanted)
    extension.control().fusedmoe_schedule(5, True)
    try:
        second = evaluate(NETWORK, given)
    finally:
        extension.control().fusedmoe_schedule(0, False)
    assert all(torch.equal(first[name], second[name]) for name in wanted if first[name] is not None)


def test_no_more_chunks_than_a_grid_takes(take, monkeypatch):
    """They get as many rows as that needs: here 71 rows at 16 a chunk, in a grid of two."""
    take("a launch a level", 16)
    monkeypatch.setattr(bindings, "MOST_CHUNKS", 2)
    assert [bindings.chunk_of(rows) for rows in (0, 16, 32, 33, ROWS)] == [16, 16, 16, 32, 48]
    given, wanted = expected("whole vectors", torch.float32)
    assert_close(evaluate(NETWORK, given), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_at_odd_addresses(dtype, take):
    """Views into one buffer, as flattened parameters are: nothing is copied 16 bytes at a time."""
    take("a launch a level")
    given, wanted = expected("whole vectors", dtype)

    def network(x, params, table):
        odd = [torch.cat([p.new_zeros(1), p.reshape(-1)])[1:].view(p.shape) for p in params]
        assert any(p.data_ptr() % 16 for p in odd)
        return NETWORK(x, odd, table)

    assert_close(evaluate(network, given), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_reads_than_a_tile_has_columns(dtype, take):
    take("a launch a level")
    given = problem(Case(smoothed(build("mmoe", 8, [[8]], 2, 300)), 21), dtype)
    assert_close(evaluate(NETWORK, given), expectation(given))


def test_a_wide_product_of_float32():
    """K = 512: partial sums are added outside of the tensor cores."""
    given = problem(Case(build("mmoe", 512, [[32]], 2, 2), 19), torch.float32)
    assert_close(evaluate(NETWORK, given), expectation(given))


def test_tf32_where_the_user_allows_it():
    """One product instead of three: the error of 11 bits, which float32's own bound does not take."""
    given, wanted = expected("whole vectors", torch.float32)
    results, products = [], []
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            count = extension.counts().products
            results.append(evaluate(NETWORK, given)["out"])
            products.append(extension.counts().products - count)
        finally:
            torch.set_float32_matmul_precision(before)
    truth, allowed = wanted["out"]
    assert error(results[0], truth) <= allowed < error(results[1], truth) <= bound(0.0, truth, torch.float16)
    assert products[0] == 3 * products[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_stay_in_their_rows(dtype, take):
    """And where plain torch has infinity, so has the kernel, whatever the rests of split numbers
    are."""
    take("a launch a level")
    given = problem(Case(build("mmoe", 24, [[16]], 2, 2, activation="identity"), 20), dtype)
    given.x[3, 0, 5], given.x[7, 0, 1] = float("inf"), float("nan")
    params = [p.abs() if p.dim() > 1 and p.shape[0] == 16 else p * 0 if p.shape[0] == 2 else p for p in given.params]
    out = fusion_network(given.x, params, given.table, "cuda")
    odd = torch.zeros(len(out), dtype=torch.bool).index_fill(0, torch.tensor([3, 7]), True)
    assert out[~odd].isfinite().all() and out[7].isnan().all() and not out[3].isfinite().any()


def test_an_infinite_gradient_stops_where_a_relu_is_off():
    given = problem(Case(build("mmoe", 40, [[24]], 2, 3, towers=(1,)), 19), torch.float32)
    d_out = given.d_out.clone()
    d_out[3] = float("inf")
    given = given._replace(d_out=d_out)
    plain = evaluate(eager, given)
    assert [
        name
        for name, value in evaluate(NETWORK, given).items()
        if value is not None and not torch.equal(value.isfinite(), plain[name].isfinite())
    ] == []


def test_copies_and_matrices_meet_no_bank_twice(take):
    take("one launch")
    given, _ = expected("whole vectors", torch.bfloat16)
    before = extension.counts()
    fusion_network(given.x, given.params, given.table, "cuda")
    after = extension.counts()
    assert (
        after.launches - before.launches == 1
        and after.blocks - before.blocks == -(-ROWS // 16)
        and after.products > before.products
    )
    assert after.bank_conflicts == before.bank_conflicts
