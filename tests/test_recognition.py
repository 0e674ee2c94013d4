"""What fuse recognises, and what it declines, with the reason."""

import copy
import re

import pytest
import torch
from torch import nn

from fusedmoe import nn as fused_nn
from fusedmoe import testing
from fusedmoe.adapters import FusedForward
from fusedmoe.swap import fuse, unfuse

from . import swap_cases as edit
from .swap_cases import LAYERS, B, D, T, assert_same, central, everything, sample, smooth_layer


@pytest.fixture
def layer() -> nn.Module:
    return smooth_layer()


@pytest.mark.parametrize("name", LAYERS)
def test_a_fused_layer_computes_what_its_class_computes(name):
    make, slots = LAYERS[name]
    eager = make()
    testing.randomise(eager.parameters(), seed=1)
    fused = copy.deepcopy(eager)
    report = fuse(fused)
    assert [entry.path for entry in report.fused] == [""] and not report.declined, str(report)
    assert report.fused[0].family == name.split(" ")[0].replace("silu", "adatt_sp")
    assert isinstance(fused.__dict__["forward"], FusedForward)
    assert_same(fused, eager, sample(slots))


def test_the_outermost_layer_wins_and_every_path_is_named():
    model = nn.Sequential(nn.Linear(D, D), central("att_g"))
    report = fuse(model)
    assert [(entry.path, entry.family) for entry in report.fused] == [("1", "central")]
    assert "forward" not in model[1].mtl_arch.__dict__


def test_towers_that_cannot_be_fused_leave_the_backbone_to_be_fused():
    model = central("ple")
    model.task_modules[1].append(nn.Dropout(0.1))
    report = fuse(model)
    assert [(entry.path, entry.family) for entry in report.fused] == [("mtl_arch", "ple")]
    assert [(entry.path, entry.module) for entry in report.declined] == [("", "CentralTaskArch")]
    assert "task_modules.1.2" in report.declined[0].reason and "Dropout" in report.declined[0].reason


def test_a_central_arch_returns_a_list_whose_items_may_be_changed_in_place():
    model = central("ple")
    fuse(model)
    out = model(sample(None))
    assert type(out) is list and [list(item.shape) for item in out] == [[B, 1]] * T
    others = [item.detach().clone() for item in out[1:]]
    out[0].mul_(2)
    assert all(torch.equal(item, other) for item, other in zip(out[1:], others, strict=True))
    sum(item.sum() for item in out).backward()
    assert all(parameter.grad is not None for parameter in model.task_modules.parameters())


def test_a_shared_submodule_is_fused_once(layer):
    model = nn.ModuleDict({"a": layer, "b": layer})
    report = fuse(model)
    assert [entry.path for entry in report.fused] == ["a"]
    unfuse(model)
    assert "forward" not in layer.__dict__


def test_modules_of_ours_count_as_fused():
    model = nn.Sequential(fused_nn.MMoE(D, [4], [], T, 2))
    report = fuse(model)
    assert not report and not report.declined
    assert [(entry.path, entry.family, entry.backend) for entry in report.already] == [("0", "mmoe", "auto (cpu)")]


DECLINED = {
    edit.hooked: r"experts\.0\.0: has a forward hook \(hooked\.<locals>\.<lambda>\)",
    edit.parametrized: r"gate_weights\.0\.1\.0\.weight: is parametrized",
    edit.weight_normed: r"experts\.0\.0\.mlp_net\.0\.weight: is parametrized",
    edit.pruned: r"experts\.1\.0\.mlp_net\.0: has a forward pre-hook \(L1Unstructured\)",
    edit.root_parametrized: r"self_exp_weights\.0: is parametrized",
    edit.unknown_activation: r"experts\.0\.2\.mlp_net\.1: .*Hardswish",
    edit.dropout: r"experts\.0\.2\.mlp_net\.\d: .*Dropout",
    edit.batch_norm: r"experts\.0\.2\.mlp_net\.1: .*BatchNorm1d",
    edit.patched: r"experts\.0\.2: has a forward set on the instance \(function\)",
    edit.patched_itself: r"it has a forward of its own set on the instance",
    edit.mixed_dtypes: (
        r"gate_weights\.1\.0\.0\.weight: expected torch\.float32 on cpu as experts\S+, got torch\.float64 "
        r"on cpu"
    ),
    edit.complex: r"experts\.0\.0\.mlp_net\.0\.weight: .*complex64",
    edit.meta: r"experts\.0\.0\.mlp_net\.0\.weight: has no data yet \(meta device\)",
    edit.subclass: r"experts\.0\.0\.mlp_net\.0\.bias: expected an ordinary parameter, got Special",
    edit.extra_parameter: r"temperature",
    edit.other_gate: r"gate_weights\.0\.0: .*[Ss]oftmax",
    edit.other_count: r"experts",
}


@pytest.mark.parametrize("spoil", DECLINED, ids=lambda spoil: spoil.__name__)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_what_cannot_be_fused_exactly_stays_and_says_why(layer, spoil):
    spoil(layer)
    model = nn.ModuleDict({"tower": nn.Linear(2, 2), "arch": layer})
    before = everything(model)
    report = fuse(model)
    assert not report and not report.already
    assert [entry.path for entry in report.declined] == ["arch"]
    assert re.search(DECLINED[spoil], report.declined[0].reason), report.declined[0].reason
    assert everything(model) == before


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DistributedDataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("word", WRAPPERS)
def test_nothing_is_fused_under_a_wrapper_that_would_not_see_it(layer, word):
    report = fuse(WRAPPERS[word](layer))
    assert not report and [word in entry.reason for entry in report.declined] == [True]
    assert "forward" not in layer.__dict__


def test_nothing_is_fused_in_a_module_compiled_in_place(layer):
    layer.compile(backend="eager")
    assert "compiled" in fuse(layer).declined[0].reason


def test_flat_experts_are_a_near_miss():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(D, 4) for _ in range(3))
            self.gates = nn.ModuleList(nn.Linear(D, 3) for _ in range(2))

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(D, 4) for _ in range(3))
            self.router = nn.Linear(D, 3)

    report = fuse(nn.ModuleDict({"flat": Flat(), "routed": Routed()}))
    assert not report and [entry.path for entry in report.declined] == ["flat", "routed"]
    assert "mmoe" in report.declined[0].reason and "register_adapter" in report.declined[1].reason


def test_a_model_without_layers_says_so():
    report = fuse(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert not report and not report.declined and "no layer of this model was recognised" in str(report)


def test_a_report_reads_as_a_list(layer):
    spoiled = copy.deepcopy(layer)
    edit.hooked(spoiled)
    model = nn.ModuleDict({"good": layer, "bad": spoiled})
    text = str(fuse(model, backend="reference"))
    assert text.splitlines()[:3] == ["fused: 1", "  good: AdaTTSp as adatt_sp, backend reference", "declined: 1"]
    assert text.splitlines()[3].startswith("  bad: AdaTTSp: experts.0.0: has a forward hook")
