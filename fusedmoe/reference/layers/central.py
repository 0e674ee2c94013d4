"""A whole multi-task network: a backbone chosen by name, and a tower per task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from fusedmoe.reference.layers.adatt import AdaTT, AdaTTSp
from fusedmoe.reference.layers.cross_stitch import CrossStitch
from fusedmoe.reference.layers.mlp import MLP, require_counts, require_levels, require_widths
from fusedmoe.reference.layers.mmoe import MLMMoE, OMoE
from fusedmoe.reference.layers.ple import CGC, PLE
from fusedmoe.reference.layers.sharing import AsymmetricSharing, CustomizedSharing, SharedBottom, SingleTask


@dataclass
class MtlConfigs:
    """What the backbone is made of.

    Args:
        mtl_model: a name out of `BACKBONES`.
        num_task_experts: m_t, one number or, where the backbone takes one, a list.
        num_shared_experts: m_s; for "mmoe" and "omoe" the number of experts.
        expert_out_dims: per level the layer widths of an expert; backbones of one level stack all
            of them in one expert.
        self_exp_res_connect: whether AdaTT has static weights.
        expert_archs, gate_archs, num_experts: accepted and not read, as in the public library.
        borrows: for "asymmetric", which bottoms each task reads; None: each task its own and task
            0's.
    """

    mtl_model: str = "att_sp"
    num_task_experts: int | list[int] = 1
    num_shared_experts: int = 1
    expert_out_dims: list[list[int]] = field(default_factory=list)
    self_exp_res_connect: bool = True
    expert_archs: list[list[int]] | None = None
    gate_archs: list[list[int]] | None = None
    num_experts: int | None = None
    borrows: list[list[int]] | None = None


@dataclass(frozen=True)
class ArchInputs:
    """The tasks: their number, the hidden widths of a tower, and the activation of the network."""

    num_task: int = 3
    task_mlp: list[int] = field(default_factory=list)
    mtl_configs: MtlConfigs | None = field(default=None)
    activation_type: str = "RELU"


class Backbone(NamedTuple):
    """How to build a backbone from (input_dim, configs, tasks).

    It takes x [B, D] if `extra_slots` is None, otherwise x [B, T + extra_slots, D]. Its output is
    `outputs` times as wide as an expert.
    """

    build: Callable[[int, MtlConfigs, ArchInputs], nn.Module]
    extra_slots: int | None = None
    outputs: int = 1


def _flat(configs: MtlConfigs) -> list[int]:
    """The widths of one bottom that stacks the experts of all levels."""
    return [width for widths in configs.expert_out_dims for width in widths]


def _adatt_sp(input_dim: int, configs: MtlConfigs, tasks: ArchInputs) -> nn.Module:
    return AdaTTSp(
        input_dim,
        configs.expert_out_dims,
        tasks.num_task,
        configs.num_task_experts,
        configs.self_exp_res_connect,
        tasks.activation_type,
    )


def _adatt(input_dim: int, configs: MtlConfigs, tasks: ArchInputs) -> nn.Module:
    counts = (
        [configs.num_task_experts] * tasks.num_task
        if isinstance(configs.num_task_experts, int)
        else configs.num_task_experts
    )
    return AdaTT(
        input_dim,
        configs.expert_out_dims,
        tasks.num_task,
        configs.num_shared_experts,
        num_task_expert_list=counts,
        self_exp_res_connect=configs.self_exp_res_connect,
        activation=tasks.activation_type,
    )


def _ple(input_dim: int, configs: MtlConfigs, tasks: ArchInputs) -> nn.Module:
    return PLE(
        input_dim,
        configs.expert_out_dims,
        tasks.num_task,
        configs.num_task_experts,
        configs.num_shared_experts,
        tasks.activation_type,
    )


def _cgc(input_dim: int, configs: MtlConfigs, tasks: ArchInputs) -> nn.Module:
    return CGC(
        input_dim,
        _flat(configs),
        tasks.num_task,
        configs.num_task_experts,
        configs.num_shared_experts,
        tasks.activation_type,
    )


def _cross_stitch(input_dim: int, configs: MtlConfigs, tasks: ArchInputs) -> nn.Module:
    return CrossStitch(input_dim, configs.expert_out_dims, tasks.num_task, tasks.activation_type)


def _ml_mmoe(input_dim: int, configs: MtlConfigs, tasks: ArchInputs) -> nn.Module:
    require_counts(num_shared_experts=configs.num_shared_experts)
    gate_archs = [[] for _ in configs.expert_out_dims]
    return MLMMoE(
        input_dim,
        configs.expert_out_dims,
        gate_archs,
        tasks.num_task,
        configs.num_shared_experts,
        tasks.activation_type,
    )


def _omoe(input_dim: int, configs: MtlConfigs, tasks: ArchInputs) -> nn.Module:
    require_counts(num_shared_experts=configs.num_shared_experts)
    return OMoE(input_dim, _flat(configs), [], tasks.num_task, configs.num_shared_experts, tasks.activation_type)


def _shared_bottom(input_dim: int, configs: MtlConfigs, tasks: ArchInputs) -> nn.Module:
    return SharedBottom(input_dim, _flat(configs), tasks.num_task, tasks.activation_type)


def _single_task(input_dim: int, configs: MtlConfigs, tasks: ArchInputs) -> nn.Module:
    return SingleTask(input_dim, _flat(configs), tasks.num_task, tasks.activation_type)


def _asymmetric(input_dim: int, configs: MtlConfigs, tasks: ArchInputs) -> nn.Module:
    borrows = configs.borrows or [sorted({0, t}) for t in range(tasks.num_task)]
    return AsymmetricSharing(input_dim, _flat(configs), tasks.num_task, borrows, activation=tasks.activation_type)


def _customized(input_dim: int, configs: MtlConfigs, tasks: ArchInputs) -> nn.Module:
    return CustomizedSharing(input_dim, _flat(configs), tasks.num_task, tasks.activation_type)


BACKBONES: dict[str, Backbone] = {
    "att_sp": Backbone(_adatt_sp, extra_slots=0),
    "att_g": Backbone(_adatt, extra_slots=1),
    "ple": Backbone(_ple, extra_slots=1),
    "cross_st": Backbone(_cross_stitch, extra_slots=0),
    "mmoe": Backbone(_ml_mmoe),
    "share_bottom": Backbone(_shared_bottom),
    "single_task": Backbone(_single_task),
    "omoe": Backbone(_omoe),
    "cgc": Backbone(_cgc),
    "asymmetric": Backbone(_asymmetric),
    "customized": Backbone(_customized, outputs=2),
}


class CentralTaskArch(nn.Module):
    """A backbone on an input that all tasks share, then towers.

        out[t] = W_t MLP_t(backbone(x)[t]) + b_t

    Args:
        mtl_configs: the backbone.
        opts: the tasks and their towers.
        input_dim: D, the width of an input vector.
    Returns: forward maps [B, D] to a list of T tensors [B, 1].
    Raises: ValueError, TypeError at construction, naming the argument or the field, what was
        expected and what came.
    """

    def __init__(self, mtl_configs: MtlConfigs, opts: ArchInputs, input_dim: int) -> None:
        super().__init__()
        # By their fields: the public library's classes do as well.
        if not hasattr(mtl_configs, "mtl_model"):
            raise TypeError(f"mtl_configs: expected an MtlConfigs, got {type(mtl_configs).__name__}")
        if not hasattr(opts, "task_mlp"):
            raise TypeError(f"opts: expected an ArchInputs, got {type(opts).__name__}")
        if mtl_configs.mtl_model not in BACKBONES:
            raise ValueError(f"mtl_model: expected one of {', '.join(BACKBONES)}, got {mtl_configs.mtl_model!r}")
        require_counts(num_task=opts.num_task, input_dim=input_dim)
        require_widths("task_mlp", opts.task_mlp, least=0)
        require_levels("expert_out_dims", mtl_configs.expert_out_dims)
        backbone = BACKBONES[mtl_configs.mtl_model]
        self.opts = opts
        self.num_tasks = opts.num_task
        self.mtl_model = mtl_configs.mtl_model
        self.mtl_arch = backbone.build(input_dim, mtl_configs, opts)
        width = backbone.outputs * mtl_configs.expert_out_dims[-1][-1]
        last = [width, *opts.task_mlp][-1]
        self.task_modules = nn.ModuleList(
            nn.Sequential(MLP(width, opts.task_mlp, opts.activation_type), nn.Linear(last, 1))
            for _ in range(opts.num_task)
        )

    def forward(self, task_arch_input: torch.Tensor) -> list[torch.Tensor]:
        extra_slots = BACKBONES[self.mtl_model].extra_slots
        if extra_slots is not None:
            task_arch_input = task_arch_input.unsqueeze(1).expand(-1, self.num_tasks + extra_slots, -1)
        outputs = self.mtl_arch(task_arch_input)
        return [tower(outputs[:, t]) for t, tower in enumerate(self.task_modules)]
