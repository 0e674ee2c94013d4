"""register_adapter: teach fuse a layer, decline one, say something wrong."""

import copy
import functools
import pickle

import pytest
from torch import nn

from fusedmoe import families, testing
from fusedmoe.adapters import Match, Unfusable, Wiring
from fusedmoe.nn.wiring import adatt_sp
from fusedmoe.reference import layers
from fusedmoe.swap import fuse, register_adapter

from .swap_cases import D, assert_same, everything, sample, smooth_layer


@pytest.fixture
def layer() -> nn.Module:
    return smooth_layer()


class TwoExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.gate = nn.Linear(D, 4), nn.Linear(D, 4), nn.Linear(D, 2)

    def forward(self, x):
        p = self.gate(x).softmax(-1)
        return p[:, :1] * self.left(x) + p[:, 1:] * self.right(x)


def first(out):
    return out[:, 0]


def two_experts(module):
    if type(module).__name__ != "TwoExperts":
        return None
    table = families.mmoe(
        module.left.in_features, [[module.left.out_features]], num_tasks=1, num_experts=2, activation="identity"
    )
    keys = ("left.weight", "left.bias", "right.weight", "right.bias", "gate.weight", "gate.bias")
    return Match("two experts", Wiring(table, keys), 2, first)


@pytest.fixture
def adapter():
    """Register functions for the length of a test."""
    taken_out = []
    yield lambda function: taken_out.append(register_adapter(function))
    for unregister in taken_out:
        unregister()


def test_an_adapter_teaches_a_layer(adapter):
    assert not fuse(TwoExperts())
    adapter(two_experts)
    model = nn.Sequential(TwoExperts())
    testing.randomise(model.parameters(), seed=1)
    eager = copy.deepcopy(model)
    assert [entry.family for entry in fuse(model).fused] == ["two experts"]
    assert_same(model, eager, sample(None))
    assert_same(pickle.loads(pickle.dumps(model)), eager, sample(None))


def test_an_unregistered_adapter_is_gone():
    unregister = register_adapter(two_experts)
    unregister()
    assert not fuse(TwoExperts())


def test_unregistering_twice_is_as_good_as_once(adapter):
    unregister = register_adapter(two_experts)
    unregister()
    unregister()
    assert not fuse(TwoExperts())


class Teacher:
    def __call__(self, module):
        return adatt_sp(module) if isinstance(module, layers.AdaTTSp) else None


@pytest.mark.parametrize(
    ("function", "family"),
    [(functools.partial(Teacher()), "Teacher"), (functools.partial(adatt_sp), "adatt_sp"), (Teacher(), "Teacher")],
)
def test_an_adapter_may_be_any_callable(adapter, layer, function, family):
    adapter(function)
    assert fuse(layer).fused[0].family == family


def test_what_an_adapter_raises_names_it_and_the_module(adapter):
    def clumsy(module):
        return {}[type(module).__name__]

    adapter(clumsy)
    model = nn.Sequential(TwoExperts())
    before = everything(model)
    with pytest.raises(RuntimeError, match="adapter clumsy raised KeyError on a Sequential: 'Sequential'"):
        fuse(model)
    assert everything(model) == before


def test_adapters_come_before_the_built_in_one(adapter, layer):
    adapter(lambda module: adatt_sp(module) if isinstance(module, layers.AdaTTSp) else None)
    assert fuse(layer).fused[0].family == "<lambda>"


def test_an_adapter_may_decline(adapter, layer):
    def cautious(module):
        if isinstance(module, layers.AdaTTSp):
            raise Unfusable("not today")

    adapter(cautious)
    assert fuse(layer).declined[0].reason == "not today"


def test_what_an_adapter_says_is_probed(adapter):
    adapter(
        lambda module: (
            (found := two_experts(module))
            and found._replace(
                wiring=found.wiring._replace(
                    keys=(*found.wiring.keys[2:4], *found.wiring.keys[:2], *found.wiring.keys[4:])
                )
            )
        )
    )
    assert "computes something else" in fuse(TwoExperts()).declined[0].reason


def test_an_adapter_with_wrong_keys_is_declined_with_the_key(adapter):
    adapter(
        lambda module: (
            (found := two_experts(module))
            and found._replace(wiring=found.wiring._replace(keys=("up.weight", *found.wiring.keys[1:])))
        )
    )
    assert "up.weight" in fuse(TwoExperts()).declined[0].reason


def test_a_wrong_adapter_is_an_error(adapter):
    with pytest.raises(TypeError, match="expected a function of a module, got int"):
        register_adapter(3)
    adapter(two_experts)
    with pytest.raises(ValueError, match="registered already"):
        register_adapter(two_experts)
    model = TwoExperts()
    before = everything(model)
    adapter(lambda module: 3)
    with pytest.raises(TypeError, match="expected a Wiring, a Match or None, got int"):
        fuse(model)
    assert everything(model) == before


class TextbookMMoE(nn.Module):
    """One list of experts and one of gates, not one of levels."""

    def __init__(self):
        super().__init__()
        self.num_tasks = self.num_experts = 2
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 4), nn.ReLU()) for _ in range(2))
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(D, 2), nn.Softmax(-1)) for _ in range(2))


def test_one_reason_stands_once_with_every_family_and_the_cure():
    assert fuse(TextbookMMoE()).declined[0].reason == (
        "mmoe, omoe, ml_mmoe: gates.0: expected an nn.ModuleList, got Sequential; "
        "fusedmoe.register_adapter can teach its wiring"
    )
