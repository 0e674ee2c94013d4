"""Launches of Triton's kernels; the names are those of `launchers.py`."""

from __future__ import annotations

import functools

from torch import Tensor

from fusedmoe.kernels import device, tuning
from fusedmoe.kernels.backward import add_chunks
from fusedmoe.kernels.backward import backward_rows as backward_rows_kernel
from fusedmoe.kernels.backward import gradients as gradients_kernel
from fusedmoe.kernels.forward import forward as forward_kernel
from fusedmoe.kernels.tiles import Tiles

# `gradients` and `add_chunks`.
FOR_PARAMETERS = 2
# In registers, which such tiles leave none of.
BESIDE_HIDDEN = False
ADD_BLOCK = 1024
# By name: Triton 3.9 warns where a launch does not say whether to fuse multiplications and additions, and 3.10 will not fuse then.
OPTIONS = {"enable_fp_fusion": True}
# Without it ptxas spills a few numbers to let a third program share the multiprocessor, which shared memory forbids.
REGISTERS = {"maxnreg": 255}

addresses = device.addresses


@functools.lru_cache(maxsize=1024)
def constants(tiles: Tiles, align: int, precision: str, arch: str) -> dict[str, object]:
    """What every launch of a call is compiled with. The dictionary is everybody's: launches unpack it."""
    return {
        "ALIGN": align,
        "BLOCK_B": tiles.rows,
        "BLOCK_H": tiles.columns,
        "BLOCK_K": tiles.reduction,
        "STAGES": tiles.stages,
        "PRECISION": precision,
        "num_warps": tiles.warps,
        **OPTIONS,
        **({} if arch.startswith("gfx") else REGISTERS),
    }


def scratch(tasks: int, x: Tensor) -> dict[str, object]:
    """Nothing: the parts are added by a launch of their own."""
    return {}


def tiles_of_forward(*arguments: object) -> Tiles | None:
    """The tiles that the clock found, where it was asked (`tuning.py`)."""
    return tuning.of_forward(*arguments)


def tiles_of_backward(*arguments: object) -> Tiles | None:
    """The same for the backward."""
    return tuning.of_backward(*arguments)


def forward(grid: tuple[int, int], *arguments: object, **constants: object) -> None:
    """Launch `forward.py`'s kernel."""
    forward_kernel[grid](*arguments, **constants)


def backward_rows(grid: tuple[int, int], *arguments: object, **constants: object) -> None:
    """Launch `backward.py`'s kernel of that name."""
    backward_rows_kernel[grid](*arguments, **constants)


def gradients(grid: tuple[int, int], *arguments: object, **constants: object) -> None:
    """Launch `gradients`, and `add_chunks` for the sum of its parts."""
    x, buffers, d_out, dw, d_weights, dz, parts, flat, *numbers = arguments
    del constants["BLOCK_B"]
    gradients_kernel[grid](x, buffers, d_out, dw, d_weights, dz, parts, *numbers, **constants)
    total = len(flat)
    add_chunks[(-(-total // ADD_BLOCK),)](parts, flat, total, grid[1], BLOCK=ADD_BLOCK, num_warps=4, **OPTIONS)
