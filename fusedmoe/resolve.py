"""From a draft to its graph: check every part, fold ops into stages, number the parameters.

Parameters come in this order: the experts and then the gates of each level, the towers, and the
shared tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from fusedmoe import graph, parts
from fusedmoe.activation import IDENTITY, Activation
from fusedmoe.graph import (
    COPY,
    LINEAR,
    NORM,
    NOTHING,
    Graph,
    Mlp,
    Parameter,
    Stage,
    Vector,
    liveness,
    product,
    with_liveness,
    with_shared,
)
from fusedmoe.parts import Attention, Bias, Draft, Dropout, Gate, Input, LayerNorm, Linear, PReLU, Source, Static, Task
from fusedmoe.validation import MOST_SLOTS, require_indices, require_instance, require_integer, require_tuple

OPS = (Linear, Activation, PReLU, LayerNorm, Dropout, Bias)
Sources = tuple[Source, ...]


def resolve(draft: Draft) -> Graph:
    """Return the graph of a draft.

    Raises: ValueError for a draft that contradicts itself, or that is too large. It names the
        place, what was expected and what came.
    """
    return _Resolver(draft).resolved()


@dataclass
class _Named:
    """A parameter while the graph is built."""

    name: str
    shape: tuple[int, ...]


class _Resolver:
    def __init__(self, draft: Draft):
        self.draft = draft
        self.named: list[_Named] = []
        self.widths: list[tuple[int, ...]] = []  # of the units of each level
        self.outputs: list[int] = []  # of the experts of the level that is being resolved
        self.streams = 0

    def resolved(self) -> Graph:
        draft = self.draft
        require_tuple(draft.inputs, Input, "table.inputs")
        if not draft.inputs:
            raise ValueError("table.inputs: expected at least one input, got none")
        for i, given in enumerate(draft.inputs):
            require_integer(given.slots, f"table.inputs[{i}], slots", 1, MOST_SLOTS)
            require_integer(given.width, f"table.inputs[{i}], width", 1)
        require_tuple(draft.levels, parts.Level, "table.levels")
        require_tuple(draft.tasks, Task, "table.tasks")
        if not draft.levels:
            raise ValueError("table.levels: expected at least one level, got none")
        self.check_shared()
        levels = tuple(self.level(number, level) for number, level in enumerate(draft.levels))
        towers, tasks = self.tasks()
        self.check_uses(levels, towers)
        first = len(self.named)
        self.named += [_Named(f"shared.{i}", tuple(shape)) for i, shape in enumerate(draft.shared)]
        output = (len(towers), towers[0].width) if towers else (len(levels[-1].units), self.widths[-1][0])
        parameters = tuple(Parameter(p.name, p.shape, False, False) for p in self.named)
        numbered = Graph(parts.joined(draft.inputs), levels, towers, tasks, parameters, output)
        numbered = with_shared(numbered, first)
        return with_liveness(numbered, liveness(numbered.reads, numbered.outputs))

    def check_shared(self) -> None:
        require_tuple(self.draft.shared, tuple, "table.shared")
        for i, shape in enumerate(self.draft.shared):
            for size in shape:
                require_integer(size, f"table.shared[{i}]")
            require_integer(product(shape), f"table.shared[{i}], elements")

    def check_uses(self, levels: tuple[graph.Level, ...], towers: tuple[Mlp, ...]) -> None:
        """Some kernels repack the weights of linear maps, so such a tensor may be nothing else."""
        mlps = [*towers, *(expert.mlp for level in levels for expert in level.experts)]
        units = [unit for level in levels for unit in level.units]
        mlps += [mlp for unit in units if unit.gate for mlp in unit.gate.mlps]
        stages = [stage for mlp in mlps for stage in mlp.stages]
        weights = {stage.weight for stage in stages if stage.kind == LINEAR}
        others = {stage.bias for stage in stages} | {unit.static.parameter for unit in units if unit.static}
        for number in weights & others:
            if number < NOTHING:
                tensor = NOTHING - 1 - number
                raise ValueError(
                    f"table.shared[{tensor}]: expected the weight of linear maps, or biases and static weights, "
                    "got both"
                )

    def level(self, number: int, level: parts.Level) -> graph.Level:
        where = f"level {number}"
        require_tuple(level.experts, parts.Expert, f"{where}, experts")
        require_tuple(level.units, parts.Unit, f"{where}, units")
        if not level.experts:
            raise ValueError(f"{where}: expected at least one expert, got none")
        if not level.units:
            raise ValueError(f"{where}: expected at least one unit, got none")
        # Units are the next level's slots; the same limit holds for experts.
        require_integer(len(level.units), f"{where}, number of units", 1, MOST_SLOTS)
        require_integer(len(level.experts), f"{where}, number of experts", 1, MOST_SLOTS)
        self.outputs = []
        experts = []
        for e, expert in enumerate(level.experts):
            place = f"{where}, expert {e}"
            sources = self.vectors(expert.sources, f"{place}, sources", number)
            mlp = self.mlp(sources, expert.ops, place, f"levels.{number}.experts.{e}")
            self.outputs.append(mlp.width)
            experts.append(graph.Expert(mlp, False, False))
        units = tuple(self.unit(number, u, unit) for u, unit in enumerate(level.units))
        self.widths.append(tuple(unit.width for unit in units))
        return graph.Level(tuple(experts), units)

    def vectors(self, sources: Sources, where: str, level: int) -> tuple[Vector, ...]:
        """The vectors of at least one source."""
        require_tuple(sources, Source, where)
        if not sources:
            raise ValueError(f"{where}: expected at least one source, got none")
        return tuple(
            self.vector(source, where if len(sources) == 1 else f"{where}, source {i}", level)
            for i, source in enumerate(sources)
        )

    def vector(self, source: Source, where: str, level: int) -> Vector:
        if source.kind not in parts.SOURCES:
            raise ValueError(f"{where}: expected one of {', '.join(parts.SOURCES)}, got {source.kind!r}")
        kind, place, widths = source.kind, source.place, tuple(self.outputs)
        if kind == "slot":
            if source.place != 0:
                raise ValueError(f"{where}: expected place 0 of a slot, got {source.place!r}")
            kind, place = ("unit", level - 1) if level else ("input", 0)
        elif kind == "expert" and place != 0:
            raise ValueError(f"{where}: expected place 0 of an expert, got {place!r}")
        if kind == "input":
            require_indices((place,), len(self.draft.inputs), f"{where}, place", "inputs")
            given = self.draft.inputs[place]
            widths = (given.width,) * given.slots
        elif kind == "unit":
            require_indices((place,), min(level, len(self.widths)), f"{where}, place", "levels below")
            widths = self.widths[place]
        require_indices((source.index,), len(widths), where, f"{source.kind}s")
        require_integer(source.first, f"{where}, first column")
        whole = widths[source.index]
        width = whole - source.first if source.width is None else source.width
        if isinstance(width, bool) or not isinstance(width, int) or width < 1 or source.first + width > whole:
            raise ValueError(
                f"{where}: expected columns within {whole}, got first={source.first!r}, width={source.width!r}"
            )
        require_instance(source.detached, bool, f"{where}, detached")
        if kind == "input" and len(self.draft.inputs) > 1:
            first = parts.column_of(self.draft.inputs, place, source.index) + source.first
            return Vector(kind, 0, 0, first, width, False, source.detached)
        place = 0 if kind == "expert" else place
        return Vector(kind, place, source.index, source.first, width, width == whole, source.detached)

    def parameter(self, name: str, shape: tuple[int, ...]) -> int:
        self.named.append(_Named(name, shape))
        return len(self.named) - 1

    def mlp(self, sources: tuple[Vector, ...], ops: tuple[parts.Op, ...], where: str, name: str) -> Mlp:
        """Fold ops into stages; `name` is that of their parameters."""
        if not isinstance(ops, tuple) or not all(isinstance(op, OPS) for op in ops):
            kinds = ", ".join(kind.__name__ for kind in OPS)
            raise ValueError(f"{where}, ops: expected a tuple of {kinds}, got {ops!r}")
        fold = _Fold(self, sum(source.width for source in sources), where, name)
        for op in ops:
            fold.add(op)
        return Mlp(sources, tuple(fold.stages), fold.width)

    def unit(self, number: int, u: int, unit: parts.Unit) -> graph.Unit:
        where = f"level {number}, unit {u}"
        gate = static = None
        if isinstance(unit.gate, Attention):
            gate = self.attention(number, unit.gate, where)
        elif unit.gate is not None:
            require_instance(unit.gate, Gate, f"{where}, gate")
            gate = self.gate(number, u, unit.gate, where)
        if unit.static is not None:
            require_instance(unit.static, Static, f"{where}, static weights")
            require_indices(unit.static.experts, len(self.outputs), f"{where}, static weights", "experts")
        if unit.product is not None:
            if unit.gate is not None or unit.static is not None:
                raise ValueError(f"{where}: expected a product, or a gate and static weights, got both")
            if not isinstance(unit.product, tuple) or len(unit.product) != 2:
                raise ValueError(f"{where}, product: expected a pair of experts, got {unit.product!r}")
            for e in unit.product:
                require_indices((e,), len(self.outputs), f"{where}, product", "experts")
        widths = {self.outputs[e] for e in unit.reads} or set(self.outputs)
        if len(widths) != 1:
            raise ValueError(f"{where}: expected experts of one output width, got widths {sorted(widths)}")
        (width,) = widths
        if unit.static is not None:
            static = self.static(unit.static, f"{where}, static weights", width)
        return graph.Unit(gate, static, unit.product or (), unit.reads, width, False, False)

    def gate(self, number: int, u: int, gate: Gate, where: str) -> graph.Gate:
        require_tuple(gate.selectors, tuple, f"{where}, selectors")
        require_instance(gate.bias, bool, f"{where}, bias of the gate")
        require_indices(gate.sees, len(self.outputs), f"{where}, sees", "experts")
        if not _is_finite(gate.temperature) or gate.temperature <= 0:
            raise ValueError(f"{where}, temperature: expected a finite number above 0, got {gate.temperature!r}")
        name, rows, factor = f"levels.{number}.gates.{u}", len(gate.sees), 1.0 / gate.temperature
        if not gate.selectors:
            if gate.hidden or not gate.bias:
                raise ValueError(f"{where}, gate: expected no hidden ops and a bias, as there is no selector")
            return graph.Gate(gate.sees, (), self.parameter(f"{name}.bias", (rows,)), (), (), factor)
        choices = [
            self.vectors(selector, f"{where}, selector" + (f" {i}" if len(gate.selectors) > 1 else ""), number)
            for i, selector in enumerate(gate.selectors)
        ]
        widths = [sum(vector.width for vector in choice) for choice in choices]
        if len(set(widths)) > 1:
            raise ValueError(f"{where}, selectors: expected alternatives of one width, got widths {widths}")
        hidden = self.mlp(choices[0], gate.hidden, f"{where}, hidden ops of the gate", f"{name}.hidden")
        weight = self.parameter(f"{name}.weight", (rows, hidden.width))
        bias = self.parameter(f"{name}.bias", (rows,)) if gate.bias else NOTHING
        last = Stage(LINEAR, hidden.width, rows, weight, bias, IDENTITY, NOTHING, 0.0, 0.0, NOTHING)
        mlps = tuple(Mlp(choice, (*hidden.stages, last), rows) for choice in choices)
        return graph.Gate(gate.sees, mlps, NOTHING, (), (), factor)

    def attention(self, number: int, gate: Attention, where: str) -> graph.Gate:
        require_indices(gate.sees, len(self.outputs), f"{where}, sees", "experts")
        if not _is_finite(gate.scale):
            raise ValueError(f"{where}, scale: expected a finite number, got {gate.scale!r}")
        require_tuple(gate.keys, tuple, f"{where}, keys")
        if len(gate.keys) != len(gate.sees):
            raise ValueError(
                f"{where}, keys: expected {len(gate.sees)}, one for each expert seen, got {len(gate.keys)}"
            )
        query = self.vectors(gate.query, f"{where}, query", number)
        keys = tuple(self.vectors(key, f"{where}, key {j}", number) for j, key in enumerate(gate.keys))
        width = sum(vector.width for vector in query)
        widths = [sum(vector.width for vector in key) for key in keys]
        if set(widths) - {width}:
            raise ValueError(f"{where}, keys: expected the query's width {width}, got widths {widths}")
        return graph.Gate(gate.sees, (), NOTHING, query, keys, float(gate.scale))

    def static(self, static: Static, where: str, width: int) -> graph.Static:
        require_integer(static.offset, f"{where}, offset")
        require_instance(static.channels, bool, f"{where}, channels")
        if (static.values is None) == (static.tensor is None):
            raise ValueError(
                f"{where}: expected either fixed values or a shared tensor, got "
                f"{'neither' if static.values is None else 'both'}"
            )
        if static.values is not None:
            floats = isinstance(static.values, tuple) and all(
                isinstance(v, float) and math.isfinite(v) for v in static.values
            )
            if not floats or len(static.values) != len(static.experts):
                raise ValueError(
                    f"{where}: expected a tuple of {len(static.experts)} finite floats, got {static.values!r}"
                )
            if static.channels:
                raise ValueError(f"{where}, channels: expected a shared tensor, got fixed values")
            return graph.Static(static.experts, static.values, NOTHING, 0, False)
        tensor = self.shared(static.tensor, where)
        size, count = product(self.draft.shared[tensor]), len(static.experts) * (width if static.channels else 1)
        if static.offset + count > size:
            raise ValueError(
                f"{where}: expected elements within the {size} of shared tensor {tensor}, got "
                f"{static.offset} to {static.offset + count - 1}"
            )
        return graph.Static(static.experts, (), _shared(tensor), static.offset, static.channels)

    def shared(self, tensor: Any, where: str) -> int:
        """The number of a shared tensor, checked."""
        require_indices((tensor,), len(self.draft.shared), where, "shared tensors")
        return tensor

    def tasks(self) -> tuple[tuple[Mlp, ...], tuple[tuple[int, ...], ...]]:
        """The towers, or the units that each task reads."""
        top = len(self.draft.levels)
        self.outputs = []
        towers = [bool(task.tower) for task in self.draft.tasks]
        if any(towers) and not all(towers):
            raise ValueError(f"task {towers.index(False)}: expected a tower, as the other tasks have, got none")
        mlps, units = [], []
        for t, task in enumerate(self.draft.tasks):
            vectors = self.vectors(task.sources, f"task {t}, sources", top)
            if any(towers):
                mlps.append(self.mlp(vectors, task.tower, f"task {t}, tower", f"towers.{t}"))
                continue
            for vector in vectors:
                if (vector.kind, vector.place, vector.whole, vector.detached) != ("unit", top - 1, True, False):
                    raise ValueError(f"task {t}, sources: expected whole units of the last level, got {task.sources!r}")
            units.append(tuple(vector.index for vector in vectors))
        widths = {mlp.width for mlp in mlps} or set(self.widths[-1])
        if len(widths) != 1:
            what = "tower outputs" if mlps else "last level"
            raise ValueError(f"{what}: expected one width, got widths {sorted(widths)}")
        if len({len(read) for read in units}) > 1:
            read = [self.widths[-1][0] * len(indices) for indices in units]
            raise ValueError(f"table.tasks: expected tasks of one width, got widths {read}; give them towers")
        return tuple(mlps), tuple(units)


class _Fold:
    """Ops on their way into stages: a stage ends where an op comes that cannot follow in it."""

    def __init__(self, resolver: _Resolver, width: int, where: str, name: str):
        self.resolver, self.width, self.where, self.name = resolver, width, where, name
        self.stages: list[Stage] = []
        self.layers = 0  # ops that have parameters
        self.filled = 0  # of the last stage: 1 has its head, 2 an activation, 3 dropout

    def add(self, op: parts.Op) -> None:
        if isinstance(op, Linear):
            self.linear(op)
        elif isinstance(op, LayerNorm):
            self.norm(op)
        elif isinstance(op, Bias):
            bias = self.own_or_shared("bias", (self.width,), op.shared, f"{self.where}, Bias")
            self.head(COPY, self.width, NOTHING, bias)
        elif isinstance(op, PReLU):
            require_instance(op.channels, bool, f"{self.where}, channels of a PReLU")
            slope = self.parameter("weight", (self.width if op.channels else 1,))
            self.after(2, slope=slope)
            self.layers += 1
        elif isinstance(op, Activation):
            if op != IDENTITY:
                self.after(2, activation=op)
        elif not _is_finite(op.p) or not 0 <= op.p < 1:
            raise ValueError(f"{self.where}, dropout: expected p in [0, 1), got {op.p!r}")
        elif op.p > 0:
            self.after(3, dropout=float(op.p), stream=self.resolver.streams)
            self.resolver.streams += 1

    def linear(self, op: Linear) -> None:
        where = f"{self.where}, linear map {self.layers}"
        require_integer(op.width, f"{where}, width", 1)
        require_instance(op.bias, bool, f"{where}, bias")
        if op.shared_bias is not None and not op.bias:
            raise ValueError(f"{where}: expected no shared bias, as it has none, got {op.shared_bias!r}")
        weight = self.own_or_shared("weight", (op.width, self.width), op.shared, where)
        bias = self.own_or_shared("bias", (op.width,), op.shared_bias, where) if op.bias else NOTHING
        self.head(LINEAR, op.width, weight, bias)

    def norm(self, op: LayerNorm) -> None:
        where = f"{self.where}, LayerNorm"
        require_instance(op.affine, bool, f"{where}, affine")
        require_instance(op.bias, bool, f"{where}, bias")
        if not _is_finite(op.eps) or op.eps < 0:
            raise ValueError(f"{where}, eps: expected a finite number of at least 0, got {op.eps!r}")
        weight = self.parameter("weight", (self.width,)) if op.affine else NOTHING
        bias = self.parameter("bias", (self.width,)) if op.affine and op.bias else NOTHING
        self.head(NORM, self.width, weight, bias, float(op.eps))

    def head(self, kind: str, width: int, weight: int, bias: int, eps: float = 0.0) -> None:
        self.stages.append(Stage(kind, self.width, width, weight, bias, IDENTITY, NOTHING, eps, 0.0, NOTHING))
        self.width, self.filled = width, 1
        self.layers += 1

    def after(self, place: int, **fields: Any) -> None:
        """Put what follows a head into the last stage, or into a copy behind it."""
        if not self.stages or self.filled >= place:
            none = (NOTHING, NOTHING, IDENTITY, NOTHING, 0.0, 0.0, NOTHING)
            self.stages.append(Stage(COPY, self.width, self.width, *none))
        self.stages[-1] = replace(self.stages[-1], **fields)
        self.filled = place

    def parameter(self, name: str, shape: tuple[int, ...]) -> int:
        return self.resolver.parameter(f"{self.name}.{self.layers}.{name}", shape)

    def own_or_shared(self, name: str, shape: tuple[int, ...], tensor: int | None, where: str) -> int:
        if tensor is None:
            return self.parameter(name, shape)
        found = self.resolver.draft.shared[self.resolver.shared(tensor, f"{where}, {name}")]
        if tuple(found) != shape:
            raise ValueError(f"{where}, {name}: expected shared tensor {tensor} of {list(shape)}, got {list(found)}")
        return _shared(tensor)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shared(tensor: int) -> int:
    """How a shared tensor is numbered until all others are: below NOTHING."""
    return NOTHING - 1 - tensor
