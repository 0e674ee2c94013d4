"""The fused modules: the reference layer's parameters and results."""

import copy
import pickle
import re
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fusedmoe import nn as fused
from fusedmoe.reference import layers
from fusedmoe.reference.layers.central import BACKBONES
from fusedmoe.table import Table
from fusedmoe.testing import Network, Problem, assert_close, error, evaluate, expectation, randomise

D, B = 7, 13
ARCHS = [[6, 5], [4]]


def central(room, name: str, task_mlp: list[int]) -> nn.Module:
    return room.CentralTaskArch(
        layers.MtlConfigs(name, 2, 2, ARCHS), layers.ArchInputs(3, task_mlp, activation_type="silu"), D
    )


# What builds the layer from a room (the reference's or the fused one's), and the slots of its input
# (0: [B, D]). SiLU everywhere: the gradient of ReLU depends on the order of summation near its
# kink.
BUILDS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "SingleTask": (lambda room: room.SingleTask(D, [6, 4], 3, "silu"), 0),
    "SharedBottom": (lambda room: room.SharedBottom(D, [6, 4], 3, "silu"), 0),
    "OMoE": (lambda room: room.OMoE(D, [6, 4], [3], 3, 4, "silu"), 0),
    "MMoE": (lambda room: room.MMoE(D, [6, 4], [], 3, 4, "silu"), 0),
    "MLMMoE": (lambda room: room.MLMMoE(D, ARCHS, [[3], []], 3, 4, "silu"), 0),
    "CGC": (lambda room: room.CGC(D, [6, 4], 3, [1, 0, 2], 2, "silu"), 0),
    "PLE": (lambda room: room.PLE(D, ARCHS, 3, 2, 1, "silu"), 4),
    "PLE, ragged": (lambda room: room.PLE(D, ARCHS, 3, [1, 0, 2], 1, "silu"), 4),
    "PLE, nothing shared": (lambda room: room.PLE(D, ARCHS, 3, 2, 0, "silu"), 4),
    "AdaTTSp": (lambda room: room.AdaTTSp(D, ARCHS, 3, 2, activation="silu"), 3),
    "AdaTTSp, one expert": (lambda room: room.AdaTTSp(D, ARCHS, 3, 1, activation="silu"), 3),
    "AdaTTSp, no static weights": (lambda room: room.AdaTTSp(D, ARCHS, 3, 2, False, "silu"), 3),
    "AdaTT": (lambda room: room.AdaTT(D, ARCHS, 3, 2, 1, activation="silu"), 4),
    "AdaTT, ragged": (lambda room: room.AdaTT(D, ARCHS, 3, 2, num_task_expert_list=[1, 3, 2], activation="silu"), 4),
    "AdaTT, one expert": (lambda room: room.AdaTT(D, ARCHS, 3, 1, 1, activation="silu"), 4),
    "AdaTT, one level": (lambda room: room.AdaTT(D, [[6]], 3, 1, 2, activation="silu"), 4),
    "AdaTT, nothing shared": (lambda room: room.AdaTT(D, ARCHS, 3, 0, 2, activation="silu"), 4),
    "AdaTT, no static weights": (
        lambda room: room.AdaTT(D, ARCHS, 3, 1, 2, self_exp_res_connect=False, activation="silu"),
        4,
    ),
    "CrossStitch": (lambda room: room.CrossStitch(D, ARCHS, 3, "silu"), 3),
    "AsymmetricSharing, sum": (
        lambda room: room.AsymmetricSharing(D, [6, 4], 3, [[0, 1], [1], [0, 1]], activation="silu"),
        0,
    ),
    "AsymmetricSharing, mean": (
        lambda room: room.AsymmetricSharing(D, [6, 4], 3, [[0, 1], [1], [1, 2]], "mean", "silu"),
        0,
    ),
    "AsymmetricSharing, concat": (
        lambda room: room.AsymmetricSharing(D, [6, 4], 3, [[0, 1], [1, 2], [2, 0]], "concat", "silu"),
        0,
    ),
    "CustomizedSharing": (lambda room: room.CustomizedSharing(D, [6, 4], 3, "silu"), 0),
    **{f"CentralTaskArch, {name}": (lambda room, name=name: central(room, name, [5]), 0) for name in BACKBONES},
    "CentralTaskArch, linear towers": (lambda room: central(room, "ple", []), 0),
}


def network(module: nn.Module, keys: tuple[str, ...]) -> Network:
    """The module as a network of x and the parameters named by `keys`, for `evaluate`."""

    def run(x: Tensor, params: Sequence[Tensor], table: Table) -> tuple[Tensor, tuple]:
        out = torch.func.functional_call(module, dict(zip(keys, params, strict=True)), (x,))
        return torch.stack(out, dim=1) if isinstance(out, list) else out, ()

    return run


