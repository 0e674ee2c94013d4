"""The backend `cpu`: autograd around `fusedmoe::network_cpu` and its backward.

The C++ extension registers these operators. Their fake kernels, autograd and autocast are
registered here, for `torch.compile` and for callers of the bare operator. The formulas stand in
`reference/operator.py`, which also gives the second derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, library

from fusedmoe import codec, outputs
from fusedmoe.backends import EXTENSION, transforming
from fusedmoe.casting import at_least_float32, without_autocast
from fusedmoe.checks import check
from fusedmoe.outputs import Options, apart, by_level, needs_gradient, without_graph
from fusedmoe.reference import operator as reference
from fusedmoe.table import Table

# What the operator's `save` asks it to keep for backward.
SAVE_NOTHING, SAVE_ALL, SAVE_LEAST = 0, 1, 2


class _Network(torch.autograd.Function):
    """The operator's autograd, as it is registered below.

    It avoids one dispatch through Python. It returns what `outputs.split` does: autograd tells which
    of the tensors have a gradient.
    """

    @staticmethod
    def forward(ctx, table: Table, save: int, options: Options, seed: Tensor | None, x: Tensor, *params: Tensor):
        with torch._C._AutoDispatchBelowAutograd():
            out, weights, saved = torch.ops.fusedmoe.network_cpu(
                x, params, codec.handle(table), save, options.mixing, seed
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed, x, saved, *params)
        ctx.table, ctx.tasks_apart = table, options.tasks_apart
        return outputs.split(out, weights if options.mixing else None, table, options.tasks_apart)

    @staticmethod
    def backward(ctx, *d_outputs):
        # Once: a checkpoint that runs the forward again hands each tensor out one time.
        saved = ctx.saved_tensors
        upstream = outputs.join(d_outputs, saved[1], ctx.table, ctx.tasks_apart)
        d_x, d_params = _gradients(saved, upstream, codec.handle(ctx.table), ctx.needs_input_grad[4:])
        return None, None, None, None, d_x, *d_params


def run(
    x: Tensor, params: list[Tensor], table: Table, options: Options, seed: Tensor | None
) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    """Return the outputs, one or one a task, and each level's mixing weights."""
    compiling, mixing = torch.compiler.is_compiling(), options.mixing
    text = codec.encode(table) if compiling else codec.handle(table)
    save = SAVE_LEAST if options.recompute else SAVE_ALL
    if compiling:
        out, weights, _ = torch.ops.fusedmoe.network_cpu(
            x, params, text, save if needs_gradient(x, params) else SAVE_NOTHING, mixing, seed
        )
    elif needs_gradient(x, params):
        return apart(_Network.apply(table, save, options, seed, x, *params), table, options)
    else:
        # Without a graph to build, the Python autograd kernel would only cost time.
        with torch._C._AutoDispatchBelowAutograd():
            out, weights, _ = torch.ops.fusedmoe.network_cpu(x, params, text, SAVE_NOTHING, mixing, seed)
    return without_graph(out, by_level(weights, table) if mixing else (), options)


def _register() -> None:
    """Register fake kernels, autograd and autocast of the operators that the extension defines."""
    library.register_fake("fusedmoe::network_cpu", _fake_forward)
    library.register_fake("fusedmoe::network_cpu_backward", _fake_backward)
    library.register_autograd("fusedmoe::network_cpu", _backward, setup_context=_save)
    library.register_autograd("fusedmoe::network_cpu_backward", _double_backward, setup_context=_save_for_double)
    # For callers of the bare operator; `fusion_network` leaves autocast by itself.
    library.register_autocast("fusedmoe::network_cpu", "cpu", torch.float32)


