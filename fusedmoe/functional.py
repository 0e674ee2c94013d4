"""The operator as functions: a whole network by its table, or one level by its tensors.

`fusion_level` and `mixing_weights` read from their arguments what decides the level's table
(`_Key`), look the table up, and hand the tensors to the operator.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import ParameterList

from fusedmoe.activation import Activation, activation
from fusedmoe.op import fusion_network
from fusedmoe.table import SELECTORS, Expert, Gate, Layer, Level, Selector, Static, Table, Unit
from fusedmoe.tracing import constant

__all__ = ["LevelShape", "fusion_level", "fusion_network", "mixing_weights"]

# The forms of `fusion_level`'s arguments; its docstring gives the shapes.
Layers = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]
Gates = Tensor | Sequence[Tensor | tuple[Tensor, Tensor | None] | None]
Statics = Tensor | Sequence[tuple[Sequence[int], Tensor | Sequence[float]] | None]
# What may stand where the docstrings say list.
LISTS = (list, tuple, range, ParameterList)


@dataclass(frozen=True)
class LevelShape:
    """What the tensors of a level do not tell.

    Args:
        slots: the slot that each expert reads. Default: the first E / S experts read slot 0, the
            next slot 1 and so on, as in AdaTT; E must be a multiple of S.
        selectors: the vector that the gate of each unit reads. None, for one unit or for all, is
            slot 0 if x has one slot, otherwise slot u. Units without a gate take None only.
        activation: after every layer of every expert.

    Raises: TypeError, ValueError for anything else. Lists become tuples.
    """

    slots: tuple[int, ...] | None = None
    selectors: tuple[Selector | None, ...] | None = None
    activation: str | Activation = "relu"

    def __post_init__(self) -> None:
        if self.slots is not None:
            object.__setattr__(self, "slots", _indices(self.slots, "level.slots"))
        if self.selectors is not None:
            object.__setattr__(
                self, "selectors", tuple(_items(self.selectors, "level.selectors", "a tuple of Selector"))
            )
            for u, selector in enumerate(self.selectors):
                _check_selector(selector, f"level.selectors, unit {u}")
        if not isinstance(self.activation, (str, Activation)):
            raise TypeError(f"level.activation: expected a name or an Activation, got {_name(self.activation)}")


DEFAULT = LevelShape()


def fusion_level(
    x: Tensor,
    weights: Layers,
    biases: Layers | None,
    gates: Gates | None,
    level: LevelShape = DEFAULT,
    sees: Sequence[Sequence[int] | None] | None = None,
    static: Statics | None = None,
    backend: str = "auto",
) -> Tensor:
    """Run one level: out[u] = sum_e (softmax_e(G[u] q[u] + c[u]) + v[u,e]) * MLP_e(x[slot(e)]).

    A list may also be a tuple or an `nn.ParameterList`.

    Args:
        x: [B, S, D], or [B, D] for one slot.
        weights: of the experts: stacked [E, H, D], or a list of E matrices [H_e, D]. For deeper
            experts a list of either, one item per layer.
        biases: in either form, [E, H] or E vectors per layer; or None.
        gates: one item per unit: None (no gate), G [n, K] or (G, c [n]), for n experts that it sees
            and a selector of width K. Or stacked: G [U, n, K] or (G, c [U, n]). Or None for no
            gates.
        level: slots, selectors and activation that differ from the default.
        sees: one tuple of experts per unit, in the order of the rows of its G. None, for one unit
            or for all, is all experts in order. Units without a gate take None only.
        static: the static weights v: [U, E]; or one item per unit: None, or a pair of its experts
            and their weights, a tensor or floats.
        backend: as in `fusion_network`.

    Returns: [B, U, H], of x's dtype.
    Raises: TypeError, ValueError for arguments that do not fit together; they name a wrong tensor
        as `Table.parameters` does. RuntimeError for a backend that cannot run.
    Source: MMoE eq. 6-8, PLE eq. 2-5, AdaTT eq. 2-10.
    """
    params, table = _read(x, weights, biases, gates, level, sees, static)
    return fusion_network(x, params, table, backend)


def mixing_weights(
    x: Tensor,
    weights: Layers,
    biases: Layers | None,
    gates: Gates | None,
    level: LevelShape = DEFAULT,
    sees: Sequence[Sequence[int] | None] | None = None,
    static: Statics | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the mixing weights w = p + v [B, U, E] that `fusion_level` would use, differentiable.

    It takes and raises the same. It runs the experts too, because a gate may read them.
    """
    params, table = _read(x, weights, biases, gates, level, sees, static)
    _, (mixing,) = fusion_network(x, params, table, backend, return_mixing_weights=True)
    return mixing


# The fields of a `Static`: experts, values, tensor, offset.
_StaticKey = tuple[tuple[int, ...], tuple[str, ...] | None, int | None, int]


