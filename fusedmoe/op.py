"""The operator: one differentiable call for a whole network, whichever backend runs it.

Each backend has its autograd beside its kernels: `cpu.py`, `reference/autograd.py`,
`kernels/operator.py`. The formulas stand in `reference/operator.py`.

Gradients: a tensor gets None, not zeros, if no output that received a gradient depends on it. (Of
several inputs those get zeros on which some other output depends.)
The mixing weights of each level count as one output. With `tasks_apart` the output of each task
counts by itself; without it, `out` counts as one. All units read by towers count as one output.

Dtypes: on `cpu`, bfloat16 means that the inputs and weights of every linear map are rounded to
bfloat16, and everything else, sums included, is float32; float16 is computed in float32.

Autocast: `cpu` follows autocast to bfloat16, `triton` and `cuda` to bfloat16 and float16. A call in
float32 then casts x to that dtype, and returns `out` in it. On `cpu` the parameters stay float32.
`triton` and `cuda` cast them, and round their gradients once before they return them in float32.
Under autocast to any other dtype the call computes at least in float32.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fusedmoe import casting, codec, cpu
from fusedmoe.backends import autocasts_to, choose
from fusedmoe.casting import at_least_float32, autocasts, without_autocast
from fusedmoe.checks import check
from fusedmoe.inputs import join
from fusedmoe.outputs import Options, apart, by_level, for_tasks, needs_gradient, per_task, without_graph
from fusedmoe.reference import autograd
from fusedmoe.reference.philox import draw_seed
from fusedmoe.table import Table
from fusedmoe.validation import require_flag


def fusion_network(
    x: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    table: Table,
    backend: str = "auto",
    return_mixing_weights: bool = False,
    recompute: bool = False,
    tasks_apart: bool = False,
    training: bool = False,
) -> Any:
    """Run a network: every level in turn, and its task towers if it has any.

        y[b,e,:]   = MLP_e(x[b, slot(e), :])
        p[b,u,:]   = softmax over sees(u) of the gate's logits, which read the unit's selector
        w[b,u,e]   = p[b,u,e] + v[u,e]
        out[b,u,:] = sum over e in reads(u) of w[b,u,e] * y[b,e,:]

    The slots x of a level above the first are the units of the level below.

    Args:
        x: [B, S, D], or [B, D] if the table has one slot; any strides (an expanded x is read once).
            A list of such tensors, one for each of `table.inputs`, which are copied into one.
        params: the tensors of `table.parameters`, in that order, of x's dtype and device.
        table: what reads what, or a `Routed` one, a route through it.
        backend: "auto" (the first that can serve the call), or a name out of
            `fusedmoe.available_backends()`.
        return_mixing_weights: return the mixing weights w too; they are differentiable.
        recompute: keep for backward only x and the outputs of softmaxes and levels, and run
            experts, hidden layers of gates and towers once more there. The results are the same
            bits. (The reference always keeps only its inputs.)
        tasks_apart: return a list of T tensors [B, O]; the tower of a task that is left out of the
            loss then gets the gradient None.
        training: apply the table's Dropout. Its seed is drawn from torch's generator for x's
            device, once a call; a mask depends on that, the Dropout's number, row and column.

    Returns: out, of x's dtype: [B, T, O] with towers; [B, U, H] if the table has no tasks;
        otherwise [B, T, H'], the concatenation of the units that each task reads. (A single unit
        that all tasks read is expanded, not copied.) With `return_mixing_weights`: (out, a tuple
        with [B, U, E] for each level), zero where a unit does not read an expert.
    Raises: TypeError, ValueError if x, the parameters and the table do not fit together; says
        which, expected and got. TypeError for an option that is neither True nor False.
        RuntimeError if the backend cannot run here, or not with these tensors; says why.

    The module's docstring says what holds for gradients, dtypes and autocast.
    Source: MMoE eq. 6-8, PLE eq. 2-7, AdaTT eq. 2-10.
    """
    x = cast(Tensor, join(x, table) if isinstance(table, Table) else x)
    fit = isinstance(x, Tensor) and x.dim() in (2, 3) and x.is_floating_point()
    if not (fit and isinstance(table, Table) and isinstance(params, Iterable)):
        check(x, params, table)
    # One comparison where all are right, for every call passes here.
    if not type(return_mixing_weights) is type(recompute) is type(tasks_apart) is type(training) is bool:
        names = ("return_mixing_weights", "recompute", "tasks_apart", "training")
        for name, flag in zip(names, (return_mixing_weights, recompute, tasks_apart, training), strict=True):
            require_flag(flag, name)
    params, options = list(params), Options(backend, return_mixing_weights, recompute, tasks_apart)
    seed = draw_seed(x.device) if training and table.has_dropout else None
    run = _run_under_autocast if _autocast_on(x) else _run
    return run(x, params, table, options, seed)


def _autocast_on(x: Tensor) -> bool:
    # Short for the device that has least time to lose.
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    return autocasts(x.device.type) and torch.is_autocast_enabled(x.device.type)


def _run_under_autocast(x: Tensor, params: list[Tensor], table: Table, options: Options, seed: Tensor | None) -> Any:
    """Run in autocast's dtype what its own linear layers would, all else in float32 at least."""
    dtype = _autocast_dtype(x, params, options.backend)
    with without_autocast(x):
        if dtype is None:
            return _run(at_least_float32(x), [at_least_float32(p) for p in params], table, options, seed)
        # The C++ kernels round parameters in float32 as they read them.
        if choose(options.backend, x.device, dtype) != "cpu":
            check(x, params, table, cast=True)
            params = casting.cast(params, dtype)
        return _run(_cast(x, dtype), params, table, options, seed, cast=True)


