"""The wiring: what it reads off a layer, and its refusal of what a table cannot express."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fusedmoe.activation import DEFAULT_PARAMETER, IDENTITY, PARAMETRIC, RELU, Activation, activation
from fusedmoe.nn import wiring
from fusedmoe.nn.wiring import Unfusable
from fusedmoe.parts import Linear, Op
from fusedmoe.reference import layers
from fusedmoe.reference.layers.central import BACKBONES
from fusedmoe.reference.layers.mlp import ACTIVATION_MODULES, activation_module

D = 7
ARCHS = [[6, 5], [4]]


def test_every_backbone_has_a_wiring():
    assert set(wiring.BACKBONES) == set(BACKBONES)


def ops_of(stack: nn.Module) -> tuple[Op, ...]:
    """The ops that the wiring reads from a stack of modules."""
    return wiring._stack(wiring._steps(stack, "")).ops


def test_the_wiring_reads_every_activation_that_the_layers_build():
    assert set(ACTIVATION_MODULES) == set(DEFAULT_PARAMETER)
    kinds = [activation(name) for name in DEFAULT_PARAMETER] + [Activation(name, 0.3) for name in PARAMETRIC]
    for kind in kinds:
        assert ops_of(nn.Sequential(nn.Linear(5, 4), activation_module(kind))) == tuple(
            op for op in (Linear(4), kind) if op != IDENTITY
        )
    assert {type(activation_module(kind)) for kind in kinds} == set(wiring.ACTIVATIONS)


def test_layers_of_reads_widths_biases_and_activations():
    shared = nn.ReLU()
    stack = nn.Sequential(nn.Linear(5, 4), shared, nn.Linear(4, 3, bias=False), nn.Linear(3, 2), shared, nn.Identity())
    assert ops_of(stack) == (Linear(4), RELU, Linear(3, False), Linear(2), RELU)
    kinds = {
        nn.LeakyReLU(0.2): Activation("leaky_relu", 0.2),
        nn.ELU(0.7): Activation("elu", 0.7),
        nn.GELU(): Activation("gelu"),
        nn.GELU(approximate="tanh"): Activation("gelu_tanh"),
        nn.Softplus(): Activation("softplus"),
        nn.Sigmoid(): Activation("sigmoid"),
        nn.Tanh(): Activation("tanh"),
        nn.SiLU(): Activation("silu"),
    }
    for module, kind in kinds.items():
        assert ops_of(nn.Sequential(nn.Linear(5, 4), module)) == tuple(op for op in (Linear(4), kind) if op != IDENTITY)


STRANGE = {
    "dropout": (
        nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5)),
        "1: expected nn.Linear or an activation that the operator has, got Dropout(p=0.5",
    ),
    "another softplus": (
        nn.Sequential(nn.Linear(5, 4), nn.Softplus(beta=2)),
        "1: expected nn.Linear or an activation that the operator has, got Softplus(beta=2",
    ),
    "an activation first": (
        nn.Sequential(nn.ReLU(), nn.Linear(5, 4)),
        "0: expected an nn.Linear before ReLU, got none since the activation before it",
    ),
    "two activations": (
        nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Tanh()),
        "2: expected an nn.Linear before Tanh, got none",
    ),
    "a kind of Linear": (
        nn.Sequential(nn.Bilinear(5, 5, 4)),
        "0: expected nn.Linear or an activation that the operator has, got Bilinear(",
    ),
}


@pytest.mark.parametrize(("stack", "message"), STRANGE.values(), ids=STRANGE)
def test_layers_of_refuses_other_modules_by_name(stack, message):
    with pytest.raises(Unfusable, match=re.escape(message)):
        ops_of(stack)


def adatt_sp() -> nn.Module:
    return layers.AdaTTSp(D, ARCHS, 3, 2)


def changed(module: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(module)
    return module


REFUSED = {
    "a submodule more": (
        wiring.adatt_sp,
        changed(adatt_sp(), lambda m: m.add_module("norm", nn.LayerNorm(4))),
        "AdaTTSp: expected the submodules experts, gate_weights, self_exp_weights, got experts, gate_weights, "
        "self_exp_weights, norm",
    ),
    "a parameter more": (
        wiring.adatt_sp,
        changed(adatt_sp(), lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(1)))),
        "AdaTTSp: expected no parameter or buffer of its own, got scale",
    ),
    "a buffer inside": (
        wiring.adatt_sp,
        changed(adatt_sp(), lambda m: m.experts[0][0].register_buffer("mask", torch.ones(1))),
        "experts.0.0.mask: expected no parameter or buffer besides the table's, got one",
    ),
    "an attribute missing": (
        wiring.adatt_sp,
        changed(adatt_sp(), lambda m: delattr(m, "num_tasks")),
        "AdaTTSp: expected an attribute num_tasks, got none",
    ),
    "another layer": (
        wiring.ple,
        layers.CrossStitch(D, ARCHS, 3),
        "CrossStitch: expected an attribute num_task_experts, got none",
    ),
    "an expert too few": (
        wiring.adatt_sp,
        changed(adatt_sp(), lambda m: m.experts[1].__delitem__(5)),
        "(experts, gates) per level: expected [(6, 3), (6, 3)], got [(6, 3), (5, 3)]",
    ),
    "a level without experts": (
        wiring.adatt_sp,
        changed(adatt_sp(), lambda m: m.experts.append(nn.ModuleList())),
        "experts: expected at least one expert on each level, got [6, 6, 0]",
    ),
    "a weight of another shape": (
        wiring.adatt_sp,
        changed(adatt_sp(), lambda m: setattr(m.gate_weights[1][0][0], "weight", nn.Parameter(torch.ones(6, 9)))),
        "gate_weights.1.0.0.weight: expected the shape [6, 5], got [6, 9]",
    ),
    "no softmax": (
        wiring.adatt_sp,
        changed(adatt_sp(), lambda m: m.gate_weights[0][1].__setitem__(1, nn.Sigmoid())),
        "gate_weights.0.1: expected an nn.Sequential that ends with nn.Softmax(dim=-1), got Sequential",
    ),
    "softmax over rows": (
        wiring.adatt_sp,
        changed(adatt_sp(), lambda m: m.gate_weights[0][1].__setitem__(1, nn.Softmax(dim=0))),
        "gate_weights.0.1: expected an nn.Sequential that ends with nn.Softmax(dim=-1), got Sequential",
    ),
    "an activation before the softmax": (
        wiring.ml_mmoe,
        changed(
            layers.MLMMoE(D, ARCHS, [[], []], 3, 2),
            lambda m: m.gates[0][0].__setitem__(1, nn.Sequential(nn.Linear(D, 2), nn.ReLU())),
        ),
        "gates.0.0: expected an nn.Linear before the softmax, got ReLU",
    ),
    "experts of other widths": (
        wiring.single_task,
        changed(layers.SingleTask(D, [4], 2), lambda m: m.bottoms.__setitem__(1, layers.MLP(D, [5]))),
        "last level: expected one width, got widths [4, 5]",
    ),
    "an identity for an expert": (
        wiring.shared_bottom,
        changed(layers.SharedBottom(D, [4], 2), lambda m: setattr(m, "bottom_projection", layers.MLP(D, []))),
        "bottom_projection: expected at least one nn.Linear, got none",
    ),
    "static weights switched off later": (
        wiring.adatt_sp,
        changed(adatt_sp(), lambda m: setattr(m, "self_exp_res_connect", False)),
        "static weights: expected 0 tensors, got 2",
    ),
    "a stitch with a bias": (
        wiring.cross_stitch,
        changed(layers.CrossStitch(D, ARCHS, 3), lambda m: m.stitchs.__setitem__(1, nn.Linear(3, 3))),
        "stitchs.1: expected an nn.Linear without bias, got Linear(in_features=3, out_features=3, bias=True)",
    ),
    "experts in no list": (
        wiring.mmoe,
        changed(layers.MMoE(D, [4], [], 2, 2), lambda m: m.experts.__setitem__(0, layers.MLP(D, [4]))),
        "experts.0: expected an nn.ModuleList, got MLP",
    ),
    "a backbone that is refused": (
        wiring.central,
        changed(
            layers.CentralTaskArch(layers.MtlConfigs("share_bottom", 1, 1, ARCHS), layers.ArchInputs(2, [3]), D),
            lambda m: m.mtl_arch.bottom_projection.mlp_net.append(nn.Dropout()),
        ),
        "mtl_arch: bottom_projection.mlp_net.6: expected nn.Linear or an activation that the operator has, "
        "got Dropout(",
    ),
    "a tower too few": (
        wiring.central,
        changed(
            layers.CentralTaskArch(layers.MtlConfigs("att_sp", 1, 1, ARCHS), layers.ArchInputs(2, [3]), D),
            lambda m: m.task_modules.__delitem__(1),
        ),
        "task_modules: expected one tower for each of 2 tasks, got 1",
    ),
}


@pytest.mark.parametrize(("read", "module", "message"), REFUSED.values(), ids=REFUSED)
def test_the_wiring_refuses_what_no_table_expresses(read, module, message):
    with pytest.raises(Unfusable, match=re.escape(message)):
        read(module)
