"""Part a of `make gpu`: what this machine is, and whether each backend answers at all."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import time
from functools import partial

import torch
from gpu_arms import DEVICE
from gpu_cases import Case, Skipped

import fusedmoe
from fusedmoe.backends import BACKENDS
from fusedmoe.families import mmoe
from fusedmoe.op import fusion_network
from fusedmoe.testing import Case as Sizes
from fusedmoe.testing import evaluate, expectation, faults_of, problem

CLOCKS = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,"
    "power.limit,temperature.gpu,ecc.mode.current,mig.mode.current"
)
PACKAGES = ("torch", "triton", "numpy", "pytest", "pybind11", "setuptools")


def versions() -> dict:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    tools = {name: shutil.which(name) is not None for name in ("nvcc", "compute-sanitizer", "ncu")}
    return {
        "versions": found | {"cuda": torch.version.cuda, "fusedmoe": fusedmoe.__version__},
        "tools": tools,
        "backends": fusedmoe.available_backends(),
    }


def device() -> dict:
    p = torch.cuda.get_device_properties(DEVICE)
    return {
        "name": p.name,
        "capability": f"sm_{p.major}{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gb": p.total_memory / 1e9,
        "l2_mb": p.L2_cache_size / 1e6,
        "shared_kb": p.shared_memory_per_block_optin / 1024,
    }


def clocks() -> dict:
    """As they are found: nothing here sets any."""
    if not shutil.which("nvidia-smi"):
        raise Skipped("nvidia-smi is not installed")
    said = subprocess.run(
        ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
    )
    if said.returncode:
        raise RuntimeError((said.stdout + said.stderr).strip())
    return dict(zip(CLOCKS.split(","), (word.strip() for word in said.stdout.splitlines()[0].split(",")), strict=True))


def tiny(backend: str) -> dict:
    """One forward and backward of a small MMoE in float32; wrong results are an error like any
    other."""
    given = problem(Sizes(mmoe(8, [[6]], 2, 3), 5), torch.float32)
    there = given._replace(
        x=given.x.to(DEVICE),
        params=tuple(p.to(DEVICE) for p in given.params),
        d_out=given.d_out.to(DEVICE),
        d_weights=(),
    )
    began = time.perf_counter()
    found = evaluate(lambda x, params, table: (fusion_network(x, params, table, backend=backend), ()), there)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    expected = {name: pair for name, pair in expectation(given._replace(d_weights=())).items() if name in found}
    wrong = faults_of({name: None if value is None else value.cpu() for name, value in found.items()}, expected)
    if wrong:
        raise AssertionError(
            f"the first call took {seconds:.1f} s, and {len(wrong)} of {len(expected)} values differ: {max(wrong)[1]}"
        )
    return {"first_call_seconds": seconds}


def cases(book: dict) -> list[Case]:
    """Versions, the device, its clocks, and a call of each backend that takes tensors on it."""
    # What a first call computes is shown here, and judged in part b.
    os.environ["FUSEDMOE_SELF_TEST"] = "0"
    names = [row.name for row in BACKENDS if row.name != "cpu" and row.unavailable() is None]
    calls = [Case(f"tiny call, {name}", partial(tiny, name)) for name in names]
    return [Case("versions", versions), Case("device", device), Case("clocks", clocks), *calls]
