"""Each mutant of `mutants.py` makes its test fail in the way that is expected, in a copy of the
package whose kernels have that mutant and no other."""

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

from ..mutation import mutated, names_a_test, places
from .mutants import EXECUTED, INTERPRETED, MUTANTS, QUICK

PACKAGE, KERNELS, TESTS = Path(fusedmoe.__file__).parent, Path(kernels.__file__).parent, Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns("__pycache__", "kernels")


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
    """Run tests of a copy in a process of their own, which decides whether Triton interprets;
    return its status and what it said."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:benchmark", "-m", "", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": str(int(rung == INTERPRETED))}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_has_one_place(name):
    mutant = MUTANTS[name]
    assert places((KERNELS / mutant.file).read_text(), mutant.pattern) == 1
    assert names_a_test(mutant.test)


@pytest.mark.parametrize("name", quick_first(MUTANTS))
def test_a_mutant_is_found(name, copy):
    mutant = MUTANTS[name]
    path = copy / "fusedmoe" / "kernels" / mutant.file
    path.write_text(mutated(path.read_text(), mutant.pattern, mutant.instead))
    status, said = run(copy, mutant.rung, [mutant.test])
    # A process that a wild access ends has a negative status; one that pytest cannot run, or that
    # finds no test, has another one.
    assert status < 0 or status == 1, said
    assert re.search(mutant.finds, said), said


# `make test` runs them where they stand, too.
@pytest.mark.slow
@pytest.mark.parametrize("rung", [INTERPRETED, EXECUTED])
def test_without_a_mutant_the_same_tests_pass(rung, copy):
    tests = sorted({mutant.test for mutant in MUTANTS.values() if mutant.rung == rung})
    status, said = run(copy, rung, tests)
    assert status == 0 and f"{len(tests)} passed" in said, said
