"""What a call launches, in words; read off the plans that launches are made from."""

from __future__ import annotations

import torch

from fusedmoe.kernels import tiles
from fusedmoe.kernels.backward_plan import backward_plan_of
from fusedmoe.kernels.device import architecture
from fusedmoe.kernels.launchers import GRADIENT_LAUNCHES
from fusedmoe.kernels.lowering import inline_hidden, lower
from fusedmoe.kernels.plan import plan_of
from fusedmoe.kernels.program import Program
from fusedmoe.kernels.self_test import history, name_of
from fusedmoe.table import Table


def describe_launches(table: Table, dtype: torch.dtype, device: torch.device, backend: str) -> str:
    """Return lines on the device, the launches forward and backward, and segments through memory.

    The first line says whether these kernels have run on the device's architecture.
    """
    program = lower(table)
    lines = [f"{backend} on {name_of(device)} ({history(device, backend)})"]
    for rows, batch in ((tiles.WHOLE_ROWS, f"up to {tiles.WHOLE_ROWS} rows"), (tiles.WHOLE_ROWS + 1, "more rows")):
        forward, backward = launches(program, dtype, rows, architecture(device), backend)
        lines.append(f"  {batch}: launches forward {forward}, backward {backward}")
    for mode, lowered in (("training", program), ("inference", inline_hidden(table))):
        lines.append(f"  segments of their own, handed on in memory, {mode}: {_segments(lowered)}")
    return "\n".join(lines)


def launches(program: Program, dtype: torch.dtype, rows: int, arch: str, backend: str) -> tuple[int, int]:
    """How many launches the forward and the backward of a call of so many rows are."""
    chosen = tiles.choose(program, dtype, rows, arch, tiles.BESIDE_HIDDEN[backend])
    forward = plan_of(program, chosen.whole, chosen.units, chosen.columns)
    chosen = chosen.backward
    backward = backward_plan_of(forward, chosen.whole, chosen.columns, chosen.outputs)
    return len(forward.launches), len(backward.launches) + GRADIENT_LAUNCHES[backend] * bool(program.gradients[1])


def _segments(program: Program) -> str:
    """The segments before the levels' own: hidden layers in memory, experts that gates select."""
    front = [program.segments[number] for group in program.levels for number in group[:-1]]
    counts = [(segment.name, "linear", len(segment.units)) for segment in front if segment.units]
    counts += [(one.name, "operation", len(one.operations)) for one in front if one.operations]
    return "; ".join(f"{name} ({count} {what}{'s' * (count != 1)})" for name, what, count in counts) or "none"
