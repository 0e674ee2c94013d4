"""Parameters that are packed once for serving, and the guards that tell when they are outdated."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fusedmoe.backends import choose, transforming
from fusedmoe.checks import check
from fusedmoe.nn.guards import Contents, any_differ
from fusedmoe.nn.parameters import Parameters
from fusedmoe.packed import pack, runner
from fusedmoe.table import Table

# No WeakSet: another thread may add to it during an iteration. A list of a set is made in one step.
_LIVE: set[weakref.ref[Steps]] = set()


@functools.cache
def _hear_of_optimizers() -> None:
    """From the first frozen layer on, hear of every optimizer's steps.

    The fused optimizers of torch write without changing a version.
    """

    def after(optimizer: torch.optim.Optimizer, *_) -> None:
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for steps in [reference() for reference in list(_LIVE)]:
            if steps is not None:
                steps.take_note(parameters)

    register_optimizer_step_post_hook(after)


class Steps:
    """A guard: no optimizer may step over these parameters.

    `last` is the place of one over which one has.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = parameters
        self.last: int | None = None
        _hear_of_optimizers()
        _LIVE.add(weakref.ref(self, _LIVE.discard))

    def take_note(self, parameters: set[int]) -> None:
        """Take note that an optimizer stepped over the parameters of these ids."""
        self.last = next((i for i, parameter in enumerate(self.parameters) if id(parameter) in parameters), self.last)


class Writes:
    """A guard: tensors must keep their version, their address and the number in their middle."""

    def __init__(self, tensors: Sequence[Tensor]):
        from fusedmoe import _C

        self.tensors = tuple(tensors)
        self.stamps = tuple(map(_C.stamp, self.tensors))
        self._stamp = _C.stamp
        # No method, which would add a frame of Python to every call.
        self.differs = functools.partial(_C.any_written, self.tensors, self.stamps)

    def place(self, tensors: Sequence[Tensor]) -> int | None:
        """Return the place of the first of `tensors` that is not the guarded one, as it was."""
        for i, (bound, tensor, stamp) in enumerate(zip(self.tensors, tensors, self.stamps, strict=True)):
            if tensor is not bound or self._stamp(tensor) != stamp:
                return i
        return None


class Frozen:
    """The packed parameters of a module, and the guards of those in the module.

    Args:
        parameters: where the module has them.
        table: the layer's table.
        backend: "auto" or a name, as the layer has it.

    A parameter is the same if it is the same object, of the same version, at the same address, with
    the same number in its middle, and no optimizer stepped over it. Its memory is kept until the
    layer is unfrozen, because another tensor at that address would look the same. A write that
    PyTorch does not count (through `.data`, a NumPy view, from another process) and that spares the
    middle of every parameter cannot be seen.
    """

    def __init__(self, parameters: Parameters, table: Table, backend: str):
        self.parameters = parameters
        self.table = table
        self.backend = backend
        holders = {id(holder): holder for holder, _ in parameters.places}
        contents = Contents(holders.values())
        self._replaced = functools.partial(any_differ, contents.dicts, contents.bound)
        # Out of what was held: another thread may have replaced a parameter meanwhile.
        held = dict(zip(holders, contents.bound, strict=True))
        self._bound = tuple(held[id(holder)][name] for holder, name in parameters.places)
        self._memory = tuple(parameter.detach() for parameter in self._bound)
        # Before they are packed: what changes while they are is seen.
        self._writes = Writes(self._bound)
        self._steps = Steps(self._bound)
        self._run = runner(table)
        self.packed = pack(self._bound, table)

    def holds(self) -> bool:
        """Whether every parameter is what was packed."""
        return self._steps.last is None and not (self._replaced() or self._writes.differs())

    def changed(self) -> str:
        """Return the key of the first parameter that is not what was packed."""
        place = self._writes.place(self.parameters.tensors()) if self._steps.last is None else self._steps.last
        return "a parameter" if place is None else self.parameters.keys[place]

    def run(self, x: Tensor) -> Tensor | None:
        """Return the layer's output; None under a transform of torch.func.

        Such a transform can follow the layer's parameters alone, not the packed ones.

        Raises: TypeError, ValueError for a wrong x.
        """
        if transforming():
            return None
        try:
            return self._run(x, self.packed)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            check(x, self._bound, self.table)
            choose(self.backend, x.device, x.dtype)
            raise


def require_serving(module: nn.Module, x: Tensor, parameters: Callable[[], Sequence[Tensor]]) -> None:
    """Raise RuntimeError, with the cure, for a call that a frozen layer cannot serve.

    That is one in training mode, where gradients are needed, or under autocast.

    Whether its parameters are still those that were packed does not matter, and torch.compile can
    trace it: such a call is refused wherever it stands.
    """
    if module.training:
        raise RuntimeError(_refusal(module, "evaluation mode", "training mode", "model.eval(), or "))
    if torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in (x, *parameters())):
        cure = "torch.inference_mode(), or "
        raise RuntimeError(_refusal(module, "a call without gradients", "one that needs them", cure))
    if torch.is_autocast_enabled("cpu"):
        expected = f"a call in {parameters()[0].dtype}, as it was packed"
        raise RuntimeError(_refusal(module, expected, "one under autocast", ""))


def _refusal(module: nn.Module, expected: str, got: str, cure: str) -> str:
    problem = f"{type(module).__name__} is frozen for serving: expected {expected}, got {got}"
    return f"{problem}. Cure: {cure}fusedmoe.unfreeze(model)"
