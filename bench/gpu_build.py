"""What `make gpu` needs: said in one sentence where it lacks, and built without a package registry
and without a write outside of build/."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from gpu_parts import BUILD_SECONDS, patience
from gpu_process import kill

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "build" / "gpu" / f"lib-{sys.implementation.cache_tag}"
NEEDED = ("torch", "numpy", "pytest", "pybind11", "setuptools")
# Compute capability -> the architecture of setup.py that serves it; any other is served by the PTX
# that every build has.
ARCHS = {(8, 0): "80", (9, 0): "90a", (10, 0): "100a", (12, 0): "120"}
# In a process of its own: a driver may hang or abort.
PROBE = """
import ctypes, json, torch
p = torch.cuda.get_device_properties(0)
mode, driver = ctypes.c_int(), ctypes.CDLL("libcuda.so.1")
# CU_DEVICE_ATTRIBUTE_COMPUTE_MODE
driver.cuDeviceGetAttribute(ctypes.byref(mode), 20, 0)
print(json.dumps({"name": p.name, "capability": [p.major, p.minor], "compute_mode": mode.value}))
"""
PROBE_SECONDS = 60


class Missing(Exception):
    """What is lacking, in one sentence."""


def nvcc() -> str | None:
    """The compiler of CUDA that setup.py would take, or None."""
    home = os.environ.get("CUDA_HOME")
    candidates = (os.environ.get("NVCC"), home and str(Path(home, "bin", "nvcc")), "nvcc", "/usr/local/cuda/bin/nvcc")
    return next((name for name in candidates if name and shutil.which(name)), None)


def check_packages() -> None:
    """Raise Missing for packages that this Python does not have."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not lacking and importlib.util.find_spec("triton") is None and not wants_cuda():
        lacking = ["triton (or nvcc, for the CUDA extension)"]
    if lacking:
        raise Missing(
            f"expected {', '.join(lacking)} in {sys.executable}, found none; install them, or activate the "
            f"environment that has them"
        )


def device() -> dict:
    """Return the name, capability and compute mode of the device.

    Raises: Missing where there is none.
    """
    try:
        probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise Missing(f"expected a device, got no answer from the driver in {PROBE_SECONDS} s") from None
    if probe.returncode:
        said = (probe.stderr.strip().splitlines() or ["nothing"])[-1]
        raise Missing(f"expected a device, got a machine without one that PyTorch finds ({said}); nothing was run")
    return json.loads(probe.stdout.splitlines()[-1])


def wants_cuda() -> bool:
    """Whether the CUDA extension is to be built: where FUSEDMOE_BUILD says so, or says nothing and
    nvcc is there."""
    return (os.environ.get("FUSEDMOE_BUILD") or ("cuda" if nvcc() else "cpu")) == "cuda"


def build_with(kind: str, archs: str, log: TextIO, seconds: float) -> str | None:
    """Build the package into LIBRARY; return why that failed, or None."""
    for stale in LIBRARY.rglob("*.py"):
        stale.unlink()
    environment = os.environ | {
        "FUSEDMOE_BUILD": kind,
        "FUSEDMOE_CUDA_ARCHS": os.environ.get("FUSEDMOE_CUDA_ARCHS") or archs,
    }
    # Not installed: the environment may not be ours to write to. With --parallel both extensions
    # are compiled at once.
    steps = (
        ["build_py", "--build-lib", str(LIBRARY)],
        ["build_ext", "--build-lib", str(LIBRARY), "--parallel", str(os.cpu_count() or 2)],
    )
    command = [sys.executable, "setup.py", "--quiet", *steps[0], *steps[1]]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"the compilation was cut off after {seconds:g} s"
    finally:
        # Also the compilers that it started.
        kill(process)
    return f"setup.py ended with status {status}; the log has its messages" if status else None


def prepare(log: TextIO) -> tuple[dict, dict[str, str]]:
    """Check what is there and build the package; return what the JSON says of it, and the
    environment of the parts. Raises: Missing."""
    check_packages()
    found = device()
    began, absent = time.monotonic(), None
    kind, archs = "cuda" if wants_cuda() else "cpu", ARCHS.get(tuple(found["capability"]), "80")
    print(f"==> building into {LIBRARY.relative_to(ROOT)}: {kind}", flush=True)
    fault = build_with(kind, archs, log, BUILD_SECONDS * patience())
    if fault and kind == "cuda":
        absent = fault
        print(f"==> without the CUDA kernels: {fault}", flush=True)
        # The host's objects are there, or are made now.
        fault = build_with("cpu", archs, log, BUILD_SECONDS * patience())
    if fault:
        raise Missing(f"expected a build of the package, but {fault}")
    head = {
        "device": found,
        "python": platform.python_version(),
        "commit": commit(),
        "build": {"kind": "cpu" if absent else kind, "seconds": round(time.monotonic() - began, 1), "absent": absent},
        "began": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    path = os.pathsep.join(filter(None, (str(LIBRARY), os.environ.get("PYTHONPATH"))))
    return head, os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def commit() -> str:
    """The commit of this tree, with a word if it was changed since; "unknown" without git."""
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"
