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

from fusedmoe.activation import Activation, activation
from fusedmoe.level_arguments import (
    StaticKey,
    check_selector,
    experts_of,
    gates_of,
    indices_of,
    items_of,
    name_of,
    sees_of,
    static_of,
)
from fusedmoe.op import fusion_network
from fusedmoe.parts import Expert, Gate, Input, Level, Source, Static, Unit, from_slots, mlp
from fusedmoe.table import Table
from fusedmoe.tracing import constant

__all__ = ["LevelShape", "fusion_level", "fusion_network", "mixing_weights"]

# The forms of `fusion_level`'s arguments; its docstring gives the shapes.
Layers = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]
Gates = Tensor | Sequence[Tensor | tuple[Tensor, Tensor | None] | None]
Statics = Tensor | Sequence[tuple[Sequence[int], Tensor | Sequence[float]] | None]


@dataclass(frozen=True)
class LevelShape:
    """The structure of a level that its tensors' shapes do not determine.

    Args:
        slots: the slot that each expert reads. Default: the first E / S experts read slot 0, the
            next slot 1 and so on, as in AdaTT; E must be a multiple of S.
        selectors: the vector that the gate of each unit reads, a "slot" or an "expert", whole.
            Default (`None`, for one unit or for all): slot 0 if x has one slot, otherwise slot u.
            Units without a gate take None only.
        activation: after every layer of every expert.

    Raises: TypeError, ValueError for anything else. Lists become tuples.
    """

    slots: tuple[int, ...] | None = None
    selectors: tuple[Source | None, ...] | None = None
    activation: str | Activation = "relu"

    def __post_init__(self) -> None:
        if self.slots is not None:
            object.__setattr__(self, "slots", indices_of(self.slots, "level.slots"))
        if self.selectors is not None:
            object.__setattr__(
                self, "selectors", tuple(items_of(self.selectors, "level.selectors", "a tuple of Source"))
            )
            for u, selector in enumerate(self.selectors):
                check_selector(selector, f"level.selectors, unit {u}")
        if not isinstance(self.activation, (str, Activation)):
            raise TypeError(f"level.activation: expected a name or an Activation, got {name_of(self.activation)}")


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
    """Run one level: out[u] = sum_e (softmax_e(G[u] q[u] + c[u]) + v[u,e]) * MLP_e(x[from_slots(e)]).

    A list may also be a tuple or an `nn.ParameterList`.

    Args:
        x: [B, S, D], or [B, D] for one slot.
        weights: of the experts: stacked [E, H, D], or a list of E matrices [H_e, D]. For deeper
            experts a list of either, one item per layer.
        biases: in either form, [E, H] or E vectors per layer; or None.
        gates: one item per unit: None (no gate), G [n, K] or (G, c [n]); n experts seen, selector
            width K. Or stacked: G [U, n, K] or (G, c [U, n]). Or None for no
            gates.
        level: slots, selectors and activation that differ from the default.
        sees: one tuple of experts per unit, in the order of the rows of its G. None, for one unit
            or for all, is all experts in order. Units without a gate take None only.
        static: the static weights v: [U, E]; or one item per unit: None, or a pair of its experts
            and their weights, a tensor or floats.
        backend: as in `fusion_network`.

    Returns: [B, U, H], of x's dtype.
    Raises: TypeError, ValueError for arguments that do not fit together; messages use the names of
        `Table.parameters`. RuntimeError for a backend that cannot run.
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

    It has the same arguments and errors as `fusion_level`. It runs the experts too, because a gate
    may read them.
    """
    params, table = _read(x, weights, biases, gates, level, sees, static)
    _, (mixing,) = fusion_network(x, params, table, backend, return_mixing_weights=True)
    return mixing


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
    statics: tuple[StaticKey | None, ...]
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
        raise TypeError(f"x: expected a tensor [B, D] or [B, S, D], got {name_of(x)}")
    if x.dim() not in (2, 3) or 0 in x.shape[1:]:
        raise ValueError(f"x: expected [B, D] or [B, S, D], S and D at least 1, got {name_of(x)}")
    if not isinstance(level, LevelShape):
        raise TypeError(f"level: expected a LevelShape, got {name_of(level)}")
    widths, params = experts_of(weights, biases)
    maps = gates_of(gates)
    statics, learned = static_of(static, len(widths))
    if not maps and not statics:
        raise ValueError(f"gates, static: expected at least one unit, got {name_of(gates)} and {name_of(static)}")
    if gates is not None and static is not None and len(maps) != len(statics):
        raise ValueError(f"static: expected {len(maps)} units, as gates has, got {len(statics)}")
    maps = maps or [None] * len(statics)
    seen = sees_of(sees, maps, len(widths))
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
                f"level.slots: expected the slot of each expert, because {count} experts cannot be "
                f"divided evenly among {key.slots} slots, got None"
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
        Expert(from_slots(index), mlp(widths, kind, key.bias)) for index, widths in zip(reads, key.experts, strict=True)
    )
    units = tuple(Unit(_build_gate(key, u, selectors[u]), _build_static(key.statics[u])) for u in range(len(key.gates)))
    return Table((Input(key.slots, key.width),), (Level(experts, units),), shared=key.static_shapes)


def _build_gate(key: _Key, u: int, selector: tuple[str, int] | None) -> Gate | None:
    """The gate of unit u."""
    fields = key.gates[u]
    if fields is None:
        if selector is not None:
            raise ValueError(
                f"level.selectors, unit {u}: expected None, because the unit has no gate, got {Source(*selector)}"
            )
        return None
    if selector is None and 1 < key.slots <= u:
        raise ValueError(
            f"level.selectors, unit {u}: expected a Source, because x has no slot {u} but {key.slots} slots, got None"
        )
    sees, bias = fields
    source = Source(*(selector or ("slot", u if key.slots > 1 else 0)))
    return Gate(((source,),), sees, bias=bias)


def _build_static(fields: tuple | None) -> Static | None:
    """The static weights of a unit."""
    if fields is None:
        return None
    experts, values, tensor, offset = fields
    return Static(experts, None if values is None else tuple(map(float.fromhex, values)), tensor, offset)
