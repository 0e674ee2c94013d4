"""Bytes of global memory that the forward kernel reads and writes, by tensor, from its plan alone;
and those of eager PyTorch's operators.

    python bench/roofline.py

Every program of a launch reads what its tiles need once each, whatever a cache may hold. Left out:
the plan, addresses and fixed static weights.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedmoe.kernels.lowering import inline_hidden, of_one_slot
from fusedmoe.kernels.plan import groups_of, launches_of
from fusedmoe.kernels.program import NOTHING, Linear, Program, Source, Unit, X
from fusedmoe.kernels.tiles import Tiles, choose
from fusedmoe.speed.subjects import MAIN, SUBJECTS, Called, build

ROWS = 4096
MEGA = 1e6
# Bytes of float32.
SOFTMAX = 4
ARCH = "sm_90"


class Readers(NamedTuple):
    """Warps that read one number of p, of an expert's bias, of a gate's and of the static weights.
    These do not pass through shared memory: each warp reads what its part of a tile needs, and how
    the warps stand over a tile is the compiler's choice.
    """

    softmax: int
    bias: int
    gate: int
    static: int


# By the rows of a tile, and whether hidden layers of 64 rows stand in registers, which lays the
# warps out for two products.
READERS = {
    (16, False): Readers(softmax=4, bias=1, gate=4, static=4),
    (64, False): Readers(softmax=2, bias=8, gate=8, static=8),
    (64, True): Readers(softmax=4, bias=2, gate=4, static=8),
    (128, False): Readers(softmax=1, bias=8, gate=8, static=8),
}


class Traffic(NamedTuple):
    """Bytes by tensor: parameters by their names in the table, x, buffers, out, p (softmax
    scratch)."""

    read: Counter[str]
    written: Counter[str]

    @property
    def total(self) -> int:
        return self.read.total() + self.written.total()


class _Count:
    """Adds up one row block after another; `rows` of the present one are there."""

    def __init__(self, program: Program, tiles: Tiles, size: int):
        self.program, self.tiles, self.size = program, tiles, size
        self.names = [parameter.name for parameter in program.table.parameters]
        self.read, self.written = Counter(), Counter()
        self.rows = 0
        self.readers = READERS.get((tiles.rows, program.hidden and not tiles.whole), Readers(1, 1, 1, 1))

    def source(self, linear: Source) -> None:
        """rows x width, of x or a buffer."""
        self.read["x" if linear.segment == X else "buffers"] += self.rows * linear.width * self.size

    def linear(self, linear: Linear, outputs: int, kept: bool, readers: int) -> None:
        """`outputs` rows of W and b. h is read for them once, if it is not kept; that of a map
        inside once for BLOCK_K of its outputs."""
        self.read[self.names[linear.weight]] += outputs * linear.reduction * self.size
        if linear.bias != NOTHING:
            self.read[self.names[linear.bias]] += outputs * self.size * readers
        if linear.hidden:
            for first in range(0, linear.reduction, self.tiles.reduction):
                self.linear(linear.hidden, min(self.tiles.reduction, linear.reduction - first), kept, readers)
        elif not kept:
            for source in linear.sources:
                self.source(source)

    def softmaxes(self, units: list[Unit]) -> None:
        keeps = self.tiles.resident > 0
        for unit in units:
            if unit.gate:
                self.linear(unit.gate, unit.gate.width, keeps, self.readers.gate)
            self.written["p"] += len(unit.reads) * self.rows * SOFTMAX
        for source in {unit.gate.read[0] for unit in units if unit.gate} if keeps else ():
            self.source(source)

    def mix(self, segment: int, units: list[Unit], experts: tuple[int, ...], columns: int) -> None:
        """`columns` of the experts of a group and of its units."""
        level = self.program.segments[segment]
        keeps, previous = self.tiles.resident > 0, None
        for e in experts:
            linear = level.experts[e]
            if linear.weight == NOTHING:
                self.source(linear.sources[0]._replace(width=columns))
            else:
                if keeps and linear.read != previous:
                    self.source(linear.read[0])
                previous = linear.read
                self.linear(linear, columns, keeps, self.readers.bias)
            for unit in units:
                for read in unit.reads:
                    if read.expert == e:
                        self.read["p"] += self.rows * SOFTMAX * self.readers.softmax
                    if read.expert == e and read.element != NOTHING:
                        self.read[self.names[unit.static]] += self.size * self.readers.static
        self.written["out" if segment + 1 == len(self.program.segments) else "buffers"] += (
            len(units) * columns * self.rows * self.size
        )

    def block(self) -> None:
        """All launches, for one row block."""
        for launch in launches_of(self.program, self.tiles.whole):
            segments = [segment for segment in launch if self.program.segments[segment].units]
            for segment in segments:
                for group in groups_of(self.program.segments[segment], self.tiles.units):
                    units = [self.program.segments[segment].units[u] for u in group.units]
                    for column in range(0, max(units[0].width, 1), self.tiles.columns):
                        # A program of its own has a softmax of its own.
                        if column == 0 or len(segments) == 1:
                            self.softmaxes(units)
                        self.mix(segment, units, group.experts, min(self.tiles.columns, units[0].width - column))


def traffic(program: Program, tiles: Tiles, rows: int, size: int) -> Traffic:
    """Return what the forward reads and writes for so many rows of numbers of `size` bytes."""
    count = _Count(program, tiles, size)
    for first in range(0, rows, tiles.rows):
        count.rows = min(tiles.rows, rows - first)
        count.block()
    return Traffic(count.read, count.written)


def traffic_of_operands(program: Program, tiles: Tiles, rows: int, size: int) -> Traffic:
    """As if one program did all rows and columns of a group: each operand of a product once, which
    is how `Eager` counts operators."""
    return traffic(program, tiles._replace(rows=rows, columns=1 << 20, reduction=1 << 20, resident=1 << 20), rows, size)


class Eager(TorchDispatchMode):
    """Counts the bytes of the tensors that each operator takes and returns; one that returns memory
    it was given moves none."""

    def __init__(self):
        super().__init__()
        self.read = self.written = self.operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.is_mutable or not memory_of(result) & memory_of((args, kwargs)):
            self.read += bytes_of((args, kwargs))
            self.written += bytes_of(result)
            self.operators += 1
        return result


def tensors_of(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory_of(tree: object) -> set[int]:
    """The addresses of the storages of the tensors in a tree."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors_of(tree)}


