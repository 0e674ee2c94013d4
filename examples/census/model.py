"""The model of the demonstration: field embeddings and numbers, then a multi-task network of one
family with a tower per task.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedmoe.demo.dataset import Dataset, Part
from fusedmoe.reference.layers import ArchInputs, CentralTaskArch, MtlConfigs

EMBEDDING = 8
EXPERTS = [[256], [128]]
TOWER = [64]
# Two experts a task, as AdaTT's ablations settle on; one shared expert; eight in a pool without
# owners, as in MMoE's own tests.
PER_TASK, SHARED, POOL = 2, 1, 8

# The families that CentralTaskArch builds.
MODELS = {
    "single_task": MtlConfigs("single_task", expert_out_dims=EXPERTS),
    "shared_bottom": MtlConfigs("share_bottom", expert_out_dims=EXPERTS),
    "omoe": MtlConfigs("omoe", num_shared_experts=POOL, expert_out_dims=EXPERTS),
    "mmoe": MtlConfigs(
        "mmoe", num_shared_experts=POOL, expert_out_dims=[[width for level in EXPERTS for width in level]]
    ),
    "ml_mmoe": MtlConfigs("mmoe", num_shared_experts=POOL, expert_out_dims=EXPERTS),
    "cgc": MtlConfigs("cgc", PER_TASK, SHARED, EXPERTS),
    "ple": MtlConfigs("ple", PER_TASK, SHARED, EXPERTS),
    "adatt_sp": MtlConfigs("att_sp", PER_TASK, expert_out_dims=EXPERTS),
    "adatt": MtlConfigs("att_g", PER_TASK, SHARED, EXPERTS),
    "cross_stitch": MtlConfigs("cross_st", expert_out_dims=EXPERTS),
    "asymmetric_sharing": MtlConfigs("asymmetric", expert_out_dims=EXPERTS),
    "customized_sharing": MtlConfigs("customized", expert_out_dims=EXPERTS),
}
# Families whose experts belong to no task.
POOLED = ("shared_bottom", "omoe", "mmoe", "ml_mmoe")


class TabularModel(nn.Module):
    """Embed the fields of a row, append its numbers, and run a multi-task network on that.

        x = [table[field 1], ..., table[field F], numbers];   out[t] = tower_t(backbone(x)[t])

    Args:
        data: gives the sizes of the fields, the count of numbers, and the tasks.
        family: a name out of `MODELS`.
    Returns: forward maps fields [B, F] and numbers [B, C] to logits or values [B, T].
    """

    def __init__(self, data: Dataset, family: str) -> None:
        super().__init__()
        # One table for all fields: one gather instead of F small ones.
        self.embedding = nn.Embedding(sum(data.field_sizes), EMBEDDING) if data.field_sizes else None
        self.register_buffer("first_row", torch.tensor([0, *data.field_sizes[:-1]]).cumsum(0)[: len(data.field_sizes)])
        width = EMBEDDING * len(data.field_sizes) + data.train.numbers.shape[1]
        self.network = CentralTaskArch(MODELS[family], ArchInputs(len(data.tasks), TOWER), width)

    def inputs(self, part: Part) -> Tensor:
        """Return the network's input x [B, D]."""
        if self.embedding is None:
            return part.numbers
        return torch.cat([self.embedding(part.fields + self.first_row).flatten(1), part.numbers], dim=1)

    def forward(self, part: Part) -> Tensor:
        return torch.cat(self.network(self.inputs(part)), dim=1)


def loss_of(outputs: Tensor, part: Part, binary: bool) -> Tensor:
    """Return the sum over tasks of the mean cross-entropy (binary) or squared error."""
    loss = nn.functional.binary_cross_entropy_with_logits if binary else nn.functional.mse_loss
    return loss(outputs, part.targets, reduction="none").mean(0).sum()


def expert_names(family: str, tasks: tuple[str, ...], experts: int) -> list[str]:
    """Name the experts of a level: by their task, with a letter where it has several, the rest
    "shared"; by number where nobody owns them.
    """
    if family in POOLED:
        return [str(e + 1) for e in range(experts)]
    each = MODELS[family].num_task_experts
    own = [f"{task} {chr(ord('a') + i)}" if each > 1 else task for task in tasks for i in range(each)]
    return [*own, *["shared"] * (experts - len(own))]


def unit_names(tasks: tuple[str, ...], units: int) -> list[str]:
    """Name the units of a level: by task, with one more "shared".

    "all" where there is one for all tasks; else by number.
    """
    if units == 1:
        return ["all"]
    return [*tasks, "shared"][:units] if units <= len(tasks) + 1 else [str(u + 1) for u in range(units)]
