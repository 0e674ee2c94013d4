"""The operator for people who build their own layer: a whole network by its table, or one level by its tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusedmoe.activation import Activation, activation
from fusedmoe.op import fusion_network
from fusedmoe.table import Expert, Gate, Layer, Level, Selector, Static, Table, Unit

__all__ = ["LevelWiring", "fusion_level", "fusion_network", "mixing_weights"]


@dataclass(frozen=True)
class LevelWiring:
    """What the tensors of a level do not tell.

    Args:
        slots: the slot each expert reads, one index an expert. Default: slot 0 where x has one slot, otherwise the experts are
            dealt out to the slots evenly and in order, as AdaTT's are (E must be a multiple of S).
        selectors: the vector each unit's gate reads. Default: slot 0 where x has one slot, otherwise slot u (U at most S).
        activation: after every layer of every expert.
    """

    slots: tuple[int, ...] | None = None
    selectors: tuple[Selector, ...] | None = None
    activation: str | Activation = "relu"


def fusion_level(x: Tensor, weights, biases, gates, wiring: LevelWiring = LevelWiring(), sees=None, static=None, backend: str = "auto") -> Tensor:
    """Run one fusion level: out[b,u] = sum over e of (softmax_e(G[u] q[b,u] + c[u]) + v[u,e]) * MLP_e(x[b, slot(e)]).

    Args:
        x: [B, S, D], or [B, D] for one slot.
        weights: of the experts: stacked [E, H, D]; or E matrices [H_e, D]; or, for deeper experts, a sequence of either, one
            item a layer.
        biases: in the same form, [E, H] or E vectors a layer; or None.
        gates: one item a unit: None (no gate), G [n, K], or (G, c [n]), n the experts it sees; or stacked G [U, E, K], or
            (G, c [U, E]); or None: no gates at all, and then `static` says how many units there are.
        wiring: slots, selectors and activation where they differ from the default.
        sees: one tuple of experts a unit, in the order of the rows of its G; default: all, in order.
        static: the static weights v: [U, E]; or one item a unit: None, or (experts, weights), the weights a tensor
            [len(experts)] or floats.
        backend: as in `fusion_network`.

    Returns: [B, U, H], of x's dtype.
    Raises: TypeError, ValueError for tensors that do not fit together; RuntimeError for a backend that cannot run.
    Source: MMoE eq. 6-8, PLE eq. 2-5, AdaTT eq. 2-10.
    """
    return _run(x, weights, biases, gates, wiring, sees, static, backend)[0]


def mixing_weights(x: Tensor, weights, biases, gates, wiring: LevelWiring = LevelWiring(), sees=None, static=None, backend: str = "auto") -> Tensor:
    """Return the mixing weights w = p + v of the level that `fusion_level` would run, [B, U, E], differentiable.

    Args, Raises, Source: see `fusion_level`. The experts are run too, because a gate may read them.
    """
    return _run(x, weights, biases, gates, wiring, sees, static, backend)[1][0]


def _run(x, weights, biases, gates, wiring, sees, static, backend):
    if not isinstance(x, Tensor) or x.dim() not in (2, 3):
        raise TypeError(f"x: expected a tensor [B, D] or [B, S, D], got {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}")
    slots = 1 if x.dim() == 2 else x.shape[1]
    layers = _layers(weights, "weights", 2)
    offsets = None if biases is None else _layers(biases, "biases", 1)
    experts = len(layers[0])
    for j, layer in enumerate(layers):
        if len(layer) != experts or (offsets is not None and (len(offsets) != len(layers) or len(offsets[j]) != experts)):
            raise ValueError(f"weights and biases, layer {j}: expected {experts} experts in each of {len(layers)} layers")
    maps, counts = _gates(gates)
    fixed, learned, shapes = _static(static, experts)
    units = max(len(maps), len(fixed))
    if not units or (maps and fixed and len(maps) != len(fixed)):
        raise ValueError(f"gates and static: expected one item a unit in either, got {len(maps)} and {len(fixed)}")
    seen = _sees(sees, counts, experts)
    widths = tuple(tuple(w.shape[0] for w in column) for column in zip(*layers, strict=True))
    key = (slots, x.shape[-1], widths, biases is not None, wiring, seen, counts, fixed, shapes, units)
    params: list[Tensor] = []
    for e in range(experts):
        for j, layer in enumerate(layers):
            params += [layer[e]] + ([offsets[j][e]] if offsets is not None else [])
    params += [tensor for pair in maps if pair is not None for tensor in pair if tensor is not None]
    return fusion_network(x, params + learned, _level_table(*key), backend, return_mixing_weights=True)


def _matrices(value, what: str, dim: int) -> list[Tensor]:
    """The tensors of one layer, one an expert: a stacked tensor's slices, or the items themselves."""
    if isinstance(value, Tensor) and value.dim() == dim + 1:
        return list(value.unbind(0))
    if isinstance(value, Sequence) and value and all(isinstance(item, Tensor) and item.dim() == dim for item in value):
        return list(value)
    raise ValueError(f"{what}: expected a stacked tensor of {dim + 1} dimensions or a sequence of tensors of {dim}, got {type(value).__name__}")


