"""`python -m fusedmoe doctor`: what this machine has, and why a backend is not available."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import fusedmoe
from fusedmoe.backends import available_backends
from fusedmoe.kernels import self_test
from fusedmoe.kernels.launchers import LAUNCHERS


def processor(text: str) -> str | None:
    """Return the model of the first processor in the text of /proc/cpuinfo, or None."""
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), None)


def cpu() -> list[tuple[str, str]]:
    """Describe the processor: model, cores, and the instruction sets of the kernels."""
    source = Path("/proc/cpuinfo")
    model = processor(source.read_text()) if source.exists() else None
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        ("model", model or platform.processor() or platform.machine()),
        ("cores", f"{os.cpu_count()}, {own} for this process"),
        *instruction_sets(),
    ]


def instruction_sets() -> list[tuple[str, str]]:
    """Describe the builds of the kernels: which this processor can run, and which one runs."""
    try:
        from fusedmoe import _C

        return [
            *((name, "can run here" if here else "this processor lacks it") for name, here in _C.isas()),
            ("chosen", _C.isa()),
        ]
    except (ImportError, RuntimeError) as error:
        return [("chosen", f"none: {error}")]


def compiler(command: str) -> str:
    """Return the first line of a compiler's version, or that there is none."""
    if shutil.which(command) is None:
        return "not found"
    try:
        lines = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    # nvcc says its release on a line of its own, after the title.
    return next((line for line in lines if "release" in line), lines[0] if lines else "says nothing")


def gpus() -> list[tuple[str, str]]:
    """Describe each CUDA device that torch sees."""
    if not torch.cuda.is_available():
        return [
            (
                "none",
                f"torch {torch.__version__} was built "
                f"{'with CUDA ' + torch.version.cuda if torch.version.cuda else 'without CUDA'}",
            )
        ]
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(f"cuda:{i}", f"{described(i)}, {device.total_memory / 2**30:.0f} GiB") for i, device in enumerate(devices)]


def described(index: int) -> str:
    """The name and architecture of a device, and whether the GPU kernels were ever run on such."""
    device = torch.device("cuda", index)
    return (
        f"{self_test.name_of(device)} "
        f"({'; '.join(f'{backend} {self_test.history(device, backend)}' for backend in LAUNCHERS)})"
    )


def sections() -> dict[str, list[tuple[str, str]]]:
    """Return everything the doctor tells: rows (name, value) by section."""
    return {
        "fusedmoe": [("version", fusedmoe.__version__), ("folder", str(Path(fusedmoe.__file__).parent))],
        "cpu": cpu(),
        "torch": [
            ("version", torch.__version__),
            ("threads", f"{torch.get_num_threads()}"),
            ("float32 matmul precision", torch.get_float32_matmul_precision()),
        ],
        "compilers": [(command, compiler(command)) for command in ("g++", "clang++", "nvcc")],
        "gpu": gpus(),
        "backends": [
            (name, "available" if reason is None else f"not available: {reason}")
            for name, reason in available_backends().items()
        ],
    }


def main(arguments: Sequence[str]) -> int:
    """Print the sections; return 0."""
    argparse.ArgumentParser(prog="fusedmoe doctor", description=__doc__).parse_args(arguments)
    for title, rows in sections().items():
        print(title)
        for name, value in rows:
            print(f"  {name:26}{value}")
    return 0
