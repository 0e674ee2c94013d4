"""The same two calls as operators that torch.compile keeps whole: it cannot trace into launches. Eager calls do without their overhead."""

from __future__ import annotations

import torch
from torch import Tensor, library

from fusedmoe import codec
from fusedmoe.kernels import network
from fusedmoe.kernels.device import architecture
from fusedmoe.kernels.operator import inner, launching
from fusedmoe.kernels.plan import plan_of
from fusedmoe.kernels.program import Program, fused, lower
from fusedmoe.kernels.tiles import choose


def _program(table: str, training: bool) -> Program:
    return (lower if training else fused)(codec.decode(table))


@library.custom_op("fusedmoe::network_kernels", mutates_args=())
def forward(x: Tensor, params: list[Tensor], table: str, training: bool, mixing: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return out, weights, and what backward takes: `network.forward`."""
    with launching(x, backend):
        out, weights, saved = network.forward(inner(x), [p.contiguous() for p in params], codec.decode(table), mixing, training, backend=backend)
    return out, weights, saved.buffers, saved.softmax


@forward.register_fake
def _(x, params, table, training, mixing, backend):
    program = _program(table, training)
    rows = x.shape[0]
    tiles = choose(program, x.dtype, rows, architecture(x.device))
    plan = plan_of(program, tiles.whole, tiles.units, tiles.columns)
    weights = x.new_empty(rows, program.table.mixing if mixing else 0)
    return x.new_empty(rows, *program.table.output), weights, x.new_empty(rows * program.kept), x.new_empty(plan.softmax, rows, dtype=torch.float32)


@library.custom_op("fusedmoe::network_kernels_backward", mutates_args=())
def backward(
    d_out: Tensor, d_weights: Tensor | None, x: Tensor, params: list[Tensor], buffers: Tensor, softmax: Tensor, table: str, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return d_x, and the gradients of all live parameters one after another: an operator's results must not share memory."""
    given = None if d_weights is None else d_weights.contiguous()
    saved = network.Saved(buffers, softmax)
    with launching(x, backend):
        tensors = d_out.contiguous(), given, inner(x), [p.contiguous() for p in params]
        d_x, flat = network.flat_backward(*tensors, saved, codec.decode(table), backend=backend)
    return d_x, flat


@backward.register_fake
def _(d_out, d_weights, x, params, buffers, softmax, table, backend):
    return x.new_empty(x.shape), x.new_empty(_program(table, True).gradients[1])


def _save(ctx, inputs, output) -> None:
    x, params, table, _, _, backend = inputs
    _, _, buffers, softmax = output
    ctx.mark_non_differentiable(buffers, softmax)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, buffers, softmax, *params)
    ctx.table, ctx.backend = table, backend


def _gradients(ctx, d_out, d_weights, _, __):
    x, buffers, softmax, *params = ctx.saved_tensors
    if d_out is None:
        d_out = x.new_zeros(x.shape[0], *codec.decode(ctx.table).output)
    d_x, flat = backward(d_out, d_weights, x, params, buffers, softmax, ctx.table, ctx.backend)
    return d_x, network.split(flat, _program(ctx.table, True)), None, None, None, None


forward.register_autograd(_gradients, setup_context=_save)
