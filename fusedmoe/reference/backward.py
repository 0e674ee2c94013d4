"""The reference's backward pass, in operations that can be differentiated again. Formulas:
`operator.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmoe.graph import LINEAR, NOTHING, Gate, Stage, Static, Unit, Vector
from fusedmoe.reference.activation import pullback
from fusedmoe.reference.forward import Place, Run, Trace, deviation, dropped, own, place_of, read, times


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


class Backward(NamedTuple):
    """The backward pass: d has the gradients of values by place, grads those of the parameters."""

    run: Run
    params: Sequence[Tensor]
    d: dict[Place, Tensor]
    grads: list[Tensor | None]

    def outputs(self, d_out: Tensor) -> None:
        """Hand the output's gradient to the towers, or to the units of the last level."""
        graph = self.run.graph
        for t in range(len(graph.towers)):
            self.mlp(("tower", 0, t), len(graph.levels), d_out[:, t])
        if not graph.towers:
            for u, d in enumerate(d_out.unbind(1)):
                self.d["unit", len(graph.levels) - 1, u] = d

    def level(self, number: int, d_weights: Tensor | None) -> None:
        """Take the gradients of a level's units, and of its mixing weights [B, U, E] if there are any."""
        level = self.run.graph.levels[number]
        computed = [(u, unit) for u, unit in enumerate(level.units) if unit.computed]
        for u, unit in computed:
            self.experts(number, u, unit)
        for u, unit in computed:
            if not unit.product:
                self.weights(number, u, unit, None if d_weights is None else d_weights[:, u])
        # An expert may read those before it.
        for e in reversed(range(len(level.experts))):
            d = self.d.get(("expert", number, e))
            if d is not None:
                self.mlp(("expert", number, e), number, d)

    def experts(self, number: int, u: int, unit: Unit) -> None:
        """dy[e,:] = w[u,e] g[u,:], or of a product g times the other expert."""
        place = ("unit", number, u)
        g = self.d.get(place)
        if g is None:
            return
        if unit.product:
            for e, other in (unit.product, unit.product[::-1]):
                self.add(("expert", number, e), g * self.run.values["expert", number, other])
            return
        for e in unit.reads:
            self.add(("expert", number, e), times(self.run, place, e, g))

    def weights(self, number: int, u: int, unit: Unit, k: Tensor | None) -> None:
        """dw[u,e] = k[u,e] + g[u,:] . y[e,:], and what follows from it."""
        place, d_w = ("unit", number, u), {}
        g = self.d.get(place)
        for e in unit.reads:
            y = self.run.values["expert", number, e]
            if g is not None and unit.static and unit.static.channels and e in unit.static.experts:
                self.static(unit.static, [e], (g * y).sum(0), unit.width)
            if e in self.run.w[place] and (g is not None or k is not None):
                d_w[e] = k[:, e] if g is None and k is not None else (g * y).sum(-1)
                if g is not None and k is not None:
                    d_w[e] = k[:, e] + d_w[e]
        if not d_w:
            return
        if unit.static and not unit.static.channels and unit.static.experts and unit.static.parameter != NOTHING:
            zero = next(iter(d_w.values())).new_zeros(())  # of an expert that a route leaves out
            d_v = [d_w[e].sum() if e in d_w else zero for e in unit.static.experts]
            self.static(unit.static, unit.static.experts, torch.stack(d_v), 1)
        if unit.gate and unit.gate.sees:
            self.gate(number, u, unit.gate, torch.stack([d_w[e] for e in unit.gate.seen], -1))

    def static(self, static: Static, experts: Sequence[int], d: Tensor, width: int) -> None:
        """Add the gradients of the weights of some experts to the tensor that they are elements of."""
        v = self.params[static.parameter]
        first = static.offset + width * static.experts.index(experts[0])
        self.parameter(static.parameter, F.pad(d, (first, v.numel() - first - len(d))).reshape(v.shape))

    def gate(self, number: int, u: int, gate: Gate, d_p: Tensor) -> None:
        """dz[u,e] = p[u,e] (t[e] - sum over e' of p[u,e'] t[e']) with t = dw - c, sent on."""
        p = self.run.p["unit", number, u]
        t = d_p - (p * d_p).sum(-1, keepdim=True)
        d_z = p * (t - (p * t).sum(-1, keepdim=True))
        if gate.factor != 1.0:
            d_z = gate.factor * d_z
        if gate.closed:
            zero = torch.zeros_like(d_z[:, 0])
            places = {j: place for place, j in enumerate(gate.seen.values())}
            d_z = torch.stack([d_z[:, places[j]] if j in places else zero for j in range(len(gate.sees))], -1)
        if gate.mlps:
            self.mlp(("gate", number, u), number, d_z)
        elif gate.keys:
            q = read(self.run, gate.query, number)
            keys = {j: read(self.run, gate.keys[j], number) for j in gate.seen.values()}
            self.send(gate.query, number, sum(d_z[:, j, None] * key for j, key in keys.items()))
            for j in keys:
                self.send(gate.keys[j], number, d_z[:, j, None] * q)
        else:
            self.parameter(gate.free, d_z.sum(0))

    def mlp(self, place: Place, level: int, d: Tensor) -> None:
        """Turn the gradient of an MLP's output into those of its parameters and its sources."""
        mlp, traces = self.run.traces[place]
        for stage, trace in zip(reversed(mlp.stages), reversed(traces), strict=True):
            d = self.stage(stage, trace, d)
        self.send(mlp.sources, level, d)

    def stage(self, stage: Stage, trace: Trace, d: Tensor) -> Tensor:
        """Turn the gradient of a stage's output into that of its input."""
        slope, weight = own(stage.slope, self.params), own(stage.weight, self.params)
        d = dropped(d, trace)
        if slope is None:
            d_z = pullback(stage.activation, trace.z, d)
        else:
            d_z = torch.where(trace.z > 0, d, slope * d)
            below = torch.where(trace.z > 0, torch.zeros_like(d), d * trace.z).sum(0)
            self.parameter(stage.slope, below if len(slope) == stage.width else below.sum()[None])
        if stage.bias != NOTHING:
            self.parameter(stage.bias, d_z.sum(0))
        if stage.kind == LINEAR:
            self.parameter(stage.weight, d_z.T @ trace.h)
            return d_z @ self.params[stage.weight]
        if trace.n is None:
            return d_z
        if weight is not None:
            self.parameter(stage.weight, (d_z * trace.n).sum(0))
            d_z = d_z * weight
        mean, along = d_z.mean(-1, keepdim=True), (d_z * trace.n).mean(-1, keepdim=True)
        return deviation(trace.h, stage.eps) * (d_z - mean - trace.n * along)

    def send(self, vectors: Sequence[Vector], level: int, d: Tensor) -> None:
        """Hand the gradient of a concatenation to its vectors."""
        for vector, part in zip(vectors, d.split([vector.width for vector in vectors], -1), strict=True):
            if vector.detached:
                continue
            place = place_of(vector, level)
            behind = self.run.values[place].shape[-1] - vector.first - vector.width
            self.add(place, F.pad(part, (vector.first, behind)) if vector.first or behind else part)

    def add(self, place: Place, d: Tensor) -> None:
        self.d[place] = _add(self.d.get(place), d)

    def parameter(self, number: int, d: Tensor) -> None:
        self.grads[number] = _add(self.grads[number], d)
