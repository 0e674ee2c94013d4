"""The emulation of CUDA that the CUDA kernels' tests stand on: small kernels against plain loops,
what it refuses, and the mutants that it must find.

What takes a minute or more is left to .ci/run: the sanitizers, most mutants and nvcc.
"""

import re

import pytest
import torch

from .cuda_on_cpu import executed, run, sample_mutants
from .mutation import mutated, places

NO_NVCC = "cuda_on_cpu: expected nvcc in $CUDA_HOME/bin, /usr/local/cuda/bin or on the path, found none"
# operation_words of samples.h.
OPERATION_WORDS = 55
# Types, as they stand in mangled names, and whether B is [K, N].
GEMMS = [
    (torch.bfloat16, "13__nv_bfloat16", False),
    (torch.bfloat16, "13__nv_bfloat16", True),
    (torch.float16, "6__half", False),
    (torch.float16, "6__half", True),
    (torch.float32, "f", False),
]


def slow_but(names, quick) -> list:
    """The names, those that are not quick marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("kind", slow_but(run.KINDS, ("plain",)))
def test_samples_operations_and_misuses(kind):
    if reason := run.missing(kind):
        pytest.skip(reason)
    said = list(run.run(kind))
    assert len(said) == 2 * len(run.SCHEDULES) + 1 and all(line.endswith("checked") for line in said)


@pytest.mark.parametrize("name", sample_mutants.MUTANTS)
def test_a_mutant_has_one_place(name):
    assert places((run.HERE / "gemm.cu").read_text(), sample_mutants.MUTANTS[name].pattern) == 1


@pytest.mark.parametrize("name", slow_but(sample_mutants.MUTANTS, sample_mutants.QUICK))
def test_a_mutant_is_found(name, tmp_path):
    mutant = sample_mutants.MUTANTS[name]
    if reason := run.missing(mutant.kind):
        pytest.skip(reason)
    source = tmp_path / "gemm.cu"
    source.write_text(mutated((run.HERE / "gemm.cu").read_text(), mutant.pattern, mutant.instead))
    program = run.build(mutant.kind, [source, run.HERE / "operations.cu"], tmp_path)
    result = run.under(program, "samples", *mutant.schedule)
    assert result.returncode and re.search(mutant.finds, result.stderr), result.stdout + result.stderr


def test_lane_maps_are_those_of_cutlass():
    if not run.toolkit():
        pytest.skip(NO_NVCC)
    if not run.cutlass():
        pytest.skip("cuda_on_cpu: expected the package nvidia-cutlass, whose headers name the lanes, got none")
    result = run.fragments()
    assert result.returncode == 0 and result.stdout.endswith("places checked\n"), result.stderr


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    """The sample kernels as nvcc's PTX, by what names them."""
    if not run.toolkit():
        pytest.skip(NO_NVCC)
    return {name: module for source in run.SAMPLES for name, module in executed.kernels(source).items()}


def module_of(modules: dict[str, str], part: str) -> str:
    (name,) = [name for name in modules if part in name]
    return modules[name]


def test_operations_in_ptx(modules, tmp_path):
    """Bit for bit what the emulator's own are held against."""
    numbers = [0x3C00 + 64 * (i * 5 % 7) | (0xBC00 + 64 * (i * 3 % 8)) << 16 for i in range(256)]
    words = torch.zeros(32 * OPERATION_WORDS, dtype=torch.int32)
    tensors = {"from": torch.tensor(numbers, dtype=torch.int64).to(torch.int32), "to": words}
    counts = executed.execute(module_of(modules, "operations_kernel"), 96 * 4 + 512, (1,), tensors)
    assert (counts.mmas, counts.barriers) == (3, 1)
    (tmp_path / "words").write_bytes(words.numpy().tobytes())
    result = run.under(run.build("plain"), "operations", words=tmp_path / "words")
    assert result.stdout == f"{OPERATION_WORDS} operations checked\n", result.stderr


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("dtype", "name", "turned"), GEMMS, ids=lambda value: str(value))
def test_gemm_in_ptx(modules, dtype, name, turned, stages):
    """Numbers, bytes, matrix products and barriers are those of the emulator: the rule of
    test_samples.cpp, on one of its sizes."""
    m, n, k, size = 70, 72, 40, dtype.itemsize
    generator = torch.Generator().manual_seed(stages)
    a = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn((k, n) if turned else (n, k), generator=generator).to(dtype)
    c = torch.full((m, n), torch.nan)
    columns = 64 // size
    stage = 64 * 80 + (columns * (64 * size + 16) if turned else 64 * 80)
    module = module_of(modules, f"gemm_kernelI{name}Li{stages}ELb{int(turned)}E")
    counts = executed.execute(module, max(stages * stage, 64 * 68 * 4), (2, 2), {"a": a, "b": b, "c": c}, (m, n, k))
    x, y = tf32(a), tf32(b if turned else b.T)
    truth = x.double() @ y.double()
    plain = torch.zeros(m, n)
    for column in range(k):
        plain += x[:, column : column + 1] * y[column : column + 1]
    allowed = 2 * (plain - truth).abs().max() + 8 * 2**-24 * truth.abs().max()
    assert (c - truth).abs().max() <= allowed
    steps = -(-k // columns)
    assert (counts.mmas, counts.barriers) == (4 * steps * 64, 4 * (steps + 2))
    assert (counts.read, counts.written) == ({"a": 2 * a.nbytes, "b": 2 * b.nbytes}, {"c": c.nbytes})


def tf32(x: torch.Tensor) -> torch.Tensor:
    """16-bit numbers as they are, others rounded to tf32, ties away from zero."""
    return x.float() if x.dtype.itemsize == 2 else (x.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("source", run.SAMPLES, ids=lambda path: path.stem)
def test_compiled_by_nvcc_for_every_architecture(source):
    if not run.toolkit():
        pytest.skip(NO_NVCC)
    resources = run.resources(source)
    assert {arch for arch, _ in resources} == set(run.ARCHS)
    spilled = {
        kernel: said
        for kernel, said in resources.items()
        if not said.startswith("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
    }
    assert spilled == {}


@pytest.mark.slow
def test_operations_on_a_device(tmp_path):
    """Or CUDA's error by its name, where there is no driver or no device."""
    if not run.toolkit():
        pytest.skip(NO_NVCC)
    result = run.on_device(tmp_path / "words")
    if result.returncode:
        assert re.fullmatch(
            r"cuda: the launch of operations failed with cudaError(InsufficientDriver|NoDevice) \(.+\)\n", result.stderr
        )
        return
    checked = run.under(run.build("plain"), "operations", words=tmp_path / "words")
    assert checked.stdout == f"{OPERATION_WORDS} operations checked\n", checked.stderr


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind: expected one of plain, sanitized, threads, got 'fast'"):
        run.missing("fast")


def test_unknown_copies_are_refused():
    result = run.under(run.build("plain"), "samples", copies="late")
    assert result.returncode == 1 and "FUSEDMOE_CUDA_COPIES: expected lazy or eager, got late" in result.stderr
