"""The inputs of a call as the one tensor that backends take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedmoe.checks import require_form
from fusedmoe.parts import Input
from fusedmoe.table import Table


def join(x: Any, table: Table) -> Any:
    """Return x as [B, S, D]: of several inputs their columns one after another, [B, 1, sum of S_i D_i].

    An input that no output can have a gradient for is detached, so that it gets None.

    Raises: TypeError, ValueError unless there is one tensor for each of `table.inputs`, of its
        shape, and all of one dtype (but under autocast), device and number of rows.
    """
    if len(table.inputs) == 1 and not isinstance(x, (list, tuple)):
        return x
    if not isinstance(x, (list, tuple)) or len(x) != len(table.inputs):
        what = "a tensor" if len(table.inputs) == 1 else f"a list of {len(table.inputs)} tensors"
        if isinstance(x, (list, tuple)):
            raise ValueError(f"x: expected {what}, got {len(x)} of them")
        raise TypeError(f"x: expected {what}, got {type(x).__name__}")
    if len(x) == 1:
        return x[0]
    for i, (tensor, given) in enumerate(zip(x, table.inputs, strict=True)):
        _check(tensor, given, x[0], f"x[{i}]")
    found = [t.flatten(1) if live else t.detach().flatten(1) for t, live in zip(x, table.live_inputs, strict=True)]
    return torch.cat(found, 1).unsqueeze(1)


def _check(tensor: Any, given: Input, first: Any, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: expected a tensor, got {type(tensor).__name__}")
    require_form(tensor, given, where)
    if tensor.shape[0] != first.shape[0]:
        raise ValueError(f"{where}: expected {first.shape[0]} rows, as x[0] has, got {tensor.shape[0]}")
    # Autocast casts what they are joined to.
    mixed = torch.is_autocast_enabled(tensor.device.type) and tensor.is_floating_point()
    if tensor.device != first.device or (tensor.dtype != first.dtype and not mixed):
        raise TypeError(
            f"{where}: expected {first.dtype} on {first.device}, as x[0] is, got {tensor.dtype} on {tensor.device}"
        )
