"""What launches need on the device besides the tensors of a call: plans, written once, and the
addresses of the parameters."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from fusedmoe.kernels.backward_plan import BackwardPlan
from fusedmoe.kernels.plan import Plan

Made = TypeVar("Made")
Key = tuple[torch.device, tuple[int, ...]]

# Tables that stay on each device: of the models of a process that take turns, and of one model's
# replicas. By the parameters' addresses, where None stands for what was seen once; and by their
# offsets from the first one.
TABLES = 256
_ADDRESSES: OrderedDict[Key, tuple[Tensor, bool] | None] = OrderedDict()
_OFFSETS: OrderedDict[Key, Tensor] = OrderedDict()


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture of a device, as compilers name it; "cpu" in the interpreter."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return (
        getattr(properties, "gcnArchName", "").split(":")[0]
        if torch.version.hip
        else f"sm_{properties.major}{properties.minor}"
    )


def capturing(device: torch.device) -> bool:
    """Whether the current stream's work goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def before_capture(device: torch.device) -> None:
    """Raise RuntimeError in the capture of a CUDA graph, which would not have what is about to be
    copied to the device, and be spoilt by the attempt."""
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph is being captured: expected a call with this network, dtype and number of rows "
            "before it, got the first one"
        )


@functools.cache
def _uploader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "fusedmoe-upload")


def persistent(device: torch.device, make: Callable[[], Made]) -> Made:
    """Make tensors that outlive the call, by blocking copies, so that any stream may read them.

    On a GPU in a thread of its own: torch.compile's CUDA graphs lend the calling thread a pool of
    memory, and refuse what stays in it.
    """
    before_capture(device)
    return _uploader().submit(make).result() if device.type == "cuda" else make()


@functools.lru_cache(maxsize=1024)
def written(plan: Plan | BackwardPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the integers and the floats of a plan on a device.

    Raises: RuntimeError, as `before_capture`.
    """
    ints, floats = (plan.ints, torch.int32), (plan.floats or (0.0,), torch.float32)
    return persistent(
        device, lambda: tuple(torch.tensor(numbers, dtype=dtype, device=device) for numbers, dtype in (ints, floats))
    )


def _uploaded(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    return persistent(device, lambda: torch.tensor(numbers, dtype=torch.int64, device=device))


def _remember(tables: OrderedDict[Key, Made], key: Key, made: Made) -> Made:
    """Keep one of the last TABLES that were asked for."""
    tables.pop(key, None)
    while len(tables) >= TABLES:
        tables.popitem(last=False)
    tables[key] = made
    return made


def addresses(params: Sequence[Tensor], device: torch.device) -> tuple[Tensor, bool]:
    """Return the addresses of the parameters, int64 [P], on their device, and whether all are
    multiples of 16.

    A table holds no values, so it cannot go stale. Parameters that autocast casts lie in new memory
    at every call, but in one piece: where only the first address is new, the device works the
    others out, in the order of the caller's stream, and the table is the caller's alone. Addresses
    that come again are uploaded, and stay.

    Raises: RuntimeError, as `before_capture`, for offsets that are new.
    """
    numbers = tuple(map(Tensor.data_ptr, params)) or (0,)
    key = device, numbers
    found = _ADDRESSES.get(key)
    if found is None:
        seen = key in _ADDRESSES
        aligned16 = not any(address % 16 for address in numbers)
        between = device, tuple(address - numbers[0] for address in numbers)
        offsets = _OFFSETS.get(between)
        if offsets is not None and (not seen or capturing(device)):
            _remember(_ADDRESSES, key, None)
            return offsets + numbers[0], aligned16
        _remember(_OFFSETS, between, _uploaded(*between) if offsets is None else offsets)
        found = _uploaded(*key), aligned16
    return _remember(_ADDRESSES, key, found)


def stays(params: Sequence[Tensor], device: torch.device) -> bool:
    """Whether `addresses` has kept the table of these parameters."""
    return _ADDRESSES.get((device, tuple(map(Tensor.data_ptr, params)) or (0,))) is not None


def room(like: Tensor, size: int) -> None:
    """Raise PyTorch's own error if there is no room for so many bytes, for an operator in C++ that
    has failed: its stable ABI hands on words alone."""
    like.new_empty(size, dtype=torch.uint8)
