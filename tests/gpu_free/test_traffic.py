"""The bytes that the forward's plan says it moves, against those that its compiled code moves."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fusedmoe.speed.subjects import SUBJECTS, build

pytest.importorskip("triton", reason="gpu_free: expected the package triton, which compiles without a device, got none")

from fusedmoe.kernels import network, tiles
from fusedmoe.kernels.lowering import inline_hidden, of_one_slot

from .executed import executed
from .ptx import Counts

_SPEC = importlib.util.spec_from_file_location("roofline", Path(__file__).parent.parent.parent / "bench/roofline.py")
roofline = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(roofline)
# Rows up to which a call is one launch, from which a tile has 128, and of the call: tiles of 16, 64
# and 128 rows.
SIZES = {16: (128, 4096, 16), 64: (0, 4096, 64), 128: (0, 128, 128)}
# Layers, and whether one x is expanded to all slots; that of MMoE has one.
CALLS = {
    "adatt, one x": ("AdaTT T3m2", True),
    "adatt, an x a slot": ("AdaTT T3m2", False),
    "ple, one x": ("PLE T3m2s1", True),
    "ple, an x a slot": ("PLE T3m2s1", False),
    "mmoe": ("MMoE T3e8", False),
}
FLOOR = 0.4


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize(
    "call", [call if "adatt" in call else pytest.param(call, marks=pytest.mark.slow) for call in CALLS]
)
def test_the_forward_moves_the_bytes_of_its_plan(call, rows, monkeypatch):
    """To the byte, tensor by tensor, of the PTX for sm_80."""
    name, expanded = CALLS[call]
    whole, many, batch = SIZES[rows]
    monkeypatch.setattr(tiles, "WHOLE_ROWS", whole)
    monkeypatch.setattr(tiles, "MANY_ROWS", many)
    layer = build(SUBJECTS[name], torch.bfloat16)
    table = layer.table
    program = of_one_slot(inline_hidden(table)) if expanded else inline_hidden(table)
    x = torch.randn(
        batch,
        1 if expanded else table.inputs[0].slots,
        table.inputs[0].width,
        generator=torch.Generator().manual_seed(0),
    ).to(torch.bfloat16)
    lent = [(parameter.name, tensor.detach()) for parameter, tensor in zip(table.parameters, layer.params, strict=True)]
    with executed(lent) as kernels:
        network.forward(
            x.expand(batch, table.inputs[0].slots, table.inputs[0].width),
            [tensor for _, tensor in lent],
            table,
            False,
            False,
            backend="triton",
        )
    got = sum(kernels["forward_kernel"].launches, Counts())
    expected = roofline.traffic(program, tiles.choose(program, torch.bfloat16, batch, "sm_80"), batch, 2)
    assert got.written == expected.written
    assert {
        name: count for name, count in got.read.items() if name not in ("plan", "floats", "addresses")
    } == expected.read


def test_the_forward_moves_less_than_eager():
    """AdaTT T3m2 in bfloat16 at 4,096 rows, whose x callers expand to its slots: at most 0.4 of the
    bytes of eager's operators."""
    case = roofline.case("AdaTT T3m2")
    assert (case.tiles.rows, case.tiles.columns) == (128, 64)
    assert case.programs.total <= FLOOR * case.eager
    assert case.operands.total <= case.programs.total


def test_operators_are_counted_without_their_views():
    x, w = torch.zeros(6, 4), torch.zeros(5, 4)
    with roofline.Eager() as eager:
        (x @ w.t()).view(30).relu_()
        torch.ops.aten._unsafe_view(x.expand(2, 6, 4)[0], [24])
    assert (eager.operators, eager.read, eager.written) == (2, 4 * (24 + 20 + 30), 4 * (30 + 30))
