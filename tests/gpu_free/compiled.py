"""Kernels compiled ahead of time for every architecture, without a device: what the compilers say
about registers, stack, shared memory and MMAs.

Must run where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fusedmoe.kernels.triton.step import OPTIONS, REGISTERS

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


class Limits(NamedTuple):
    """What one multiprocessor has: registers, bytes of shared memory, the most of them a block may
    have, warps, blocks, threads of a warp, and the bytes of shared memory of each block that the
    system takes.

    Source: CUDA's programming guide, technical specifications per compute capability; AMD's CDNA 3
    instruction set, chapter 3.
    """

    registers: int
    shared: int
    block: int
    warps: int
    blocks: int
    lanes: int = 32
    taken: int = 1024


KIB = 1024
LIMITS = {
    "sm_80": Limits(65536, 164 * KIB, 163 * KIB, 64, 32),
    "sm_90": Limits(65536, 228 * KIB, 227 * KIB, 64, 32),
    "sm_100": Limits(65536, 228 * KIB, 227 * KIB, 64, 32),
    "sm_120": Limits(65536, 100 * KIB, 99 * KIB, 48, 24),
    # Four SIMDs of 512 registers and 8 warps.
    "gfx942": Limits(4 * 512 * 64, 64 * KIB, 64 * KIB, 32, 32, lanes=64, taken=0),
}
# By preference: the tensor core instructions of sm_100, sm_90 and sm_80, then the ordinary cores.
MMA = {"tcgen05": r"UTC\w*MMA", "HGMMA": "HGMMA", "HMMA": "HMMA", "FFMA": "FFMA2?"}


class Compiled(NamedTuple):
    """One kernel for one architecture. `stack` is bytes a thread in local memory, `occupancy` the
    share of the warps that fit."""

    registers: int
    stack: int
    shared: int
    mma: str
    occupancy: float
    warps: int
    ptx: str


def occupancy(arch: str, registers: int, shared: int, warps: int) -> float:
    """Return warps that fit on a multiprocessor over those it could hold; 0 if a block has too much
    shared memory."""
    limits = LIMITS[arch]
    if shared > limits.block:
        return 0.0
    # Registers come in eights for a thread.
    by_registers = limits.registers // (-(-registers // 8) * 8 * limits.lanes) // warps
    by_shared = limits.shared // max(128, -(-(shared + limits.taken) // 128) * 128)
    return min(by_registers, by_shared, limits.warps // warps, limits.blocks) * warps / limits.warps


def mma_of(code: str) -> str:
    """The best instructions of MMA that a listing of machine code has."""
    return next((name for name, pattern in MMA.items() if re.search(rf"\b{pattern}\b", code)), "none")


def target_of(arch: str) -> GPUTarget:
    """Triton's name of an architecture."""
    return (
        GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    )


def compile_for(
    kernel, signature: Mapping[str, str], constants: Mapping[str, object], arch: str, warps: int
) -> Compiled:
    """Compile a Triton kernel, with the options that launches give.

    Args:
        kernel: a `triton.jit` function.
        signature: the type of every argument that is not constant, "*bf16" or "i32", and behind a
            colon what Triton knows of it: "i32:D" is a multiple of 16. Tensors are so where nothing
            is said.
        constants: the values of the others.
        arch: one of ARCHS.
        warps: of a program.
    """
    result = _compiled(kernel, signature, constants, arch, warps)
    if "cubin" not in result.asm:
        return _from_amd(result, arch, warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [NVIDIA / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run(
            [NVIDIA / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    shared = result.metadata.shared
    return Compiled(
        registers,
        stack + local,
        shared,
        mma_of(code),
        occupancy(arch, registers, shared, warps),
        warps,
        result.asm["ptx"],
    )


def ptx_for(
    kernel, signature: Mapping[str, str], constants: Mapping[str, object], arch: str, warps: int
) -> tuple[str, int]:
    """Return the PTX that `compile_for` compiles, and the bytes of shared memory of a program."""
    result = _compiled(kernel, signature, constants, arch, warps)
    return result.asm["ptx"], result.metadata.shared


def _compiled(kernel, signature: Mapping[str, str], constants: Mapping[str, object], arch: str, warps: int):
    target = target_of(arch)
    kinds, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kinds[name], _, hints = signature.get(name, "constexpr").partition(":")
        # Tensors of PyTorch stand at multiples of 16 bytes.
        hints = hints or "D" * kinds[name].startswith("*")
        if hints:
            attributes[i,] = make_backend(target).parse_attr(hints)
    options = {"num_warps": warps, **OPTIONS, **({} if arch.startswith("gfx") else REGISTERS)}
    return triton.compile(ASTSource(kernel, kinds, dict(constants), attributes), target=target, options=options)


def _from_amd(result, arch: str, warps: int) -> Compiled:
    code = result.asm["amdgcn"]
    registers, stack = (
        int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    shared = result.metadata.shared
    return Compiled(
        registers,
        stack,
        shared,
        "MFMA" if "v_mfma_" in code else "none",
        occupancy(arch, registers, shared, warps),
        warps,
        "",
    )
