"""The arguments of `functional.fusion_level`, read in all their forms, and checked.

What does not fit raises TypeError or ValueError, which name the argument, what was expected and
what came.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch.nn import ParameterList

from fusedmoe.parts import Source

# What may stand where the docstrings say list.
LISTS = (list, tuple, range, ParameterList)
# What the gates of one level may read.
SELECTORS = ("slot", "expert")
# The fields of a `Static`: experts, values, tensor, offset.
StaticKey = tuple[tuple[int, ...], tuple[str, ...] | None, int | None, int]


def name_of(value: object) -> str:
    """What a message says it got."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return repr(value)
    return type(value).__name__


def items_of(value: object, where: str, form: str) -> list:
    """The items of a list; raise TypeError, with the form it should have, for anything else."""
    if not isinstance(value, LISTS):
        raise TypeError(f"{where}: expected {form}, got {name_of(value)}")
    return list(value)


def indices_of(value: object, where: str) -> tuple[int, ...]:
    """A tuple of integers. Not left to `Table` as their range is: True and 1 make the same key."""
    items = items_of(value, where, "a tuple of integers")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int):
            raise TypeError(f"{where}: expected integers, got {name_of(item)} in it")
    return tuple(operator.index(item) for item in items)


def check_selector(value: object, where: str) -> None:
    """Raise TypeError unless `value` is None or a whole Source; `Table` checks its index."""
    if value is None:
        return
    if not isinstance(value, Source):
        raise TypeError(f"{where}: expected a Source or None, got {value!r}")
    if value.kind not in SELECTORS:
        raise ValueError(f"{where}: expected one of {', '.join(SELECTORS)}, got {value.kind!r}")
    if isinstance(value.index, bool) or not isinstance(value.index, int):
        raise TypeError(f"{where}: expected an integer as index, got {value.index!r}")
    if value != Source(value.kind, value.index):
        raise ValueError(f"{where}: expected a whole {value.kind} (`fusion_network` takes columns), got {value}")


def experts_of(weights: Any, biases: Any) -> tuple[tuple[tuple[int, ...], ...], list[Tensor]]:
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
    items = items_of(value, name, f"{form}, or a list of either, one a layer")
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
                f"{where}: expected {stacked}, E at least 1, or a list of E tensors {single}, got {name_of(value)}"
            )
        return list(value.unbind(0))
    items = items_of(value, where, f"{stacked} or a list of E tensors {single}")
    if not items:
        raise ValueError(f"{where}: expected at least one expert, got an empty list")
    for e, item in enumerate(items):
        _check_tensor(item, dim, f"{where}, expert {e}", single)
    return items


def _check_tensor(value: object, dim: int, where: str, form: str) -> None:
    """Raise TypeError unless `value` is a tensor, ValueError unless it has `dim` axes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected a tensor {form}, got {name_of(value)}")
    if value.dim() != dim:
        raise ValueError(f"{where}: expected {form}, got {name_of(value)}")


def gates_of(gates: Any) -> list[tuple[Tensor, Tensor | None] | None]:
    """(G, c or None) of each unit, None for a unit without a gate; empty if there are no gates."""
    if gates is None:
        return []
    pair = (gates, None) if isinstance(gates, Tensor) else gates
    if isinstance(gates, Tensor) or (
        isinstance(pair, LISTS) and len(pair) == 2 and isinstance(pair[0], Tensor) and pair[0].dim() == 3
    ):
        maps, biases = pair
        _check_tensor(maps, 3, "gates", "stacked [U, n, K], or one item a unit")
        if biases is None:
            return [(g, None) for g in maps.unbind(0)]
        _check_tensor(biases, 2, "gates, bias", "[U, n]")
        if len(biases) != len(maps):
            raise ValueError(f"gates, bias: expected {len(maps)} units, as G has, got {len(biases)}")
        return list(zip(maps.unbind(0), biases.unbind(0), strict=True))
    result = []
    for u, gate in enumerate(
        items_of(gates, "gates", "None, stacked G [U, n, K], (G, c [U, n]), or a list of one item a unit")
    ):
        pair = (gate, None) if isinstance(gate, Tensor) else gate
        if pair is not None:
            if not isinstance(pair, LISTS) or len(pair) != 2:
                raise TypeError(f"gates, unit {u}: expected None, G [n, K] or (G, c [n]), got {name_of(gate)}")
            _check_tensor(pair[0], 2, f"gates, unit {u}", "[n, K]")
            if pair[1] is not None:
                _check_tensor(pair[1], 1, f"gates, unit {u}, bias", "[n]")
        result.append(None if pair is None else tuple(pair))
    return result


def sees_of(sees: Any, maps: list[tuple[Tensor, Tensor | None] | None], experts: int) -> list[tuple[int, ...]]:
    """The experts that each unit's gate sees; () for a unit without a gate."""
    items = [None] * len(maps) if sees is None else items_of(sees, "sees", "one tuple of experts a unit")
    if len(items) != len(maps):
        raise ValueError(f"sees: expected {len(maps)} items, one a unit, got {len(items)}")
    result: list[tuple[int, ...]] = []
    for u, (item, pair) in enumerate(zip(items, maps, strict=True)):
        if pair is None:
            if item is not None:
                raise ValueError(f"sees, unit {u}: expected None, because the unit has no gate, got {item!r}")
            result.append(())
            continue
        result.append(tuple(range(experts)) if item is None else indices_of(item, f"sees, unit {u}"))
        if len(pair[0]) != len(result[u]):
            raise ValueError(
                f"gates, unit {u}: expected {len(result[u])} rows, one for each expert it sees, got {len(pair[0])}"
            )
    return result


def static_of(static: Any, experts: int) -> tuple[list[StaticKey | None], list[Tensor]]:
    """The static weights of each unit, None for one without (empty if there are none), and the learned
    tensors whose elements they are."""
    if static is None:
        return [], []
    if isinstance(static, Tensor):
        if static.dim() != 2 or static.shape[1] != experts:
            raise ValueError(f"static: expected [U, {experts}], one column an expert, got {name_of(static)}")
        return [(tuple(range(experts)), None, 0, u * experts) for u in range(len(static))], [static]
    result: list[StaticKey | None] = []
    learned: list[Tensor] = []
    for u, item in enumerate(items_of(static, "static", "None, [U, E], or a list of one item a unit")):
        if item is None:
            result.append(None)
            continue
        if not isinstance(item, LISTS) or len(item) != 2:
            raise TypeError(f"static, unit {u}: expected None or a pair (experts, weights), got {name_of(item)}")
        owned, values = indices_of(item[0], f"static, unit {u}, experts"), item[1]
        if isinstance(values, Tensor):
            _check_tensor(values, 1, f"static, unit {u}", f"[{len(owned)}]")
            result.append((owned, None, len(learned), 0))
            learned.append(values)
        else:
            values = items_of(values, f"static, unit {u}", "a tensor or a list of floats")
            # float() would take a tensor too, and its gradient would be lost.
            if not all(isinstance(v, (int, float)) for v in values):
                raise TypeError(
                    f"static, unit {u}: expected one tensor or floats, got {', '.join(map(name_of, values))}"
                )
            result.append((owned, tuple(float(v).hex() for v in values), None, 0))
        if len(values) != len(owned):
            raise ValueError(
                f"static, unit {u}: expected {len(owned)} weights, one for each of its experts, got {len(values)}"
            )
    return result, learned