def _fake_forward(x, params, table_text, save, mixing, seed):
    from fusedmoe import _C

    table = codec.decode(table_text)
    check(x, params, table, cast=x.dtype == torch.bfloat16)
    rows = x.shape[0]
    # Whole vectors of rows (`padded` in csrc/cpu/plan.h), and a header of 16 numbers.
    padded = -(-rows // _C.LANE_MULTIPLE) * _C.LANE_MULTIPLE
    size = padded * _C.saved_width(table_text, save == SAVE_LEAST) + _C.HEADER_SIZE if save else 0
    # bfloat16 and float16 are kept in float32.
    state = x.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(rows, *table.output), x.new_empty(rows, table.mixing if mixing else 0), state


def _fake_backward(d_out, d_weights, x, params, saved, table_text, needs, seed):
    wanted = [x, *params]
    return [tensor.new_empty(tensor.shape) for tensor, flag in zip(wanted, needs, strict=True) if flag == "1"]


def _save(ctx, inputs, output):
    x, params, table_text, _, _, seed = inputs
    saved = output[2]
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(seed, x, saved, *params)
    ctx.table_text = table_text


def _backward(ctx, d_out, d_weights, _):
    need_x, need_params, *_ = ctx.needs_input_grad
    saved = ctx.saved_tensors
    x = saved[1]
    table = codec.decode(ctx.table_text)
    whole = outputs.join(
        (d_out, *(by_level(d_weights, table) if d_weights is not None and d_weights.shape[1] else ())),
        x,
        table,
        tasks_apart=False,
    )
    d_x, d_params = _gradients(saved, whole, ctx.table_text, (need_x, *need_params))
    return d_x, d_params, None, None, None, None


def _gradients(
    tensors, upstream: outputs.Upstream, table_text: str, needed: tuple[bool, ...]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Run the backward operator for x and the parameters that need it.

    Returns: None in place of a gradient on which no output with a gradient depends.
    """
    seed, x, saved, *params = tensors
    d_out, d_weights, tasks, levels = upstream
    flags, needs = _wanted(table_text, tasks, levels, needed)
    arguments = (d_out, d_weights, x, params, saved, table_text, needs, seed)
    if not torch.compiler.is_compiling() and (transforming() or torch._C._functorch.is_legacy_batchedtensor(d_out)):
        return _batched(*arguments)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        results = torch.ops.fusedmoe.network_cpu_backward(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            results = torch.ops.fusedmoe.network_cpu_backward(*arguments)
    if len(results) == len(params) and not flags[0]:
        return None, results
    remaining = iter(results)
    d_x, *d_params = [next(remaining) if flag else None for flag in flags]
    return d_x, d_params


@functools.lru_cache(maxsize=4096)
def _wanted(
    table_text: str, tasks: tuple[bool, ...], levels: tuple[bool, ...], needed: tuple[bool, ...]
) -> tuple[tuple[bool, ...], str]:
    """For x and each parameter, whether to compute its gradient; and the same as text.

    A gradient is computed if it is needed and some wanted output depends on its tensor.
    """
    flags = tuple(a and b for a, b in zip(outputs.dependent(table_text, tasks, levels), needed, strict=True))
    return flags, "".join("1" if flag else "0" for flag in flags)


def _batched(d_out, d_weights, x, params, saved, table_text, needs, seed) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients under vmap (`is_grads_batched`), by the reference.

    vmap can batch plain PyTorch, but no C++ kernel.
    """
    grads = _plain_gradients(d_out, d_weights, x, params, codec.decode(table_text), seed)
    d_x, *d_params = [d if flag == "1" else None for d, flag in zip(grads, needs, strict=True)]
    return d_x, d_params


def _plain_gradients(
    d_out: Tensor, d_weights: Tensor | None, x: Tensor, params: Sequence[Tensor], table: Table, seed: Tensor | None
) -> list[Tensor | None]:
    """The reference's backward, in float32 where x is narrower, as the kernels sum.

    Returns: each gradient in the dtype of its tensor.
    """
    d_levels = by_level(at_least_float32(d_weights), table) if d_weights is not None else (None,) * len(table.levels)
    d_x, d_params = reference.backward(
        at_least_float32(x), [at_least_float32(p) for p in params], table, at_least_float32(d_out), d_levels, seed
    )
    return [d if d is None else d.to(t.dtype) for d, t in zip((d_x, *d_params), (x, *params), strict=True)]


def _save_for_double(ctx, inputs, output):
    d_out, d_weights, x, params, _, table_text, needs, seed = inputs
    ctx.save_for_backward(seed, d_out, d_weights, x, *params)
    ctx.table_text = table_text
    ctx.needs = needs


def _double_backward(ctx, dd):
    """Differentiate the reference's backward, which is plain differentiable PyTorch."""
    table = codec.decode(ctx.table_text)
    again = torch.is_grad_enabled()
    # A third derivative goes on through their history. An alias each, because d_out may itself
    # depend on x: that path is not ours.
    seed, *saved = ctx.saved_tensors
    tensors = [
        t if t is None else t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in saved
    ]
    d_out, d_weights, x, *params = tensors
    with torch.enable_grad(), without_autocast(x):
        grads = _plain_gradients(d_out, d_weights, x, params, table, seed)
        wanted = [d for d, flag in zip(grads, ctx.needs, strict=True) if flag == "1"]
        pairs = [(d, g) for d, g in zip(wanted, dd, strict=True) if g is not None and d is not None and d.requires_grad]
        inputs = [t for t in tensors if t is not None]
        results = iter([None] * len(inputs))
        if pairs:
            results = iter(
                torch.autograd.grad(
                    [d for d, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True, create_graph=again
                )
            )
    d_d_out, d_d_weights, dd_x, *dd_params = [None if t is None else next(results) for t in tensors]
    return d_d_out, d_d_weights, dd_x, dd_params, None, None, None, None


if EXTENSION is not None:
    _register()
