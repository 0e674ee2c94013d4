"""The parameters of a module packed once for serving, and the watch that undoes that when one of them changes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fusedmoe.backends import choose, transforming
from fusedmoe.checks import check
from fusedmoe.packed import pack, runner
from fusedmoe.table import Table

# No WeakSet: to iterate one while another thread adds to it is an error, a list of a set is made in one step.
_LIVE: set[weakref.ref[Frozen]] = set()


@functools.cache
def _watch_optimizers() -> None:
    """From the first frozen layer on, hear of every optimizer's steps: the fused ones of torch write without changing a version."""

    def after(optimizer: torch.optim.Optimizer, *_) -> None:
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for frozen in [reference() for reference in list(_LIVE)]:
            if frozen is not None:
                frozen.stepped(parameters)

    register_optimizer_step_post_hook(after)


class Frozen:
    """The packed parameters of a module, and what shows that those in the module are still the ones that were packed.

    Args:
        places: (the `_parameters` dict that holds it, its name there) of every parameter, in the order of `table.parameters`.
        table: the layer's table.
        backend: "auto" or a name, as the layer has it.

    A parameter is the same if it is the same object, of the same version, at the same address, with the same number in its middle,
    and no optimizer stepped over it. Its memory is kept until the layer is thawed, because another tensor at that address would look
    the same. A write that PyTorch does not count (through `.data`, a NumPy view, from another process) and that spares the middle of
    every parameter cannot be seen.
    """

    def __init__(self, places: Sequence[tuple[dict, str]], table: Table, backend: str):
        from fusedmoe import _C

        self.table = table
        self.backend = backend
        holders = {id(parameters): parameters for parameters, _ in places}
        held = {key: dict(parameters) for key, parameters in holders.items()}
        self._holders = tuple(holders.values())
        self._held = tuple(held.values())
        # Out of what is held: another thread may have put a parameter in the place of one meanwhile.
        self._parameters = tuple(held[id(parameters)][leaf] for parameters, leaf in places)
        self._tensors = tuple(parameter.detach() for parameter in self._parameters)
        self._stamps = tuple(map(_C.stamp, self._parameters))
        self._any_differ, self._any_written = _C.any_differ, _C.any_written
        self._stepped: int | None = None
        # Before they are packed: what changes while they are is seen.
        _watch_optimizers()
        _LIVE.add(weakref.ref(self, _LIVE.discard))
        self._run = runner(table)
        self.packed = pack(self._parameters, table)

    def holds(self) -> bool:
        """Whether every parameter is what was packed."""
        return self._stepped is None and not (self._any_differ(self._holders, self._held) or self._any_written(self._parameters, self._stamps))

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

        Raises: TypeError, ValueError for a wrong x.
        """
        if transforming():
            return None
        try:
            return self._run(x, self.packed)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            if isinstance(x, Tensor):
                choose(self.backend, x.device, x.dtype)
            check(x, self._parameters, self.table)
            raise


def require_serving(module: nn.Module, x: Tensor, parameters: Callable[[], Sequence[Tensor]]) -> None:
    """Raise RuntimeError, with the cure, for a call of a frozen layer in training mode, where gradients are needed or under autocast.

    Whether its parameters are still those that were packed does not matter, and torch.compile can trace it: such a call is refused
    wherever it stands.
    """
    if module.training:
        raise RuntimeError(_refusal(module, "evaluation mode", "training mode", "model.eval(), or "))
    if torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in (x, *parameters())):
        raise RuntimeError(_refusal(module, "a call without gradients", "one that needs them", "torch.inference_mode(), or "))
    if torch.is_autocast_enabled("cpu"):
        raise RuntimeError(_refusal(module, f"a call in {parameters()[0].dtype}, as it was packed", "one under autocast", ""))


def _refusal(module: nn.Module, expected: str, got: str, cure: str) -> str:
    return f"{type(module).__name__} is frozen for serving: expected {expected}, got {got}. Cure: {cure}fusedmoe.unfreeze(model)"
