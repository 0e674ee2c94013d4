"""The operator: one differentiable call for a whole network, whichever backend runs it.

The C++ extension registers `fusedmoe::network_cpu` and its backward; their fake kernels, autograd and autocast are registered
here. The formulas stand in `reference/operator.py`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, library

from fusedmoe import casting, codec, outputs
from fusedmoe.backends import EXTENSION, choose, lowers, transforming
from fusedmoe.checks import check
from fusedmoe.outputs import Options, by_level, for_tasks, per_task
from fusedmoe.reference import operator as reference
from fusedmoe.table import Table


def fusion_network(
    x: Tensor,
    params: Sequence[Tensor],
    table: Table,
    backend: str = "auto",
    return_mixing_weights: bool = False,
    recompute: bool = False,
    tasks_apart: bool = False,
):
    """Run a network of fusion levels, and its task towers if it has any: SYSTEMS' operator for every level in turn.

        out[b,u,:] = sum over e in reads(u) of (softmax_e(G[u] q[b,u] + c[u]) + v[u,e]) * MLP_e(x[b, slot(e)])

    Args:
        x: [B, S, D], or [B, D] where the table has one slot; any strides (an expanded x is read once).
        params: the tensors of `table.parameters`, in that order, of x's dtype and device.
        table: what reads what.
        backend: "auto" (the first that can), or one of `fusedmoe.backends()`.
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
    if torch.is_autocast_enabled("cpu") if x.is_cpu else _autocasts(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = _lower_dtype(x, params, backend)
        with _without_autocast(x):
            if dtype is None:
                raised = [_at_least_float32(p) for p in params]
                return _run(_at_least_float32(x), raised, table, Options(backend, return_mixing_weights, recompute, tasks_apart))
            # The C++ kernels round parameters in float32 as they read them.
            if choose(backend, x.device, dtype) != "cpu":
                check(x, params, table, lowered=True)
                params = casting.lowered(params, dtype)
            return _run(_lowered(x, dtype), params, table, Options(backend, return_mixing_weights, recompute, tasks_apart), lowered=True)
    return _run(x, params, table, Options(backend, return_mixing_weights, recompute, tasks_apart))


def _run(x: Tensor, params: list[Tensor], table: Table, options: Options, lowered: bool = False):
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


def _autocasts(kind: str) -> bool:
    """Whether devices of a kind have autocast; torch raises where one asks those that have none whether it is on."""
    return torch.amp.is_autocast_available(kind)


# torch.compile of 2.11 cannot trace into it: it is called while tracing, and its answer is a constant (as in `backends.py`).
_autocasts._dynamo_marked_constant = True


def _without_autocast(x: Tensor):
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if _autocasts(kind) else nullcontext()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if isinstance(tensor, Tensor) and tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _needs_gradient(x: Tensor, params: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params))


class _Network(torch.autograd.Function):
    """The operator's autograd, as registered below, without the dispatcher's detour through Python, which costs more than a small network.

    It returns what `outputs.split` does: autograd tells which of the tensors have a gradient.
    """

    @staticmethod
    def forward(ctx, table: Table, save: int, mixing: bool, tasks_apart: bool, x: Tensor, *params: Tensor):
        with torch._C._AutoDispatchBelowAutograd():
            out, weights, saved = torch.ops.fusedmoe.network_cpu(x, params, codec.encode(table), save, mixing)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, saved, *params)
        ctx.table, ctx.tasks_apart = table, tasks_apart
        return outputs.split(out, weights if mixing else None, table, tasks_apart)

    @staticmethod
    def backward(ctx, *d_outputs):
        x, *_ = ctx.saved_tensors
        upstream = outputs.join(d_outputs, x, ctx.table, ctx.tasks_apart)
        d_x, d_params = _gradients(ctx.saved_tensors, upstream, codec.encode(ctx.table), ctx.needs_input_grad[4:])
        return None, None, None, None, d_x, *d_params


# What the operator's `save` asks it to keep for backward.
SAVE_NOTHING, SAVE_ALL, SAVE_LEAST = 0, 1, 2


def _run_cpu(x: Tensor, params: list[Tensor], table: Table, options: Options) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    text, mixing = codec.encode(table), options.mixing
    save = SAVE_LEAST if options.recompute else SAVE_ALL
    if torch.compiler.is_compiling():
        out, weights, _ = torch.ops.fusedmoe.network_cpu(x, params, text, save if _needs_gradient(x, params) else SAVE_NOTHING, mixing)
    elif _needs_gradient(x, params):
        return _apart(_Network.apply(table, save, mixing, options.tasks_apart, x, *params), table, options)
    else:
        # Without a graph to build, the Python autograd kernel would only cost time.
        with torch._C._AutoDispatchBelowAutograd():
            out, weights, _ = torch.ops.fusedmoe.network_cpu(x, params, text, SAVE_NOTHING, mixing)
    return _plain_outputs(out, by_level(weights, table) if mixing else (), options)


