"""The backends in order of preference, and the reasons why one cannot serve a call."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusedmoe import dtype as dtypes
from fusedmoe.tracing import constant

# That of torch 2.10 and 2.11. Every kernel compiles with it and with 3.9 for every architecture
# (tests/gpu_free/test_budgets.py), and in both interpreters computes what the reference does; with
# 3.7 the largest tiles were compiled for sm_90. The first call on a device checks itself.
OLDEST_TRITON = (3, 6)
# The first architecture with bfloat16 and with copies that a program need not wait for.
OLDEST_CAPABILITY = (8, 0)

# Of the encoded tables that Python writes and the extension reads.
TABLE_VERSION = 3


def _load() -> str | None:
    """Load the C++ extension, which registers the operators; return why that failed, or None."""
    try:
        from fusedmoe import _C
    except ImportError as error:
        return (
            f"the C++ extension fusedmoe._C cannot be loaded ({error}); build it with `pip install "
            f"--no-build-isolation .` or `make build`"
        )
    try:
        _C.isa()
    except RuntimeError as error:
        return str(error)
    if getattr(_C, "TABLE_VERSION", None) != TABLE_VERSION:
        return "the C++ extension fusedmoe._C is older or newer than the package; build it again with `make build`"
    return None


# Once, at import: torch.compile cannot trace a call into the extension.
_UNAVAILABLE = _load()
EXTENSION = importlib.import_module("fusedmoe._C") if _UNAVAILABLE is None else None


# Triton reads it when it is first imported: its interpreter runs kernels on the CPU, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _looked_for_triton() -> str | None:
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "expected the package triton, got none; `pip install triton` brings it, for Linux"
    if tuple(map(int, found.split(".")[:2])) < OLDEST_TRITON:
        return f"expected triton {'.'.join(map(str, OLDEST_TRITON))} or later, got {found}"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return (
            "expected a GPU, got a machine (or a build of torch) without one; TRITON_INTERPRET=1 runs the "
            "kernels on the CPU, slowly, for tests"
        )
    return _driverless()


def _driverless() -> str | None:
    """Return why Triton cannot talk to the GPU, or None.

    Triton itself says so only in a launch, as `0 active drivers`.
    """
    try:
        importlib.import_module("triton").runtime.driver.active.get_device_interface()
    # Whatever Triton meets: a library that does not load, no C compiler for its launcher, a driver
    # that it does not know.
    except Exception as error:
        return f"expected a Triton that finds the GPU's driver and a C compiler, got {type(error).__name__}: {error}"
    return None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    """Return why the kernels of the GPU backends cannot run on a device, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST_CAPABILITY:
        return None
    return "expected a GPU of sm_{}{} or later, got sm_{}{}".format(*OLDEST_CAPABILITY, *found)


@functools.cache
def _looked_for_cuda() -> str | None:
    try:
        extension = importlib.import_module("fusedmoe._cuda")
    except ModuleNotFoundError:
        return (
            "expected the extension fusedmoe._cuda, got none; `FUSEDMOE_BUILD=cuda pip install "
            "--no-build-isolation .` builds it, with nvcc"
        )
    except ImportError as error:
        return f"the extension fusedmoe._cuda cannot be loaded ({error}); build it again with FUSEDMOE_BUILD=cuda"
    if torch.version.hip is not None:
        return "expected a GPU of NVIDIA's, got a build of torch for AMD's"
    # Its own runtime's question: that one may want a later driver than torch's does.
    missing = extension.missing()
    if missing:
        return f"expected a GPU and its driver, got {missing}"
    return (
        None if torch.cuda.is_available() else f"expected a build of torch that finds the GPU, got {torch.__version__}"
    )


@constant
def _no_cuda() -> str | None:
    """Return why the CUDA kernels cannot run on this machine, or None."""
    return _looked_for_cuda()


@constant
def _no_triton() -> str | None:
    """Return why Triton's kernels cannot run on this machine, or None.

    The first call that needs Triton imports it.
    """
    return _looked_for_triton()


@constant
def _no_kernels_for(device: torch.device) -> str | None:
    """Return why the kernels of the GPU backends cannot run on this device, or None."""
    return _too_old(device)


def transforming() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp ...) is running.

    Its tensors have no memory that a kernel could read.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


