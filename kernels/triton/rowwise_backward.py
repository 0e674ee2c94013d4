"""Row-wise operations (`kernels/program.py`), backward. Formulas: `reference/operator.py`.

Grid and order as in `rowwise.py`, from the last operation to the first:

    gather   each part's gradient is added to that of the vector it came from
    stage    dz = a'(z) dh' of what dropout kept, and from it dh, through a LayerNorm where there is one
    mix      dw = g . y, dy = w g, then the softmax's backward and what the logits were made from
    product  da = g b, db = g a
    zero     a gradient that operations add to, before the first of them

Vectors' gradients are added to in memory by the one program that has their rows. Those of parameters
go row by row to dw, which `gradients` sums.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fusedmoe.kernels import layout
from fusedmoe.kernels.triton.activation import RELU, derivative
from fusedmoe.kernels.triton.backward import softmax_gradient
from fusedmoe.kernels.triton.records import UNIT, Block, Offsets, load_aligned, rows_of
from fusedmoe.kernels.triton.rowwise import (
    GATHER,
    GATHER_KIND,
    KEY_LOGITS,
    MIX,
    MIX_KIND,
    MIX_READ,
    NO_LOGITS,
    OPERATION,
    PART,
    PRODUCT,
    STAGE,
    STAGE_KIND,
    VECTOR_LOGITS,
    Kind,
    dropped,
    head,
    moments,
    of_read,
    read,
    seen_by,
    slopes_of,
    softmax_of,
    tile_of,
    weights_of,
    write,
)

PRODUCT_KIND = tl.constexpr(layout.PRODUCT_KIND)
ZERO = Offsets(layout.ZERO)


class Sums(NamedTuple):
    """The block whose buffers and x are gradients, and dw [rows, B]."""

    below: Block
    dw: tl.tensor


@triton.jit
def add(block, kind: tl.constexpr, place, column, width, value):
    pointers, live = tile_of(block, kind, place, column, width)
    value += tl.load(pointers, mask=live, other=0.0).to(tl.float32)
    tl.store(pointers, value.to(block.x.dtype.element_ty), mask=live)


@triton.jit
def write_sums(block, kind: tl.constexpr, sums, row, column, width, value):
    """Columns `column`.. of a parameter's gradient, to the rows of dw from `row` on, unless it is -1."""
    if row >= 0:
        columns = column + tl.arange(0, kind.BLOCK_H)
        pointers = sums.dw + (row + columns)[None, :].to(tl.int64) * block.B + (block.row + block.rows)[:, None]
        tl.store(pointers, value, mask=block.live[:, None] & (columns < width)[None, :])


@triton.jit
def write_sum(sums, block, row, value):
    """One number a row, to a row of dw."""
    tl.store(sums.dw + row.to(tl.int64) * block.B + block.row + block.rows, value, mask=block.live)


@triton.jit
def stage_gradient(block, kind: tl.constexpr, sums, stage, seed, column, width, found):
    """(o, gamma, dz, ds) of columns `column`..: ds is what the slopes' gradients are summed from."""
    o, gamma, z = head(block, kind, stage, column, width, found)
    g = read(sums.below, kind, stage + STAGE.place, column, width)
    g = dropped(block, kind, stage, seed, column, g)
    inside = (column + tl.arange(0, kind.BLOCK_H) < width)[None, :]
    d_slope = tl.zeros((kind.BLOCK_B, kind.BLOCK_H), tl.float32)
    if tl.load(block.plan + stage + STAGE.slope) >= 0:
        d_slope = tl.where((z > 0.0) | (g == 0.0), 0.0, g * z)
        dz = tl.where(z > 0.0, g, g * slopes_of(block, kind, stage, column, width)[None, :])
    else:
        code = tl.load(block.plan + stage + STAGE.activation)
        parameter = tl.load(block.floats + tl.load(block.plan + stage + STAGE.parameter))
        # Chosen, not multiplied, as in `backward.expert_tile`.
        dz = tl.where((code == RELU) & (z <= 0.0), 0.0, g * derivative(z, code, parameter, kind.ACTS))
    # Beyond the vector stands the mean of a row, which may be infinite.
    return tl.where(inside, o, 0.0), gamma, tl.where(inside, dz, 0.0), tl.where(inside, d_slope, 0.0)


