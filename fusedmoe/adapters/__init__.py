"""Find what a module computes, by its attributes and submodules: registered adapters, and ours."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from fusedmoe.adapters import adatt_library
from fusedmoe.adapters.conditions import require_fusable
from fusedmoe.adapters.extent import require_small
from fusedmoe.adapters.forward import (
    CURE,
    FusedForward,
    Match,
    Recognised,
    input_name,
    installed,
    on_instance,
    one_per_task,
    runs_the_class,
    whole,
)
from fusedmoe.adapters.probe import require_agreement
from fusedmoe.nn.binding import Binding
from fusedmoe.nn.parameters import Parameters
from fusedmoe.nn.wiring import Unfusable, Wiring

Adapter = Callable[[nn.Module], Wiring | Match | None]

_registered: list[Adapter] = []


def register_adapter(function: Adapter) -> Callable[[], None]:
    """Let `function` recognise modules, before the built-in adapter and those registered earlier.

    Args:
        function: called with every module of a model, outermost first. It returns None for a module
            that it does not know, a `Wiring` (the table, and the module's `state_dict` keys in the
            order of `table.parameters`), or a `Match` if the input rank or output structure differs
            from the table's. It raises `Unfusable(reason)` for a module that it knows and declines.
            It only reads the module.

    What it finds is probed numerically before anything is fused, as for the built-in adapter.

    Returns: a function without arguments that takes the adapter out again, if it is still there.

    Raises: TypeError if `function` cannot be called, ValueError if it is registered already.

    Example: a layer of two linear experts over x [B, D], mixed by a gate on x for one task:

        from fusedmoe import families
        from fusedmoe.adapters import Wiring, register_adapter

        def two_experts(module):
            if type(module).__name__ != "TwoExperts":
                return None
            width, widths = module.left.in_features, [[module.left.out_features]]
            table = families.mmoe(width, widths, num_tasks=1, num_experts=2, activation="identity")
            linears = ("left", "right", "gate")
            keys = [f"{name}.{kind}" for name in linears for kind in ("weight", "bias")]
            return Wiring(table, keys)

        unregister = register_adapter(two_experts)
    """
    if not callable(function):
        raise TypeError(f"register_adapter: expected a function of a module, got {type(function).__name__}")
    if function in _registered:
        raise ValueError(f"register_adapter: expected a new adapter, got {function!r}, which is registered already")
    _registered.append(function)

    def unregister() -> None:
        if function in _registered:
            _registered.remove(function)

    return unregister


def recognise(module: nn.Module) -> Recognised | None:
    """Return what `module` computes, probed and bound; None if no adapter knows the module.

    Raises: Unfusable, with the reason, if an adapter knows it but it cannot be fused exactly.
        RuntimeError, naming both, if an adapter raises anything else on the module; TypeError if it
        returns something else.
    """
    for adapter in reversed(_registered):
        found = _ask(adapter, module)
        if found is not None:
            rank = 2 if isinstance(found, Wiring) and found.table.inputs[0].slots == 1 else 3
            match = found if isinstance(found, Match) else Match(_name(adapter), found, rank)
            require_fusable(module)
            return _probed(module, match)
    return _recognise_library(module)


def _recognise_library(module: nn.Module) -> Recognised | None:
    """Try each layer of the public library whose marks the module has."""
    layers = adatt_library.candidates(module)
    if not layers:
        adatt_library.require_no_experts(module)
        return None
    require_fusable(module)
    # Each reason with the families that it keeps the module from.
    unlike: dict[str, list[str]] = {}
    differing: dict[str, list[str]] = {}
    for layer in layers:
        reasons = unlike
        try:
            match = adatt_library.match(module, layer)
            reasons = differing
            return _probed(module, match)
        except Unfusable as error:
            reasons.setdefault(str(error), []).append(layer.family)
    # What came as far as the probe says more than what failed before.
    found = "; ".join(f"{', '.join(families)}: {reason}" for reason, families in (differing or unlike).items())
    raise Unfusable(found if differing else f"{found}; {adatt_library.TEACH}")


def _probed(module: nn.Module, match: Match) -> Recognised:
    """Bind the module to a match that computes what it does. Raises: Unfusable if it does not."""
    # Before anything is copied; then shapes: their messages are clearer than the probe's.
    require_small(module, match.wiring.keys)
    parameters = Parameters(module, match.wiring)
    argument = input_name(module)
    require_agreement(module, match)
    return Recognised(match, argument, Binding(module, match.wiring.table, parameters, CURE))


def _ask(adapter: Adapter, module: nn.Module) -> Wiring | Match | None:
    try:
        found = adapter(module)
    except Unfusable:
        raise
    except Exception as error:
        what = f"{type(error).__name__} on a {type(module).__name__}: {error}"
        raise RuntimeError(f"adapter {_name(adapter)} raised {what}") from error
    if found is not None and not isinstance(found, (Wiring, Match)):
        raise TypeError(f"adapter {_name(adapter)}: expected a Wiring, a Match or None, got {type(found).__name__}")
    return found


def _name(adapter: Adapter) -> str:
    """Return the name of a function, also in a `functools.partial`, or of a callable's class."""
    function = adapter.func if isinstance(adapter, functools.partial) else adapter
    return getattr(function, "__name__", type(function).__name__)


__all__ = [
    "FusedForward",
    "Match",
    "Unfusable",
    "Wiring",
    "installed",
    "on_instance",
    "one_per_task",
    "recognise",
    "register_adapter",
    "runs_the_class",
    "whole",
]