def _run(
    x: Tensor, params: list[Tensor], table: Table, options: Options, seed: Tensor | None, cast: bool = False
) -> Any:
    """Run the backend that serves the call, outside of autocast; `cast` as in `check`."""
    slots = x if x.dim() == 3 else x.unsqueeze(1)
    run = RUN[choose(options.backend, x.device, x.dtype)]
    # Towers' outputs leave the operator one by one; those that may share units are taken apart
    # behind it.
    inside = options._replace(tasks_apart=options.tasks_apart and table.has_towers)
    if x.dtype == torch.bfloat16 and not cast and params and getattr(params[0], "dtype", None) != x.dtype:
        # The kernels would take float32 parameters, all alike, too.
        check(x, params, table)
    if torch.compiler.is_compiling():
        outs, weights = run(slots, params, table, inside, seed)
    else:
        try:
            outs, weights = run(slots, params, table, inside, seed)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            check(x, params, table, cast)
            raise
    if not inside.tasks_apart:
        out = for_tasks(outs[0], table)
        outs = per_task(out) if options.tasks_apart else [out]
    result = outs if options.tasks_apart else outs[0]
    return (result, weights) if options.mixing else result


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a lower dtype. An expanded x stays expanded; `to` would write out every slot."""
    expanded = x.dim() == 3 and x.shape[1] > 1 and x.stride(1) == 0
    return x[:, :1].to(dtype).expand_as(x) if expanded else x.to(dtype)


def _autocast_dtype(x: Tensor, params: list[Tensor], backend: str) -> torch.dtype | None:
    """The dtype to which autocast casts a call with float32 parameters, or None."""
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype not in (torch.float32, dtype) or not params or any(p.dtype != torch.float32 for p in params):
        return None
    # A dtype that nothing narrows is none to lower to, and no backend need serve it.
    narrow = dtype in (torch.bfloat16, torch.float16) and autocasts_to(choose(backend, x.device, dtype), dtype)
    return dtype if narrow else None


@functools.cache
def _kernels() -> Any:
    """The operator of the GPU backends, imported by the first call."""
    return importlib.import_module("fusedmoe.kernels.operator")


def _run_kernels(
    backend: str, x: Tensor, params: list[Tensor], table: Table, options: Options, seed: Tensor | None
) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    # Here, because `import fusedmoe` is to cost nothing on machines that never call it.
    if torch.compiler.is_compiling():
        from fusedmoe.kernels import registered

        text = codec.encode(table)
        out, weights, *_ = registered.forward(
            x, params, text, needs_gradient(x, params), options.mixing, options.recompute, backend, seed
        )
        return without_graph(out, by_level(weights, table) if options.mixing else (), options)
    return apart(_kernels().run(x, params, table, options, seed), table, options)


Run = Callable[[Tensor, list[Tensor], Table, Options, "Tensor | None"], tuple[Sequence[Tensor], tuple[Tensor, ...]]]
RUN: dict[str, Run] = {
    "cpu": cpu.run,
    "triton": functools.partial(_run_kernels, "triton"),
    "cuda": functools.partial(_run_kernels, "cuda"),
    "reference": autograd.run,
}
