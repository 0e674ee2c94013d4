"""The bytes that the forward's plan says it moves, against those that its compiled code moves."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fusedmoe.speed.subjects import SUBJECTS, build

pytest.importorskip("triton", reason="gpu_free: expected the package triton, which compiles without a device, got none")

from fusedmoe.kernels import network, tiles
from fusedmoe.kernels.program import fused

from .executed import executed
from .ptx import Counts

_SPEC = importlib.util.spec_from_file_location("roofline", Path(__file__).parent.parent.parent / "bench/roofline.py")
roofline = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(roofline)
ROWS = 128


def test_the_forward_moves_the_bytes_of_its_plan(monkeypatch):
    """To the byte. Vectors and scalars, which do not pass through shared memory, are read by several warps each."""
    monkeypatch.setattr(tiles, "WHOLE_ROWS", 0)
    layer = build(SUBJECTS["AdaTT T3m2"], torch.bfloat16)
    table, program = layer.table, fused(layer.table)
    x = torch.randn(ROWS, table.slots, table.width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    lent = [(parameter.name, tensor.detach()) for parameter, tensor in zip(table.parameters, layer.params, strict=True)]
    with executed(lent) as kernels:
        network.forward(x, [tensor for _, tensor in lent], table, False, False)
    got = sum(kernels["forward_kernel"].launches, Counts())
    chosen = tiles.choose(program, torch.bfloat16, ROWS)
    expected = roofline.traffic(program, chosen, ROWS, 2)
    assert got.written == expected.written
    read = {name: count for name, count in got.read.items() if name not in ("plan", "floats", "addresses")}
    assert read.keys() == expected.read.keys()
    several = {name for name in read if name == "p" or name.startswith("statics.") or name.endswith("bias")}
    assert {name: read[name] for name in read if name not in several} == {name: expected.read[name] for name in read if name not in several}
    assert [name for name in several if read[name] not in [warps * expected.read[name] for warps in range(1, chosen.warps + 1)]] == []


def test_operators_are_counted_without_their_views():
    x, w = torch.zeros(6, 4), torch.zeros(5, 4)
    with roofline.Eager() as eager:
        (x @ w.t()).view(30).relu_()
        torch.ops.aten._unsafe_view(x.expand(2, 6, 4)[0], [24])
    assert (eager.operators, eager.read, eager.written) == (2, 4 * (24 + 20 + 30), 4 * (30 + 30))
