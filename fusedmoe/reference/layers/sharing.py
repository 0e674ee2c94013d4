"""Networks of one level without gates: which task reads which bottom."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fusedmoe.activation import Activation
from fusedmoe.reference.layers.mlp import MLP, experts_of, require_counts, require_widths
from fusedmoe.validation import require_indices

COMBINE = {
    "sum": lambda outputs: torch.stack(outputs, dim=1).sum(1),
    "mean": lambda outputs: torch.stack(outputs, dim=1).mean(1),
    "concat": lambda outputs: torch.cat(outputs, dim=1),
}


class SharedBottom(nn.Module):
    """Hand one bottom to every task: out[t] = MLP(x).

    Args:
        input_dim: D, the width of an input vector.
        hidden_dims: the layer widths of the bottom.
        num_tasks: T, the number of tasks.
        activation: its name in any case, or an `Activation`.
    Returns: forward maps [B, D] to [B, T, H], expanded from [B, H] (stride 0 over tasks).
    Raises: ValueError, TypeError at construction, naming the argument, what was expected and what
        came.
    Source: MMoE, equation 1.
    """

    def __init__(
        self, input_dim: int, hidden_dims: Sequence[int], num_tasks: int, activation: str | Activation = "RELU"
    ) -> None:
        super().__init__()
        require_counts(input_dim=input_dim, num_tasks=num_tasks)
        require_widths("hidden_dims", hidden_dims)
        self.bottom_projection = MLP(input_dim, hidden_dims, activation)
        self.num_tasks = num_tasks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.bottom_projection(input).unsqueeze(1).expand(-1, self.num_tasks, -1)


class SingleTask(nn.Module):
    """Give each task a bottom of its own: out[t] = MLP_t(x).

    Args: as `SharedBottom`, the widths for each bottom.
    Returns: forward maps [B, D] to [B, T, H].
    Source: the single-task baseline of MMoE, section 6.1.
    """

    def __init__(
        self, input_dim: int, hidden_dims: Sequence[int], num_tasks: int, activation: str | Activation = "RELU"
    ) -> None:
        super().__init__()
        require_counts(input_dim=input_dim, num_tasks=num_tasks)
        require_widths("hidden_dims", hidden_dims)
        self.bottoms = experts_of(num_tasks, input_dim, hidden_dims, activation)
        self.num_tasks = num_tasks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.stack([bottom(input) for bottom in self.bottoms], dim=1)


class AsymmetricSharing(nn.Module):
    """Task t combines the bottoms of the tasks it borrows: MLP_e(x) for e in borrows[t].

    Args:
        input_dim: D, the width of an input vector.
        hidden_dims: the layer widths of each bottom.
        num_tasks: T, the number of tasks.
        borrows: one list of task indices per task, its own included where it uses its own bottom.
        combine: "sum", "mean" or "concat".
        activation: its name in any case, or an `Activation`.
    Returns: forward maps [B, D] to [B, T, H], or [B, T, n H] for "concat" of n bottoms each.
    Raises: ValueError for borrows that do not fit the tasks, or an unknown `combine`.
    Source: PLE, section 3.2.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        num_tasks: int,
        borrows: Sequence[Sequence[int]],
        combine: str = "sum",
        activation: str | Activation = "RELU",
    ) -> None:
        super().__init__()
        require_counts(input_dim=input_dim, num_tasks=num_tasks)
        require_widths("hidden_dims", hidden_dims)
        if combine not in COMBINE:
            raise ValueError(f"combine: expected one of {', '.join(COMBINE)}, got {combine!r}")
        _require_borrows(borrows, num_tasks, combine)
        self.bottoms = experts_of(num_tasks, input_dim, hidden_dims, activation)
        self.num_tasks = num_tasks
        self.borrows = tuple(tuple(tasks) for tasks in borrows)
        self.combine = combine

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        outputs = {task: self.bottoms[task](input) for task in sorted(set().union(*self.borrows))}
        combine = COMBINE[self.combine]
        return torch.stack([combine([outputs[task] for task in tasks]) for tasks in self.borrows], dim=1)


class CustomizedSharing(nn.Module):
    """Give each task a bottom of its own and a shared one: out[t] = [MLP_t(x), MLP_T(x)].

    Args: as `SharedBottom`, the widths for each of the T + 1 bottoms.
    Returns: forward maps [B, D] to [B, T, 2 H].
    Source: PLE, section 3.2.
    """

    def __init__(
        self, input_dim: int, hidden_dims: Sequence[int], num_tasks: int, activation: str | Activation = "RELU"
    ) -> None:
        super().__init__()
        require_counts(input_dim=input_dim, num_tasks=num_tasks)
        require_widths("hidden_dims", hidden_dims)
        self.bottoms = experts_of(num_tasks + 1, input_dim, hidden_dims, activation)
        self.num_tasks = num_tasks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        *own, shared = [bottom(input) for bottom in self.bottoms]
        return torch.stack([torch.cat([mine, shared], dim=1) for mine in own], dim=1)


def _require_borrows(borrows: Sequence[Sequence[int]], num_tasks: int, combine: str) -> None:
    """Check that `borrows` lists different tasks for each task, equally many for a concatenation.

    Raises: ValueError.
    """
    if not isinstance(borrows, Sequence) or not all(isinstance(tasks, Sequence) for tasks in borrows):
        raise ValueError(f"borrows: expected one list of tasks for each of {num_tasks} tasks, got {borrows!r}")
    if len(borrows) != num_tasks:
        raise ValueError(f"borrows: expected one list of tasks for each of {num_tasks} tasks, got {len(borrows)}")
    for t, tasks in enumerate(borrows):
        require_indices(tuple(tasks), num_tasks, f"borrows[{t}]", "tasks", 1)
    if combine == "concat" and len({len(tasks) for tasks in borrows}) > 1:
        raise ValueError(
            f"borrows: expected equally many tasks in every list, to be concatenated, got "
            f"{[len(tasks) for tasks in borrows]}"
        )
