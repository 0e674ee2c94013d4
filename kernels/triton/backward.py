"""The backward: row-local tiles of any segments in one launch, the parameters' gradients in a
grouped one, and their ordered sum.

Formulas: `reference/operator.py`. Nothing is added atomically: every number has one writer, and
sums run in an order that the batch alone decides.

    backward_rows   grid (row blocks, programs of a block). Tiles of two kinds:
                    expert   some columns of an expert: y again from its source, dw of every unit that
                             reads it (a part for each such tile),
                             dz = a'(z) x sum of w g
                    source   some columns of a source: the softmax's backward of the gates that read it,
                             then d = sum of W^T dz over what reads it
    gradients       grid (tiles of every dW and each learned static weight, chunks of rows): parts in float32
    add_chunks      the parts, chunk by chunk
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fusedmoe.kernels import layout
from fusedmoe.kernels.triton.activation import RELU, derivative
from fusedmoe.kernels.triton.records import (
    COLUMN,
    LINEAR,
    SOURCE,
    UNIT,
    Block,
    Offsets,
    Shape,
    activated,
    activation_parameter,
    expert_outputs,
    load_aligned,
    padded,
    pointer,
    rows_of,
    static_weight,
)

EXPERT_KIND, MATRIX_KIND = tl.constexpr(layout.EXPERT_KIND), tl.constexpr(layout.MATRIX_KIND)
BACKWARD_TILE, EXPERT_TILE, SOURCE_TILE = (
    Offsets(layout.BACKWARD_TILE),
    Offsets(layout.EXPERT_TILE),
    Offsets(layout.SOURCE_TILE),
)
READER, USE, SELECTION = Offsets(layout.READER), Offsets(layout.USE), Offsets(layout.SELECTION)
MATRIX_TASK, STATIC_TASK, TERM = Offsets(layout.MATRIX_TASK), Offsets(layout.STATIC_TASK), Offsets(layout.TERM)
FURTHER_USES, MATRIX_USE = Offsets(layout.FURTHER_USES), Offsets(layout.MATRIX_USE)


class Gradients(NamedTuple):
    """What the row-local backward reads and writes: the softmax p and dw's parts [rows, B], dz [B,
    dz_row], and the mixing weights' gradients [B, mixing] where there are any (WEIGHTS).
    """

    p: tl.tensor
    dw: tl.tensor
    dz: tl.tensor
    dz_row: tl.tensor
    d_weights: tl.tensor
    mixing: tl.tensor


@triton.jit
def expert_tile(block, below, shape: tl.constexpr, grads, record):
    """y of some columns of an expert, dw of the units that read it, and dz. `below` is the block
    whose buffers and output are gradients."""
    linear = tl.load(block.plan + record + EXPERT_TILE.linear)
    column = load_aligned(block, record + EXPERT_TILE.column, COLUMN)
    width = load_aligned(block, record + EXPERT_TILE.width, shape.STORE)
    columns = tl.arange(0, shape.BLOCK_H)
    inside = columns < width - column
    live = block.live[:, None] & inside[None, :]
    # Beyond the expert's columns stands 0 h, which is NaN where h is infinite.
    z = tl.where(inside[None, :], expert_outputs(block, shape, linear, column, columns, inside), 0.0)
    y = activated(block, shape, linear, z)
    dy = tl.zeros((shape.BLOCK_B, shape.BLOCK_H), tl.float32)
    for i in range(tl.load(block.plan + record + EXPERT_TILE.readers)):
        reader = record + EXPERT_TILE.size + i * READER.size
        first, stride = rows_of(below, reader + READER.place, shape.STORE)
        g = tl.load(first + column + block.rows[:, None] * stride + columns[None, :], mask=live, other=0.0).to(
            tl.float32
        )
        # Columns beyond the expert's are a(0) there, and g is 0.
        tl.store(
            grads.dw + tl.load(block.plan + reader + READER.dw).to(tl.int64) * block.B + block.row + block.rows,
            tl.sum(g * y, 1),
            mask=block.live,
        )
        w = tl.load(
            grads.p + tl.load(block.plan + reader + READER.p).to(tl.int64) * block.B + block.row + block.rows,
            mask=block.live,
            other=0.0,
        )
        w += static_weight(
            block, tl.load(block.plan + reader + READER.unit), tl.load(block.plan + reader + READER.read)
        )
        dy += w[:, None] * g
    code = tl.load(block.plan + linear + LINEAR.activation)
    slope = derivative(z, code, activation_parameter(block, linear), shape.ACTS)
    # Chosen, not multiplied: an infinite dy must not turn into NaN where a ReLU is off.
    dy = tl.where((code == RELU) & (z <= 0.0), 0.0, dy * slope)
    # Zeros up to the next linear's column, so that products over dz need not stop within a vector.
    pointers = (
        grads.dz
        + block.row * grads.dz_row
        + load_aligned(block, record + EXPERT_TILE.dz, COLUMN)
        + column
        + block.rows[:, None] * grads.dz_row
        + columns[None, :]
    )
    tl.store(
        pointers,
        dy.to(grads.dz.dtype.element_ty),
        mask=block.live[:, None] & (columns < padded(width) - column)[None, :],
    )


@triton.jit
def softmax_gradient(soft, d):
    """dz of a softmax p [BLOCK_B, READS] with the gradient d."""
    # What is not seen has p = 0, and may have a d that is not finite. The mean under p is taken off
    # first, then what its rounding left of it: what is nearly the mean keeps its digits.
    d = tl.where(soft == 0.0, 0.0, d)
    d -= tl.sum(soft * d, 1)[:, None]
    rest = tl.sum(soft * d, 1)[:, None]
    return tl.where(soft == 0.0, 0.0, soft * (d - rest))


@triton.jit
def logits_gradient(block, grads, selection, WEIGHTS: tl.constexpr, READS: tl.constexpr, BLOCK_B: tl.constexpr):
    """dz of a gate in the order of its unit's reads, [BLOCK_B, READS], and the rows of the gate
    that they belong to (-1: not seen)."""
    unit = tl.load(block.plan + selection + SELECTION.unit)
    reads = tl.arange(0, READS)
    inside = reads < tl.load(block.plan + unit + UNIT.reads)
    live = block.live[:, None] & inside[None, :]
    offsets = reads[None, :].to(tl.int64) * block.B + block.row + block.rows[:, None]
    soft = tl.load(
        grads.p + tl.load(block.plan + selection + SELECTION.p).to(tl.int64) * block.B + offsets, mask=live, other=0.0
    )
    d = tl.zeros((BLOCK_B, READS), tl.float32)
    for tile in range(tl.load(block.plan + selection + SELECTION.tiles)):
        part = tl.load(block.plan + selection + SELECTION.dw) + tile * tl.load(
            block.plan + selection + SELECTION.stride
        )
        d += tl.load(grads.dw + part.to(tl.int64) * block.B + offsets, mask=live, other=0.0)
    if WEIGHTS:
        columns = tl.load(block.plan + unit + UNIT.mixing)
        if columns >= 0:
            column = tl.load(block.plan + columns + reads, mask=inside, other=0)
            given = grads.d_weights + block.row * grads.mixing + block.rows[:, None] * grads.mixing + column[None, :]
            d += tl.load(given, mask=live, other=0.0).to(tl.float32)
    d_z = tl.zeros((BLOCK_B, READS), grads.dz.dtype.element_ty)
    # Triton rematerialises cheap expressions for each layout, sums with another rounding among
    # them; then tf32x3 mixes the high and low parts of two values, an error of 11 bits. What a
    # while loop yields it does not rematerialise.
    times = 0
    while times < 1:
        d_z = softmax_gradient(soft, d).to(grads.dz.dtype.element_ty)
        times += 1
    seen = tl.load(block.plan + tl.load(block.plan + unit + UNIT.seen) + reads, mask=inside, other=-1)
    if tl.load(block.plan + selection + SELECTION.store) != 0:
        pointers = (
            grads.dz
            + block.row * grads.dz_row
            + tl.load(block.plan + selection + SELECTION.dz)
            + block.rows[:, None] * grads.dz_row
            + seen[None, :]
        )
        tl.store(pointers, d_z, mask=live & (seen >= 0)[None, :])
    return d_z, seen


@triton.jit
def used(block, shape: tl.constexpr, grads, use, column, columns, live, d):
    """d + W^T dz of one linear that reads the source, or d + dz of one that copies it."""
    number = tl.load(block.plan + use + USE.weight)
    dz = grads.dz + block.row * grads.dz_row + load_aligned(block, use + USE.dz, COLUMN)
    if number >= 0:
        outputs = tl.load(block.plan + use + USE.outputs)
        reduction = load_aligned(block, use + USE.reduction, shape.ALIGN)
        weight = tl.multiple_of(
            pointer(block, number) + load_aligned(block, use + USE.first, shape.ALIGN) + column, shape.BYTES
        )
        for n in tl.range(0, outputs, shape.BLOCK_K, num_stages=shape.STAGES):
            rows = n + tl.arange(0, shape.BLOCK_K)
            a = tl.load(
                dz + block.rows[:, None] * grads.dz_row + rows[None, :],
                mask=block.live[:, None] & (rows < padded(outputs))[None, :],
                other=0.0,
            )
            w = tl.load(
                weight + rows[:, None] * reduction + columns[None, :],
                mask=(rows < outputs)[:, None] & live[None, :],
                other=0.0,
            )
            d = tl.dot(a, w, d, input_precision=shape.PRECISION)
    else:
        pointers = dz + column + block.rows[:, None] * grads.dz_row + columns[None, :]
        d += tl.load(pointers, mask=block.live[:, None] & live[None, :], other=0.0).to(tl.float32)
    return d


@triton.jit
def source_tile(block, below, shape: tl.constexpr, grads, record, WEIGHTS: tl.constexpr, READS: tl.constexpr):
    """d of some columns of a source: what its linears and its gates send down."""
    column = load_aligned(block, record + SOURCE_TILE.column, COLUMN)
    columns = tl.arange(0, shape.BLOCK_H)
    inside = columns < load_aligned(block, record + SOURCE_TILE.width, shape.ALIGN) - column
    live = block.live[:, None] & inside[None, :]
    first, stride = rows_of(below, record + SOURCE_TILE.place, shape.ALIGN)
    pointers = first + column + block.rows[:, None] * stride + columns[None, :]
    d = tl.zeros((shape.BLOCK_B, shape.BLOCK_H), tl.float32)
    if tl.load(block.plan + record + SOURCE_TILE.add) != 0:
        d += tl.load(pointers, mask=live, other=0.0).to(tl.float32)
    uses = record + SOURCE_TILE.size
    count = tl.load(block.plan + record + SOURCE_TILE.uses)
    for i in range(count):
        d = used(block, shape, grads, uses + i * USE.size, column, columns, inside, d)
    selections = uses + count * USE.size
    for i in range(tl.load(block.plan + record + SOURCE_TILE.selections)):
        selection = selections + i * SELECTION.size
        d_z, seen = logits_gradient(block, grads, selection, WEIGHTS, READS, shape.BLOCK_B)
        weight = pointer(block, tl.load(block.plan + selection + SELECTION.weight)) + column
        gate_rows = weight + seen[:, None] * tl.load(block.plan + selection + SELECTION.reduction) + columns[None, :]
        d = tl.dot(
            d_z,
            tl.load(gate_rows, mask=(seen >= 0)[:, None] & inside[None, :], other=0.0),
            d,
            input_precision=shape.PRECISION,
        )
    tl.store(pointers, d.to(block.x.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["place", "B", "x_row", "x_slot", "d_row", "d_slot", "mixing"])
def backward_rows(
    x, buffers, out, p, dw, d_x, d_buffers, d_out, d_weights, dz, addresses, plan, floats, place, B, x_row,
    x_slot, d_row, d_slot, dz_row, mixing, READS: tl.constexpr, ACTS: tl.constexpr, WEIGHTS: tl.constexpr,
    ALIGN: tl.constexpr, STORE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K:
    tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run the tiles of this program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.arange(0, BLOCK_B)
    block = Block(plan, floats, addresses, x, buffers, out, x_row, x_slot, B, row, rows, rows < B - row)
    below = Block(plan, floats, addresses, d_x, d_buffers, d_out, d_row, d_slot, B, row, rows, rows < B - row)
    grads = Gradients(p, dw, dz, dz_row, d_weights, mixing)
    shape: tl.constexpr = Shape(
        ALIGN,
        ALIGN * x.dtype.element_ty.primitive_bitwidth // 8,
        STORE,
        ACTS,
        False,
        0,
        BLOCK_B,
        BLOCK_H,
        BLOCK_K,
        STAGES,
        PRECISION,
    )
    program = plan + place + 2 * tl.program_id(1)
    for tile in range(tl.load(program), tl.load(program + 1), BACKWARD_TILE.size):
        record = tl.load(plan + tile + BACKWARD_TILE.record)
        if tl.load(plan + tile + BACKWARD_TILE.wait) != 0:
            tl.debug_barrier()
        if tl.load(plan + tile + BACKWARD_TILE.kind) == EXPERT_KIND:
            expert_tile(block, below, shape, grads, record)
        else:
            source_tile(block, below, shape, grads, record, WEIGHTS, READS)


@triton.jit
def matrix_tile(
    block, shape: tl.constexpr, grads, record, parts, count, BLOCK_N: tl.constexpr, SHARED: tl.constexpr
):  # fmt: skip
    """dW = dz^T h and db = sum of dz, over `count` rows of the block."""
    n = load_aligned(block, record + MATRIX_TASK.row, COLUMN) + tl.arange(0, BLOCK_N)
    k = load_aligned(block, record + MATRIX_TASK.column, shape.ALIGN) + tl.arange(0, shape.BLOCK_H)
    # What stands between a linear's dz and the next one's goes into sums that are not stored.
    outputs = tl.load(block.plan + record + MATRIX_TASK.outputs)
    inside = n < padded(outputs)
    source = record + MATRIX_TASK.source
    live_k = k < load_aligned(block, source + SOURCE.width, shape.ALIGN)
    h, stride = rows_of(block, source, shape.ALIGN)
    first = grads.dz + block.row * grads.dz_row + load_aligned(block, record + MATRIX_TASK.dz, COLUMN)
    d = tl.zeros((BLOCK_N, shape.BLOCK_H), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    if SHARED:
        uses = record + MATRIX_TASK.size
        for i in range(tl.load(block.plan + uses + FURTHER_USES.uses)):
            use = uses + FURTHER_USES.size + i * MATRIX_USE.size
            other, distance = rows_of(block, use + MATRIX_USE.source, shape.ALIGN)
            own = grads.dz + block.row * grads.dz_row + load_aligned(block, use + MATRIX_USE.dz, COLUMN)
            for r in tl.range(0, count, shape.BLOCK_K, num_stages=shape.STAGES):
                rows = r + tl.arange(0, shape.BLOCK_K)
                live = rows < count
                a = tl.load(
                    own + rows[None, :] * grads.dz_row + n[:, None], mask=live[None, :] & inside[:, None], other=0.0
                )
                b = tl.load(
                    other + rows[:, None] * distance + k[None, :], mask=live[:, None] & live_k[None, :], other=0.0
                )
                d = tl.dot(a, b, d, input_precision=shape.PRECISION)
    for r in tl.range(0, count, shape.BLOCK_K, num_stages=shape.STAGES):
        rows = r + tl.arange(0, shape.BLOCK_K)
        live = rows < count
        a = tl.load(first + rows[None, :] * grads.dz_row + n[:, None], mask=live[None, :] & inside[:, None], other=0.0)
        b = tl.load(h + rows[:, None] * stride + k[None, :], mask=live[:, None] & live_k[None, :], other=0.0)
        d = tl.dot(a, b, d, input_precision=shape.PRECISION)
        sums += tl.sum(a.to(tl.float32), 1)
    pointers = parts + tl.load(block.plan + record + MATRIX_TASK.weight) + tl.load(block.plan + source + SOURCE.first)
    tl.store(
        pointers + n[:, None] * load_aligned(block, record + MATRIX_TASK.reduction, shape.ALIGN) + k[None, :],
        d,
        mask=(n < outputs)[:, None] & live_k[None, :],
    )
    bias = tl.load(block.plan + record + MATRIX_TASK.bias)
    if bias >= 0:
        tl.store(parts + bias + n, sums, mask=n < outputs)


@triton.jit
def static_element(block, shape: tl.constexpr, grads, record, parts, count, WEIGHTS: tl.constexpr):
    """dv of one element: the sum of its dw over the rows."""
    value = tl.zeros((shape.BLOCK_K,), tl.float32)
    for i in range(tl.load(block.plan + record + STATIC_TASK.terms)):
        term = record + STATIC_TASK.size + i * TERM.size
        for r in range(0, count, shape.BLOCK_K):
            rows = r + tl.arange(0, shape.BLOCK_K)
            live = rows < count
            for tile in range(tl.load(block.plan + term + TERM.tiles)):
                part = tl.load(block.plan + term + TERM.dw) + tile * tl.load(block.plan + term + TERM.stride)
                value += tl.load(grads.dw + part.to(tl.int64) * block.B + block.row + rows, mask=live, other=0.0)
            if WEIGHTS:
                column = tl.load(block.plan + term + TERM.mixing)
                if column >= 0:
                    value += tl.load(
                        grads.d_weights + block.row * grads.mixing + column + rows * grads.mixing, mask=live, other=0.0
                    ).to(tl.float32)
    tl.store(parts + tl.load(block.plan + record + STATIC_TASK.element), tl.sum(value, 0))


@triton.jit(do_not_specialize=["place", "B", "x_row", "x_slot", "mixing", "total"])
def gradients(
    x, buffers, out, dw, d_weights, dz, parts, plan, place, B, x_row, x_slot, dz_row, mixing, total, WEIGHTS:
    tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """parts [chunks, total]: the gradients of all parameters over each chunk of rows."""
    record = tl.load(plan + place + tl.program_id(0))
    row = tl.program_id(1).to(tl.int64) * CHUNK
    count = tl.minimum(CHUNK, B - row).to(tl.int32)
    rows = tl.arange(0, BLOCK_K)
    # It reads no parameter, so it needs no address and no float.
    block = Block(plan, parts, plan, x, buffers, out, x_row, x_slot, B, row, rows, rows < count)
    shape: tl.constexpr = Shape(
        ALIGN,
        ALIGN * x.dtype.element_ty.primitive_bitwidth // 8,
        1,
        (),
        False,
        0,
        BLOCK_K,
        BLOCK_H,
        BLOCK_K,
        STAGES,
        PRECISION,
    )
    grads = Gradients(dw, dw, dz, dz_row, d_weights, mixing)
    parts += tl.program_id(1).to(tl.int64) * total
    if tl.load(plan + record + MATRIX_TASK.kind) == MATRIX_KIND:
        matrix_tile(block, shape, grads, record, parts, count, BLOCK_N, SHARED)
    else:
        static_element(block, shape, grads, record, parts, count, WEIGHTS)


@triton.jit(do_not_specialize=["total", "chunks"])
def add_chunks(parts, grads, total, chunks, BLOCK: tl.constexpr):
    """grads[i] = parts[0, i] + parts[1, i] + ..., rounded once."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = elements < total
    value = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(chunks):
        value += tl.load(parts + tl.cast(chunk, tl.int64) * total + elements, mask=live, other=0.0)
    tl.store(grads + elements, value.to(grads.dtype.element_ty), mask=live)
