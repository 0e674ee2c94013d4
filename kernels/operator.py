"""The operator on a GPU: one differentiable call over `network.forward` and `network.backward`, with the kernels of the backend that it is told."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fusedmoe.kernels import bound, network, trial
from fusedmoe.kernels.launchers import tuner
from fusedmoe.kernels.program import lower
from fusedmoe.reference import operator as reference
from fusedmoe.table import Table

_HERE = nullcontext()


def inner(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, and rows so near that 32 bits reach over those of a chunk, which are more than a tile's."""
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(0) * bound.chunk_of(x.shape[0]) < 2**31 else x.contiguous()


def there(x: Tensor):
    """The tensors' device made current: kernels are launched on the current one."""
    return _HERE if not x.is_cuda or x.get_device() == torch.cuda.current_device() else torch.cuda.device(x.device)


def launching(x: Tensor, backend: str):
    """A block that launches: the device has passed its trial and is current. Raises: RuntimeError if the kernels err on it (`trial.py`)."""
    if x.is_cuda:
        trial.once(x.device, x.dtype, backend)
    return there(x)


def _forward(backend: str, x: Tensor, params: Sequence[Tensor], table: Table, mixing: bool, training: bool) -> tuple[Tensor, Tensor | None, network.Saved]:
    x, search = inner(x), tuner(backend)
    with launching(x, backend):
        tiles = search.of_forward(x, params, table, mixing, training) if search and search.enabled() else None
        return network.forward(x, params, table, mixing, training, tiles, backend)


def recomputed(table: Table) -> bool:
    """Whether a forward that is to keep as little as it can keeps x alone: between two levels of this network there are stages of their own."""
    return any(len(stages) > 1 for stages in lower(table).groups)


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: str, table: Table, mixing: bool, recompute: bool, x: Tensor, *params: Tensor):
        out, weights, saved = _forward(backend, x, params, table, mixing, training=True)
        ctx.backend, ctx.table, ctx.tiles = backend, table, saved.tiles
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, None if recompute and recomputed(table) else saved.memory, *params)
        return out, weights

    @staticmethod
    def backward(ctx, d_out: Tensor | None, d_weights: Tensor | None):
        x, memory, *params = ctx.saved_tensors
        if d_out is None:
            d_out = x.new_zeros(x.shape[0], *ctx.table.output)
        if torch.is_grad_enabled():
            # Gradients that are to be differentiated again are plain PyTorch's.
            d_x, d_params = reference.backward(x, params, ctx.table, d_out, reference.by_level(d_weights, ctx.table))
            return None, None, None, None, d_x, *d_params
        gradients = _gradients(ctx.backend, ctx.table, d_out, d_weights, x, params, network.Saved(memory, ctx.tiles))
        wanted = ctx.needs_input_grad[4:]
        return None, None, None, None, *(d if need else None for d, need in zip(gradients, wanted, strict=True))


def _gradients(
    backend: str, table: Table, d_out: Tensor, d_weights: Tensor | None, x: Tensor, params: Sequence[Tensor], saved: network.Saved
) -> list[Tensor | None]:
    """d_x and the parameters' gradients. saved: what the forward left, or its tiles alone, by which it is run once more."""
    x = inner(x)
    with there(x):
        if saved.memory is None:
            _, _, saved = network.forward(x, params, table, False, True, saved.tiles, backend)
        search = tuner(backend)
        tiles = search.of_backward(d_out, d_weights, x, params, saved, table) if search and search.enabled() else None
        d_x, d_params = network.backward(d_out, d_weights, x, params, saved, table, tiles, backend)
    return [d_x, *d_params]


def run(backend: str, x: Tensor, params: Sequence[Tensor], table: Table, mixing: bool, recompute: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return out [B, *table.output], and the mixing weights [B, table.mixing] or None.

    Args:
        backend: whose kernels.
        x: [B, S, D], any strides; float32, bfloat16 or float16.
        params: one per `table.parameters`, of x's dtype and device.
        table: the network.
        mixing: return the mixing weights.
        recompute: keep for the backward no more than x, what each softmax gave and what each level handed on.

    Raises: ValueError for tensors that do not fit the table, and for a table that is too wide (`program.lower`); RuntimeError if the kernels err on
        this device (`trial.py`).
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params)):
        return _Network.apply(backend, table, mixing, recompute, x, *params)
    out, weights, _ = _forward(backend, x, params, table, mixing, training=False)
    return out, weights
