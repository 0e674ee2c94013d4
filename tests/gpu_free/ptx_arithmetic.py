"""Instructions that compute: integers, floats, comparisons, bits, conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import ptx_numbers as numbers
from .ptx_numbers import SIGNED, UNSIGNED, Kind
from .ptx_scope import Compute, Lanes, Scope, Step, assigned, instruction, kinds, modifiers, put
from .ptx_text import Instruction, PtxError

Function = Callable[..., np.ndarray]
FLOATING = ("f", "bf16")


def elementwise(scope: Scope, one: Instruction, function: Function, kind: Kind, result: Kind | None = None) -> Step:
    """The step dest = function(sources), all of one kind; `function` sees values of that kind."""
    result = result or kind
    slot = scope.destination(one.operands[0], result.bits)
    return assigned(
        slot, valued([scope.source(operand, kind.bits) for operand in one.operands[1:]], function, kind, result)
    )


def valued(slots: list[int], function: Function, kind: Kind, result: Kind) -> Compute:
    """How to compute function(slots), whose bits are a `kind`, as the bits of a `result`."""
    if kind.letter in ("b", "u", "pred") and result.letter in ("b", "u", "pred"):
        if len(slots) == 2:
            a, b = slots
            return lambda lanes: function(lanes[a], lanes[b])
        return lambda lanes: function(*(lanes[slot] for slot in slots))
    if kind == result and kind.letter != "bf16" and kind.bits > 16:
        dtype, bits = kind.dtype, UNSIGNED[kind.bits]
        if len(slots) == 2:
            a, b = slots
            return lambda lanes: function(lanes[a].view(dtype), lanes[b].view(dtype)).view(bits)
        return lambda lanes: function(*(lanes[slot].view(dtype) for slot in slots)).view(bits)
    return lambda lanes: numbers.written(function(*(numbers.read(lanes[slot], kind) for slot in slots)), result)


def is_paired(one: Instruction) -> bool:
    """Whether an instruction computes two numbers of 16 bits in a register."""
    return one.parts[-1] in ("bf16x2", "f16x2")


def paired(scope: Scope, one: Instruction, function: Function) -> Step:
    """As `elementwise`, of both halves of registers."""
    kind = numbers.kind_of(one.parts[-1].removesuffix("x2"))
    slots = [scope.source(operand, 32) for operand in one.operands[1:]]

    def compute(lanes: Lanes) -> np.ndarray:
        low, high = (
            numbers.written(
                function(*(numbers.read((lanes[slot] >> shift).astype(np.uint16), kind) for slot in slots)), kind
            ).astype(np.uint32)
            for shift in np.array([0, 16], np.uint32)
        )
        return low | high << np.uint32(16)

    return assigned(scope.destination(one.operands[0], 32), compute)


def flushing(function: Function) -> Function:
    """`function` with subnormal arguments and results as zeros."""
    return lambda *values: numbers.flushed(function(*map(numbers.flushed, values)))


def toward_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b of integers, cut; where b is 0 the hardware promises nothing."""
    return (a - np.fmod(a, b)) // b


INTEGER = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "div": toward_zero, "rem": np.fmod, "neg": np.negative, "abs": np.abs,
}  # fmt: skip
# Both of min and max prefer a number to NaN, unless .NaN says otherwise.
FLOAT = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.fmin, "max": np.fmax, "neg": np.negative, "abs": np.abs,
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda a: np.reciprocal(np.sqrt(a)),
    "copysign": lambda sign, size: np.copysign(size, sign),
}  # fmt: skip
PROPAGATING = {"min": np.minimum, "max": np.maximum}


@instruction(*(set(INTEGER) | set(FLOAT)) - {"mul"})
def arithmetic(scope: Scope, one: Instruction) -> Step:
    """dest = a op b, or op a. What the hardware approximates (ex2, lg2, rcp, div.full ...) is
    NumPy's float32 here, a roundoff or two away."""
    name = one.parts[0]
    if is_paired(one):
        return paired(scope, one, (PROPAGATING if "NaN" in modifiers(one, "rn", "NaN") else FLOAT)[name])
    kind = kinds(one)[0]
    if kind.letter not in FLOATING:
        modifiers(one)
        if name not in INTEGER:
            raise PtxError(f"expected a float, got {one.parts[-1]}")
        return elementwise(scope, one, INTEGER[name], kind)
    given = modifiers(one, "rn", "approx", "full", "ftz", "NaN")
    function = (PROPAGATING if "NaN" in given else FLOAT)[name]
    return elementwise(scope, one, flushing(function) if "ftz" in given else function, kind)


