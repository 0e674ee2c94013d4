"""What nvcc makes of the CUDA kernels: no figure worse than the one checked in, no stack, no
spills, and registers for the blocks that are planned."""

import json

import pytest

pytest.importorskip("triton", reason="gpu_free: expected the package triton, which compiles without a device, got none")

from . import cuda_budgets
from .budgets import written
from .compiled import LIMITS

KEPT = cuda_budgets.budgets()
BY_NAME = {(name, arch): figures for name, of in KEPT.items() for arch, figures in of.items()}
# One file for one architecture; nvcc takes half a minute for each.
QUICK = ("forward_float32", "sm_80")
NO_NVCC = "cuda: expected nvcc in $CUDA_HOME/bin, /usr/local/cuda/bin or on the path, found none"
JOBS = [
    pytest.param(source, arch, id=f"{arch}-{source}", marks=() if (source, arch) == QUICK else pytest.mark.slow)
    for arch in cuda_budgets.ARCHS
    for source in cuda_budgets.SOURCES
]


@pytest.mark.parametrize(("source", "arch"), JOBS)
def test_no_figure_got_worse(source, arch):
    if cuda_budgets.nvcc() is None:
        pytest.skip(NO_NVCC)
    if cuda_budgets.nvcc() != cuda_budgets.written_by():
        pytest.skip(
            f"budgets: expected nvcc {cuda_budgets.written_by()}, whose figures they are, got {cuda_budgets.nvcc()}"
        )
    assert cuda_budgets.faults(source, arch, KEPT) == []


def test_every_file_has_budgets_for_every_architecture():
    assert {(cuda_budgets.source_of(name), arch) for name, arch in BY_NAME} == {
        (s, a) for s in cuda_budgets.SOURCES for a in cuda_budgets.ARCHS
    }


def test_no_stack_and_no_spills():
    assert [name for name, figures in BY_NAME.items() if figures["stack"] or figures["spills"]] == []


def test_registers_suffice_for_the_blocks_that_are_planned():
    """128 for two blocks of eight warps a multiprocessor, or four of four; 85 for three of eight, 64 for four and
    51 for five of row-wise operations."""
    assert [name for name, figures in BY_NAME.items() if figures["registers"] > figures["most"]] == []
    assert {figures["most"] for figures in BY_NAME.values()} == {51, 64, 85, 128, 256}
    assert all("1 blocks" in name for (name, _), figures in BY_NAME.items() if figures["most"] > 128)


def test_shared_memory_fits():
    assert [
        name
        for name, figures in BY_NAME.items()
        if figures["shared"] > LIMITS[name[1].rstrip("a")].block or not figures["occupancy"]
    ] == []


def test_products_run_on_tensor_cores():
    dense = {figures["mma"] for (name, _), figures in BY_NAME.items() if not name.startswith("rowwise")}
    assert dense == {"HMMA"}


def test_a_worse_figure_is_noticed():
    (name, arch), got = next(iter(BY_NAME.items()))
    for figure in ("registers", "stack", "spills", "shared"):
        assert cuda_budgets.worse(name, arch, {**got, figure: got[figure] - 1}, got) == [
            f"{name}, {arch}: {figure}: budget {got[figure] - 1}, got {got[figure]}"
        ]


def test_figures_are_written_as_they_are_read():
    assert json.loads(written("nvcc", cuda_budgets.written_by(), KEPT, cuda_budgets.ARCHS))["cases"] == KEPT
