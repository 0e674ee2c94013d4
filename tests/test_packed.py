"""The operators of a frozen network: the bits of the unfrozen one for every family, number of rows
and width."""

import pytest
import torch
from torch import library

from fusedmoe import codec, families, testing
from fusedmoe.op import fusion_network
from fusedmoe.packed import pack, runner

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 70, 300)
# Widths of several groups of outputs and their remainders, reductions of several chains and their
# remainders.
WIDE = {
    "wide adatt": families.adatt(37, [[29], [40, 33]], 3, 2, 1, activation="silu", towers=(8, 1)),
    "long chains": families.mmoe(600, [[257, 390]], 3, 4),
    "whole groups": families.ple(512, [[256], [128]], 2, 1, 1, towers=(64, 1)),
}
TABLES = {**{name: case.table for name, case in testing.cases().items() if not name.endswith("one_row")}, **WIDE}


def draw(rows: int, table, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(
        rows,
        table.inputs[0].slots,
        table.inputs[0].width,
        generator=torch.Generator().manual_seed(rows),
        dtype=torch.float64,
    ).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_the_bits_are_those_of_the_unfrozen_network(name, dtype):
    table = TABLES[name]
    params = [torch.empty(p.shape, dtype=dtype) for p in table.parameters]
    testing.randomise(params, seed=1)
    run, packed = runner(table), pack(params, table)
    for rows in ROWS:
        x = draw(rows, table, dtype)
        assert torch.equal(run(x, packed), fusion_network(x, params, table, "cpu")), f"{rows} rows"


def test_strides_of_the_input_do_not_matter():
    table = TABLES["wide adatt"]
    params = [torch.empty(p.shape) for p in table.parameters]
    testing.randomise(params, seed=1)
    run, packed = runner(table), pack(params, table)
    x = draw(8, table, torch.float32)
    for given in (
        x[::2],
        x.transpose(0, 2).contiguous().transpose(0, 2),
        x[:, :1].expand(-1, table.inputs[0].slots, -1),
        x[:0],
        x[:, :, :1].expand_as(x),
    ):
        assert torch.equal(run(given, packed), fusion_network(given, params, table, "cpu"))


@pytest.mark.parametrize("name", ["freeze_cpu", "network_cpu_frozen"])
def test_the_operators_are_what_pytorch_expects(name):
    table = TABLES["every_feature"]
    params = [torch.randn(p.shape) for p in table.parameters]
    text = codec.encode(table)
    arguments = (params, text) if name == "freeze_cpu" else (draw(5, table, torch.float32), pack(params, table), text)
    library.opcheck(getattr(torch.ops.fusedmoe, name).default, arguments)


def test_the_operator_checks_what_it_is_given():
    table = TABLES["wide adatt"]
    params = [torch.randn(p.shape) for p in table.parameters]
    packed, run = pack(params, table), runner(table)
    x = draw(3, table, torch.float32)
    for wrong, message in (
        (lambda: run(x, packed[:-1]), r"packed: expected what freeze_cpu returned, \[\d+\], got \[\d+\]"),
        (lambda: run(x.double(), packed), "x: expected dtype Float of the frozen parameters, got Double"),
        (lambda: run(x[..., :-1], packed), r"x: expected \[B, 4, 37\], got \[3, 4, 36\]"),
        (lambda: run(x, packed.half()), "packed: a frozen network expects float32 or float64"),
        (lambda: pack(params[:-1], table), "params: expected"),
        (lambda: pack([*params[:-1], params[-1].double()], table), "expected dtype Float, got Double"),
    ):
        with pytest.raises(RuntimeError, match=message):
            wrong()
