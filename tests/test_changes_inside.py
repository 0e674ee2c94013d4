"""What is done to the inside of a fused layer stops its next call, with the place and the cure."""

import pytest
import torch
from torch import nn

from fusedmoe import testing
from fusedmoe.reference import layers
from fusedmoe.swap import fuse, unfuse

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
    assert "AdaTTSp" in str(raised.value) and "fusedmoe.unfuse(model)" in str(raised.value) and "fusedmoe.fuse(model)" in str(raised.value)


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
    with pytest.raises(RuntimeError, match=r"experts\.0\.1\.mlp_net\.1\.negative_slope: expected 0\.01, as when it was fused, got 0\.3"):
        module(sample(T))


def test_a_list_edited_in_place_is_noticed():
    module = layers.PLE(D, WIDTHS, T, [1, 2, 1], 1)
    fuse(module)
    module.num_task_experts[0] = 2
    with pytest.raises(RuntimeError, match=r"num_task_experts: expected \[1, 2, 1\]"):
        module(sample(T + 1))


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