@triton.jit
def stage_backward(block, kind: tl.constexpr, sums, stage, seed):
    width = load_aligned(block, stage + STAGE.width, kind.ALIGN)
    found = moments(block, kind, stage, width)
    scale = found[1]
    norm = tl.load(block.plan + stage + STAGE.norm) != 0
    d_slope_row = tl.load(block.plan + stage + STAGE.d_slope)
    each = tl.load(block.plan + stage + STAGE.slopes)
    middle = tl.zeros((kind.BLOCK_B,), tl.float32)
    along = tl.zeros((kind.BLOCK_B,), tl.float32)
    slope = tl.zeros((kind.BLOCK_B,), tl.float32)
    for column in range(0, width, kind.BLOCK_H):
        o, gamma, dz, d_slope = stage_gradient(block, kind, sums, stage, seed, column, width, found)
        write_sums(block, kind, sums, tl.load(block.plan + stage + STAGE.d_weight), column, width, dz * o)
        write_sums(block, kind, sums, tl.load(block.plan + stage + STAGE.d_bias), column, width, dz)
        write_sums(block, kind, sums, tl.where(each != 0, d_slope_row, -1), column, width, d_slope)
        slope += tl.sum(d_slope, 1)
        middle += tl.sum(dz * gamma[None, :], 1)
        along += tl.sum(dz * gamma[None, :] * o, 1)
        if not norm:
            add(sums.below, kind, stage + STAGE.source, column, width, dz)
    if (d_slope_row >= 0) & (each == 0):
        write_sum(sums, block, d_slope_row, slope)
    if norm:
        for column in range(0, width, kind.BLOCK_H):
            o, gamma, dz, _ = stage_gradient(block, kind, sums, stage, seed, column, width, found)
            d = dz * gamma[None, :] - (middle / width)[:, None] - o * (along / width)[:, None]
            add(sums.below, kind, stage + STAGE.source, column, width, d * scale[:, None])


@triton.jit
def gather_backward(block, kind: tl.constexpr, sums, gather):
    for i in range(tl.load(block.plan + gather + GATHER.parts)):
        part = gather + GATHER.size + i * PART.size
        if tl.load(block.plan + part + PART.sends) != 0:
            width = load_aligned(block, part + PART.width, kind.ALIGN)
            here = load_aligned(block, part + PART.column, kind.ALIGN)
            there = load_aligned(block, part + PART.first, kind.ALIGN)
            # The part before may be of the same vector.
            tl.debug_barrier()
            for column in range(0, width, kind.BLOCK_H):
                value = read(sums.below, kind, gather + GATHER.place, here + column, here + width)
                add(sums.below, kind, part + PART.place, there + column, there + width, value)


@triton.jit
def experts_gradient(block, kind: tl.constexpr, sums, mix, soft):
    """Send w g to what a unit reads; return g . y, [BLOCK_B, READS]."""
    unit = tl.load(block.plan + mix + MIX.unit)
    width = load_aligned(block, mix + MIX.width, kind.ALIGN)
    row = tl.load(block.plan + mix + MIX.dw)
    d = tl.zeros((kind.BLOCK_B, kind.READS), tl.float32)
    for i in range(tl.load(block.plan + unit + UNIT.reads)):
        mixed = mix + MIX.size + i * MIX_READ.size
        total = tl.zeros((kind.BLOCK_B,), tl.float32)
        for column in range(0, width, kind.BLOCK_H):
            g = read(sums.below, kind, unit + UNIT.place, column, width)
            along = g * read(block, kind, mixed + MIX_READ.place, column, width)
            w = weights_of(block, kind, mix, i, soft, column, width)
            add(sums.below, kind, mixed + MIX_READ.place, column, width, w * g)
            write_sums(block, kind, sums, tl.load(block.plan + mixed + MIX_READ.d_channels), column, width, along)
            total += tl.sum(along, 1)
        if row >= 0:
            write_sum(sums, block, row + i, total)
        d = tl.where((tl.arange(0, kind.READS) == i)[None, :], total[:, None], d)
    return d


@triton.jit
def keys_gradient(block, kind: tl.constexpr, sums, mix, d_z):
    """Send dz k to the query and dz q to the keys."""
    unit = tl.load(block.plan + mix + MIX.unit)
    width = tl.load(block.plan + mix + MIX.columns)
    for i in range(tl.load(block.plan + unit + UNIT.reads)):
        if tl.load(block.plan + tl.load(block.plan + unit + UNIT.seen) + i) >= 0:
            key = mix + MIX.size + i * MIX_READ.size + MIX_READ.key
            own = of_read(d_z, i, kind.READS)[:, None]
            for column in range(0, width, kind.BLOCK_H):
                q = read(block, kind, mix + MIX.source, column, width)
                k = read(block, kind, key, column, width)
                # All may be one vector.
                tl.debug_barrier()
                add(sums.below, kind, mix + MIX.source, column, width, own * k)
                tl.debug_barrier()
                add(sums.below, kind, key, column, width, own * q)


