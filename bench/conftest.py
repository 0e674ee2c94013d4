"""What every benchmark shares: the session of workers, and the machine's description in the saved
JSON."""

import pytest

from fusedmoe.speed.arms import Session
from fusedmoe.speed.grids import GRIDS
from fusedmoe.speed.machine import describe


def pytest_addoption(parser):
    parser.addoption(
        "--grid", choices=GRIDS, default="quick", help="which cases, as of `python -m fusedmoe bench --grid`"
    )


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", GRIDS[metafunc.config.getoption("--grid")](), ids=lambda cell: cell.name)


@pytest.fixture(scope="session")
def session():
    """What the cases share: workers that run until the last of them is done."""
    with Session() as shared:
        yield shared


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keep what speed depends on, and nothing that names the host."""
    machine_info.clear()
    machine_info.update(describe())


def pytest_benchmark_update_commit_info(config, commit_info):
    """Keep the commit, drop the names of folder and branch."""
    for name in ("project", "branch", "author_time"):
        commit_info.pop(name, None)
