"""The reference layers: the names, keys and initial weights of the public AdaTT library's, and what
its layers cannot do."""

import hashlib

import pytest
import torch

from fusedmoe.activation import DEFAULT_PARAMETER, Activation, activation
from fusedmoe.reference import activation as formulas
from fusedmoe.reference import layers
from fusedmoe.reference.layers.central import BACKBONES
from fusedmoe.reference.layers.mlp import activation_module
from fusedmoe.reference.layers.sharing import COMBINE
from fusedmoe.testing import bound, error, randomise

ARCHS = [[6, 5], [4]]


def central(name: str, task_mlp: list[int]) -> layers.CentralTaskArch:
    return layers.CentralTaskArch(layers.MtlConfigs(name, 2, 2, ARCHS), layers.ArchInputs(3, task_mlp), 7)


# sha256 over the float32 bytes of the state_dict in order, built after torch.manual_seed(0).
# Obtained from the public library (facebookresearch/AdaTT, mtl_lib.py of commit 0efdd82), whose
# constructors were transcribed, run with these arguments, found to give these layers' weights bit
# for bit and their outputs to the last place, and thrown away.
SEEDED = {
    "SharedBottom": (
        lambda: layers.SharedBottom(7, [6, 4], 3, "RELU"),
        "6d2207c1f8894dd852db452c90507dc9aa5f2da8a512a63e47faebf83e7f22d3",
    ),
    "MLMMoE": (
        lambda: layers.MLMMoE(7, ARCHS, [[3], []], 3, 4),
        "87fb9f995441b649e0b02f60d6c2ba38b723fc9e41dabf08c7afd14bf94b7b74",
    ),
    "PLE": (lambda: layers.PLE(7, ARCHS, 3, 2, 2), "696586cd6f61250ccfebded1e4dd9c7252970a6b363e1ae7c0dc82bc463ba7f3"),
    "PLE, ragged": (
        lambda: layers.PLE(7, ARCHS, 3, [1, 2, 3], 1),
        "8d7b8ee5ecff4ffb977c336ced947e1c45ba2e6af8cd427de6db64d4750b3b01",
    ),
    "AdaTTSp": (
        lambda: layers.AdaTTSp(7, ARCHS, 3, 2),
        "8f4c4fdb6113e4244195efcee2dc0898c8f9fd2326d49a47e0a47605cbd1498e",
    ),
    "AdaTTSp, one expert": (
        lambda: layers.AdaTTSp(7, ARCHS, 3, 1),
        "c9d861a6b0d15eb36dd889dc69fc47ab03994a41893f812e330b6e471f0603ae",
    ),
    "AdaTTSp, no static weights": (
        lambda: layers.AdaTTSp(7, ARCHS, 3, 2, False),
        "84435f2883bae07869a429ec8c0b139b66c69e1a8ccabdfbe84f7be41ce8842d",
    ),
    "AdaTT": (
        lambda: layers.AdaTTWSharedExps(7, ARCHS, 3, 2, 1),
        "efe1b486c7928f33e3d0f482c077c2912ca75b384ba1c39a76f170651124c84c",
    ),
    "AdaTT, ragged": (
        lambda: layers.AdaTTWSharedExps(7, ARCHS, 3, 2, None, [1, 2, 3]),
        "87fdc9204859aa61239064d2c90d3ae3bb3dab2624e4aa12f52a433ccacb8d3d",
    ),
    "AdaTT, one expert": (
        lambda: layers.AdaTTWSharedExps(7, ARCHS, 3, 1, 1),
        "ed41a9fe6ef6465829ece36ede6111699f22f8c5c4856209eb9bf306d939f104",
    ),
    "AdaTT, one level": (
        lambda: layers.AdaTTWSharedExps(7, [[6]], 3, 1, 2),
        "fecd8169ffd07c08920cce88ed8148eb5072c323a96d98487b54d231817de955",
    ),
    "CrossStitch": (
        lambda: layers.CrossStitch(7, ARCHS, 3),
        "8eec5f08f1a5095108568122c4f7f41faebf3fdddb748e2234522a8f47daa266",
    ),
    "CentralTaskArch, att_sp": (
        lambda: central("att_sp", [5]),
        "97187925f58c7adf16bd381fe5fdb4f478b66e15905bba27241fc73222b51134",
    ),
    "CentralTaskArch, att_g": (
        lambda: central("att_g", [5]),
        "6e46961b879d0a16bd09c457eab5e1edd4ccc23221e21890e3a18cddbee0c5d7",
    ),
    "CentralTaskArch, ple": (
        lambda: central("ple", [5]),
        "ef345257d6f2dba9f0669462c1778a6fe842de46e9b01d3be507b38f16cb7b54",
    ),
    "CentralTaskArch, cross_st": (
        lambda: central("cross_st", [5]),
        "78624dc83c4eedd0066cc610f8e0e48f5f9b6533b0f8e89939af52882c7cbe26",
    ),
    "CentralTaskArch, mmoe": (
        lambda: central("mmoe", [5]),
        "a4e686b323e690ffa28c4cc5a0cc797736d150670bdcb22cc619cd70f22a9ce7",
    ),
    "CentralTaskArch, share_bottom": (
        lambda: central("share_bottom", [5]),
        "15430d0128d1e97294c22579d633b3dff6c13d62ea543c6ac4975fb9bdd71cfc",
    ),
}


