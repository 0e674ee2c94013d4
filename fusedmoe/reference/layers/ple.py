"""Progressive layered extraction: tasks see their own experts and the shared ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fusedmoe.activation import Activation
from fusedmoe.reference.layers.mlp import (
    counts_per_task,
    experts_of,
    require_counts,
    require_levels,
    require_widths,
    softmax_gate,
)
from fusedmoe.validation import require_integer


class PLE(nn.Module):
    """Unit t mixes own(t) and the shared experts; the shared unit mixes all experts.

        y[e] = MLP_e(x[owner(e)])
        out[u] = sum over e in sees(u) of softmax(G[u] x[u])[e] * y[e];   x <- out

    The shared unit exists below the last level.

    Args:
        input_dim: D, the width of an input vector.
        expert_out_dims: per level the layer widths of an expert.
        num_tasks: T, the number of tasks.
        num_task_experts: m_t, one number for all tasks or a list of T.
        num_shared_experts: m_s, the number of shared experts, 0 or more.
        activation: its name in any case, or an `Activation`.
    Returns: forward maps [B, T + 1, D], the shared slot last, to [B, T, H].
    Raises: ValueError, TypeError at construction, naming the argument, what was expected and what
        came.
    Source: PLE, equations 6 and 7.
    """

    def __init__(
        self,
        input_dim: int,
        expert_out_dims: Sequence[Sequence[int]],
        num_tasks: int,
        num_task_experts: int | list[int],
        num_shared_experts: int,
        activation: str | Activation = "RELU",
    ) -> None:
        super().__init__()
        require_counts(input_dim=input_dim, num_tasks=num_tasks)
        require_levels("expert_out_dims", expert_out_dims)
        counts = counts_per_task(num_tasks, num_task_experts=num_task_experts)
        if sum(counts) + require_integer(num_shared_experts, "num_shared_experts") == 0:
            raise ValueError("num_task_experts, num_shared_experts: expected at least one expert, got none")
        self.num_extraction_layers = len(expert_out_dims)
        self.num_tasks = num_tasks
        self.num_task_experts = num_task_experts if isinstance(num_task_experts, int) else counts
        self.num_shared_experts = num_shared_experts
        self.total_experts_per_layer = sum(counts) + num_shared_experts
        self.experts = nn.ModuleList()
        self.gate_weights = nn.ModuleList()
        widths = [input_dim, *(arch[-1] for arch in expert_out_dims)]
        for width, arch in zip(widths, expert_out_dims, strict=False):
            self.experts.append(experts_of(self.total_experts_per_layer, width, arch, activation))
        for level in range(self.num_extraction_layers):
            seen = [count + num_shared_experts for count in counts]
            if level < self.num_extraction_layers - 1:
                seen.append(self.total_experts_per_layer)
            self.gate_weights.append(nn.ModuleList(softmax_gate(widths[level], count) for count in seen))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        counts = (
            [self.num_task_experts] * self.num_tasks
            if isinstance(self.num_task_experts, int)
            else self.num_task_experts
        )
        groups = [*counts, self.num_shared_experts]
        owners = [owner for owner, count in enumerate(groups) for _ in range(count)]
        slots = inputs.unbind(1)
        for experts, gates in zip(self.experts, self.gate_weights, strict=True):
            outputs = torch.stack(
                [expert(slots[owner]) for owner, expert in zip(owners, experts, strict=True)], dim=1
            )  # [B, E, H]
            groups_out = outputs.split(groups, dim=1)
            mixed = []
            for u, gate in enumerate(gates):
                seen = outputs if u == self.num_tasks else torch.cat([groups_out[u], groups_out[-1]], dim=1)
                mixed.append(torch.bmm(gate(slots[u]).unsqueeze(1), seen).squeeze(1))  # [B, H]
            slots = mixed
        return torch.stack(slots, dim=1)


class CGC(PLE):
    """Customized gate control, PLE of one level on an input that all share.

    Args:
        expert_arch: the layer widths of an expert.
        others: as `PLE`, whose `state_dict` keys it has.
    Returns: forward maps [B, D] to [B, T, H].
    Source: PLE, equations 2 to 5.
    """

    def __init__(
        self,
        input_dim: int,
        expert_arch: Sequence[int],
        num_tasks: int,
        num_task_experts: int | list[int],
        num_shared_experts: int,
        activation: str | Activation = "RELU",
    ) -> None:
        # Before the general class, which would call it by its own name.
        require_widths("expert_arch", expert_arch)
        super().__init__(input_dim, [expert_arch], num_tasks, num_task_experts, num_shared_experts, activation)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs.unsqueeze(1).expand(-1, self.num_tasks + 1, -1))
