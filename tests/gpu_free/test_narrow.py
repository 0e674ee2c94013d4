"""Networks that are narrower than those of the budgets: their sources are one tile of products,
which is other code."""

import pytest
import torch

from fusedmoe.families import adatt_sp, mmoe, ple

from .compiled import compile_for
from .launches import kernel_of, variants

TABLES = {
    "adatt_sp": adatt_sp(16, [[16], [16]], 2, 2),
    "adatt_sp with towers": adatt_sp(16, [[16], [16]], 2, 2, towers=(16, 1)),
    "mmoe": mmoe(32, [[32]], 2, 4),
    "ple": ple(64, [[32], [32]], 2, 1, 1, towers=(8, 1)),
    "mmoe of two layers": mmoe(64, [[64, 32]], 3, 3, towers=(16, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_narrow_networks_compile_without_local_memory(table):
    """Triton 3.6 crashed on each of them for sm_90, from 257 rows on."""
    found = {
        variant: None
        for rows in (300, 4096)
        for training in (False, True)
        for variant in variants(table, torch.bfloat16, rows, training)
    }
    for variant in found:
        compiled = compile_for(
            kernel_of(variant), dict(variant.signature), dict(variant.constants), "sm_90", variant.warps
        )
        assert compiled.stack == 0, (variant.kernel, dict(variant.constants))
    assert {variant.kernel for variant in found} >= {"forward", "backward_rows", "gradients"}
