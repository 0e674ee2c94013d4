"""How kernels read the records of a plan (`layout.py`), and the linear map that all of them share.

`Block` is what a program knows of its rows, `Shape` what it was compiled for; both pass through
every function below.

Fields are loaded where they are used: a function for `tl.load(block.plan + ...)` changes the order in
which Triton inlines, and took up to 34 registers more (MMoE T3e8, training, 4,096 rows, sm_90).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fusedmoe.kernels import layout, program
from fusedmoe.kernels.triton.activation import apply


class Offsets(tl.constexpr):
    """A record as a constant of kernels: `UNIT.gate` in a kernel is `layout.UNIT.gate`, compiled
    and interpreted."""

    def __getattr__(self, field: str) -> int:
        # Triton's compiler asks the value itself; its interpreter runs kernels as plain Python.
        if field.startswith("_") or "value" not in self.__dict__:
            raise AttributeError(field)
        return getattr(self.value, field)


FROM_X, FROM_BUFFER = tl.constexpr(layout.FROM_X), tl.constexpr(layout.FROM_BUFFER)
PLACE, SOURCE, LINEAR, UNIT = (
    Offsets(layout.PLACE),
    Offsets(layout.SOURCE),
    Offsets(layout.LINEAR),
    Offsets(layout.UNIT),
)
COLUMN = tl.constexpr(program.COLUMN)
NEVER = tl.constexpr(float("-inf"))


class Block(NamedTuple):
    """The rows of a program: `row` is the first of them, `rows` [BLOCK_B] count from it, and `live`
    masks those of the batch.

    x [B, S, D] has the strides x_row and x_slot; buffers hold what segments hand on; out is [B,
    width]. `plan` and `floats` are what `plan.py` wrote, `addresses` those of the parameters.
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
    """What a program was compiled for, beside the sizes of tiles and the pipeline.

    ALIGN: every operand's rows begin at multiples of so many elements, BYTES: of so many bytes;
    STORE: the elements for what segments hand on. ACTS: codes of the activations that may occur.
    HIDDEN: whether some linear has a hidden layer inside. RESIDENT: columns of a source that stay
    in registers, in tiles of BLOCK_K, or 0.
    """

    ALIGN: tl.constexpr
    BYTES: tl.constexpr
    STORE: tl.constexpr
    ACTS: tl.constexpr
    HIDDEN: tl.constexpr
    RESIDENT: tl.constexpr
    BLOCK_B: tl.constexpr
    BLOCK_H: tl.constexpr
    BLOCK_K: tl.constexpr
    STAGES: tl.constexpr
    PRECISION: tl.constexpr


@triton.jit
def pointer(block, number):
    """The parameter `number`, by its address, a multiple of 16 bytes wherever ALIGN is not 1
    (`bound.alignment` checks)."""
    return tl.load(block.addresses + number).to(block.x.dtype)


@triton.jit
def load_aligned(block, place, ALIGN: tl.constexpr):
    """An integer of a plan that is a multiple of ALIGN (`bound.alignment` checks)."""
    return tl.multiple_of(tl.load(block.plan + place), ALIGN)


