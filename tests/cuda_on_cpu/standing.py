"""The kernels of csrc/cuda on the emulator, built as a shared library and called on CPU tensors.

`emulated()` stands in for the jitted kernels that `kernels/network.py` launches: the same plans, and the same arguments.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..gpu_free.launches import arguments_of, standing_in
from . import run

NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
POINTERS = ("x", "buffers", "out", "p", "weights", "plan", "floats", "parameters")
WIDE = ("parameter_count", "x_row", "x_slot", "rows", "mixing")
NARROW = ("number", "tile_rows", "tile_columns", "units", "keep", "aligned", "stored", "inner", "once", "place", "programs")
WRITTEN = ("buffers", "out", "p", "weights")


class ForwardCall(ctypes.Structure):
    """As in library.cpp."""

    _fields_ = [(name, kind) for kind, names in ((ctypes.c_void_p, POINTERS), (ctypes.c_int64, WIDE), (ctypes.c_int32, NARROW)) for name in names]


class Counts(NamedTuple):
    """What launches did, as in emulator.h."""

    launches: int
    blocks: int
    barriers: int
    products: int
    bytes_read: int
    bytes_written: int
    bank_conflicts: int


class Schedule(NamedTuple):
    """Who goes next is drawn from `seed` (0: in order); copies arrive at once (`eager`), or when they are waited for."""

    seed: int = 0
    eager: bool = False


IN_ORDER = Schedule()


def build(kind: str = "plain") -> Path:
    """Return the library, compiled where something has changed. Raises: SystemExit naming what does not compile."""
    folder = run.ROOT / "build" / f"cuda_on_cpu-{kind}"
    kernels = sorted((run.ROOT / "csrc" / "cuda").glob("*.cu"))
    with run.alone(folder):
        objects = run.compiled(kind, [*run.EMULATOR, *sorted(run.HERE.glob("library*.cpp")), *kernels], folder)
        program = folder / "libfusedmoe_emulated.so"
        run.link(kind, [*objects], program, shared=True)
    return program


@cache
def library() -> ctypes.CDLL:
    """The library, loaded."""
    loaded = ctypes.CDLL(str(build()))
    loaded.fusedmoe_forward.restype = ctypes.c_char_p
    loaded.fusedmoe_settings.argtypes = [ctypes.c_uint64, ctypes.c_int]
    loaded.fusedmoe_add_region.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
    return loaded


def take_counts() -> Counts:
    """What launches did since this was asked last."""
    numbers = (ctypes.c_uint64 * len(Counts._fields))()
    library().fusedmoe_take_counts(numbers)
    return Counts(*numbers)


def name_regions(tensors: Iterable[tuple[str, Tensor]], written: tuple[str, ...] = WRITTEN) -> None:
    """Let kernels touch these tensors and nothing else; only those of the names `written` are stored to."""
    library().fusedmoe_clear_regions()
    for name, tensor in tensors:
        if tensor.numel():
            span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            library().fusedmoe_add_region(name.encode(), tensor.data_ptr(), span * tensor.element_size(), int(name in written))


class Emulated:
    """Stands in for the jitted forward: `kernel[grid](...)` runs the CUDA kernel on the emulator.

    Args:
        kernel: the jitted kernel, which names the arguments.
        lent: the parameters, which it reaches by their addresses, by name.
    """

    def __init__(self, kernel, lent: Iterable[tuple[str, Tensor]]):
        self.kernel, self.lent = kernel, list(lent)
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]):
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *values: object, num_warps: int, **named: object) -> None:
        passed, chosen = arguments_of(self.kernel, values, named)
        tensors = {name: value for name, value in passed.items() if isinstance(value, Tensor)}
        name_regions([*tensors.items(), *self.lent])
        x, weights = passed["x"], passed["weights"]
        call = ForwardCall(
            **{name: passed[name].data_ptr() for name in ("x", "buffers", "out", "p", "plan", "floats")},
            weights=weights.data_ptr() if chosen["WEIGHTS"] else None, parameters=passed["addresses"].data_ptr(), parameter_count=len(passed["addresses"]),
            x_row=passed["x_row"], x_slot=passed["x_slot"], rows=passed["B"], mixing=passed["mixing"], number=NUMBERS[x.dtype], tile_rows=chosen["BLOCK_B"],
            tile_columns=chosen["BLOCK_H"], units=chosen["UNITS"], keep=chosen["KEEP"], aligned=chosen["ALIGN"] > 1, stored=chosen["STORE"] > 1,
            inner=chosen["INNER"], once=chosen["PRECISION"] == "tf32", place=passed["place"], programs=grid[1],
        )  # fmt: skip
        self.launches += 1
        if words := library().fusedmoe_forward(ctypes.byref(call)):
            raise RuntimeError(words.decode())


@contextmanager
def emulated(lent: Iterable[tuple[str, Tensor]], schedule: Schedule = IN_ORDER) -> Iterator[Emulated]:
    """Run `network.forward` on the emulator; yields its stand-in. The backward stays what it is.

    Args:
        lent: the parameters, which kernels reach by their addresses, by name.
        schedule: in which order threads take turns, and when copies arrive.
    """
    library().fusedmoe_settings(schedule.seed, int(schedule.eager))
    lent = list(lent)
    with standing_in(lambda kernel: Emulated(kernel, lent) if kernel.__name__ == "forward" else kernel) as standing:
        yield standing["forward_kernel"]
