"""The backward: row-local tiles of any stages in one launch, the parameters' gradients in a grouped one, and their ordered sum.

Formulas: `reference/operator.py`. Nothing is added atomically: every number has one writer, and sums run in an order that the batch alone decides.

    backward_rows   grid (row blocks, programs of a block). Tiles of two kinds:
                    expert   some columns of an expert: y again from its source, dw of every unit that reads it (a part for each such tile),
                             dz = a'(z) x sum of w g
                    source   some columns of a source: the softmax's backward of the gates that read it, then d = sum of W^T dz over what reads it
    gradients       grid (tiles of every dW and each learned static weight, chunks of rows): parts in float32
    add_chunks      the parts, chunk by chunk
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fusedmoe.kernels import backward_plan
from fusedmoe.kernels.activation import RELU, derivative
from fusedmoe.kernels.records import COLUMN, Block, Shape, activated, aligned, expert, padded, pointer, rows_of, static_weight

EXPERT_TILE, MATRIX = tl.constexpr(backward_plan.EXPERT), tl.constexpr(backward_plan.MATRIX)
TILE, READER, USE, SELECTION, TERM = (
    tl.constexpr(size) for size in (backward_plan.TILE, backward_plan.READER, backward_plan.USE, backward_plan.SELECTION, backward_plan.TERM)
)


class Gradients(NamedTuple):
    """What the row-local backward reads and writes: the softmax p and dw's parts [rows, B], dz [B, dz_row], and the mixing weights' gradients
    [B, mixing] where there are any (WEIGHTS)."""

    p: tl.tensor
    dw: tl.tensor
    dz: tl.tensor
    dz_row: tl.tensor
    d_weights: tl.tensor
    mixing: tl.tensor


@triton.jit
def expert_tile(block, below, shape: tl.constexpr, of, record):
    """Record: map, column, width, column of dz, number of readers; readers: where g stands (4), row of p, row of dw, unit, place among its reads.
    `below` is the block whose buffers and output are gradients."""
    one = tl.load(block.plan + record)
    column = aligned(block, record + 1, COLUMN)
    width = aligned(block, record + 2, shape.STORE)
    columns = tl.arange(0, shape.BLOCK_H)
    inside = columns < width - column
    live = block.live[:, None] & inside[None, :]
    # Beyond the expert's columns stands 0 h, which is NaN where h is infinite.
    z = tl.where(inside[None, :], expert(block, shape, one, column, columns, inside), 0.0)
    y = activated(block, shape, one, z)
    dy = tl.zeros((shape.BLOCK_B, shape.BLOCK_H), tl.float32)
    for i in range(tl.load(block.plan + record + 4)):
        reader = record + 5 + i * READER
        first, distance = rows_of(below, reader, shape.STORE)
        g = tl.load(first + column + block.rows[:, None] * distance + columns[None, :], mask=live, other=0.0).to(tl.float32)
        # Columns beyond the expert's are a(0) there, and g is 0.
        tl.store(of.dw + tl.load(block.plan + reader + 5).to(tl.int64) * block.B + block.row + block.rows, tl.sum(g * y, 1), mask=block.live)
        w = tl.load(of.p + tl.load(block.plan + reader + 4).to(tl.int64) * block.B + block.row + block.rows, mask=block.live, other=0.0)
        w += static_weight(block, tl.load(block.plan + reader + 6), tl.load(block.plan + reader + 7))
        dy += w[:, None] * g
    code = tl.load(block.plan + one + 4)
    slope = derivative(z, code, tl.load(block.floats + tl.load(block.plan + one + 5)), shape.ACTS)
    # Chosen, not multiplied: an infinite dy must not turn into NaN where a ReLU is off.
    dy = tl.where((code == RELU) & (z <= 0.0), 0.0, dy * slope)
    # Zeros up to the next map's column, so that products over dz need not stop within a vector.
    to = of.dz + block.row * of.dz_row + aligned(block, record + 3, COLUMN) + column + block.rows[:, None] * of.dz_row + columns[None, :]
    tl.store(to, dy.to(of.dz.dtype.element_ty), mask=block.live[:, None] & (columns < padded(width) - column)[None, :])


@triton.jit
def logits_gradient(block, of, selection, WEIGHTS: tl.constexpr, READS: tl.constexpr, BLOCK_B: tl.constexpr):
    """dz of a gate in the order of its unit's reads, [BLOCK_B, READS], and the rows of the gate that they belong to (-1: not seen)."""
    unit = tl.load(block.plan + selection)
    reads = tl.arange(0, READS)
    inside = reads < tl.load(block.plan + unit + 1)
    live = block.live[:, None] & inside[None, :]
    at = reads[None, :].to(tl.int64) * block.B + block.row + block.rows[:, None]
    soft = tl.load(of.p + tl.load(block.plan + selection + 4).to(tl.int64) * block.B + at, mask=live, other=0.0)
    d = tl.zeros((BLOCK_B, READS), tl.float32)
    for tile in range(tl.load(block.plan + selection + 6)):
        part = tl.load(block.plan + selection + 5) + tile * tl.load(block.plan + selection + 7)
        d += tl.load(of.dw + part.to(tl.int64) * block.B + at, mask=live, other=0.0)
    if WEIGHTS:
        columns = tl.load(block.plan + unit + 10)
        if columns >= 0:
            column = tl.load(block.plan + columns + reads, mask=inside, other=0)
            given = of.d_weights + block.row * of.mixing + block.rows[:, None] * of.mixing + column[None, :]
            d += tl.load(given, mask=live, other=0.0).to(tl.float32)
    d_z = tl.zeros((BLOCK_B, READS), of.dz.dtype.element_ty)
    # Once. The compiler computes what is cheap again for every layout that wants it, sums with another last bit among them, and then the rest of a
    # split number may be that of another one: an error of 11 bits. It computes nothing again that a while loop gave.
    times = 0
    while times < 1:
        # What is not seen has p = 0, and may have a d that is not finite. The mean under p is taken off first, then what its rounding left of it: what
        # is nearly the mean keeps its digits.
        d = tl.where(soft == 0.0, 0.0, d)
        d -= tl.sum(soft * d, 1)[:, None]
        rest = tl.sum(soft * d, 1)[:, None]
        d_z = tl.where(soft == 0.0, 0.0, soft * (d - rest)).to(of.dz.dtype.element_ty)
        times += 1
    seen = tl.load(block.plan + tl.load(block.plan + unit + 2) + reads, mask=inside, other=-1)
    if tl.load(block.plan + selection + 8) != 0:
        to = of.dz + block.row * of.dz_row + tl.load(block.plan + selection + 3) + block.rows[:, None] * of.dz_row + seen[None, :]
        tl.store(to, d_z, mask=live & (seen >= 0)[None, :])
    return d_z, seen


