"""Part d of `make gpu`: the time of the fused kernels as a share of what this device was measured
to reach in copies and in matrix products."""

from __future__ import annotations

import statistics
from functools import cache, partial

import torch
from gpu_arms import DEVICE, Cell, Subject, device_milliseconds, graph_of, medians, proven
from gpu_cases import Case, few
from gpu_model import LEVELS, WHOLE, launches_of

from fusedmoe.kernels.tiles import WHOLE_ROWS
from fusedmoe.speed.calls import MODES
from fusedmoe.speed.subjects import MAIN

DTYPE = "bfloat16"
ROWS = (65536, 4096)
# Several times any L2, and large enough that a product fills the chip.
COPIED, SIDE = 1 << 30, 8192


@cache
def bandwidth() -> float:
    """Bytes a second of a copy, read and written, of random numbers."""
    source = torch.randn(COPIED // 4 if not few() else 1 << 20, device=DEVICE)
    target = torch.empty_like(source)
    call = partial(target.copy_, source)
    call()
    return 2 * source.numel() * 4 / (statistics.median(device_milliseconds(call) for _ in range(5)) * 1e-3)


@cache
def matrix_rate() -> float:
    """FLOPs a second of a product of two square matrices of random numbers in bfloat16."""
    side = SIDE if not few() else 256
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    call = partial(torch.mm, a, b)
    call()
    return 2 * side**3 / (statistics.median(device_milliseconds(call) for _ in range(5)) * 1e-3)


def ceilings() -> dict:
    return {"copy_bytes_per_second": bandwidth(), "bfloat16_flops_per_second": matrix_rate()}


def share(cell: Cell, backend: str) -> dict:
    """Bytes of every tensor once and FLOPs of the products, from the plans, over the measured time
    and the two ceilings."""
    # Before anything is captured: a capture that fails spoils the device's random numbers.
    copied, multiplied = bandwidth(), matrix_rate()
    call, how = Subject(cell).ours(backend), "CUDA graph"
    try:
        timed = graph_of(call)
    except RuntimeError as error:
        timed, how = call, f"in a stream; no graph: {error}"[:300]
    seconds = medians({"ours": timed})["ours"]["device_ms"] * 1e-3
    form = LEVELS if cell.rows > WHOLE_ROWS else WHOLE
    launches = launches_of(cell.layer, cell.mode, cell.rows, form, getattr(torch, cell.dtype))
    once, products = sum(launched.once for launched in launches), sum(launched.products for launched in launches)
    return {
        "cell": cell._asdict(),
        "backend": backend,
        "how": how,
        "seconds": seconds,
        "bytes_once": once,
        "flops": products,
        "of_bandwidth": once / seconds / copied,
        "of_matrix_rate": products / seconds / multiplied,
    }


def cases(book: dict) -> list[Case]:
    """Raises: Skipped where no backend passed the self-test."""
    backends = proven(book, (DTYPE,))[DTYPE]
    cells = [Cell(layer, mode, rows, DTYPE) for rows in ROWS for mode in MODES for layer in MAIN]
    return [
        Case("ceilings", ceilings),
        *(
            Case(f"{cell.key}, {backend}", partial(share, cell, backend))
            for cell in (cells[-1:] if few() else cells)
            for backend in backends
        ),
    ]
