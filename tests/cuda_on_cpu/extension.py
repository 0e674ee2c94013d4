"""The CUDA extension as the emulator runs it: csrc/cuda compiled for the processor, and registered as backend "cuda" for CPU tensors.

A run of the tests with FUSEDMOE_CUDA_ON_CPU=plain does so (tests/conftest.py), and tests that backend instead of the others. The schedule is that of
FUSEDMOE_CUDA_SEED and FUSEDMOE_CUDA_COPIES. FUSEDMOE_CUDA_ON_CPU=sanitized wants the sanitizer's own library in front of Python:

    LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 FUSEDMOE_CUDA_ON_CPU=sanitized python -m pytest tests/test_parity.py
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

from . import run

KIND = os.environ.get("FUSEDMOE_CUDA_ON_CPU")
NAME = "fusedmoe._cuda"


def sources() -> list[Path]:
    """The kernels, and what stands for CUDA's runtime and PyTorch's streams."""
    return [*sorted((run.ROOT / "csrc" / "cuda").glob("*.cu")), run.HERE / "host.cpp"]


def build(kind: str) -> Path:
    """Compile what has changed and return the library. Raises: SystemExit naming what does not compile, ValueError for an unknown kind."""
    if reason := run.missing(kind):
        raise SystemExit(reason)
    common, folder = (run.ROOT / "build" / f"cuda_on_cpu-{kind}{part}" for part in ("", "-extension"))
    with run.alone(common):
        objects = run.compiled(kind, run.EMULATOR, common)
    with run.alone(folder):
        objects += run.compiled(kind, sources(), folder)
        headers = [word for path in run.recipe()["python_folders"]() for word in ("-isystem", path)]
        objects += run.compiled(kind, [run.ROOT / "csrc" / "cuda" / "bindings.cpp"], folder, headers)
        library = folder / "_cuda.so"
        run.link(kind, objects, library, shared=True)
    return library


def load(library: Path) -> ModuleType:
    """Import the library under the name of the extension, which it stands for."""
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def register(kind: str) -> None:
    """Let backend "cuda" serve CPU tensors in this process, by the emulated library."""
    sys.modules[NAME] = load(build(kind))
    # The package has a function of this name.
    backends = importlib.import_module("fusedmoe.backends")
    rows = (replace(row, unavailable=lambda: None, devices=("cuda", "cpu")) if row.name == "cuda" else row for row in backends.BACKENDS)
    backends.BACKENDS = tuple(rows)


@cache
def control() -> ctypes.CDLL:
    """The functions of host.cpp."""
    found = ctypes.CDLL(sys.modules[NAME].__file__)
    found.fusedmoe_schedule.argtypes = [ctypes.c_uint64, ctypes.c_bool]
    found.fusedmoe_lend.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_bool]
    found.fusedmoe_launches.restype = ctypes.c_uint64
    return found
