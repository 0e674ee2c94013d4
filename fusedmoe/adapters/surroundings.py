"""What a forward may change outside its module, put back: random generators, defaults and modes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Its type is one that checkers do not know.
deterministic: Any = torch.utils.deterministic
DEVICES = ("cpu", "cuda")


def _deterministic() -> tuple:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only, deterministic.fill_uninitialized_memory


def _set_deterministic(state: tuple) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])
    deterministic.fill_uninitialized_memory = state[2]


def _autocast() -> tuple:
    return torch.is_autocast_cache_enabled(), *(
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICES
    )


def _set_autocast(state: tuple) -> None:
    torch.set_autocast_cache_enabled(state[0])
    for kind, (enabled, dtype) in zip(DEVICES, state[1:], strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def _set_default_device(device: torch.device) -> None:
    # None is the CPU, too, and costs no call anything.
    torch.set_default_device(None if device.type == "cpu" else device)


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


# (what reads it, what sets it)
STATES: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (_anomaly, lambda state: torch.autograd.set_detect_anomaly(*state)),
    (_deterministic, _set_deterministic),
    (_autocast, _set_autocast),
)


@contextmanager
def put_back(device: torch.device) -> Iterator[None]:
    """Put back what is changed inside: random generators and all of `STATES`.

    The generators are those of Python, NumPy, PyTorch's CPU and `device`.
    """
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    drawn = random.getstate(), numpy.get_state() if numpy else None
    before = [read() for read, _ in STATES]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(drawn[0])
        if numpy:
            numpy.set_state(drawn[1])
        for (read, change), state in zip(STATES, before, strict=True):
            if read() != state:
                change(state)
