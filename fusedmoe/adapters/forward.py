"""The forward that `fuse` puts on an instance."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from fusedmoe.nn.binding import Binding
from fusedmoe.nn.wiring import Unfusable, Wiring
from fusedmoe.outputs import per_task

CURE = "fusedmoe.unfuse(model) runs it as it is, fusedmoe.fuse(model) looks at it anew"


def whole(out: Tensor) -> Tensor:
    """Return the output of the network as the module's: [B, T, H]."""
    return out


def one_per_task(out: Tensor) -> list[Tensor]:
    """Return a list of T outputs [B, O] from [B, T, O]. Named as a match's `returns` it asks the operator itself for them, so that the
    tower of a task that a loss leaves out has no gradient."""
    return per_task(out)


class Match(NamedTuple):
    """What an adapter found in a module.

    `rank` is that of the module's input, 2 for [B, D] and 3 for [B, S, D]. `returns` gives the network's output [B, T, H] the
    module's own structure; it is a function of a module, so that a fused model can be pickled.
    """

    family: str
    wiring: Wiring
    rank: int
    returns: Callable[[Tensor], object] = whole


class FusedForward:
    """Compute what the module's class computes, by one call of the operator over the module's own parameters.

    Args:
        module: the module on which it is, or will be, set as the instance attribute `forward`. `nn.Module.__call__` finds it there,
            so that hooks on the module stay around it.
        match: what the module computes.
        backend, recompute: handed to the operator at every call.

    Raises: Unfusable as `Binding` does, and if the forward of the module's class does not take exactly one input.
    """

    def __init__(self, module: nn.Module, match: Match, backend: str, recompute: bool = False):
        self.family = match.family
        self.backend = backend
        self.recompute = recompute
        self.rank = match.rank
        self.returns = match.returns
        self.argument = _input_of(module)
        self.binding = Binding(module, match.wiring, CURE)

    def __call__(self, *inputs, **named):
        """Return the module's output for x [B, D] or [B, S, D].

        Raises: TypeError for other arguments, ValueError for another rank, RuntimeError if the module was changed inside.
        """
        if len(inputs) + len(named) != 1 or any(name != self.argument for name in named):
            raise TypeError(f"{self._name()}.forward: expected one argument {self.argument}, got {len(inputs)} positional and {list(named)}")
        x = inputs[0] if inputs else named[self.argument]
        table = self.binding.table
        if isinstance(x, Tensor) and x.dim() != self.rank:
            expected = f"[B, {table.width}]" if self.rank == 2 else f"[B, {table.slots}, {table.width}]"
            raise ValueError(f"{self._name()}.forward: expected {self.argument} {expected}, got {list(x.shape)}")
        if self.returns is one_per_task:
            return self.binding.run(x, self.backend, recompute=self.recompute, tasks_apart=True)
        return self.returns(self.binding.run(x, self.backend, recompute=self.recompute))

    @property
    def __code__(self):
        """That of the class's forward: torch.export reads the place of a forward off it."""
        return type(self.binding.module).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class's forward: dynamic shapes of torch.export go by its arguments."""
        return inspect.signature(type(self.binding.module).forward.__get__(self.binding.module))

    def _name(self) -> str:
        return type(self.binding.module).__name__


def _input_of(module: nn.Module) -> str:
    """Return the name of the one input of the forward of the module's class."""
    names = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(names) != 1 or names[0].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        raise Unfusable(f"its forward takes ({', '.join(map(str, names))}), expected one input")
    return names[0].name
