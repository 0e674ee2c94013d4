"""The MLP of every expert, gate and tower, and the checks of the constructors' arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from fusedmoe.activation import Activation, activation
from fusedmoe.validation import require_integer

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
    """Return a new module of an activation, given by name. Raises: ValueError if it is unknown."""
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
    Raises: ValueError, TypeError for a width or an activation that is none.
    """

    def __init__(
        self, input_dim: int, mlp_arch: Sequence[int], activation: str | Activation = "RELU", bias: bool = True
    ) -> None:
        super().__init__()
        require_counts(input_dim=input_dim)
        require_widths("mlp_arch", mlp_arch, least=0)
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


def require_counts(**counts: int) -> None:
    """Raise ValueError unless every argument, given by its name, is an integer of at least 1."""
    for what, count in counts.items():
        require_integer(count, what, 1)


def require_widths(what: str, widths: Sequence[int], least: int = 1) -> None:
    """Raise ValueError unless `widths` lists at least `least` layer widths."""
    if isinstance(widths, str) or not isinstance(widths, Sequence) or len(widths) < least:
        raise ValueError(
            f"{what}: expected a list of {'layer widths' if least else 'layer widths or none'}, as in [256, "
            f"128], got {widths!r}"
        )
    for i, width in enumerate(widths):
        require_integer(width, f"{what}[{i}]", 1)


def require_levels(what: str, levels: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless `levels` lists the layer widths of at least one level."""
    if (
        isinstance(levels, str)
        or not isinstance(levels, Sequence)
        or not levels
        or not all(isinstance(widths, Sequence) and widths for widths in levels)
    ):
        raise ValueError(
            f"{what}: expected the layer widths of at least one level, as in [[256], [128]], got {levels!r}"
        )
    for level, widths in enumerate(levels):
        require_widths(f"{what}[{level}]", widths)


def counts_per_task(num_tasks: int, **given: int | Sequence[int]) -> list[int]:
    """Return m_t for each task, from one named argument: a number or a list of T.

    Raises: ValueError for anything else.
    """
    ((what, counts),) = given.items()
    if isinstance(counts, int):
        return [require_integer(counts, what)] * num_tasks
    if isinstance(counts, str) or not isinstance(counts, Sequence) or len(counts) != num_tasks:
        raise ValueError(f"{what}: expected a number or a list of {num_tasks}, got {counts!r}")
    return [require_integer(count, f"{what}[{t}]") for t, count in enumerate(counts)]
