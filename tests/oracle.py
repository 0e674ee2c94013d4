"""The operator and four families by float64 loops over rows, units, experts and k, written from the
papers' equations.

Plain Python numbers and lists: nothing here is shared with the reference. Only for tiny sizes.
"""

from __future__ import annotations

import math

ACTIVATIONS = {
    "identity": lambda z, _: z,
    "relu": lambda z, _: 0.0 if z <= 0 else z,
    "sigmoid": lambda z, _: 1 / (1 + math.exp(-z)),
    "tanh": lambda z, _: math.tanh(z),
    "silu": lambda z, _: z / (1 + math.exp(-z)),
    "gelu": lambda z, _: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z, _: z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "leaky_relu": lambda z, slope: z if z > 0 else slope * z,
    "elu": lambda z, alpha: z if z > 0 else alpha * math.expm1(z),
    # PyTorch's softplus is the identity above 20.
    "softplus": lambda z, _: z if z > 20 else math.log1p(math.exp(z)),
}


def dot(a, b):
    total = 0.0
    for k in range(len(a)):
        total += a[k] * b[k]
    return total


def linear(weight, bias, h):
    """W h + b for W [N][K]; no bias where it is None."""
    return [dot(weight[n], h) + (bias[n] if bias is not None else 0.0) for n in range(len(weight))]


def mlp(layers, h):
    """`layers`: (weight, bias, activation name, its parameter) from the input upward."""
    for weight, bias, name, parameter in layers:
        h = [ACTIVATIONS[name](z, parameter) for z in linear(weight, bias, h)]
    return h


def softmax(z):
    top = max(z, default=0.0)
    powers = [math.exp(value - top) for value in z]
    return [power / sum(powers) for power in powers]


def combine(weights, vectors):
    """sum over e of weights[e] vectors[e], elementwise."""
    return [dot(weights, [vector[n] for vector in vectors]) for n in range(len(vectors[0]))]


def network(table, values, inputs, route=None):
    """One row through a table. `values`: parameter name -> nested lists; inputs: [S][D] each; route:
    per level and unit (experts, number of the selector) or None. Returns (out, w per level as
    [U][E])."""
    below, weights = [[list(slot) for slot in inputs[0]]], []  # the slots of each level
    for number, level in enumerate(table.levels):
        y = []
        for e, expert in enumerate(level.experts):
            h = _read(expert.sources, below, inputs, y)
            y.append(_ops(values, f"levels.{number}.experts.{e}", expert.ops, h))
        chosen = route[number] if route else [None] * len(level.units)
        # Off: pairs that the route leaves out.
        off = [set(u.gate.sees) - set(c[0]) if c else set() for u, c in zip(level.units, chosen, strict=True)]
        w = [
            _unit_weights(values, f"levels.{number}.gates.{u}", unit, (below, inputs, y), chosen[u], off[u])
            for u, unit in enumerate(level.units)
        ]
        units = []
        for u, unit in enumerate(level.units):
            reads = set(unit.gate.sees if unit.gate else ()) | set(unit.static.experts if unit.static else ())
            reads = sorted(reads - off[u])
            out = combine([w[u][e] for e in reads], [y[e] for e in reads]) if reads else [0.0] * len(y[0])
            if unit.product is not None:
                a, b = unit.product
                out = [p * q for p, q in zip(y[a], y[b], strict=True)]
            units.append(_with_channels(values, unit.static, y, out, off[u]))
        weights.append(w)
        below.append(units)
    if any(task.tower for task in table.tasks):
        return [
            _ops(values, f"towers.{t}", task.tower, _read(task.sources, below, inputs, []))
            for t, task in enumerate(table.tasks)
        ], weights
    return below[-1], weights


def _read(sources, below, inputs, y):
    """The concatenation of sources. `below`: the slots of each level so far, those of this one last."""
    joined = []
    for source in sources:
        if source.kind == "slot":
            vector = below[-1][source.index]
        elif source.kind == "input":
            vector = inputs[source.place][source.index]
        else:
            vector = y[source.index] if source.kind == "expert" else below[source.place + 1][source.index]
        joined += vector[source.first :][: source.width]
    return joined


def _ops(values, where, ops, h):
    """Ops one after another; parameters are numbered by the ops that have some."""
    number = 0
    for op in ops:
        kind, name = type(op).__name__, f"{where}.{number}"
        if kind == "Activation":
            h = [ACTIVATIONS[op.name](z, op.parameter) for z in h]
            continue
        if kind == "Dropout":
            continue
        number += 1
        if kind == "Linear":
            weight = values[f"{name}.weight" if op.shared is None else f"shared.{op.shared}"]
            bias = values[f"{name}.bias" if op.shared_bias is None else f"shared.{op.shared_bias}"] if op.bias else None
            h = linear(weight, bias, h)
        elif kind == "PReLU":
            slopes = values[f"{name}.weight"]
            h = [z if z > 0 else slopes[n if op.channels else 0] * z for n, z in enumerate(h)]
        elif kind == "Bias":
            bias = values[f"{name}.bias" if op.shared is None else f"shared.{op.shared}"]
            h = [z + b for z, b in zip(h, bias, strict=True)]
        else:
            h = _layer_norm(op, values, name, h)
    return h


