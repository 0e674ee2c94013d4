"""The small MLP that every expert, gate and tower is made of, and the expert counts that the layers take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from fusedmoe.activation import Activation, activation

ACTIVATION_MODULES: dict[str, Callable[[Activation], nn.Module]] = {
    "identity": lambda kind: nn.Identity(),
    "relu": lambda kind: nn.ReLU(),
    "sigmoid": lambda kind: nn.Sigmoid(),
    "tanh": lambda kind: nn.Tanh(),
    "silu": lambda kind: nn.SiLU(),
    "gelu": lambda kind: nn.GELU(),
    "gelu_tanh": lambda kind: nn.GELU(approximate="tanh"),
    "leaky_relu": lambda kind: nn.LeakyReLU(kind.parameter),
    "elu": lambda kind: nn.ELU(kind.parameter),
    "softplus": lambda kind: nn.Softplus(),
}


def activation_module(value: str | Activation) -> nn.Module:
    """Return a fresh module of the activation that `value` names. Raises: ValueError for an unknown name."""
    kind = activation(value)
    return ACTIVATION_MODULES[kind.name](kind)


class MLP(nn.Module):
    """Apply h <- act(W h + b) for each width of `mlp_arch`; no widths: the identity.

    Args:
        input_dim: width of the input.
        mlp_arch: width of each layer.
        activation: its name in any case, or an `Activation`.
        bias: whether the linear maps have biases.
    Returns: forward maps [B, input_dim] to [B, mlp_arch[-1]].
    """

    def __init__(self, input_dim: int, mlp_arch: Sequence[int], activation: str | Activation = "RELU", bias: bool = True) -> None:
        super().__init__()
        widths = [input_dim, *mlp_arch]
        steps: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            steps += [nn.Linear(fan_in, fan_out, bias=bias), activation_module(activation)]
        self.mlp_net = nn.Sequential(*steps)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.mlp_net(input)


def experts_of(count: int, input_dim: int, widths: Sequence[int], activation: str | Activation) -> nn.ModuleList:
    """Return `count` expert MLPs of the same widths."""
    return nn.ModuleList(MLP(input_dim, widths, activation) for _ in range(count))


def softmax_gate(input_dim: int, experts: int) -> nn.Sequential:
    """Return the gate softmax(G q + c) over so many experts."""
    return nn.Sequential(nn.Linear(input_dim, experts), nn.Softmax(dim=-1))


def require_levels(what: str, levels: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless `levels` lists the layer widths of at least one level."""
    if not levels or not all(isinstance(widths, Sequence) and widths for widths in levels):
        raise ValueError(f"{what}: expected the layer widths of at least one level, as in [[256], [128]], got {levels!r}")
