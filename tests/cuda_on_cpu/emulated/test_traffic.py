"""The bytes of global memory that the CUDA forward moves, against the formula of Triton's,
bench/roofline.py, whose plans it reads.

Operands of products, and what goes out, are the same to the byte. What differs is how threads get
at numbers that do not pass through a panel: the emulator counts each thread's access, and those of
a warp to one address are one on a device.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from fusedmoe.kernels import network, tiles
from fusedmoe.kernels.lowering import inline_hidden
from fusedmoe.speed.subjects import SUBJECTS, build

from ..watched import watched

_SPEC = importlib.util.spec_from_file_location("roofline", Path(__file__).parents[3] / "bench/roofline.py")
roofline = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(roofline)
# Rows up to which a call is one launch, from which a tile may have 128, and of the call: tiles of
# 16, 64 and, for up to three units, 128 rows.
SIZES = {16: (128, 4096, 16), 64: (0, 4096, 64), 128: (0, 128, 128)}
LAYERS = ("AdaTT T3m2", "MMoE T3e8", "PLE T3m2s1")
ARGUMENTS = {f"forward, {name}": name for name in ("x", "buffers", "out", "p")}


def readers(rows: int) -> "roofline.Readers":
    """Threads that read one number: of an expert's bias and of a gate's the eight lanes of each
    warp down the tile that have its column; of a static weight one for each row, and so of p, which
    then stands in shared memory for all.
    """
    bias = 8 * min(rows // 16, 4)
    return roofline.Readers(softmax=1, bias=bias, gate=bias, static=rows)


@pytest.mark.parametrize("rows", [rows if rows == 16 else pytest.param(rows, marks=pytest.mark.slow) for rows in SIZES])
@pytest.mark.parametrize(
    "name", [name if name == LAYERS[0] else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]
)
def test_the_forward_moves_the_bytes_of_its_plan(name, rows, monkeypatch):
    whole, many, batch = SIZES[rows]
    monkeypatch.setattr(tiles, "WHOLE_ROWS", whole)
    monkeypatch.setattr(tiles, "MANY_ROWS", many)
    layer = build(SUBJECTS[name], torch.bfloat16)
    table, program = layer.table, inline_hidden(layer.table)
    chosen = tiles.choose(program, torch.bfloat16, batch, "cpu", tiles.BESIDE_HIDDEN["cuda"])
    monkeypatch.setattr(roofline, "READERS", {(chosen.rows, inner): readers(chosen.rows) for inner in (False, True)})
    x = torch.randn(batch, table.inputs[0].slots, table.inputs[0].width, generator=torch.Generator().manual_seed(0)).to(
        torch.bfloat16
    )
    lent = [(parameter.name, tensor.detach()) for parameter, tensor in zip(table.parameters, layer.params, strict=True)]
    with watched(lent) as watch:
        network.forward(x, [tensor for _, tensor in lent], table, False, False, backend="cuda")
    expected = roofline.traffic(program, chosen, batch, 2)
    # Logits lie where p will, and are read for the largest, for the sum and for p itself.
    logits = expected.written["p"]
    expected.written["p"] += logits
    expected.read["p"] += 3 * logits
    got = [
        {ARGUMENTS.get(label, label): count for label, count in counts.items() if count}
        for counts in (watch.read, watch.written)
    ]
    plan = [label for label in got[0] if label.startswith("forward, ")]
    assert {label: count for label, count in got[0].items() if label not in plan} == expected.read
    assert got[1] == expected.written
