"""Row-wise operations (`kernels/program.py`), forward. Formulas: `reference/operator.py`.

Grid: row blocks. A program does all operations of its rows one after another, with a barrier between
two, some columns at a time:

    gather   columns of vectors side by side
    stage    dropout(act(head h)): the head a copy (+ b) or a LayerNorm, mean and variance first
    mix      p = softmax of factor z, to scratch; then the sum of (p + v) y
    product  a b

Dropout is Philox4x32-10 (Salmon et al. 2011) with the key (low, high bits of the seed) and the counter
(row, column // 4, stream, high bits of the row): column c has word c % 4, and is kept where that is at
least the threshold.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fusedmoe.kernels import layout
from fusedmoe.kernels.triton.activation import apply
from fusedmoe.kernels.triton.forward import normalised, write_weights
from fusedmoe.kernels.triton.records import UNIT, Block, Offsets, load_aligned, pointer, rows_of, static_weight

GATHER_KIND, STAGE_KIND, MIX_KIND = (
    tl.constexpr(layout.GATHER_KIND),
    tl.constexpr(layout.STAGE_KIND),
    tl.constexpr(layout.MIX_KIND),
)
NO_LOGITS, VECTOR_LOGITS, FREE_LOGITS, KEY_LOGITS = (
    tl.constexpr(layout.NO_LOGITS),
    tl.constexpr(layout.VECTOR_LOGITS),
    tl.constexpr(layout.FREE_LOGITS),
    tl.constexpr(layout.KEY_LOGITS),
)
OPERATION, GATHER, PART, STAGE = (
    Offsets(layout.OPERATION),
    Offsets(layout.GATHER),
    Offsets(layout.PART),
    Offsets(layout.STAGE),
)
MIX, MIX_READ, PRODUCT = Offsets(layout.MIX), Offsets(layout.MIX_READ), Offsets(layout.PRODUCT)


class Kind(NamedTuple):
    """What a program was compiled for: ALIGN as in `Shape`, ACTS too; DROPS: whether there is a seed;
    WEIGHTS: whether mixing weights are asked for, or their gradients given; READS: columns of a softmax;
    BLOCK_B rows and BLOCK_H columns at a time."""

    ALIGN: tl.constexpr
    ACTS: tl.constexpr
    DROPS: tl.constexpr
    WEIGHTS: tl.constexpr
    READS: tl.constexpr
    BLOCK_B: tl.constexpr
    BLOCK_H: tl.constexpr


@triton.jit
def tile_of(block, kind: tl.constexpr, place, column, width):
    """Pointers [BLOCK_B, BLOCK_H] to columns `column`.. of a vector of `width`, and which of them are."""
    first, stride = rows_of(block, place, kind.ALIGN)
    columns = column + tl.arange(0, kind.BLOCK_H)
    pointers = first + block.rows[:, None] * stride + columns[None, :]
    return pointers, block.live[:, None] & (columns < width)[None, :]


@triton.jit
def read(block, kind: tl.constexpr, place, column, width):
    """Columns `column`.. of a vector, zero beyond it."""
    pointers, live = tile_of(block, kind, place, column, width)
    return tl.load(pointers, mask=live, other=0.0).to(tl.float32)


@triton.jit
def write(block, kind: tl.constexpr, place, column, width, value):
    pointers, live = tile_of(block, kind, place, column, width)
    tl.store(pointers, value.to(block.x.dtype.element_ty), mask=live)


@triton.jit
def parameters(block, kind: tl.constexpr, number, first, column, width, missing):
    """[BLOCK_H] elements of a parameter from `first` + `column` on, or `missing` of one that is not there."""
    columns = column + tl.arange(0, kind.BLOCK_H)
    found = tl.zeros((kind.BLOCK_H,), tl.float32) + missing
    if number >= 0:
        found = tl.load(pointer(block, number) + first + columns, mask=columns < width, other=0.0).to(tl.float32)
    return found


@triton.jit
def words(block, kind: tl.constexpr, stage, seed, column):
    """The random words of columns `column`..: four of each counter, side by side."""
    key = tl.load(seed).to(tl.uint64, bitcast=True)
    row = block.row + block.rows
    counters = column // 4 + tl.arange(0, kind.BLOCK_H // 4)
    none = tl.zeros((kind.BLOCK_B, kind.BLOCK_H // 4), tl.uint32)
    a, b, c, d = tl.philox(
        key,
        none + (row & 0xFFFFFFFF).to(tl.uint32)[:, None],
        none + counters.to(tl.uint32)[None, :],
        none + tl.load(block.plan + stage + STAGE.stream).to(tl.uint32),
        none + (row >> 32).to(tl.uint32)[:, None],
    )
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def dropped(block, kind: tl.constexpr, stage, seed, column, value):
    """Dropout of a stage's columns `column`.., or of their gradients."""
    # Not in one condition: what is compiled without a seed reads none.
    if kind.DROPS:  # noqa: SIM102
        if tl.load(block.plan + stage + STAGE.stream) >= 0:
            threshold = tl.load(block.plan + stage + STAGE.threshold).to(tl.uint32, bitcast=True)
            scale = tl.load(block.floats + tl.load(block.plan + stage + STAGE.scale))
            value = tl.where(words(block, kind, stage, seed, column) >= threshold, value * scale, 0.0)
    return value


