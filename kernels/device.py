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
_ADDRESSES: OrderedDict[tuple[torch.device, tuple[int, ...]], Tensor] = OrderedDict()


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


def addresses(params: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the addresses of the parameters, int64 [P], on their device.

    Uploaded only for addresses that have not been seen: the table holds no values, so it cannot go stale.
    """
    key = (device, tuple(p.data_ptr() for p in params))
    table = _ADDRESSES.pop(key, None)
    if table is None:
        table = torch.tensor(key[1] or (0,), dtype=torch.int64, device=device)
        while len(_ADDRESSES) >= TABLES:
            _ADDRESSES.popitem(last=False)
    _ADDRESSES[key] = table
    return table