@dataclass(frozen=True)
class Backend:
    """One backend.

    Args:
        name: what `backend=` calls it.
        unavailable: returns why it cannot run on this machine, or None.
        devices: the kinds of device that it takes; None for all.
        dtypes: the dtypes that it takes.
        transforms: whether it runs under the transforms of torch.func.
        autocasts_to: the dtypes to which autocast casts a call in float32.
        lacking: returns why it cannot run on a device of these kinds, or None.
    """

    name: str
    unavailable: Callable[[], str | None]
    devices: tuple[str, ...] | None
    dtypes: tuple[str, ...]
    transforms: bool = False
    autocasts_to: tuple[str, ...] = ()
    lacking: Callable[[torch.device], str | None] | None = None

    def declines(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why this backend cannot serve tensors of this device and dtype, or None."""
        reason = self.unavailable()
        if reason is not None:
            return reason
        if self.devices is not None and device.type not in self.devices:
            return f"expected a tensor on {' or '.join(self.devices)}, got one on {device.type}"
        reason = self.lacking(device) if self.lacking else None
        if reason is not None:
            return reason
        name = str(dtype).removeprefix("torch.")
        if name not in self.dtypes:
            return f"expected {' or '.join(self.dtypes)}, got {name}"
        if not self.transforms and not torch.compiler.is_compiling() and transforming():
            return "expected a call outside the transforms of torch.func, got one inside"
        return None

    def missing(self, device: torch.device) -> str | None:
        """Return what this backend lacks on this machine or device, whatever the call, or None."""
        return self.unavailable() or (self.lacking(device) if self.lacking else None)


BACKENDS: tuple[Backend, ...] = (
    Backend(
        "cpu", lambda: _UNAVAILABLE, ("cpu",), ("float32", "float64", "bfloat16", "float16"), autocasts_to=("bfloat16",)
    ),
    Backend(
        "triton",
        _no_triton,
        ("cuda", "cpu") if INTERPRETED else ("cuda",),
        ("float32", "bfloat16", "float16"),
        autocasts_to=("bfloat16", "float16"),
        lacking=_no_kernels_for,
    ),
    Backend(
        "cuda",
        _no_cuda,
        ("cuda",),
        ("float32", "bfloat16", "float16"),
        autocasts_to=("bfloat16", "float16"),
        lacking=_no_kernels_for,
    ),
    Backend("reference", lambda: None, None, tuple(dtypes.DTYPES), transforms=True),
)


def candidates(device: torch.device) -> list[Backend]:
    """Return the backends that take tensors of this kind of device, in order of preference."""
    return [row for row in BACKENDS if row.devices is None or device.type in row.devices]


def available_backends() -> dict[str, str | None]:
    """Return every backend by name, in order of preference.

    Returns: None for a backend that can run on this machine, the reason for one that cannot.
    """
    return {row.name: row.unavailable() for row in BACKENDS}


def _row(name: str) -> Backend:
    for row in BACKENDS:
        if row.name == name:
            return row
    raise ValueError(f"backend: expected auto, {', '.join(row.name for row in BACKENDS)}, got {name!r}")


def require(name: str) -> None:
    """Check that a backend can run on this machine.

    Raises: ValueError for an unknown backend; RuntimeError, with the reason, for one that cannot.
    """
    if name == "auto":
        return
    reason = _row(name).unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name}: {reason}")


def autocasts_to(name: str, dtype: torch.dtype) -> bool:
    """Whether autocast casts a call in float32 that the backend `name` serves to this dtype."""
    return str(dtype).removeprefix("torch.") in _row(name).autocasts_to


@constant
def _warn_of_reference(device: torch.device, dtype: torch.dtype) -> None:
    """Warn if the reference runs only because every faster backend lacks something on this device."""
    name = str(dtype).removeprefix("torch.")
    faster = [row for row in candidates(device) if row.name != "reference" and name in row.dtypes]
    reasons = {row.name: row.missing(device) for row in faster}
    if reasons and None not in reasons.values():
        lacks = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        text = f"backend auto: the reference runs, much slower than {' or '.join(reasons)} ({lacks})"
        warnings.warn(text, stacklevel=3)


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that serves tensors of this device and dtype.

    It is `name` itself, or the first that can if `name` is "auto".

    "auto" warns where it takes the reference only because no faster backend can run on the device.

    Raises: ValueError for an unknown backend, RuntimeError with the reason where none can.
    """
    if name != "auto":
        reason = _row(name).declines(device, dtype)
        if reason is None:
            return name
        able = next((row.name for row in candidates(device) if row.declines(device, dtype) is None), None)
        raise RuntimeError(f"backend {name}: {reason}" + (f'; backend="auto" would take {able}' if able else ""))
    reasons = []
    for row in candidates(device):
        reason = row.declines(device, dtype)
        if reason is None:
            if row.name == "reference":
                _warn_of_reference(device, dtype)
            return row.name
        reasons.append(f"{row.name}: {reason}")
    raise RuntimeError(
        f"backend auto: expected a backend for {dtype} on {device.type}, got none ({'; '.join(reasons)})"
    )