def _layer_norm(op, values, name, h):
    mean = sum(h) / len(h)
    deviation = math.sqrt(sum((z - mean) ** 2 for z in h) / len(h) + op.eps)
    h = [(z - mean) / deviation for z in h]
    if op.affine:
        h = [gamma * z for gamma, z in zip(values[f"{name}.weight"], h, strict=True)]
    return [z + beta for beta, z in zip(values[f"{name}.bias"], h, strict=True)] if op.affine and op.bias else h


def _with_channels(values, static, y, out, off):
    """`out` with the experts that have one static weight a column."""
    if static is None or not static.channels:
        return out
    flat = _flat(values[f"shared.{static.tensor}"])[static.offset :]
    for i, e in enumerate(static.experts):
        if e in off:
            continue
        out = [z + flat[i * len(out) + n] * y[e][n] for n, z in enumerate(out)]
    return out


def _unit_weights(values, where, unit, vectors, choice, off):
    """w[u] over all experts of the level: softmax over those seen, plus the static weights. vectors:
    what `_read` takes."""
    w = [0.0] * len(vectors[2])
    if unit.gate is not None and unit.gate.sees:
        logits = _logits(values, where, unit.gate, vectors, choice[1] if choice else 0)
        seen = [(e, z) for e, z in zip(unit.gate.sees, logits, strict=True) if e not in off]
        for (e, _), p in zip(seen, softmax([z for _, z in seen]), strict=True):
            w[e] += p
    if unit.static is not None and not unit.static.channels:
        for i, e in enumerate(unit.static.experts):
            w[e] += (
                0.0
                if e in off
                else (
                    unit.static.values[i]
                    if unit.static.values is not None
                    else _flat(values[f"shared.{unit.static.tensor}"])[unit.static.offset + i]
                )
            )
    return w


def _logits(values, where, gate, vectors, selector):
    """What a gate's softmax is taken of."""
    if type(gate).__name__ == "Attention":
        query = _read(gate.query, *vectors)
        return [gate.scale * dot(query, _read(key, *vectors)) for key in gate.keys]
    if not gate.selectors:
        return [z / gate.temperature for z in values[f"{where}.bias"]]
    hidden = _ops(values, f"{where}.hidden", gate.hidden, _read(gate.selectors[selector], *vectors))
    logits = linear(values[f"{where}.weight"], values[f"{where}.bias"] if gate.bias else None, hidden)
    return [z / gate.temperature for z in logits]


def _flat(nested):
    return [value for item in nested for value in _flat(item)] if isinstance(nested, list) else [nested]


def mmoe(x, experts, gates):
    """MMoE eq. 6-8: f^k(x) = sum over i of g^k(x)_i f_i(x), g^k(x) = softmax(W_gk x + b_gk).
    Returns [T][H].

    `experts`: n MLPs; `gates`: (W, b) per task.
    """
    outputs = [mlp(expert, x) for expert in experts]
    return [combine(softmax(linear(weight, bias, x)), outputs) for weight, bias in gates]


def ple(slots, levels, counts):
    """PLE eq. 2-7. Returns [T][H].

    Task k's gate weighs its own m_k experts and the m_s shared ones, in this order (eq. 2-5); below
    the last level one more gate weighs the experts of all tasks and the shared ones (eq. 6-7); each
    reads its own slot, the shared one comes last.

    `levels`: (experts, gates) per level, experts ordered by task, the shared ones last; `counts`:
    m_k per task, then m_s.
    """
    tasks = len(counts) - 1
    for experts, gates in levels:
        outputs = []
        place = 0
        for k in range(tasks + 1):
            outputs.append([mlp(experts[place + i], slots[k]) for i in range(counts[k])])
            place += counts[k]
        units = []
        for k in range(len(gates)):
            selected = outputs[k] + outputs[tasks] if k < tasks else [y for group in outputs for y in group]
            units.append(combine(softmax(linear(*gates[k], slots[k])), selected))
        slots = units
    return slots


def adatt(slots, levels, counts):
    """AdaTT eq. 2-10: f_t = AllTaskFusion + NativeExpertFusion. Returns one vector per unit of the
    last level.

    AllTaskFusion weighs every expert of the level by softmax(G_t x_t); NativeExpertFusion adds the
    unit's own experts with the weights v_t, which do not depend on x. With one native expert
    everywhere v_t = 1, and without the residual it is absent.

    `levels`: (experts ordered by slot, gates, natives) per level, natives[u] = v_u or None;
    `counts`: experts per slot, shared last if any.
    """
    for experts, gates, natives in levels:
        own = []
        place = 0
        for s in range(len(counts)):
            own.append([mlp(experts[place + i], slots[s]) for i in range(counts[s])])
            place += counts[s]
        everything = [y for group in own for y in group]
        units = []
        for u in range(len(gates)):
            fused = combine(softmax(linear(*gates[u], slots[u])), everything)
            if natives[u] is not None:
                native = combine(natives[u], own[u])
                fused = [a + b for a, b in zip(fused, native, strict=True)]
            units.append(fused)
        slots = units
    return slots


def cross_stitch(slots, levels):
    """Cross-Stitch (MMoE 6.1): unit i = sum over j of alpha_ij times task j's hidden vector.
    `levels`: (experts, alpha [T][T])."""
    for experts, alpha in levels:
        outputs = [mlp(expert, slot) for expert, slot in zip(experts, slots, strict=True)]
        slots = [combine(row, outputs) for row in alpha]
    return slots
