"""The CUDA extension as the emulator runs it: csrc/cuda compiled for the processor, and registered
as backend "cuda" for CPU tensors.

A run of the tests with FUSEDMOE_CUDA_ON_CPU=plain does so (tests/conftest.py), and tests that
backend instead of the others. The schedule is that of FUSEDMOE_CUDA_SEED and FUSEDMOE_CUDA_COPIES.
The sanitizers want their own library in front of Python's, which `environment` names.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from . import run

KIND = os.environ.get("FUSEDMOE_CUDA_ON_CPU")
# Built elsewhere, to be taken instead of what the sources say.
LIBRARY = os.environ.get("FUSEDMOE_CUDA_LIBRARY")
NAME = "fusedmoe._cuda"
# What stands between PyTorch and the kernels.
OPERATORS = [run.ROOT / "csrc" / "cuda" / name for name in ("bindings.cpp", "calls.cpp")]


def sources() -> list[Path]:
    """The kernels, and what stands for CUDA's runtime and PyTorch's streams."""
    return [*sorted((run.ROOT / "csrc" / "cuda").glob("*.cu")), run.HERE / "host.cpp"]


def build(kind: str) -> Path:
    """Compile what has changed and return the library.

    Raises: SystemExit naming what does not compile, ValueError for an unknown kind.
    """
    if reason := run.missing(kind):
        raise SystemExit(reason)
    common, folder = (run.ROOT / "build" / f"cuda_on_cpu-{kind}{part}" for part in ("", "-extension"))
    with run.alone(common):
        objects = run.compiled(kind, run.EMULATOR, common)
    with run.alone(folder):
        objects += run.compiled(kind, sources(), folder)
        headers = run.recipe()["system_folders"](run.recipe()["python_folders"](), run.recipe()["torch_folders"]()[0])
        objects += run.compiled(kind, OPERATORS, folder, headers)
        library = folder / "_cuda.so"
        link(kind, objects, library)
    return library


def link(kind: str, objects: Sequence[Path], library: Path) -> None:
    """Link the extension. Raises: SystemExit if it does not link."""
    run.link(
        kind,
        objects,
        library,
        ["-shared", *(f"-L{path}" for path in run.recipe()["torch_folders"]()[1]), "-ltorch_cpu"],
    )


def load(library: Path) -> ModuleType:
    """Import the library under the name of the extension, which it stands for."""
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def register(kind: str) -> None:
    """Let backend "cuda" serve CPU tensors in this process, by the emulated library."""
    sys.modules[NAME] = load(Path(LIBRARY) if LIBRARY else build(kind))
    from fusedmoe import backends

    rows = (
        replace(row, unavailable=lambda: None, devices=("cuda", "cpu")) if row.name == "cuda" else row
        for row in backends.BACKENDS
    )
    backends.BACKENDS = tuple(rows)


@cache
def control() -> ctypes.CDLL:
    """The functions of host.cpp."""
    found = ctypes.CDLL(sys.modules[NAME].__file__)
    found.fusedmoe_schedule.argtypes = [ctypes.c_uint64, ctypes.c_bool]
    found.fusedmoe_lend.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_bool]
    found.fusedmoe_launched.argtypes = [ctypes.c_uint64]
    found.fusedmoe_moved.argtypes = [ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint64)]
    found.fusedmoe_launched.restype = found.fusedmoe_moved.restype = ctypes.c_char_p
    return found


class Counts(NamedTuple):
    """What launches have done so far, as in emulator.h."""

    launches: int
    blocks: int
    barriers: int
    products: int
    bytes_read: int
    bytes_written: int
    bank_conflicts: int


def counts() -> Counts:
    numbers = (ctypes.c_uint64 * len(Counts._fields))()
    control().fusedmoe_counts(numbers)
    return Counts(*numbers)


# What a program that was not built by the sanitizer must have in front of its own libraries.
PRELOADED = {"sanitized": "libasan.so", "threads": "libtsan.so"}
OPTIONS = {
    # Python leaves memory to the system at its end; and PyTorch's threads are their own matter.
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1 report_signal_unsafe=0",
}


def environment(kind: str, seed: int = 0, copies: str = "lazy", library: Path | None = None) -> dict[str, str]:
    """What a process wants that tests the kernels of a kind under a schedule, those of a library if
    there is one."""
    result = {
        **os.environ,
        **OPTIONS,
        "FUSEDMOE_CUDA_ON_CPU": kind,
        "FUSEDMOE_CUDA_SEED": str(seed),
        "FUSEDMOE_CUDA_COPIES": copies,
        "OMP_NUM_THREADS": "1",
    }
    if library:
        result["FUSEDMOE_CUDA_LIBRARY"] = str(library)
    if kind in PRELOADED:
        command = [*run.compiler(), f"-print-file-name={PRELOADED[kind]}"]
        result["LD_PRELOAD"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return result
