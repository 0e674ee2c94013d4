"""The PTX executor: vectors, shared memory, asynchronous copies, matrices of a warp, and what is
counted."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from .probe import WARP, aligned, run
from .ptx import KernelFault
from .ptx_matrix import added

U32, F32 = np.uint32, np.float32
# (g, t) of lane 4 g + t.
LANE = [divmod(lane, 4) for lane in range(WARP)]


def filled(values: np.ndarray) -> np.ndarray:
    buffer = aligned(values.shape, values.dtype.type)
    buffer[:] = values
    return buffer


@pytest.mark.parametrize("hints", ["", ".L1::evict_last", ".cg"])
def test_vectors_through_shared_memory(hints):
    """Lane i hands four words to lane 31 - i."""
    source, out = filled(np.arange(4 * WARP, dtype=U32)), aligned(4 * WARP, U32)
    counts = run(
        f"""mad.wide.u32 %d9, %r0, 16, %d0; ld.global{hints}.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d9];
        shl.b32 %r5, %r0, 4; st.shared.v4.b32 [%r5], {{%r1, %r2, %r3, %r4}};
        bar.sync 0;
        sub.s32 %r6, 496, %r5; ld.shared.v2.b32 {{%r1, %r2}}, [%r6]; ld.shared.v2.b32 {{%r3, %r4}}, [%r6+8];
        mad.wide.u32 %d9, %r0, 16, %d1; st.global.v4.b32 [%d9], {{%r1, %r2, %r3, %r4}};""",
        source, out, shared=512,
    )  # fmt: skip
    assert np.array_equal(out.reshape(WARP, 4), source.reshape(WARP, 4)[::-1])
    assert counts.read == {"buffer 0": 512} and counts.written == {"buffer 1": 512} and counts.barriers == 1


def test_bytes_fill_wider_registers():
    source, out = filled(np.full(16, 0x80FF, np.uint16)), aligned(16, np.int32)
    run(
        "ld.global.u8 %r1, [%d0]; ld.global.s8 %r2, [%d0+1]; st.global.b32 [%d1], %r1; st.global.b32 [%d1+4], "
        "%r2; st.global.b8 [%d1+8], %r2;",
        source,
        out,
    )
    assert out[:3].tolist() == [255, -128, 128]


def test_shared_memory_is_poisoned():
    out = aligned(4, F32)
    run("ld.shared.b32 %r1, [global_smem+8]; st.global.b32 [%d0], %r1;", out, shared=12)
    assert np.isnan(out[0])


def test_what_lanes_share_is_counted_once_a_warp():
    """Two warps read one address, pairs of lanes another one each, and half of the lanes a third
    kind."""
    source, out = filled(np.arange(64, dtype=U32)), aligned(64, U32)
    counts = run(
        """ld.global.b32 %r1, [%d0];
        shr.u32 %r2, %r0, 1; mad.wide.u32 %d9, %r2, 4, %d0; ld.global.b32 %r1, [%d9];
        setp.lt.s32 %p1, %r0, 16; mad.wide.u32 %d9, %r0, 4, %d0; @%p1 ld.global.b32 %r1, [%d9];
        mad.wide.u32 %d9, %r2, 4, %d1; @%p1 st.global.b32 [%d9], %r0;""",
        source, out, threads=64,
    )  # fmt: skip
    assert counts.read == {"buffer 0": 2 * 4 + 32 * 4 + 16 * 4} and counts.written == {"buffer 1": 8 * 4}
    assert out[:8].tolist() == [1, 3, 5, 7, 9, 11, 13, 15]


EXCHANGE = (
    "mad.wide.u32 %d9, %r0, 4, %d0; xor.b32 %r2, %r0, {distance}; mad.wide.u32 %d8, %r2, 4, %d0; "
    "st.global.b32 [%d9], %r0; {between} {use}"
)


@pytest.mark.parametrize(
    ("distance", "between", "use", "fault"),
    [
        (32, "bar.sync 0;", "ld.global.b32 %r1, [%d8];", None),
        (1, "", "ld.global.b32 %r1, [%d8];", None),
        (32, "", "ld.global.b32 %r1, [%d8];", "reads what another one has written since the last barrier"),
        (32, "", "st.global.b32 [%d8], %r0;", "writes where another one has written since the last barrier"),
        (
            32,
            "bar.sync 0; ld.global.b32 %r1, [%d8];",
            "st.global.b32 [%d9], %r0;",
            "writes what another one has read since the last barrier",
        ),
        (32, "bar.sync 0; ld.global.b32 %r1, [%d8]; bar.sync 0;", "st.global.b32 [%d9], %r0;", None),
        (
            32,
            "bar.sync 0; and.b32 %r2, %r0, 31; mad.wide.u32 %d8, %r2, 4, %d0;",
            "st.global.b32 [%d8], %r0;",
            "several warps write to one place at once",
        ),
    ],
)
def test_warps_that_exchange_numbers_need_a_barrier(distance, between, use, fault):
    body = EXCHANGE.format(distance=distance, between=between, use=use)
    with pytest.raises(KernelFault, match=fault) if fault else nullcontext():
        run(body, aligned(64, U32), threads=64)


@pytest.mark.parametrize("use", ["ld.global.b32 %r1, [%d0];", "st.global.b32 [%d0], %r0;"])
def test_blocks_do_not_meet(use):
    """Block 0 writes a place that block 1 then uses."""
    first = (
        "mov.u32 %r1, %ctaid.x; setp.eq.s32 %p1, %r1, 0; setp.eq.and.s32 %p2, %r0, 0, %p1; @%p2 "
        "st.global.b32 [%d0], %r0; "
    )
    with pytest.raises(KernelFault, match=r"%ctaid.x 1.*buffer 0: .*another block of the launch has written"):
        run(
            first + f"setp.eq.s32 %p3, %r0, 0; not.pred %p4, %p1; and.pred %p3, %p3, %p4; @%p3 {use}",
            aligned(4, U32),
            grid=(2,),
        )


def test_an_access_to_two_buffers_is_counted_at_each():
    a, b = filled(np.full(4, 5, U32)), filled(np.full(4, 6, U32))
    counts = run("setp.lt.s32 %p1, %r0, 16; selp.b64 %d9, %d0, %d1, %p1; ld.global.b32 %r1, [%d9];", a, b)
    assert counts.read == {"buffer 0": 4, "buffer 1": 4}


COPY = (
    "shl.b32 %r5, %r0, 4; mad.wide.u32 %d9, %r0, 16, %d0; cp.async.cg.shared.global [%r5], [%d9], 0x10, "
    "%r6; cp.async.commit_group;"
)
BACK = (
    "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5]; mad.wide.u32 %d9, %r0, 16, %d1; st.global.v4.b32 "
    "[%d9], {%r1, %r2, %r3, %r4};"
)


def test_copies_fill_up_with_zeros():
    """Lane i copies 4 (i % 5) of 16 bytes; what it does not copy is not read either."""
    source, out = filled(np.arange(1, 4 * WARP + 1, dtype=U32)), aligned(4 * WARP, U32)
    counts = run(
        f"rem.u32 %r6, %r0, 5; shl.b32 %r6, %r6, 2; {COPY} cp.async.wait_group 0; bar.sync 0; {BACK}",
        source,
        out,
        shared=512,
    )
    words = np.arange(WARP)[:, None] % 5
    assert np.array_equal(out.reshape(WARP, 4), np.where(np.arange(4) < words, source.reshape(WARP, 4), 0))
    assert counts.read == {"buffer 0": int(4 * words.sum())}


@pytest.mark.parametrize(
    ("waits", "lands"),
    [("", False), ("cp.async.wait_group 1;", False), ("cp.async.wait_group 0;", True), ("cp.async.wait_all;", True)],
)
def test_copies_land_when_they_are_waited_for(waits, lands):
    source, out = filled(np.arange(4 * WARP, dtype=U32)), aligned(4 * WARP, U32)
    run(f"mov.b32 %r6, 16; {COPY} {waits} bar.sync 0; {BACK}", source, out, shared=512)
    assert np.array_equal(out, source if lands else np.full(4 * WARP, 0xFFFFFFFF, U32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    """Rows are stored 80 bytes apart and matrices one below the other; lanes beyond the last row
    give addresses that are not read."""
    numbers = np.arange(32 * 40, dtype=np.uint16)
    source, out = filled(numbers), aligned(count * WARP, U32)
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    stores = "".join(f"st.global.b32 [%d9+{128 * i}], %r{10 + i};" for i in range(count))
    run(
        f"""mad.lo.s32 %r1, %r0, 80, 0; mad.wide.u32 %d9, %r0, 80, %d0;
        {"".join(f"ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d9+{16 * i}]; st.shared.v4.b32 [%r1+{16 * i}], {{%r2, %r3, %r4, %r5}};" for i in range(5))}
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" * transposed}.shared.b16 {{{registers}}}, [%r1+16];
        mad.wide.u32 %d9, %r0, 4, %d1; {stores}""",
        source, out, shared=32 * 80,
    )  # fmt: skip
    table = numbers.reshape(32, 40)[:, 8:16]
    for i in range(count):
        matrix = table[8 * i : 8 * i + 8].astype(U32)
        matrix = matrix.T if transposed else matrix
        assert out[WARP * i : WARP * (i + 1)].tolist() == [
            matrix[g, 2 * t] | matrix[g, 2 * t + 1] << 16 for g, t in LANE
        ]


def fragments(a: np.ndarray, b: np.ndarray, c: np.ndarray, per_register: int) -> tuple[np.ndarray, ...]:
    """Registers of A, B and C of each lane, written element by element as the PTX ISA lays them
    out."""
    groups, h = a.shape[1] // (4 * per_register), range(per_register)
    columns = [
        [k * 4 * per_register + t * per_register + i for i in h] for k, (_, t) in itertools.product(range(groups), LANE)
    ]
    in_a = [
        a[g + 8 * upper, columns[WARP * k + lane]]
        for k in range(groups)
        for upper in (0, 1)
        for lane, (g, _) in enumerate(LANE)
    ]
    in_b = [b[columns[WARP * k + lane], g] for k in range(groups) for lane, (g, _) in enumerate(LANE)]
    in_c = [c[g + 8 * upper, 2 * t + i] for upper in (0, 1) for i in (0, 1) for g, t in LANE]
    return np.array(in_a), np.array(in_b), np.array(in_c)


MMAS = {
    ("bf16", 16): torch.bfloat16,
    ("bf16", 8): torch.bfloat16,
    ("f16", 16): torch.float16,
    ("tf32", 8): torch.float32,
    ("tf32", 4): torch.float32,
}


def multiply(name: str, depth: int, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[np.ndarray, int]:
    """D of one mma, and how many were counted."""
    dtype = MMAS[name, depth]
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    per_register = 4 // dtype.itemsize
    parts = fragments(a.to(dtype).view(integers).numpy(), b.to(dtype).view(integers).numpy(), c.numpy(), per_register)
    ab = [np.ascontiguousarray(part.reshape(-1, per_register)).view(U32).ravel() for part in parts[:2]]
    buffers = [filled(ab[0]), filled(ab[1]), filled(parts[2].astype(F32)), aligned(4 * WARP, F32)]
    registers = [
        [f"%r{base + i}" for i in range(len(buffer) // WARP)]
        for base, buffer in zip((10, 14, 16, 20), buffers, strict=True)
    ]
    loads = [
        f"mad.wide.u32 %d9, %r0, 4, %d{n}; "
        + "".join(f"ld.global.b32 {name}, [%d9+{128 * i}];" for i, name in enumerate(names))
        for n, names in enumerate(registers[:3])
    ]
    d, *abc = (f"{{{', '.join(names)}}}" for names in (registers[3], *registers[:3]))
    stores = "".join(f"st.global.b32 [%d9+{128 * i}], {name};" for i, name in enumerate(registers[3]))
    body = (
        f"{' '.join(loads)} mma.sync.aligned.m16n8k{depth}.row.col.f32.{name}.{name}.f32 {d}, "
        f"{', '.join(abc)}; mad.wide.u32 %d9, %r0, 4, %d3; {stores}"
    )
    counts = run(body, *buffers)
    result = np.zeros((16, 8), F32)
    places = [(g + 8 * upper, 2 * t + i) for upper in (0, 1) for i in (0, 1) for g, t in LANE]
    for place, value in zip(places, buffers[3], strict=True):
        result[place] = value
    return result, counts.mmas


@pytest.mark.parametrize(("name", "depth"), MMAS)
def test_mma(name, depth):
    """Small integers, whose products and sums are exact, at their places; tf32 without the bits
    that it ignores."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(-9, 9, shape, generator=generator).float() for shape in ((16, depth), (depth, 8), (16, 8)))
    noise = 1 + 2.0**-12 if name == "tf32" else 1
    result, count = multiply(name, depth, a * noise, b, c)
    assert np.array_equal(result, (a @ b + c).numpy()) and count == 1