@triton.jit
def logits_backward(block, kind: tl.constexpr, sums, mix, d_z):
    """Send dz of a unit's logits to what they were made from."""
    source = tl.load(block.plan + mix + MIX.logits)
    seen = seen_by(block, kind, tl.load(block.plan + mix + MIX.unit))
    live = block.live[:, None] & (seen >= 0)[None, :]
    if source == VECTOR_LOGITS:
        first, stride = rows_of(sums.below, mix + MIX.source, 1)
        pointers = first + block.rows[:, None] * stride + seen[None, :]
        value = d_z + tl.load(pointers, mask=live, other=0.0).to(tl.float32)
        tl.store(pointers, value.to(block.x.dtype.element_ty), mask=live)
    elif source == KEY_LOGITS:
        keys_gradient(block, kind, sums, mix, d_z)
    elif tl.load(block.plan + mix + MIX.d_free) >= 0:
        unit = tl.load(block.plan + mix + MIX.unit)
        reads = tl.arange(0, kind.READS)
        inside = block.live[:, None] & (reads < tl.load(block.plan + unit + UNIT.reads))[None, :]
        rows = (tl.load(block.plan + mix + MIX.d_free) + reads).to(tl.int64)
        tl.store(sums.dw + rows[None, :] * block.B + (block.row + block.rows)[:, None], d_z, mask=inside)


@triton.jit
def mix_backward(block, kind: tl.constexpr, sums, mix, p, d_weights, mixing):
    unit = tl.load(block.plan + mix + MIX.unit)
    pointers, live = softmax_of(block, kind, mix, p)
    soft = tl.load(pointers, mask=live, other=0.0)
    given = tl.load(block.plan + mix + MIX.given) != 0
    d = tl.zeros((kind.BLOCK_B, kind.READS), tl.float32)
    if given:
        d = experts_gradient(block, kind, sums, mix, soft)
    if kind.WEIGHTS:
        columns = tl.load(block.plan + unit + UNIT.mixing)
        reads = tl.arange(0, kind.READS)
        column = tl.load(block.plan + columns + reads, mask=reads < tl.load(block.plan + unit + UNIT.reads), other=0)
        of_weights = d_weights + block.row * mixing + block.rows[:, None] * mixing + column[None, :]
        d += tl.load(of_weights, mask=live, other=0.0).to(tl.float32)
    if tl.load(block.plan + mix + MIX.logits) != NO_LOGITS:
        tl.debug_barrier()
        d_z = softmax_gradient(soft, d)
        if not given:
            # A softmax that is not finite must not reach gradients that it has none to send to.
            d_z = tl.where(d == 0.0, 0.0, d_z)
        factor = tl.load(block.floats + tl.load(block.plan + mix + MIX.factor))
        logits_backward(block, kind, sums, mix, d_z * factor)


@triton.jit
def product_backward(block, kind: tl.constexpr, sums, product):
    width = load_aligned(block, product + PRODUCT.width, kind.ALIGN)
    for column in range(0, width, kind.BLOCK_H):
        a = read(block, kind, product + PRODUCT.a, column, width)
        b = read(block, kind, product + PRODUCT.b, column, width)
        g = read(sums.below, kind, product + PRODUCT.place, column, width)
        add(sums.below, kind, product + PRODUCT.a, column, width, g * b)
        # Both may be one vector.
        tl.debug_barrier()
        add(sums.below, kind, product + PRODUCT.b, column, width, g * a)


@triton.jit
def zero(block, kind: tl.constexpr, record):
    width = tl.load(block.plan + record + ZERO.width)
    for column in range(0, width, kind.BLOCK_H):
        write(block, kind, record + ZERO.place, column, width, tl.zeros((kind.BLOCK_B, kind.BLOCK_H), tl.float32))


@triton.jit(do_not_specialize=["place", "B", "x_row", "x_slot", "d_row", "d_slot", "mixing"])
def rowwise_backward(
    x, buffers, out, p, dw, d_x, d_buffers, d_out, d_weights, addresses, plan, floats, seed, place, B, x_row,
    x_slot, d_row, d_slot, mixing, ACTS: tl.constexpr, DROPS: tl.constexpr, WEIGHTS: tl.constexpr, ALIGN:
    tl.constexpr, READS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Do the operations of this launch, which are gradients'."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.arange(0, BLOCK_B)
    block = Block(plan, floats, addresses, x, buffers, out, x_row, x_slot, B, row, rows, rows < B - row)
    below = Block(plan, floats, addresses, d_x, d_buffers, d_out, d_row, d_slot, B, row, rows, rows < B - row)
    sums = Sums(below, dw)
    kind: tl.constexpr = Kind(ALIGN, ACTS, DROPS, WEIGHTS, READS, BLOCK_B, BLOCK_H)
    for operation in range(tl.load(plan + place), tl.load(plan + place + 1), OPERATION.size):
        tl.debug_barrier()
        what = tl.load(plan + operation + OPERATION.kind)
        record = tl.load(plan + operation + OPERATION.record)
        if what == GATHER_KIND:
            gather_backward(block, kind, sums, record)
        elif what == STAGE_KIND:
            stage_backward(block, kind, sums, record, seed)
        elif what == MIX_KIND:
            mix_backward(block, kind, sums, record, p, d_weights, mixing)
        elif what == PRODUCT_KIND:
            product_backward(block, kind, sums, record)
        else:
            zero(below, kind, record)
