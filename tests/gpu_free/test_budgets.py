"""What the compilers make of the shipped tiles: no figure worse than the one checked in, and what
these must be for every architecture."""

import pytest
import torch

from fusedmoe.testing import build

pytest.importorskip("triton", reason="gpu_free: expected the package triton, which compiles without a device, got none")

import triton

from fusedmoe.kernels import tiles
from fusedmoe.kernels.lowering import inline_hidden, lower

from . import budgets
from .compiled import ARCHS, LIMITS
from .launches import variants

VERSIONS = tuple(budgets.budgets())
# Those of the Triton that runs; of any other that has none, the newest's, with which it is not
# compared.
KEPT = budgets.budgets().get(triton.__version__, budgets.budgets()[VERSIONS[0]])
BY_NAME = {(case, arch): figures for case, of in KEPT.items() for arch, figures in of.items()}
QUICK_ARCH = "sm_90"
# The most bytes of a thread in local memory, but by the newest Triton in bfloat16 on NVIDIA's GPUs,
# where it is none.
STACK = 64
# More of them, and why. They had all 255 registers and no more where the bias was added inside the
# `if`, which Triton 3.6 does not take (`biased`).
OUTSIDE = "16 bytes, for the bias that is added outside an if"
# The tiles are chosen for 3.9, where they fit.
TCGEN05 = "Triton 3.6 wants a third to a half more shared memory for tcgen05, and more registers; not looked into"
REASONS: dict[tuple[str, str, str], str] = {
    ("3.9.0", "forward of AdaTT T3m2, inference, 4096 rows, bfloat16", "sm_100"): OUTSIDE,
    ("3.9.0", "forward of PLE T3m2s1, inference, 4096 rows, bfloat16", "sm_80"): OUTSIDE,
} | {
    ("3.6.0", f"forward of {case}", "sm_100"): TCGEN05
    for case in (
        "AdaTT T3m2, inference, 4096 rows, bfloat16",
        "AdaTT T3m2, inference, 4096 rows, float16",
        "AdaTT T3m2 with every record, training, 4096 rows, bfloat16",
    )
}


def jobs() -> list:
    """Every case and architecture, all but one architecture in bfloat16 slow."""
    quick = {name for name in BY_NAME if name[1] == QUICK_ARCH and name[0].endswith("bfloat16")}
    return [
        pytest.param(*name, id=f"{name[1]}-{name[0]}", marks=() if name in quick else pytest.mark.slow)
        for name in BY_NAME
    ]


@pytest.mark.parametrize(("case", "arch"), jobs())
def test_no_figure_got_worse(case, arch):
    if triton.__version__ not in VERSIONS:
        pytest.skip(
            f"budgets: expected Triton {' or '.join(VERSIONS)}, whose figures they are, got {triton.__version__}"
        )
    found = {str(one): one for one in budgets.cases(arch)}
    assert budgets.worse(case, arch, KEPT[case][arch], budgets.figures(found[case], arch)) == []


@pytest.mark.parametrize("arch", ARCHS)
def test_the_cases_are_those_of_the_shipped_tiles(arch):
    assert [str(case) for case in budgets.cases(arch)] == [case for case, of in KEPT.items() if arch in of], (
        "run python tests/gpu_free/budgets.py --write"
    )


def test_local_memory():
    """By the newest Triton none in bfloat16 on NVIDIA's GPUs, little elsewhere; a reason that no
    longer holds must go."""
    every = budgets.budgets().items()
    found = {
        (version, case, arch): one for version, kept in every for case, of in kept.items() for arch, one in of.items()
    }
    spared = {
        name for name in found if name[0] == VERSIONS[0] and name[1].endswith("bfloat16") and name[2].startswith("sm_")
    }
    assert {name for name, figures in found.items() if figures["stack"] > (0 if name in spared else STACK)} == set(
        REASONS
    )


def test_shared_memory_fits():
    assert [
        name
        for name, figures in BY_NAME.items()
        if figures["shared"] > LIMITS[name[1]].block or not figures["occupancy"]
    ] == []


def test_products_run_on_tensor_cores():
    """Every kernel but the sum of chunks and row-wise operations has them; at 64 rows of bfloat16 those of the
    architecture."""
    best = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "tcgen05", "sm_120": "HMMA", "gfx942": "MFMA"}
    found = {n: figures["mma"] for n, figures in BY_NAME.items() if not n[0].startswith(("add_chunks", "rowwise"))}
    assert [name for name, mma in found.items() if mma not in (best[name[1]], "HMMA")] == []
    large = {name: mma for name, mma in found.items() if "4096 rows, bfloat16" in name[0]}
    assert large and [name for name, mma in large.items() if mma != best[name[1]]] == []


@pytest.mark.parametrize("figure", ["registers", "stack", "shared", "mma", "occupancy"])
def test_a_worse_figure_is_noticed(figure):
    case = next(case for case in budgets.cases(QUICK_ARCH) if case.kernel == "add_chunks")
    got = budgets.figures(case, QUICK_ARCH)
    doctored = "HGMMA" if figure == "mma" else got[figure] + (1 if figure == "occupancy" else -1)
    faults = budgets.worse(str(case), QUICK_ARCH, {**got, figure: doctored}, got)
    assert faults == [f"{case}, {QUICK_ARCH}: {figure}: budget {doctored}, got {got[figure]}"]


def test_a_better_figure_is_none():
    got = next(iter(BY_NAME.values()))
    assert budgets.worse("", "", {**got, "registers": got["registers"] + 1, "occupancy": 0.0}, got) == []


def test_figures_are_written_as_they_are_read():
    for version, kept in budgets.budgets().items():
        path = budgets.path_of(version)
        assert path.read_text() == budgets.written("triton", version, kept, ARCHS)


TABLES = {
    **{name: budgets.table_of(name) for name in budgets.LAYERS},
    # Widths that are no multiples of vectors, so that launches store differently.
    "odd widths": build("adatt_sp", 24, [[20], [12]], 2, 2, towers=(6, 1)),
}
# Kernels of a table and dtype over every batch, in inference and in training each.
MOST_VARIANTS = 3
MOST_ROWS = 16384


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_few_kernels_serve_every_batch(name, dtype, training):
    """Tiles, for each number of rows; and what launches compile, by Triton's own specialization,
    for numbers of rows of every divisibility."""
    table = TABLES[name]
    program = lower(table) if training else inline_hidden(table)
    chosen = {tiles.choose(program, dtype, rows, QUICK_ARCH) for rows in range(1, MOST_ROWS + 1)}
    assert {(one.whole, one.rows) for one in chosen} <= {(True, 16), (False, 64), (False, 128)} and len(
        chosen
    ) <= MOST_VARIANTS
    rows = {near for power in range(15) for near in range((1 << power) - 2, (1 << power) + 3) if 1 <= near <= MOST_ROWS}
    found = {one for n in sorted(rows | {16, 48, 1000, 1008, 10000}) for one in variants(table, dtype, n, training)}
    kernels = [one.kernel for one in found]
    assert {kernel: kernels.count(kernel) for kernel in kernels if kernels.count(kernel) > MOST_VARIANTS} == {}


@pytest.mark.slow
def test_three_kernels_serve_every_single_batch():
    """As above, each number of rows."""
    found = {
        one for rows in range(1, MOST_ROWS + 1) for one in variants(TABLES["AdaTT T3m2"], torch.bfloat16, rows, True)
    }
    assert sorted(one.kernel for one in found) == [
        "add_chunks",
        *["backward_rows"] * 2,
        *["forward"] * 3,
        *["gradients"] * 2,
    ]
