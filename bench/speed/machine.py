"""What speed depends on: the processor and what it reaches, versions, the commit.

Nothing that names the host.
"""

from __future__ import annotations

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fusedmoe
from fusedmoe.doctor import cpu
from fusedmoe.speed.arms import precision_of_medium
from fusedmoe.speed.measuring import pinned
from fusedmoe.speed.runtimes import NEEDS

PEAK_SECONDS = 0.5
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 2**10, "M": 2**20}
# Memory is what is many times larger than any share of an L3 that one process gets.
DRAM_BYTES = 2**29


def peak_gflops(seconds: float = PEAK_SECONDS) -> float | None:
    """Measure what one core can do at most in float32: multiply-adds on registers, GFLOP/s.

    None without the extension.
    """
    try:
        from fusedmoe import _C

        with pinned(1):
            return _C.fma_peak(seconds)
    except (ImportError, RuntimeError):
        return None


def caches() -> dict[str, int]:
    """Return the bytes of each data cache of the first processor by level, "L1" to "L3".

    Empty where the system does not say.
    """
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        try:
            kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size[:-1]) * UNITS[size[-1]] if size[-1] in UNITS else int(size)
    return found


def read_bandwidth(size: int, seconds: float = 0.2) -> float:
    """Return the GB/s at which one core sums `size` bytes of float32 by torch.sum, the best of many
    passes: a floor for what it can read.
    """
    numbers = torch.ones(size // 4)
    best = float("inf")
    with pinned(1):
        numbers.sum()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            numbers.sum()
            best = min(best, time.perf_counter() - start)
    return size / best / 1e9


def bandwidths() -> dict[str, float]:
    """Return the read bandwidth of L2, L3 and memory, GB/s, each from a working set that fits it
    and not the level below.
    """
    sizes = caches()
    sets = {"L2": sizes["L2"] // 2} if "L2" in sizes else {}
    if "L3" in sizes:
        # Between the two: far beyond L2, and small beside an L3 that others share.
        sets["L3"] = min(8 * sizes["L2"], sizes["L3"] // 2)
    sets["DRAM"] = max(DRAM_BYTES, 2 * sizes.get("L3", 0)) if sizes.get("L3", 0) < DRAM_BYTES else 2 * DRAM_BYTES
    return {name: read_bandwidth(size) for name, size in sets.items()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of every package among the rivals.

    "not installed" for those that are not there.
    """
    found = {"python": platform.python_version(), "fusedmoe": fusedmoe.__version__, "torch": torch.__version__}
    for package in sorted({package for needs in NEEDS.values() for package in needs}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> dict[str, object]:
    """Return the commit of the checkout that this package runs from, and whether the tree differs
    from it; empty where there is none.
    """
    root = Path(fusedmoe.__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # What this very run writes is no change of what it measures.
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs", ":!README.md"
        )
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {}


def describe() -> dict[str, object]:
    """Return the machine and the versions, with its peak and its bandwidths measured now."""
    try:
        from fusedmoe import _C

        isa = _C.isa()
    except (ImportError, RuntimeError) as error:
        isa = f"none: {error}"
    return {
        "cpu": dict(cpu())["model"],
        "isa": isa,
        "caches": caches(),
        "peak_gflops": peak_gflops(),
        "read_gb_per_second": bandwidths(),
        "medium_computes_in": precision_of_medium(),
        "versions": versions(),
        "commit": commit(),
    }