@triton.jit
def padded(width):
    """A width rounded up to a multiple of COLUMN."""
    return tl.multiple_of((width + COLUMN - 1) // COLUMN * COLUMN, COLUMN)


@triton.jit
def rows_of(block, place, ALIGN: tl.constexpr):
    """(pointer to the block's first row, stride of rows) of a place.

    The address is an integer until the end: what is said of alignment stays with the last
    operation, and not with the branches of an `if`.
    """
    kind = tl.load(block.plan + place + PLACE.kind)
    column = tl.load(block.plan + place + PLACE.column).to(tl.int64)
    buffers, out = block.buffers.to(tl.int64), block.out.to(tl.int64)
    base = tl.where(kind == FROM_X, block.x.to(tl.int64), tl.where(kind == FROM_BUFFER, buffers, out))
    stride = tl.load(block.plan + place + PLACE.stride).to(tl.int64)
    stride = tl.where(kind == FROM_X, block.x_row.to(tl.int64), stride)
    before = tl.load(block.plan + place + PLACE.buffer).to(tl.int64) * block.B
    before += tl.where(kind == FROM_X, column * block.x_slot, column)
    size: tl.constexpr = block.x.dtype.element_ty.primitive_bitwidth // 8
    first = (base + (before + block.row * stride) * size).to(block.x.dtype)
    # Inside a tile 32 bits reach; what is larger stands in the scalars.
    return tl.multiple_of(first, size * ALIGN), tl.multiple_of(stride.to(tl.int32), ALIGN)


@triton.jit
def streamed_product(block, shape: tl.constexpr, linear, weight, outputs, live, BLOCK_N: tl.constexpr):
    """W h of a linear without a hidden layer inside, both operands loaded in k-tiles of BLOCK_K."""
    z = tl.zeros((shape.BLOCK_B, BLOCK_N), tl.float32)
    reduction = load_aligned(block, linear + LINEAR.reduction, shape.ALIGN)
    for s in range(tl.load(block.plan + linear + LINEAR.sources)):
        source = linear + LINEAR.size + s * SOURCE.size
        first, stride = rows_of(block, source, shape.ALIGN)
        width = load_aligned(block, source + SOURCE.width, shape.ALIGN)
        column = load_aligned(block, source + SOURCE.first, shape.ALIGN)
        for k_tile in tl.range(0, width, shape.BLOCK_K, num_stages=shape.STAGES):
            k = k_tile + tl.arange(0, shape.BLOCK_K)
            inside = k < width
            h = tl.load(
                first + block.rows[:, None] * stride + k[None, :], mask=block.live[:, None] & inside[None, :], other=0.0
            )
            w = tl.load(
                weight + outputs[None, :] * reduction + (column + k)[:, None],
                mask=inside[:, None] & live[None, :],
                other=0.0,
            )
            z = tl.dot(h, w, z, input_precision=shape.PRECISION)
    return z


@triton.jit
def resident_tiles(block, shape: tl.constexpr, source):
    """The rows of a source: RESIDENT / BLOCK_K tiles [BLOCK_B, BLOCK_K] side by side, zero beyond
    its width."""
    first, stride = rows_of(block, source, shape.ALIGN)
    width = load_aligned(block, source + SOURCE.width, shape.ALIGN)
    tiles = ()
    for tile in tl.static_range(shape.RESIDENT // shape.BLOCK_K):
        k = tl.arange(0, shape.BLOCK_K) + tile * shape.BLOCK_K
        inside = block.live[:, None] & (k < width)[None, :]
        h = tl.load(first + block.rows[:, None] * stride + k[None, :], mask=inside, other=0.0)
        tiles = tiles + (h,)  # noqa: RUF005  (Triton knows no star)
    return tiles


@triton.jit
def resident_product(block, shape: tl.constexpr, weight, reduction, h, outputs, live, BLOCK_N: tl.constexpr):
    """W h of the resident tiles `h`, whose columns are those of h."""
    z = tl.zeros((shape.BLOCK_B, BLOCK_N), tl.float32)
    for tile in tl.static_range(shape.RESIDENT // shape.BLOCK_K):
        k = tl.arange(0, shape.BLOCK_K) + tile * shape.BLOCK_K
        inside = (k < reduction)[:, None] & live[None, :]
        w = tl.load(weight + outputs[None, :] * reduction + k[:, None], mask=inside, other=0.0)
        z = tl.dot(h[tile], w, z, input_precision=shape.PRECISION)
    return z


@triton.jit
def product(
    block, shape: tl.constexpr, linear, weight, h, outputs, live, RESIDENT: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """W h of a linear without a hidden layer inside: of `h` where it is resident, else of the
    linear's sources."""
    if RESIDENT > 0:
        reduction = load_aligned(block, linear + LINEAR.reduction, shape.ALIGN)
        z = resident_product(block, shape, weight, reduction, h, outputs, live, BLOCK_N)
    else:
        z = streamed_product(block, shape, linear, weight, outputs, live, BLOCK_N)
    return z


@triton.jit
def linear_forward(
    block, shape: tl.constexpr, linear, first, h, outputs, live, RESIDENT: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """z = W h + b [BLOCK_B, BLOCK_N] in float32, for the rows first + `outputs` of W that are
    `live`.

    Where the linear has a hidden layer inside (HIDDEN), that is computed BLOCK_K outputs at a time
    and goes into the product from registers.
    """
    reduction = load_aligned(block, linear + LINEAR.reduction, shape.ALIGN)
    weight = pointer(block, tl.load(block.plan + linear + LINEAR.weight))
    weight = tl.multiple_of(weight + tl.cast(first, tl.int64) * reduction, shape.BYTES)
    hidden = -1
    if shape.HIDDEN:
        hidden = tl.load(block.plan + linear + LINEAR.hidden)
    if hidden >= 0:
        z = tl.zeros((shape.BLOCK_B, BLOCK_N), tl.float32)
        columns = tl.arange(0, shape.BLOCK_K)
        for k in range(0, reduction, shape.BLOCK_K):
            inside = columns < reduction - k
            y = without_hidden(block, shape, hidden, k, h, columns, inside, RESIDENT, shape.BLOCK_K)
            # Beyond the layer stands 0 h, which is NaN where h is infinite, and NaN x 0 is NaN.
            y = tl.where(inside[None, :], activated(block, shape, hidden, y), 0.0)
            w = tl.load(
                weight + outputs[None, :] * reduction + (k + columns)[:, None],
                mask=inside[:, None] & live[None, :],
                other=0.0,
            )
            z = tl.dot(y.to(w.dtype), w, z, input_precision=shape.PRECISION)
    else:
        z = product(block, shape, linear, weight, h, outputs, live, RESIDENT, BLOCK_N)
    return with_bias(block, linear, first, z, outputs, live)


@triton.jit
def without_hidden(
    block, shape: tl.constexpr, linear, first, h, outputs, live, RESIDENT: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """z of a linear that has no hidden layer inside, as `linear_forward`."""
    reduction = load_aligned(block, linear + LINEAR.reduction, shape.ALIGN)
    weight = pointer(block, tl.load(block.plan + linear + LINEAR.weight))
    weight = tl.multiple_of(weight + tl.cast(first, tl.int64) * reduction, shape.BYTES)
    z = product(block, shape, linear, weight, h, outputs, live, RESIDENT, BLOCK_N)
    return with_bias(block, linear, first, z, outputs, live)


@triton.jit
def with_bias(block, linear, first, z, outputs, live):
    """z + b of a linear that has a bias.

    Added whether or not there is one: Triton 3.6's pass tritongpu-pipeline follows a product of
    sm_90 that a loop computes to the loop's yield, and where every use of the product stands in
    some `if`, and none leads there, crashes on a null pointer (which comes out as `PassManager::run
    failed`).
    """
    bias = tl.load(block.plan + linear + LINEAR.bias)
    b = tl.zeros(outputs.shape, tl.float32)
    if bias >= 0:
        b = tl.load(pointer(block, bias) + first + outputs, mask=live, other=0.0).to(tl.float32)
    return z + b[None, :]


@triton.jit
def activated(block, shape: tl.constexpr, linear, z):
    """act(z) of a linear."""
    code = tl.load(block.plan + linear + LINEAR.activation)
    return apply(z, code, activation_parameter(block, linear), shape.ACTS)


@triton.jit
def activation_parameter(block, linear):
    """The number that a linear's activation takes (the slope of a leaky ReLU)."""
    return tl.load(block.floats + tl.load(block.plan + linear + LINEAR.parameter))


@triton.jit
def expert_outputs(block, shape: tl.constexpr, linear, column, columns, live):
    """z = W h + b of columns `column`.. of an expert, or its copied source."""
    if tl.load(block.plan + linear + LINEAR.weight) >= 0:
        z = linear_forward(block, shape, linear, column, (), columns, live, 0, shape.BLOCK_H)
    else:
        z = copied(block, shape, linear, column, columns, live)
    return z


@triton.jit
def copied(block, shape: tl.constexpr, linear, column, columns, live):
    """Columns `column`.. of the source of a linear that is a copy."""
    first, stride = rows_of(block, linear + LINEAR.size, shape.ALIGN)
    pointers = first + column + block.rows[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=block.live[:, None] & live[None, :], other=0.0).to(tl.float32)


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