class _Key(NamedTuple):
    """All that decides a level's table, in integers and text: constants to torch.compile.

    Floats are hexadecimal text, which is exact. `operator.index` makes dynamic sizes constant.
    """

    slots: int
    width: int
    # Of each expert, the widths of its layers.
    experts: tuple[tuple[int, ...], ...]
    bias: bool
    # Of each unit, the experts its gate sees and whether it has a bias; None: no gate.
    gates: tuple[tuple[tuple[int, ...], bool] | None, ...]
    # Of each unit, the fields of its `Static`; None: no static weights.
    statics: tuple[_StaticKey | None, ...]
    static_shapes: tuple[tuple[int, ...], ...]
    # The slot of each expert, and the kind and index of each unit's selector; None: the default.
    reads: tuple[int, ...] | None
    selectors: tuple[tuple[str, int] | None, ...] | None
    # Its name, and its parameter where it came as an `Activation`.
    activation: tuple[str, str | None]


def _read(
    x: Any, weights: Any, biases: Any, gates: Any, level: Any, sees: Any, static: Any
) -> tuple[list[Tensor], Table]:
    """The operator's parameters, in its order, and the level's table."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor [B, D] or [B, S, D], got {_name(x)}")
    if x.dim() not in (2, 3) or 0 in x.shape[1:]:
        raise ValueError(f"x: expected [B, D] or [B, S, D], S and D at least 1, got {_name(x)}")
    if not isinstance(level, LevelShape):
        raise TypeError(f"level: expected a LevelShape, got {_name(level)}")
    widths, params = _experts(weights, biases)
    maps = _gates(gates)
    statics, learned = _static(static, len(widths))
    if not maps and not statics:
        raise ValueError(f"gates, static: expected at least one unit, got {_name(gates)} and {_name(static)}")
    if gates is not None and static is not None and len(maps) != len(statics):
        raise ValueError(f"static: expected {len(maps)} units, as gates has, got {len(statics)}")
    maps = maps or [None] * len(statics)
    seen = _sees(sees, maps, len(widths))
    kind = level.activation
    key = _Key(
        slots=operator.index(x.shape[1]) if x.dim() == 3 else 1,
        width=operator.index(x.shape[-1]),
        experts=widths,
        bias=biases is not None,
        gates=tuple(
            None if pair is None else (experts, pair[1] is not None) for pair, experts in zip(maps, seen, strict=True)
        ),
        statics=tuple(statics) or (None,) * len(maps),
        static_shapes=tuple(tuple(operator.index(size) for size in v.shape) for v in learned),
        reads=level.slots,
        selectors=None
        if level.selectors is None
        else tuple(None if s is None else (s.kind, operator.index(s.index)) for s in level.selectors),
        activation=(kind, None) if isinstance(kind, str) else (kind.name, kind.parameter.hex()),
    )
    params += [tensor for pair in maps if pair is not None for tensor in pair if tensor is not None]
    return params + learned, _table(tuple(key))


def _name(value: object) -> str:
    """What a message says it got."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return repr(value)
    return type(value).__name__


def _items(value: object, where: str, form: str) -> list:
    """The items of a list; raise TypeError, with the form it should have, for anything else."""
    if not isinstance(value, LISTS):
        raise TypeError(f"{where}: expected {form}, got {_name(value)}")
    return list(value)


def _indices(value: object, where: str) -> tuple[int, ...]:
    """A tuple of integers. Not left to `Table` as their range is: True and 1 make the same key."""
    items = _items(value, where, "a tuple of integers")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int):
            raise TypeError(f"{where}: expected integers, got {_name(item)} in it")
    return tuple(operator.index(item) for item in items)


def _check_selector(value: object, where: str) -> None:
    """Raise TypeError unless `value` is None or a Selector; `Table` checks its index."""
    if value is None:
        return
    if not isinstance(value, Selector):
        raise TypeError(f"{where}: expected a Selector or None, got {value!r}")
    if value.kind not in SELECTORS:
        raise ValueError(f"{where}: expected one of {', '.join(SELECTORS)}, got {value.kind!r}")
    if isinstance(value.index, bool) or not isinstance(value.index, int):
        raise TypeError(f"{where}: expected an integer as index, got {value.index!r}")


