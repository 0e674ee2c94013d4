"""Who launches a network's kernels: a module for each backend, all with the same names, so that `network.py` is one for all of them:

forward                  (bound, x, params, mixing): run a `bound.Forward`; out, the mixing weights or None, and the memory that the backward reads.
                         Raises for tensors that are not what the table says; what is wrong with them says `checks.check`
backward                 (bound, d_out, d_weights, x, params, memory, apart): run a `bound.Backward`; d_x and the gradients of all live parameters,
                         each a tensor (apart), or one after another in one tensor
FOR_PARAMETERS           how many launches the gradients of the parameters are
BESIDE_HIDDEN            whether a source is kept beside hidden layers in tiles of 64 rows
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

LAUNCHERS = {"triton": "fusedmoe.kernels.launch_triton", "cuda": "fusedmoe.kernels.launch_cuda"}
# Who finds other tiles than the shipped ones: CUDA's kernels come compiled, and others are not there.
TUNERS = {"triton": "fusedmoe.kernels.tuning"}


@functools.cache
def launcher(backend: str) -> ModuleType:
    """The launcher of a backend, imported when it is first asked for: none needs what the others do."""
    return importlib.import_module(LAUNCHERS[backend])


@functools.cache
def tuner(backend: str) -> ModuleType | None:
    """The module whose `of_forward` and `of_backward` find tiles for a call of a backend, or None."""
    return importlib.import_module(TUNERS[backend]) if backend in TUNERS else None
