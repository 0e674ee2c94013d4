"""Launches of the emulated CUDA kernels, watched: global memory that they may touch is what they were given, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

from torch import Tensor

from fusedmoe.kernels import launch_cuda

from . import extension

KERNELS = ("forward", "backward_rows", "gradients")


class Watched(NamedTuple):
    """The launches by name, as they come; and the bytes that they read and wrote, by tensor: a parameter's name, or the launch and its argument."""

    names: list[str]
    read: Counter[str]
    written: Counter[str]


@contextmanager
def watched(lent: Iterable[tuple[str, Tensor]]) -> Iterator[Watched]:
    """Watch the launches of a block.

    Args:
        lent: the parameters, which kernels reach by their addresses, by name: they are only read.
    """
    control, lent, watch = extension.control(), list(lent), Watched([], Counter(), Counter())

    def launch(name: str, kernel, grid, *arguments, **constants):
        control.fusedmoe_take_back()
        tensors = [(f"{name}, argument {at}", tensor, True) for at, tensor in enumerate((*arguments, *constants.values())) if isinstance(tensor, Tensor)]
        tensors = [one for one in (*tensors, *((label, tensor, False) for label, tensor in lent)) if one[1].numel()]
        for one in tensors:
            lend(control, *one)
        watch.names.append(name)
        kernel(grid, *arguments, **constants)
        for at, (label, _, _) in enumerate(tensors):
            watch.read[label] += control.fusedmoe_bytes(at, False)
            watch.written[label] += control.fusedmoe_bytes(at, True)

    stand_ins = {name: partial(launch, name, getattr(launch_cuda, name)) for name in KERNELS}
    with patch.multiple(launch_cuda, **stand_ins):
        try:
            yield watch
        finally:
            control.fusedmoe_take_back()


def lend(control, label: str, tensor: Tensor, written_to: bool) -> None:
    """Let kernels touch the memory of a view, from its first to its last element."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    control.fusedmoe_lend(label.encode(), tensor.data_ptr(), span * tensor.element_size(), written_to)
