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

from fusedmoe import casting, codec
from fusedmoe.backends import EXTENSION, choose, lowers, transforming
from fusedmoe.reference import operator as reference
from fusedmoe.table import Table


def fusion_network(x: Tensor, params: Sequence[Tensor], table: Table, backend: str = "auto", return_mixing_weights: bool = False, recompute: bool = False):
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
    if torch.is_autocast_enabled("cpu") if x.is_cpu else torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = _lower_dtype(x, params, backend)
        with _without_autocast(x):
            if dtype is None:
                raised = [_at_least_float32(p) for p in params]
                return fusion_network(_at_least_float32(x), raised, table, backend, return_mixing_weights, recompute)
            # The C++ kernels round parameters in float32 as they read them.
            if choose(backend, x.device, dtype) != "cpu":
                check(x, params, table, lowered=True)
                params = casting.lowered(params, dtype)
            return _run(_lowered(x, dtype), params, table, backend, return_mixing_weights, recompute, lowered=True)
    return _run(x, params, table, backend, return_mixing_weights, recompute)


def _run(x: Tensor, params: list[Tensor], table: Table, backend: str, return_mixing_weights: bool, recompute: bool, lowered: bool = False):
    """Run the backend that serves the call, autocast left behind; `lowered` as in `check`."""
    slots = x if x.dim() == 3 else x.unsqueeze(1)
    run = RUN[choose(backend, x.device, x.dtype)]
    if x.dtype == torch.bfloat16 and not lowered and params and getattr(params[0], "dtype", None) != x.dtype:
        # The kernels would take float32 parameters, all alike, too.
        check(x, params, table)
    if torch.compiler.is_compiling():
        out, weights = run(slots, params, table, return_mixing_weights, recompute)
    else:
        try:
            out, weights = run(slots, params, table, return_mixing_weights, recompute)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            check(x, params, table, lowered)
            raise
    out = for_tasks(out, table)
    return (out, weights) if return_mixing_weights else out


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


def _without_autocast(x: Tensor):
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if isinstance(tensor, Tensor) and tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def for_tasks(out: Tensor, table: Table) -> Tensor:
    """Hand the units [B, U, H] of the last level to the tasks: [B, T, sum of widths]. With towers, or no tasks: `out` itself."""
    if table.has_towers or not table.tasks:
        return out
    first = [task.units[0] for task in table.tasks]
    if any(len(task.units) > 1 for task in table.tasks):
        return torch.stack([torch.cat([out[:, u] for u in task.units], dim=-1) for task in table.tasks], dim=1)
    if first == list(range(out.shape[1])):
        return out
    return out.expand(-1, len(first), -1) if out.shape[1] == 1 else out[:, first]


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


def _needs_gradient(x: Tensor, params: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params))


class _Network(torch.autograd.Function):
    """The operator's autograd, as registered below, without the dispatcher's detour through Python, which costs more than a small network."""

    @staticmethod
    def forward(ctx, text: str, save: int, mixing: bool, x: Tensor, *params: Tensor):
        with torch._C._AutoDispatchBelowAutograd():
            out, weights, saved = torch.ops.fusedmoe.network_cpu(x, params, text, save, mixing)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, saved, *params)
        ctx.table = text
        return out, weights

    @staticmethod
    def backward(ctx, d_out, d_weights):
        d_x, d_params = _gradients(ctx, d_out, d_weights, ctx.needs_input_grad[3:])
        return None, None, None, d_x, *d_params


# What the operator's `save` asks it to keep for backward.
SAVE_NOTHING, SAVE_ALL, SAVE_LEAST = 0, 1, 2


def _run_cpu(x: Tensor, params: list[Tensor], table: Table, mixing: bool, recompute: bool):
    text = codec.encode(table)
    save = SAVE_LEAST if recompute else SAVE_ALL
    if torch.compiler.is_compiling():
        out, weights, _ = torch.ops.fusedmoe.network_cpu(x, params, text, save if _needs_gradient(x, params) else SAVE_NOTHING, mixing)
    elif _needs_gradient(x, params):
        out, weights = _Network.apply(text, save, mixing, x, *params)
    else:
        # Without a graph to build, the Python autograd kernel would only cost time.
        with torch._C._AutoDispatchBelowAutograd():
            out, weights, _ = torch.ops.fusedmoe.network_cpu(x, params, text, SAVE_NOTHING, mixing)
    return out, reference.by_level(weights, table) if mixing else ()


