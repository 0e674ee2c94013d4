"""The parameters of a module packed once for serving, and the watch that undoes that when one of them changes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fusedmoe.backends import choose, transforming
from fusedmoe.checks import check
from fusedmoe.packed import pack, runner
from fusedmoe.table import Table

_LIVE: weakref.WeakSet[Frozen] = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    """From the first frozen layer on, hear of every optimizer's steps: the fused ones of torch write without changing a version."""

    def after(optimizer: torch.optim.Optimizer, *_) -> None:
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for frozen in list(_LIVE):
            frozen.stepped(parameters)

    register_optimizer_step_post_hook(after)


class Frozen:
    """The packed parameters of a module, and what shows that those in the module are still the ones that were packed.

    Args:
        module: the layer.
        places: (the `_parameters` dict that holds it, its name there) of every parameter, in the order of `table.parameters`.
        table: the layer's table.
        backend: "auto" or a name, as the layer has it.

    A parameter is the same if it is the same object, of the same version, at the same address, with the same number in its middle,
    and no optimizer stepped over it. Its memory is kept until the layer is thawed, because another tensor at that address would look
    the same. A write that PyTorch does not count (through `.data`, a NumPy view, from another process) and that spares the middle of
    every parameter cannot be seen.
    """

    def __init__(self, module: nn.Module, places: Sequence[tuple[dict, str]], table: Table, backend: str):
        from fusedmoe import _C

        self.module = module
        self.table = table
        self.backend = backend
        self._parameters = [parameters[leaf] for parameters, leaf in places]
        self._tensors = tuple(parameter.detach() for parameter in self._parameters)
        holders = {id(parameters): parameters for parameters, _ in places}.values()
        self._holders = tuple(holders)
        self._held = tuple(dict(parameters) for parameters in holders)
        self._watched = tuple(self._parameters)
        self._stamps = tuple(map(_C.stamp, self._watched))
        self._any_differ, self._any_written = _C.any_differ, _C.any_written
        self._run = runner(table)
        self.packed = pack(self._parameters, table)
        self._stepped: int | None = None
        _watch_optimizers()
        _LIVE.add(self)

    def holds(self) -> bool:
        """Whether every parameter is what was packed."""
        return self._stepped is None and not (self._any_differ(self._holders, self._held) or self._any_written(self._watched, self._stamps))

    def changed(self, keys: Sequence[str], tensors: Sequence[Tensor]) -> str:
        """Return the key of the first parameter that is not what was packed."""
        from fusedmoe import _C

        if self._stepped is not None:
            return keys[self._stepped]
        pairs = zip(keys, self._parameters, tensors, self._stamps, strict=True)
        return next((key for key, bound, tensor, stamp in pairs if tensor is not bound or _C.stamp(tensor) != stamp), "a parameter")

    def stepped(self, parameters: set[int]) -> None:
        """Take note that an optimizer stepped over the parameters of these ids."""
        self._stepped = next((i for i, parameter in enumerate(self._parameters) if id(parameter) in parameters), self._stepped)

    def run(self, x: Tensor) -> Tensor | None:
        """Return the layer's output; None under a transform of torch.func, which only the layer's parameters themselves can follow.

        Raises: RuntimeError in training mode, where gradients are needed or under autocast; TypeError, ValueError for a wrong x.
        """
        if self.module.training:
            raise RuntimeError(self._refusal("evaluation mode", "training mode", "model.eval(), or "))
        if torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in (x, *self._parameters)):
            raise RuntimeError(self._refusal("a call without gradients", "one that needs them", "torch.inference_mode(), or "))
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError(self._refusal(f"a call in {self.packed.dtype}, as it was packed", "one under autocast", ""))
        if transforming():
            return None
        try:
            return self._run(x, self.packed)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            if isinstance(x, Tensor):
                choose(self.backend, x.device, x.dtype)
            check(x, self._parameters, self.table)
            raise

    def _refusal(self, expected: str, got: str, cure: str) -> str:
        return f"{type(self.module).__name__} is frozen for serving: expected {expected}, got {got}. Cure: {cure}fusedmoe.unfreeze(model)"
