"""The network's kernels as compiled PTX, executed on CPU tensors: stand-ins for the jitted kernels
that `kernels/triton/step.py` launches.

Must run where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from .compiled import ptx_for
from .launches import arguments_of, standing_in
from .ptx import Counts, Executable, Range

ARCH = "sm_80"
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Compiled and decoded kernels of this process, by kernel, types and constants.
_EXECUTABLES: dict[object, Executable] = {}


def extent(name: str, tensor: Tensor) -> Range:
    """The memory of a view, from its first to its last element."""
    if not tensor.numel():
        return Range(name, tensor.data_ptr(), tensor.data_ptr())
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Range(name, tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size())


class Executed:
    """Stands in for a jitted kernel: `kernel[grid](...)` compiles it for sm_80 as a launch would,
    and executes the PTX.

    Args:
        kernel: the jitted kernel.
        lent: memory that it reaches by an address in memory, besides its arguments.
    """

    def __init__(self, kernel, lent: Iterable[Range] = ()):
        self.kernel, self.lent = kernel, list(lent)
        self.launches: list[Counts] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *values: object, num_warps: int, **named: object) -> None:
        passed, constants = arguments_of(self.kernel, values, named)
        executable = _executable(self.kernel, passed, constants, num_warps)
        tensors = {name: value for name, value in passed.items() if isinstance(value, Tensor)}
        ranges = [extent(name, tensor) for name, tensor in tensors.items()]
        arguments = [value.data_ptr() if isinstance(value, Tensor) else int(value) for value in passed.values()]
        self.launches.append(executable.launch(grid, arguments, [*ranges, *self.lent]))


def _type(name: str, value: object) -> str:
    """The type of an argument as Triton writes it."""
    if not isinstance(value, Tensor):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    if value.data_ptr() % 16:
        # A launch would compile another kernel for it.
        raise ValueError(f"{name}: expected a tensor at a multiple of 16 bytes, got {value.data_ptr():#x}")
    return POINTERS[value.dtype]


def _executable(kernel, passed: dict[str, object], constants: dict[str, object], warps: int) -> Executable:
    signature = {name: _type(name, value) for name, value in passed.items()}
    key = (kernel, *signature.items(), *sorted(constants.items()), warps)
    if key not in _EXECUTABLES:
        _EXECUTABLES[key] = Executable(*ptx_for(kernel, signature, constants, ARCH, warps))
    return _EXECUTABLES[key]


@contextmanager
def executed(lent: Iterable[tuple[str, Tensor]] = ()) -> Iterator[dict[str, Executed]]:
    """Run `network.forward` and `network.backward` as PTX on CPU tensors; yields the stand-ins by
    name, which keep what each launch did.

    Args:
        lent: the parameters, which kernels reach by their addresses, by name.
    """
    ranges = [extent(name, tensor) for name, tensor in lent]
    with standing_in(partial(Executed, lent=ranges)) as standing:
        yield standing
