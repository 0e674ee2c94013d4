"""Autocast: whether it is on, a call without it, and tensors in another dtype.

Parameters are cast for kernels that read one dtype: all in one piece of memory and one operator,
and so are their gradients.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fusedmoe.tracing import constant

# Each begins at a multiple of 16 bytes of the narrowest dtype, which vector loads want.
NUMBERS = 8


def cast(params: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the parameters in another dtype; their gradients come back in their own.

    Args:
        params: at least one, of one dtype and device.
        dtype: bfloat16 or float16.
    """
    # A compiler fuses the casts by itself.
    return [p.to(dtype) for p in params] if torch.compiler.is_compiling() else list(_Cast.apply(dtype, *params))


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        places, total = _places(tuple(t.shape for t in tensors))
        memory = tensors[0].new_empty(total, dtype=dtype)
        cast = tuple(memory.as_strided(*place) for place in places)
        torch._foreach_copy_(cast, tensors)
        return cast

    @staticmethod
    def backward(ctx: Any, *d: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [gradient for gradient in d if gradient is not None]
        # Through itself: gradients that are to be differentiated again are.
        found = iter(_Cast.apply(ctx.dtype, *wanted) if wanted else ())
        return None, *(None if gradient is None else next(found) for gradient in d)


@functools.lru_cache(maxsize=256)
def _places(shapes: tuple[torch.Size, ...]) -> tuple[tuple[tuple[torch.Size, tuple[int, ...], int], ...], int]:
    """Lay tensors out in one piece of memory.

    Returns: (shape, strides, first number) of each tensor, and the size of the memory in numbers.
    """
    firsts = list(itertools.accumulate((-(-shape.numel() // NUMBERS) * NUMBERS for shape in shapes), initial=0))
    strides = [torch.empty(shape, device="meta").stride() for shape in shapes]
    return tuple(zip(shapes, strides, firsts, strict=False)), firsts[-1]


@constant
def autocasts(kind: str) -> bool:
    """Whether devices of a kind have autocast.

    torch raises if one asks whether autocast is on for a device that has none. torch.compile of
    2.11 cannot trace into this function.
    """
    return torch.amp.is_autocast_available(kind)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A block in which the autocast of x's device is off."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it is narrower; what is no tensor stays as it is."""
    return tensor.float() if isinstance(tensor, Tensor) and tensor.dtype in (torch.bfloat16, torch.float16) else tensor
