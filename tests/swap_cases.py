"""The layers that the tests of the swap run on, what may be done to their inside, and how two
models are compared."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fusedmoe import dtype as dtypes
from fusedmoe import testing
from fusedmoe.reference import layers

D, T, B = 6, 3, 16
WIDTHS = [[5, 4], [4]]


def central(name: str) -> layers.CentralTaskArch:
    return layers.CentralTaskArch(
        layers.MtlConfigs(name, 2, 2, WIDTHS), layers.ArchInputs(T, [3], activation_type="silu"), D
    )


# name -> (layer, slots of its input; None: [B, D])
LAYERS = {
    "single_task": (lambda: layers.SingleTask(D, [5, 4], T), None),
    "shared_bottom": (lambda: layers.SharedBottom(D, [5, 4], T), None),
    "omoe": (lambda: layers.OMoE(D, [5, 4], [3], T, 4), None),
    "mmoe": (lambda: layers.MMoE(D, [5, 4], [], T, 4), None),
    "ml_mmoe": (lambda: layers.MLMMoE(D, WIDTHS, [[3], []], T, 4), None),
    "cgc": (lambda: layers.CGC(D, [5, 4], T, 2, 1), None),
    "ple": (lambda: layers.PLE(D, WIDTHS, T, [1, 2, 1], 2), T + 1),
    "adatt_sp": (lambda: layers.AdaTTSp(D, WIDTHS, T, 2), T),
    "adatt_sp of one expert": (lambda: layers.AdaTTSp(D, WIDTHS, T, 1), T),
    "adatt_sp without static weights": (lambda: layers.AdaTTSp(D, WIDTHS, T, 2, self_exp_res_connect=False), T),
    "adatt_sp of one task": (lambda: layers.AdaTTSp(D, WIDTHS, 1, 2), 1),
    "adatt": (lambda: layers.AdaTT(D, WIDTHS, T, 2, num_task_expert_list=[1, 2, 1]), T + 1),
    "adatt of one level": (lambda: layers.AdaTT(D, [[4]], T, 2, num_task_experts=2), T + 1),
    "cross_stitch": (lambda: layers.CrossStitch(D, WIDTHS, T), T),
    "asymmetric_sharing": (lambda: layers.AsymmetricSharing(D, [5, 4], T, [[0, 1], [1, 2], [2, 0]], "mean"), None),
    "customized_sharing": (lambda: layers.CustomizedSharing(D, [5, 4], T), None),
    "silu": (lambda: layers.AdaTTSp(D, WIDTHS, T, 2, activation="silu"), T),
    **{
        f"central {name}": (lambda name=name: central(name), None)
        for name in ("att_sp", "att_g", "ple", "cross_st", "mmoe", "share_bottom", "cgc")
    },
}


def sample(slots: int | None, dtype: torch.dtype = torch.float32, seed: int = 7) -> torch.Tensor:
    shape = (B, D) if slots is None else (B, slots, D)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def smooth_layer() -> nn.Module:
    """A layer with random parameters whose activation has no kink; its input is [B, T, D]."""
    module = layers.AdaTTSp(D, WIDTHS, T, 2, activation="silu")
    testing.randomise(module.parameters(), seed=1)
    return module


def results(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Outputs and every gradient by name."""
    x = x.detach().requires_grad_()
    value = module(x)
    outputs = value if isinstance(value, list) else [value]
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum() for out in outputs
    )
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    return {
        **{f"out.{i}": out.detach() for i, out in enumerate(outputs)},
        **dict(zip(["d_x", *(name.removeprefix("_orig_mod.") for name in names)], grads, strict=True)),
    }


def assert_same(fused: nn.Module, eager: nn.Module, x: torch.Tensor) -> None:
    """Check the fused module against the class's own forward, with float64 of the same class as
    truth: the rule of `testing`.

    Neighbours are run where the layer and its input alone do not allow enough, as
    `testing.assert_parity` does it.
    """
    ours = results(fused, x)
    if testing.faults_of(ours, expected_of(eager, x, 0)):
        testing.assert_close(ours, expected_of(eager, x, testing.NEIGHBOURS))