@instruction("mul", "mad")
def multiply(scope: Scope, one: Instruction) -> Step:
    """Floats: the product. Integers: its lower half (lo), its upper half (hi), or all of it (wide);
    mad adds a third operand."""
    if is_paired(one):
        modifiers(one, "rn")
        return paired(scope, one, np.multiply)
    kind = kinds(one)[0]
    if kind.letter in FLOATING:
        if one.parts[0] == "mad":
            raise PtxError("expected integers; floats have fma")
        given = modifiers(one, "rn", "ftz")
        return elementwise(scope, one, flushing(np.multiply) if "ftz" in given else np.multiply, kind)
    which = modifiers(one, "lo", "hi", "wide")
    result = (
        Kind(kind.letter, 2 * kind.bits, (SIGNED if kind.letter == "s" else UNSIGNED)[2 * kind.bits])
        if which == {"wide"}
        else kind
    )
    a, b = (scope.source(operand, kind.bits) for operand in one.operands[1:3])
    product = valued([a, b], _product(kind, which), kind, result)
    slot = scope.destination(one.operands[0], result.bits)
    if one.parts[0] == "mul":
        return assigned(slot, product)
    c = scope.source(one.operands[3], result.bits)
    return assigned(slot, lambda lanes: product(lanes) + lanes[c])


def _product(kind: Kind, which: set[str]) -> Function:
    if which == {"lo"}:
        return np.multiply
    if kind.bits == 64:
        raise PtxError("expected a product of at most 64 bits, got 128")
    wide, shift = (SIGNED if kind.letter == "s" else UNSIGNED)[2 * kind.bits], kind.bits
    if which == {"wide"}:
        return lambda a, b: a.astype(wide) * b
    return lambda a, b: (a.astype(wide) * b >> wide(shift)).astype(kind.dtype)


@instruction("fma")
def fused_multiply_add(scope: Scope, one: Instruction) -> Step:
    """a b + c, rounded once; of bfloat16 first to float32, which moves it only where that falls on the
    middle between two numbers."""
    if is_paired(one):
        modifiers(one, "rn")
        return paired(scope, one, numbers.fused)
    kind = kinds(one)[0]
    given = modifiers(one, "rn", "ftz")
    if kind.dtype != np.float32:
        raise PtxError(f"expected f32 or bf16, got {one.parts[-1]}")
    return elementwise(scope, one, flushing(numbers.fused) if "ftz" in given else numbers.fused, kind)


COMPARISONS: dict[str, Function] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b), "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@instruction("setp")
def set_predicate(scope: Scope, one: Instruction) -> Step:
    """p|q = a compare b, and not so; with .and, .or, .xor the comparison (and its opposite) is
    combined with a fourth operand."""
    kind = kinds(one)[0]
    names = [name for name in one.parts[1:-1] if name in COMPARISONS]
    given = modifiers(one, *COMPARISONS, "and", "or", "xor", "ftz")
    if len(names) != 1:
        raise PtxError(f"expected one comparison, got {' '.join(names) or 'none'}")
    compare = np.not_equal if names[0] == "ne" and kind.letter not in FLOATING else COMPARISONS[names[0]]
    if "ftz" in given:
        compare = _flushing_arguments(compare)
    both = one.operands[0].split("|")
    slots = [scope.destination(name.strip(), 1) for name in both]
    sources = [scope.source(operand, kind.bits) for operand in one.operands[1:3]]
    third = one.operands[3] if len(one.operands) > 3 else None
    combine = next((LOGIC[name] for name in given if name in LOGIC), None)
    if (third is None) != (combine is None):
        raise PtxError("expected a fourth operand with .and, .or or .xor, and not without")
    extra = None if third is None else scope.source(third, 1)

    def step(lanes: Lanes, mask: np.ndarray | None) -> None:
        found = compare(*(numbers.read(lanes[slot], kind) for slot in sources))
        for slot, value in zip(slots, (found, ~found), strict=False):
            put(lanes, slot, value if combine is None else combine(value, lanes[extra]), mask)

    return step


def _flushing_arguments(compare: Function) -> Function:
    return lambda a, b: compare(numbers.flushed(a), numbers.flushed(b))


@instruction("selp")
def select(scope: Scope, one: Instruction) -> Step:
    """a where the predicate holds, else b."""
    kind = kinds(one)[0]
    modifiers(one)
    a, b = (scope.source(operand, kind.bits) for operand in one.operands[1:3])
    predicate = scope.source(one.operands[3], 1)
    return assigned(
        scope.destination(one.operands[0], kind.bits), lambda lanes: np.where(lanes[predicate], lanes[a], lanes[b])
    )


@instruction(*LOGIC)
def logic(scope: Scope, one: Instruction) -> Step:
    """Bitwise and, or, xor, not; of predicates too."""
    modifiers(one)
    return elementwise(scope, one, LOGIC[one.parts[0]], kinds(one)[0])


@instruction("lop3")
def logic_of_three(scope: Scope, one: Instruction) -> Step:
    """Any function of three bits: bit 4 a + 2 b + c of the table is its value."""
    modifiers(one)
    kind = kinds(one)[0]
    slots = [scope.source(operand, kind.bits) for operand in one.operands[1:4]]
    table = int(one.operands[4], 0)

    def compute(lanes: Lanes) -> np.ndarray:
        positive = [lanes[slot] for slot in slots]
        result = np.zeros_like(positive[0])
        for term in range(8):
            if table >> term & 1:
                a, b, c = (value if term >> 2 - i & 1 else ~value for i, value in enumerate(positive))
                result |= a & b & c
        return result

    return assigned(scope.destination(one.operands[0], kind.bits), compute)