def _experts(weights: Any, biases: Any) -> tuple[tuple[tuple[int, ...], ...], list[Tensor]]:
    """The widths of each expert's layers, and its parameters in the operator's order."""
    layers = _layers(weights, "weights", "[E, H, D]", "[H, D]")
    offsets = [] if biases is None else _layers(biases, "biases", "[E, H]", "[H]")
    if biases is not None and len(offsets) != len(layers):
        raise ValueError(f"biases: expected {len(layers)} layers, as weights has, got {len(offsets)}")
    count = len(layers[0])
    for name, stack in (("weights", layers), ("biases", offsets)):
        for j, layer in enumerate(stack):
            if len(layer) != count:
                raise ValueError(
                    f"{name}, layer {j}: expected {count} experts, as layer 0 of weights has, got {len(layer)}"
                )
    widths = tuple(tuple(operator.index(layer[e].shape[0]) for layer in layers) for e in range(count))
    stacks = list(zip(layers, offsets, strict=True)) if offsets else [(layer,) for layer in layers]
    return widths, [tensors[e] for e in range(count) for stack in stacks for tensors in stack]


def _layers(value: Any, name: str, stacked: str, single: str) -> list[list[Tensor]]:
    """result[j][e]: the tensor of layer j of expert e, from any form that `fusion_level` takes."""
    dim = single.count(",") + 1
    form = f"{stacked} or a list of E tensors {single}"
    if isinstance(value, Tensor):
        return [_layer(value, name, stacked, single)]
    items = _items(value, name, f"{form}, or a list of either, one a layer")
    if not items:
        raise ValueError(f"{name}: expected {form}, or a list of either, one a layer, got an empty list")
    if any(isinstance(item, Tensor) and item.dim() == dim for item in items):
        return [_layer(items, name, stacked, single)]
    return [_layer(item, f"{name}, layer {j}", stacked, single) for j, item in enumerate(items)]


def _layer(value: Any, where: str, stacked: str, single: str) -> list[Tensor]:
    """result[e]: the tensor of expert e, from a stacked tensor or a list."""
    dim = single.count(",") + 1
    if isinstance(value, Tensor):
        if value.dim() != dim + 1 or not len(value):
            raise ValueError(
                f"{where}: expected {stacked}, E at least 1, or a list of E tensors {single}, got {_name(value)}"
            )
        return list(value.unbind(0))
    items = _items(value, where, f"{stacked} or a list of E tensors {single}")
    if not items:
        raise ValueError(f"{where}: expected at least one expert, got an empty list")
    for e, item in enumerate(items):
        _tensor(item, dim, f"{where}, expert {e}", single)
    return items


def _tensor(value: object, dim: int, where: str, form: str) -> None:
    """Raise TypeError unless `value` is a tensor, ValueError unless it has `dim` axes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected a tensor {form}, got {_name(value)}")
    if value.dim() != dim:
        raise ValueError(f"{where}: expected {form}, got {_name(value)}")


def _gates(gates: Any) -> list[tuple[Tensor, Tensor | None] | None]:
    """(G, c or None) of each unit, None for a unit without a gate; empty if there are no gates."""
    if gates is None:
        return []
    pair = (gates, None) if isinstance(gates, Tensor) else gates
    if isinstance(gates, Tensor) or (
        isinstance(pair, LISTS) and len(pair) == 2 and isinstance(pair[0], Tensor) and pair[0].dim() == 3
    ):
        maps, biases = pair
        _tensor(maps, 3, "gates", "stacked [U, n, K], or one item a unit")
        if biases is None:
            return [(g, None) for g in maps.unbind(0)]
        _tensor(biases, 2, "gates, bias", "[U, n]")
        if len(biases) != len(maps):
            raise ValueError(f"gates, bias: expected {len(maps)} units, as G has, got {len(biases)}")
        return list(zip(maps.unbind(0), biases.unbind(0), strict=True))
    result = []
    for u, gate in enumerate(
        _items(gates, "gates", "None, stacked G [U, n, K], (G, c [U, n]), or a list of one item a unit")
    ):
        pair = (gate, None) if isinstance(gate, Tensor) else gate
        if pair is not None:
            if not isinstance(pair, LISTS) or len(pair) != 2:
                raise TypeError(f"gates, unit {u}: expected None, G [n, K] or (G, c [n]), got {_name(gate)}")
            _tensor(pair[0], 2, f"gates, unit {u}", "[n, K]")
            if pair[1] is not None:
                _tensor(pair[1], 1, f"gates, unit {u}, bias", "[n]")
        result.append(None if pair is None else tuple(pair))
    return result


def _sees(sees: Any, maps: list[tuple[Tensor, Tensor | None] | None], experts: int) -> list[tuple[int, ...]]:
    """The experts that each unit's gate sees; () for a unit without a gate."""
    items = [None] * len(maps) if sees is None else _items(sees, "sees", "one tuple of experts a unit")
    if len(items) != len(maps):
        raise ValueError(f"sees: expected {len(maps)} items, one a unit, got {len(items)}")
    result: list[tuple[int, ...]] = []
    for u, (item, pair) in enumerate(zip(items, maps, strict=True)):
        if pair is None:
            if item is not None:
                raise ValueError(f"sees, unit {u}: expected None, because the unit has no gate, got {item!r}")
            result.append(())
            continue
        result.append(tuple(range(experts)) if item is None else _indices(item, f"sees, unit {u}"))
        if len(pair[0]) != len(result[u]):
            raise ValueError(
                f"gates, unit {u}: expected {len(result[u])} rows, one for each expert it sees, got {len(pair[0])}"
            )
    return result


