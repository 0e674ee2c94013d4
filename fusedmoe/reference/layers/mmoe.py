"""Mixtures of experts whose gates all read the raw input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fusedmoe.activation import Activation
from fusedmoe.reference.layers.mlp import MLP, experts_of, require_counts, require_levels, require_widths


class MLMMoE(nn.Module):
    """Levels of MMoE: expert e of a level reads unit e of the level below, and every gate reads x.

        y[e] = MLP_e(h[e]);   out[u] = sum over e of softmax(G[u] x)[e] * y[e];   h <- out

    Args:
        input_dim: D, the width of an input vector.
        expert_archs: per level the layer widths of an expert.
        gate_archs: per level the hidden widths of a gate.
        num_tasks: T, the units of the last level.
        num_experts: E, experts of every level and units of every level below the last.
        activation: its name in any case, or an `Activation`.
    Returns: forward maps [B, D] to [B, T, H].
    Raises: ValueError, TypeError at construction, naming the argument, what was expected and what
        came.
    Source: AdaTT, section 4.1; MMoE, equations 6 to 8.
    """

    def __init__(
        self,
        input_dim: int,
        expert_archs: Sequence[Sequence[int]],
        gate_archs: Sequence[Sequence[int]],
        num_tasks: int,
        num_experts: int,
        activation: str | Activation = "RELU",
    ) -> None:
        super().__init__()
        require_counts(input_dim=input_dim, num_tasks=num_tasks, num_experts=num_experts)
        require_levels("expert_archs", expert_archs)
        if isinstance(gate_archs, str) or not isinstance(gate_archs, Sequence) or len(gate_archs) != len(expert_archs):
            raise ValueError(
                f"gate_archs: expected one list for each of {len(expert_archs)} levels, got {gate_archs!r}"
            )
        for level, widths in enumerate(gate_archs):
            require_widths(f"gate_archs[{level}]", widths, least=0)
        self.num_layers = len(expert_archs)
        self.num_tasks = num_tasks
        self.num_experts = num_experts
        self.experts = nn.ModuleList()
        self.gates = nn.ModuleList()
        width = input_dim
        for level, (expert_arch, gate_arch) in enumerate(zip(expert_archs, gate_archs, strict=True)):
            units = num_tasks if level == self.num_layers - 1 else num_experts
            self.experts.append(experts_of(num_experts, width, expert_arch, activation))
            self.gates.append(
                nn.ModuleList(hidden_gate(input_dim, gate_arch, num_experts, activation) for _ in range(units))
            )
            width = expert_arch[-1]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        slots = input.unsqueeze(1).expand(-1, self.num_experts, -1)  # [B, E, D]
        for experts, gates in zip(self.experts, self.gates, strict=True):
            outputs = torch.stack([expert(slots[:, e]) for e, expert in enumerate(experts)], dim=1)  # [B, E, H]
            weights = torch.stack([gate(input) for gate in gates], dim=1)  # [B, U, E]
            slots = torch.bmm(weights, outputs)  # [B, U, H]
        return slots


class MMoE(MLMMoE):
    """One level, one gate per task: out[t] = sum over e of softmax(G[t] x)[e] * MLP_e(x).

    Args:
        expert_arch: the layer widths of an expert.
        gate_arch: the hidden widths of a gate.
        others: as `MLMMoE`, whose `state_dict` keys it has.
    Returns: forward maps [B, D] to [B, T, H].
    Source: MMoE, equations 6 to 8.
    """

    def __init__(
        self,
        input_dim: int,
        expert_arch: Sequence[int],
        gate_arch: Sequence[int],
        num_tasks: int,
        num_experts: int,
        activation: str | Activation = "RELU",
    ) -> None:
        # Before the general class, which would call them by its own names.
        require_widths("expert_arch", expert_arch)
        require_widths("gate_arch", gate_arch, least=0)
        super().__init__(input_dim, [expert_arch], [gate_arch], num_tasks, num_experts, activation)


class OMoE(MMoE):
    """One level, one gate for all tasks: out[t] = sum over e of softmax(G x)[e] * MLP_e(x).

    Args: as `MMoE`.
    Returns: forward maps [B, D] to [B, T, H], expanded from [B, 1, H].
    Source: MMoE, equation 5.
    """

    def __init__(
        self,
        input_dim: int,
        expert_arch: Sequence[int],
        gate_arch: Sequence[int],
        num_tasks: int,
        num_experts: int,
        activation: str | Activation = "RELU",
    ) -> None:
        require_counts(num_tasks=num_tasks)
        super().__init__(input_dim, expert_arch, gate_arch, 1, num_experts, activation)
        self.num_tasks = num_tasks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).expand(-1, self.num_tasks, -1)


def hidden_gate(input_dim: int, hidden: Sequence[int], experts: int, activation: str | Activation) -> nn.Sequential:
    """Return the gate softmax(G MLP(x) + c) over so many experts."""
    return nn.Sequential(
        MLP(input_dim, hidden, activation), nn.Linear([input_dim, *hidden][-1], experts), nn.Softmax(dim=-1)
    )