@instruction("shl", "shr")
def shift(scope: Scope, one: Instruction) -> Step:
    """By 32 bits or more everything leaves: zeros, or the sign for shr.s."""
    modifiers(one)
    kind = kinds(one)[0]
    a, by = scope.source(one.operands[1], kind.bits), scope.source(one.operands[2], 32)
    move = np.left_shift if one.parts[0] == "shl" else np.right_shift
    dtype, most = kind.dtype, kind.bits - 1

    def compute(lanes: Lanes) -> np.ndarray:
        distance = np.minimum(lanes[by], most).astype(dtype)
        moved = move(lanes[a].view(dtype), distance).view(UNSIGNED[kind.bits])
        return moved if kind.letter == "s" else np.where(lanes[by] > most, dtype(0), moved)

    return assigned(scope.destination(one.operands[0], kind.bits), compute)


@instruction("shf")
def funnel_shift(scope: Scope, one: Instruction) -> Step:
    """32 bits of the 64 in (b, a), shifted left or right; the distance is taken modulo 32 (wrap) or
    at most 32 (clamp)."""
    given = modifiers(one, "l", "r", "wrap", "clamp")
    low, high, by = (scope.source(operand, 32) for operand in one.operands[1:4])

    def compute(lanes: Lanes) -> np.ndarray:
        both = lanes[high].astype(np.uint64) << np.uint64(32) | lanes[low]
        distance = (lanes[by] & np.uint32(31) if "wrap" in given else np.minimum(lanes[by], np.uint32(32))).astype(
            np.uint64
        )
        moved = both << distance >> np.uint64(32) if "l" in given else both >> distance
        return moved.astype(np.uint32)

    return assigned(scope.destination(one.operands[0], 32), compute)


@instruction("bfe")
def extract_bits(scope: Scope, one: Instruction) -> Step:
    """`length` bits from `first` on, extended by zeros or by their sign; beyond the end stand zeros
    or the sign of all."""
    modifiers(one)
    kind = kinds(one)[0]
    a = scope.source(one.operands[1], kind.bits)
    first, length = (scope.source(operand, 32) for operand in one.operands[2:4])
    bits, dtype, most = UNSIGNED[kind.bits], kind.dtype, kind.bits - 1

    def compute(lanes: Lanes) -> np.ndarray:
        start, count = (np.minimum(lanes[slot] & np.uint32(255), np.uint32(kind.bits)) for slot in (first, length))
        # Arithmetic shifts of the bits, moved to the top and back down.
        down = np.minimum(start, most).astype(dtype)
        value = lanes[a].view(dtype) >> down
        if kind.letter != "s":
            value = np.where(start > most, dtype(0), value)
        spare = (np.uint32(kind.bits) - count).astype(dtype)
        kept = (
            (value.view(bits) << np.minimum(spare, dtype(most)).view(bits)).view(dtype)
            >> np.minimum(spare, dtype(most))
        ).view(bits)
        return np.where(count == 0, bits(0), kept)

    return assigned(scope.destination(one.operands[0], kind.bits), compute)


@instruction("bfi")
def insert_bits(scope: Scope, one: Instruction) -> Step:
    """b with the lowest `length` bits of a in place of its own from `first` on; what would stand
    beyond the end is left out."""
    modifiers(one)
    if kinds(one)[0].bits != 32:
        raise PtxError("expected bfi of b32")
    a, b, first, length = (scope.source(operand, 32) for operand in one.operands[1:5])

    def compute(lanes: Lanes) -> np.ndarray:
        # Of 64 bits, where nothing falls off: both counts are at most 32.
        start, count = (
            np.minimum(lanes[slot] & np.uint32(255), np.uint32(32)).astype(np.uint64) for slot in (first, length)
        )
        mask = (np.uint64(1) << count) - np.uint64(1)
        placed, hole = (lanes[a] & mask) << start, mask << start
        return (placed | lanes[b] & ~hole).astype(np.uint32)

    return assigned(scope.destination(one.operands[0], 32), compute)


@instruction("prmt")
def permute_bytes(scope: Scope, one: Instruction) -> Step:
    """Four of the eight bytes in (b, a): nibble i of the selector names byte i; its top bit asks
    for the byte's sign, eight times."""
    modifiers(one)
    a, b, selector = (scope.source(operand, 32) for operand in one.operands[1:4])

    def compute(lanes: Lanes) -> np.ndarray:
        both = lanes[b].astype(np.uint64) << np.uint64(32) | lanes[a]
        result = np.zeros_like(lanes[a])
        for i in range(4):
            nibble = lanes[selector] >> np.uint32(4 * i) & np.uint32(15)
            byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)).astype(np.uint32)
            sign = (byte >> np.uint32(7)) * np.uint32(255)
            result |= np.where(nibble > 7, sign, byte) << np.uint32(8 * i)
        return result

    return assigned(scope.destination(one.operands[0], 32), compute)