class _Reference(torch.autograd.Function):
    """The reference's forward and hand-derived backward; only the inputs are saved, so backward can be differentiated again."""

    @staticmethod
    def forward(ctx, table: Table, x: Tensor, *params: Tensor):
        ctx.table = table
        ctx.save_for_backward(x, *params)
        ctx.set_materialize_grads(False)
        out, weights = reference.forward(x, params, table)
        return out, *weights

    @staticmethod
    def backward(ctx, d_out, *d_weights):
        x, *params = ctx.saved_tensors
        if d_out is None:
            d_out = x.new_zeros(x.shape[0], *ctx.table.output)
        with _without_autocast(x):
            d_x, d_params = reference.backward(x, params, ctx.table, d_out, d_weights)
        return None, d_x, *d_params


def _run_reference(x: Tensor, params: list[Tensor], table: Table, mixing: bool, recompute: bool):
    check(x, params, table)
    if transforming():
        # The transforms of torch.func differentiate and batch plain PyTorch by themselves.
        return reference.forward(x, params, table)
    out, *weights = _Reference.apply(table, x, *params)
    return out, tuple(weights)


@functools.cache
def _kernels():
    """The operator of the GPU backends, imported by the first call."""
    return importlib.import_module("fusedmoe.kernels.operator")


def _run_kernels(backend: str, x: Tensor, params: list[Tensor], table: Table, mixing: bool, recompute: bool):
    # Here, because `import fusedmoe` is to cost nothing on machines that never call it.
    if torch.compiler.is_compiling():
        from fusedmoe.kernels import registered

        text = codec.encode(table)
        out, weights, *_ = registered.forward(x, params, text, _needs_gradient(x, params), mixing, recompute, backend)
        return out, reference.by_level(weights, table) if mixing else ()
    out, weights = _kernels().run(backend, x, params, table, mixing, recompute)
    return out, reference.by_level(weights, table) if mixing else ()


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
    d_x, d_params = _gradients(ctx, d_out, d_weights, (need_x, *need_params))
    return d_x, d_params, None, None, None


def _gradients(ctx, d_out, d_weights, needed) -> tuple[Tensor | None, list[Tensor | None]]:
    """Run the backward operator for x and the parameters that need it; None for those on which no output depends."""
    x, saved, *params = ctx.saved_tensors
    if d_out is None:
        d_out = x.new_zeros(x.shape[0], *codec.decode(ctx.table).output)
    # Under autocast a loss in float32 may hand down what is not of the output's dtype.
    d_out, d_weights = (d if d is None or d.dtype == x.dtype else d.to(x.dtype) for d in (d_out, d_weights))
    flags, text = _wanted(ctx.table, needed)
    arguments = (d_out, d_weights, x, params, saved, ctx.table, text)
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


@functools.lru_cache(maxsize=1024)
def _wanted(text: str, needed: tuple[bool, ...]) -> tuple[tuple[bool, ...], str]:
    """For x and each parameter, whether to compute its gradient: it is needed, and some output depends on it; the same as the operator takes it."""
    parameters = codec.decode(text).parameters
    flags = (needed[0], *(p.live and need for p, need in zip(parameters, needed[1:], strict=True)))
    return flags, "".join("1" if flag else "0" for flag in flags)


def _batched(d_out, d_weights, x, params, saved, table, needs) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients under vmap (`is_grads_batched`), which can batch the reference's plain PyTorch but no C++ kernel."""
    grads = _plain_gradients(d_out, d_weights, x, params, codec.decode(table))
    d_x, *d_params = [d if flag == "1" else None for d, flag in zip(grads, needs, strict=True)]
    return d_x, d_params


def _plain_gradients(d_out, d_weights, x, params, network: Table) -> list[Tensor | None]:
    """The reference's backward, in float32 where x is narrower, as the kernels sum; each gradient in the dtype of its tensor."""
    d_out, d_weights, wide, *raised = [t if t is None else _at_least_float32(t) for t in (d_out, d_weights, x, *params)]
    d_x, d_params = reference.backward(wide, raised, network, d_out, reference.by_level(d_weights, network))
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
