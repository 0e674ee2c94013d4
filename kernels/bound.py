"""What calls are bound to: everything about a network's launches that addresses, rows and streams
do not change, worked out once and kept.

A call makes a `Key`, a few cheap words about its tensors, and finds its `Forward` or `Backward` by
it: no table is read, no plan hashed, no tile chosen a second time. What a call allocates besides
its results is one allocation, cut as `Forward.saved` and `Backward.scratch` say.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fusedmoe.kernels import device, lowering, tiles
from fusedmoe.kernels.backward_plan import BackwardPlan, backward_plan_of
from fusedmoe.kernels.plan import Plan, plan_of
from fusedmoe.kernels.program import Program
from fusedmoe.kernels.tiles import CHUNK, Tiles, aligned, rowwise
from fusedmoe.kernels.writer import CODES, Launch
from fusedmoe.storage import require_memory
from fusedmoe.table import Table

# Of chunks in the second dimension of a grid.
MOST_CHUNKS = 65535
# Regions of one allocation begin at multiples of so many bytes: a line of the L2 cache, and more
# than any vector load.
LINE = 128


class Key(NamedTuple):
    """What the launches of a call depend on.

    text: the table's. apart: whether x's slots are, in memory. whole, many: what the rows mean to
    `tiles.choose`. tiles: those asked for; None: the shipped ones. before: of a backward, the tiles
    of its forward.
    """

    backend: str
    text: str
    training: bool
    apart: bool
    dtype: torch.dtype
    device: torch.device
    arch: str
    precision: str
    whole: bool
    many: bool
    tiles: Tiles | None
    before: Tiles | None = None


def precision(dtype: torch.dtype, arch: str) -> str:
    """How products of float32 are computed: three tf32 products, which err like float32's own; one,
    where the user allows tf32. AMD has no tf32 here."""
    if dtype != torch.float32 or arch.startswith("gfx"):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def key_of(x: Tensor, table: Table, training: bool, chosen: Tiles | None, backend: str) -> Key:
    """The key of a forward of x."""
    rows, dtype, place = x.shape[0], x.dtype, x.device
    arch = device.architecture(place)
    # Bools, also of the symbolic number of rows that torch.compile traces with.
    sizes = bool(rows <= tiles.WHOLE_ROWS), bool(rows >= tiles.MANY_ROWS)
    return Key(
        backend, table.text, training, bool(x.stride(1)), dtype, place, arch, precision(dtype, arch), *sizes, chosen
    )


def chunk_of(rows: int) -> int:
    """Rows of one part of a parameter's gradient: CHUNK, or as many as a grid can be made of."""
    return CHUNK if rows <= CHUNK * MOST_CHUNKS else CHUNK * -(-rows // (CHUNK * MOST_CHUNKS))


def lines(size: int) -> int:
    """A number of bytes, rounded up to a whole LINE."""
    return -(-size // LINE) * LINE


@functools.lru_cache(maxsize=1024)
def vectorizable(program: Program, lanes: int) -> bool:
    """Whether the weights' rows, and where sources begin and end, are multiples of a vector load."""
    return aligned(program.strides, lanes)


def alignment(x: Tensor, aligned16: bool, program: Program) -> int:
    """The numbers whose multiples every row of every operand begins at: those of a vector load of
    16 bytes, or 1. aligned16: whether parameters' addresses do."""
    lanes = 16 // x.element_size()
    whole = (
        aligned16
        and x.data_ptr() % 16 == 0
        and x.stride(0) % lanes == 0
        and x.stride(1) % lanes == 0
        and vectorizable(program, lanes)
    )
    return lanes if whole else 1


@functools.lru_cache(maxsize=4096)
def store(program: Program, segments: tuple[int, ...], align: int) -> int:
    """The alignment of what these segments hand on: that of everything else, or none."""
    written = [program.segments[segment] for segment in segments]
    sizes = [
        size
        for segment in written
        for size in (segment.width, *(n for unit in segment.units for n in (unit.width, unit.column)))
    ]
    return align if aligned(sizes, align) else 1


def rowwise_alignment(program: Program, align: int) -> int:
    """The alignment of what row-wise operations read and write: that of everything else, or none."""
    return align if aligned(program.rowwise_strides, align) else 1


@dataclass(frozen=True, eq=False)
class Bound:
    """What a forward and a backward have in common. ints, floats: the plan on the device. made:
    what the launcher has worked out for it so far."""

    key: Key
    program: Program
    tiles: Tiles
    ints: Tensor
    floats: Tensor
    made: dict[object, object] = field(default_factory=dict)

    @functools.cached_property
    def written(self) -> tuple[int, int]:
        """The addresses of the plan."""
        return self.ints.data_ptr(), self.floats.data_ptr()

    @functools.cached_property
    def codes(self) -> tuple[int, ...]:
        """The numbers of the activations that may occur in linears."""
        return tuple(CODES[name] for name in self.program.activations)

    @functools.cached_property
    def rowwise_codes(self) -> tuple[int, ...]:
        """As `codes`, of row-wise operations."""
        return tuple(CODES[name] for name in self.program.rowwise_activations)

    @property
    def mixing(self) -> int:
        """Columns of the mixing weights."""
        return self.program.table.mixing

    @property
    def lanes(self) -> int:
        """Numbers of a vector load."""
        return 16 // self.key.dtype.itemsize

    def stores(self, launch: Launch) -> bool:
        """Whether what a launch hands on begins at multiples of a vector load, where everything
        else does."""
        return store(self.program, launch.segments, self.lanes) > 1

    @functools.cached_property
    def rowwise(self) -> tuple[int, int]:
        """Rows and columns of the tiles of row-wise operations."""
        return rowwise(self.program)

    def blocks(self, rows: int, rowwise: bool = False) -> int:
        """How many tiles the rows of a call are."""
        return -(-rows // (self.rowwise[0] if rowwise else self.tiles.rows))


@dataclass(frozen=True, eq=False)
class Forward(Bound):
    """A forward. plan: its records and launches."""

    plan: Plan = None

    @functools.cached_property
    def output(self) -> tuple[int, ...]:
        """The shape of a row of the output."""
        return self.program.table.output

    def saved(self, rows: int) -> tuple[int, int]:
        """Bytes of the softmax in float32, which comes first of what is left for the backward, and
        with the segments' buffers behind it."""
        return saved_bytes(self.plan.softmax, self.program.buffer_width, rows, self.key.dtype.itemsize)

    def needs(self, rows: int) -> int:
        """Bytes that a forward allocates, or nearly."""
        return self.saved(rows)[1] + self.key.dtype.itemsize * rows * math.prod(self.output)


def saved_bytes(softmax: int, buffer_width: int, rows: int, size: int) -> tuple[int, int]:
    """As `Forward.saved`, of so many rows of the softmax and numbers of the buffers a row."""
    first = lines(4 * softmax * rows)
    return first, first + lines(buffer_width * size * rows)


class Scratch(NamedTuple):
    """Where the regions of a backward's scratch begin behind dw, in bytes: the parts of the
    gradients, dz, the buffers' gradients; and how many all are."""

    parts: int
    dz: int
    buffers: int
    size: int


@dataclass(frozen=True, eq=False)
class Backward(Bound):
    """A backward. forward: the plan of what it reads; plan: its own."""

    forward: Plan = None
    plan: BackwardPlan = None

    @functools.cached_property
    def total(self) -> int:
        """How many numbers the gradients of all live parameters are."""
        return self.program.gradients[1]

    def saved(self, rows: int) -> tuple[int, int]:
        """As `Forward.saved` of the forward that came before."""
        return saved_bytes(self.forward.softmax, self.program.buffer_width, rows, self.key.dtype.itemsize)

    def scratch(self, rows: int, chunks: int) -> Scratch:
        """How the memory that a backward needs besides its results is cut."""
        size = self.key.dtype.itemsize
        parts = lines(4 * self.plan.rows * rows)
        dz = parts + lines(4 * chunks * self.total)
        buffers = dz + lines(size * rows * self.plan.columns)
        return Scratch(parts, dz, buffers, buffers + lines(size * rows * self.program.buffer_width))

    def needs(self, rows: int, chunk: int) -> int:
        """Bytes that a backward allocates, or nearly."""
        table, size = self.program.table, self.key.dtype.itemsize
        return self.scratch(rows, -(-rows // chunk)).size + size * (
            self.total + rows * table.graph.inputs[0].slots * table.graph.inputs[0].width
        )


def call_fields(bound: Bound) -> dict[str, object]:
    """What the operators in C++ want to know of every call, by their names (csrc/gpu/bound.h)."""
    table = bound.program.table
    ints, floats = bound.written
    return {
        "shapes": [p.shape for p in table.parameters],
        "output": table.output,
        "slots": table.graph.inputs[0].slots,
        "width": table.graph.inputs[0].width,
        "mixing": table.mixing,
        "size": bound.key.dtype.itemsize,
        "lanes": bound.lanes,
        "vectorizable": vectorizable(bound.program, bound.lanes),
        "ints": ints,
        "floats": floats,
        "plan_bytes": bound.ints.nbytes,
        "floats_bytes": bound.floats.nbytes,
        "buffer_width": bound.program.buffer_width,
        "tile": bound.tiles.rows,
        "rowwise_tile": bound.rowwise[0],
        "shared": bound.program.shared,
    }


def program_of(key: Key) -> Program:
    """The segments that a forward runs: in training what the backward reads, and one slot where x's
    are one."""
    found = lowering.of_text(key.text, key.training)
    return found if key.apart or found.table.graph.inputs[0].slots == 1 else lowering.of_one_slot(found)


def _plan(program: Program, chosen: Tiles) -> Plan:
    return plan_of(program, chosen.whole, chosen.units, chosen.columns)


def _shipped(key: Key, found: Program) -> Tiles:
    return tiles.chosen(found, key.dtype, key.whole, key.many, key.arch, tiles.BESIDE_HIDDEN[key.backend])


@functools.lru_cache(maxsize=1024)
def softmax_of(key: Key) -> int:
    """Rows of the softmax that a forward leaves, which a trace asks for where no plan can be put on
    the device."""
    found = program_of(key)
    return _plan(found, key.tiles or _shipped(key, found)).softmax


@functools.lru_cache(maxsize=1024)
def forward_of(key: Key) -> Forward:
    """Bind a forward. Raises: RuntimeError in the capture of a CUDA graph (`device.written`)."""
    found = program_of(key)
    chosen = key.tiles or _shipped(key, found)
    plan = _plan(found, chosen)
    return Forward(key, found, chosen, *device.written(plan, key.device), plan=plan)


@functools.lru_cache(maxsize=1024)
def backward_of(key: Key) -> Backward:
    """Bind a backward. Raises: RuntimeError in the capture of a CUDA graph (`device.written`)."""
    found = lowering.of_text(key.text, True)
    shipped = _shipped(key, found)
    chosen = key.tiles or shipped.backward
    forward = _plan(found, key.before or shipped)
    plan = backward_plan_of(forward, chosen.whole, chosen.columns, chosen.outputs)
    return Backward(key, found, chosen, *device.written(plan, key.device), forward=forward, plan=plan)


def check(x: Tensor, params: Sequence[Tensor], table: Table) -> None:
    """Raise ValueError unless the tensors are what the kernels may read: of the table's shapes, one
    dtype and one device. What is wrong says `checks.check`."""
    dtype, place = x.dtype, x.device
    fits = (
        x.dim() == 3
        and tuple(x.shape[1:]) == (table.graph.inputs[0].slots, table.graph.inputs[0].width)
        and len(params) == len(table.parameters)
    )
    if not fits or any(
        p.shape != expect.shape or p.dtype is not dtype or p.device != place
        for p, expect in zip(params, table.parameters, strict=True)
    ):
        raise ValueError("x, params: expected the shapes of the table, one dtype and one device, got others")
    require_memory(x, "x")
    for expect, parameter in zip(table.parameters, params, strict=True):
        require_memory(parameter, f"params, {expect.name}")


def split(flat: Tensor, found: Program) -> list[Tensor]:
    """Return the gradients of the live parameters, each a view."""
    return [flat.as_strided(*place) for place in _places(found) if place is not None]


@functools.lru_cache(maxsize=1024)
def _places(found: Program) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int] | None, ...]:
    """Shape, strides and first number of each parameter's gradient; None for those that have none."""
    shapes = [p.shape for p in found.table.parameters]
    strides = [torch.empty(shape, device="meta").stride() for shape in shapes]
    return tuple(
        None if first < 0 else (*place, first)
        for first, *place in zip(found.gradients[0], shapes, strides, strict=True)
    )
