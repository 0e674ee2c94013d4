"""What every benchmark shares: one thread, and the machine's description in the saved JSON."""

import platform
from functools import cache

import pytest
import torch

import fusedmoe
from fusedmoe import _C
from fusedmoe.doctor import cpu

PEAK_SECONDS = 0.5


@cache
def peak_gflops() -> float:
    """Measure once a run what this core can do at most: multiply-adds on registers, GFLOP/s."""
    return _C.fma_peak(PEAK_SECONDS)


@pytest.fixture
def peak() -> float:
    """The measured peak, GFLOP/s."""
    return peak_gflops()


@pytest.fixture(autouse=True)
def one_thread():
    """Run each benchmark on one thread of torch's pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keep what speed depends on, and nothing that names the host."""
    machine_info.clear()
    machine_info.update(
        cpu=dict(cpu())["model"],
        isa=_C.isa(),
        threads=1,
        precision="float32",
        peak_gflops=peak_gflops(),
        python=platform.python_version(),
        torch=torch.__version__,
        fusedmoe=fusedmoe.__version__,
    )


def pytest_benchmark_update_commit_info(config, commit_info):
    """Keep the commit, drop the names of folder and branch."""
    for name in ("project", "branch", "author_time"):
        commit_info.pop(name, None)
