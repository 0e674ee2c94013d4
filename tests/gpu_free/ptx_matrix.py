"""Instructions of a whole warp on small matrices: ldmatrix, and mma with an A100's arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import ptx_numbers as numbers
from .ptx_memory import WARP
from .ptx_scope import Lanes, Scope, Step, instruction, put, whole_warps
from .ptx_text import Instruction, PtxError, elements

# Lane 4 g + t of a warp holds what belongs to row (or column) g, and t-th in it.
ROWS, PER_ROW = 8, 4


@instruction("ldmatrix")
def load_matrices(scope: Scope, one: Instruction) -> Step:
    """1, 2 or 4 matrices of 8 x 8 numbers of 16 bits from shared memory; lane 8 i + j gives the
    address of row j of matrix i.

    Lane 4 g + t gets numbers 2 t and 2 t + 1 of row g, or of column g (.trans).
    """
    found = re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", one.opcode)
    if found is None:
        raise PtxError("expected ldmatrix.sync.aligned.m8n8 of x1, x2 or x4 from shared memory")
    count, transposed = int(found[1]), found[2] is not None
    slots = [scope.destination(name, 32) for name in elements(one.operands[0])]
    if len(slots) != count:
        raise PtxError(f"expected {count} registers, got {len(slots)}")
    find, shared, warps = scope.address(one.operands[1], 32), scope.shared, scope.warps

    def step(lanes: Lanes, mask: np.ndarray | None) -> None:
        whole_warps(mask)
        at = find(lanes).reshape(warps, WARP)[:, : ROWS * count]
        shared.check(at.ravel() if mask is None else at[mask.reshape(warps, WARP)[:, 0]].ravel(), 16, "ldmatrix")
        first = at.astype(np.int64).reshape(warps, count, ROWS, 1)
        if transposed:
            matrices = shared.views[16].take(first // 2 + np.arange(8), mode="clip")  # [warps, count, 8, 8]
            words = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2)).view(np.uint32)
        else:
            words = shared.views[32].take(first // 4 + np.arange(PER_ROW), mode="clip")
        for i, slot in enumerate(slots):
            put(lanes, slot, words[:, i].reshape(scope.threads), mask)

    return step


# Kind of A and B -> how to read it, numbers in a register, and how many products the tensor core
# adds in one go.
OPERANDS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int, int]] = {
    "bf16": (lambda words: numbers.widened(words.view(np.uint16)), 2, 8),
    "f16": (lambda words: words.view(np.float16).astype(np.float32), 2, 8),
    "tf32": (numbers.from_tf32, 1, 4),
}
SHAPES = {"bf16": ("m16n8k16", "m16n8k8"), "f16": ("m16n8k16", "m16n8k8"), "tf32": ("m16n8k8", "m16n8k4")}


@instruction("mma")
def multiply_matrices(scope: Scope, one: Instruction) -> Step:
    """D [16, 8] = A [16, K] B [K, 8] + C in float32."""
    found = re.fullmatch(r"mma\.sync\.aligned\.(m16n8k\d+)\.row\.col\.f32\.(\w+)\.\2\.f32", one.opcode)
    if found is None or found[1] not in SHAPES.get(found[2], ()):
        raise PtxError("expected mma.sync.aligned.m16n8kK.row.col of bf16, f16 or tf32, added in f32")
    decode, per_register, width = OPERANDS[found[2]]
    depth = int(found[1].removeprefix("m16n8k"))
    d_slots = [scope.destination(name, 32) for name in elements(one.operands[0])]
    a_slots, b_slots, c_slots = (
        [scope.source(name, 32) for name in elements(operand)] for operand in one.operands[1:4]
    )
    counts = [len(slots) for slots in (d_slots, a_slots, b_slots, c_slots)]
    groups = depth // (PER_ROW * per_register)
    if counts != [4, 2 * groups, groups, 4]:
        raise PtxError(f"expected {[4, 2 * groups, groups, 4]} registers of D, A, B and C, got {counts}")
    warps = scope.warps

    def step(lanes: Lanes, mask: np.ndarray | None) -> None:
        whole_warps(mask)
        scope.mmas += warps if mask is None else np.count_nonzero(mask) // WARP
        # Registers of A: [K group, upper or lower rows]; of B: [K group]; of C: [upper or lower
        # rows, column 2 t or 2 t + 1].
        a = decode(np.stack([lanes[slot] for slot in a_slots])).reshape(groups, 2, warps, ROWS, PER_ROW, per_register)
        b = decode(np.stack([lanes[slot] for slot in b_slots])).reshape(groups, warps, ROWS, PER_ROW, per_register)
        c = np.stack([lanes[slot] for slot in c_slots]).view(np.float32).reshape(2, 2, warps, ROWS, PER_ROW)
        rows = a.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, depth)
        columns = b.transpose(1, 2, 0, 3, 4).reshape(warps, 8, depth)
        total = c.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        for k in range(0, depth, width):
            total = added(total, rows[:, :, None, k : k + width], columns[:, None, :, k : k + width])
        parts = total.reshape(warps, 2, ROWS, PER_ROW, 2).transpose(1, 4, 0, 2, 3)
        words = np.ascontiguousarray(parts).view(np.uint32).reshape(4, scope.threads)
        for slot, value in zip(d_slots, words, strict=True):
            put(lanes, slot, value, mask)

    return step


# Bits of a product or addend that an A100 keeps: the 24 of float32 and one more.
KEPT = 25


def added(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c + sum over the last dimension of a b, as a tensor core adds it.

    The products are exact. All addends are cut, not rounded, to the place of bit KEPT of the
    largest; their sum is exact, and cut to float32.
    Source: Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores" (2021);
    Khattak, Mikaitis, "Accurate models of NVIDIA tensor cores" (2025): an A100 adds 8 products of
    16-bit floats or 4 of tf32 at a time, with one extra bit.
    """
    products = a.astype(np.float64) * b
    start = c.astype(np.float64)
    largest = np.maximum(np.abs(products).max(-1), np.abs(start))
    place = np.frexp(largest)[1] - KEPT
    # float64 holds the sum of nine numbers of 25 bits exactly.
    cut = np.trunc(np.ldexp(products, -place[..., None])).sum(-1) + np.trunc(np.ldexp(start, -place))
    total = toward_zero(np.ldexp(cut, place))
    finite = np.isfinite(largest)
    return total if finite.all() else np.where(finite, total, (products.sum(-1) + start).astype(np.float32))


def toward_zero(values: np.ndarray) -> np.ndarray:
    """float64 as float32, cut; what is too large for it is infinite."""
    single = values.astype(np.float32)
    beyond = (np.abs(single.astype(np.float64)) > np.abs(values)) & np.isfinite(single)
    return np.where(beyond, np.nextafter(single, np.float32(0)), single)