@triton.jit
def used(block, shape: tl.constexpr, of, use, column, columns, live, d):
    """d + W^T dz of one map that reads the source, or d + dz of one that copies it. Record: weight, N, K, first column of W, column of dz."""
    number = tl.load(block.plan + use)
    dz = of.dz + block.row * of.dz_row + aligned(block, use + 4, COLUMN)
    if number >= 0:
        outputs = tl.load(block.plan + use + 1)
        reduction = aligned(block, use + 2, shape.ALIGN)
        weight = tl.multiple_of(pointer(block, number) + aligned(block, use + 3, shape.ALIGN) + column, shape.BYTES)
        for n in tl.range(0, outputs, shape.BLOCK_K, num_stages=shape.STAGES):
            at = n + tl.arange(0, shape.BLOCK_K)
            a = tl.load(dz + block.rows[:, None] * of.dz_row + at[None, :], mask=block.live[:, None] & (at < padded(outputs))[None, :], other=0.0)
            w = tl.load(weight + at[:, None] * reduction + columns[None, :], mask=(at < outputs)[:, None] & live[None, :], other=0.0)
            d = tl.dot(a, w, d, input_precision=shape.PRECISION)
    else:
        at = dz + column + block.rows[:, None] * of.dz_row + columns[None, :]
        d += tl.load(at, mask=block.live[:, None] & live[None, :], other=0.0).to(tl.float32)
    return d


