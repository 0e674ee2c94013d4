"""cvt: between integers, floats, and pairs of floats in one register."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import ptx_numbers as numbers
from .ptx_numbers import UNSIGNED, Kind, kind_of
from .ptx_scope import Lanes, Scope, Step, assigned, instruction, modifiers
from .ptx_text import Instruction, PtxError

FLOATING = ("f", "bf16")
# To an integral number: nearest (ties to even), toward zero, down, up.
INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def convert(scope: Scope, one: Instruction) -> Step:
    """dest = source in another type."""
    given = modifiers(one, "rn", "rna", "ftz", *INTEGRAL, types=2)
    to, of = one.parts[-2:]
    if to == "tf32":
        return _to_tf32(scope, one, given)
    if to in ("bf16x2", "f16x2"):
        return _to_pair(scope, one, kind_of(to.removesuffix("x2")), kind_of(of))
    target, source = kind_of(to), kind_of(of)
    change = _change(target, source, given)
    slot, narrow = _input(scope, one.operands[1], source)
    bits = scope.bits(one.operands[0])
    if bits is None or bits < target.bits:
        raise PtxError(f"{one.operands[0]}: expected a register of at least {target.bits} bits, got {bits}")
    widen = _extended(target, bits)
    return assigned(
        scope.destination(one.operands[0], bits), lambda lanes: widen(change(numbers.read(narrow(lanes[slot]), source)))
    )


def _input(scope: Scope, operand: str, kind: Kind) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """The slot of a source, and how to cut its register, which may be wider, to the kind's bits."""
    bits = scope.bits(operand) or kind.bits
    if bits < kind.bits:
        raise PtxError(f"{operand}: expected a register of at least {kind.bits} bits, got {bits}")
    dtype = UNSIGNED[kind.bits]
    return scope.source(operand, bits), (lambda value: value) if bits == kind.bits else (
        lambda value: value.astype(dtype)
    )


def _extended(kind: Kind, bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """How to fill a register of so many bits with a value: its bits, extended by its sign if it has
    one."""
    if bits == kind.bits:
        return lambda value: numbers.written(value, kind)
    if kind.letter == "s":
        return lambda value: value.astype(f"i{bits // 8}").view(UNSIGNED[bits])
    return lambda value: numbers.written(value, kind).astype(UNSIGNED[bits])


def _change(target: Kind, source: Kind, given: set[str]) -> Callable[[np.ndarray], np.ndarray]:
    """Values of one kind as those of another."""
    integral = next((INTEGRAL[name] for name in INTEGRAL if name in given), None)
    if source.letter in FLOATING and target.letter in FLOATING:
        flush = numbers.flushed if "ftz" in given else lambda value: value
        turn = integral or (lambda value: value)
        return lambda value: turn(flush(value)).astype(target.dtype)
    if source.letter in FLOATING:
        if integral is None:
            raise PtxError("expected a rounding to an integral number, got none")
        return lambda value: _clamped(integral(value), target)
    return lambda value: value.astype(target.dtype)


def _clamped(value: np.ndarray, target: Kind) -> np.ndarray:
    """Integral floats as integers: the nearest that there is, 0 for NaN."""
    least, most = np.iinfo(target.dtype).min, np.iinfo(target.dtype).max
    wide = value.astype(np.float64)
    inside = np.where(np.isnan(wide) | (wide >= most) | (wide <= least), 0, wide).astype(target.dtype)
    return np.where(wide >= most, target.dtype(most), np.where(wide <= least, target.dtype(least), inside))


def _to_tf32(scope: Scope, one: Instruction, given: set[str]) -> Step:
    if given != {"rna"} or one.parts[-1] != "f32":
        raise PtxError("expected cvt.rna.tf32.f32")
    source = scope.source(one.operands[1], 32)
    return assigned(
        scope.destination(one.operands[0], 32), lambda lanes: numbers.to_tf32(lanes[source].view(np.float32))
    )


def _to_pair(scope: Scope, one: Instruction, half: Kind, source: Kind) -> Step:
    """Two floats in 16 bits each; the first operand goes to the upper half."""
    if source.letter != "f" or source.bits != 32:
        raise PtxError(f"expected f32, got {one.parts[-1]}")
    upper, lower = (scope.source(operand, 32) for operand in one.operands[1:3])

    def compute(lanes: Lanes) -> np.ndarray:
        top, bottom = (numbers.written(lanes[slot].view(np.float32), half).astype(np.uint32) for slot in (upper, lower))
        return top << np.uint32(16) | bottom

    return assigned(scope.destination(one.operands[0], 32), compute)