def _layers(value, what: str, dim: int) -> list[list[Tensor]]:
    if isinstance(value, Tensor) or (isinstance(value, Sequence) and value and isinstance(value[0], Tensor) and value[0].dim() == dim):
        return [_matrices(value, what, dim)]
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"{what}: expected at least one layer, got {value!r}")
    return [_matrices(layer, f"{what}, layer {j}", dim) for j, layer in enumerate(value)]


def _gates(gates) -> tuple[list[tuple[Tensor, Tensor | None] | None], tuple[tuple[int, bool] | None, ...]]:
    """(G, c or None) of each unit that has a gate, and (experts seen, has a bias)."""
    if gates is None:
        return [], ()
    if isinstance(gates, Tensor):
        gates = [(g, None) for g in _matrices(gates, "gates", 2)]
    elif len(gates) == 2 and all(isinstance(g, Tensor) for g in gates) and (gates[0].dim(), gates[1].dim()) == (3, 2):
        gates = list(zip(gates[0].unbind(0), gates[1].unbind(0), strict=True))
    maps = []
    for u, gate in enumerate(gates):
        pair = (gate, None) if isinstance(gate, Tensor) else gate
        if pair is not None and (len(pair) != 2 or not isinstance(pair[0], Tensor) or pair[0].dim() != 2):
            raise ValueError(f"gates, unit {u}: expected None, a matrix or a pair of matrix and bias, got {gate!r}")
        maps.append(None if pair is None else tuple(pair))
    return maps, tuple(None if pair is None else (pair[0].shape[0], pair[1] is not None) for pair in maps)


def _sees(sees, counts, experts: int) -> tuple[tuple[int, ...], ...]:
    if sees is not None and len(sees) != len(counts):
        raise ValueError(f"sees: expected one tuple a unit with {len(counts)} units, got {len(sees)}")
    seen = tuple(tuple(range(experts)) if sees is None or sees[u] is None else tuple(sees[u]) for u in range(len(counts)))
    for u, count in enumerate(counts):
        if count is not None and count[0] != len(seen[u]):
            raise ValueError(f"gates, unit {u}: expected {len(seen[u])} rows, one for each expert it sees, got {count[0]}")
    return seen


def _static(static, experts: int):
    """Per unit None or (experts, float values or None), the learned tensors, and their shapes."""
    if static is None:
        return (), [], ()
    if isinstance(static, Tensor):
        if static.dim() != 2 or static.shape[1] != experts:
            raise ValueError(f"static: expected [U, E] with E = {experts}, got {list(static.shape)}")
        return tuple((tuple(range(experts)), None, 0, u * experts) for u in range(static.shape[0])), [static], (tuple(static.shape),)
    fixed, learned = [], []
    for u, item in enumerate(static):
        if item is None:
            fixed.append(None)
            continue
        if not isinstance(item, Sequence) or len(item) != 2:
            raise ValueError(f"static, unit {u}: expected None or a pair of experts and weights, got {item!r}")
        owned, values = tuple(item[0]), item[1]
        if len(values) != len(owned):
            raise ValueError(f"static, unit {u}: expected {len(owned)} weights, got {len(values)}")
        if isinstance(values, Tensor):
            fixed.append((owned, None, len(learned), 0))
            learned.append(values)
        else:
            fixed.append((owned, tuple(float(v) for v in values), None, 0))
    return tuple(fixed), learned, tuple(tuple(t.shape) for t in learned)


@functools.lru_cache(maxsize=1024)
def _level_table(slots, width, widths, has_bias, wiring, seen, counts, fixed, shapes, units) -> Table:
    experts = len(widths)
    read = wiring.slots
    if read is None:
        if experts % slots:
            raise ValueError(f"wiring.slots: expected the slot of each expert, because {experts} experts cannot be dealt out to {slots} slots evenly")
        read = tuple(e * slots // experts for e in range(experts))
    if len(read) != experts or (wiring.selectors is not None and len(wiring.selectors) != units):
        raise ValueError(f"wiring: expected {experts} slots and {units} selectors, got {len(read)} and {len(wiring.selectors or ())}")
    act = activation(wiring.activation)

    def unit(u: int) -> Unit:
        gate = None
        if u < len(counts) and counts[u] is not None:
            selector = wiring.selectors[u] if wiring.selectors else Selector("slot", u if slots > 1 else 0)
            gate = Gate(selector, seen[u], bias=counts[u][1])
        return Unit(gate, Static(*fixed[u]) if u < len(fixed) and fixed[u] is not None else None)

    level = Level(
        tuple(Expert(slot, tuple(Layer(w, act, has_bias) for w in column)) for slot, column in zip(read, widths, strict=True)),
        tuple(unit(u) for u in range(units)),
    )
    return Table(slots, width, (level,), statics=shapes)
