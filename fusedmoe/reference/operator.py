"""The operator in plain PyTorch: a network of levels with task towers on top. Read this file first.

Every faster backend is checked against `forward` and `backward`; both are checked against loops
written from the papers.

Sizes: B rows, S input slots of width D; per level E experts of output width H and U fusion units; T
tasks. A level reads slots s (the input x[:, s] below, the units of the level under it above); r is
the input slot that root selectors read.

Forward, for every row b of one level:

    y[e]     = MLP_e(s[slot(e)])                         h <- a(W h + b) for each layer of expert e
    z[u,e]   = (MLP_u(q[u]))[e]    for e in sees(u)      q[u], the selector: a slot, root or y[e]
    p[u,:]   = softmax over sees(u) of z[u,:]            0 over nothing, and without a gate
    w[u,e]   = p[u,e] + v[u,e]     for e in reads(u)     v: static weights
    out[u,:] = sum over e in reads(u) of w[u,e] y[e,:]   ascending in e; 0 if u reads nothing

reads(u) are the experts in sees(u) and those of v[u].

Task t's tower is one more MLP over the concatenation of its units. Rows never meet.

Backward, given g[u,:] = dLoss/d out[u,:] (and k[u,e] = dLoss/d w[u,e] where the caller used the
mixing weights, else 0):

- out is bilinear in w and y:            dw[u,e] = k[u,e] + g[u,:] . y[e,:]
                                         dy[e,:] = sum over u of w[u,e] g[u,:]
- w adds v, the same for every row:      dv[u,e] = sum over b of dw[u,e]            dp = dw
- dp[i]/dz[j] = p[i] ([i = j] - p[j]):   dz[u,e] = p[u,e] (dw[u,e] - sum over sees(u) of p dw[u,:])
                                         computed as below, under "Digits of the softmax"
- dz through the gate's MLP gives dq[u], which goes to the slot, the root input or the expert that u
  selects (dy[e] += dq[u])
- a linear map z = W h + b, h' = a(z):   dz = a'(z) dh'     dW = sum over b of dz h^T
                                         dh = W^T dz        db = sum over b of dz
- a slot sums what the experts and gates that read it send: it is g of the unit below, or d_x[:, s]

Digits of the softmax. Subtract the mean c = sum of p dw from dw before the softmax's backward:
otherwise the rounding of two large terms swamps dz where one expert has nearly all the weight.
There the difference in dz[i] is far smaller than its two terms: with roundoff r and m = sum of p
dw, its error is up to r |m|, against a true dz[i] of about 1 - p[i] times differences of dw. But p
sums to 1, so any number c may come off every dw first: dz[e] = p[e] (dw[e] - c - sum over e' of
p[e'] (dw[e'] - c)). With c = m as computed:

    c = sum over e of p[e] dw[e]        t[e] = dw[e] - c
    rest = sum over e of p[e] t[e]      dz[e] = p[e] (t[e] - rest)

c's own error cancels, for it is a shift like any other; and where p does not sum to 1 quite, rest
takes off what that did to c. With n = len(sees(u)) and M = sum of p |t|, the rounding that is left
is that of t, r |t[e]|; of rest, (n + 1) r M; of the difference and of the product: an error of
dz[e] of at most p[e] r (3 |t[e]| + (n + 4) M), to first order in r. t and M hold differences of dw,
and c's error of at most n r |m|, which the bound multiplies by r once more: the term r |m| is gone.
Another c does less: with the largest dw, t of an expert that has the weight and not the largest dw
stays as large as the differences, and so does M. dz's derivative by c is p (sum of p - 1) = 0: dz
can be differentiated again as it is written.

Pairs outside reads(u) are skipped, never multiplied by zero, and what no output depends on (not
`table.live`) is not computed: a NaN in an expert cannot reach a unit that does not read it. Source:
AdaTT (KDD 2023) eq. 2-10; MMoE eq. 6-8; PLE eq. 2-7.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmoe.activation import IDENTITY, Activation
from fusedmoe.reference.activation import apply, pullback
from fusedmoe.table import Layer, Level, Selector, Static, Table

Softmax = Callable[[Tensor], Tensor]


def last_softmax(z: Tensor) -> Tensor:
    """Return the softmax over the last dimension."""
    return torch.softmax(z, -1)


def forward(
    x: Tensor, params: Sequence[Tensor], table: Table, softmax: Softmax = last_softmax
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output of the network and the mixing weights w of its levels.

    Args:
        x: [B, S, D].
        params: one tensor per `table.parameters`, in that order and of those shapes.
        table: the network.
        softmax: what turns the logits [B, len(sees)] of a gate into p; the tests' truth has one
            that autograd differentiates more accurately.

    Returns: out [B, *table.output], and per level w [B, U, E], zero outside reads(u) and for units
        on which no output depends.
    """
    run = _run(x, params, table, softmax)
    return run.out, tuple(_dense(level, state, x) for level, state in zip(table.levels, run.levels, strict=True))


