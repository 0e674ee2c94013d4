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
    # The plan: its integers, its floats, and where among the former the launch's programs are.
    plan: Tensor
    floats: Tensor
    place: int
    B: int
    # Strides of x, in elements.
    x_row: int
    x_slot: int
    # Columns of the mixing weights.
    mixing: int


class RowwiseArguments(NamedTuple):
    """Of `rowwise.rowwise_forward`."""

    x: Tensor
    buffers: Tensor
    out: Tensor
    p: Tensor
    weights: Tensor
    addresses: Tensor
    plan: Tensor
    floats: Tensor
    # Of dropout, int64 [1]; the plan where nothing is dropped, which is then not read.
    seed: Tensor
    place: int
    B: int
    x_row: int
    x_slot: int
    mixing: int


class RowwiseBackwardArguments(NamedTuple):
    """Of `rowwise.rowwise_backward`."""

    x: Tensor
    buffers: Tensor
    # Not read.
    out: Tensor
    p: Tensor
    dw: Tensor
    d_x: Tensor
    d_buffers: Tensor
    d_out: Tensor
    d_weights: Tensor
    addresses: Tensor
    plan: Tensor
    floats: Tensor
    seed: Tensor
    place: int
    B: int
    x_row: int
    x_slot: int
    d_row: int
    d_slot: int
    mixing: int


class RowsArguments(NamedTuple):
    """Of `backward.backward_rows`."""

    x: Tensor
    buffers: Tensor
    # Not read.
    out: Tensor
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
    # Strides of d_x.
    d_row: int
    d_slot: int
    dz_row: int
    mixing: int


class GradientsArguments(NamedTuple):
    """Of `backward.gradients`."""

    x: Tensor
    buffers: Tensor
    # Not read.
    out: Tensor
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
    # Elements of all gradients.
    total: int


class SumArguments(NamedTuple):
    """Of `backward.add_chunks`."""

    parts: Tensor
    grads: Tensor  # [total]
    total: int
    chunks: int


Arguments = (
    ForwardArguments | RowwiseArguments | RowsArguments | RowwiseBackwardArguments | GradientsArguments | SumArguments
)
