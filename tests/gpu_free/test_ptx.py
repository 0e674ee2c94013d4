"""The PTX executor, instruction by instruction, on hand-written kernels: values against exact
arithmetic, and each fault caught."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from .probe import WARP, aligned, lanewise, module, run
from .ptx import Executable, KernelFault, PtxError, Range
from .ptx_text import parse

LANES = np.arange(WARP)


def draw(dtype, seed: int) -> np.ndarray:
    """Numbers of a type: of all bits for integers; floats of many sizes, the special ones among
    them."""
    generator = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        values = generator.integers(info.min, info.max, WARP, dtype, endpoint=True)
        values[:6] = [0, 1, info.max, info.min, 31, 3]
        return values
    values = (generator.standard_normal(WARP) * 2.0 ** generator.integers(-12, 12, WARP)).astype(dtype)
    values[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0]
    return generator.permutation(values)


U32, S32, U64, S64, F32, U16 = np.uint32, np.int32, np.uint64, np.int64, np.float32, np.uint16


def each(function):
    """A function of Python's numbers as one of arrays."""
    return lambda *columns: [function(*map(int, numbers)) for numbers in zip(*columns, strict=True)]


def wrapped(values, dtype) -> np.ndarray:
    bits = 8 * np.dtype(dtype).itemsize
    return np.array([value & ((1 << bits) - 1) for value in values], f"u{bits // 8}").view(dtype)


def shifted(a: int, by: int, bits: int) -> int:
    return 0 if by >= bits else a << by


def bits_of(a: int, first: int, length: int) -> int:
    return a >> (first & 255) & ((1 << (length & 255)) - 1)


def permuted(a: int, b: int, selector: int) -> int:
    both, result = b << 32 | a, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 255
        result |= ((255 if byte > 127 else 0) if nibble > 7 else byte) << 8 * i
    return result


