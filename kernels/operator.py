"""The operator on a GPU: one differentiable call over `network.forward` and `network.backward`,
with the kernels of the backend that it is told."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor

from fusedmoe import codec, outputs
from fusedmoe.kernels import bound, network, self_test
from fusedmoe.kernels.lowering import lower
from fusedmoe.reference import operator as reference
from fusedmoe.table import Table

_HERE = nullcontext()


def last_dim_contiguous(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, and rows so near that 32 bits reach over those of a
    chunk, which are more than a tile's."""
    return (
        x
        if (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(0) * bound.chunk_of(x.shape[0]) < 2**31
        else x.contiguous()
    )


def device_guard(x: Tensor):
    """The tensors' device made current: kernels are launched on the current one."""
    return _HERE if not x.is_cuda or x.get_device() == torch.cuda.current_device() else torch.cuda.device(x.device)


def launching(x: Tensor, table: Table, backend: str):
    """A block that launches: the device has passed its self-test and is current.

    Raises: RuntimeError if the kernels err on it (`self_test.py`).
    """
    if x.is_cuda:
        self_test.check(x.device, x.dtype, backend)
        if lower(table).operations:
            self_test.check(x.device, x.dtype, backend, rowwise=True)
    return device_guard(x)


def _tuning(backend: str) -> ModuleType | None:
    """The module that finds tiles by the clock, where that is asked for. CUDA's kernels come
    compiled: there are no others to try."""
    if backend != "triton":
        return None
    # Here, because it imports Triton, which the cuda backend can do without.
    from fusedmoe.kernels.triton import tuning

    return tuning if tuning.enabled() else None


def _forward(
    backend: str, x: Tensor, params: Sequence[Tensor], table: Table, mixing: bool, training: bool, seed: Tensor | None
) -> tuple[Tensor, Tensor | None, network.Saved]:
    x, search = last_dim_contiguous(x), _tuning(backend)
    with launching(x, table, backend):
        tiles = search.of_forward(x, params, table, mixing, training) if search else None
        return network.forward(x, params, table, mixing, training, tiles, backend=backend, seed=seed)


def recomputed(table: Table) -> bool:
    """Whether a forward with `recompute` saves x alone: where some level has more than one segment."""
    return any(len(segments) > 1 for segments in lower(table).levels)


class _Network(torch.autograd.Function):
    """It returns what `outputs.split` does: autograd tells which of the tensors have a gradient."""

    @staticmethod
    def forward(ctx, table: Table, options: outputs.Options, seed: Tensor | None, x: Tensor, *params: Tensor):
        out, weights, saved = _forward(options.backend, x, params, table, options.mixing, True, seed)
        ctx.table, ctx.options, ctx.tiles = table, options, saved.tiles
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, seed, None if options.recompute and recomputed(table) else saved.memory, *params)
        return outputs.split(out, weights, table, options.tasks_apart)

    @staticmethod
    def backward(ctx, *d_outputs: Tensor | None):
        x, seed, memory, *params = ctx.saved_tensors
        table = ctx.table
        d_out, d_weights, tasks, levels = outputs.join(d_outputs, x, table, ctx.options.tasks_apart)
        if torch.is_grad_enabled():
            # Gradients that are to be differentiated again are plain PyTorch's.
            d_x, d_params = reference.backward(x, params, table, d_out, outputs.by_level(d_weights, table), seed)
            found = [d_x, *d_params]
        else:
            found = _gradients(
                ctx.options.backend, table, d_out, d_weights, x, params, network.Saved(memory, ctx.tiles, seed)
            )
        wanted = zip(
            found, outputs.dependent(codec.encode(table), tasks, levels), ctx.needs_input_grad[3:], strict=True
        )
        return None, None, None, *(d if depends and need else None for d, depends, need in wanted)


def _gradients(
    backend: str,
    table: Table,
    d_out: Tensor,
    d_weights: Tensor | None,
    x: Tensor,
    params: Sequence[Tensor],
    saved: network.Saved,
) -> list[Tensor | None]:
    """d_x and the parameters' gradients. saved: what the forward left, or its tiles and seed alone, by
    which it is run once more."""
    x = last_dim_contiguous(x)
    with device_guard(x):
        if saved.memory is None:
            _, _, saved = network.forward(x, params, table, False, True, saved.tiles, backend=backend, seed=saved.seed)
        search = _tuning(backend)
        tiles = search.of_backward(d_out, d_weights, x, params, saved, table) if search else None
        d_x, d_params = network.backward(d_out, d_weights, x, params, saved, table, tiles, backend=backend)
    return [d_x, *d_params]


def run(
    x: Tensor, params: Sequence[Tensor], table: Table, options: outputs.Options, seed: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return what `outputs.split` does: out [B, *table.output], or with `tasks_apart` one [B, O] a
    task; then each level's mixing weights.

    Args:
        x: [B, S, D], any strides; float32, bfloat16 or float16.
        params: one per `table.parameters`, of x's dtype and device.
        table: the network.
        options: the backend whose kernels run, and what the call asks for; `recompute` keeps for
            the backward no more than x, what each softmax gave and what each level handed on.
        seed: int64 [1] on x's device, of dropout; None: nothing is dropped.

    Raises: ValueError for tensors that do not fit the table, and for a table that is too wide
        (`lowering.lower`); RuntimeError if the kernels err on this device (`self_test.py`).
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params)):
        return _Network.apply(table, options, seed, x, *params)
    out, weights, _ = _forward(options.backend, x, params, table, options.mixing, False, seed)
    return outputs.split(out, weights, table, options.tasks_apart)
