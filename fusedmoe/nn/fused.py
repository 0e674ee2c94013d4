"""The forward that every module of `fusedmoe.nn` has."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from fusedmoe.backends import require
from fusedmoe.nn.binding import Binding, require_plain
from fusedmoe.nn.parameters import Parameters
from fusedmoe.nn.wiring import Unfusable, Wiring
from fusedmoe.validation import require_flag

# What the docstring of every module says, before its source.
PROMISE = """    Args: those of `fusedmoe.reference.layers.{layer}`, `backend` and `recompute` (keyword only).
    Raises: at construction as `Fused`, at a call as `Fused.forward`.
"""


class Fused:
    """Replace a reference layer's forward by one operator call.

    The result is the same, from the same parameters under the same keys.
    A subclass puts this class before the layer's and names `make_wiring`, the function that reads
    the layer's wiring off it: `class MMoE(Fused, layers.MMoE, make_wiring=wiring.mmoe)`. `__init_subclass__`
    completes its docstring with arguments and errors.

    Args:
        backend: a name out of `fusedmoe.available_backends()`, or "auto"; keyword only.
        recompute: keep less for backward and run experts and towers again there; keyword only.
        others: those of the layer.
    Raises: at construction ValueError or TypeError, naming the argument, what was expected and what
        came; RuntimeError for a backend that cannot run on this machine.
    """

    make_wiring: Callable[[nn.Module], Wiring]
    _binding: Binding

    def __init_subclass__(cls, make_wiring: Callable[[nn.Module], Wiring] | None = None, **others) -> None:
        super().__init_subclass__(**others)
        if make_wiring is not None:
            cls.make_wiring = staticmethod(make_wiring)
            text, source, rest = (cls.__doc__ or "").partition("    Source: ")
            cls.__doc__ = text.rstrip() + "\n\n" + PROMISE.format(layer=cls.__name__) + source + rest

    def __init__(self, *args, backend: str = "auto", recompute: bool = False, **kwargs) -> None:
        require(backend)
        require_flag(recompute, "recompute")
        super().__init__(*args, **kwargs)
        self.backend = backend
        self.recompute = recompute
        # Not at the first call, which may be a trace of torch.compile.
        try:
            self.bind()
        except Unfusable as error:
            # Whoever calls a constructor gave it something wrong; that no table has it is the
            # library's view.
            raise ValueError(str(error)) from None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the layer's output by one operator call.

        Args:
            inputs: [B, S, D], S the slots of the class; [B, D] for a class whose tasks share one
                input.
        Returns: [B, T, H], of the dtype of `inputs`.
        Raises: TypeError, ValueError for inputs of another type, shape, dtype or device;
            RuntimeError if the module was changed inside since it was bound (a hook, another
            submodule), or if the backend cannot take these inputs.
        """
        return self.bind().run(inputs, self.backend, recompute=self.recompute)

    def bind(self) -> Binding:
        """Return the module's parameters bound to its table.

        Copies and pickles carry the binding, bound to the copy.

        Raises: Unfusable if the module was changed inside before it was bound.
        """
        module = cast(nn.Module, self)
        # A shallow copy comes with the binding of the original.
        if "_binding" not in self.__dict__ or not self._binding.binds(module):
            wiring = type(self).make_wiring(module)
            require_plain(module)
            self._binding = Binding(module, wiring.table, Parameters(module, wiring))
        return self._binding
