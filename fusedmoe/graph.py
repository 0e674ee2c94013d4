"""A table resolved: what every backend takes.

Vectors are named by where they stand, ops are folded into stages, every parameter has its number in
the operator's list, and what some output depends on is known. `resolve.py` makes a graph of a
table, `codec.py` writes it, and csrc/table.cpp reads it: parameters are numbered nowhere else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from fusedmoe.activation import Activation
from fusedmoe.parts import Input

NOTHING = -1
COPY, LINEAR, NORM = STAGES = ("copy", "linear", "norm")


@dataclass(frozen=True)
class Vector:
    """Columns `first` .. `first + width` of a vector of a row.

    kind: "input" (slot `index` of input `place`), "unit" (of level `place`) or "expert" (of the level
    that reads). whole: these are all its columns. detached: no gradient goes back through this read.
    """

    kind: str
    place: int
    index: int
    first: int
    width: int
    whole: bool
    detached: bool


@dataclass(frozen=True)
class Stage:
    """dropout(act(head h)), where the head is a copy (plus b), W h + b, or a LayerNorm.

    k, width: columns of h and of the result. weight, bias: numbers of the parameters W and b, or of
    gamma and beta; -1: none. activation; slope: number of PReLU's learned slope, which then takes
    the activation's place, or -1. eps: of the LayerNorm. dropout: p. stream: number of this dropout
    among the table's.
    """

    kind: str
    k: int
    width: int
    weight: int
    bias: int
    activation: Activation
    slope: int
    eps: float
    dropout: float
    stream: int


@dataclass(frozen=True)
class Mlp:
    """Stages over the concatenation of the sources; without any a copy of it, `width` columns."""

    sources: tuple[Vector, ...]
    stages: tuple[Stage, ...]
    width: int


@dataclass(frozen=True)
class Expert:
    """One expert. computed: some output depends on it; differentiated: a gradient of some
    output reaches it."""

    mlp: Mlp
    computed: bool
    differentiated: bool


@dataclass(frozen=True)
class Gate:
    """A softmax over the experts `sees`, but for those at the places `closed`.

    Its logits are `factor` times one of: the output of an MLP, the parameter `free`, or query . keys.
    Several `mlps` are alternatives, of the same stages; number `choice` is used.
    """

    sees: tuple[int, ...]
    mlps: tuple[Mlp, ...]
    free: int
    query: tuple[Vector, ...]
    keys: tuple[tuple[Vector, ...], ...]
    factor: float
    choice: int = 0
    closed: tuple[int, ...] = ()

    @property
    def mlp(self) -> Mlp | None:
        """The MLP that gives the logits, if one does."""
        return self.mlps[self.choice] if self.mlps else None

    @property
    def attended(self) -> tuple[tuple[Vector, ...], ...]:
        """The query, and the keys of the experts over which the softmax is."""
        return (self.query, *(self.keys[j] for j in self.seen.values())) if self.keys else ()

    @property
    def seen(self) -> dict[int, int]:
        """The experts over which the softmax is, and the place of each in `sees`."""
        return {e: j for j, e in enumerate(self.sees) if j not in self.closed}


@dataclass(frozen=True)
class Static:
    """Static weights of `experts`: `values`, or elements of the parameter `parameter` from `offset`
    on, one an expert, or with `channels` one a column of each expert."""

    experts: tuple[int, ...]
    values: tuple[float, ...]
    parameter: int
    offset: int
    channels: bool


@dataclass(frozen=True)
class Unit:
    """One unit of `width` columns; `reads` are the experts whose outputs enter it, ascending."""

    gate: Gate | None
    static: Static | None
    product: tuple[int, ...]
    reads: tuple[int, ...]
    width: int
    computed: bool
    differentiated: bool


@dataclass(frozen=True)
class Level:
    """E experts and U units."""

    experts: tuple[Expert, ...]
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the operator.

    computed: some output depends on it. live: some output's gradient reaches it (an output is what
    a call returns, mixing weights too).
    """

    name: str
    shape: tuple[int, ...]
    computed: bool
    live: bool


class Reads(NamedTuple):
    """What a node depends on: (node, whether the read is detached) pairs, and its own parameters."""

    nodes: tuple[tuple[Node, bool], ...]
    parameters: tuple[int, ...]


