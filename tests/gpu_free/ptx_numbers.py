"""Numbers as the hardware rounds them. Registers are arrays of unsigned integers, one lane a
thread; a kind says what their bits mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .ptx_text import PtxError

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
LETTERS = {"b": UNSIGNED, "u": UNSIGNED, "s": SIGNED}


class Kind(NamedTuple):
    """A type of PTX: its letter (b, u, s; f for floats, "bf16" and "pred" by their own names),
    bits, and the NumPy type of its values.

    bfloat16 has none in NumPy: its values are float32.
    """

    letter: str
    bits: int
    dtype: type


def kind_of(name: str) -> Kind:
    """The kind named "u32", "f16", "bf16", "pred". Raises: PtxError for a name that is none."""
    if name == "pred":
        return Kind("pred", 1, np.bool_)
    if name == "bf16":
        return Kind("bf16", 16, np.float32)
    if name in FLOATS:
        return Kind("f", int(name[1:]), FLOATS[name])
    letter, digits = name[:1], name[1:]
    if letter in LETTERS and digits.isdecimal() and int(digits) in LETTERS[letter]:
        return Kind(letter, int(digits), LETTERS[letter][int(digits)])
    raise PtxError(f"type: expected one that the executor knows, got {name}")


def read(bits: np.ndarray, kind: Kind) -> np.ndarray:
    """The values in registers as wide as the kind."""
    return widened(bits) if kind.letter == "bf16" else bits.view(kind.dtype)


def written(values: np.ndarray, kind: Kind) -> np.ndarray:
    """The bits of values; floats are rounded to the nearest, ties to even."""
    if kind.letter == "bf16":
        return narrowed(values)
    return values.astype(kind.dtype, copy=False).view(UNSIGNED[kind.bits])


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16: to the nearest, ties to even; NaN becomes 0x7FFF, as on the hardware."""
    bits = values.view(np.uint32)
    up = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), up.astype(np.uint16))


TF32_IGNORED = 13


def to_tf32(values: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers rounded to tf32: to the nearest, ties away from zero (cvt.rna)."""
    bits = values.view(np.uint32)
    half, kept = np.uint32(1 << (TF32_IGNORED - 1)), np.uint32(0xFFFFFFFF << TF32_IGNORED & 0xFFFFFFFF)
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), (bits + half) & kept)


def from_tf32(bits: np.ndarray) -> np.ndarray:
    """What a tensor core sees of a tf32 register: the low 13 bits are ignored."""
    return (bits & np.uint32(0xFFFFFFFF << TF32_IGNORED & 0xFFFFFFFF)).view(np.float32)


SMALLEST_NORMAL = {
    np.float32: np.finfo(np.float32).tiny,
    np.float64: np.finfo(np.float64).tiny,
    np.float16: np.finfo(np.float16).tiny,
}


def flushed(values: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zeros of their sign (.ftz)."""
    tiny = SMALLEST_NORMAL[values.dtype.type]
    return np.where(np.abs(values) < tiny, values * 0, values)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of float32 numbers, rounded once.

    The product is exact in float64. Rounding the sum there first is harmless unless it falls on the
    middle between two numbers of float32 (or into its subnormals): those lanes are first rounded to
    odd, which loses no side of the middle.
    """
    product = a.astype(np.float64) * b
    total = product + c
    half = total.view(np.uint64) & np.uint64((1 << 29) - 1)
    doubtful = (half == np.uint64(1 << 28)) | (np.abs(total) < SMALLEST_NORMAL[np.float32])
    if doubtful.any():
        total = np.where(doubtful & np.isfinite(total), _odd(product, c.astype(np.float64), total), total)
    return total.astype(np.float32)


def _odd(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """a + b in float64 rounded to odd, given `total`, their sum rounded to nearest."""
    # Knuth's exact error of a sum.
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    even = (bits & 1) == 0
    # One step away from zero where the error has the sign of the total, else one toward it.
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where((error != 0) & even, bits + step, bits).view(np.float64)


def numeric_error_ignored():
    """NumPy's warnings off: infinities, NaN and wrapping are what the hardware gives, too."""
    return np.errstate(all="ignore")
