"""The CUDA kernels on the emulated device under the sanitizers, and with mutants, each of which an
ordinary test finds.

Every run is a process of its own: the emulated extension, and a sanitizer's library, take their
place at its start.
"""

import re
import subprocess
import sys

import pytest

from .cuda_on_cpu import extension, mutants, run
from .mutation import names_a_test, places

MATRIX = "tests/cuda_on_cpu/emulated/test_matrix.py::test_matrix"
ROWWISE = "tests/cuda_on_cpu/emulated/test_rowwise.py::test_tables"
MUTANTS = mutants.MUTANTS


def result_of(test: str, environment: dict[str, str], *more: str) -> subprocess.CompletedProcess:
    """Run a test, slow or not. What a sanitizer says at the end of the process is not captured."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-s",
        "--tb=short",
        "-p",
        "no:benchmark",
        "-p",
        "no:cacheprovider",
        "-m",
        "",
        test,
        *more,
    ]
    return subprocess.run(command, cwd=run.ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [(0, "eager"), (1, "lazy")], ids=str)
@pytest.mark.parametrize("kind", ["sanitized", "threads"])
def test_sanitizers_find_nothing(kind, schedule):
    if reason := run.missing(kind):
        pytest.skip(reason)
    extension.build(kind)
    # One dtype and form of the row-wise operations: all of them take a quarter of an hour.
    for arguments in ((MATRIX,), (ROWWISE, "-k", "float32 and level")):
        result = result_of(arguments[0], extension.environment(kind, *schedule), *arguments[1:])
        assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_has_one_place(name):
    assert places((run.ROOT / "csrc" / "cuda" / MUTANTS[name].file).read_text(), MUTANTS[name].pattern) == 1
    assert names_a_test(MUTANTS[name].test)


@pytest.mark.parametrize(
    "name", [name if name in mutants.QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS]
)
def test_a_mutant_is_found(name, tmp_path):
    mutant = MUTANTS[name]
    if reason := run.missing(mutant.kind):
        pytest.skip(reason)
    library = mutants.built(mutant, tmp_path)
    result = result_of(mutant.test, extension.environment(mutant.kind, *mutant.schedule, library))
    said = result.stdout + result.stderr
    # A process that a wild access ends has a negative status; one that pytest cannot run, or that
    # finds no test, has 2, 4 or 5.
    assert result.returncode not in (0, 2, 4, 5), said
    assert re.search(mutant.finds, said), said
