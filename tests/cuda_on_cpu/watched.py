"""Launches of the emulated CUDA kernels, watched: global memory that they may touch is what they
were given, and nothing else."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from . import extension


class Watched(NamedTuple):
    """The launches by name, as they came; and the bytes that they read and wrote, by tensor: a
    parameter's name, or the launch and what it has there (csrc/cuda/calls.cpp). They are there when
    the block has ended.
    """

    names: list[str]
    read: Counter[str]
    written: Counter[str]


@contextmanager
def watched(lent: Iterable[tuple[str, Tensor]]) -> Iterator[Watched]:
    """Watch the launches of a block.

    Args:
        lent: the parameters, which kernels reach by their addresses, by name: they are only read.
    """
    control, watch = extension.control(), Watched([], Counter(), Counter())
    lent = [(name, tensor) for name, tensor in lent if tensor.numel()]
    for name, tensor in lent:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        control.fusedmoe_lend(name.encode(), tensor.data_ptr(), span * tensor.element_size(), False)
    control.fusedmoe_watch()
    try:
        yield watch
    finally:
        control.fusedmoe_watch_no_more()
        read, written = ctypes.c_uint64(), ctypes.c_uint64()
        while name := control.fusedmoe_launched(len(watch.names)):
            watch.names.append(name.decode())
        while label := control.fusedmoe_moved(len(watch.read), ctypes.byref(read), ctypes.byref(written)):
            watch.read[label.decode()], watch.written[label.decode()] = read.value, written.value