@pytest.mark.parametrize("name", BUILDS)
def test_the_module_computes_what_the_reference_layer_does(name):
    """In float64 within float32's bounds: what is tested is which parameter goes where.

    `test_parity.py` tests the arithmetic.
    """
    build, slots = BUILDS[name]
    reference, ours = build(layers), build(fused)
    table, keys = type(ours).make_wiring(ours)
    params = tuple(torch.empty(p.shape) for p in table.parameters)
    randomise(params, seed=1)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2))
    x = draw((B, slots, D) if slots else (B, D))
    shape = network(reference, keys)(x, params, table)[0].shape
    given = Problem(table, x, params, draw(shape), ())
    assert sorted(keys) == sorted(dict(reference.named_parameters()))
    assert_close(evaluate(network(ours, keys), given.to(torch.float64)), expectation(given, network(reference, keys)))


@pytest.mark.parametrize("name", fused.__all__)
def test_a_module_says_what_it_takes_and_raises(name):
    layer = getattr(fused, name)
    if not hasattr(layer, "make_wiring"):
        return
    assert (
        f"fusedmoe.reference.layers.{layer.__name__}`, `backend`" in layer.__doc__
        and "Raises: at construction" in layer.__doc__
    )
    assert layer.__doc__.index("Args:") < layer.__doc__.index("Raises:") < (layer.__doc__.find("Source:") % 10**6)


@pytest.mark.parametrize("name", BUILDS)
def test_the_same_seed_gives_the_reference_layers_parameters(name):
    build, _ = BUILDS[name]
    torch.manual_seed(0)
    expected = build(layers).state_dict()
    torch.manual_seed(0)
    state = build(fused).state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_adatt_has_both_names():
    assert fused.AdaTTWSharedExps is fused.AdaTT
    assert layers.AdaTTWSharedExps is layers.AdaTT


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend: expected auto, .*, got 'abacus'"):
        fused.MMoE(D, [4], [], 2, 2, backend="abacus")


def test_a_recompute_that_is_no_bool_is_refused():
    with pytest.raises(TypeError, match=r"^recompute: expected True or False, got 'yes'$"):
        fused.MMoE(D, [4], [], 2, 2, recompute="yes")


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no experts": (lambda: fused.MMoE(D, [4], [], 2, 0), "num_experts: expected an integer of at least 1, got 0"),
    "no tasks": (lambda: fused.AdaTTSp(D, ARCHS, 0, 1), "num_tasks: expected an integer of at least 1, got 0"),
    "fewer shared experts than none": (
        lambda: fused.CGC(D, [4], 2, 1, -1),
        "num_shared_experts: expected an integer of at least 0, got -1",
    ),
    "no bottom": (
        lambda: fused.SharedBottom(D, [], 2),
        "hidden_dims: expected a list of layer widths, as in [256, 128], got []",
    ),
    "borrows": (
        lambda: fused.AsymmetricSharing(D, [4], 2, [[0], [2]]),
        "borrows[1]: expected one of 2 tasks (0 to 1), got 2",
    ),
    "gates": (
        lambda: fused.MLMMoE(D, ARCHS, [[]], 2, 2),
        "gate_archs: expected one list for each of 2 levels, got [[]]",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_class_that_no_table_expresses_is_a_value_error():
    class Normed(fused.SharedBottom):
        def bind(self):
            self.norm = nn.LayerNorm(4)
            return super().bind()

    with pytest.raises(
        ValueError, match=r"^Normed: expected the submodules bottom_projection, got bottom_projection, norm"
    ):
        Normed(D, [4], 2)


@torch.no_grad()
def test_the_outputs_of_a_central_may_be_changed_in_place():
    outputs = central(fused, "ple", [5])(torch.randn(B, D))
    assert isinstance(outputs, list)
    assert [list(out.sigmoid_().shape) for out in outputs] == [[B, 1]] * 3


@pytest.mark.parametrize(
    "carry", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
@torch.no_grad()
def test_copies_compute_with_parameters_of_their_own(carry):
    module = fused.AdaTT(D, ARCHS, 2, 1, 2)
    x = torch.randn(B, 3, D)
    before = module(x)
    other = carry(module)
    assert torch.equal(other(x), before)
    randomise(other.parameters(), seed=5)
    assert not torch.equal(other(x), before)
    assert torch.equal(module(x), before)


@torch.no_grad()
def test_parameters_are_read_at_every_call():
    module = fused.PLE(D, ARCHS, 2, 1, 1)
    x = torch.randn(B, 3, D)
    before = module(x)
    module.experts[0][0].mlp_net[0].bias.add_(1.0)
    edited = module(x)
    assert not torch.equal(edited, before)
    module.experts[0][0].mlp_net[0].bias = nn.Parameter(module.experts[0][0].mlp_net[0].bias - 1.0)
    assert error(module(x), before) < error(edited, before)
    assert module.double()(x.double()).dtype == torch.float64


def test_a_change_inside_is_refused():
    module = fused.AdaTTSp(D, ARCHS, 2, 2)
    module.experts[0][1].mlp_net[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"experts\.0\.1\.mlp_net\.0"):
        module(torch.randn(2, 2, D))
