"""Calls of several tiles of columns, chunks of rows and pieces of a hidden layer: watched, and as
right as calls of one."""

import pytest
import torch

from fusedmoe.kernels import bound, network, tiles
from fusedmoe.op import fusion_network
from fusedmoe.testing import Case, assert_close, build, cases, eager, evaluate, expectation, problem

from ..interpreter import watched

# More columns than a tile has, in every map; a tower over several units.
WIDE = Case(build("ple", 47, [[40, 45], [33]], 2, 1, activation="silu", towers=(5, 1)), 20)
CASES = {
    "wide": WIDE,
    "narrow": Case(build("mmoe", 5, [[4]], 2, 2, activation="tanh"), 70),
    "every_feature": cases()["every_feature"],
}


def fused(x, params, table):
    return fusion_network(x, params, table, "triton", return_mixing_weights=True)


def checked(one) -> None:
    """Outputs and all gradients, every access watched."""
    with watched(
        [(parameter.name, tensor) for parameter, tensor in zip(one.table.parameters, one.params, strict=True)]
    ):
        values = evaluate(fused, one)
    assert_close(values, expectation(one))


@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_several_chunks(name, monkeypatch):
    """The last chunk has fewer rows than the others."""
    monkeypatch.setattr(bound, "CHUNK", 16)
    one = problem(CASES[name], torch.float32)
    assert len(one.x) > 16 and len(one.x) % 16
    checked(one)


def test_several_tiles_of_columns(monkeypatch):
    """A launch a level: each tile is a program of its own."""
    monkeypatch.setattr(tiles, "WHOLE_ROWS", 0)
    checked(problem(WIDE, torch.float32))


@pytest.mark.parametrize("rows", [0, 1 << 30])
@pytest.mark.parametrize("name", CASES)
def test_inference(name, rows, monkeypatch):
    """Hidden layers stay on the chip, in pieces that the last one does not fill."""
    monkeypatch.setattr(tiles, "WHOLE_ROWS", rows)
    one = problem(CASES[name], torch.float32)
    with torch.no_grad():
        out, weights = fused(one.x, one.params, one.table)
    ours = {"out": out, **{f"weights.{i}": w for i, w in enumerate(weights)}}
    assert_close(ours, {key: value for key, value in expectation(one).items() if key in ours})


@pytest.mark.parametrize("rows", [0, 1 << 30])
def test_one_x_for_all_slots(rows, monkeypatch):
    """Expanded, not copied: experts and gates share its tile, and each slot has a gradient of its
    own."""
    monkeypatch.setattr(tiles, "WHOLE_ROWS", rows)
    one = problem(WIDE, torch.float32)
    assert one.x.shape[1] > 1
    checked(one._replace(x=one.x[:, :1].expand_as(one.x)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_x_has_the_bits_of_its_copies(dtype, training, monkeypatch):
    """A source is kept in these dtypes; AdaTT's experts stand in the order of their slots either
    way."""
    monkeypatch.setattr(tiles, "WHOLE_ROWS", 0)
    one = problem(Case(build("adatt_sp", 70, [[40], [33]], 2, 2, activation="silu"), 20), dtype)
    x = one.x[:, :1].expand_as(one.x)
    shared, apart = (
        network.forward(given, one.params, one.table, True, training, backend="triton")[:2]
        for given in (x, x.contiguous())
    )
    assert all(map(torch.equal, shared, apart))


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "silu"])
def test_an_infinite_input(activation):
    """What it makes of a row is what it makes in plain torch: columns beyond a map, where a kernel
    multiplies it by 0, make nothing of it."""
    table = build("cross_stitch", 5, [[6, 7]], 2, 1, activation=activation)
    one = problem(Case(table, 4), torch.float32)
    one.x[1, 0, 0] = float("inf")
    ours, plain = evaluate(fused, one), evaluate(eager, one)
    with torch.no_grad():
        ours["inference"], plain["inference"] = fused(one.x, one.params, table)[0], plain["out"]
    assert [
        name
        for name, value in plain.items()
        if value is not None and not torch.equal(ours[name].isfinite(), value.isfinite())
    ] == []
    # Sigmoid and tanh bound whatever they are given.
    assert ours["inference"].isfinite().all() == (activation in ("sigmoid", "tanh"))
