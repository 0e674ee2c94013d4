"""Who launches a network's kernels: one module for each GPU backend, all with the functions of
`Launcher`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

if TYPE_CHECKING:
    # Not at run time: `import fusedmoe` asks this module for names alone.
    from fusedmoe.kernels.bound import Backward, Forward

LAUNCHERS = {"triton": "fusedmoe.kernels.triton.launch", "cuda": "fusedmoe.kernels.cuda"}
# How many launches the gradients of the parameters are. Triton: their parts, and the parts' sum;
# CUDA: in each tile the last block adds its parts.
GRADIENT_LAUNCHES = {"triton": 2, "cuda": 1}


class Launcher(Protocol):
    """Launches what a call is bound to. Both raise ValueError for tensors that are not what the
    table says. seed: int64 [1], of dropout; None: nothing is dropped."""

    def forward(
        self, bound: Forward, x: Tensor, params: Sequence[Tensor], mixing: bool, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return out, the mixing weights or None, and the memory that the backward reads."""

    def backward(
        self,
        bound: Backward,
        d_out: Tensor,
        d_weights: Tensor | None,
        x: Tensor,
        params: Sequence[Tensor],
        memory: Tensor,
        seed: Tensor | None,
        apart: bool,
    ) -> list[Tensor]:
        """Return d_x and the gradients of all live parameters, each a tensor (`apart`), or one
        after another in one tensor."""


@functools.cache
def launcher(backend: str) -> Launcher:
    """The launcher of a backend, imported when it is first asked for: none needs what the others
    do."""
    return cast(Launcher, importlib.import_module(LAUNCHERS[backend]))
