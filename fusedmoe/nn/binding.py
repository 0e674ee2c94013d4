"""Bind a module's own parameters to its table, and notice when its inside has changed since."""

from __future__ import annotations

import threading
import warnings
import weakref

import torch
from torch import Tensor, nn

from fusedmoe.nn.frozen import Frozen, require_serving
from fusedmoe.nn.guards import Guards, interceptions
from fusedmoe.nn.parameters import Parameters
from fusedmoe.nn.wiring import Unfusable
from fusedmoe.op import fusion_network
from fusedmoe.outputs import per_task
from fusedmoe.table import Table

CURE = "undo it, or build the module anew and load its state_dict"
# What PyTorch itself keeps in every module.
TABLES_OF_TORCH = vars(nn.Module()).keys()
# Held where a thread sets `frozen` to what depends on what it was.
_FREEZING = threading.Lock()


def require_plain(module: nn.Module) -> None:
    """Raise Unfusable, with place, if something stands between the forward and its parameters."""
    for interception in interceptions(module):
        raise Unfusable(interception)


class Binding:
    """The parameters of a module, its table, and the guards of the structure for which that holds.

    Args:
        module: the layer, for which `require_plain` did not raise; nothing is written to it.
        table: what it computes.
        parameters: where its parameters are.
        cure: what a message about a later change inside the module tells the user to do.

    It holds references to what is in the module, never copies of parameters: those replaced or
    changed in place are seen at the next call. To the module itself it holds a weak one, so that it
    may be stored there and `del module` frees both at once; `deepcopy` and `pickle` carry both,
    bound to each other. In code that torch.compile made, hooks added afterwards are not looked for:
    that is so for any compiled module.
    """

    def __init__(self, module: nn.Module, table: Table, parameters: Parameters, cure: str = CURE):
        self._module = weakref.ref(module)
        self.cure = cure
        self.table = table
        self.parameters = parameters
        self.guards = Guards(module)
        # For `_stand_in`.
        self._class = type(module)
        self._tables = {name: value for name, value in vars(module).items() if name in TABLES_OF_TORCH}
        # Set by `freeze`; copies and pickles leave it behind, and so are not frozen.
        self.frozen: Frozen | None = None

    @property
    def module(self) -> nn.Module:
        """The module; once it is freed, a stand-in for who holds its forward."""
        module = self._module()
        return self._stand_in() if module is None else module

    def binds(self, module: nn.Module) -> bool:
        """Whether `module` is the bound one: not a shallow copy, nor another with its forward."""
        return self._module() is module

    def contains(self, module: nn.Module) -> bool:
        """Whether `module` is one inside the bound one, whose forward is not run."""
        return any(inner is module for inner in self.guards.inner)

    def tensors(self) -> list[Tensor]:
        """Return the parameters as they are at this moment, in the order of `table.parameters`.

        Raises: RuntimeError if one of them is no longer a parameter of its submodule.
        """
        try:
            return self.parameters.tensors()
        except KeyError:
            raise self._error(self.changed()) from None

    def changed(self) -> str | None:
        """Return what was changed inside the module since it was bound, or None."""
        module = self.module
        return self.guards.changed(module) or self.parameters.changed(module)

    def unchanged(self) -> nn.Module:
        """Return the module. Raises: RuntimeError, naming the place, if its inside was changed."""
        module = self.module
        if self.guards.differ(module):
            change = self.changed()
            if change:
                raise self._error(change)
        return module

    def run(
        self,
        x: Tensor,
        backend: str = "auto",
        return_mixing_weights: bool = False,
        recompute: bool = False,
        tasks_apart: bool = False,
    ):
        """Return `fusion_network` over the module's parameters.

        Args:
            x: [B, D] or [B, S, D].
            backend: a name, or "auto".
            return_mixing_weights: also return the mixing weights of every level.
            recompute, tasks_apart: as `fusion_network` has them.

        Raises: RuntimeError if the module's inside was changed since it was bound; as
        `require_serving` if it is frozen.

        A frozen module runs from its packed parameters, and is unfrozen, with a warning, where they
        are no longer the module's. Code that torch.compile made reads the module's parameters
        themselves, under the same conditions; so do calls for the mixing weights, under none.
        """
        module = self.unchanged()
        # Once: another thread may freeze or unfreeze the module meanwhile.
        frozen = self.frozen
        if frozen is not None and not return_mixing_weights:
            require_serving(module, x, self.tensors)
            out = self._run_frozen(frozen, x, backend)
            if out is not None:
                return per_task(out) if tasks_apart else out
        try:
            tensors = self.parameters.tensors()
            return fusion_network(x, tensors, self.table, backend, return_mixing_weights, recompute, tasks_apart)
        except (KeyError, TypeError):
            # Not looked for at every call: a parameter that is gone, or that is None.
            change = self.changed()
            if change:
                raise self._error(change) from None
            raise

    def freeze(self, backend: str) -> None:
        """Pack the module's parameters for serving with `backend`, or anew.

        Raises: RuntimeError as `fusedmoe.packed.pack`.
        """
        frozen = Frozen(self.parameters, self.table, backend)
        with _FREEZING:
            self.frozen = frozen

    def _run_frozen(self, frozen: Frozen, x: Tensor, backend: str) -> Tensor | None:
        """Return the output of packed parameters, or None; unfreeze the module if it is outdated."""
        # Asked here: after a graph break torch.compile may begin with this very function.
        if torch.compiler.is_compiling():
            return None
        if backend == frozen.backend and frozen.holds():
            return frozen.run(x)
        with _FREEZING:
            # Of threads that find it outdated one unfreezes it and warns. What another packed stays.
            unfrozen = self.frozen is frozen
            if unfrozen:
                self.frozen = None
        if change := self.changed():
            raise self._error(change)
        if unfrozen:
            what = frozen.changed() if backend == frozen.backend else "its backend"
            name, cure = type(self.module).__name__, "fusedmoe.freeze(model) packs it again"
            warnings.warn(f"{name} is no longer frozen: {what} was changed; {cure}", stacklevel=4)
        return None

    def _stand_in(self) -> nn.Module:
        """Replace a module that is gone by one with its parameters, submodules and attributes."""
        module = self._class.__new__(self._class)
        training = any(inner.training for inner in self.guards.inner)
        vars(module).update(self._tables | self.guards.attributes(), training=training)
        self._strong = module
        self._module = weakref.ref(module)
        return module

    def __getstate__(self) -> dict:
        left = ("frozen", "_module", "_strong")
        return {"module": self.module, **{name: value for name, value in self.__dict__.items() if name not in left}}

    def __setstate__(self, state: dict) -> None:
        self._module = weakref.ref(state.pop("module"))
        self.__dict__.update(state)
        self.frozen = None

    def _error(self, change: str | None) -> RuntimeError:
        name = type(self.module).__name__
        return RuntimeError(f"{name} was changed inside after it was fused. {change}. Cure: {self.cure}")
