"""Part e of `make gpu`: compute-sanitizer on small calls, and the counters of ncu for one launch of
each kernel, where these tools are."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from gpu_arms import proven
from gpu_cases import Case, Skipped

SMALL = Path(__file__).parent / "gpu_small.py"
CHECKS = ("memcheck", "racecheck")
# Without them ncu still counts: a chip may not know one by its name.
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
SECTIONS = (
    "LaunchStats",
    "Occupancy",
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
)
BYTES = "lts__t_bytes.sum,dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
# Of hundreds of columns, what the questions are about: tensor pipe, bytes of L2 and DRAM,
# occupancy, reasons of stalls, resources.
KEPT = (
    "sm__pipe_tensor",
    "sm__inst_executed_pipe_tensor",
    "lts__t_bytes",
    "dram__bytes",
    "dram__throughput",
    "lts__throughput",
    "sm__throughput",
    "sm__warps_active",
    "sm__maximum_warps",
    "smsp__average_warps_issue_stalled",
    "smsp__average_warp",
    "gpu__time_duration",
    "launch__",
)


def said_by(command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Run a command; return its status and what it said, which goes to the log too."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    print(done.stdout[-20000:], done.stderr[-20000:], flush=True)
    return done.returncode, done.stdout, done.stderr


def sanitize(tool: str, backend: str) -> dict:
    """Raises: Skipped where the tool is not, or does not take this device; AssertionError with its
    first lines where it finds something."""
    if not shutil.which("compute-sanitizer"):
        raise Skipped("compute-sanitizer is not installed")
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--target-processes",
        "all",
        sys.executable,
        str(SMALL),
        backend,
        "check",
    ]
    # Without the caching allocator every tensor has bounds that the tool knows.
    status, out, err = said_by(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    lines = [line for line in (out + err).splitlines() if line.startswith("=========")]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), None)
    if any("not supported" in line for line in lines):
        raise Skipped(next(line for line in lines if "not supported" in line).strip("= "))
    found = re.search(r"(\d+) (?:errors?|hazards?)", summary or "")
    if status or not found or int(found[1]):
        raise AssertionError(
            f"status {status}, {summary or 'no summary'}; {' | '.join(line.strip('= ') for line in lines[1:8])}"[:1500]
        )
    return {"summary": summary.strip("= ")}


def rows_of(text: str) -> list[dict[str, str]]:
    """The rows of ncu's table, a launch each; its first row of data has the units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    return list(csv.DictReader(io.StringIO("\n".join(lines))))


def count(backend: str) -> dict:
    """Raises: Skipped where ncu is not; RuntimeError with its words where it reads no counters."""
    if not shutil.which("ncu"):
        raise Skipped("ncu is not installed")
    base = [
        "ncu",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--target-processes",
        "all",
        "--page",
        "raw",
        "--csv",
    ]
    base += [word for section in SECTIONS for word in ("--section", section)]
    for metrics in (f"{BYTES},{TENSOR}", BYTES):
        status, out, err = said_by([*base, "--metrics", metrics, sys.executable, str(SMALL), backend, "profile"], {})
        table = rows_of(out)
        if status == 0 and len(table) > 1:
            break
    else:
        raise RuntimeError(f"ncu ended with status {status}: {(out + err).strip()[-800:]}")
    units, *launches = table
    kept = {name: unit for name, unit in units.items() if name and name.startswith(KEPT)}
    kernels: dict[str, dict] = {}
    for launch in launches:
        # One of each kind; what PyTorch runs between is not ours.
        name = launch["Kernel Name"]
        if not name.startswith(("void at::", "at::")):
            kernels.setdefault(name, {column: f"{launch[column]} {unit}".strip() for column, unit in kept.items()})
    return {"kernels": kernels}


def cases(book: dict) -> list[Case]:
    """Raises: Skipped where no backend passed the self-test."""
    backends = proven(book, ("bfloat16",))["bfloat16"]
    checks = [Case(f"{tool}, {backend}", partial(sanitize, tool, backend)) for backend in backends for tool in CHECKS]
    return [*(Case(f"ncu, {backend}", partial(count, backend)) for backend in backends), *checks]
