"""Which tiles a launch takes: one rule, read from the program, the dtype and the rows alone, so
that nothing is tuned at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fusedmoe.kernels.program import Program

# Up to this many rows all segments are one launch. A program of 16 rows then streams all weights
# alone: about 100 GB/s an SM (modelled, never measured), 12 us for AdaTT T3m2's 1.2 MB in bfloat16,
# against 2 to 3 us for each launch that is saved.
WHOLE_ROWS = 256
# Rows of one part of a parameter's gradient: a function of nothing, so that no sum depends on the
# device.
CHUNK = 1024
# From this many rows on, tiles have BLOCK_B = 128. With fewer they would not fill the SMs: an H100
# has 132, and 4,096 rows of a level with 256 columns are 128 programs.
MANY_ROWS = 4096
# The architectures that use tiles of 128 rows: on the others three units' accumulators and the
# pipeline's addresses do not fit into a program's registers.
LARGE = ("sm_80", "sm_90", "sm_100", "cpu")
# The most columns of a source that a program keeps for all that read it, by whether it runs all
# segments. Triton keeps them in registers, and more go to local memory; CUDA's kernels in shared
# memory, of which two blocks of an A100's multiprocessor could not have more.
MOST_RESIDENT = {True: 512, False: 256}
# Whether it is kept beside hidden layers in tiles of 64 rows, too: Triton's registers have no room
# for it, shared memory has.
BESIDE_HIDDEN = {"triton": False, "cuda": True}
# Columns of the tiles that it is kept in: BLOCK_K of every dtype that keeps one.
RESIDENT_TILE = 64
# Units are mixed in groups of these sizes, so that tables of nearly so many share a compiled
# kernel.
GROUPS = (1, 2, 3, 4, 5, 8)


class Tiles(NamedTuple):
    """What a kernel is compiled for.

    whole: one launch for all segments. rows, columns, reduction: BLOCK_B, BLOCK_H and BLOCK_K.
    outputs: rows of the tile of a dW. warps and pipeline stages of a program. units: mixed at a
    time. reads: columns of a softmax. resident: columns of a source that stay on the
    chip for all that read it, or 0; ahead: pipeline stages over the experts that share it.
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
    resident: int
    ahead: int

    @property
    def backward(self) -> Tiles:
        """Those of the backward, whose tiles have y, dy and a gradient beside the products: at most
        64 rows."""
        return self._replace(rows=min(self.rows, 64))


def power_of_two(n: int, least: int = 1) -> int:
    """The least power of two that is at least n and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def choose(program: Program, dtype: torch.dtype, rows: int, arch: str, beside_hidden: bool = False) -> Tiles:
    """Return the tiles for a call of so many rows on an architecture. beside_hidden: BESIDE_HIDDEN
    of the backend.

    The accumulators of U units and one expert are (U + 1) x BLOCK_B x BLOCK_H numbers, which eight
    warps hold 64 to 128 of a thread: 128 x 64 for up to three units, 64 x 64 for four, 64 x 32 for
    eight. Four warps hold those of 16 x 64. A source is kept where that leaves no number in local
    memory (tests/gpu_free/budgets.json): by Triton not beside a hidden layer of 64 rows, not by
    AMD's compiler, which keeps it in registers, and not in float32, whose three products want the
    registers, and whose sums want to be rounded: tensor cores cut, and one chain of MMAs over K =
    512 errs beyond the bound (tests/gpu_free/test_executed.py).
    """
    # Bools, also of the symbolic number of rows that torch.compile traces with.
    return chosen(program, dtype, bool(rows <= WHOLE_ROWS), bool(rows >= MANY_ROWS), arch, beside_hidden)


@functools.lru_cache(maxsize=1024)
def chosen(program: Program, dtype: torch.dtype, whole: bool, many: bool, arch: str, beside_hidden: bool) -> Tiles:
    """As `choose`, of rows that are few enough for one launch (whole), or so many that a tile has
    128 of them."""
    wide = dtype == torch.float32
    most = max(len(segment.units) for segment in program.segments)
    units = next((size for size in GROUPS if size >= most), GROUPS[-1])
    widest = max((unit.width for segment in program.segments for unit in segment.units), default=0)
    hidden = program.hidden and not beside_hidden
    resident = (
        0
        if wide or (not whole and (hidden or arch.startswith("gfx")))
        else _resident_columns(program, MOST_RESIDENT[whole])
    )
    large = resident > 0 and not program.hidden and units <= 3 and arch in LARGE and many
    columns = min(64 if units <= 4 and not wide else 32, power_of_two(widest, 16))
    return Tiles(
        whole=whole,
        rows=16 if whole else 128 if large else 64,
        columns=columns,
        reduction=32 if wide else RESIDENT_TILE,
        outputs=32 if wide else 64,
        warps=4 if whole else 8,
        stages=2 if wide else 3,
        units=units,
        reads=power_of_two(program.reads, 16),
        resident=resident,
        ahead=3 if resident and not whole else 1,
    )


def _resident_columns(program: Program, most: int) -> int:
    """Columns of a source that are kept, if there are linears, each reads one source, and the widest
    fits."""
    if not program.linears or any(len(linear.read) != 1 for linear in program.linears):
        return 0
    columns = power_of_two(max((linear.read[0].width for linear in program.linears), default=0), RESIDENT_TILE)
    return columns if columns <= most else 0


# Numbers of a tile of row-wise operations: eight of each thread, which leaves registers for two
# programs more on a multiprocessor than sixteen do.
ROWWISE_TILE = 1024


@functools.lru_cache(maxsize=256)
def rowwise(program: Program) -> tuple[int, int]:
    """Rows and columns of the tiles of row-wise operations."""
    widest = max((operation.width for operation in program.operations), default=0)
    columns = min(power_of_two(widest, 16), 128)
    return min(64, ROWWISE_TILE // columns), columns


def aligned(numbers: list[int], multiple: int) -> bool:
    """Whether all are multiples."""
    return not any(number % multiple for number in numbers)
