"""Layers fused from the start: the classes of `fusedmoe.reference.layers` with one operator call as their forward.

Constructor arguments, `state_dict` keys and initial weights are those of the reference layer of the same name; `backend` is added.
"""

from fusedmoe.nn.modules import (
    CGC,
    PLE,
    AdaTT,
    AdaTTSp,
    AdaTTWSharedExps,
    AsymmetricSharing,
    CentralTaskArch,
    CrossStitch,
    CustomizedSharing,
    MLMMoE,
    MMoE,
    OMoE,
    SharedBottom,
    SingleTask,
)
from fusedmoe.reference.layers import MLP, ArchInputs, MtlConfigs

__all__ = [
    "CGC",
    "MLP",
    "PLE",
    "AdaTT",
    "AdaTTSp",
    "AdaTTWSharedExps",
    "ArchInputs",
    "AsymmetricSharing",
    "CentralTaskArch",
    "CrossStitch",
    "CustomizedSharing",
    "MLMMoE",
    "MMoE",
    "MtlConfigs",
    "OMoE",
    "SharedBottom",
    "SingleTask",
]