class Node(NamedTuple):
    """A part of a graph on which others depend: an input slot, an expert, a unit, a unit's mixing
    weights, or a tower. place: of its input or level; number: its own there."""

    kind: str
    place: int
    number: int


@dataclass(frozen=True)
class Graph:
    """A whole network.

    tasks: the units that each task reads, where there are no towers. output: (T, width of the
    towers), or without towers (U, H).
    """

    inputs: tuple[Input, ...]
    levels: tuple[Level, ...]
    towers: tuple[Mlp, ...]
    tasks: tuple[tuple[int, ...], ...]
    parameters: tuple[Parameter, ...]
    output: tuple[int, ...]

    @property
    def mixing(self) -> int:
        """Mixing weights of a row, all levels: sum of U x E."""
        return sum(len(level.units) * len(level.experts) for level in self.levels)

    @cached_property
    def flops(self) -> int:
        """FLOPs of a row's forward: 2 per multiply-add of computed linear maps and mixing weights."""
        stages = [stage for mlp in self.mlps for stage in mlp.stages if stage.kind == LINEAR]
        units = [unit for level in self.levels for unit in level.units if unit.computed]
        return 2 * (sum(s.k * s.width for s in stages) + sum(u.width * len(u.reads) for u in units))

    @cached_property
    def mlps(self) -> tuple[Mlp, ...]:
        """Every MLP that is computed: of experts, gates and towers."""
        found: list[Mlp] = []
        for level in self.levels:
            found += [expert.mlp for expert in level.experts if expert.computed]
            found += [u.gate.mlp for u in level.units if u.computed and u.gate and u.gate.sees and u.gate.mlp]
        return (*found, *self.towers)

    @cached_property
    def uses(self) -> Counter[int]:
        """By number of a parameter, how many linear maps it is the W of, and how many stages it is the b
        of; and one more where it is static weights."""
        found = Counter(stage.weight for mlp in self.mlps for stage in mlp.stages if stage.kind == LINEAR)
        found.update(stage.bias for mlp in self.mlps for stage in mlp.stages if stage.bias != NOTHING)
        units = [unit for level in self.levels for unit in level.units if unit.computed]
        found.update({unit.static.parameter for unit in units if unit.static} - {NOTHING})
        return found

    @cached_property
    def outputs(self) -> tuple[Node, ...]:
        """What a call returns as `out`."""
        if self.towers:
            return tuple(Node("tower", 0, t) for t in range(len(self.towers)))
        return tuple(Node("unit", len(self.levels) - 1, u) for u in range(len(self.levels[-1].units)))

    @cached_property
    def read_by_towers(self) -> tuple[Node, ...]:
        """What towers read, and let gradients through to."""
        return tuple(node_of(v, len(self.levels)) for mlp in self.towers for v in mlp.sources if not v.detached)

    @cached_property
    def reads(self) -> dict[Node, Reads]:
        """What every node reads."""
        found = {Node("input", 0, s): Reads((), ()) for s in range(self.inputs[0].slots)}
        for number, level in enumerate(self.levels):
            found |= {Node("expert", number, e): _of_mlp(x.mlp, number) for e, x in enumerate(level.experts)}
            for u, unit in enumerate(level.units):
                found |= reads_of_unit(unit, number, u)
        return found | {Node("tower", 0, t): _of_mlp(mlp, 0) for t, mlp in enumerate(self.towers)}


def node_of(vector: Vector, level: int) -> Node:
    """The node of which a vector, read in this level, is some columns."""
    return Node(vector.kind, level if vector.kind == "expert" else vector.place, vector.index)


def numbers_of(stages: Iterable[Stage]) -> Iterator[int]:
    """The numbers of the parameters of some stages."""
    for stage in stages:
        yield from (number for number in (stage.weight, stage.bias, stage.slope) if number != NOTHING)


def reached(reads: Mapping[Node, Reads], starts: Iterable[Node], detached: bool) -> tuple[set[Node], set[int]]:
    """Return the nodes and parameters on which these nodes depend, themselves included.

    Args:
        detached: follow detached reads too (what must be computed), or not (what has a gradient).
    """
    nodes, parameters = set(starts), set[int]()
    waiting = list(nodes)
    while waiting:
        below, own = reads[waiting.pop()]
        parameters.update(own)
        for node, is_detached in below:
            if node not in nodes and (detached or not is_detached):
                nodes.add(node)
                waiting.append(node)
    return nodes, parameters


