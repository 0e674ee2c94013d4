"""`fuse` and the modules of `fusedmoe.nn` check a layer's table once, bind it once, and look for
what stands inside once."""

import pytest

from fusedmoe import nn as fused
from fusedmoe import testing
from fusedmoe.nn import binding
from fusedmoe.nn.binding import Binding
from fusedmoe.reference import layers
from fusedmoe.reference.layers.central import BACKBONES
from fusedmoe.swap import fuse
from fusedmoe.table import Table

from .swap_cases import LAYERS, WIDTHS, D, T, central


@pytest.fixture
def counts(monkeypatch) -> dict[str, int]:
    """How often a table was checked, a binding was made and `interceptions` was asked."""
    found = {"tables": 0, "bindings": 0, "looks inside": 0}

    def count(owner: object, attribute: str, word: str) -> None:
        original = getattr(owner, attribute)

        def counted(*arguments, **named):
            found[word] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, attribute, counted)

    count(Table, "__post_init__", "tables")
    count(Binding, "__init__", "bindings")
    count(binding, "interceptions", "looks inside")
    return found


ONCE = {"tables": 1, "bindings": 1, "looks inside": 1}
CASES = {
    **{name: make for name, (make, _) in LAYERS.items()},
    **{f"central {name}": lambda name=name: central(name) for name in BACKBONES},
}


@pytest.mark.parametrize("name", CASES)
def test_fuse_does_each_once(name, counts):
    layer = CASES[name]()
    testing.randomise(layer.parameters(), seed=1)
    report = fuse(layer)
    assert report and name.startswith((report.fused[0].family, "silu"))
    assert counts == ONCE


def test_a_layer_that_two_families_fit_is_bound_once(counts):
    """PLE of one level has the structure of CGC: the probe tells them apart."""
    assert fuse(layers.PLE(D, [[4]], T, 2, 1)).fused[0].family == "ple"
    assert counts == {**ONCE, "tables": 2}


OURS = {
    "SharedBottom": lambda: fused.SharedBottom(D, [5, 4], T),
    "MLMMoE": lambda: fused.MLMMoE(D, WIDTHS, [[3], []], T, 4),
    "CGC": lambda: fused.CGC(D, [5, 4], T, 2, 1),
    "AdaTT": lambda: fused.AdaTT(D, WIDTHS, T, 2, num_task_experts=2),
    "CentralTaskArch": lambda: fused.CentralTaskArch(
        layers.MtlConfigs("att_g", 2, 2, WIDTHS), layers.ArchInputs(T, [3]), D
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_a_module_of_ours_does_each_once(name, counts):
    OURS[name]()
    assert counts == ONCE
