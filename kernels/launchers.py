"""Who launches a network's kernels: a module for each backend, all with the same names, so that `network.py` is one for all of them:

forward, backward_rows   (grid, *arguments, **constants): one launch. The arguments are those of the kernels of `forward.py` and `backward.py`
gradients                the same, with `flat` behind `parts`: the parameters' gradients by chunks of rows, and the ordered sum of these in `flat`
FOR_PARAMETERS           how many launches `gradients` is
BESIDE_HIDDEN            whether a source is kept beside hidden layers in tiles of 64 rows
constants                (tiles, align, precision, arch): what all launches of a call share, besides what `network.py` names at each
scratch                  (tasks, x): what more the launches of a backward with so many tasks of `gradients` share
addresses                (params, device): what stands among the arguments for the parameters' addresses, and whether all are multiples of 16
tiles_of_forward, tiles_of_backward   (the arguments of `network.forward`, `network.flat_backward`): tiles; None: the shipped ones
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

LAUNCHERS = {"triton": "fusedmoe.kernels.launch_triton", "cuda": "fusedmoe.kernels.launch_cuda"}


@functools.cache
def launcher(backend: str) -> ModuleType:
    """The launcher of a backend, imported when it is first asked for: none needs what the others do."""
    return importlib.import_module(LAUNCHERS[backend])
