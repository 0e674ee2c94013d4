"""The reference's forward pass, with everything that its backward reads. Formulas: `operator.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmoe.graph import LINEAR, NORM, NOTHING, Gate, Graph, Mlp, Stage, Static, Unit, Vector, node_of
from fusedmoe.reference import philox
from fusedmoe.reference.activation import apply
from fusedmoe.table import Table

Softmax = Callable[[Tensor], Tensor]
# Where a vector stands: its kind, its input or level, and its number there.
Place = tuple[str, int, int]


def last_softmax(z: Tensor) -> Tensor:
    """Return the softmax over the last dimension."""
    return torch.softmax(z, -1)


class Trace(NamedTuple):
    """What one stage saw: its input, its z, the n of a LayerNorm, and what dropout multiplies with."""

    h: Tensor
    z: Tensor
    n: Tensor | None
    factors: Tensor | None = None


class Run(NamedTuple):
    """What a forward computed, by place; only what some output depends on.

    p, w: the softmax [B, len(sees)] and the mixing weights of a unit by expert, each [B]. channels:
    the static weights v[u,e,:] of units that have them. seed: of dropout, or None.
    """

    graph: Graph
    seed: Tensor | None
    out: Tensor
    values: dict[Place, Tensor]
    p: dict[Place, Tensor]
    w: dict[Place, dict[int, Tensor]]
    channels: dict[Place, dict[int, Tensor]]
    traces: dict[Place, tuple[Mlp, list[Trace]]]


def run_forward(
    x: Tensor, params: Sequence[Tensor], table: Table, softmax: Softmax = last_softmax, seed: Tensor | None = None
) -> Run:
    """The forward pass, with everything that the backward pass reads."""
    graph = table.graph
    run = Run(graph, seed, x, {("input", 0, s): x[:, s] for s in range(x.shape[1])}, {}, {}, {}, {})
    for number, level in enumerate(graph.levels):
        for e, expert in enumerate(level.experts):
            if expert.computed:
                place = ("expert", number, e)
                run.values[place] = _mlp(run, place, expert.mlp, number, params)
        for u, unit in enumerate(level.units):
            if unit.computed:
                run.values["unit", number, u] = _unit(run, number, u, unit, params, softmax, x)
    top = len(graph.levels)
    outs = [_mlp(run, ("tower", 0, t), mlp, top, params) for t, mlp in enumerate(graph.towers)]
    outs = outs or [run.values["unit", top - 1, u] for u in range(graph.output[0])]
    return run._replace(out=torch.stack(outs, 1))


def read(run: Run, vectors: Sequence[Vector], level: int) -> Tensor:
    """The concatenation of vectors that are read in a level, [B, sum of widths]."""
    found = []
    for vector in vectors:
        value = run.values[place_of(vector, level)]
        columns = value[:, vector.first : vector.first + vector.width]
        # For those who differentiate this forward by autograd.
        found.append(columns.detach() if vector.detached else columns)
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def place_of(vector: Vector, level: int) -> Place:
    """Where a vector stands that is read in a level; a plain tuple, as torch.compile tells the two apart."""
    node = node_of(vector, level)
    return node.kind, node.place, node.number


def own(number: int, params: Sequence[Tensor]) -> Tensor | None:
    return None if number == NOTHING else params[number]


def _mlp(run: Run, place: Place, mlp: Mlp, level: int, params: Sequence[Tensor]) -> Tensor:
    """Run an MLP; return its output, and leave its trace."""
    h, traces = read(run, mlp.sources, level), []
    for stage in mlp.stages:
        trace = _head(stage, h, params)
        slope = own(stage.slope, params)
        h = apply(stage.activation, trace.z) if slope is None else torch.where(trace.z > 0, trace.z, slope * trace.z)
        if stage.dropout and run.seed is not None:
            trace = trace._replace(factors=philox.factors(run.seed, h, stage.dropout, stage.stream))
            h = dropped(h, trace)
        traces.append(trace)
    run.traces[place] = mlp, traces
    return h


def dropped(value: Tensor, trace: Trace) -> Tensor:
    """What dropout leaves of a stage's output, or of its gradient. Chosen: infinity times 0 is NaN."""
    factors = trace.factors
    if factors is None:
        return value
    return torch.where(factors == 0, torch.zeros_like(value), (value * factors).to(value.dtype))