def _static(static: Any, experts: int) -> tuple[list[_StaticKey | None], list[Tensor]]:
    """`_Key.statics` (empty if there are none), and the learned tensors whose elements they are."""
    if static is None:
        return [], []
    if isinstance(static, Tensor):
        if static.dim() != 2 or static.shape[1] != experts:
            raise ValueError(f"static: expected [U, {experts}], one column an expert, got {_name(static)}")
        return [(tuple(range(experts)), None, 0, u * experts) for u in range(len(static))], [static]
    result: list[_StaticKey | None] = []
    learned: list[Tensor] = []
    for u, item in enumerate(_items(static, "static", "None, [U, E], or a list of one item a unit")):
        if item is None:
            result.append(None)
            continue
        if not isinstance(item, LISTS) or len(item) != 2:
            raise TypeError(f"static, unit {u}: expected None or a pair (experts, weights), got {_name(item)}")
        owned, values = _indices(item[0], f"static, unit {u}, experts"), item[1]
        if isinstance(values, Tensor):
            _tensor(values, 1, f"static, unit {u}", f"[{len(owned)}]")
            result.append((owned, None, len(learned), 0))
            learned.append(values)
        else:
            values = _items(values, f"static, unit {u}", "a tensor or a list of floats")
            # float() would take a tensor too, and its gradient would be lost.
            if not all(isinstance(v, (int, float)) for v in values):
                raise TypeError(f"static, unit {u}: expected one tensor or floats, got {', '.join(map(_name, values))}")
            result.append((owned, tuple(float(v).hex() for v in values), None, 0))
        if len(values) != len(owned):
            raise ValueError(
                f"static, unit {u}: expected {len(owned)} weights, one for each of its experts, got {len(values)}"
            )
    return result, learned


@constant
def _table(key: tuple) -> Table:
    """Return the table of a level, given the fields of its `_Key`."""
    return _build(_Key(*key))


@functools.lru_cache(maxsize=1024)
def _build(key: _Key) -> Table:
    """Build the table of a level, with the defaults of its `LevelShape` filled in."""
    count = len(key.experts)
    reads = key.reads
    if reads is None:
        if count % key.slots:
            raise ValueError(
                f"level.slots: expected the slot of each expert, because {count} experts do not deal out "
                f"evenly to {key.slots} slots, got None"
            )
        reads = tuple(e * key.slots // count for e in range(count))
    if len(reads) != count:
        raise ValueError(f"level.slots: expected {count} slots, one an expert, got {len(reads)}")
    selectors = (None,) * len(key.gates) if key.selectors is None else key.selectors
    if len(selectors) != len(key.gates):
        raise ValueError(f"level.selectors: expected {len(key.gates)} selectors, one a unit, got {len(selectors)}")
    name, parameter = key.activation
    kind = activation(name) if parameter is None else Activation(name, float.fromhex(parameter))
    experts = tuple(
        Expert(slot, tuple(Layer(width, kind, key.bias) for width in widths))
        for slot, widths in zip(reads, key.experts, strict=True)
    )
    units = tuple(Unit(_build_gate(key, u, selectors[u]), _build_static(key.statics[u])) for u in range(len(key.gates)))
    table = Table(key.slots, key.width, (Level(experts, units),), statics=key.static_shapes)
    # Dynamo cannot work out a cached property of a constant, only read it: these two work out all
    # that the backends read.
    _ = table.parameters, table.output
    return table


def _build_gate(key: _Key, u: int, selector: tuple[str, int] | None) -> Gate | None:
    """The gate of unit u."""
    fields = key.gates[u]
    if fields is None:
        if selector is not None:
            raise ValueError(
                f"level.selectors, unit {u}: expected None, because the unit has no gate, got {Selector(*selector)}"
            )
        return None
    if selector is None and 1 < key.slots <= u:
        raise ValueError(
            f"level.selectors, unit {u}: expected a Selector, because x has no slot {u} but {key.slots} slots, got None"
        )
    sees, bias = fields
    return Gate(Selector(*(selector or ("slot", u if key.slots > 1 else 0))), sees, bias=bias)


def _build_static(fields: tuple | None) -> Static | None:
    """The static weights of a unit."""
    if fields is None:
        return None
    experts, values, tensor, offset = fields
    return Static(experts, None if values is None else tuple(map(float.fromhex, values)), tensor, offset)