@pytest.mark.parametrize("name", ["bf16", "f16", "tf32"])
def test_mma_errs_little(name):
    """By no more than a step of the largest addend for each of them, and one for the result."""
    generator = torch.Generator().manual_seed(1)
    depth = 8 if name == "tf32" else 16
    dtype = MMAS[name, depth]
    a, b, c = (
        torch.randn(shape, generator=generator).to(dtype).float() for shape in ((16, depth), (depth, 8), (16, 8))
    )
    if name == "tf32":
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    result, _ = multiply(name, depth, a, b, c)
    exact = a.double() @ b.double() + c.double()
    scale = a.abs().double() @ b.abs().double() + c.abs().double()
    assert ((torch.from_numpy(result) - exact).abs() <= (depth + 2) * 2.0**-24 * scale).all()


def test_a_tensor_core_cuts():
    """The addends at the last bit that is kept of the largest one, and the sum at the 24th."""

    def add(c: float, *products: float) -> float:
        return float(added(np.array([c], F32), np.array([products], F32), np.ones((1, len(products)), F32))[0])

    bit = 2.0**-24
    assert add(1, bit, bit) == 1 + 2 * bit
    assert add(1, bit / 2, bit / 2, bit / 2, bit / 2) == 1
    assert add(1, bit) == 1 and add(-1, -bit) == -1
    assert add(0, 1, 3 * bit) == 1 + 2 * bit
    with np.errstate(all="ignore"):
        assert add(1, np.inf) == np.inf and np.isnan(add(np.inf, -np.inf))
