"""Launches of the CUDA kernels of csrc/cuda; the names are those of `launchers.py`. They come compiled: nothing is tuned, and nothing compiled at run time."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedmoe.kernels import device
from fusedmoe.kernels.tiles import Tiles

# The last block of each tile's adds up its parts.
FOR_PARAMETERS = 1
# In shared memory.
BESIDE_HIDDEN = True


@functools.cache
def _extension():
    return importlib.import_module("fusedmoe._cuda")


def addresses(params: Sequence[Tensor], place: torch.device) -> tuple[object, bool]:
    """The parameters' addresses, which travel with every launch, and whether all are multiples of 16. A table of very many lies on the device."""
    extension = _extension()
    table = device.addresses(params, place)[0] if len(params) > extension.MOST_PARAMETERS else None
    found = extension.Parameters([p.data_ptr() for p in params], 0 if table is None else table.data_ptr())
    # What launches read of it must not be somebody else's memory before the last of them.
    found.table = table
    return found, found.even


@functools.lru_cache(maxsize=1024)
def constants(tiles: Tiles, align: int, precision: str, arch: str) -> dict[str, object]:
    """What the code of every launch of a call is chosen by."""
    return {"rows": tiles.rows, "columns": tiles.columns, "aligned": align > 1, "once": precision == "tf32"}


def tiles_of_forward(*arguments: object) -> Tiles | None:
    """The shipped ones: others are not compiled."""
    return None


tiles_of_backward = tiles_of_forward


def scratch(tasks: int, x: Tensor) -> dict[str, object]:
    """How many blocks have come to each task's end, which `backward_rows` makes zero and `gradients` counts in."""
    return {"arrived": x.new_empty(tasks, dtype=torch.int32)}


@functools.lru_cache(maxsize=1024)
def _tiles(dtype: torch.dtype, *sizes: tuple[str, int]):
    """The extension's record of how a launch runs."""
    extension = _extension()
    found = extension.Tiles()
    found.number = getattr(extension.Number, str(dtype).removeprefix("torch."))
    for name, value in sizes:
        setattr(found, name, value)
    return found


def _chosen(x: Tensor, constants: dict[str, object], *more: tuple[str, int]):
    """The record for a launch: what all launches of the call share, and `more`."""
    return _tiles(x.dtype, *((name, constants[name]) for name in ("rows", "columns", "aligned", "once")), *more)


def forward(grid: tuple[int, int], *arguments: object, **constants: object) -> None:
    """Launch forward.cu's kernel."""
    x, buffers, out, p, weights, parameters, plan, floats, place, *numbers = arguments
    more = ("units", constants["UNITS"]), ("keep", constants["KEEP"]), ("inner", constants["INNER"]), ("stored", constants["STORE"] > 1)
    tensors = [tensor.data_ptr() for tensor in (x, buffers, out, p, weights, plan, floats)]
    _extension().forward(_chosen(x, constants, *more), x.get_device(), parameters, tensors, (place, grid[1], *numbers))


def backward_rows(grid: tuple[int, int], *arguments: object, **constants: object) -> None:
    """Launch backward.cu's kernel for rows."""
    x, buffers, out, p, dw, d_x, d_buffers, d_out, d_weights, dz, parameters, plan, floats, place, rows, x_row, x_slot, d_row, d_slot, dz_row, mixing = (
        arguments
    )
    arrived = constants["arrived"]
    tensors = [tensor.data_ptr() for tensor in (x, buffers, out, p, d_weights, plan, floats, d_x, d_buffers, d_out, dw, dz, arrived)]
    if not constants["WEIGHTS"]:
        tensors[4] = 0
    numbers = place, grid[1], rows, x_row, x_slot, mixing, d_row, d_slot, dz_row, len(arrived)
    _extension().backward_rows(_chosen(x, constants, ("stored", constants["STORE"] > 1)), x.get_device(), parameters, tensors, numbers)


def gradients(grid: tuple[int, int], *arguments: object, **constants: object) -> None:
    """Launch backward.cu's kernel for the parameters, which adds up its chunks too."""
    x, buffers, out, dw, d_weights, dz, parts, flat, plan, *numbers = arguments
    arrived = constants["arrived"]
    tensors = [tensor.data_ptr() for tensor in (x, buffers, out, d_weights, plan, dw, dz, arrived, parts, flat)]
    if not constants["WEIGHTS"]:
        tensors[3] = 0
    _extension().gradients(_chosen(x, constants), x.get_device(), tensors, (*numbers, grid[0], constants["CHUNK"]))
