"""Triton's interpreter, mended and watched: bfloat16 that means bfloat16, every load and store
checked, races between programs, launches counted.

Needs TRITON_INTERPRET=1 before Triton is imported.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder
# What Triton itself has, before anything here is repaired.
STOCK = {name: getattr(BUILDER, name) for name in ("create_dot", "cast_impl", "create_fp_trunc", "create_splat")}


def _widened(handle) -> np.ndarray:
    """The numbers of a handle; the interpreter stores bfloat16 as its bits in uint16."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else handle.data


def _rounded(numbers: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers in bfloat16: to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    up = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), up)


@contextmanager
def mended() -> Iterator[None]:
    """Repair what Triton gets wrong in the interpreter: products of bfloat16 multiply the bits, and
    casts to it cut instead of rounding (3.6 to 3.9); NumPy since 2.4 makes no index of a scalar
    that is an array of one number (3.6); and a splat of a scalar comparison is a mask no more
    (3.9).
    """
    cast, of_tensors = STOCK["cast_impl"], interpreter._patch_lang_tensor
    before = {name: getattr(BUILDER, name) for name in STOCK}

    def patch_lang_tensor(tensor, scope):
        of_tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(_widened(a), _widened(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_splat(self, ret_ty, arg):
        # In the type that its numbers have: a comparison's are said to be of what was compared.
        return interpreter.TensorHandle(np.full(ret_ty.shape, arg.data.flat[0]), arg.dtype.scalar)

    BUILDER.create_dot, BUILDER.cast_impl, BUILDER.create_fp_trunc, BUILDER.create_splat = (
        create_dot,
        cast_impl,
        cast_impl,
        create_splat,
    )
    interpreter._patch_lang_tensor = patch_lang_tensor
    try:
        # A device says nothing of infinities and NaN, and lanes that are dropped may hold them.
        with np.errstate(all="ignore"):
            yield
    finally:
        interpreter._patch_lang_tensor = of_tensors
        for name, function in before.items():
            setattr(BUILDER, name, function)


class KernelFault(AssertionError):
    """A load or store that a device would have punished, or silently obeyed."""


NOBODY, MANY = -1, -2


@dataclass
class _Region:
    """The memory of one tensor, and which program of the running launch wrote or read each of its
    elements."""

    name: str
    first: int
    end: int
    size: int
    writer: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)

    def __post_init__(self):
        count = (self.end - self.first) // self.size
        self.writer, self.reader = np.full(count, NOBODY, np.int64), np.full(count, NOBODY, np.int64)

    def read(self, at: np.ndarray, program: int) -> None:
        if ((self.writer[at] != NOBODY) & (self.writer[at] != program)).any():
            raise KernelFault(
                f"{self.name}: expected elements that no other program of the launch writes, got a load of "
                f"{self.other(self.writer, at, program)}"
            )
        self.reader[at] = np.where((self.reader[at] == NOBODY) | (self.reader[at] == program), program, MANY)

    def write(self, at: np.ndarray, program: int) -> None:
        if len(np.unique(at)) != len(at):
            raise KernelFault(f"{self.name}: expected one lane an element, got a store of several to one")
        for who in (self.writer, self.reader):
            if ((who[at] != NOBODY) & (who[at] != program)).any():
                raise KernelFault(
                    f"{self.name}: expected elements of this program alone, got a store to "
                    f"{self.other(who, at, program)}"
                )
        self.writer[at] = program

    def other(self, who: np.ndarray, at: np.ndarray, program: int) -> str:
        bad = at[(who[at] != NOBODY) & (who[at] != program)][0]
        return f"element {bad} by program {program}, which program {who[bad] if who[bad] >= 0 else 'several'} used"


class Watch:
    """Checks every access of the launches inside `watched`, and counts them."""

    def __init__(self):
        self.launches: list[str] = []
        self.regions: dict[int, _Region] = {}
        self.starts: list[int] = []
        self.lent: list[tuple[str, torch.Tensor]] = []
        self.grid = (1, 1, 1)
        self.index = (0, 0, 0)

    def begin(self, name: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.launches.append(name)
        self.regions = {}
        for label, tensor in (*tensors, *self.lent):
            if tensor.numel():
                # Of the view, not of its storage.
                span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                first = tensor.data_ptr()
                known = self.regions.get(first)
                if known is None or known.end < first + span * tensor.element_size():
                    self.regions[first] = _Region(
                        f"{name}, {label}", first, first + span * tensor.element_size(), tensor.element_size()
                    )
        self.starts = sorted(self.regions)

    def nearest_first(self, at: np.ndarray) -> list[_Region]:
        """The regions, those that begin last before the first address in front: an access rarely
        needs a second one."""
        if not len(at):
            return []
        before = bisect.bisect_right(self.starts, int(at[0]))
        return [self.regions[start] for start in (*reversed(self.starts[:before]), *self.starts[before:])]

    def access(self, addresses: np.ndarray, mask: np.ndarray, size: int, kind: str) -> None:
        at = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[
            np.broadcast_to(mask, np.broadcast_shapes(addresses.shape, mask.shape))
        ]
        at = at.astype(np.int64)
        program = (self.index[0] * self.grid[1] + self.index[1]) * self.grid[2] + self.index[2]
        left = np.ones(at.shape, bool)
        for region in self.nearest_first(at):
            if not left.any():
                return
            inside = left & (at >= region.first) & (at + size <= region.end)
            if inside.any():
                if size != region.size or ((at[inside] - region.first) % size).any():
                    raise KernelFault(
                        f"{region.name}: expected whole elements of {region.size} bytes, got a {kind} of {size}"
                    )
                getattr(region, kind)((at[inside] - region.first) // size, program)
                left &= ~inside
        if left.any():
            bad = int(at[left][0])
            near = min(self.regions.values(), key=lambda region: min(abs(bad - region.first), abs(bad - region.end)))
            raise KernelFault(
                f"{self.launches[-1]}: expected a {kind} inside a tensor, got {left.sum()} outside, one "
                f"{bad - near.first} bytes from the start of {near.name}"
            )


def _tensors(names: Iterable[str], values: Iterable[object]) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in zip(names, values, strict=False) if isinstance(value, torch.Tensor)]


@contextmanager
def watched(lent: Iterable[tuple[str, torch.Tensor]] = ()) -> Iterator[Watch]:
    """Watch the launches of a block; `lent` are the tensors that kernels reach by an address and
    not by an argument."""
    watch = Watch()
    watch.lent = list(lent)
    call, load, store, index, size = (
        interpreter.GridExecutor._init_args_hst,
        BUILDER.create_masked_load,
        BUILDER.create_masked_store,
        BUILDER.set_grid_idx,
        BUILDER.set_grid_dim,
    )

    def prepare(self, args, kwargs):
        result = call(self, args, kwargs)
        watch.begin(self.fn.__name__, [*_tensors(self.arg_names, result[0]), *_tensors(result[1], result[1].values())])
        return result

    def bytes_of(pointers) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    # What else they are told, of caches, differs by version.
    def watched_load(self, pointers, mask, *others):
        watch.access(pointers.data, mask.data, bytes_of(pointers), "read")
        return load(self, pointers, mask, *others)

    def watched_store(self, pointers, value, mask, *others):
        watch.access(pointers.data, mask.data, bytes_of(pointers), "write")
        return store(self, pointers, value, mask, *others)

    def at(self, x, y, z):
        watch.index = (x, y, z)
        return index(self, x, y, z)

    def dimensions(self, x, y, z):
        watch.grid = (x, y, z)
        return size(self, x, y, z)

    interpreter.GridExecutor._init_args_hst = prepare
    BUILDER.create_masked_load, BUILDER.create_masked_store, BUILDER.set_grid_idx, BUILDER.set_grid_dim = (
        watched_load,
        watched_store,
        at,
        dimensions,
    )
    try:
        yield watch
    finally:
        interpreter.GridExecutor._init_args_hst = call
        BUILDER.create_masked_load, BUILDER.create_masked_store, BUILDER.set_grid_idx, BUILDER.set_grid_dim = (
            load,
            store,
            index,
            size,
        )


class Operators(TorchDispatchMode):
    """Names the operators that would run on a device: all but views and allocations."""

    FREE = (
        "empty",
        "view",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "detach",
        "alias",
        "as_strided",
        "reshape",
        "stride",
        "set_",
    )

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not any(word in name for word in self.FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))
