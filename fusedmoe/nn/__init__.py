"""Layers that are fused from the start.

Each is the class of `fusedmoe.reference.layers` of the same name, with one call of the operator as
its forward. Constructor arguments, `state_dict` keys and initial weights are the same; the
constructors also take `backend` and `recompute`.
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