# Instruction -> type of the result, types of the operands, what it must give in exact integers.
INTEGERS = {
    "add.s32 {x}, {a}, {b};": (S32, (S32, S32), lambda a, b: a + b),
    "sub.s64 {x}, {a}, {b};": (S64, (S64, S64), lambda a, b: a - b),
    "mul.lo.s32 {x}, {a}, {b};": (S32, (S32, S32), lambda a, b: a * b),
    "mul.hi.s32 {x}, {a}, {b};": (S32, (S32, S32), lambda a, b: a * b >> 32),
    "mul.hi.u32 {x}, {a}, {b};": (U32, (U32, U32), lambda a, b: a * b >> 32),
    "mul.wide.s32 {x}, {a}, {b};": (S64, (S32, S32), lambda a, b: a * b),
    "mul.wide.u32 {x}, {a}, {b};": (U64, (U32, U32), lambda a, b: a * b),
    "mad.lo.s32 {x}, {a}, {b}, {c};": (S32, (S32, S32, S32), lambda a, b, c: a * b + c),
    "mad.wide.s32 {x}, {a}, {b}, {c};": (S64, (S32, S32, S64), lambda a, b, c: a * b + c),
    "min.s32 {x}, {a}, {b};": (S32, (S32, S32), min),
    "max.u32 {x}, {a}, {b};": (U32, (U32, U32), max),
    "neg.s32 {x}, {a};": (S32, (S32,), lambda a: -a),
    "abs.s32 {x}, {a};": (S32, (S32,), abs),
    "div.s32 {x}, {a}, 7;": (S32, (S32,), lambda a: abs(a) // 7 * (1 if a > 0 else -1)),
    "rem.s32 {x}, {a}, 7;": (S32, (S32,), lambda a: abs(a) % 7 * (1 if a > 0 else -1)),
    "div.u32 {x}, {a}, 7;": (U32, (U32,), lambda a: a // 7),
    "and.b32 {x}, {a}, {b};": (U32, (U32, U32), lambda a, b: a & b),
    "or.b64 {x}, {a}, {b};": (U64, (U64, U64), lambda a, b: a | b),
    "xor.b32 {x}, {a}, -1;": (U32, (U32,), lambda a: ~a),
    "not.b32 {x}, {a};": (U32, (U32,), lambda a: ~a),
    "lop3.b32 {x}, {a}, {b}, {c}, 0xca;": (U32, (U32, U32, U32), lambda a, b, c: a & b | ~a & c),
    "lop3.b32 {x}, {a}, {b}, {c}, 0x96;": (U32, (U32, U32, U32), lambda a, b, c: a ^ b ^ c),
    "shl.b32 {x}, {a}, {b};": (U32, (U32, U32), lambda a, by: shifted(a, by, 32)),
    "shl.b64 {x}, {a}, {b};": (U64, (U64, U32), lambda a, by: shifted(a, by, 64)),
    "shr.u32 {x}, {a}, {b};": (U32, (U32, U32), lambda a, by: a >> by),
    "shr.s32 {x}, {a}, {b};": (S32, (S32, U32), lambda a, by: a >> by),
    "shf.l.wrap.b32 {x}, {a}, {b}, {c};": (U32, (U32, U32, U32), lambda a, b, by: (b << 32 | a) << by % 32 >> 32),
    "shf.r.wrap.b32 {x}, {a}, {b}, {c};": (U32, (U32, U32, U32), lambda a, b, by: (b << 32 | a) >> by % 32),
    "bfe.u32 {x}, {a}, {b}, {c};": (U32, (U32, U32, U32), bits_of),
    "bfi.b32 {x}, {a}, {b}, 5, 27;": (U32, (U32, U32), lambda a, b: (a << 5 & 0xFFFFFFE0) | (b & 31)),
    "bfi.b32 {x}, {a}, {b}, 28, 9;": (U32, (U32, U32), lambda a, b: (a << 28 & 0xF0000000) | (b & 0x0FFFFFFF)),
    "bfe.s32 {x}, {a}, 4, 8;": (S32, (S32,), lambda a: (a >> 4 & 255) - (a >> 4 & 128) * 2),
    "prmt.b32 {x}, {a}, {b}, {c};": (U32, (U32, U32, U32), permuted),
    "cvt.u32.u16 {x}, {a};": (U32, (U16,), lambda a: a),
    "cvt.s32.s16 {x}, {a};": (S32, (np.int16,), lambda a: a),
    "cvt.s64.s32 {x}, {a};": (S64, (S32,), lambda a: a),
    "cvt.u64.u32 {x}, {a};": (U64, (U32,), lambda a: a),
    "cvt.u32.u64 {x}, {a};": (U32, (U64,), lambda a: a),
    "cvt.s32.s8 {x}, {a};": (S32, (U32,), lambda a: (a & 127) - (a & 128)),
    "mov.b32 {{%h1, %h2}}, {a}; mov.b32 {x}, {{%h2, %h1}};": (U32, (U32,), lambda a: a >> 16 | a << 16),
    "mov.b64 {{_, {x}}}, {a};": (U32, (U64,), lambda a: a >> 32),
    "setp.lt.s32 %p1, {a}, {b}; selp.b32 {x}, {a}, {b}, %p1;": (S32, (S32, S32), min),
    "setp.lo.u32 %p1|%p2, {a}, {b}; selp.b32 {x}, {a}, {b}, %p2;": (U32, (U32, U32), max),
    "setp.ge.s32 %p1, {a}, 0; setp.lt.and.s32 %p2, {b}, 0, %p1; not.pred %p3, %p2; selp.b32 {x}, 0, 1, %p3;": (
        U32, (S32, S32), lambda a, b: int(a >= 0 > b),
    ),
    "setp.ne.s32 %p1, {a}, 0; mov.b32 {x}, 5; @%p1 mov.b32 {x}, 6; @!%p1 add.s32 {x}, {x}, 2;": (U32, (S32,), lambda a: 6 if a else 7),
}  # fmt: skip


@pytest.mark.parametrize("text", INTEGERS)
def test_integers(text):
    result, operands, exact = INTEGERS[text]
    columns = [draw(dtype, seed) for seed, dtype in enumerate(operands)]
    assert np.array_equal(lanewise(text, result, *columns), wrapped(each(exact)(*columns), result))


def nearest(value: Fraction) -> np.float32:
    """The float32 nearest to an exact number, ties to even."""
    guess = np.float32(float(value))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda one: (abs(Fraction(float(one)) - value), int(one.view(np.uint32)) & 1))


def test_fma_rounds_once():
    """Sums whose float64 lies on the middle between two numbers of float32, which a second rounding
    would mistake."""
    a, b = np.full(WARP, 1 + 2.0**-12, F32), np.full(WARP, 1 + 2.0**-12, F32)
    # a b = 1 + 2^-11 + 2^-24, the middle; a tiny c decides.
    c = np.array([2.0**-80, -(2.0**-80), 0, 2.0**-30] * 8, F32)
    a[16:], b[16:] = draw(F32, 1)[16:], draw(F32, 2)[16:]
    a[8:12], b[8:12], c[8:12] = (
        2.0**-70,
        [2.0**-70, 2.0**-79, 2.0**-80, 3 * 2.0**-80],
        [0, 2.0**-149, 2.0**-149, 2.0**-148],
    )
    fused = lanewise("fma.rn.f32 {x}, {a}, {b}, {c};", F32, a, b, c)
    for row in zip(fused, a, b, c, strict=True):
        if np.isfinite(row).all():
            assert row[0] == nearest(Fraction(float(row[1])) * Fraction(float(row[2])) + Fraction(float(row[3])))


def quiet(function):
    def silenced(*columns):
        with np.errstate(all="ignore"):
            return function(*columns)

    return silenced


# What IEEE rounds exactly.
ROUNDED = {
    "add.f32 {x}, {a}, {b};": lambda a, b: a + b,
    "sub.rn.f32 {x}, {a}, {b};": lambda a, b: a - b,
    "mul.f32 {x}, {a}, {b};": lambda a, b: a * b,
    "div.rn.f32 {x}, {a}, {b};": lambda a, b: a / b,
    "sqrt.rn.f32 {x}, {a};": lambda a, b: np.sqrt(a),
    "min.f32 {x}, {a}, {b};": np.fmin,
    "max.f32 {x}, {a}, {b};": np.fmax,
    "max.NaN.f32 {x}, {a}, {b};": np.maximum,
    "neg.f32 {x}, {a};": lambda a, b: -a,
    "abs.f32 {x}, {a};": lambda a, b: np.abs(a),
    "copysign.f32 {x}, {a}, {b};": lambda a, b: np.copysign(b, a),
}
# What the hardware approximates, to an error of 2^-22 (PTX ISA) or better.
APPROXIMATE = {
    "ex2.approx.ftz.f32 {x}, {a};": lambda a, b: np.exp2(a.astype(np.float64)),
    "lg2.approx.f32 {x}, {a};": lambda a, b: np.log2(a.astype(np.float64)),
    "rcp.approx.f32 {x}, {a};": lambda a, b: 1 / a.astype(np.float64),
    "div.full.f32 {x}, {a}, {b};": lambda a, b: a.astype(np.float64) / b,
    "rsqrt.approx.f32 {x}, {a};": lambda a, b: 1 / np.sqrt(a.astype(np.float64)),
}


@pytest.mark.parametrize("text", [*ROUNDED, *APPROXIMATE])
def test_floats(text):
    a, b = draw(F32, 3), draw(F32, 4)
    ours = lanewise(text, F32, a, *([b] if "{b}" in text else []))
    exact = quiet((ROUNDED | APPROXIMATE)[text])(a, b)
    if text in ROUNDED:
        assert np.array_equal(ours, exact, equal_nan=True)
    else:
        with np.errstate(over="ignore", under="ignore"):
            kept = np.where(np.abs(exact) < np.finfo(F32).tiny, 0, exact).astype(F32)
        np.testing.assert_allclose(ours, kept, rtol=2.0**-22, atol=0)


def test_subnormals_are_flushed_where_the_instruction_says_so():
    tiny = np.full(WARP, -(2.0**-140), F32)
    half = np.full(WARP, 0.5, F32)
    assert (lanewise("mul.f32 {x}, {a}, {b};", F32, tiny, half) == -(2.0**-141)).all()
    flushed = lanewise("mul.ftz.f32 {x}, {a}, {b};", F32, tiny, half)
    assert (flushed == 0).all() and np.signbit(flushed).all()


COMPARISONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a < b or a > b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "equ": lambda a, b: not (a < b or a > b), "neu": lambda a, b: a != b, "ltu": lambda a, b: not a >= b,
    "leu": lambda a, b: not a > b, "gtu": lambda a, b: not a <= b, "geu": lambda a, b: not a < b, "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_floats(name):
    values = np.array([0.0, -0.0, 1.0, np.nan, np.inf, -1.0, 1.0, np.nan], F32)
    a, b = np.repeat(values[:4], 8), np.tile(values, 4)
    ours = lanewise(f"setp.{name}.f32 %p1, {{a}}, {{b}}; selp.b32 {{x}}, 1, 0, %p1;", U32, a, b)
    assert ours.tolist() == [int(COMPARISONS[name](*pair)) for pair in zip(a.tolist(), b.tolist(), strict=True)]


def middles(dtype: torch.dtype) -> np.ndarray:
    """float32 numbers around the middles between neighbours of a narrower type, and special ones."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(WARP, generator=generator).to(dtype)
    high = (
        torch.nextafter(low.float(), torch.tensor(9.0))
        if dtype == torch.float32
        else (low.view(torch.int16) + 1).view(dtype)
    )
    middle = ((low.double() + high.double()) / 2).float().numpy()
    middle[8:16] = np.nextafter(middle[8:16], np.float32(9))
    middle[16:24] = np.nextafter(middle[16:24], np.float32(-9))
    middle[24:30] = [np.inf, -np.inf, 3e38, -3e38, 1e-41, 0]
    return middle


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_between_floats(name, dtype):
    values = middles(dtype)
    expected = torch.from_numpy(values).to(dtype)
    ours = lanewise(f"cvt.rn.{name}.f32 {{x}}, {{a}};", U16, values)
    assert np.array_equal(ours, expected.view(torch.uint16).numpy())
    pairs = lanewise(f"cvt.rn.{name}x2.f32 {{x}}, {{a}}, {{b}};", U32, values, values[::-1].copy())
    assert np.array_equal(pairs & 0xFFFF, ours[::-1]) and np.array_equal(pairs >> 16, ours)
    assert np.array_equal(lanewise(f"cvt.f32.{name} {{x}}, {{a}};", F32, ours), expected.float().numpy())


def test_tf32_rounds_half_away_from_zero():
    values = np.array(
        [1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-11 - 2.0**-20, np.inf, np.nan, 0, 3.0, 1 + 2.0**-10] * 4, F32
    )
    ours = lanewise("cvt.rna.tf32.f32 {x}, {a};", F32, values)
    assert np.array_equal(
        ours[:8], np.array([1 + 2.0**-10, -1 - 2.0**-10, 1, np.inf, np.nan, 0, 3, 1 + 2.0**-10], F32), equal_nan=True
    )


@pytest.mark.parametrize(("name", "exact"), [("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)])
def test_conversions_to_integers(name, exact):
    values = np.array([0.5, 1.5, -0.5, -2.5, 3e9, -3e9, np.nan, 7.9] * 4, F32)
    expected = np.where(np.isnan(values), 0, np.clip(exact(values.astype(np.float64)), -(2.0**31), 2.0**31 - 1)).astype(
        S32
    )
    assert np.array_equal(lanewise(f"cvt.{name}.s32.f32 {{x}}, {{a}};", S32, values), expected)
    assert np.array_equal(lanewise("cvt.rn.f32.s32 {x}, {a};", F32, draw(S32, 5)), draw(S32, 5).astype(F32))


def test_shuffles():
    values = np.arange(100, 100 + WARP, dtype=U32)
    sources = {
        "bfly.b32 {x}, {a}, 5, 31": LANES ^ 5,
        "down.b32 {x}, {a}, 3, 31": np.where(LANES + 3 < WARP, LANES + 3, LANES),
        "up.b32 {x}, {a}, 3, 0": np.where(LANES >= 3, LANES - 3, LANES),
        "idx.b32 {x}, {a}, 9, 31": np.full(WARP, 9),
        "idx.b32 {x}, {a}, %r0, 31": LANES,
    }
    for text, source in sources.items():
        assert np.array_equal(lanewise(f"shfl.sync.{text}, -1;", U32, values), values[source])
    fits = lanewise("shfl.sync.down.b32 {x}|%p1, {a}, 3, 31, -1; selp.b32 {x}, 1, 0, %p1;", U32, values)
    assert np.array_equal(fits, (LANES + 3 < WARP).astype(U32))


def test_threads_that_branch_apart_meet_again():
    """Thread i adds i in a loop of i turns, odd threads by another way; behind it all meet at a
    barrier."""
    out = aligned(WARP, U32)
    body = """
        mov.b32 %r1, 0; mov.b32 %r2, 0; and.b32 %r3, %r0, 1; setp.ne.s32 %p2, %r3, 0;
    $L_loop:
        setp.ge.s32 %p1, %r2, %r0;
        @%p1 bra $L_done;
        @%p2 bra $L_odd;
        add.s32 %r1, %r1, %r0;
        bra.uni $L_next;
    $L_odd:
        mad.lo.s32 %r1, %r0, 1, %r1;
    $L_next:
        add.s32 %r2, %r2, 1;
        bra.uni $L_loop;
    $L_done:
        bar.sync 0;
        mad.wide.u32 %d9, %r0, 4, %d0;
        st.global.b32 [%d9], %r1;"""
    counts = run(body, out)
    assert np.array_equal(out, LANES**2) and counts.barriers == 1


def test_a_branch_by_an_index():
    out = aligned(WARP, U32)
    body = """
    JTI_0: .branchtargets $L_b, $L_a, $L_b;
        rem.u32 %r1, %r0, 3; mov.b32 %r2, 7;
        brx.idx %r1, JTI_0;
    $L_a:
        mov.b32 %r2, 8; bra.uni $L_end;
    $L_b:
        add.s32 %r2, %r1, 1;
    $L_end:
        mad.wide.u32 %d9, %r0, 4, %d0; st.global.b32 [%d9], %r2;"""
    run(body, out)
    assert out.tolist() == [[1, 8, 3][lane % 3] for lane in range(WARP)]


def test_a_text_is_read():
    kernel = parse(
        module("$L_a: { .reg .b16 %c; mov.b16 %c, 0x8000U; }\n\t.loc 1 2 3\n\t@!%p1 bra $L_a; // comment", 2)
    )
    assert kernel.name == "probe" and kernel.threads == WARP and kernel.labels == {"$L_a": 3}
    assert kernel.parameters == (("u64", "probe_param_0"), ("u64", "probe_param_1"))
    assert str(kernel.instructions[4]) == "@!%p1 bra $L_a" and kernel.registers["%c"] == 16


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("tex.2d %r1, %r2;", "executor knows, got tex.2d %r1, %r2"),
        ("add.sat.s32 %r1, %r1, %r1;", "add.sat.s32 .*modifiers"),
        ("add.s32 %d1, %r1, %r1;", "%d1: expected a register of 32 bits, got 64"),
        ("mov.u32 %r1, %clock;", "%clock: expected a special register"),
        ("atom.global.add.u32 %r1, [%d0], 1;", "executor knows, got atom"),
        ("cvt.s32.f32 %r1, %r2;", "rounding to an integral number"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f64.f64.f32 {%r1}, {%r1}, {%r1}, {%r1};", "expected mma.sync"),
        ("bar.sync 1;", "barrier 0"),
    ],
)
def test_what_is_unknown_is_named(body, message):
    with pytest.raises(PtxError, match=message):
        run(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "ld.global.b32 %r1, [%d0+128];",
            r"read of 4 bytes inside a buffer, got 32 lanes outside, one at byte 128 of buffer 0 \(128 bytes\)",
        ),
        (
            "mad.wide.u32 %d9, %r0, 4, %d0; st.global.b32 [%d9+-4], %r1;",
            "write of 4 bytes inside a buffer, got 1 lanes outside, one at byte -4",
        ),
        ("ld.global.v2.b32 {%r1, %r2}, [%d0+4];", "byte 4 of buffer 0 .*: expected a read at a multiple of 8 bytes"),
        (
            "ld.shared.b32 %r1, [global_smem+64];",
            "shared memory: expected a read of 4 bytes inside its 64, got one at byte 64",
        ),
        ("st.shared.v4.b32 [%r0], {%r1, %r1, %r1, %r1};", "shared memory: expected a write of 16 bytes at a multiple"),
        (
            "setp.lt.s32 %p1, %r0, 5; @%p1 bra $L_a; bar.sync 0; $L_a:",
            "expected all threads at the barrier, got 5 elsewhere",
        ),
        (
            "setp.lt.s32 %p1, %r0, 5; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;",
            "expected whole warps, got one of 5 lanes",
        ),
        ("setp.lt.s32 %p1, %r0, 5; @%p1 cp.async.commit_group;", "commit and wait together"),
    ],
)
def test_faults_are_caught(body, message):
    with pytest.raises(KernelFault, match=message):
        run(body, aligned(32, U32), shared=64)


def test_overlapping_ranges_are_refused():
    with pytest.raises(ValueError, match="b beginning inside a and ending behind it"):
        Executable(module("", 0), 0).launch((1,), [], [Range("a", 64, 128), Range("b", 96, 160)])
