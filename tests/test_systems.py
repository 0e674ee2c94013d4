"""Systems of the papers as tables against their equations (`systems.py`): outputs and all gradients."""

import pytest
import torch

from fusedmoe.backends import INTERPRETED
from fusedmoe.op import fusion_network
from fusedmoe.testing import assert_close, evaluate, expectation

from .cuda_on_cpu.extension import KIND
from .random_tables import start
from .systems import SYSTEMS

FUSED = ("triton",) if INTERPRETED else ("cuda",) if KIND else ("cpu", "reference")
DTYPES = [torch.float32, torch.bfloat16] if INTERPRETED or KIND else [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_is_its_equations(system, backend, dtype):
    table, plain = SYSTEMS[system]
    names = [p.name for p in table.parameters]

    def by_equations(x, params, _):
        return plain(x, dict(zip(names, params, strict=True))), ()

    given = start(table, 11, dtype)
    ours = evaluate(lambda x, params, table: (fusion_network(x, params, table, backend), ()), given)
    assert_close(ours, expectation(given, by_equations))
