"""The interpreter's repair and its watch: each catches what it is there for."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as plain

from ..interpreter import STOCK, KernelFault, mended, watched


@triton.jit
def multiply(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(c.dtype.element_ty))


@triton.jit
def shift(x, y, n, OFFSET: tl.constexpr, DISTANCE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * DISTANCE + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + OFFSET, mask=at < n), mask=at < n)


@triton.jit
def collide(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at // 2, tl.load(x + at))


@triton.jit
def exchange(y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    mine = tl.program_id(0) * BLOCK
    tl.store(y + mine + at, tl.load(y + (BLOCK - mine) + at))


def halves(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def product() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = halves(32, 32), halves(32, 32)
    c = torch.empty(32, 32, dtype=torch.bfloat16)
    multiply[(1,)](a, b, c, 32)
    return c, (a.float() @ b.float()).bfloat16()


def test_bfloat16_is_multiplied_and_rounded():
    ours, truth = product()
    assert torch.equal(ours, truth)


def test_without_the_repair_bfloat16_is_wrong(monkeypatch):
    """The day this fails, Triton has mended it, and `mended` can go."""
    with mended():
        for names in (("create_dot",), ("cast_impl", "create_fp_trunc")):
            with monkeypatch.context() as patch:
                for name in names:
                    patch.setattr(plain.InterpreterBuilder, name, STOCK[name])
                assert not torch.equal(*product())


@pytest.mark.parametrize(
    ("offset", "distance", "fault"), [(0, 16, None), (40, 16, "inside a tensor"), (0, 8, "of this program alone")]
)
def test_accesses_are_checked(offset, distance, fault):
    x, y = torch.randn(64), torch.empty(64)
    with watched() as watch:
        if fault is None:
            shift[(4,)](x, y, 64, offset, distance, 16)
            assert torch.equal(x, y) and watch.launches == ["shift"]
            return
        with pytest.raises(plain.InterpreterError, match=fault):
            shift[(4,)](x, y, 64, offset, distance, 16)


def test_two_lanes_of_one_store_are_caught():
    with watched(), pytest.raises(plain.InterpreterError, match="one lane an element"):
        collide[(1,)](torch.randn(16), torch.empty(16), 16)


def test_a_read_of_what_another_program_writes_is_caught():
    with watched(), pytest.raises(plain.InterpreterError, match=r"other program|this program alone"):
        exchange[(2,)](torch.randn(32), 16)


def test_a_view_ends_where_it_ends():
    whole = torch.randn(128)
    with watched(), pytest.raises(plain.InterpreterError, match="inside a tensor"):
        shift[(5,)](whole[:64], torch.empty(128), 80, 0, 16, 16)


def test_a_fault_is_an_assertion():
    assert issubclass(KernelFault, AssertionError)