def expected_of(eager: nn.Module, x: torch.Tensor, neighbours: int) -> dict[str, tuple[torch.Tensor | None, float]]:
    """Return (truth, largest error allowed) by name, as `testing.expectation`: plain torch's error
    is the largest of the layer's and its neighbours'.

    In float64 plain torch is the truth itself; its error is measured in float32, scaled by the
    roundoffs, and enters once more.
    """
    measured = torch.float32 if x.dtype == torch.float64 else x.dtype
    scale = dtypes.row(x.dtype).roundoff / dtypes.row(measured).roundoff
    rounded, inputs = copy.deepcopy(eager).to(measured), x.to(measured)
    generator = torch.Generator().manual_seed(11)
    errors = []
    for _ in range(1 + neighbours):
        exact = results(copy.deepcopy(rounded).double(), inputs.double())
        plain = results(rounded, inputs)
        errors.append(
            {name: scale * testing.error(plain[name], value) for name, value in exact.items() if value is not None}
        )
        inputs = testing.moved(inputs, generator)
        with torch.no_grad():
            for param in rounded.parameters():
                param.copy_(testing.moved(param, generator))
    truth = results(copy.deepcopy(eager).double(), x.double())
    plain = {name: max(draw[name] for draw in errors) for name in errors[0]}
    return {
        name: (
            value,
            0.0
            if value is None
            else testing.bound(plain[name], value, x.dtype) + (0.0 if measured == x.dtype else plain[name]),
        )
        for name, value in truth.items()
    }


def everything(model: nn.Module) -> dict[str, tuple]:
    """All that a model's modules hold: the order, names and identities of their attributes,
    parameters, buffers and submodules."""
    parts = {}
    for path, module in model.named_modules():
        parts[path] = (type(module), list(module.__dict__), [id(value) for value in module.__dict__.values()])
        parts[f"{path} tables"] = tuple(
            (list(d), [id(v) for v in d.values()]) for d in (module._parameters, module._buffers, module._modules)
        )
    return parts


# What may be done to the inside of `smooth_layer()`


def hooked(layer):
    layer.experts[0][0].register_forward_hook(lambda *_: None)


def parametrized(layer):
    parametrizations.orthogonal(layer.gate_weights[0][1][0])


def weight_normed(layer):
    parametrizations.weight_norm(layer.experts[0][0].mlp_net[0])


def pruned(layer):
    prune.l1_unstructured(layer.experts[1][0].mlp_net[0], "weight", amount=0.5)


def root_parametrized(layer):
    parametrize.register_parametrization(layer.self_exp_weights, "0", nn.Identity())


def unknown_activation(layer):
    layer.experts[0][2].mlp_net[1] = nn.Hardswish()


def dropout(layer):
    layer.experts[0][2].mlp_net.append(nn.Dropout(0.2))


def batch_norm(layer):
    layer.experts[0][2].mlp_net.insert(1, nn.BatchNorm1d(5))


def patched(layer):
    layer.experts[0][2].forward = lambda x: x[:, :4]


def patched_itself(layer):
    layer.forward = lambda x: x


def mixed_dtypes(layer):
    layer.gate_weights[1].double()


def complex(layer):
    layer.to(torch.complex64)


def meta(layer):
    layer.to("meta")


def subclass(layer):
    class Special(nn.Parameter):
        pass

    layer.experts[0][0].mlp_net[0].bias = Special(torch.zeros(5))


def extra_parameter(layer):
    layer.temperature = nn.Parameter(torch.ones(()))


def other_gate(layer):
    layer.gate_weights[0][0][1] = nn.Sigmoid()


def other_count(layer):
    layer.num_task_experts = 3


def replaced(layer):
    layer.experts[0][2] = copy.deepcopy(layer.experts[0][1])


def removed(layer):
    del layer.gate_weights[0][1]


def bias_removed(layer):
    layer.experts[0][0].mlp_net[0].bias = None


def pre_hooked(layer):
    layer.gate_weights[1][0].register_forward_pre_hook(lambda *_: None)


def backward_hooked(layer):
    layer.experts[1][5].mlp_net[0].register_full_backward_hook(lambda *_: None)


def backward_pre_hooked(layer):
    layer.experts[1][5].register_full_backward_pre_hook(lambda *_: None)


def switched(layer):
    layer.self_exp_res_connect = False
