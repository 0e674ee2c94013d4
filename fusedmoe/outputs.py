"""What a network returns, one output or one per task, and which gradients come back for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from fusedmoe import codec
from fusedmoe.graph import reached
from fusedmoe.table import Table


class Options(NamedTuple):
    """What a call asks for: the backend, and what to return and to keep, as in `fusion_network`.

    Inside a backend only towers can be `tasks_apart`: without them outputs may share units.
    """

    backend: str
    mixing: bool
    recompute: bool
    tasks_apart: bool


def for_tasks(out: Tensor, table: Table) -> Tensor:
    """Hand the units [B, U, H] of the last level to the tasks: [B, T, sum of widths].

    Returns: `out` itself if the table has towers or no tasks.
    """
    tasks = table.whole.tasks
    if not tasks:
        return out
    first = [read[0] for read in tasks]
    shared = all(len(read) == 1 for read in tasks)
    if shared and first == list(range(out.shape[1])):
        return out
    if shared and out.shape[1] == 1:
        return out.expand(-1, len(first), -1)
    # Not by a list of indices: where one comes twice, its backward adds in any order, and the
    # threads decide the last bit.
    units = out.unbind(1)
    return torch.stack([torch.cat([units[u] for u in read], dim=-1) for read in tasks], dim=1)


@overload
def by_level(weights: Tensor, table: Table) -> tuple[Tensor, ...]: ...
@overload
def by_level(weights: None, table: Table) -> tuple[None, ...]: ...
def by_level(weights: Tensor | None, table: Table) -> tuple[Tensor, ...] | tuple[None, ...]:
    """Split mixing weights or their gradients [B, table.mixing] into one [B, U, E] per level.

    Returns: None for each level if there are none.
    """
    if weights is None:
        return (None,) * len(table.levels)
    sizes = [(len(level.units), len(level.experts)) for level in table.levels]
    parts = weights.split([u * e for u, e in sizes], dim=1)
    return tuple(part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True))


def per_task(out: Tensor) -> list[Tensor]:
    """Return a list of T outputs [B, O] from [B, T, O]."""
    # Not unbind: its views refuse the in-place operations that a module's own outputs allow.
    return [out.select(1, t) for t in range(out.shape[1])]


def split(out: Tensor, weights: Tensor | None, table: Table, tasks_apart: bool) -> tuple[Tensor, ...]:
    """Return what an autograd function hands out.

    That is `out` or one [B, O] per task, then the mixing weights of each level if there are any.

    Autograd tells which of them have a gradient, so each is an output of its own.
    """
    # By `data`, because autograd forbids to change one of several views in place: these share
    # memory, but no element.
    parts = [part.data for part in per_task(out)] if tasks_apart else [out]
    return (*parts, *(by_level(weights, table) if weights is not None else ()))


def apart(returned: tuple[Tensor, ...], table: Table, options: Options) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    """Tell the outputs from the mixing weights in what an autograd function returned."""
    count = len(table.tasks) if options.tasks_apart else 1
    return list(returned[:count]), tuple(returned[count:])


def without_graph(
    out: Tensor, weights: tuple[Tensor, ...], options: Options
) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    """The same of one output, where no backward will ask which tasks have a gradient."""
    return per_task(out) if options.tasks_apart else [out], weights


class Upstream(NamedTuple):
    """Gradients of outputs.

    `d_out` [B, *table.output] is zero for tasks that have none. `d_weights` [B, table.mixing] is
    None if no level has one. `tasks` and `levels` say which tasks and which levels' mixing weights
    have one; for one output, or without towers, all tasks or none.
    """

    d_out: Tensor
    d_weights: Tensor | None
    tasks: tuple[bool, ...]
    levels: tuple[bool, ...]


def join(gradients: Sequence[Tensor | None], x: Tensor, table: Table, tasks_apart: bool) -> Upstream:
    """Join the gradients of what `split` returned, in x's dtype.

    Under autocast a loss may hand down gradients of another dtype.
    """
    rows, shape = x.shape[0], table.output
    count = shape[0] if tasks_apart else 1
    outs, weights = gradients[:count], gradients[count:]
    tasks, levels = tuple(d is not None for d in outs), tuple(d is not None for d in weights)
    if not tasks_apart:
        d_out = x.new_zeros(rows, *shape) if outs[0] is None else outs[0]
        tasks *= len(table.tasks) if table.has_towers else 1
    else:
        d_out = torch.stack([x.new_zeros(rows, shape[1]) if d is None else d for d in outs], dim=1)
    d_weights = None
    if any(levels):
        sizes = [len(level.units) * len(level.experts) for level in table.levels]
        d_weights = torch.cat(
            [x.new_zeros(rows, n) if d is None else d.flatten(1) for d, n in zip(weights, sizes, strict=True)], dim=1
        )
    return Upstream(
        _of_dtype(d_out, x.dtype),
        None if d_weights is None else _of_dtype(d_weights, x.dtype),
        tasks,
        levels or (False,) * len(table.levels),
    )


def _of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


@functools.lru_cache(maxsize=4096)
def dependent(table_text: str, tasks: tuple[bool, ...], levels: tuple[bool, ...]) -> tuple[bool, ...]:
    """Return `dependencies` of the table of this text, which is a key that hashes fast."""
    return dependencies(codec.decode(table_text), tasks, levels)


def dependencies(table: Table, tasks: tuple[bool, ...], levels: tuple[bool, ...]) -> tuple[bool, ...]:
    """Whether some of these outputs depend on x, and on each parameter.

    If none does, its gradient is None, as in plain PyTorch.

    Args:
        tasks: which towers' outputs; without towers (one flag): whether the units of the last
            level. A tower alone belongs to its task: the units that towers read count as one
            tensor, which layers stack before they hand it out.
        levels: of which levels the mixing weights.
    """
    network = table.whole
    starts = [node for node, wanted in zip(network.outputs, tasks, strict=bool(network.towers)) if wanted]
    if any(tasks):
        # Without towers one flag stands for all units.
        starts += network.read_by_towers if network.towers else network.outputs
    alive = (n for n in table.reads if n.kind == "weights" and levels[n.place])
    starts += [node for node in alive if table.computes(node)]
    nodes, parameters = reached(table.reads, starts, detached=False)
    on_x = any(node.kind == "input" for node in nodes)
    return (on_x, *(i in parameters for i in range(len(table.parameters))))


def needs_gradient(x: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether a call will be asked for gradients."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params))
