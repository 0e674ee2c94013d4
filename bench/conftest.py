"""What every benchmark shares: one thread, and the machine's description in the saved JSON."""

import platform

import pytest
import torch

import fusedmoe
from fusedmoe import _C
from fusedmoe.doctor import cpu

PEAK_SECONDS = 0.5


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
        peak_gflops=_C.fma_peak(PEAK_SECONDS),
        python=platform.python_version(),
        torch=torch.__version__,
        fusedmoe=fusedmoe.__version__,
    )


def pytest_benchmark_update_commit_info(config, commit_info):
    """Keep the commit, drop the names of folder and branch."""
    for name in ("project", "branch", "author_time"):
        commit_info.pop(name, None)
