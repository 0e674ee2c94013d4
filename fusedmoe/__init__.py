"""Fast layers for multi-task recommenders: MMoE, PLE, AdaTT and their relatives in one call.

    import fusedmoe
    report = fusedmoe.fuse(model)      # in place, reversible
    print(report)

`fusedmoe/reference/operator.py` has the mathematics, `fusedmoe/families.py` the families.
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
