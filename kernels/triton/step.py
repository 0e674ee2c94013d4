"""One launch of a Triton kernel: what it is compiled with, and what Triton compiled."""

from __future__ import annotations

import functools

import triton
from triton.runtime.jit import JITFunction

from fusedmoe.kernels.tiles import Tiles
from fusedmoe.kernels.triton.arguments import Arguments
from fusedmoe.kernels.triton.backward import add_chunks
from fusedmoe.kernels.triton.backward import backward_rows as backward_rows_kernel
from fusedmoe.kernels.triton.backward import gradients as gradients_kernel
from fusedmoe.kernels.triton.forward import forward as forward_kernel
from fusedmoe.kernels.triton.rowwise import rowwise_forward
from fusedmoe.kernels.triton.rowwise_backward import rowwise_backward

# By name: Triton 3.9 warns where a launch does not say whether to fuse multiplications and
# additions, and 3.10 will not fuse then.
OPTIONS = {"enable_fp_fusion": True}
# Without it ptxas spills a few numbers to let a third program share the multiprocessor, which
# shared memory forbids.
REGISTERS = {"maxnreg": 255}
# The versions whose compiled kernels csrc/triton.cpp has been tried with.
DIRECT = ((3, 6), (3, 9))
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# The first version that was seen to pipeline a loop of one product an iteration (`_ahead`).
CURED = (3, 9)


@functools.lru_cache(maxsize=1024)
def constants(tiles: Tiles, align: int, precision: str, arch: str) -> dict[str, object]:
    """What every launch of a call is compiled with. The dictionary is everybody's: launches unpack
    it."""
    return {
        "ALIGN": align,
        "BLOCK_B": tiles.rows,
        "BLOCK_H": tiles.columns,
        "BLOCK_K": tiles.reduction,
        "STAGES": tiles.stages,
        "PRECISION": precision,
        "num_warps": tiles.warps,
        **fixed_options(arch),
    }


def fixed_options(arch: str) -> dict[str, object]:
    """What every launch over rows on an architecture is compiled with."""
    return OPTIONS if arch.startswith("gfx") else {**OPTIONS, **REGISTERS}


def _kernel(name: str):
    return {
        "forward": forward_kernel,
        "rowwise_forward": rowwise_forward,
        "backward_rows": backward_rows_kernel,
        "rowwise_backward": rowwise_backward,
        "gradients": gradients_kernel,
        "add_chunks": add_chunks,
    }[name]


class Step:
    """One launch of a bound call: the kernel's name, how many programs a block of rows has, where
    the plan has them, what the kernel is compiled with, and what Triton compiled, as soon as it
    has.
    """

    __slots__ = ("compiled", "constants", "kernel", "place", "programs")

    def __init__(self, kernel: str, place: int, programs: int, constants: dict[str, object]):
        self.kernel, self.place, self.programs, self.constants = kernel, place, programs, constants
        self.compiled: object = None

    @property
    def rowwise(self) -> bool:
        return self.kernel.startswith("rowwise")

    def launch(self, x: int, y: int, arguments: Arguments) -> None:
        """Launch x times y programs.

        Raises: RuntimeError with the kernel's name, where Triton or the driver has one without it.
        """
        kernel = _kernel(self.kernel)
        try:
            compiled = kernel[x, y](*arguments, **self.constants)
        except RuntimeError as error:
            raise RuntimeError(f"triton: the launch of {self.kernel} failed: {error}") from error
        self.compiled = compiled if isinstance(kernel, JITFunction) else None


def function_of(compiled: object) -> tuple[int, int, int] | None:
    """Return CUDA's function of a compiled kernel, the threads of a program and its shared memory;
    None where only Triton may launch it.

    Here alone is what is private to Triton: how a compiled kernel is launched, in the versions that
    this was tried with.
    """
    if VERSION not in DIRECT or compiled is None or compiled.metadata.target.backend != "cuda":
        return None
    given, kinds = compiled.metadata, compiled.src.signature.values()
    if (
        given.num_ctas != 1
        or given.launch_cooperative_grid
        or given.launch_pdl
        or given.global_scratch_size
        or given.profile_scratch_size
    ):
        return None
    fixed = sum(parameter.is_constexpr for parameter in compiled.src.fn.params)
    if (
        any(kind not in ("i32", "constexpr") and not kind.startswith("*") for kind in kinds)
        or list(kinds).count("constexpr") != fixed
    ):
        return None
    return compiled.function, given.num_warps * given.target.warp_size, given.shared