def _head(stage: Stage, h: Tensor, params: Sequence[Tensor]) -> Trace:
    """z of a stage."""
    weight, bias = own(stage.weight, params), own(stage.bias, params)
    if stage.kind == LINEAR:
        return Trace(h, F.linear(h, params[stage.weight], bias), None)
    if stage.kind != NORM:
        return Trace(h, h if bias is None else h + bias, None)
    n = (h - h.mean(-1, keepdim=True)) * deviation(h, stage.eps)
    z = n if weight is None else n * weight
    return Trace(h, z if bias is None else z + bias, n)


def deviation(h: Tensor, eps: float) -> Tensor:
    """r = 1 / sqrt(var(h) + eps), [B, 1]."""
    return torch.rsqrt(h.var(-1, correction=0, keepdim=True) + eps)


def _unit(run: Run, number: int, u: int, unit: Unit, params: Sequence[Tensor], softmax: Softmax, x: Tensor) -> Tensor:
    """out[u,:], [B, H]."""
    place, y = ("unit", number, u), {e: run.values["expert", number, e] for e in unit.reads}
    if unit.product:
        a, b = unit.product
        return y[a] * y[b]
    w: dict[int, Tensor] = {}
    if unit.gate and unit.gate.sees:
        logits = _logits(run, ("gate", number, u), unit.gate, number, params)
        if unit.gate.closed:
            logits = torch.stack([logits[:, j] for j in unit.gate.seen.values()], -1)
        run.p[place] = softmax(logits.expand(x.shape[0], -1))
        w = dict(zip(unit.gate.seen, run.p[place].unbind(-1), strict=True))
    if unit.static and unit.static.channels:
        values = _static_values(unit.static, params, x, unit.width).view(-1, unit.width)
        run.channels[place] = dict(zip(unit.static.experts, values, strict=True))
    elif unit.static:
        for e, v in zip(unit.static.experts, _static_values(unit.static, params, x, 1), strict=True):
            if e in unit.reads:
                w[e] = w[e] + v if e in w else v.expand(x.shape[0])
    run.w[place] = {e: w[e] for e in unit.reads if e in w}
    total = x.new_zeros(x.shape[0], unit.width)
    for e in unit.reads:
        total = total + times(run, place, e, y[e])
    return total


def times(run: Run, place: Place, e: int, value: Tensor) -> Tensor:
    """w[u,e] times a vector [B, H]: what is mixed, or what comes back."""
    w, v = run.w[place].get(e), run.channels.get(place, {}).get(e)
    if v is None:
        return run.w[place][e][:, None] * value
    return v * value if w is None else (w[:, None] + v) * value


def _logits(run: Run, place: Place, gate: Gate, level: int, params: Sequence[Tensor]) -> Tensor:
    """z[u,:], [B, len(sees)], or [1, len(sees)] of a free gate."""
    if gate.mlp:
        z = _mlp(run, place, gate.mlp, level, params)
    elif gate.keys:
        q = read(run, gate.query, level)
        zero = q.new_zeros(q.shape[0])  # of a key that is not read
        z = torch.stack(
            [zero if j in gate.closed else (q * read(run, key, level)).sum(-1) for j, key in enumerate(gate.keys)], -1
        )
    else:
        z = params[gate.free][None]
    return z if gate.factor == 1.0 else gate.factor * z


def _static_values(static: Static, params: Sequence[Tensor], x: Tensor, width: int) -> Tensor:
    """v[u,:] of the unit's experts, `width` numbers each: fixed values, or elements of a learned tensor."""
    if static.parameter == NOTHING:
        return x.new_tensor(static.values)
    return params[static.parameter].reshape(-1)[static.offset :][: width * len(static.experts)]


def dense(run: Run, number: int, x: Tensor) -> Tensor:
    """w as one tensor [B, U, E], zero where no weight is."""
    level, zero = run.graph.levels[number], x.new_zeros(x.shape[0])
    return torch.stack(
        [
            torch.stack([run.w.get(("unit", number, u), {}).get(e, zero) for e in range(len(level.experts))], -1)
            for u in range(len(level.units))
        ],
        1,
    )
