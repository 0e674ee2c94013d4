"""Systems of the papers as tables against their equations (`systems.py`): outputs and all gradients."""

import pytest
import torch

from fusedmoe.op import fusion_network
from fusedmoe.testing import assert_close, evaluate, expectation

from .random_tables import start
from .systems import SYSTEMS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_its_equations(name, backend, dtype):
    table, plain = SYSTEMS[name]
    names = [p.name for p in table.parameters]

    def by_equations(x, params, _):
        return plain(x, dict(zip(names, params, strict=True))), ()

    given = start(table, 11, dtype)
    ours = evaluate(lambda x, params, table: (fusion_network(x, params, table, backend), ()), given)
    assert_close(ours, expectation(given, by_equations))