def _apart(returned: tuple[Tensor, ...], table: Table, options: Options) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    """Tell the outputs from the mixing weights in what an autograd function returned."""
    count = len(table.tasks) if options.tasks_apart else 1
    return list(returned[:count]), tuple(returned[count:])


def _plain_outputs(out: Tensor, weights: tuple[Tensor, ...], options: Options) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    """The same of one output, where no backward will ask which tasks have a gradient."""
    return per_task(out) if options.tasks_apart else [out], weights


class _Reference(torch.autograd.Function):
    """The reference's forward and hand-derived backward; only the inputs are saved, so backward can be differentiated again."""

    @staticmethod
    def forward(ctx, table: Table, tasks_apart: bool, mixing: bool, x: Tensor, *params: Tensor):
        ctx.table, ctx.tasks_apart = table, tasks_apart
        ctx.save_for_backward(x, *params)
        ctx.set_materialize_grads(False)
        out, weights = reference.forward(x, params, table)
        return (*([part.data for part in per_task(out)] if tasks_apart else [out]), *(weights if mixing else ()))

    @staticmethod
    def backward(ctx, *d_outputs):
        x, *params = ctx.saved_tensors
        d_out, d_weights, tasks, levels = outputs.join(d_outputs, x, ctx.table, ctx.tasks_apart)
        with _without_autocast(x):
            grads = reference.backward(x, params, ctx.table, d_out, by_level(d_weights, ctx.table))
        wanted = outputs.dependent(codec.encode(ctx.table), tasks, levels)
        d_x, *d_params = [d if flag else None for d, flag in zip((grads[0], *grads[1]), wanted, strict=True)]
        return None, None, None, d_x, *d_params


def _run_reference(x: Tensor, params: list[Tensor], table: Table, options: Options) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    check(x, params, table)
    if transforming():
        # The transforms of torch.func differentiate and batch plain PyTorch by themselves.
        out, weights = reference.forward(x, params, table)
        return _plain_outputs(out, weights, options)
    if torch.compiler.is_compiling():
        # Which outputs have a gradient is not known when a backward is compiled.
        out, *weights = _Reference.apply(table, False, options.mixing, x, *params)
        return _plain_outputs(out, tuple(weights), options)
    return _apart(_Reference.apply(table, options.tasks_apart, options.mixing, x, *params), table, options)


@functools.cache
def _kernels():
    """The operator of the GPU backends, imported by the first call."""
    return importlib.import_module("fusedmoe.kernels.operator")


def _run_kernels(backend: str, x: Tensor, params: list[Tensor], table: Table, options: Options) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    # Here, because `import fusedmoe` is to cost nothing on machines that never call it.
    if torch.compiler.is_compiling():
        from fusedmoe.kernels import registered

        text = codec.encode(table)
        out, weights, *_ = registered.forward(x, params, text, _needs_gradient(x, params), options.mixing, options.recompute, backend)
        return _plain_outputs(out, by_level(weights, table) if options.mixing else (), options)
    return _apart(_kernels().run(x, params, table, options), table, options)


RUN = {
    "cpu": _run_cpu,
    "triton": functools.partial(_run_kernels, "triton"),
    "cuda": functools.partial(_run_kernels, "cuda"),
    "reference": _run_reference,
}


def _register() -> None:
    """Register the fake kernels, autograd and autocast of the operators that the extension defines."""
    library.register_fake("fusedmoe::network_cpu", _fake_forward)
    library.register_fake("fusedmoe::network_cpu_backward", _fake_backward)
    library.register_autograd("fusedmoe::network_cpu", _backward, setup_context=_save)
    library.register_autograd("fusedmoe::network_cpu_backward", _double_backward, setup_context=_save_for_double)
    # For callers of the bare operator; `fusion_network` leaves autocast by itself.
    library.register_autocast("fusedmoe::network_cpu", "cpu", torch.float32)


