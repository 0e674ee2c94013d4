"""What is done to the inside of a fused layer stops its next call, with the place and the cure."""

import copy

import pytest
import torch
from torch import nn

from fusedmoe import testing
from fusedmoe.nn.wiring import adatt_sp
from fusedmoe.reference import layers
from fusedmoe.swap import fuse, register_adapter, unfuse

from . import swap_cases as edit
from .swap_cases import WIDTHS, D, T, central, sample, smooth_layer


@pytest.fixture
def layer() -> nn.Module:
    return smooth_layer()


CHANGES = {
    edit.hooked: r"experts\.0\.0: has a forward hook",
    edit.pre_hooked: r"gate_weights\.1\.0: has a forward pre-hook",
    edit.backward_hooked: r"experts\.1\.5\.mlp_net\.0: has a backward hook",
    edit.backward_pre_hooked: r"experts\.1\.5: has a backward pre-hook",
    edit.replaced: r"experts\.0: expected the submodules it was fused with",
    edit.unknown_activation: r"experts\.0\.2\.mlp_net: expected the submodules",
    edit.dropout: r"experts\.0\.2\.mlp_net: expected the submodules",
    edit.removed: r"gate_weights\.0: expected the submodules",
    edit.parametrized: r"gate_weights\.0\.1\.0\.weight: is parametrized",
    edit.pruned: r"experts\.1\.0\.mlp_net\.0: has a forward pre-hook",
    edit.root_parametrized: r"self_exp_weights\.0: is parametrized",
    edit.patched: r"experts\.0\.2: has a forward set on the instance",
    edit.switched: r"self_exp_res_connect: expected True, as when it was fused, got False",
    edit.bias_removed: r"experts\.0\.0\.mlp_net\.0\.bias: expected a parameter, got none",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_inside_stops_the_next_call(layer, change):
    model = nn.Sequential(layer)
    fuse(model)
    change(layer)
    with pytest.raises(RuntimeError, match=CHANGES[change]) as raised:
        model(sample(T))
    assert (
        "AdaTTSp" in str(raised.value)
        and "fusedmoe.unfuse(model)" in str(raised.value)
        and "fusedmoe.fuse(model)" in str(raised.value)
    )


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_fusing_again_looks_at_a_changed_layer_anew(layer, change):
    model = nn.Sequential(layer)
    fuse(model)
    change(layer)
    model.eval()
    report = fuse(model)
    assert not report.already and [entry.path for entry in report.fused or report.declined] == ["0"]
    assert bool(report) == (change in (edit.replaced, edit.bias_removed))
    if change is edit.removed:
        # The class cannot run without one of its gates either.
        return
    ours = model(sample(T))
    unfuse(model)
    theirs = model(sample(T))
    assert testing.error(ours, theirs) <= testing.bound(0.0, theirs, torch.float32)


def test_the_slope_of_an_activation_is_watched():
    module = layers.CrossStitch(D, [[4]], T, activation="leaky_relu")
    fuse(module)
    module.experts[0][1].mlp_net[1].negative_slope = 0.3
    with pytest.raises(
        RuntimeError, match=r"experts\.0\.1\.mlp_net\.1\.negative_slope: expected 0\.01, as when it was fused, got 0\.3"
    ):
        module(sample(T))


def test_a_list_edited_in_place_is_noticed():
    module = layers.PLE(D, WIDTHS, T, [1, 2, 1], 1)
    fuse(module)
    module.num_task_experts[0] = 2
    with pytest.raises(RuntimeError, match=r"num_task_experts: expected \[1, 2, 1\]"):
        module(sample(T + 1))


@pytest.fixture
def adapter():
    """Teach the wiring of `Configured`, of which a buffer keeps the built-in adapter away."""
    unregister = register_adapter(lambda module: adatt_sp(smooth_layer()) if isinstance(module, Configured) else None)
    yield
    unregister()


class Configured(layers.AdaTTSp):
    """Reads a number of its class, a dict, tensors, a function and a method, all of which change
    nothing as they are."""

    factor = 1

    def __init__(self):
        super().__init__(D, WIDTHS, T, 2, activation="silu")
        self.options = {"factor": 1, "offsets": [0.0]}
        self.plain = torch.ones(4)
        self.register_buffer("kept", torch.ones(4))
        self.function = nn.Identity.forward

    def forward(self, inputs):
        out = self.function(self, super().forward(inputs))
        return self.after(
            out * self.factor * self.options["factor"] * self.plain * self.kept + self.options["offsets"][0]
        )

    def after(self, out):
        return out


def write(module, name):
    getattr(module, name).mul_(2)


SETTINGS = {
    "a number of the class": (
        lambda module: setattr(module, "factor", 2),
        "factor: expected 1, as when it was fused, got 2",
    ),
    "an item of a dict": (
        lambda module: module.options.update(factor=2),
        r"options: expected \{'factor': 1.*got \{'factor': 2",
    ),
    "a list in a dict": (
        lambda module: module.options["offsets"].append(2.0),
        r"options: expected .*\[0\.0\].*got .*\[0\.0, 2\.0\]",
    ),
    "a tensor replaced": (
        lambda module: setattr(module, "plain", torch.zeros(4)),
        "plain: expected the values of the tensor",
    ),
    "a tensor written to": (lambda module: write(module, "plain"), "plain: expected the values of the tensor"),
    "a tensor removed": (lambda module: setattr(module, "plain", None), "plain: expected the values of the tensor"),
    "a buffer replaced": (
        lambda module: setattr(module, "kept", torch.zeros(4)),
        "kept: expected the values of the tensor",
    ),
    "a buffer written to": (lambda module: write(module, "kept"), "kept: expected the values of the tensor"),
    "a function": (
        lambda module: setattr(module, "function", lambda _, out: out * 2),
        "function: expected the function it was fused with, got function",
    ),
    "a method": (
        lambda module: setattr(module, "after", lambda out: out * 2),
        "after: expected that of the class Configured, got one set on the instance",
    ),
}


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_forward_reads_is_watched(name, copied):
    module = Configured()
    assert fuse(module)
    module = copy.deepcopy(module) if copied else module
    module(sample(T))
    change, message = SETTINGS[name]
    change(module)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            module(sample(T))
    assert not fuse(module).already


@pytest.mark.usefixtures("adapter")
def test_tensors_that_hold_the_same_values_are_no_change():
    module = Configured()
    fuse(module)
    other = copy.deepcopy(module)
    other.load_state_dict(module.state_dict())
    other.plain = other.plain.clone()
    other.double()(sample(T, torch.float64))
    write(other, "kept")
    with pytest.raises(RuntimeError, match="kept: expected the values"):
        other(sample(T, torch.float64))
    module(sample(T))


def test_attributes_that_the_forward_does_not_read_are_free(layer):
    layer.epoch = 1
    fuse(layer)
    layer.epoch = 2
    layer.experts[0][0].note = "seen"
    layer.requires_grad_(False)
    layer(sample(T))


def test_an_inner_layer_fused_before_is_named():
    model = central("ple")
    fuse(model.mtl_arch)
    report = fuse(model)
    assert [entry.path for entry in report.already] == ["mtl_arch"]
    assert "mtl_arch: has a forward set on the instance (FusedForward)" in report.declined[0].reason