@triton.jit
def moments(block, kind: tl.constexpr, stage, width):
    """The mean and 1 / sqrt(variance + eps) of a LayerNorm's rows; 0 and 1 of a copy."""
    mean = tl.zeros((kind.BLOCK_B,), tl.float32)
    scale = tl.full((kind.BLOCK_B,), 1.0, tl.float32)
    if tl.load(block.plan + stage + STAGE.norm) != 0:
        for column in range(0, width, kind.BLOCK_H):
            mean += tl.sum(read(block, kind, stage + STAGE.source, column, width), 1)
        mean = mean / width
        square = tl.zeros((kind.BLOCK_B,), tl.float32)
        for column in range(0, width, kind.BLOCK_H):
            inside = (column + tl.arange(0, kind.BLOCK_H) < width)[None, :]
            off = tl.where(inside, read(block, kind, stage + STAGE.source, column, width) - mean[:, None], 0.0)
            square += tl.sum(off * off, 1)
        eps = tl.load(block.floats + tl.load(block.plan + stage + STAGE.eps))
        scale = 1.0 / tl.sqrt(square / width + eps)
    return mean, scale


@triton.jit
def head(block, kind: tl.constexpr, stage, column, width, found):
    """(o, gamma, z) of columns `column`..: z = gamma o + beta, where o is h or what LayerNorm makes of it
    by its `moments`."""
    mean, scale = found
    o = (read(block, kind, stage + STAGE.source, column, width) - mean[:, None]) * scale[:, None]
    gamma = parameters(block, kind, tl.load(block.plan + stage + STAGE.weight), 0, column, width, 1.0)
    b = parameters(block, kind, tl.load(block.plan + stage + STAGE.bias), 0, column, width, 0.0)
    return o, gamma, o * gamma[None, :] + b[None, :]


