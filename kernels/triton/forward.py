"""The forward of any segments in one launch. Formulas: `reference/operator.py`.

Grid: (row blocks, programs of a block). Each program runs a list of tiles; a tile is some columns
of a group of units:

    softmax   p [reads, BLOCK_B] of each unit of the group, to scratch: logits by one small product with the gate's rows
    mix       for every expert of the group: y = act(W h + b), and for every unit that reads it out += (p + v) y

The accumulators of the units are a tuple of 2-D tensors: a 3-D one, or experts unrolled, spill on
every target.
"""

import triton
import triton.language as tl

from fusedmoe.kernels import layout
from fusedmoe.kernels.triton.records import (
    COLUMN,
    NEVER,
    UNIT,
    Block,
    Offsets,
    Shape,
    activated,
    copied,
    linear_forward,
    load_aligned,
    resident_tiles,
    rows_of,
    static_weight,
)

WRITE_SOFTMAX, WRITE_WEIGHTS = tl.constexpr(layout.WRITE_SOFTMAX), tl.constexpr(layout.WRITE_WEIGHTS)
TILE, GROUP, RUN = Offsets(layout.TILE), Offsets(layout.GROUP), Offsets(layout.RUN)
EXPERT_READ, GATE_READ = Offsets(layout.EXPERT_READ), Offsets(layout.GATE_READ)


@triton.jit
def normalised(z, seen):
    """The softmax of z [BLOCK_B, READS] over the columns that are `seen` (not negative), 0 elsewhere."""
    z = tl.where(seen[None, :] >= 0, z, NEVER)
    exponential = tl.exp(z - tl.max(z, 1)[:, None])
    return exponential / tl.sum(exponential, 1)[:, None]


@triton.jit
def softmax(block, shape: tl.constexpr, unit, h, p, READS: tl.constexpr):
    """Write p of a unit, one row of `p` a read: the softmax over what its gate sees, 0 elsewhere."""
    gate = tl.load(block.plan + unit + UNIT.gate)
    reads = tl.arange(0, READS)
    inside = reads < tl.load(block.plan + unit + UNIT.reads)
    result = tl.zeros((shape.BLOCK_B, READS), tl.float32)
    if gate >= 0:
        seen = tl.load(block.plan + tl.load(block.plan + unit + UNIT.seen) + reads, mask=inside, other=-1)
        z = linear_forward(block, shape, gate, 0, h, seen, seen >= 0, shape.RESIDENT, READS)
        result = normalised(z, seen)
    pointers = p + reads[None, :].to(tl.int64) * block.B + block.rows[:, None]
    tl.store(pointers, result, mask=block.live[:, None] & inside[None, :])


@triton.jit
def softmaxes(block, shape: tl.constexpr, group, p, READS: tl.constexpr):
    """Write p of every unit of a group, those whose gates read one source after another: its tile
    is loaded once."""
    selector = tl.load(block.plan + group + GROUP.selectors) + 1
    for _ in range(tl.load(block.plan + selector - 1)):
        h = ()
        if shape.RESIDENT > 0:
            h = resident_tiles(block, shape, selector)
        count = tl.load(block.plan + selector + RUN.count)
        for i in range(count):
            read = selector + RUN.size + GATE_READ.size * i
            row = tl.load(block.plan + read + GATE_READ.row).to(tl.int64)
            softmax(block, shape, tl.load(block.plan + read + GATE_READ.unit), h, p + row * block.B, READS)
        selector += RUN.size + GATE_READ.size * count


@triton.jit
def write_weights(block, unit, p, weights, mixing):
    """weights[row, column of a read] = p + v."""
    columns = tl.load(block.plan + unit + UNIT.mixing)
    if columns >= 0:
        for read in range(tl.load(block.plan + unit + UNIT.reads)):
            soft = tl.load(p + tl.cast(read, tl.int64) * block.B + block.rows, mask=block.live, other=0.0)
            pointers = weights + block.row * mixing + tl.load(block.plan + columns + read)
            w = soft + static_weight(block, unit, read)
            tl.store(pointers + block.rows * mixing, w.to(weights.dtype.element_ty), mask=block.live)


@triton.jit
def added(block, units, record, p, y, mixed, UNITS: tl.constexpr):
    """The sums of the units with (p + v) y of one expert in those that read it."""
    result = ()
    for u in tl.static_range(UNITS):
        total = mixed[u]
        read = tl.load(block.plan + record + EXPERT_READ.size + u)
        if read >= 0:
            soft = p + (tl.load(block.plan + units + UNITS + u) + read).to(tl.int64) * block.B
            w = tl.load(soft + block.rows, mask=block.live, other=0.0) + static_weight(
                block, tl.load(block.plan + units + u), read
            )
            total += w[:, None] * y
        result = result + (total,)  # noqa: RUF005  (Triton knows no star)
    return result