def backward(
    x: Tensor, params: Sequence[Tensor], table: Table, d_out: Tensor, d_weights: Sequence[Tensor | None]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the gradients of the input and the parameters; they can be differentiated once more.

    Args:
        x, params, table: as in `forward`.
        d_out: [B, *table.output], the gradient of the output.
        d_weights: per level the gradient [B, U, E] of the mixing weights, or None; entries outside
            reads(u) are ignored.

    Returns: d_x [B, S, D], and one gradient per parameter: None where no output depends on it.
    """
    run = _run(x, params, table)
    grads: list[Tensor | None] = [None] * len(params)
    d_slots = _backward_towers(run, params, table, d_out, grads)
    d_root: Tensor | None = None
    for number in reversed(range(len(table.levels))):
        down = _LevelBackward(table.levels[number], run.layout, number, run.levels[number], params, grads)
        d_slots, d_selected = down.slots_and_root(d_slots, d_weights[number])
        d_root = d_root if d_selected is None else _add(d_root, d_selected)
    if d_root is not None:
        d_slots[table.root] = _add(d_slots.get(table.root), d_root)
    d_x = torch.stack([_or_zero(d_slots.get(s), x[:, s]) for s in range(table.slots)], 1)
    return d_x, tuple(grads)


def preactivations(x: Tensor, params: Sequence[Tensor], table: Table) -> Iterator[tuple[Activation, Tensor, Tensor]]:
    """Yield activation, z = W h + b and sum over k of |W_k h_k| + |b| of each computed linear map.

    Both are [B, width]. The last one is the scale of z's rounding error: parity tests leave out
    rows whose z is so near to a kink that it may fall on either side.
    """
    run = _run(x, params, table)
    mlps = [
        (run.layout.experts[number][e], trace)
        for number, state in enumerate(run.levels)
        for e, trace in state.experts.items()
    ]
    mlps += [
        (run.layout.gates[number][u], trace)
        for number, state in enumerate(run.levels)
        for u, trace in state.gates.items()
    ]
    mlps += zip(run.layout.towers, run.towers, strict=True)
    for linears, trace in mlps:
        for m, (h, z) in zip(linears, trace, strict=True):
            yield (
                m.activation,
                z,
                F.linear(h.abs(), params[m.weight].abs(), None if m.bias is None else params[m.bias].abs()),
            )


class _Linear(NamedTuple):
    """A linear map and its activation: where its weight and bias stand among the parameters."""

    weight: int
    bias: int | None
    activation: Activation


_MLP = tuple[_Linear, ...]
# (input, pre-activation) of each linear map of one MLP.
_Trace = list[tuple[Tensor, Tensor]]


class _Layout(NamedTuple):
    """The MLPs `experts[level][e]`, `gates[level][u]`, `towers[t]`; where statics begin."""

    experts: list[list[_MLP]]
    gates: list[list[_MLP]]
    towers: list[_MLP]
    statics: int


class _LevelState(NamedTuple):
    """What one level computed, by expert or unit; only what some output depends on."""

    slots: dict[int, Tensor]
    y: dict[int, Tensor]
    p: dict[int, Tensor]
    w: dict[int, dict[int, Tensor]]
    experts: dict[int, _Trace]
    gates: dict[int, _Trace]


class _Run(NamedTuple):
    layout: _Layout
    out: Tensor
    levels: list[_LevelState]
    towers: list[_Trace]


def _layout(table: Table) -> _Layout:
    """Number the linear maps as `table.parameters` does. A gate's last layer is linear."""
    index = itertools.count()

    def mlp(layers: tuple[Layer, ...]) -> _MLP:
        return tuple(_Linear(next(index), next(index) if layer.bias else None, layer.activation) for layer in layers)

    experts, gates = [], []
    for level in table.levels:
        experts.append([mlp(expert.layers) for expert in level.experts])
        gates.append(
            [
                mlp((*u.gate.hidden, Layer(len(u.gate.sees), IDENTITY, u.gate.bias))) if u.gate else ()
                for u in level.units
            ]
        )
    towers = [mlp(task.tower) for task in table.tasks if task.tower]
    return _Layout(experts, gates, towers, next(index))


def _run(x: Tensor, params: Sequence[Tensor], table: Table, softmax: Softmax = last_softmax) -> _Run:
    """The forward pass, with everything that the backward pass reads."""
    layout = _layout(table)
    root = x[:, table.root]
    slots = {s: x[:, s] for s in range(table.slots)}
    states = []
    for number, level in enumerate(table.levels):
        live_units, live_experts = table.live[number]
        state = _LevelState(slots, {}, {}, {}, {}, {})
        for e in sorted(live_experts):
            state.y[e], state.experts[e] = _mlp(layout.experts[number][e], slots[level.experts[e].slot], params)
        for u in sorted(live_units):
            unit = level.units[u]
            if unit.gate and unit.gate.sees:
                z, state.gates[u] = _mlp(layout.gates[number][u], _selected(unit.gate.selector, state, root), params)
                state.p[u] = softmax(z)  # [B, len(sees)]
            state.w[u] = _mixing_weights(level, u, state, params, layout.statics, x)
        slots = {u: _mix(state, u, x.new_zeros(len(x), table.widths[number + 1][u])) for u in sorted(live_units)}
        states.append(state)
    if not table.has_towers:
        return _Run(layout, torch.stack([slots[u] for u in range(len(slots))], 1), states, [])
    towers = [
        _mlp(layout.towers[t], torch.cat([slots[u] for u in task.units], -1), params)
        for t, task in enumerate(table.tasks)
    ]
    return _Run(layout, torch.stack([h for h, _ in towers], 1), states, [trace for _, trace in towers])


def _mlp(linears: _MLP, h: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, _Trace]:
    """Run an MLP on h [B, K]; return its output and its trace."""
    trace = []
    for m in linears:
        z = F.linear(h, params[m.weight], None if m.bias is None else params[m.bias])
        trace.append((h, z))
        h = apply(m.activation, z)
    return h, trace


def _selected(selector: Selector, state: _LevelState, root: Tensor) -> Tensor:
    """The vector that a gate reads."""
    if selector.kind == "root":
        return root
    return state.y[selector.index] if selector.kind == "expert" else state.slots[selector.index]


def _mixing_weights(
    level: Level, u: int, state: _LevelState, params: Sequence[Tensor], statics: int, x: Tensor
) -> dict[int, Tensor]:
    """w[u,e] = p[u,e] + v[u,e], each [B], for the experts that unit u reads, ascending."""
    unit = level.units[u]
    w: dict[int, Tensor] = {}
    if unit.gate and u in state.p:
        w = dict(zip(unit.gate.sees, state.p[u].unbind(-1), strict=True))
    if unit.static:
        for e, v in zip(unit.static.experts, _static_values(unit.static, params, statics, x), strict=True):
            w[e] = w[e] + v if e in w else v.expand(len(x))
    return {e: w[e] for e in unit.reads}


def _static_values(static: Static, params: Sequence[Tensor], statics: int, x: Tensor) -> Tensor:
    """v[u,:], [len(static.experts)]: fixed values, or elements of a learned tensor."""
    if static.tensor is None:
        return x.new_tensor(static.values)
    return params[statics + static.tensor].reshape(-1)[static.offset : static.offset + len(static.experts)]


def _mix(state: _LevelState, u: int, total: Tensor) -> Tensor:
    """out[u,:] = sum over e of w[u,e] y[e,:], added to `total` [B, H]."""
    for e, w in state.w[u].items():
        total = total + w[:, None] * state.y[e]
    return total


def _dense(level: Level, state: _LevelState, x: Tensor) -> Tensor:
    """w as one tensor [B, U, E], zero where no weight is."""
    zero = x.new_zeros(len(x))
    return torch.stack(
        [
            torch.stack([state.w.get(u, {}).get(e, zero) for e in range(len(level.experts))], -1)
            for u in range(len(level.units))
        ],
        1,
    )


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _or_zero(d: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if d is None else d


def _backward_mlp(
    linears: _MLP, trace: _Trace, d: Tensor, params: Sequence[Tensor], grads: list[Tensor | None]
) -> Tensor:
    """Turn the gradient of an MLP's output into that of its input; fill `grads`."""
    for m, (h, z) in zip(reversed(linears), reversed(trace), strict=True):
        d_z = pullback(m.activation, z, d)
        grads[m.weight] = d_z.T @ h
        if m.bias is not None:
            grads[m.bias] = d_z.sum(0)
        d = d_z @ params[m.weight]
    return d


def _backward_towers(
    run: _Run, params: Sequence[Tensor], table: Table, d_out: Tensor, grads: list[Tensor | None]
) -> dict[int, Tensor]:
    """The gradients of the last level's units."""
    if not table.has_towers:
        return dict(enumerate(d_out.unbind(1)))
    d_units: dict[int, Tensor] = {}
    for t, task in enumerate(table.tasks):
        d_joined = _backward_mlp(run.layout.towers[t], run.towers[t], d_out[:, t], params, grads)
        for u, d in zip(task.units, d_joined.split([table.widths[-1][u] for u in task.units], -1), strict=True):
            d_units[u] = _add(d_units.get(u), d)
    return d_units


class _LevelBackward(NamedTuple):
    """The backward pass of one level."""

    description: Level
    layout: _Layout
    number: int
    state: _LevelState
    params: Sequence[Tensor]
    grads: list[Tensor | None]

    def slots_and_root(
        self, d_units: dict[int, Tensor], d_weights: Tensor | None
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Return the gradients of slots and root input from those of units and mixing weights."""
        d_y: dict[int, Tensor] = {}
        d_slots: dict[int, Tensor] = {}
        d_root: Tensor | None = None
        for u in sorted(d_units):
            for e, w in self.state.w[u].items():
                d_y[e] = _add(d_y.get(e), w[:, None] * d_units[u])
        for u in sorted(d_units):
            d_w = self.mixing_weights(u, d_units[u], d_weights)
            self.static_weights(u, d_w)
            gate = self.description.units[u].gate
            if gate is None or u not in self.state.p:
                continue
            selector = gate.selector
            d_q = self.gate(u, gate.sees, d_w)
            if selector.kind == "root":
                d_root = _add(d_root, d_q)
            else:
                into = d_y if selector.kind == "expert" else d_slots
                into[selector.index] = _add(into.get(selector.index), d_q)
        for e, trace in self.state.experts.items():
            s = self.description.experts[e].slot
            d_slots[s] = _add(
                d_slots.get(s),
                _backward_mlp(self.layout.experts[self.number][e], trace, d_y[e], self.params, self.grads),
            )
        return d_slots, d_root

    def mixing_weights(self, u: int, g: Tensor, d_weights: Tensor | None) -> dict[int, Tensor]:
        """dw[u,e] = k[u,e] + g[u,:] . y[e,:], each [B]."""
        d_w = {e: (g * self.state.y[e]).sum(-1) for e in self.state.w[u]}
        return d_w if d_weights is None else {e: d_weights[:, u, e] + d for e, d in d_w.items()}

    def static_weights(self, u: int, d_w: dict[int, Tensor]) -> None:
        """dv[u,e] = sum over b of dw[u,e], into the elements of its static tensor."""
        static = self.description.units[u].static
        if static is None or static.tensor is None or not static.experts:
            return
        place = self.layout.statics + static.tensor
        v = self.params[place]
        d_v = torch.stack([d_w[e].sum() for e in static.experts])
        padded = F.pad(d_v, (static.offset, v.numel() - static.offset - len(d_v)))
        self.grads[place] = _add(self.grads[place], padded.reshape(v.shape))

    def gate(self, u: int, sees: tuple[int, ...], d_w: dict[int, Tensor]) -> Tensor:
        """dz[u,e] = p[u,e] (t[e] - sum over e' of p[u,e'] t[e']) with t = dw - c; returns dq[u]."""
        p = self.state.p[u]
        d_p = torch.stack([d_w[e] for e in sees], -1)
        t = d_p - (p * d_p).sum(-1, keepdim=True)
        d_z = p * (t - (p * t).sum(-1, keepdim=True))
        return _backward_mlp(self.layout.gates[self.number][u], self.state.gates[u], d_z, self.params, self.grads)
