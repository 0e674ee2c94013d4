"""Rung 8 of docs/gpu.md: the CUDA extension as nvcc builds it, where there is no driver: it is
imported, and a call says by CUDA's name what is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..cuda_on_cpu import run

NO_DRIVER = r"cudaError(InsufficientDriver|NoDevice) \(.+\)"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built() -> Path:
    """The folder of the extension, for one architecture, whose code PTX shares: all four take
    minutes. Workers share its objects, so one builds it."""
    folder = run.ROOT / "build" / "cuda-extension"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)]
    with run.alone(folder):
        environment = {**os.environ, "FUSEDMOE_BUILD": "cuda", "FUSEDMOE_CUDA_ARCHS": "80"}
        result = subprocess.run(command, cwd=run.ROOT, env=environment, capture_output=True, text=True)
    if "building needs nvcc" in result.stderr:
        pytest.skip("cuda: expected nvcc, found none")
    assert result.returncode == 0, result.stderr
    return folder / "fusedmoe"


def said_by(built: Path, program: str) -> str:
    """What a program prints that has imported the extension as `_cuda`."""
    load = f"import sys, torch, fusedmoe; fusedmoe.__path__.append({str(built)!r}); from fusedmoe import _cuda; "
    result = subprocess.run([sys.executable, "-c", load + program], cwd=run.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def without_driver() -> None:
    if torch.cuda.is_available():
        pytest.skip("cuda: expected a machine without a device, got one with")


def test_it_says_what_is_missing(built):
    without_driver()
    assert re.fullmatch(NO_DRIVER, said_by(built, "print(_cuda.missing())"))


def test_a_launch_raises_by_name_and_leaves_nothing_behind(built):
    """Twice the same: an error that stayed CUDA's last one would come up in the next launch of
    anybody."""
    without_driver()
    # A network of no parameters; the tensor has no device, which nobody comes to ask for.
    program = """
bound, x = _cuda.Bound(), torch.zeros(3, 1, 2)
bound.slots, bound.width, bound.output, bound.size = 1, 2, [1, 1], 4
for _ in range(2):
  try: torch.ops.fusedmoe.network_cuda(x, [], bound.address, False, None, None)
  except RuntimeError as error: print(error)
"""
    lines = said_by(built, program).splitlines()
    assert len(lines) == 2 and all(re.fullmatch(f"cuda: expected device -1, got {NO_DRIVER}", line) for line in lines)


def test_the_backend_gives_the_reason(built):
    without_driver()
    program = (
        "from fusedmoe.backends import choose; print(fusedmoe.available_backends()['cuda'])\ntry: "
        "choose('cuda', torch.device('cpu'), torch.float32)\n"
    )
    program += "except RuntimeError as error: print(error)"
    first, second = said_by(built, program).splitlines()
    assert re.fullmatch(f"expected a GPU and its driver, got {NO_DRIVER}", first)
    assert second.startswith(f"backend cuda: {first}")


def test_it_needs_neither_cudas_runtime_nor_triton(built):
    (library,) = built.glob("_cuda*.so")
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed and "libtorch_cuda" not in needed and "libcuda.so" not in needed
    program = (
        "sys.modules['triton'] = None; from fusedmoe.kernels import launchers, network, operator, "
        "registered, self_test, describe; "
    )
    assert said_by(built, program + "print(launchers.launcher('cuda').__name__.split('.')[-1])") == "cuda"
