"""The backend `reference`: autograd around `operator.py`.

Its backward is plain PyTorch, so it can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedmoe import outputs
from fusedmoe.backends import transforming
from fusedmoe.casting import without_autocast
from fusedmoe.checks import check
from fusedmoe.outputs import Options, apart, by_level, per_task, without_graph
from fusedmoe.reference import operator as reference
from fusedmoe.table import Table


class _Reference(torch.autograd.Function):
    """The reference's forward and hand-derived backward.

    Only the inputs are saved, so backward can be differentiated again.
    """

    @staticmethod
    def forward(ctx, table: Table, tasks_apart: bool, mixing: bool, seed: Tensor | None, x: Tensor, *params: Tensor):
        ctx.table, ctx.tasks_apart = table, tasks_apart
        ctx.save_for_backward(seed, x, *params)
        ctx.set_materialize_grads(False)
        out, weights = reference.forward(x, params, table, seed=seed)
        return (*([part.data for part in per_task(out)] if tasks_apart else [out]), *(weights if mixing else ()))

    @staticmethod
    def backward(ctx, *d_outputs):
        seed, x, *params = ctx.saved_tensors
        d_out, d_weights, tasks, levels = outputs.join(d_outputs, x, ctx.table, ctx.tasks_apart)
        with without_autocast(x):
            grads = reference.backward(x, params, ctx.table, d_out, by_level(d_weights, ctx.table), seed)
        wanted = outputs.dependencies(ctx.table, tasks, levels)
        d_x, *d_params = [d if flag else None for d, flag in zip((grads[0], *grads[1]), wanted, strict=True)]
        return None, None, None, None, d_x, *d_params


def run(
    x: Tensor, params: list[Tensor], table: Table, options: Options, seed: Tensor | None
) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    """Return the outputs, one or one a task, and each level's mixing weights."""
    check(x, params, table)
    if transforming():
        # The transforms of torch.func differentiate and batch plain PyTorch by themselves.
        out, weights = reference.forward(x, params, table, seed=seed)
        return without_graph(out, weights, options)
    if torch.compiler.is_compiling():
        # Which outputs have a gradient is not known when a backward is compiled.
        out, *weights = _Reference.apply(table, False, options.mixing, seed, x, *params)
        return without_graph(out, tuple(weights), options)
    found = _Reference.apply(table, options.tasks_apart, options.mixing, seed, x, *params)
    return apart(found, table, options)
