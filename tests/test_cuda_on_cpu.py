"""The emulation of CUDA that the CUDA kernels' tests stand on: small kernels against plain loops, what it refuses, and the bugs that it must find.

What takes a minute or more is left to .ci/run: the sanitizers, most planted bugs and nvcc.
"""

import re

import pytest

from .cuda_on_cpu import planted, run

NO_NVCC = "cuda_on_cpu: expected nvcc in $CUDA_HOME/bin, /usr/local/cuda/bin or on the path, found none"


def slow_but(names, quick) -> list:
    """The names, those that are not quick marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("kind", slow_but(run.KINDS, ("plain",)))
def test_samples_operations_and_misuses(kind):
    if reason := run.missing(kind):
        pytest.skip(reason)
    said = list(run.run(kind))
    assert len(said) == 2 * len(run.SCHEDULES) + 1 and all(line.endswith("checked") for line in said)


@pytest.mark.parametrize("name", planted.BUGS)
def test_a_bug_has_one_place(name):
    assert (run.HERE / "gemm.cu").read_text().count(planted.BUGS[name].text) == 1


@pytest.mark.parametrize("name", slow_but(planted.BUGS, planted.QUICK))
def test_a_planted_bug_is_found(name, tmp_path):
    bug = planted.BUGS[name]
    if reason := run.missing(bug.kind):
        pytest.skip(reason)
    source = tmp_path / "gemm.cu"
    source.write_text((run.HERE / "gemm.cu").read_text().replace(bug.text, bug.instead))
    program = run.build(bug.kind, [source, run.HERE / "operations.cu"], tmp_path)
    result = run.under(program, "samples", *bug.schedule)
    assert result.returncode and re.search(bug.finds, result.stderr), result.stdout + result.stderr


def test_lane_maps_are_those_of_cutlass():
    if not run.toolkit():
        pytest.skip(NO_NVCC)
    if not run.cutlass():
        pytest.skip("cuda_on_cpu: expected the package nvidia-cutlass, whose headers name the lanes, got none")
    result = run.fragments()
    assert result.returncode == 0 and result.stdout.endswith("places checked\n"), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", run.SAMPLES, ids=lambda path: path.stem)
def test_compiled_by_nvcc_for_every_architecture(source):
    if not run.toolkit():
        pytest.skip(NO_NVCC)
    resources = run.resources(source)
    assert {arch for arch, _ in resources} == set(run.ARCHS)
    spilled = {kernel: said for kernel, said in resources.items() if not said.startswith("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")}
    assert spilled == {}


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind: expected one of plain, sanitized, threads, got 'fast'"):
        run.missing("fast")


def test_unknown_copies_are_refused():
    result = run.under(run.build("plain"), "samples", copies="late")
    assert result.returncode == 1 and "FUSEDMOE_CUDA_COPIES: expected lazy or eager, got late" in result.stderr
