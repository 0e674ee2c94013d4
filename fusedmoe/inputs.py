"""The inputs of a call as the one tensor that backends take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedmoe.parts import Input
from fusedmoe.table import Table


def join(x: Any, table: Table) -> Any:
    """Return x as [B, S, D]: of several inputs their columns one after another, [B, 1, sum of S_i D_i].

    An input that no output can have a gradient for is detached, so that it gets None.

    Raises: TypeError, ValueError unless there is one tensor for each of `table.inputs`, of its
        shape, and all of one dtype, device and number of rows.
    """
    if len(table.inputs) == 1 and (isinstance(x, Tensor) or not isinstance(x, Sequence)):
        return x
    if isinstance(x, Tensor) or not isinstance(x, Sequence) or len(x) != len(table.inputs):
        got = f"{len(x)}" if isinstance(x, Sequence) else type(x).__name__
        what = "a tensor" if len(table.inputs) == 1 else f"a list of {len(table.inputs)} tensors"
        raise TypeError(f"x: expected {what}, got {got}")
    if len(x) == 1:
        return x[0]
    for i, (tensor, given) in enumerate(zip(x, table.inputs, strict=True)):
        _check(tensor, given, x[0], f"x[{i}]")
    found = [t.flatten(1) if live else t.detach().flatten(1) for t, live in zip(x, table.live_inputs, strict=True)]
    return torch.cat(found, 1).unsqueeze(1)


def _check(tensor: Any, given: Input, first: Any, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: expected a tensor, got {type(tensor).__name__}")
    shapes = [(given.slots, given.width)] + ([(given.width,)] if given.slots == 1 else [])
    if tensor.dim() < 2 or tuple(tensor.shape[1:]) not in shapes:
        forms = " or ".join(f"[B, {', '.join(map(str, shape))}]" for shape in shapes)
        raise ValueError(f"{where}: expected {forms}, got {list(tensor.shape)}")
    if tensor.shape[0] != first.shape[0]:
        raise ValueError(f"{where}: expected {first.shape[0]} rows, as x[0] has, got {tensor.shape[0]}")
    if (tensor.dtype, tensor.device) != (first.dtype, first.device):
        raise TypeError(
            f"{where}: expected {first.dtype} on {first.device}, as x[0] is, got {tensor.dtype} on {tensor.device}"
        )
