"""Launches of the CUDA kernels of csrc/cuda; the names are those of `launchers.py`. They come
compiled: nothing is tuned, and nothing compiled at run time.

A call is one operator in C++ (csrc/cuda/calls.cpp). Here stands what it is bound to.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedmoe.kernels import device
from fusedmoe.kernels.bound import Backward, Bound, Forward, call_fields, chunk_of
from fusedmoe.kernels.writer import Launch


@functools.cache
def _extension():
    return importlib.import_module("fusedmoe._cuda")


def _step(**values: int):
    found = _extension().Step()
    for name, value in values.items():
        setattr(found, name, value)
    return found


def _tiles(bound: Bound, **values: int):
    """The extension's record of how a launch runs."""
    found = _extension().Tiles()
    found.number = getattr(_extension().Number, str(bound.key.dtype).removeprefix("torch."))
    found.rows, found.columns, found.allow_tf32 = bound.tiles.rows, bound.tiles.columns, bound.key.precision == "tf32"
    for name, value in values.items():
        setattr(found, name, value)
    return found


def _filled(bound: Bound, name: str, launches: Sequence[Launch], **values: object) -> int:
    """Fill in the extension's record of what a call is bound to, keep it, and return its address,
    which the operators take."""
    found = _extension().Bound()
    steps = [
        _step(place=launch.place, programs=launch.programs, stores=bound.stores(launch), rowwise=launch.rowwise)
        for launch in launches
    ]
    for field, value in {**call_fields(bound), "steps": steps, **values}.items():
        setattr(found, field, value)
    bound.made["record"], bound.made[name] = found, found.address
    return found.address


def _forward(bound: Forward) -> int:
    tiles = _tiles(bound, units=bound.plan.units, resident=bound.tiles.resident, hidden=bound.program.hidden)
    return _filled(bound, "forward", bound.plan.launches, tiles=tiles, softmax=bound.plan.softmax)


def _backward(bound: Backward) -> int:
    plan, grads = bound.plan, bound.program.gradients[0]
    more = {
        "columns": plan.columns,
        "sums": plan.rows,
        "total": bound.total,
        "grads": grads,
        "softmax": bound.forward.softmax,
    }
    more["gradients"] = _step(place=plan.place, programs=plan.tasks)
    return _filled(bound, "backward", plan.launches, tiles=_tiles(bound), **more)


def _reachable(params: Sequence[Tensor], place: torch.device) -> tuple[Sequence[Tensor], Tensor | None]:
    """The parameters, and their addresses on the device where they are more than travel with a
    launch."""
    if len(params) <= _extension().MOST_PARAMETERS:
        return params, None
    params = [p.contiguous() for p in params]
    return params, device.addresses(params, place)[0]


@functools.cache
def _operator(name: str):
    _extension()
    return getattr(torch.ops.fusedmoe, name).default


def forward(
    bound: Forward, x: Tensor, params: Sequence[Tensor], mixing: bool, seed: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run a bound forward: out, the mixing weights or None, and what it leaves for the backward."""
    params, addresses = _reachable(params, bound.key.device)
    try:
        out, memory, *weights = _operator("network_cuda")(
            x, params, bound.made.get("forward") or _forward(bound), mixing, seed, addresses
        )
    except RuntimeError:
        device.room(x, bound.needs(x.shape[0]))
        raise
    return out, weights[0] if mixing else None, memory


def backward(
    bound: Backward,
    d_out: Tensor,
    d_weights: Tensor | None,
    x: Tensor,
    params: Sequence[Tensor],
    memory: Tensor,
    seed: Tensor | None,
    apart: bool,
) -> list[Tensor]:
    """Run a bound backward: d_x, and the gradients of all live parameters, apart or one after
    another in one tensor."""
    params, addresses = _reachable(params, bound.key.device)
    chunk = chunk_of(x.shape[0])
    try:
        made = bound.made.get("backward") or _backward(bound)
        run = _operator("network_cuda_backward")
        return run(d_out, d_weights, x, params, memory, made, chunk, apart, seed, addresses)
    except RuntimeError:
        device.room(x, bound.needs(x.shape[0], chunk))
        raise
