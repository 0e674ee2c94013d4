"""A network's forward and backward on a GPU: tensors in, tensors out, and which launches run between, whoever launches (`launchers.py`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fusedmoe.kernels import device
from fusedmoe.kernels.backward_plan import BackwardPlan, backward_plan_of
from fusedmoe.kernels.launchers import launcher
from fusedmoe.kernels.plan import CODES, Plan, plan_of
from fusedmoe.kernels.program import Program, fused, lower, of_one_slot
from fusedmoe.kernels.tiles import CHUNK, Tiles, aligned, choose
from fusedmoe.table import Table

# Of chunks in the second dimension of a grid.
MOST_CHUNKS = 65535


class Saved(NamedTuple):
    """What the forward leaves for the backward: the stages' buffers [B x kept], the softmax of every unit [rows, B] in float32, and the tiles that
    say which row is whose; None: the shipped ones."""

    buffers: Tensor
    softmax: Tensor
    tiles: Tiles | None = None


class _Call(NamedTuple):
    """One call's tensors, who launches, what was chosen for it, and the constants that all its launches share."""

    kernels: ModuleType
    program: Program
    tiles: Tiles
    x: Tensor
    addresses: object
    align: int
    constants: dict[str, object]

    def grid(self, programs: int) -> tuple[int, int]:
        return -(-len(self.x) // self.tiles.rows), programs


@functools.lru_cache(maxsize=1024)
def _codes(activations: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(CODES[name] for name in activations)


@functools.lru_cache(maxsize=4096)
def _store(program: Program, stages: tuple[int, ...], align: int) -> int:
    """The alignment of what these stages hand on: that of everything else, or none."""
    written = [program.stages[stage] for stage in stages]
    sizes = [size for stage in written for size in (stage.width, *(n for unit in stage.units for n in (unit.width, unit.column)))]
    return align if aligned(sizes, align) else 1


@functools.lru_cache(maxsize=1024)
def _reached(program: Program, lanes: int) -> bool:
    """Whether the weights' rows, and where sources begin and end, are multiples of a vector load."""
    return aligned(program.strides, lanes)


def precision(dtype: torch.dtype, arch: str) -> str:
    """How products of float32 are computed: three tf32 products, which err like float32's own; one, where the user allows tf32. AMD has no tf32 here."""
    if dtype != torch.float32 or arch.startswith("gfx"):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def program_of(x: Tensor, table: Table, training: bool) -> Program:
    """The stages that a forward runs: in training what `backward` reads, and one slot where x's are one."""
    program = lower(table) if training else fused(table)
    return program if x.stride(1) or table.slots == 1 else of_one_slot(program)


def alignment(x: Tensor, even: bool, program: Program) -> int:
    """The numbers whose multiples every row of every operand begins at: those of a vector load of 16 bytes, or 1. even: whether parameters' addresses do."""
    lanes = 16 // x.element_size()
    whole = even and x.data_ptr() % 16 == 0 and x.stride(0) % lanes == 0 and x.stride(1) % lanes == 0 and _reached(program, lanes)
    return lanes if whole else 1


def chunk_of(rows: int) -> int:
    """Rows of one part of a parameter's gradient: CHUNK, or as many as a grid can be made of."""
    return CHUNK * max(1, -(-rows // (CHUNK * MOST_CHUNKS)))


def _prepare(x: Tensor, params: Sequence[Tensor], program: Program, tiles: Tiles | None, backend: str) -> _Call:
    kernels = launcher(backend)
    arch = device.architecture(x.device)
    tiles = tiles or choose(program, x.dtype, len(x), arch, kernels.BESIDE_HIDDEN)
    addresses, even = kernels.addresses(params, x.device)
    align = alignment(x, even, program)
    return _Call(kernels, program, tiles, x, addresses, align, kernels.constants(tiles, align, precision(x.dtype, arch), arch))


def _plan(program: Program, tiles: Tiles) -> Plan:
    return plan_of(program, tiles.whole, tiles.units, tiles.columns)


def forward(
    x: Tensor, params: Sequence[Tensor], table: Table, mixing: bool, training: bool, tiles: Tiles | None = None, backend: str = "triton"
) -> tuple[Tensor, Tensor, Saved]:
    """Run the network: `fusion_network`'s mathematics.

    Args:
        x: [B, S, D], its last dimension contiguous.
        params: contiguous, one per `table.parameters`, of x's dtype.
        table: the network.
        mixing: return the mixing weights.
        training: keep what `backward` needs; without it hidden layers stay on the chip where a level has one stage of them.
        tiles: None: the shipped ones.
        backend: whose kernels.

    Returns: out [B, *table.output], weights [B, table.mixing] (or [B, 0]), and what `backward` takes.
    """
    call = _prepare(x, params, program_of(x, table, training), tiles, backend)
    plan = _plan(call.program, call.tiles)
    rows = len(x)
    out = x.new_empty(rows, *table.output)
    weights = x.new_zeros(rows, table.mixing) if mixing else x.new_empty(rows, 0)
    saved = Saved(x.new_empty(rows * call.program.kept), x.new_empty(plan.softmax, rows, dtype=torch.float32), call.tiles)
    ints, floats = device.written(plan, x.device)
    for launch in plan.launches if rows else ():
        call.kernels.forward(
            call.grid(launch.programs), x, saved.buffers, out, saved.softmax, weights, call.addresses, ints, floats, launch.place, rows,
            x.stride(0), x.stride(1), table.mixing,
            UNITS=plan.units, READS=call.tiles.reads, ACTS=_codes(call.program.activations), WEIGHTS=mixing, INNER=call.program.inner,
            COPIES=call.program.copies, KEEP=call.tiles.keep, AHEAD=call.tiles.ahead, STORE=_store(call.program, launch.stages, call.align), **call.constants,
        )  # fmt: skip
    return out, weights, saved


def flat_backward(
    d_out: Tensor,
    d_weights: Tensor | None,
    x: Tensor,
    params: Sequence[Tensor],
    saved: Saved,
    table: Table,
    tiles: Tiles | None = None,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """Return d_x [B, S, D] and the gradients of the live parameters, one after another.

    Args:
        d_out: [B, *table.output], contiguous.
        d_weights: [B, table.mixing], contiguous, or None.
        x, params, table: as `forward` had them.
        saved: what it returned.
        tiles: of the backward, whatever those of the forward were; None: the shipped ones.
        backend: whose kernels.
    """
    shipped = choose(lower(table), x.dtype, len(x), device.architecture(x.device))
    call = _prepare(x, params, lower(table), tiles or shipped.backward, backend)
    rows = len(x)
    before = _plan(call.program, saved.tiles or shipped)
    plan = backward_plan_of(before, call.tiles.whole, call.tiles.columns, call.tiles.outputs)
    total = call.program.gradients[1]
    # Those of a call that returned no mixing weights are [B, 0].
    d_weights = d_weights if d_weights is not None and d_weights.numel() else None
    # Rows of the output are read in vectors of 16 bytes, where their distance allows it.
    d_out = d_out.clone() if d_out.data_ptr() % 16 else d_out
    d_x = x.new_empty(x.shape)
    flat = x.new_empty(total) if rows else x.new_zeros(total)
    if rows:
        call = call._replace(constants={**call.constants, **call.kernels.scratch(plan.tasks, x)})
        dw = x.new_empty(plan.rows, rows, dtype=torch.float32)
        dz = x.new_empty(rows, plan.columns)
        _rows(call, plan, d_out, d_weights, saved, d_x, dw, dz)
        if total:
            _parameters(call, plan, d_out, d_weights, saved, dw, dz, flat)
    return d_x, flat


def split(flat: Tensor, program: Program) -> list[Tensor | None]:
    """Return the gradient of each parameter as a view; None for those on which no output depends."""
    return [None if place is None else flat.as_strided(*place) for place in _places(program)]


@functools.lru_cache(maxsize=1024)
def _places(program: Program) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int] | None, ...]:
    """Shape, strides and first number of each parameter's gradient; None for those that have none."""
    shapes = [p.shape for p in program.table.parameters]
    strides = [torch.empty(shape, device="meta").stride() for shape in shapes]
    return tuple(None if first < 0 else (*place, first) for first, *place in zip(program.gradients[0], shapes, strides, strict=True))


def backward(
    d_out: Tensor,
    d_weights: Tensor | None,
    x: Tensor,
    params: Sequence[Tensor],
    saved: Saved,
    table: Table,
    tiles: Tiles | None = None,
    backend: str = "triton",
) -> tuple[Tensor, list[Tensor | None]]:
    """Return d_x and one gradient a parameter: `flat_backward`, split."""
    d_x, flat = flat_backward(d_out, d_weights, x, params, saved, table, tiles, backend)
    return d_x, split(flat, lower(table))


def _rows(call: _Call, plan: BackwardPlan, d_out: Tensor, d_weights: Tensor | None, saved: Saved, d_x: Tensor, dw: Tensor, dz: Tensor) -> None:
    x = call.x
    ints, floats = device.written(plan, x.device)
    d_buffers = torch.empty_like(saved.buffers)
    given = d_weights is not None
    for launch in plan.launches:
        call.kernels.backward_rows(
            call.grid(launch.programs), x, saved.buffers, d_out, saved.softmax, dw, d_x, d_buffers, d_out, d_weights if given else d_out, dz,
            call.addresses, ints, floats, launch.place, len(x), x.stride(0), x.stride(1), d_x.stride(0), d_x.stride(1), plan.columns,
            call.program.table.mixing, READS=call.tiles.reads,
            ACTS=_codes(call.program.activations), WEIGHTS=given, STORE=_store(call.program, launch.stages, call.align), **call.constants,
        )  # fmt: skip


def _parameters(call: _Call, plan: BackwardPlan, d_out: Tensor, d_weights: Tensor | None, saved: Saved, dw: Tensor, dz: Tensor, flat: Tensor) -> None:
    x, total = call.x, len(flat)
    ints, _ = device.written(plan, x.device)
    chunk = chunk_of(len(x))
    chunks = -(-len(x) // chunk)
    parts = x.new_empty(chunks, total, dtype=torch.float32)
    given = d_weights is not None
    call.kernels.gradients(
        (plan.tasks, chunks), x, saved.buffers, d_out, dw, d_weights if given else d_out, dz, parts, flat, ints, plan.place, len(x),
        x.stride(0), x.stride(1), plan.columns, call.program.table.mixing, total, WEIGHTS=given, CHUNK=chunk, BLOCK_N=call.tiles.outputs, **call.constants,
    )  # fmt: skip
