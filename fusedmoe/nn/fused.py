"""The forward that every module of this room has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fusedmoe.nn.binding import Binding
from fusedmoe.nn.wiring import Wiring


class Fused:
    """Give a reference layer's class one operator call as its forward: the same result from the same parameters under the same keys.

    A subclass names its `wiring` and puts this class before the layer's.

    Args:
        backend: a name out of `fusedmoe.backends()`, or "auto"; keyword only.
        others: those of the layer.
    Raises: RuntimeError at a call if the module was changed inside since it was bound (a hook, another submodule), or if the backend
        cannot run.
    """

    wiring: Callable[[nn.Module], Wiring]

    def __init__(self, *args, backend: str = "auto", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend
        # Not at the first call, which may be a trace of torch.compile.
        self.bind()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.bind().run(inputs, self.backend)

    def bind(self) -> Binding:
        """Return the module's parameters bound to its table. Copies and pickles carry the binding, bound to the copy."""
        if "_binding" not in self.__dict__:
            self._binding = Binding(self, type(self).wiring(self))
        return self._binding
