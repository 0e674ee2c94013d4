"""Fused dense mixtures of experts for multi-task recommenders: swap layers for speed, measure them, trust them.

    import fusedmoe
    report = fusedmoe.fuse(model)      # in place, reversible
    print(report)

The mathematics stand in `fusedmoe/reference/operator.py`, every family's wiring in `fusedmoe/families.py`.
"""

from fusedmoe import functional, nn
from fusedmoe.activation import Activation
from fusedmoe.backends import available_backends
from fusedmoe.freezing import FreezeReport, freeze, unfreeze
from fusedmoe.swap import FuseReport, describe, fuse, register_adapter, unfuse
from fusedmoe.table import Table

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "FreezeReport",
    "FuseReport",
    "Table",
    "available_backends",
    "describe",
    "freeze",
    "functional",
    "fuse",
    "nn",
    "register_adapter",
    "unfreeze",
    "unfuse",
]