@pytest.mark.parametrize(("build", "digest"), SEEDED.values(), ids=SEEDED)
def test_the_same_seed_gives_the_public_librarys_weights(build, digest):
    torch.manual_seed(0)
    state = build().state_dict()
    assert hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest() == digest


def linear(*paths: str) -> list[str]:
    return [f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")]


def mlps(*paths: str) -> list[str]:
    return linear(*(f"{path}.mlp_net.0" for path in paths))


KEYS = {
    "MLP": (layers.MLP(5, [4, 3]), linear("mlp_net.0", "mlp_net.2")),
    "MLP without bias": (layers.MLP(5, [4], bias=False), ["mlp_net.0.weight"]),
    "SharedBottom": (layers.SharedBottom(5, [4], 2), mlps("bottom_projection")),
    "MLMMoE": (
        layers.MLMMoE(5, [[4], [3]], [[], [2]], 1, 2),
        mlps("experts.0.0", "experts.0.1", "experts.1.0", "experts.1.1")
        + linear("gates.0.0.1", "gates.0.1.1", "gates.1.0.0.mlp_net.0", "gates.1.0.1"),
    ),
    "PLE": (
        layers.PLE(5, [[4], [3]], 1, 1, 1),
        mlps("experts.0.0", "experts.0.1", "experts.1.0", "experts.1.1")
        + linear("gate_weights.0.0.0", "gate_weights.0.1.0", "gate_weights.1.0.0"),
    ),
    "AdaTTSp": (
        layers.AdaTTSp(5, [[4]], 1, 2),
        mlps("experts.0.0", "experts.0.1") + linear("gate_weights.0.0.0") + ["self_exp_weights.0"],
    ),
    "AdaTT": (
        layers.AdaTT(5, [[4]], 1, 1, 2),
        mlps("experts.0.0", "experts.0.1", "experts.0.2")
        + linear("gate_weights.0.0.0")
        + ["self_exp_weights.0", "self_exp_weights.1"],
    ),
    "CrossStitch": (layers.CrossStitch(5, [[4]], 2), [*mlps("experts.0.0", "experts.0.1"), "stitchs.0.weight"]),
    "CentralTaskArch": (
        layers.CentralTaskArch(layers.MtlConfigs("share_bottom", expert_out_dims=[[4]]), layers.ArchInputs(2, [3]), 5),
        mlps("mtl_arch.bottom_projection")
        + linear("task_modules.0.0.mlp_net.0", "task_modules.0.1", "task_modules.1.0.mlp_net.0", "task_modules.1.1"),
    ),
}


@pytest.mark.parametrize(("layer", "keys"), KEYS.values(), ids=KEYS)
def test_state_dict_keys_are_the_public_librarys(layer, keys):
    assert list(layer.state_dict()) == keys


def test_static_weights_have_the_public_librarys_shapes():
    def shapes(layer):
        return [list(weight.shape) for weight in layer.self_exp_weights]

    assert shapes(layers.AdaTTSp(5, ARCHS, 3, 2)) == [[3, 2], [3, 2]]
    assert shapes(layers.AdaTTSp(5, ARCHS, 3, 1)) == []
    assert shapes(layers.AdaTT(5, ARCHS, 2, 3, num_task_expert_list=[1, 2])) == [[2, 1], [2, 2], [1, 3]]
    assert shapes(layers.AdaTT(5, [[4]], 1, 2, 1)) == [[1, 1], [0, 2]]
    assert shapes(layers.AdaTT(5, ARCHS, 2, 1, 1)) == []


def test_the_callers_list_is_left_alone():
    counts = [1, 2]
    layers.AdaTT(5, ARCHS, 2, 1, num_task_expert_list=counts)
    ple = layers.PLE(5, ARCHS, 2, counts, 1)
    counts.append(9)
    assert ple.num_task_experts == [1, 2]


@pytest.mark.parametrize("name", DEFAULT_PARAMETER)
@torch.no_grad()
def test_activations_are_the_operators(name):
    kinds = [activation(name), *([Activation(name, 0.3)] if DEFAULT_PARAMETER[name] else [])]
    z = torch.linspace(-30, 30, 601, dtype=torch.float64)
    for kind in kinds:
        truth = activation_module(kind)(z)
        assert error(formulas.apply(kind, z), truth) <= bound(0.0, truth, torch.float64)
    assert type(layers.MLP(5, [4], activation=name.upper()).mlp_net[1]) is type(activation_module(name))


def test_shared_outputs_are_expanded_views():
    x = torch.randn(6, 7)
    for layer in (layers.SharedBottom(7, [4], 3), layers.OMoE(7, [4], [], 3, 2)):
        out = layer(x)
        assert (out.shape, out.stride(1)) == ((6, 3, 4), 0)


def gradients(layer: torch.nn.Module, slots: int) -> list[str]:
    """The parameters that get a gradient other than zero from every task's output."""
    randomise(layer.parameters(), seed=0)
    out = layer(torch.randn(11, slots, 7) if slots else torch.randn(11, 7))
    (out * torch.randn_like(out)).sum().backward()
    return [name for name, parameter in layer.named_parameters() if parameter.grad is not None and parameter.grad.any()]


@torch.no_grad()
def test_zero_shared_experts_leave_each_task_its_own():
    layer = layers.PLE(7, [[4]], 2, 1, 0, activation="silu")
    randomise(layer.parameters(), seed=0)
    x = torch.randn(5, 3, 7)
    expected = torch.stack([layer.experts[0][t](x[:, t]) for t in range(2)], dim=1)
    assert error(layer(x), expected) <= bound(0.0, expected, torch.float32)


def test_parameters_that_no_output_needs_get_no_gradient():
    shared = {"gate_weights.0.2.0.weight", "gate_weights.0.2.0.bias"}
    for layer in (layers.PLE(7, ARCHS, 2, 2, 0, activation="silu"), layers.AdaTT(7, ARCHS, 2, 0, 2, activation="silu")):
        used = gradients(layer, 3)
        unused = {name for name, parameter in layer.named_parameters() if parameter.grad is None}
        assert unused == shared | ({"self_exp_weights.2"} if isinstance(layer, layers.AdaTT) else set())
        assert set(used) | unused == set(dict(layer.named_parameters()))
    lent = layers.AsymmetricSharing(7, [4], 2, [[0], [0]], activation="silu")
    assert gradients(lent, 0) == mlps("bottoms.0")
    assert lent.bottoms[1].mlp_net[0].weight.grad is None


@pytest.mark.parametrize("combine", COMBINE)
@torch.no_grad()
def test_asymmetric_sharing_combines_what_it_borrows(combine):
    layer = layers.AsymmetricSharing(7, [4], 2, [[0, 1], [1, 0]], combine, "tanh")
    x = torch.randn(5, 7)
    first, second = (bottom(x) for bottom in layer.bottoms)
    both = {
        "sum": [first + second] * 2,
        "mean": [(first + second) / 2] * 2,
        "concat": [torch.cat([first, second], 1), torch.cat([second, first], 1)],
    }
    expected = torch.stack(both[combine], dim=1)
    assert error(layer(x), expected) <= bound(0.0, expected, torch.float32)


@torch.no_grad()
def test_customized_sharing_concatenates_the_shared_bottom():
    layer = layers.CustomizedSharing(7, [4], 2)
    x = torch.randn(5, 7)
    own, other, shared = (bottom(x) for bottom in layer.bottoms)
    assert torch.equal(layer(x), torch.stack([torch.cat([own, shared], 1), torch.cat([other, shared], 1)], 1))


@torch.no_grad()
def test_families_of_one_level_are_their_general_family():
    x = torch.randn(5, 7)
    pairs = [
        (layers.CGC(7, [4], 2, [1, 2], 1), layers.PLE(7, [[4]], 2, [1, 2], 1), x.unsqueeze(1).expand(-1, 3, -1)),
        (layers.MMoE(7, [4], [3], 2, 3), layers.MLMMoE(7, [[4]], [[3]], 2, 3), x),
        (layers.OMoE(7, [4], [3], 1, 3), layers.MLMMoE(7, [[4]], [[3]], 1, 3), x),
    ]
    for one, general, given in pairs:
        general.load_state_dict(one.state_dict())
        assert torch.equal(one(x), general(given))


@pytest.mark.parametrize("task_mlp", [[], [5, 3]], ids=str)
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_central_puts_a_tower_on_each_task_of_its_backbone(name, task_mlp):
    model = central(name, task_mlp)
    randomise(model.parameters(), seed=0)
    x = torch.randn(6, 7)
    slots = BACKBONES[name].extra_slots
    features = model.mtl_arch(x if slots is None else x.unsqueeze(1).expand(-1, 3 + slots, -1))
    out = model(x)
    assert [list(y.shape) for y in out] == [[6, 1]] * 3
    for t, y in enumerate(out):
        assert torch.equal(y, model.task_modules[t](features[:, t]))
