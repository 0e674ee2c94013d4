"""The forward that `fuse` puts on an instance, and how it is found there again.

Other libraries set forwards on instances too, around the one that is there: a function that calls
it, its `__func__` bound to the module, anything. So a forward of ours is on its module itself, or
out of sight under one that is not ours; whatever holds it there keeps it alive, and `installed`
finds it among the live ones. It cannot be taken out of there, but it can be retired: it then runs
the forward of the class.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from fusedmoe.nn.binding import Binding
from fusedmoe.nn.wiring import Unfusable, Wiring
from fusedmoe.outputs import per_task

_LIVE: set[weakref.ref[FusedForward]] = set()
CURE = "fusedmoe.unfuse(model) runs it as it is, fusedmoe.fuse(model) looks at it anew"


def whole(out: Tensor) -> Tensor:
    """Return the output of the network as the module's: [B, T, H]."""
    return out


def one_per_task(out: Tensor) -> list[Tensor]:
    """Return a list of T outputs [B, O] from [B, T, O].

    As `Match.returns` it makes the operator return one tensor per task, so an unused tower gets
    gradient None.
    """
    return per_task(out)


class Match(NamedTuple):
    """What an adapter found in a module.

    `rank` is that of the module's input, 2 for [B, D] and 3 for [B, S, D]. `returns`
    maps [B, T, H] to what the module's forward returns; it must be a module-level function, so that
    a fused model can be pickled.
    """

    family: str
    wiring: Wiring
    rank: int
    returns: Callable[[Tensor], object] = whole


class Recognised(NamedTuple):
    """A match that was probed, the name of the forward's one input, and the module's binding."""

    match: Match
    argument: str
    binding: Binding


class FusedForward:
    """Compute what the module's class does, by one operator call over the module's parameters.

    Args:
        found: what the module computes. The module is the one on which this is, or will be, set as
            the instance attribute `forward`. `nn.Module.__call__` finds it there, so that hooks on
            the module stay around it. It does not keep the module alive.
        backend, recompute: handed to the operator at every call.

    Called with a module first, as a function of the class is, it computes for that module: what its
    class does, if it is another than the one it was made for (a copy, whose forward was bound by
    somebody who wrapped it).
    """

    def __init__(self, found: Recognised, backend: str, recompute: bool = False):
        self.family = found.match.family
        self.backend = backend
        self.recompute = recompute
        self.rank = found.match.rank
        self.returns = found.match.returns
        self.argument = found.argument
        self.binding = found.binding
        self.retired = False
        _LIVE.add(weakref.ref(self, _LIVE.discard))

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _LIVE.add(weakref.ref(self, _LIVE.discard))

    def __call__(self, *inputs, **named):
        """Return the module's output for x [B, D] or [B, S, D].

        Raises: TypeError for other arguments, ValueError for another rank, RuntimeError if the
            module was changed inside.
        """
        module = None
        if inputs and isinstance(inputs[0], nn.Module):
            module, *inputs = inputs
        if self.retired or not (module is None or self.binding.binds(module)):
            module = self.binding.module if module is None else module
            return type(module).forward(module, *inputs, **named)
        if len(inputs) + len(named) != 1 or any(name != self.argument for name in named):
            got = f"{len(inputs)} positional and {list(named)}"
            raise TypeError(f"{self.name}.forward: expected one argument {self.argument}, got {got}")
        x = inputs[0] if inputs else named[self.argument]
        table = self.binding.table
        if isinstance(x, Tensor) and x.dim() != self.rank:
            expected = (
                f"[B, {table.inputs[0].width}]"
                if self.rank == 2
                else f"[B, {table.inputs[0].slots}, {table.inputs[0].width}]"
            )
            raise ValueError(f"{self.name}.forward: expected {self.argument} {expected}, got {list(x.shape)}")
        if self.returns is one_per_task:
            return self.binding.run(x, self.backend, recompute=self.recompute, tasks_apart=True)
        return self.returns(self.binding.run(x, self.backend, recompute=self.recompute))

    @property
    def __func__(self) -> Callable:
        """Return it as a function of a module, as bound methods have it.

        Libraries wrap that function and bind the result, which copies with the module.
        """

        def forward(module, *inputs, **named):
            return self(module, *inputs, **named)

        function: Any = forward
        function.__signature__ = inspect.signature(type(self.binding.module).forward)
        function.fused_forward = self
        return function

    @property
    def __code__(self):
        """That of the class's forward: torch.export reads the place of a forward off it."""
        return type(self.binding.module).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class's forward: dynamic shapes of torch.export go by its arguments."""
        return inspect.signature(type(self.binding.module).forward.__get__(self.binding.module))

    @property
    def name(self) -> str:
        """That of the module's class."""
        return type(self.binding.module).__name__


def on_instance(module: nn.Module) -> FusedForward | None:
    """Return the forward of ours that is set on this very module, with nothing around it."""
    forward = module.__dict__.get("forward")
    function = getattr(forward, "__func__", None)
    # What wraps a function has its attributes, and says so.
    return None if hasattr(function, "__wrapped__") else getattr(function, "fused_forward", None)


def installed(module: nn.Module) -> FusedForward | None:
    """Return the forward of ours that runs the module: on the instance, or wrapped by another."""
    if "forward" not in module.__dict__:
        return None
    own = on_instance(module)
    live = [own] if own else _live()
    return next((forward for forward in live if not forward.retired and forward.binding.binds(module)), None)


def around(module: nn.Module) -> FusedForward | None:
    """Return the live forward of a layer in which `module` lies.

    It would not run on if `module` were fused too.
    """
    return next((forward for forward in _live() if not forward.retired and forward.binding.contains(module)), None)


def _live() -> list[FusedForward]:
    return [forward for reference in list(_LIVE) if (forward := reference()) is not None]


def runs_the_class(module: nn.Module) -> bool:
    """Whether a forward set on the instance is the class's, bound, or one of ours, retired."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__func__ is type(module).forward:
        return forward.__self__ is module
    return on_instance(module) is not None and installed(module) is None


def input_name(module: nn.Module) -> str:
    """Return the name of the one input that the forward of the module's class takes.

    Raises: Unfusable if it takes another number of them.
    """
    names = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(names) != 1 or names[0].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        raise Unfusable(f"its forward takes ({', '.join(map(str, names))}), expected one input")
    return names[0].name
