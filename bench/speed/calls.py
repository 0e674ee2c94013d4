"""What one timed call does: a forward without gradients, or a forward and its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fusedmoe.speed.subjects import Work

Call = Callable[[], Tensor]
Forward = Callable[[Tensor], Tensor]


def inference(forward: Forward, params: Sequence[Tensor], work: Work) -> Call:
    """Return a call that runs one forward without gradients, and returns its output."""

    def call() -> Tensor:
        with torch.inference_mode():
            return forward(work.x)

    return call


def training_step(forward: Forward, params: Sequence[Tensor], work: Work) -> Call:
    """Return a call that runs forward and backward, with gradients of x and every parameter, and
    returns d_x.
    """
    wanted = [work.x.detach().requires_grad_(), *params]

    def call() -> Tensor:
        return torch.autograd.grad(forward(wanted[0]), wanted, work.d_out, allow_unused=True)[0]

    return call


MODES = {"inference": inference, "training step": training_step}


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Set torch's float32 matmul precision inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def under_medium(call: Call) -> Call:
    """Return the call under "medium" float32 matmul precision: oneDNN's kernels in place of MKL's.

    `medium_computes_in` says in what.
    """

    def medium() -> Tensor:
        with matmul_precision("medium"):
            return call()

    return medium


def medium_computes_in() -> str:
    """Return "bfloat16" if a float32 product under "medium" is nearer to that of bfloat16 numbers
    than to float32's, else "float32".

    On a CPU with AMX torch rounds the factors to bfloat16; elsewhere "medium" stays float32. No
    list of processors: a product is tried.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    truth = a.double() @ b.double()

    def error(product: Tensor) -> float:
        return float((product.double() - truth).norm())

    with matmul_precision("medium"):
        medium = error(a @ b)
    with matmul_precision("highest"):
        highest = error(a @ b)
    rounded = error(a.bfloat16().double() @ b.bfloat16().double())
    # The two differ by a factor of thousands; in between lies the geometric mean.
    return "bfloat16" if medium**2 > highest * rounded else "float32"
