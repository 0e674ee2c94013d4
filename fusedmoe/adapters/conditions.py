"""What a module must be before its wiring is read: called plainly, with plain parameters."""

from __future__ import annotations

import torch
from torch import nn

from fusedmoe import dtype as dtypes
from fusedmoe.adapters.forward import around, runs_the_class
from fusedmoe.nn.binding import require_plain
from fusedmoe.nn.wiring import Unfusable


def require_fusable(module: nn.Module) -> None:
    """Raise Unfusable, with reason and place, if nothing in the module could be fused exactly."""
    if "forward" in module.__dict__ and not runs_the_class(module):
        name = getattr(module.forward, "__qualname__", type(module.forward).__name__)
        raise Unfusable(f"it has a forward of its own set on the instance ({name})")
    outer = around(module)
    if outer:
        raise Unfusable(f"it lies inside a {outer.name} that is fused; fusedmoe.unfuse(model) before")
    require_plain(module)
    first = None
    for name, parameter in module.named_parameters():
        _require_ordinary(name, parameter)
        kind = (parameter.dtype, parameter.device)
        first = first or (name, *kind)
        if kind != first[1:]:
            raise Unfusable(f"{name}: expected {first[1]} on {first[2]} as {first[0]}, got {kind[0]} on {kind[1]}")
    if first is None:
        raise Unfusable("it has no parameters")


def _require_ordinary(name: str, parameter: torch.Tensor) -> None:
    if type(parameter) not in (nn.Parameter, torch.Tensor):
        raise Unfusable(f"{name}: expected an ordinary parameter, got {type(parameter).__name__}")
    if parameter.device.type == "meta":
        raise Unfusable(f"{name}: has no data yet (meta device); fuse after the weights are there")
    if parameter.layout != torch.strided:
        raise Unfusable(f"{name}: expected a dense parameter, got layout {parameter.layout}")
    try:
        dtypes.row(parameter.dtype)
    except TypeError as error:
        raise Unfusable(f"{name}: {error}") from None