@triton.jit
def mix(block, shape: tl.constexpr, group, column, p, UNITS: tl.constexpr, COPIES: tl.constexpr, AHEAD: tl.constexpr):
    """Columns `column`.. of every unit of a group: out[u] = sum over e of (p + v) y[e]."""
    units = group + GROUP.size
    columns = tl.arange(0, shape.BLOCK_H)
    live = columns < load_aligned(block, group + GROUP.width, shape.STORE) - column
    mixed = ()
    for _ in tl.static_range(UNITS):
        mixed = mixed + (tl.zeros((shape.BLOCK_B, shape.BLOCK_H), tl.float32),)  # noqa: RUF005
    record = units + 2 * UNITS
    for _ in range(tl.load(block.plan + group + GROUP.runs)):
        h = ()
        if shape.RESIDENT > 0:
            h = resident_tiles(block, shape, record)
        count = tl.load(block.plan + record + RUN.count)
        record += RUN.size
        for _ in tl.range(count, num_stages=AHEAD):
            linear = tl.load(block.plan + record + EXPERT_READ.linear)
            y = activated(
                block,
                shape,
                linear,
                linear_forward(block, shape, linear, column, h, columns, live, shape.RESIDENT, shape.BLOCK_H),
            )
            mixed = added(block, units, record, p, y, mixed, UNITS)
            record += EXPERT_READ.size + UNITS
    for _ in range(tl.load(block.plan + group + GROUP.copies) if COPIES else 0):
        y = copied(block, shape, tl.load(block.plan + record + EXPERT_READ.linear), column, columns, live)
        mixed = added(block, units, record, p, y, mixed, UNITS)
        record += EXPERT_READ.size + UNITS
    for u in tl.static_range(UNITS):
        unit = tl.load(block.plan + units + u)
        if unit >= 0:
            first, stride = rows_of(block, unit + UNIT.place, shape.STORE)
            pointers = first + column + block.rows[:, None] * stride + columns[None, :]
            tl.store(pointers, mixed[u].to(block.out.dtype.element_ty), mask=block.live[:, None] & live[None, :])


@triton.jit(do_not_specialize=["place", "B", "x_row", "x_slot", "mixing"])
def forward(
    x, buffers, out, p, weights, addresses, plan, floats, place, B, x_row, x_slot, mixing, UNITS: tl.constexpr,
    READS: tl.constexpr, ACTS: tl.constexpr, WEIGHTS: tl.constexpr, HIDDEN: tl.constexpr, COPIES: tl.constexpr,
    RESIDENT: tl.constexpr, AHEAD: tl.constexpr, ALIGN: tl.constexpr, STORE: tl.constexpr, BLOCK_B:
    tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run the tiles of this program. p: softmax scratch [rows, B]; weights: mixing weights [B,
    mixing]; place: of the programs' tiles in the plan."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.arange(0, BLOCK_B)
    block = Block(plan, floats, addresses, x, buffers, out, x_row, x_slot, B, row, rows, rows < B - row)
    shape: tl.constexpr = Shape(
        ALIGN,
        ALIGN * x.dtype.element_ty.primitive_bitwidth // 8,
        STORE,
        ACTS,
        HIDDEN,
        RESIDENT,
        BLOCK_B,
        BLOCK_H,
        BLOCK_K,
        STAGES,
        PRECISION,
    )
    program = plan + place + 2 * tl.program_id(1)
    for tile in range(tl.load(program), tl.load(program + 1), TILE.size):
        group = tl.load(plan + tile + TILE.group)
        units = group + GROUP.size
        scratch = p + row + tl.load(plan + tile + TILE.softmax).to(tl.int64) * B
        task = tl.load(plan + tile + TILE.task)
        if tl.load(plan + tile + TILE.wait) != 0:
            # What the tiles before wrote is visible to all threads of this program.
            tl.debug_barrier()
        if task >= WRITE_SOFTMAX:
            softmaxes(block, shape, group, scratch, READS)
            tl.debug_barrier()
            if WEIGHTS:
                for u in range(tl.where(task == WRITE_WEIGHTS, tl.load(plan + group + GROUP.units), 0)):
                    write_weights(
                        block,
                        tl.load(plan + units + u),
                        scratch + tl.load(plan + units + UNITS + u).to(tl.int64) * B,
                        weights,
                        mixing,
                    )
        mix(block, shape, group, load_aligned(block, tile + TILE.column, COLUMN), scratch, UNITS, COPIES, AHEAD)