def bytes_of(tree: object) -> int:
    """The bytes of the tensors in a tree; a dimension that was expanded, once."""
    return sum(
        prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or not n) * t.element_size()
        for t in tensors_of(tree)
    )


class Case(NamedTuple):
    """A layer's forward at ROWS rows in bfloat16: its tiles, its bytes with each operand once and
    as programs read them, eager's, and its operators."""

    tiles: Tiles
    operands: Traffic
    programs: Traffic
    eager: int
    operators: int


def case(name: str) -> Case:
    """Count a layer of `fusedmoe.speed.subjects`."""
    layer = build(SUBJECTS[name], torch.bfloat16)
    # `Called` expands [B, D] to the slots, as models do.
    program = of_one_slot(inline_hidden(layer.table))
    tiles = choose(program, torch.bfloat16, ROWS, ARCH)
    x = torch.zeros(ROWS, layer.table.inputs[0].width, dtype=torch.bfloat16)
    with torch.no_grad(), Eager() as eager:
        Called(layer.module, layer.slots)(x)
    counts = [count(program, tiles, ROWS, 2) for count in (traffic_of_operands, traffic)]
    return Case(tiles, *counts, eager.read + eager.written, eager.operators)


def main() -> None:
    print(
        f"inference, {ROWS} rows, bfloat16: MB of global memory; each operand once, and as programs read "
        f"them, without a cache"
    )
    for name in MAIN:
        found = case(name)
        print(f"{name}: eager {found.eager / MEGA:.1f} in {found.operators} operators")
        for what, ours in (("operands", found.operands), ("programs", found.programs)):
            by = ", ".join(f"{kind} {count / MEGA:.1f}" for kind, count in kinds(ours).items())
            print(f"  {what}: {ours.total / MEGA:.1f} ({by}), {ours.total / found.eager:.2f} of eager's")


def kinds(ours: Traffic) -> Counter[str]:
    """Reads and writes together, parameters as `weights`."""
    result: Counter[str] = Counter()
    for name, count in [*ours.read.items(), *ours.written.items()]:
        result[name if name in ("x", "buffers", "out", "p") else "weights"] += count
    return result


if __name__ == "__main__":
    main()
