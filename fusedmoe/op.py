"""The operator: one differentiable call for a whole network, whichever backend runs it.

Each backend has its autograd beside its kernels: `cpu.py`, `reference/autograd.py`, `kernels/operator.py`. The formulas stand in `reference/operator.py`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedmoe import casting, codec, cpu
from fusedmoe.backends import choose, lowers
from fusedmoe.casting import at_least_float32, autocasts, without_autocast
from fusedmoe.checks import check
from fusedmoe.outputs import Options, apart, by_level, for_tasks, needs_gradient, per_task, without_graph
from fusedmoe.reference import autograd
from fusedmoe.table import Table


def fusion_network(
    x: Tensor,
    params: Sequence[Tensor],
    table: Table,
    backend: str = "auto",
    return_mixing_weights: bool = False,
    recompute: bool = False,
    tasks_apart: bool = False,
) -> Any:
    """Run a network of fusion levels, and its task towers if it has any: SYSTEMS' operator for every level in turn.

        out[b,u,:] = sum over e in reads(u) of (softmax_e(G[u] q[b,u] + c[u]) + v[u,e]) * MLP_e(x[b, slot(e)])

    Args:
        x: [B, S, D], or [B, D] where the table has one slot; any strides (an expanded x is read once).
        params: the tensors of `table.parameters`, in that order, of x's dtype and device.
        table: what reads what.
        backend: "auto" (the first that can), or one of `fusedmoe.available_backends()`.
        return_mixing_weights: return the mixing weights too; they are differentiable.
        recompute: keep for backward only x, what each softmax gave and what each level handed on; experts, gates' hidden layers and
            towers run once more in backward. The results are the same bits. (The reference keeps its inputs alone, always.)
        tasks_apart: return a list of T outputs [B, O] instead of one tensor. The tower of a task whose output has no gradient then gets
            none either.

    A parameter, or x, on which no output with a gradient depends gets None as its gradient, not zeros: which outputs have one is seen
    in backward. With `tasks_apart` each task's output counts by itself, and always each level's mixing weights do; the units below the
    towers count as one tensor.

    On the cpu backend bfloat16 means: the operands of every linear map are rounded to it, all else is float32, and so are the sums;
    float16 is computed in float32. Under autocast to a dtype that the backend lowers to (cpu: bfloat16; triton: bfloat16, float16) a call
    in float32 computes in it: x is lowered, and so is `out`; parameters stay float32 for cpu, and are cast for triton, which rounds their
    gradients once before these come back in float32. Under any other autocast the call computes in float32 at least.

    Returns:
        out, of x's dtype: [B, T, O] with towers; [B, U, H] where the table has no tasks; otherwise [B, T, H'], the
        concatenation of the units each task reads (a single unit handed to all tasks is expanded, not copied).
        With `return_mixing_weights`: (out, tuple of [B, U, E], one a level), zero where a unit does not read an expert.

    Raises:
        TypeError, ValueError: x, a parameter or the table is not what the other two require; says which, expected and got.
        RuntimeError: the backend asked for cannot run here, with the reason.

    Source: MMoE eq. 6-8, PLE eq. 2-7, AdaTT eq. 2-10.
    """
    if not isinstance(x, Tensor) or not isinstance(table, Table) or x.dim() not in (2, 3) or not isinstance(params, Iterable):
        check(x, params, table)
    params = list(params)
    # Short for the device that has least time to lose.
    if torch.is_autocast_enabled("cpu") if x.is_cpu else autocasts(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = _lower_dtype(x, params, backend)
        with without_autocast(x):
            if dtype is None:
                raised = [at_least_float32(p) for p in params]
                return _run(at_least_float32(x), raised, table, Options(backend, return_mixing_weights, recompute, tasks_apart))
            # The C++ kernels round parameters in float32 as they read them.
            if choose(backend, x.device, dtype) != "cpu":
                check(x, params, table, lowered=True)
                params = casting.lowered(params, dtype)
            return _run(_lowered(x, dtype), params, table, Options(backend, return_mixing_weights, recompute, tasks_apart), lowered=True)
    return _run(x, params, table, Options(backend, return_mixing_weights, recompute, tasks_apart))


def _run(x: Tensor, params: list[Tensor], table: Table, options: Options, lowered: bool = False) -> Any:
    """Run the backend that serves the call, autocast left behind; `lowered` as in `check`."""
    slots = x if x.dim() == 3 else x.unsqueeze(1)
    run = RUN[choose(options.backend, x.device, x.dtype)]
    # Towers' outputs leave the operator one by one; those that may share units are taken apart behind it.
    inside = options._replace(tasks_apart=options.tasks_apart and table.has_towers)
    if x.dtype == torch.bfloat16 and not lowered and params and getattr(params[0], "dtype", None) != x.dtype:
        # The kernels would take float32 parameters, all alike, too.
        check(x, params, table)
    if torch.compiler.is_compiling():
        outs, weights = run(slots, params, table, inside)
    else:
        try:
            outs, weights = run(slots, params, table, inside)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            check(x, params, table, lowered)
            raise
    if not inside.tasks_apart:
        out = for_tasks(outs[0], table)
        outs = per_task(out) if options.tasks_apart else [out]
    result = outs if options.tasks_apart else outs[0]
    return (result, weights) if options.mixing else result


def _lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a lower dtype; an expanded x stays expanded, where `to` would write out every slot."""
    expanded = x.dim() == 3 and x.shape[1] > 1 and x.stride(1) == 0
    return x[:, :1].to(dtype).expand_as(x) if expanded else x.to(dtype)


def _lower_dtype(x: Tensor, params: list[Tensor], backend: str) -> torch.dtype | None:
    """The dtype in which the call is to compute under the autocast that is on: x is lowered to it, and the parameters are all in float32. Or None."""
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype not in (torch.float32, dtype) or not params or any(p.dtype != torch.float32 for p in params):
        return None
    # A dtype that nothing narrows is none to lower to, and no backend need serve it.
    return dtype if dtype in (torch.bfloat16, torch.float16) and lowers(choose(backend, x.device, dtype), dtype) else None


@functools.cache
def _kernels() -> Any:
    """The operator of the GPU backends, imported by the first call."""
    return importlib.import_module("fusedmoe.kernels.operator")


def _run_kernels(backend: str, x: Tensor, params: list[Tensor], table: Table, options: Options) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    # Here, because `import fusedmoe` is to cost nothing on machines that never call it.
    if torch.compiler.is_compiling():
        from fusedmoe.kernels import registered

        text = codec.encode(table)
        out, weights, *_ = registered.forward(x, params, text, needs_gradient(x, params), options.mixing, options.recompute, backend)
        return without_graph(out, by_level(weights, table) if options.mixing else (), options)
    return apart(_kernels().run(x, params, table, options), table, options)


RUN: dict[str, Callable[[Tensor, list[Tensor], Table, Options], tuple[Sequence[Tensor], tuple[Tensor, ...]]]] = {
    "cpu": cpu.run,
    "triton": functools.partial(_run_kernels, "triton"),
    "cuda": functools.partial(_run_kernels, "cuda"),
    "reference": autograd.run,
}