@triton.jit
def source_tile(block, below, shape: tl.constexpr, of, record, WEIGHTS: tl.constexpr, READS: tl.constexpr):
    """Record: where d stands (4), column, width, whether to add to it, numbers of uses and of selections; uses (`used`); selections: unit, weight,
    K, column of dz, row of p, first row of dw, tiles of dw, rows from tile to tile, whether to store dz."""
    column = aligned(block, record + 4, COLUMN)
    columns = tl.arange(0, shape.BLOCK_H)
    inside = columns < aligned(block, record + 5, shape.ALIGN) - column
    live = block.live[:, None] & inside[None, :]
    first, distance = rows_of(below, record, shape.ALIGN)
    to = first + column + block.rows[:, None] * distance + columns[None, :]
    d = tl.zeros((shape.BLOCK_B, shape.BLOCK_H), tl.float32)
    if tl.load(block.plan + record + 6) != 0:
        d += tl.load(to, mask=live, other=0.0).to(tl.float32)
    uses = record + 9
    count = tl.load(block.plan + record + 7)
    for i in range(count):
        d = used(block, shape, of, uses + i * USE, column, columns, inside, d)
    selections = uses + count * USE
    for i in range(tl.load(block.plan + record + 8)):
        selection = selections + i * SELECTION
        d_z, seen = logits_gradient(block, of, selection, WEIGHTS, READS, shape.BLOCK_B)
        weight = pointer(block, tl.load(block.plan + selection + 1)) + column
        at = weight + seen[:, None] * tl.load(block.plan + selection + 2) + columns[None, :]
        d = tl.dot(d_z, tl.load(at, mask=(seen >= 0)[:, None] & inside[None, :], other=0.0), d, input_precision=shape.PRECISION)
    tl.store(to, d.to(block.x.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["place", "B", "x_row", "x_slot", "d_row", "d_slot", "mixing"])
def backward_rows(
    x, buffers, out, p, dw, d_x, d_buffers, d_out, d_weights, dz, addresses, plan, floats, place, B, x_row, x_slot, d_row, d_slot, dz_row, mixing,
    READS: tl.constexpr, ACTS: tl.constexpr, WEIGHTS: tl.constexpr, ALIGN: tl.constexpr, STORE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run the tiles of this program: a tile is its kind, its record, and whether to wait for the tiles before."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.arange(0, BLOCK_B)
    block = Block(plan, floats, addresses, x, buffers, out, x_row, x_slot, B, row, rows, rows < B - row)
    below = Block(plan, floats, addresses, d_x, d_buffers, d_out, d_row, d_slot, B, row, rows, rows < B - row)
    of = Gradients(p, dw, dz, dz_row, d_weights, mixing)
    shape: tl.constexpr = Shape(ALIGN, ALIGN * x.dtype.element_ty.primitive_bitwidth // 8, STORE, ACTS, False, 0, BLOCK_B, BLOCK_H, BLOCK_K, STAGES, PRECISION)
    program = plan + place + 2 * tl.program_id(1)
    for tile in range(tl.load(program), tl.load(program + 1), TILE):
        record = tl.load(plan + tile + 1)
        if tl.load(plan + tile + 2) != 0:
            tl.debug_barrier()
        if tl.load(plan + tile) == EXPERT_TILE:
            expert_tile(block, below, shape, of, record)
        else:
            source_tile(block, below, shape, of, record, WEIGHTS, READS)


@triton.jit
def matrix_tile(block, shape: tl.constexpr, record, dz, dz_row, parts, count, BLOCK_N: tl.constexpr):
    """dW = dz^T h and db = sum of dz, over `count` rows of the block. Record: 0, where dW begins among the gradients, where db does (-1: not here),
    N, K, column of dz, row and column of the tile, a source."""
    n = aligned(block, record + 6, COLUMN) + tl.arange(0, BLOCK_N)
    k = aligned(block, record + 7, shape.ALIGN) + tl.arange(0, shape.BLOCK_H)
    # What stands between a map's dz and the next one's goes into sums that are not stored.
    outputs = tl.load(block.plan + record + 3)
    inside = n < padded(outputs)
    source = record + 8
    live_k = k < aligned(block, source + 4, shape.ALIGN)
    h, distance = rows_of(block, source, shape.ALIGN)
    first = dz + block.row * dz_row + aligned(block, record + 5, COLUMN)
    d = tl.zeros((BLOCK_N, shape.BLOCK_H), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for r in tl.range(0, count, shape.BLOCK_K, num_stages=shape.STAGES):
        rows = r + tl.arange(0, shape.BLOCK_K)
        live = rows < count
        a = tl.load(first + rows[None, :] * dz_row + n[:, None], mask=live[None, :] & inside[:, None], other=0.0)
        b = tl.load(h + rows[:, None] * distance + k[None, :], mask=live[:, None] & live_k[None, :], other=0.0)
        d = tl.dot(a, b, d, input_precision=shape.PRECISION)
        sums += tl.sum(a.to(tl.float32), 1)
    to = parts + tl.load(block.plan + record + 1) + tl.load(block.plan + source + 5)
    tl.store(to + n[:, None] * aligned(block, record + 4, shape.ALIGN) + k[None, :], d, mask=(n < outputs)[:, None] & live_k[None, :])
    bias = tl.load(block.plan + record + 2)
    if bias >= 0:
        tl.store(parts + bias + n, sums, mask=n < outputs)


@triton.jit
def static_element(block, shape: tl.constexpr, of, record, parts, count, WEIGHTS: tl.constexpr):
    """dv of one element: the sum of its dw over the rows. Record: 1, its place among the gradients, number of terms; terms: first row of dw, tiles,
    rows from tile to tile, column of its mixing weight."""
    value = tl.zeros((shape.BLOCK_K,), tl.float32)
    for i in range(tl.load(block.plan + record + 2)):
        term = record + 3 + i * TERM
        for r in range(0, count, shape.BLOCK_K):
            rows = r + tl.arange(0, shape.BLOCK_K)
            live = rows < count
            for tile in range(tl.load(block.plan + term + 1)):
                part = tl.load(block.plan + term) + tile * tl.load(block.plan + term + 2)
                value += tl.load(of.dw + part.to(tl.int64) * block.B + block.row + rows, mask=live, other=0.0)
            if WEIGHTS:
                column = tl.load(block.plan + term + 3)
                if column >= 0:
                    value += tl.load(of.d_weights + block.row * of.mixing + column + rows * of.mixing, mask=live, other=0.0).to(tl.float32)
    tl.store(parts + tl.load(block.plan + record + 1), tl.sum(value, 0))


@triton.jit(do_not_specialize=["place", "B", "x_row", "x_slot", "mixing", "total"])
def gradients(
    x, buffers, out, dw, d_weights, dz, parts, plan, place, B, x_row, x_slot, dz_row, mixing, total, WEIGHTS: tl.constexpr, ALIGN: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts [chunks, total]: the gradients of all parameters over each chunk of rows."""
    record = tl.load(plan + place + tl.program_id(0))
    row = tl.program_id(1).to(tl.int64) * CHUNK
    count = tl.minimum(CHUNK, B - row).to(tl.int32)
    rows = tl.arange(0, BLOCK_K)
    # It reads no parameter, so it needs no address and no float.
    block = Block(plan, parts, plan, x, buffers, out, x_row, x_slot, B, row, rows, rows < count)
    shape: tl.constexpr = Shape(ALIGN, ALIGN * x.dtype.element_ty.primitive_bitwidth // 8, 1, (), False, 0, BLOCK_K, BLOCK_H, BLOCK_K, STAGES, PRECISION)
    of = Gradients(dw, dw, dz, dz_row, d_weights, mixing)
    parts += tl.program_id(1).to(tl.int64) * total
    if tl.load(plan + record) == MATRIX:
        matrix_tile(block, shape, record, dz, dz_row, parts, count, BLOCK_N)
    else:
        static_element(block, shape, of, record, parts, count, WEIGHTS)


@triton.jit(do_not_specialize=["total", "chunks"])
def add_chunks(parts, grads, total, chunks, BLOCK: tl.constexpr):
    """grads[i] = parts[0, i] + parts[1, i] + ..., rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    value = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(chunks):
        value += tl.load(parts + tl.cast(chunk, tl.int64) * total + at, mask=live, other=0.0)
    tl.store(grads + at, value.to(grads.dtype.element_ty), mask=live)
