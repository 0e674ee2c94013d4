"""Adaptive task-to-task fusion: a gate over all experts, and static weights on a unit's own."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import nn

from fusedmoe.activation import Activation
from fusedmoe.reference.layers.mlp import counts_per_task, experts_of, require_counts, require_levels, softmax_gate
from fusedmoe.validation import require_integer


class AdaTTSp(nn.Module):
    """AdaTT without shared experts.

    Unit t mixes all experts by a gate on slot t, and adds its own experts with static weights v.

        y[e] = MLP_e(x[owner(e)])
        out[t] = sum over e of softmax(G[t] x[t])[e] * y[e] + sum over e in own(t) of v[t, e] * y[e]
        x <- out

    Args:
        input_dim: D, the width of an input vector.
        expert_out_dims: per level the layer widths of an expert.
        num_tasks: T, the number of tasks.
        num_task_experts: m, the experts of each task.
        self_exp_res_connect: whether v exists: learned [T, m] per level, or ones when m = 1.
        activation: its name in any case, or an `Activation`.
    Returns: forward maps [B, T, D] to [B, T, H].
    Raises: ValueError, TypeError at construction, naming the argument, what was expected and what
        came.
    Source: AdaTT, equations 2 to 10.
    """

    def __init__(
        self,
        input_dim: int,
        expert_out_dims: Sequence[Sequence[int]],
        num_tasks: int,
        num_task_experts: int,
        self_exp_res_connect: bool = True,
        activation: str | Activation = "RELU",
    ) -> None:
        super().__init__()
        require_counts(input_dim=input_dim, num_tasks=num_tasks, num_task_experts=num_task_experts)
        require_levels("expert_out_dims", expert_out_dims)
        self.num_extraction_layers = len(expert_out_dims)
        self.num_tasks = num_tasks
        self.num_task_experts = num_task_experts
        self.total_experts_per_layer = num_tasks * num_task_experts
        self.self_exp_res_connect = self_exp_res_connect
        self.experts = nn.ModuleList()
        self.gate_weights = nn.ModuleList()
        static = []
        width = input_dim
        for arch in expert_out_dims:
            self.experts.append(experts_of(self.total_experts_per_layer, width, arch, activation))
            self.gate_weights.append(
                nn.ModuleList(softmax_gate(width, self.total_experts_per_layer) for _ in range(num_tasks))
            )
            if self_exp_res_connect and num_task_experts > 1:
                static.append(static_weights(num_tasks, num_task_experts))
            width = arch[-1]
        self.self_exp_weights = nn.ParameterList(static)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        slots = inputs
        for level, (experts, gates) in enumerate(zip(self.experts, self.gate_weights, strict=True)):
            outputs = torch.stack(
                [expert(slots[:, e // self.num_task_experts]) for e, expert in enumerate(experts)], dim=1
            )  # [B, E, H]
            weights = torch.stack([gate(slots[:, t]) for t, gate in enumerate(gates)], dim=1)  # [B, T, E]
            slots = torch.bmm(weights, outputs)  # [B, T, H]
            if self.self_exp_res_connect and self.num_task_experts > 1:
                own = outputs.unflatten(1, (self.num_tasks, self.num_task_experts))  # [B, T, m, H]
                slots = slots + torch.einsum("tm,btmh->bth", self.self_exp_weights[level], own)
            elif self.self_exp_res_connect:
                slots = slots + outputs
        return slots


class AdaTT(nn.Module):
    """AdaTT with shared experts.

    Every unit mixes all experts by a gate on its own slot, and adds its own experts with static
    weights v.

        y[e] = MLP_e(x[owner(e)])
        out[u] = sum over e of (softmax(G[u] x[u])[e] + v[u, e]) * y[e]   v[u, e] = 0 outside own(u)
        x <- out

    The shared unit (u = T) exists below the last level; the shared experts are its own.

    Args:
        input_dim: D, the width of an input vector.
        expert_out_dims: per level the layer widths of an expert.
        num_tasks: T, the number of tasks.
        num_shared_experts: m_s, the number of shared experts, 0 or more.
        num_task_experts: m_t, one number for all tasks; or else
        num_task_expert_list: one m_t for each task.
        self_exp_res_connect: whether v exists: learned [L, m_t] per task and [L - 1, m_s] for the
            shared unit, or ones when every m_t and m_s is 1.
        activation: its name in any case, or an `Activation`.
    Returns: forward maps [B, T + 1, D], the shared slot last, to [B, T, H].
    Raises: ValueError, TypeError at construction, naming the argument, what was expected and what
        came.
    Source: AdaTT, section 3.2.
    """

    def __init__(
        self,
        input_dim: int,
        expert_out_dims: Sequence[Sequence[int]],
        num_tasks: int,
        num_shared_experts: int,
        num_task_experts: int | None = None,
        num_task_expert_list: Sequence[int] | None = None,
        self_exp_res_connect: bool = True,
        activation: str | Activation = "RELU",
    ) -> None:
        super().__init__()
        require_counts(input_dim=input_dim, num_tasks=num_tasks)
        require_levels("expert_out_dims", expert_out_dims)
        if (num_task_experts is None) == (num_task_expert_list is None):
            raise ValueError(
                "num_task_experts, num_task_expert_list: expected one of them, got "
                + ("neither" if num_task_experts is None else "both")
            )
        given = (
            {"num_task_experts": num_task_experts}
            if num_task_expert_list is None
            else {"num_task_expert_list": num_task_expert_list}
        )
        counts = counts_per_task(num_tasks, **given)
        if sum(counts) + require_integer(num_shared_experts, "num_shared_experts") == 0:
            raise ValueError("num_task_experts, num_shared_experts: expected at least one expert, got none")
        levels = len(expert_out_dims)
        self.num_extraction_layers = levels
        self.num_tasks = num_tasks
        self.num_expert_list = [*counts, num_shared_experts]
        self.total_experts_per_layer = sum(self.num_expert_list)
        self.self_exp_res_connect = self_exp_res_connect
        self.expert_input_idx = [owner for owner, count in enumerate(self.num_expert_list) for _ in range(count)]
        self.experts = nn.ModuleList()
        self.gate_weights = nn.ModuleList()
        width = input_dim
        for level, arch in enumerate(expert_out_dims):
            units = num_tasks + (level < levels - 1)
            self.experts.append(experts_of(self.total_experts_per_layer, width, arch, activation))
            self.gate_weights.append(
                nn.ModuleList(softmax_gate(width, self.total_experts_per_layer) for _ in range(units))
            )
            width = arch[-1]
        learned = self_exp_res_connect and set(self.num_expert_list) != {1}
        depths = [*[levels] * num_tasks, levels - 1] if learned else []
        self.self_exp_weights = nn.ParameterList(
            static_weights(depth, count) for depth, count in zip(depths, self.num_expert_list, strict=False)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        slots = inputs
        for level, (experts, gates) in enumerate(zip(self.experts, self.gate_weights, strict=True)):
            outputs = torch.stack(
                [expert(slots[:, owner]) for owner, expert in zip(self.expert_input_idx, experts, strict=True)], dim=1
            )  # [B, E, H]
            # Without shared experts nothing reads the shared unit.
            units = list(gates)[: self.num_tasks + (self.num_expert_list[-1] > 0)]
            weights = torch.stack([gate(slots[:, u]) for u, gate in enumerate(units)], dim=1)  # [B, U, E]
            if self.self_exp_res_connect:
                self._add_static_weights(weights, level)
            slots = torch.bmm(weights, outputs)  # [B, U, H]
        return slots

    def _add_static_weights(self, weights: torch.Tensor, level: int) -> None:
        """Add v to the mixing weights [B, U, E], in place."""
        first = 0
        for u, count in enumerate(self.num_expert_list[: weights.shape[1]]):
            own = weights[:, u, first : first + count]
            own += self.self_exp_weights[u][level] if len(self.self_exp_weights) else 1.0
            first += count


AdaTTWSharedExps = AdaTT


def static_weights(rows: int, experts: int) -> nn.Parameter:
    """Return learned static weights [rows, experts], uniform in +-1/sqrt(experts)."""
    scale = sqrt(1.0 / max(experts, 1))
    return nn.Parameter(torch.empty(rows, experts).uniform_(-scale, scale))