def reads_of_unit(unit: Unit, level: int, u: int) -> dict[Node, Reads]:
    """What a unit and its mixing weights read."""
    static = unit.static if unit.static and unit.static.parameter != NOTHING else None
    if static and not set(static.experts) & set(unit.reads):
        static = None
    learned = (static.parameter,) if static else ()
    channels = static is not None and static.channels
    weights, experts = Node("weights", level, u), [Node("expert", level, e) for e in unit.reads]
    mixed = [weights] if unit.gate or unit.static else []
    of_gate = _of_gate(unit.gate, level) if unit.gate and unit.gate.sees else Reads((), ())
    return {
        Node("unit", level, u): Reads(tuple((n, False) for n in experts + mixed), learned if channels else ()),
        weights: Reads(of_gate.nodes, of_gate.parameters + (() if channels else learned)),
    }


def _of_mlp(mlp: Mlp, level: int) -> Reads:
    return Reads(tuple((node_of(v, level), v.detached) for v in mlp.sources), tuple(numbers_of(mlp.stages)))


def _of_gate(gate: Gate, level: int) -> Reads:
    if gate.mlp:
        return _of_mlp(gate.mlp, level)
    vectors = [v for group in gate.attended for v in group]
    return Reads(tuple((node_of(v, level), v.detached) for v in vectors), (gate.free,) if gate.free != NOTHING else ())


def live_columns(graph: Graph) -> list[tuple[int, int]]:
    """(first column, width) of what reads an input slot and lets a gradient through."""
    mlps = [expert.mlp for level in graph.levels for expert in level.experts if expert.differentiated]
    gates = [u.gate for level in graph.levels for u in level.units if u.computed and u.gate and u.gate.sees]
    mlps += [*graph.towers, *(gate.mlp for gate in gates if gate.mlp)]
    vectors = [v for mlp in mlps for v in mlp.sources]
    vectors += [v for gate in gates for group in gate.attended for v in group]
    return [(v.first, v.width) for v in vectors if v.kind == "input" and not v.detached]


def product(sizes: Iterable[int]) -> int:
    """The product of integers; 1 for none."""
    return math.prod(sizes)


def with_shared(value: Any, first: int) -> Any:
    """A part of a graph with the shared tensors' numbers, from `first` on."""
    if isinstance(value, tuple):
        return tuple(with_shared(item, first) for item in value)
    if isinstance(value, int) and not isinstance(value, bool) and value < NOTHING:
        return first + NOTHING - 1 - value
    if not hasattr(value, "__dataclass_fields__") or isinstance(value, (Activation, Input, Parameter, Vector)):
        return value
    return replace(value, **{field: with_shared(getattr(value, field), first) for field in value.__dataclass_fields__})


class Liveness(NamedTuple):
    """The nodes on which some output depends, and to which a gradient of some output comes; the
    numbers of such parameters."""

    computed: set[Node]
    differentiated: set[Node]
    numbers: set[int]
    live: set[int]


def liveness(reads: Mapping[Node, Reads], outputs: Iterable[Node]) -> Liveness:
    """What is to be done for these outputs, mixing weights among them."""
    computed, numbers = reached(reads, outputs, detached=True)
    weights = [node for node in computed if node.kind == "weights"]
    differentiated, live = reached(reads, [*outputs, *weights], detached=False)
    return Liveness(computed, differentiated, numbers, live)


def with_liveness(numbered: Graph, found: Liveness) -> Graph:
    """The graph with `computed`, `differentiated` and `live` filled in."""
    computed, differentiated, numbers, live = found
    levels = []
    for number, level in enumerate(numbered.levels):
        experts = [Node("expert", number, e) for e in range(len(level.experts))]
        units = [Node("unit", number, u) for u in range(len(level.units))]
        levels.append(
            Level(
                tuple(
                    replace(expert, computed=node in computed, differentiated=node in differentiated)
                    for expert, node in zip(level.experts, experts, strict=True)
                ),
                tuple(
                    replace(unit, computed=node in computed, differentiated=node in differentiated)
                    for unit, node in zip(level.units, units, strict=True)
                ),
            )
        )
    parameters = tuple(replace(p, computed=i in numbers, live=i in live) for i, p in enumerate(numbered.parameters))
    return replace(numbered, levels=tuple(levels), parameters=parameters)
