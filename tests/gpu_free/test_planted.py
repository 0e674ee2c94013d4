"""Each bug of `planted.py` makes its test fail in the way that is expected, in a copy of the package whose kernels have that bug and no other."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fusedmoe

pytest.importorskip("triton", reason="gpu_free: expected the package triton, which compiles without a device, got none")

from fusedmoe import kernels

from ..mutation import mutated, places
from .planted import BUGS, EXECUTED, INTERPRETED, QUICK

PACKAGE, KERNELS, TESTS = Path(fusedmoe.__file__).parent, Path(kernels.__file__).parent, Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns("__pycache__", "kernels", "data")


def quick_first(names) -> list:
    """The names, those that are not quick marked as slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def copy(tmp_path) -> Path:
    """A folder with the package, its kernels and the tests."""
    shutil.copytree(PACKAGE, tmp_path / "fusedmoe", ignore=LEFT_OUT)
    shutil.copytree(KERNELS, tmp_path / "fusedmoe" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TESTS, tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
    return tmp_path


def run(folder: Path, rung: str, tests: list[str]) -> tuple[int, str]:
    """Run tests of a copy in a process of their own, which decides whether Triton interprets; return its status and what it said."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:benchmark", "-m", "", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": str(int(rung == INTERPRETED))}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_has_one_place(name):
    bug = BUGS[name]
    assert places((KERNELS / bug.file).read_text(), bug.pattern) == 1


@pytest.mark.parametrize("name", quick_first(BUGS))
def test_a_planted_bug_is_found(name, copy):
    bug = BUGS[name]
    path = copy / "fusedmoe" / "kernels" / bug.file
    path.write_text(mutated(path.read_text(), bug.pattern, bug.instead))
    status, said = run(copy, bug.rung, [bug.test])
    # A process that a wild access ends has a negative status; one that pytest cannot run, or that finds no test, has another one.
    assert status < 0 or status == 1, said
    assert re.search(bug.finds, said), said


# `make test` runs them where they stand, too.
@pytest.mark.slow
@pytest.mark.parametrize("rung", [INTERPRETED, EXECUTED])
def test_without_a_bug_the_same_tests_pass(rung, copy):
    tests = sorted({bug.test for bug in BUGS.values() if bug.rung == rung})
    status, said = run(copy, rung, tests)
    assert status == 0 and f"{len(tests)} passed" in said, said
