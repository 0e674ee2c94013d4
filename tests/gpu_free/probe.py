"""Hand-written kernels of a few instructions, by which tests try the PTX executor."""

from __future__ import annotations

import numpy as np
import torch

from .ptx import Counts, Executable, Range

WARP = 32
DECLARED = ".reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %d<16>;"


def module(body: str, parameters: int, threads: int = WARP) -> str:
    """A kernel whose parameters, addresses of buffers, stand in %d0, %d1 ...; the number of a
    thread stands in %r0."""
    names = [f"\t.param .u64 .ptr .global .align 16 probe_param_{i}" for i in range(parameters)]
    loads = "".join(f"ld.param.b64 %d{i}, [probe_param_{i}];\n" for i in range(parameters))
    head = ".version 8.0\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
    return (
        f"{head}.visible .entry probe(\n{','.join(names)}\n)\n.reqntid "
        f"{threads}\n{{\n{DECLARED}\nmov.u32 %r0, %tid.x;\n{loads}{body}\nret;\n}}\n"
    )


def run(body: str, *buffers: np.ndarray, threads: int = WARP, shared: int = 0, grid: tuple[int, ...] = (1,)) -> Counts:
    """Execute a body on buffers; returns what was counted."""
    program = Executable(module(body, len(buffers), threads), shared)
    ranges = [Range(f"buffer {i}", b.ctypes.data, b.ctypes.data + b.nbytes) for i, b in enumerate(buffers)]
    return program.launch(grid, [b.ctypes.data for b in buffers], ranges)


def aligned(shape: int | tuple[int, ...], dtype) -> np.ndarray:
    """Zeros at a multiple of 16 bytes."""
    return torch.zeros(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype).numpy()


REGISTERS = {2: ("b16", "%h"), 4: ("b32", "%r"), 8: ("b64", "%d")}


def register(dtype, number: int) -> str:
    return f"{REGISTERS[np.dtype(dtype).itemsize][1]}{number}"


def lanewise(text: str, result, *columns: np.ndarray) -> np.ndarray:
    """Run an instruction with columns as operands {a}, {b}, {c}, one lane a number; returns what it
    leaves in {x}, a register of the type `result`."""
    buffers, body = [aligned(WARP, result)], []
    names = {"x": register(result, 10)}
    for i, (name, column) in enumerate(zip("abc", columns, strict=False)):
        buffer = aligned(WARP, column.dtype)
        buffer[:] = column
        buffers.append(buffer)
        names[name] = register(column.dtype, 11 + i)
        size = column.dtype.itemsize
        body.append(f"mad.wide.u32 %d9, %r0, {size}, %d{i + 1}; ld.global.{REGISTERS[size][0]} {names[name]}, [%d9];")
    size = np.dtype(result).itemsize
    body += [
        text.format(**names),
        f"mad.wide.u32 %d9, %r0, {size}, %d0; st.global.{REGISTERS[size][0]} [%d9], {names['x']};",
    ]
    run("\n".join(body), *buffers)
    return buffers[0]
