"""The same two calls as operators that torch.compile keeps whole: it cannot trace into launches.
Eager calls do without their overhead."""

from __future__ import annotations

import torch
from torch import Tensor, library

from fusedmoe import codec
from fusedmoe.kernels import bound, network
from fusedmoe.kernels.lowering import inline_hidden, lower
from fusedmoe.kernels.operator import device_guard, last_dim_contiguous, launching, recomputed
from fusedmoe.kernels.program import Program


def _program(table_text: str, training: bool) -> Program:
    return (lower if training else inline_hidden)(codec.decode(table_text))


@library.custom_op("fusedmoe::network_kernels", mutates_args=())
def forward(
    x: Tensor,
    params: list[Tensor],
    table_text: str,
    training: bool,
    mixing: bool,
    recompute: bool,
    backend: str,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out, weights, and what backward takes: `network.forward`; of that nothing where the
    backward is to work it out again."""
    table = codec.decode(table_text)
    with launching(x, table, backend):
        x = last_dim_contiguous(x)
        out, weights, saved = network.forward(x, params, table, mixing, training, backend=backend, seed=seed)
    memory = x.new_empty(0, dtype=torch.uint8) if recompute and recomputed(table) else saved.memory
    return out, x.new_empty(x.shape[0], 0) if weights is None else weights, memory


@forward.register_fake
def _(x, params, table_text, training, mixing, recompute, backend, seed):
    program, rows = _program(table_text, training), x.shape[0]
    weights = x.new_empty(rows, program.table.mixing if mixing else 0)
    if recompute and recomputed(program.table):
        return x.new_empty(rows, *program.table.output), weights, x.new_empty(0, dtype=torch.uint8)
    softmax = bound.softmax_of(bound.key_of(x, program.table, training, None, backend))
    _, size = bound.saved_bytes(softmax, program.buffer_width, rows, x.element_size())
    return x.new_empty(rows, *program.table.output), weights, x.new_empty(size, dtype=torch.uint8)


@library.custom_op("fusedmoe::network_kernels_backward", mutates_args=())
def backward(
    d_out: Tensor,
    d_weights: Tensor | None,
    x: Tensor,
    params: list[Tensor],
    memory: Tensor,
    table_text: str,
    backend: str,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return d_x, and the gradients of all live parameters one after another: an operator's results
    must not share memory."""
    x, table = last_dim_contiguous(x), codec.decode(table_text)
    with device_guard(x):
        # Where it is empty, the forward is run once more.
        saved = (
            network.Saved(memory, seed=seed)
            if memory.numel()
            else network.forward(x, params, table, False, True, backend=backend, seed=seed)[2]
        )
        return network.flat_backward(d_out, d_weights, x, params, saved, table, backend=backend)


@backward.register_fake
def _(d_out, d_weights, x, params, memory, table_text, backend, seed):
    return x.new_empty(x.shape), x.new_empty(_program(table_text, True).gradients[1])


def _save(ctx, inputs, output) -> None:
    x, params, table_text, _, _, _, backend, seed = inputs
    _, _, memory = output
    ctx.mark_non_differentiable(memory)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, seed, memory, *params)
    ctx.table_text, ctx.backend = table_text, backend


def _gradients(ctx, d_out, d_weights, _):
    x, seed, memory, *params = ctx.saved_tensors
    table = codec.decode(ctx.table_text)
    if d_out is None:
        d_out = x.new_zeros(x.shape[0], *table.output)
    d_x, flat = backward(d_out, d_weights, x, params, memory, ctx.table_text, ctx.backend, seed)
    return d_x, network.with_dead(bound.split(flat, lower(table)), table), None, None, None, None, None, None


forward.register_autograd(_gradients, setup_context=_save)
