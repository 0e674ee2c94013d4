"""The arguments of Triton's kernels that a call gives them, in the order of their signatures; a
test compares the two."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ForwardArguments(NamedTuple):
    """Of `forward.forward`. Tensors that a call does not have are x, which is then not read or
    written."""

    x: Tensor  # [B, S, D]
    buffers: Tensor  # [B x buffer width], what segments hand on
    out: Tensor  # [B, *table.output]
    p: Tensor  # [rows of the softmax, B], float32
    weights: Tensor  # [B, mixing], the mixing weights
    addresses: Tensor  # [P], int64, of the parameters
    plan: Tensor  # int32
    floats: Tensor  # float32
    place: int  # of the launch's programs in the plan
    B: int
    x_row: int  # strides of x, in elements
    x_slot: int
    mixing: int  # columns of the mixing weights


class RowsArguments(NamedTuple):
    """Of `backward.backward_rows`."""

    x: Tensor
    buffers: Tensor
    out: Tensor  # not read
    p: Tensor
    dw: Tensor  # [rows of dw, B], float32: the mixing weights' gradients, in parts
    d_x: Tensor  # [B, S, D]
    d_buffers: Tensor
    d_out: Tensor  # [B, *table.output]
    d_weights: Tensor  # [B, mixing]
    dz: Tensor  # [B, dz_row]
    addresses: Tensor
    plan: Tensor
    floats: Tensor
    place: int
    B: int
    x_row: int
    x_slot: int
    d_row: int  # strides of d_x
    d_slot: int
    dz_row: int
    mixing: int


class GradientsArguments(NamedTuple):
    """Of `backward.gradients`."""

    x: Tensor
    buffers: Tensor
    out: Tensor  # not read
    dw: Tensor
    d_weights: Tensor
    dz: Tensor
    parts: Tensor  # [chunks, total], float32
    plan: Tensor
    place: int
    B: int
    x_row: int
    x_slot: int
    dz_row: int
    mixing: int
    total: int  # elements of all gradients


class SumArguments(NamedTuple):
    """Of `backward.add_chunks`."""

    parts: Tensor
    grads: Tensor  # [total]
    total: int
    chunks: int


Arguments = ForwardArguments | RowsArguments | GradientsArguments | SumArguments