def _fake_forward(x, params, table, save, mixing):
    from fusedmoe import _C

    network = codec.decode(table)
    check(x, params, network, lowered=x.dtype == torch.bfloat16)
    rows = x.shape[0]
    # Whole vectors of rows (`padded` in csrc/cpu/plan.h), and a header of 16 numbers.
    kept = (rows + 15) // 16 * 16 * _C.kept(table, save == SAVE_LEAST) + 16 if save else 0
    # bfloat16 and float16 are kept in float32.
    state = x.new_empty(kept, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(rows, *network.output), x.new_empty(rows, network.mixing if mixing else 0), state


def _fake_backward(d_out, d_weights, x, params, saved, table, needs):
    wanted = [x, *params]
    return [tensor.new_empty(tensor.shape) for tensor, flag in zip(wanted, needs, strict=True) if flag == "1"]


def _save(ctx, inputs, output):
    x, params, table, _, _ = inputs
    saved = output[2]
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, saved, *params)
    ctx.table = table


def _backward(ctx, d_out, d_weights, _):
    need_x, need_params, *_ = ctx.needs_input_grad
    x, *_ = ctx.saved_tensors
    table = codec.decode(ctx.table)
    whole = outputs.join((d_out, *(by_level(d_weights, table) if d_weights is not None and d_weights.shape[1] else ())), x, table, tasks_apart=False)
    d_x, d_params = _gradients(ctx.saved_tensors, whole, ctx.table, (need_x, *need_params))
    return d_x, d_params, None, None, None


def _gradients(tensors, upstream: outputs.Upstream, table: str, needed: tuple[bool, ...]) -> tuple[Tensor | None, list[Tensor | None]]:
    """Run the backward operator for x and the parameters that need it; None for those on which no output with a gradient depends."""
    x, saved, *params = tensors
    d_out, d_weights, tasks, levels = upstream
    flags, text = _wanted(table, tasks, levels, needed)
    arguments = (d_out, d_weights, x, params, saved, table, text)
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
def _wanted(text: str, tasks: tuple[bool, ...], levels: tuple[bool, ...], needed: tuple[bool, ...]) -> tuple[tuple[bool, ...], str]:
    """For x and each parameter, whether to compute its gradient: it is needed, and some wanted output depends on it; and as the operator takes it."""
    flags = tuple(a and b for a, b in zip(outputs.dependent(text, tasks, levels), needed, strict=True))
    return flags, "".join("1" if flag else "0" for flag in flags)


def _batched(d_out, d_weights, x, params, saved, table, needs) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients under vmap (`is_grads_batched`), which can batch the reference's plain PyTorch but no C++ kernel."""
    grads = _plain_gradients(d_out, d_weights, x, params, codec.decode(table))
    d_x, *d_params = [d if flag == "1" else None for d, flag in zip(grads, needs, strict=True)]
    return d_x, d_params


def _plain_gradients(d_out, d_weights, x, params, network: Table) -> list[Tensor | None]:
    """The reference's backward, in float32 where x is narrower, as the kernels sum; each gradient in the dtype of its tensor."""
    d_out, d_weights, wide, *raised = [t if t is None else _at_least_float32(t) for t in (d_out, d_weights, x, *params)]
    d_x, d_params = reference.backward(wide, raised, network, d_out, by_level(d_weights, network))
    return [d if d is None else d.to(t.dtype) for d, t in zip((d_x, *d_params), (x, *params), strict=True)]


def _save_for_double(ctx, inputs, output):
    d_out, d_weights, x, params, _, table, needs = inputs
    ctx.save_for_backward(d_out, d_weights, x, *params)
    ctx.table = table
    ctx.needs = needs


def _double_backward(ctx, dd):
    """Differentiate the reference's backward, which is plain differentiable PyTorch."""
    network = codec.decode(ctx.table)
    again = torch.is_grad_enabled()
    # A third derivative goes on through their history. An alias each, because d_out may itself depend on x: that path is not ours.
    tensors = [t if t is None else t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors]
    d_out, d_weights, x, *params = tensors
    with torch.enable_grad(), _without_autocast(x):
        grads = _plain_gradients(d_out, d_weights, x, params, network)
        wanted = [d for d, flag in zip(grads, ctx.needs, strict=True) if flag == "1"]
        pairs = [(d, g) for d, g in zip(wanted, dd, strict=True) if g is not None and d is not None and d.requires_grad]
        inputs = [t for t in tensors if t is not None]
        results = iter([None] * len(inputs))
        if pairs:
            results = iter(torch.autograd.grad([d for d, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True, create_graph=again))
    d_d_out, d_d_weights, dd_x, *dd_params = [None if t is None else next(results) for t in tensors]
    return d_d_out, d_d_weights, dd_x, dd_params, None, None, None


if EXTENSION is not None:
    _register()