@triton.jit
def slopes_of(block, kind: tl.constexpr, stage, column, width):
    """PReLU's slopes of columns `column`..: [BLOCK_H], one or one a column."""
    columns = (column + tl.arange(0, kind.BLOCK_H)) * tl.load(block.plan + stage + STAGE.slopes)
    first = pointer(block, tl.load(block.plan + stage + STAGE.slope))
    return tl.load(first + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def stage_forward(block, kind: tl.constexpr, stage, seed):
    width = load_aligned(block, stage + STAGE.width, kind.ALIGN)
    found = moments(block, kind, stage, width)
    for column in range(0, width, kind.BLOCK_H):
        _, _, z = head(block, kind, stage, column, width, found)
        if tl.load(block.plan + stage + STAGE.slope) >= 0:
            y = tl.where(z > 0.0, z, z * slopes_of(block, kind, stage, column, width)[None, :])
        else:
            parameter = tl.load(block.floats + tl.load(block.plan + stage + STAGE.parameter))
            y = apply(z, tl.load(block.plan + stage + STAGE.activation), parameter, kind.ACTS)
        y = dropped(block, kind, stage, seed, column, y)
        write(block, kind, stage + STAGE.place, column, width, y)


@triton.jit
def gather_forward(block, kind: tl.constexpr, gather):
    for i in range(tl.load(block.plan + gather + GATHER.parts)):
        part = gather + GATHER.size + i * PART.size
        width = load_aligned(block, part + PART.width, kind.ALIGN)
        # Both are vectors that begin at the part's first column.
        here = load_aligned(block, part + PART.column, kind.ALIGN)
        there = load_aligned(block, part + PART.first, kind.ALIGN)
        for column in range(0, width, kind.BLOCK_H):
            value = read(block, kind, part + PART.place, there + column, there + width)
            write(block, kind, gather + GATHER.place, here + column, here + width, value)


@triton.jit
def of_read(values, i, READS: tl.constexpr):
    """Column i of [BLOCK_B, READS]."""
    return tl.sum(tl.where((tl.arange(0, READS) == i)[None, :], values, 0.0), 1)


@triton.jit
def logits(block, kind: tl.constexpr, mix, seen):
    """factor z of what a unit sees, by its reads: [BLOCK_B, READS]."""
    source = tl.load(block.plan + mix + MIX.logits)
    z = tl.zeros((kind.BLOCK_B, kind.READS), tl.float32)
    if source == VECTOR_LOGITS:
        first, stride = rows_of(block, mix + MIX.source, 1)
        pointers = first + block.rows[:, None] * stride + seen[None, :]
        z += tl.load(pointers, mask=block.live[:, None] & (seen >= 0)[None, :], other=0.0).to(tl.float32)
    elif source == FREE_LOGITS:
        free = pointer(block, tl.load(block.plan + mix + MIX.free))
        z += tl.load(free + seen, mask=seen >= 0, other=0.0).to(tl.float32)[None, :]
    else:
        width = tl.load(block.plan + mix + MIX.columns)
        for i in range(tl.load(block.plan + tl.load(block.plan + mix + MIX.unit) + UNIT.reads)):
            key = mix + MIX.size + i * MIX_READ.size + MIX_READ.key
            total = tl.zeros((kind.BLOCK_B,), tl.float32)
            for column in range(0, width, kind.BLOCK_H):
                q = read(block, kind, mix + MIX.source, column, width)
                total += tl.sum(q * read(block, kind, key, column, width), 1)
            z = tl.where((tl.arange(0, kind.READS) == i)[None, :], total[:, None], z)
    return z * tl.load(block.floats + tl.load(block.plan + mix + MIX.factor))


@triton.jit
def seen_by(block, kind: tl.constexpr, unit):
    """The columns of the logits that a unit's reads have, -1 for none and beyond them."""
    reads = tl.arange(0, kind.READS)
    inside = reads < tl.load(block.plan + unit + UNIT.reads)
    return tl.load(block.plan + tl.load(block.plan + unit + UNIT.seen) + reads, mask=inside, other=-1)


@triton.jit
def softmax_of(block, kind: tl.constexpr, mix, p):
    """Pointers to p of a unit's reads, [BLOCK_B, READS], and which of them are."""
    unit = tl.load(block.plan + mix + MIX.unit)
    reads = tl.arange(0, kind.READS)
    inside = reads < tl.load(block.plan + unit + UNIT.reads)
    rows = (tl.load(block.plan + mix + MIX.p) + reads).to(tl.int64)
    return p + rows[None, :] * block.B + (block.row + block.rows)[:, None], block.live[:, None] & inside[None, :]


@triton.jit
def weights_of(block, kind: tl.constexpr, mix, i, soft, column, width):
    """w of one read: p + v, [BLOCK_B, 1] or with static weights a column [BLOCK_B, BLOCK_H]."""
    element = tl.load(block.plan + mix + MIX.size + i * MIX_READ.size + MIX_READ.element)
    channels = tl.where(element >= 0, tl.load(block.plan + mix + MIX.channels), -1)
    v = parameters(block, kind, channels, element, column, width, 0.0)
    w = of_read(soft, i, kind.READS) + static_weight(block, tl.load(block.plan + mix + MIX.unit), i)
    return w[:, None] + v[None, :]


@triton.jit
def mix_forward(block, kind: tl.constexpr, mix, p, weights, mixing):
    unit = tl.load(block.plan + mix + MIX.unit)
    width = load_aligned(block, mix + MIX.width, kind.ALIGN)
    soft = tl.zeros((kind.BLOCK_B, kind.READS), tl.float32)
    if tl.load(block.plan + mix + MIX.logits) != NO_LOGITS:
        seen = seen_by(block, kind, unit)
        soft = normalised(logits(block, kind, mix, seen), seen)
    pointers, live = softmax_of(block, kind, mix, p)
    tl.store(pointers, soft, mask=live)
    if kind.WEIGHTS:
        tl.debug_barrier()
        row = tl.load(block.plan + mix + MIX.p).to(tl.int64)
        write_weights(block, unit, p + row * block.B + block.row, weights, mixing)
    for column in range(0, width, kind.BLOCK_H):
        total = tl.zeros((kind.BLOCK_B, kind.BLOCK_H), tl.float32)
        for i in range(tl.load(block.plan + unit + UNIT.reads)):
            y = read(block, kind, mix + MIX.size + i * MIX_READ.size + MIX_READ.place, column, width)
            total += weights_of(block, kind, mix, i, soft, column, width) * y
        write(block, kind, unit + UNIT.place, column, width, total)


@triton.jit
def product_forward(block, kind: tl.constexpr, product):
    width = load_aligned(block, product + PRODUCT.width, kind.ALIGN)
    for column in range(0, width, kind.BLOCK_H):
        a = read(block, kind, product + PRODUCT.a, column, width)
        value = a * read(block, kind, product + PRODUCT.b, column, width)
        write(block, kind, product + PRODUCT.place, column, width, value)


@triton.jit(do_not_specialize=["place", "B", "x_row", "x_slot", "mixing"])
def rowwise_forward(
    x, buffers, out, p, weights, addresses, plan, floats, seed, place, B, x_row, x_slot, mixing, ACTS: tl.constexpr,
    DROPS: tl.constexpr, WEIGHTS: tl.constexpr, ALIGN: tl.constexpr, READS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Do the operations of this launch."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.arange(0, BLOCK_B)
    block = Block(plan, floats, addresses, x, buffers, out, x_row, x_slot, B, row, rows, rows < B - row)
    kind: tl.constexpr = Kind(ALIGN, ACTS, DROPS, WEIGHTS, READS, BLOCK_B, BLOCK_H)
    for operation in range(tl.load(plan + place), tl.load(plan + place + 1), OPERATION.size):
        # What the operation before wrote is visible to all threads of this program.
        tl.debug_barrier()
        what = tl.load(plan + operation + OPERATION.kind)
        record = tl.load(plan + operation + OPERATION.record)
        if what == GATHER_KIND:
            gather_forward(block, kind, record)
        elif what == STAGE_KIND:
            stage_forward(block, kind, record, seed)
        elif what == MIX_KIND:
            mix_forward(block, kind, record, p, weights, mixing)
        else:
            product_forward(block, kind, record)
