"""Which tiles a launch takes: one rule, read from the program, the dtype and the rows alone, so that nothing is tuned at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.kernels.program import Program

# Up to so many rows all stages are one launch. A program of 16 rows then streams all weights alone: about 100 GB/s an SM
# (modelled, never measured), 12 us for AdaTT T3m2's 1.2 MB in bfloat16, against 2 to 3 us for each launch that is saved.
WHOLE_ROWS = 256
# Rows of one part of a parameter's gradient: a function of nothing, so that no sum depends on the device.
CHUNK = 1024
# From so many rows on a tile has 128 of them: on 132 multiprocessors 128 programs of a level with 256 columns, each streaming all weights
# for twice the rows.
MANY_ROWS = 4096
# The architectures that do so: on the others three units' accumulators and the pipeline's addresses do not fit into a program's registers.
LARGE = ("sm_80", "sm_90", "sm_100", "cpu")
# The most bytes of a source's tile that a program keeps for all experts that read it, beside the pipeline's pieces of W.
KEPT_BYTES = 64 * 1024
# Columns of the tiles that it is kept in: BLOCK_K of every dtype that keeps one.
KEPT_PIECE = 64
# Units are mixed in groups of these sizes, so that tables of nearly so many share a compiled kernel.
GROUPS = (1, 2, 3, 4, 5, 8)


class Tiles(NamedTuple):
    """What a kernel is compiled for.

    whole: one launch for all stages. rows, columns, reduction: BLOCK_B, BLOCK_H and BLOCK_K. outputs: rows of the tile of a dW. warps and
    pipeline stages of a program. units: mixed at a time. reads: columns of a softmax. keep: columns of a source that are kept for all that read it,
    or 0; ahead: pipeline stages over the experts that share it.
    """

    whole: bool
    rows: int
    columns: int
    reduction: int
    outputs: int
    warps: int
    stages: int
    units: int
    reads: int
    keep: int
    ahead: int

    @property
    def backward(self) -> Tiles:
        """Those of the backward, whose tiles have y, dy and a gradient beside the products: at most 64 rows."""
        return self._replace(rows=min(self.rows, 64))


def power_of_two(n: int, least: int = 1) -> int:
    """The least power of two that is at least n and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def choose(program: Program, dtype: torch.dtype, rows: int, arch: str) -> Tiles:
    """Return the tiles for a call of so many rows on an architecture.

    The accumulators of U units and one expert are (U + 1) x BLOCK_B x BLOCK_H numbers, which eight warps hold 64 to 96 of a thread:
    64 x 64 for up to five units, 64 x 32 for eight. Four warps hold those of 16 x 64. A source's tile is kept where that leaves no number in
    local memory: not beside a hidden layer of 64 rows, and not in float32, whose three products want its registers (tests/gpu_free/budgets.json),
    and whose sums want to be rounded: tensor cores cut, and one chain of MMAs over K = 512 errs beyond the bound (tests/gpu_free/test_executed.py).
    """
    # A bool, also of the symbolic number of rows that torch.compile traces with.
    whole = bool(rows <= WHOLE_ROWS)
    wide = dtype == torch.float32
    most = max(len(stage.units) for stage in program.stages)
    units = next((size for size in GROUPS if size >= most), GROUPS[-1])
    widest = max(unit.width for stage in program.stages for unit in stage.units)
    keeps = not wide and (whole or not (program.inner or arch.startswith("gfx")))
    large = keeps and units <= 3 and rows >= MANY_ROWS and arch in LARGE and _kept(program, 128 * dtype.itemsize) > 0
    block = 16 if whole else 128 if large else 64
    columns = min(64 if units <= 5 and not wide else 32, power_of_two(widest, 16))
    return Tiles(
        whole=whole,
        rows=block,
        columns=columns,
        reduction=32 if wide else KEPT_PIECE,
        outputs=32 if wide else 64,
        warps=4 if whole else 8,
        stages=2 if wide else 3,
        units=units,
        reads=power_of_two(program.reads, 16),
        keep=_kept(program, block * dtype.itemsize) if keeps else 0,
        ahead=1 if whole else 2,
    )


def _kept(program: Program, bytes_of_column: int) -> int:
    """Columns of a source that are kept, if each map reads one source, and the widest fits."""
    if any(len(one.read) != 1 for one in program.maps):
        return 0
    columns = power_of_two(max(one.read[0].width for one in program.maps), KEPT_PIECE)
    return columns if columns * bytes_of_column <= KEPT_BYTES else 0


def aligned(numbers: list[int], multiple: int) -> bool:
    """Whether all are multiples."""
    return not any(number % multiple for number in numbers)
