"""Find the words for tensors that do not fit: what, where, expected and got."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fusedmoe.parts import Input
from fusedmoe.storage import require_memory
from fusedmoe.table import Table


def check(x: Any, params: Any, table: Any, cast: bool = False) -> None:
    """Check that x, the parameters and the table fit together.

    Args:
        x, params, table: as `fusion_network` takes them.
        cast: whether autocast made x bfloat16, so that the parameters may be float32.
    Raises: TypeError or ValueError, saying what, where, expected and got.
    """
    if not isinstance(table, Table):
        raise TypeError(f"table: expected a fusedmoe.Table, got {type(table).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    require_form(x, table.graph.inputs[0], "x")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    require_memory(x, "x")
    if not isinstance(params, Iterable):
        raise TypeError(f"params: expected {len(table.parameters)} tensors, got {type(params).__name__}")
    params = list(params)
    if len(params) != len(table.parameters):
        raise ValueError(f"params: expected {len(table.parameters)} tensors, got {len(params)}")
    # Where the parameters agree with one another, x is the one to change.
    found = {getattr(tensor, "dtype", None) for tensor in params}
    if len(found) == 1 and not found & {None, x.dtype} and not (cast and found == {torch.float32}):
        raise TypeError(f"x: expected {found.pop()}, the parameters' dtype, got {x.dtype}")
    for expect, tensor in zip(table.parameters, params, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params, {expect.name}: expected a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != expect.shape:
            raise ValueError(f"params, {expect.name}: expected {list(expect.shape)}, got {list(tensor.shape)}")
        if tensor.dtype != x.dtype and not (cast and tensor.dtype == torch.float32):
            raise TypeError(f"params, {expect.name}: expected {x.dtype}, the dtype of x, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"params, {expect.name}: expected a dense tensor, got layout {tensor.layout}")
        if tensor.device != x.device:
            raise ValueError(
                f"params, {expect.name}: expected a tensor on {x.device}, where x is, got one on {tensor.device}"
            )
        require_memory(tensor, f"params, {expect.name}")


def require_form(x: Tensor, given: Input, where: str) -> None:
    """Raise ValueError or TypeError unless a tensor is dense and of an input's shape."""
    shapes = [(given.slots, given.width)] + ([(given.width,)] if given.slots == 1 else [])
    if x.dim() < 2 or tuple(x.shape[1:]) not in shapes:
        forms = " or ".join(f"[B, {', '.join(map(str, shape))}]" for shape in shapes)
        raise ValueError(f"{where}: expected {forms}, got {list(x.shape)}")
    if x.layout != torch.strided:
        raise TypeError(f"{where}: expected a dense tensor, got layout {x.layout}")
