"""How kernels read the records of a plan (`layout.py`), and the linear map that all of them share.

`Block` is what a program knows of its rows, `Shape` what it was compiled for; both pass through every function below.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fusedmoe.kernels import layout, program
from fusedmoe.kernels.activation import apply


class Offsets(tl.constexpr):
    """A record as a constant of kernels: `UNIT.gate` in a kernel is `layout.UNIT.gate`, compiled and interpreted."""

    def __getattr__(self, field: str) -> int:
        # Triton's compiler asks the value itself; its interpreter runs kernels as plain Python.
        if field.startswith("_") or "value" not in self.__dict__:
            raise AttributeError(field)
        return getattr(self.value, field)


FROM_X, FROM_BUFFER = tl.constexpr(layout.FROM_X), tl.constexpr(layout.FROM_BUFFER)
PLACE, SOURCE, LINEAR, UNIT = Offsets(layout.PLACE), Offsets(layout.SOURCE), Offsets(layout.LINEAR), Offsets(layout.UNIT)
COLUMN = tl.constexpr(program.COLUMN)
NEVER = tl.constexpr(float("-inf"))


class Block(NamedTuple):
    """The rows of a program: `row` is the first of them, `rows` [BLOCK_B] count from it, `live` says which there are.

    x [B, S, D] lies at distances x_row and x_slot; buffers hold what stages hand on; out is [B, width]. The rest is what `plan.py` wrote, and
    the parameters' addresses.
    """

    plan: tl.tensor
    floats: tl.tensor
    addresses: tl.tensor
    x: tl.tensor
    buffers: tl.tensor
    out: tl.tensor
    x_row: tl.tensor
    x_slot: tl.tensor
    B: tl.tensor
    row: tl.tensor
    rows: tl.tensor
    live: tl.tensor


class Shape(NamedTuple):
    """ALIGN: the numbers whose multiples every operand's rows begin at, BYTES: the same in bytes; STORE: the numbers for what stages hand on.
    ACTS: codes of the activations that may occur; INNER: whether maps have maps inside; KEEP: columns of a source that are kept, in tiles of BLOCK_K,
    or 0. The others are sizes of tiles and the pipeline."""

    ALIGN: tl.constexpr
    BYTES: tl.constexpr
    STORE: tl.constexpr
    ACTS: tl.constexpr
    INNER: tl.constexpr
    KEEP: tl.constexpr
    BLOCK_B: tl.constexpr
    BLOCK_H: tl.constexpr
    BLOCK_K: tl.constexpr
    STAGES: tl.constexpr
    PRECISION: tl.constexpr


@triton.jit
def pointer(block, number):
    """The parameter `number`, by its address, a multiple of 16 bytes wherever ALIGN is not 1 (`network.py` checks)."""
    return tl.load(block.addresses + number).to(block.x.dtype)


@triton.jit
def aligned(block, place, ALIGN: tl.constexpr):
    """A number of a plan that is a multiple of ALIGN (`network.py` chooses it so)."""
    return tl.multiple_of(tl.load(block.plan + place), ALIGN)


@triton.jit
def padded(width):
    """A width up to the next column that a map of its own could begin at."""
    return tl.multiple_of((width + COLUMN - 1) // COLUMN * COLUMN, COLUMN)


@triton.jit
def rows_of(block, source, ALIGN: tl.constexpr):
    """(first number of the block's first row, distance of rows) of what a source, or a unit's four numbers of one, points at.

    An address as an integer until the end: what is said of alignment stays with the last operation, and not with the branches of an `if`.
    """
    kind = tl.load(block.plan + source + PLACE.kind)
    column = tl.load(block.plan + source + PLACE.column).to(tl.int64)
    base = tl.where(kind == FROM_X, block.x.to(tl.int64), tl.where(kind == FROM_BUFFER, block.buffers.to(tl.int64), block.out.to(tl.int64)))
    distance = tl.where(kind == FROM_X, block.x_row.to(tl.int64), tl.load(block.plan + source + PLACE.stride).to(tl.int64))
    before = tl.load(block.plan + source + PLACE.buffer).to(tl.int64) * block.B + tl.where(kind == FROM_X, column * block.x_slot, column)
    size: tl.constexpr = block.x.dtype.element_ty.primitive_bitwidth // 8
    first = (base + (before + block.row * distance) * size).to(block.x.dtype)
    # Inside a tile 32 bits reach; what is larger stands in the scalars.
    return tl.multiple_of(first, size * ALIGN), tl.multiple_of(distance.to(tl.int32), ALIGN)


@triton.jit
def streamed(block, shape: tl.constexpr, one, weight, outputs, live, BLOCK_N: tl.constexpr):
    """W h of a map without one inside, both read in pieces of BLOCK_K."""
    z = tl.zeros((shape.BLOCK_B, BLOCK_N), tl.float32)
    reduction = aligned(block, one + LINEAR.reduction, shape.ALIGN)
    for s in range(tl.load(block.plan + one + LINEAR.sources)):
        source = one + LINEAR.size + s * SOURCE.size
        first, distance = rows_of(block, source, shape.ALIGN)
        width = aligned(block, source + SOURCE.width, shape.ALIGN)
        column = aligned(block, source + SOURCE.first, shape.ALIGN)
        for k in tl.range(0, width, shape.BLOCK_K, num_stages=shape.STAGES):
            at = k + tl.arange(0, shape.BLOCK_K)
            inside = at < width
            h = tl.load(first + block.rows[:, None] * distance + at[None, :], mask=block.live[:, None] & inside[None, :], other=0.0)
            w = tl.load(weight + outputs[None, :] * reduction + (column + at)[:, None], mask=inside[:, None] & live[None, :], other=0.0)
            z = tl.dot(h, w, z, input_precision=shape.PRECISION)
    return z


@triton.jit
def tiles_of(block, shape: tl.constexpr, source):
    """The rows of a source, KEEP / BLOCK_K tiles [BLOCK_B, BLOCK_K] side by side, zero beyond its width."""
    first, distance = rows_of(block, source, shape.ALIGN)
    width = aligned(block, source + SOURCE.width, shape.ALIGN)
    tiles = ()
    for piece in tl.static_range(shape.KEEP // shape.BLOCK_K):
        at = tl.arange(0, shape.BLOCK_K) + piece * shape.BLOCK_K
        h = tl.load(first + block.rows[:, None] * distance + at[None, :], mask=block.live[:, None] & (at < width)[None, :], other=0.0)
        tiles = tiles + (h,)  # noqa: RUF005  (Triton knows no star)
    return tiles


@triton.jit
def kept(block, shape: tl.constexpr, weight, reduction, h, outputs, live, BLOCK_N: tl.constexpr):
    """W h of the kept tiles `h`, whose columns are those of h."""
    z = tl.zeros((shape.BLOCK_B, BLOCK_N), tl.float32)
    for piece in tl.static_range(shape.KEEP // shape.BLOCK_K):
        at = tl.arange(0, shape.BLOCK_K) + piece * shape.BLOCK_K
        w = tl.load(weight + outputs[None, :] * reduction + at[:, None], mask=(at < reduction)[:, None] & live[None, :], other=0.0)
        z = tl.dot(h[piece], w, z, input_precision=shape.PRECISION)
    return z


@triton.jit
def layer(block, shape: tl.constexpr, one, weight, h, outputs, live, KEEP: tl.constexpr, BLOCK_N: tl.constexpr):
    """W h of a map without one inside: of `h` where it is kept, else of what the map's sources say."""
    if KEEP > 0:
        z = kept(block, shape, weight, aligned(block, one + LINEAR.reduction, shape.ALIGN), h, outputs, live, BLOCK_N)
    else:
        z = streamed(block, shape, one, weight, outputs, live, BLOCK_N)
    return z


@triton.jit
def linear(block, shape: tl.constexpr, one, first, h, outputs, live, KEEP: tl.constexpr, BLOCK_N: tl.constexpr):
    """z = W h + b [BLOCK_B, BLOCK_N] in float32 of the map `one`, for the rows first + `outputs` of W that are `live`.

    Where the map has one inside (INNER), that hidden layer is computed BLOCK_K outputs at a time and goes into the product from registers.
    """
    reduction = aligned(block, one + LINEAR.reduction, shape.ALIGN)
    weight = tl.multiple_of(pointer(block, tl.load(block.plan + one + LINEAR.weight)) + tl.cast(first, tl.int64) * reduction, shape.BYTES)
    inner = -1
    if shape.INNER:
        inner = tl.load(block.plan + one + LINEAR.hidden)
    if inner >= 0:
        z = tl.zeros((shape.BLOCK_B, BLOCK_N), tl.float32)
        at = tl.arange(0, shape.BLOCK_K)
        for k in range(0, reduction, shape.BLOCK_K):
            inside = at < reduction - k
            hidden = plain(block, shape, inner, k, h, at, inside, KEEP, shape.BLOCK_K)
            code, parameter = tl.load(block.plan + inner + LINEAR.activation), tl.load(block.floats + tl.load(block.plan + inner + LINEAR.parameter))
            # Beyond the layer stands 0 h, which is NaN where h is infinite, and NaN x 0 is NaN.
            hidden = tl.where(inside[None, :], apply(hidden, code, parameter, shape.ACTS), 0.0)
            w = tl.load(weight + outputs[None, :] * reduction + (k + at)[:, None], mask=inside[:, None] & live[None, :], other=0.0)
            z = tl.dot(hidden.to(w.dtype), w, z, input_precision=shape.PRECISION)
    else:
        z = layer(block, shape, one, weight, h, outputs, live, KEEP, BLOCK_N)
    return biased(block, one, first, z, outputs, live)


@triton.jit
def plain(block, shape: tl.constexpr, one, first, h, outputs, live, KEEP: tl.constexpr, BLOCK_N: tl.constexpr):
    """z of a map that has none inside, as `linear`."""
    reduction = aligned(block, one + LINEAR.reduction, shape.ALIGN)
    weight = tl.multiple_of(pointer(block, tl.load(block.plan + one + LINEAR.weight)) + tl.cast(first, tl.int64) * reduction, shape.BYTES)
    return biased(block, one, first, layer(block, shape, one, weight, h, outputs, live, KEEP, BLOCK_N), outputs, live)


@triton.jit
def biased(block, one, first, z, outputs, live):
    """z + b of a map that has a bias.

    Added whether or not there is one: Triton 3.6's pass tritongpu-pipeline follows a product of sm_90 that a loop
    computes to the loop's yield, and where every use of the product stands in some `if`, and none leads there, crashes
    on a null pointer (which comes out as `PassManager::run failed`).
    """
    bias = tl.load(block.plan + one + LINEAR.bias)
    b = tl.zeros(outputs.shape, tl.float32)
    if bias >= 0:
        b = tl.load(pointer(block, bias) + first + outputs, mask=live, other=0.0).to(tl.float32)
    return z + b[None, :]


@triton.jit
def activated(block, shape: tl.constexpr, one, z):
    """act(z) of the map `one`."""
    return apply(z, tl.load(block.plan + one + LINEAR.activation), tl.load(block.floats + tl.load(block.plan + one + LINEAR.parameter)), shape.ACTS)


@triton.jit
def expert(block, shape: tl.constexpr, one, column, columns, live):
    """z = W h + b of columns `column`.. of an expert, or its copied source."""
    if tl.load(block.plan + one + LINEAR.weight) >= 0:
        z = linear(block, shape, one, column, (), columns, live, 0, shape.BLOCK_H)
    else:
        z = copied(block, shape, one, column, columns, live)
    return z


@triton.jit
def copied(block, shape: tl.constexpr, one, column, columns, live):
    """Columns `column`.. of the source of a map that is a copy."""
    first, distance = rows_of(block, one + LINEAR.size, shape.ALIGN)
    at = first + column + block.rows[:, None] * distance + columns[None, :]
    return tl.load(at, mask=block.live[:, None] & live[None, :], other=0.0).to(tl.float32)


@triton.jit
def static_weight(block, unit, read):
    """v of one read: its fixed value, and its element of the learned tensor."""
    v = tl.load(block.floats + tl.load(block.plan + unit + UNIT.fixed) + read)
    tensor = tl.load(block.plan + unit + UNIT.statics)
    if tensor >= 0:
        element = tl.load(block.plan + tl.load(block.plan + unit + UNIT.elements) + read)
        if element >= 0:
            v += tl.load(pointer(block, tensor) + element).to(tl.float32)
    return v
