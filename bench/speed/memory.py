"""What a training step keeps for backward, and how far a call raises the process's memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
KILO = 1024


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Return the bytes of the tensors that a forward saves for its backward: every storage once,
    without the parameters and x.

    Those two exist anyway.
    """
    x = x.detach().requires_grad_()
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *network.parameters())}
    # Held until the end: a storage that was freed meanwhile would give its address to another.
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x)
    return sum(storage.nbytes() for storage in seen.values())


def _kilobytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def peak_rise(call: Callable[[], object]) -> int | None:
    """Return how many bytes the peak resident memory of the process rises in one call.

    None where Linux's /proc is not there.

    The allocator hands its free memory back first; what it cannot hand back, and so uses again, is
    missing from the figure.
    """
    if not CLEAR.exists():
        return None
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # Resets the peak (VmHWM) to the present resident size.
        CLEAR.write_text("5")
    except (AttributeError, OSError):
        return None
    before = _kilobytes("VmRSS")
    call()
    return KILO * max(0, _kilobytes("VmHWM") - before)


def memory_of(
    networks: Sequence[tuple[str, nn.Module]], x: Tensor, calls: dict[str, Callable[[], object]]
) -> dict[str, dict[str, int | None]]:
    """Return for each named network the bytes it saves for backward and the rise of the peak in one
    of its training steps.
    """
    return {
        name: {"saved_bytes": saved_bytes(network, x), "peak_bytes": peak_rise(calls[name])}
        for name, network in networks
    }
