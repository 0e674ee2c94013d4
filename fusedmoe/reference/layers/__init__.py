"""The layers as users write them: plain loops over `nn.ModuleList`, `stack`, `bmm`.

The tests compare the fused layers with these, and the benchmark times them as eager PyTorch. If the
public AdaTT library has a layer, ours has the same constructor, attribute names and `state_dict`
keys, and creates its parameters in the same order. So a checkpoint loads in both, and the same seed
gives the same weights.
"""

from fusedmoe.reference.layers.adatt import AdaTT, AdaTTSp, AdaTTWSharedExps
from fusedmoe.reference.layers.central import ArchInputs, CentralTaskArch, MtlConfigs
from fusedmoe.reference.layers.cross_stitch import CrossStitch
from fusedmoe.reference.layers.mlp import MLP
from fusedmoe.reference.layers.mmoe import MLMMoE, MMoE, OMoE
from fusedmoe.reference.layers.ple import CGC, PLE
from fusedmoe.reference.layers.sharing import AsymmetricSharing, CustomizedSharing, SharedBottom, SingleTask

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
