"""The backward of csrc/cuda on the emulator: stand-ins for the jitted kernels that `kernels/network.py` launches for it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..gpu_free.launches import arguments_of, standing_in
from .standing import IN_ORDER, NUMBERS, Emulated, Schedule, library, name_regions

# Addresses in the argument of a kernel.
ADDRESSES = 448
# Tasks for which the stand-ins have a number.
MOST_TASKS = 2048
WRITTEN = ("dw", "d_x", "d_buffers", "dz", "arrived", "parts", "grads")


def structure(name: str, **fields: object) -> type[ctypes.Structure]:
    """A structure of kernels.h."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


POINTER, WIDE, NARROW, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_bool
Addresses = structure("Addresses", at=POINTER * ADDRESSES, more=POINTER)
Places = structure("Places", x=POINTER, buffers=POINTER, out=POINTER, x_row=WIDE, x_slot=WIDE)
Network = structure("Network", places=Places, p=POINTER, weights=POINTER, plan=POINTER, floats=POINTER, rows=WIDE, mixing=WIDE, parameters=Addresses)
Tiles = structure(
    "Tiles", number=NARROW, rows=NARROW, columns=NARROW, units=NARROW, keep=NARROW, aligned=FLAG, stored=FLAG, inner=FLAG, once=FLAG,
)  # fmt: skip
Backward = structure("Backward", network=Network, below=Places, dw=POINTER, dz=POINTER, arrived=POINTER, dz_row=NARROW, tasks=NARROW)
Gradients = structure("Gradients", parts=POINTER, grads=POINTER, total=WIDE, chunk=WIDE)


class EmulatedBackward:
    """Runs the launches of a backward; `arrived` is what backward_rows must make zero before `gradients` counts in it.

    Args:
        lent: the parameters, which kernels reach by their addresses, by name.
    """

    def __init__(self, lent: Iterable[tuple[str, Tensor]]):
        self.lent = list(lent)
        self.arrived = torch.full((MOST_TASKS,), -1, dtype=torch.int32)
        self.launches: list[str] = []
        self.waiting: tuple[int, dict, dict] | None = None

    def stand_in(self, kernel):
        """What takes the place of a jitted kernel: `kernel[grid](...)` runs it."""
        return _Launch(kernel, getattr(self, kernel.__name__))

    def backward_rows(self, grid: tuple[int, ...], passed: dict, chosen: dict) -> None:
        self.name(passed)
        backward = self.backward(passed, chosen, len(self.arrived))
        self.run("backward_rows", backward, self.tiles(passed, chosen), passed["place"], grid[1])

    def gradients(self, grid: tuple[int, ...], passed: dict, chosen: dict) -> None:
        # It waits for the tensor that the sum of the chunks, which is of the same launch here, goes to.
        self.waiting = (grid[0], passed, chosen)

    def add_chunks(self, grid: tuple[int, ...], passed: dict, chosen: dict) -> None:
        tasks, given, constants = self.waiting
        assert tasks <= len(self.arrived)
        self.name({**given, "grads": passed["grads"]})
        sums = Gradients(given["parts"].data_ptr(), passed["grads"].data_ptr(), given["total"], constants["CHUNK"])
        self.run("gradients", self.backward(given, constants, tasks), sums, self.tiles(given, constants), given["place"])

    def tiles(self, passed: dict, chosen: dict) -> ctypes.Structure:
        return Tiles(
            number=NUMBERS[passed["x"].dtype], rows=chosen.get("BLOCK_B", 64), columns=chosen["BLOCK_H"], aligned=chosen["ALIGN"] > 1,
            stored=chosen.get("STORE", 1) > 1, once=chosen["PRECISION"] == "tf32",
        )  # fmt: skip

    def backward(self, passed: dict, chosen: dict, tasks: int) -> ctypes.Structure:
        """What both kernels take; what `gradients` has no use for is null."""

        def at(name: str) -> int | None:
            return passed[name].data_ptr() if name in passed else None

        addresses = passed["addresses"].tolist() if "addresses" in passed else []
        more = passed["addresses"][ADDRESSES:].data_ptr() if len(addresses) > ADDRESSES else None
        network = Network(
            Places(at("x"), at("buffers"), at("out"), passed["x_row"], passed["x_slot"]), at("p"), at("d_weights") if chosen["WEIGHTS"] else None,
            at("plan"), at("floats"), passed["B"], passed["mixing"], Addresses((POINTER * ADDRESSES)(*addresses[:ADDRESSES]), more),
        )  # fmt: skip
        below = Places(at("d_x"), at("d_buffers"), at("d_out"), passed.get("d_row", 0), passed.get("d_slot", 0))
        return Backward(network, below, at("dw"), at("dz"), self.arrived.data_ptr(), passed["dz_row"], tasks)

    def name(self, passed: dict) -> None:
        tensors = {name: value for name, value in passed.items() if isinstance(value, Tensor)}
        name_regions([*tensors.items(), ("arrived", self.arrived), *self.lent], WRITTEN)

    def run(self, kernel: str, *arguments: object) -> None:
        """Raises: RuntimeError with the library's words."""
        self.launches.append(kernel)
        function = getattr(library(), f"fusedmoe_{kernel}")
        function.restype = ctypes.c_char_p
        words = function(*(ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments))
        if words:
            raise RuntimeError(words.decode())


class _Launch:
    """Stands in for a jitted kernel."""

    def __init__(self, kernel, run):
        self.kernel, self.run = kernel, run

    def __getitem__(self, grid: tuple[int, ...]):
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *values: object, num_warps: int, **named: object) -> None:
        self.run(grid, *arguments_of(self.kernel, values, named))


@contextmanager
def emulated(lent: Iterable[tuple[str, Tensor]], schedule: Schedule = IN_ORDER) -> Iterator[EmulatedBackward]:
    """Run `network.forward` and `network.backward` on the emulator; yields what ran the backward's launches.

    Args:
        lent: the parameters, which kernels reach by their addresses, by name.
        schedule: in which order threads take turns, and when copies arrive.
    """
    library().fusedmoe_settings(schedule.seed, int(schedule.eager))
    lent = list(lent)
    backward = EmulatedBackward(lent)
    with standing_in(lambda kernel: Emulated(kernel, lent) if kernel.__name__ == "forward" else backward.stand_in(kernel)):
        yield backward
