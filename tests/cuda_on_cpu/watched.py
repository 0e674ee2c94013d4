"""Launches of the emulated CUDA kernels, watched: global memory that they may touch is what they were given, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

from torch import Tensor

from fusedmoe.kernels import launch_cuda

from . import extension

KERNELS = ("forward", "backward_rows", "gradients")


@contextmanager
def watched(lent: Iterable[tuple[str, Tensor]]) -> Iterator[list[str]]:
    """Watch the launches of a block; yields their names as they come.

    Args:
        lent: the parameters, which kernels reach by their addresses, by name: they are only read.
    """
    control, lent, names = extension.control(), list(lent), []

    def launch(name: str, kernel, grid, *arguments, **constants):
        control.fusedmoe_take_back()
        for at, tensor in enumerate((*arguments, *constants.values())):
            if isinstance(tensor, Tensor):
                lend(control, f"{name}, argument {at}", tensor, True)
        for label, tensor in lent:
            lend(control, label, tensor, False)
        names.append(name)
        kernel(grid, *arguments, **constants)

    stand_ins = {name: partial(launch, name, getattr(launch_cuda, name)) for name in KERNELS}
    with patch.multiple(launch_cuda, **stand_ins):
        try:
            yield names
        finally:
            control.fusedmoe_take_back()


def lend(control, label: str, tensor: Tensor, written_to: bool) -> None:
    """Let kernels touch the memory of a view, from its first to its last element."""
    if tensor.numel():
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        control.fusedmoe_lend(label.encode(), tensor.data_ptr(), span * tensor.element_size(), written_to)
