"""Cross-stitch networks: one expert per task, mixed by learned weights, the same for all rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fusedmoe.activation import Activation
from fusedmoe.reference.layers.mlp import experts_of, require_counts, require_levels


class CrossStitch(nn.Module):
    """Mix the tasks' experts with learned weights.

        y[t] = MLP_t(x[t]);   out[u] = sum over t of v[u, t] * y[t];   x <- out

    Args:
        input_dim: D, the width of an input vector.
        expert_archs: per level the layer widths of an expert.
        num_tasks: T, the number of tasks.
        activation: its name in any case, or an `Activation`.
    Returns: forward maps [B, T, D] to [B, T, H].
    Raises: ValueError, TypeError at construction, naming the argument, what was expected and what
        came.
    Source: Misra et al., CVPR 2016, equation 1.
    """

    def __init__(
        self,
        input_dim: int,
        expert_archs: Sequence[Sequence[int]],
        num_tasks: int,
        activation: str | Activation = "RELU",
    ) -> None:
        super().__init__()
        require_counts(input_dim=input_dim, num_tasks=num_tasks)
        require_levels("expert_archs", expert_archs)
        self.num_layers = len(expert_archs)
        self.num_tasks = num_tasks
        self.experts = nn.ModuleList()
        self.stitchs = nn.ModuleList()
        width = input_dim
        for arch in expert_archs:
            self.experts.append(experts_of(num_tasks, width, arch, activation))
            self.stitchs.append(nn.Linear(num_tasks, num_tasks, bias=False))
            width = arch[-1]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        slots = input
        for experts, stitch in zip(self.experts, self.stitchs, strict=True):
            outputs = torch.stack([expert(slots[:, t]) for t, expert in enumerate(experts)], dim=2)  # [B, H, T]
            slots = stitch(outputs).transpose(1, 2)  # [B, T, H]
        return slots
