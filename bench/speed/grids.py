"""Which cases are measured: the few of `--quick`, those that the backend's floors name (`make
bench`), and all (`make bench-all`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

from fusedmoe.speed.calls import MODES
from fusedmoe.speed.subjects import MAIN, SUBJECTS, Sizes

BATCHES = (1, 16, 64, 256, 1024, 4096)
DTYPES = ("float32", "bfloat16")
THREADS = (1, 2)
OTHERS = tuple(name for name in SUBJECTS if name not in MAIN)


class Cell(NamedTuple):
    """One case: a named layer, a mode, a batch size, the dtype of x and the parameters, and the
    number of threads.

    `compiled`: whether the arms that must be compiled first, for up to a minute, are among its
    arms.
    """

    layer: str
    sizes: Sizes
    mode: str
    batch: int
    dtype: str = "float32"
    threads: int = 1
    compiled: bool = True

    @property
    def name(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.layer}, {self.mode}, B = {self.batch}, {self.dtype}, {threads}"

    @property
    def key(self) -> tuple:
        """What tells one case from another in a file of results."""
        return self.layer, tuple(map(str, self.sizes)), self.mode, self.batch, self.dtype, self.threads


def cells(
    layers: Iterable[str],
    modes: Iterable[str],
    batches: Sequence[int],
    dtype: str = "float32",
    threads: int = 1,
    compiled: bool = True,
) -> list[Cell]:
    """Return a case for every combination of the named layers, modes and batch sizes."""
    return [
        Cell(name, SUBJECTS[name], mode, batch, dtype, threads, compiled)
        for name, mode, batch in product(layers, modes, batches)
    ]


def quick() -> list[Cell]:
    """A first look: the main layers at batch sizes whose parity is soon checked, without what must
    be compiled.
    """
    return [
        *cells(MAIN, ["inference"], (1, 64, 256), compiled=False),
        *cells(MAIN, ["training step"], (1, 64), compiled=False),
    ]


def floors() -> list[Cell]:
    """The cells that the floors of the CPU backend name.

    With the arms that must be compiled where most of the floors are.
    """
    return [
        *cells(MAIN, ["inference"], (1, 64, 1024)),
        *cells(MAIN, ["inference"], (16,), compiled=False),
        *cells(MAIN, ["training step"], (1, 64, 1024)),
        *cells(OTHERS, ["inference"], (256,), compiled=False),
        *cells(OTHERS, ["training step"], (1024,), compiled=False),
        *cells(MAIN, ["inference"], (1, 64, 1024), dtype="bfloat16", compiled=False),
        *cells(MAIN, ["training step"], (64, 1024), dtype="bfloat16", compiled=False),
        *cells(MAIN, MODES, (1024,), threads=2, compiled=False),
    ]


def everything() -> list[Cell]:
    """The whole grid: every layer, mode, batch size, dtype and number of threads."""
    return [
        cell for threads, dtype in product(THREADS, DTYPES) for cell in cells(SUBJECTS, MODES, BATCHES, dtype, threads)
    ]


GRIDS = {"quick": quick, "floors": floors, "all": everything}
