"""What launches need on the device besides the tensors of a call: plans, written once, and the addresses of the parameters."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedmoe.kernels.backward_plan import BackwardPlan
from fusedmoe.kernels.plan import Plan

# Tables of addresses that stay on each device: of the models of a process that take turns, and of one model's replicas.
TABLES = 256
_ADDRESSES: OrderedDict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, bool]] = OrderedDict()


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture of a device, as compilers name it; "cpu" in the interpreter."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


@functools.lru_cache(maxsize=1024)
def written(plan: Plan | BackwardPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the integers and the floats of a plan on a device."""
    return torch.tensor(plan.ints, dtype=torch.int32, device=device), torch.tensor(plan.floats or (0.0,), dtype=torch.float32, device=device)


def capturing(device: torch.device) -> bool:
    """Whether the current stream's work goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=TABLES)
def _distances(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def addresses(params: Sequence[Tensor], device: torch.device) -> tuple[Tensor, bool]:
    """Return the addresses of the parameters, int64 [P], on their device, and whether all are multiples of 16.

    Uploaded only for distances between them that have not been seen: the table holds no values, so it cannot go stale. Parameters that autocast
    casts lie in new memory at every call, but in one piece.
    """
    key = (device, tuple(p.data_ptr() for p in params))
    found = _ADDRESSES.pop(key, None)
    if found is None:
        first = key[1][0] if key[1] else 0
        table = _distances(tuple(address - first for address in key[1]) or (0,), device) + first
        found = table, not any(address % 16 for address in key[1])
        if capturing(device):
            # It is written when the graph is replayed, not now.
            return found
        while len(_ADDRESSES) >= TABLES:
            _ADDRESSES.popitem(last=False)
    _ADDRESSES[key] = found
    return found
