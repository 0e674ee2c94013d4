"""What a call's tensors must be, said in words: the kernels refuse what does not fit, this says what, where, expected and got."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fusedmoe.backends import transforming
from fusedmoe.table import Table


def check(x, params, table, lowered: bool = False) -> None:
    """Raise TypeError or ValueError, saying what, where, expected and got, unless the three fit together.

    `lowered`: x is bfloat16 by autocast, and the parameters may be float32.
    """
    if not isinstance(table, Table):
        raise TypeError(f"table: expected a fusedmoe.Table, got {type(table).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    shapes = [(table.slots, table.width)] + ([(table.width,)] if table.slots == 1 else [])
    if x.dim() < 2 or tuple(x.shape[1:]) not in shapes:
        raise ValueError(f"x: expected {' or '.join(f'[B, {str(s)[1:-1].rstrip(chr(44))}]' for s in shapes)}, got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x: expected a dense tensor, got layout {x.layout}")
    _check_memory(x, "x")
    if not isinstance(params, Iterable):
        raise TypeError(f"params: expected {len(table.parameters)} tensors, got {type(params).__name__}")
    params = list(params)
    if len(params) != len(table.parameters):
        raise ValueError(f"params: expected {len(table.parameters)} tensors, got {len(params)}")
    for expect, tensor in zip(table.parameters, params, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params, {expect.name}: expected a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != expect.shape:
            raise ValueError(f"params, {expect.name}: expected {list(expect.shape)}, got {list(tensor.shape)}")
        if tensor.dtype != x.dtype and not (lowered and tensor.dtype == torch.float32):
            raise TypeError(f"params, {expect.name}: expected {x.dtype}, the dtype of x, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"params, {expect.name}: expected a dense tensor, got layout {tensor.layout}")
        if tensor.device != x.device:
            raise ValueError(f"params, {expect.name}: expected a tensor on {x.device}, where x is, got one on {tensor.device}")
        _check_memory(tensor, f"params, {expect.name}")


def _check_memory(tensor: Tensor, name: str) -> None:
    """Raise ValueError unless all numbers of an ordinary tensor lie inside its storage, as `check_memory` of csrc/tensors.h does."""
    # What is traced or batched has no storage of its own.
    if type(tensor) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling() or transforming() or not tensor.numel():
        return
    if torch._C._functorch.is_legacy_batchedtensor(tensor) or tensor._is_zerotensor():
        return
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed, held = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if held < needed:
        raise ValueError(f"{name}: expected a storage of {needed} bytes or more, got one of {held}; was it freed?")
