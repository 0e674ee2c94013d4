"""The operator on a GPU: one differentiable call over `network.forward` and `network.backward`, with the kernels of the backend that it is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from fusedmoe import codec, outputs
from fusedmoe.kernels import network, trial
from fusedmoe.kernels.launchers import launcher
from fusedmoe.reference import operator as reference
from fusedmoe.table import Table


def fits(x: Tensor, params: Sequence[Tensor], table: Table) -> bool:
    """Whether the tensors are what the kernels may read: of the table's shapes, one dtype and one device. It says nothing about what is wrong."""
    dtype, place = x.dtype, x.device
    if x.dim() != 3 or tuple(x.shape[1:]) != (table.slots, table.width) or len(params) != len(table.parameters):
        return False
    return all(p.shape == expect.shape and p.dtype is dtype and p.device == place for p, expect in zip(params, table.parameters, strict=True))


def inner(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, and rows so near that 32 bits reach over those of a chunk, which are more than a tile's."""
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(0) * network.chunk_of(len(x)) < 2**31 else x.contiguous()


def there(x: Tensor):
    """The tensors' device made current: kernels are launched on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@contextmanager
def launching(x: Tensor, backend: str) -> Iterator[None]:
    """A block that launches: the device has passed its trial and is current. Raises: RuntimeError if the kernels err on it (`trial.py`)."""
    with there(x):
        if x.is_cuda:
            with torch.no_grad():
                trial.once(x.device, x.dtype, backend)
        yield


def _forward(backend: str, x: Tensor, params: Sequence[Tensor], table: Table, mixing: bool, training: bool) -> tuple[Tensor, Tensor, network.Saved]:
    arguments = inner(x), [p.contiguous() for p in params], table, mixing, training
    with launching(x, backend):
        return network.forward(*arguments, launcher(backend).tiles_of_forward(*arguments), backend)


class _Network(torch.autograd.Function):
    """It returns what `outputs.split` does: autograd tells which of the tensors have a gradient."""

    @staticmethod
    def forward(ctx, backend: str, table: Table, mixing: bool, tasks_apart: bool, x: Tensor, *params: Tensor):
        out, weights, saved = _forward(backend, x, params, table, mixing, training=True)
        ctx.backend, ctx.table, ctx.tasks_apart = backend, table, tasks_apart
        ctx.tiles = saved.tiles
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, saved.buffers, saved.softmax, *params)
        return outputs.split(out, weights if mixing else None, table, tasks_apart)

    @staticmethod
    def backward(ctx, *d_outputs: Tensor | None):
        x, buffers, softmax, *params = ctx.saved_tensors
        table = ctx.table
        d_out, d_weights, tasks, levels = outputs.join(d_outputs, x, table, ctx.tasks_apart)
        wanted = outputs.dependent(codec.encode(table), tasks, levels)
        if torch.is_grad_enabled():
            # Gradients that are to be differentiated again are plain PyTorch's.
            d_x, d_params = reference.backward(x, params, table, d_out, outputs.by_level(d_weights, table))
        else:
            with there(x):
                given = None if d_weights is None else d_weights.contiguous()
                # Hooks of saved tensors may give back equal ones of any layout.
                saved = network.Saved(buffers.contiguous(), softmax.contiguous(), ctx.tiles)
                arguments = d_out.contiguous(), given, inner(x), [p.contiguous() for p in params], saved, table
                d_x, d_params = network.backward(*arguments, launcher(ctx.backend).tiles_of_backward(*arguments), ctx.backend)
        needed = zip((d_x, *d_params), wanted, ctx.needs_input_grad[4:], strict=True)
        return None, None, None, None, *(d if depends and need else None for d, depends, need in needed)


def run(backend: str, x: Tensor, params: Sequence[Tensor], table: Table, mixing: bool, tasks_apart: bool) -> tuple[Tensor, ...]:
    """Return what `outputs.split` does: out [B, *table.output], or with `tasks_apart` one [B, O] a task; then each level's mixing weights.

    Args:
        backend: whose kernels.
        x: [B, S, D], any strides; float32, bfloat16 or float16.
        params: one per `table.parameters`, of x's dtype and device (`fits`).
        table: the network.
        mixing: return the mixing weights.
        tasks_apart: return one output a task.

    Raises: ValueError for a table that is too wide (`program.lower`); RuntimeError if the kernels err on this device (`trial.py`).
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params)):
        return _Network.apply(backend, table, mixing, tasks_apart, x, *params)
    out, weights, _ = _forward(backend, x, params, table, mixing, training=False)
    return outputs.split(out, weights if mixing else None, table, tasks_apart)
