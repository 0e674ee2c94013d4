"""From a table to its program: which linears and units make a segment, and what a forward alone leaves on the chip."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import cast

from fusedmoe import codec
from fusedmoe.activation import IDENTITY
from fusedmoe.graph import COPY, LINEAR, NOTHING, Gate, Graph, Level, Mlp, Node, Stage, Vector, node_of
from fusedmoe.graph import Unit as GraphUnit
from fusedmoe.kernels.program import (
    COLUMN,
    MOST_COLUMNS,
    Gather,
    Linear,
    Mix,
    Operation,
    Part,
    Product,
    Program,
    Read,
    Rowwise,
    Segment,
    Source,
    Unit,
    X,
    rounded_up,
    with_sources,
)
from fusedmoe.table import Table


def lower(table: Table) -> Program:
    """Return the segments of a table; only what some output depends on.

    Raises: ValueError, naming the linear, for one of more columns than MOST_COLUMNS.
    """
    return _lowered(table.text)


def of_text(text: str, training: bool) -> Program:
    """`lower` of a table by its text, or `inline_hidden`."""
    return _lowered(text) if training else _inline_hidden(text)


def inline_hidden(table: Table) -> Program:
    """Return the segments of a table with hidden layers computed inside the linears above them, where
    a level has one segment in front of it.

    For the forward alone: its launches then are of one segment each, and hidden layers never leave
    the chip. A tile of columns computes the whole hidden layer of its experts: with n tiles of the
    last layer's columns, n times the FLOPs of the layer below.
    """
    return _inline_hidden(table.text)


# By the text, whose hash Python keeps: that of a table would be worked out at every call.
@functools.lru_cache(maxsize=256)
def _inline_hidden(text: str) -> Program:
    program = _lowered(text)
    segments = list(program.segments)
    for group in program.levels:
        if len(group) == 2 and not any(segments[number].operations for number in group):
            front, last = group
            linears = {
                Source(front, unit.column, unit.width): segments[front].experts[e]
                for e, unit in enumerate(segments[front].units)
            }
            experts = tuple(_inlined(linear, linears) for linear in segments[last].experts)
            units = tuple(
                replace(unit, gate=unit.gate and _inlined(unit.gate, linears)) for unit in segments[last].units
            )
            # It stays in its place, because sources name segments by their numbers.
            segments[front] = replace(segments[front], experts=(), units=(), width=0)
            segments[last] = replace(segments[last], experts=experts, units=units)
    return Program(program.table, tuple(segments))


@functools.lru_cache(maxsize=256)
def of_one_slot(program: Program) -> Program:
    """Return the forward of a program whose slots are all the same vector, as [B, D] expanded to
    [B, S, D] is: everything reads slot 0.

    Its experts then share one tile of x, and its gates too. Rows of the softmax and columns of the
    buffers stay where they are, so the backward, whose gradients of the slots differ, is that of
    the program itself.
    """

    def first(source: Source) -> Source:
        return source._replace(column=0) if source.segment == X else source

    def read(linear: Linear) -> Linear:
        sources = tuple(first(source) for source in linear.sources)
        return replace(linear, sources=sources, hidden=linear.hidden and read(linear.hidden))

    def segment_of(segment: Segment) -> Segment:
        units = tuple(replace(unit, gate=unit.gate and read(unit.gate)) for unit in segment.units)
        operations = tuple(with_sources(operation, first) for operation in segment.operations)
        experts = tuple(read(linear) for linear in segment.experts)
        return replace(segment, experts=experts, units=units, operations=operations)

    return Program(program.table, tuple(segment_of(segment) for segment in program.segments))


def _inlined(linear: Linear, linears: dict[Source, Linear]) -> Linear:
    """The linear over what it reads in the segment in front, computed inside of it."""
    below = linears.get(linear.sources[0])
    if below is None:
        return linear
    return below if linear.weight == NOTHING else replace(linear, sources=(), hidden=below)


@functools.lru_cache(maxsize=256)
def _lowered(text: str) -> Program:
    table = codec.decode(text)
    weights = {stage.weight for mlp in table.graph.mlps for stage in mlp.stages}
    for number, parameter in enumerate(table.parameters):
        if max(parameter.shape, default=0) > MOST_COLUMNS and number in weights:
            raise ValueError(
                f"{parameter.name}: the GPU backends expect at most {MOST_COLUMNS} columns, got "
                f"{max(parameter.shape)}; "
                'use backend="reference" for this network'
            )
    return Program(table, tuple(_Lowering(table.graph).segments()))


class _Front:
    """The segments in front of a level's own, by their depth: hidden linears, each handed on by a unit
    that reads it alone, and row-wise operations."""

    def __init__(self, first: int):
        self.first = first
        self.depths: list[list[Linear | Operation]] = []
        self.gathered: dict[tuple[Part, ...], tuple[Source, int]] = {}

    def place(self, depth: int, new: Linear | Operation) -> tuple[Source, int]:
        """Put a linear or an operation into the first segment of its kind from this depth on; return
        where its output stands, and from which depth on it can be read.

        Operations of a segment run one after another, so that those behind it can read it too.
        """
        dense = isinstance(new, Linear)
        kinds = [isinstance(there[0], Linear) for there in self.depths]
        depth = kinds.index(dense, depth) if dense in kinds[depth:] else len(kinds)
        if depth == len(kinds):
            self.depths.append([])
        column = sum(rounded_up(old.width, COLUMN) for old in self.depths[depth])
        self.depths[depth].append(new if isinstance(new, Linear) else replace(new, column=column))
        return Source(self.first + depth, column, new.width), depth + dense

    def gather(self, depth: int, parts: tuple[Part, ...]) -> tuple[Source, int]:
        """Place the concatenation of parts, once."""
        if parts not in self.gathered:
            self.gathered[parts] = self.place(depth, Gather(parts, sum(part.width for part in parts), 0))
        return self.gathered[parts]

    def segments(self, name: str, level: int) -> list[Segment]:
        found = []
        for depth, content in enumerate(self.depths):
            linears = [new for new in content if isinstance(new, Linear)]
            operations = tuple(new for new in content if not isinstance(new, Linear))
            last = operations[-1] if operations else None
            found.append(
                Segment(f"{name}, row-wise {depth}", level, (), (), _behind(last), operations)
                if last
                else _handing_on(f"{name}, hidden {depth}", level, linears)
            )
        return found


def _behind(last: Operation) -> int:
    """The columns of a buffer of which this operation writes the last ones."""
    return rounded_up(last.column + last.width, COLUMN)


def _handing_on(name: str, level: int, linears: list[Linear]) -> Segment:
    """A segment whose units are its linears."""
    units, column = [], 0
    for e, linear in enumerate(linears):
        units.append(Unit((Read(e, value=1.0),), linear.width, column))
        column += rounded_up(linear.width, COLUMN)
    return Segment(name, level, tuple(linears), tuple(units), column)


class _Lowering:
    """One walk over a graph."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.done: list[Segment] = []
        # What stands where: of an expert of the level that is lowered, also how many segments in
        # front of the level's own have to be done before it can be read.
        self.standing: dict[Node, Source] = {
            Node("input", 0, s): Source(X, s, graph.inputs[0].width) for s in range(graph.inputs[0].slots)
        }
        self.depths: dict[Node, int] = {}
        self.uses = graph.uses
        self.mixing = 0

    def segments(self) -> list[Segment]:
        for number, level in enumerate(self.graph.levels):
            self.level(number, level)
        if self.graph.towers:
            self.towers()
        return self.done

    def level(self, number: int, level: Level) -> None:
        front = _Front(len(self.done))
        computed = {u: unit for u, unit in enumerate(level.units) if unit.computed}
        dense = all(_is_dense(unit) for unit in computed.values())
        # Experts that are read one by one, and not by the level's segment alone.
        read = _read_experts(level) if dense else set(range(len(level.experts)))
        linears: dict[int, Linear] = {}
        for e, expert in enumerate(level.experts):
            if not expert.computed:
                continue
            depth, last = self.mlp(front, number, expert.mlp)
            node = Node("expert", number, e)
            if isinstance(last, Source):
                self.standing[node], self.depths[node] = last, depth
            elif not dense and last.weight == NOTHING:
                self.standing[node], self.depths[node] = last.sources[0], depth
            elif e in read:
                self.standing[node], self.depths[node] = front.place(depth, last)
            linears[e] = last if isinstance(last, Linear) and e not in read else self.copy(node)
        last_level = number + 1 == len(self.graph.levels) and not self.graph.towers
        columns, column = {}, 0
        for u, unit in computed.items():
            columns[u] = column
            column += unit.width if last_level else rounded_up(unit.width, COLUMN)
        units: list[Unit] = []
        operations: list[Operation] = []
        if dense:
            units = [self.dense_unit(front, number, u, columns[u], tuple(linears)) for u in computed]
        else:
            operations = [self.operation(front, number, u, columns[u]) for u in computed]
            linears = {}
        self.done += front.segments(f"level {number}", number)
        for u, first in columns.items():
            self.standing[Node("unit", number, u)] = Source(len(self.done), first, level.units[u].width)
        own = tuple(linears.values()), tuple(units), column, tuple(operations)
        self.done.append(Segment(f"level {number}", number, *own))
        self.mixing += len(level.units) * len(level.experts)

    def copy(self, node: Node) -> Linear:
        return Linear((self.standing[node],), self.standing[node].width)

    def mlp(self, front: _Front, level: int, mlp: Mlp, gate: bool = False) -> tuple[int, Linear | Source]:
        """Place all stages but the last in front, and the last one too where it is no linear; return
        from which depth on the last one can be done or read, and the linear or where it stands."""
        stages = [part for stage in mlp.stages for part in _split(stage, self.uses)]
        several = bool(stages) and stages[0].kind == LINEAR and self.uses[stages[0].weight] == 1
        depth, sources = self.sources(front, level, mlp.sources, several and not (gate and len(stages) == 1))
        if not stages:
            return depth, (Linear(sources, mlp.width) if _is_whole(mlp.sources) else sources[0])
        for i, stage in enumerate(stages):
            linear = stage.kind == LINEAR
            if linear and i + 1 == len(stages):
                return depth, _linear(sources, stage)
            new = _linear(sources, stage) if linear else Rowwise(sources[0], stage, stage.width, 0)
            source, depth = front.place(depth, new)
            sources = (source,)
        return depth, sources[0]

    def sources(
        self, front: _Front, level: int, vectors: tuple[Vector, ...], several: bool
    ) -> tuple[int, tuple[Source, ...]]:
        """Where vectors stand, and from which depth on; one concatenation unless there may be
        `several`, and all are whole."""
        nodes = [node_of(vector, level) for vector in vectors]
        depth = max(self.depths.get(node, 0) for node in nodes)
        if _is_whole(vectors) or (several and all(_is_whole((vector,)) for vector in vectors)):
            return depth, tuple(self.standing[node] for node in nodes)
        parts = tuple(
            Part(self.standing[node], v.first, v.width, v.detached) for node, v in zip(nodes, vectors, strict=True)
        )
        source, depth = front.gather(depth, parts)
        return depth, (source,)

    def dense_unit(self, front: _Front, level: int, u: int, column: int, experts: tuple[int, ...]) -> Unit:
        unit = self.graph.levels[level].units[u]
        places = {e: i for i, e in enumerate(experts)}
        made = self.unit(level, u, column, places)
        if not unit.gate or not unit.gate.sees:
            return made
        # A gate's last stage is a linear map without more.
        return replace(made, gate=cast(Linear, self.mlp(front, level, cast(Mlp, unit.gate.mlp), gate=True)[1]))

    def unit(self, level: int, u: int, column: int, places: dict[int, int]) -> Unit:
        """A unit but for its gate; places: of the experts among those that it reads."""
        unit, first = self.graph.levels[level].units[u], self.mixing + u * len(self.graph.levels[level].experts)
        static = unit.static
        value = dict(zip(static.experts, static.values, strict=True)) if static and static.values else {}
        learned = static is not None and static.parameter != NOTHING and not static.channels
        element = {e: static.offset + j for j, e in enumerate(static.experts)} if static and learned else {}
        seen = unit.gate.seen if unit.gate else {}
        reads = tuple(
            Read(places[e], seen.get(e, NOTHING), value.get(e, 0.0), element.get(e, NOTHING)) for e in unit.reads
        )
        tensor = static.parameter if static and element else NOTHING
        return Unit(reads, unit.width, column, None, tensor, tuple(first + e for e in unit.reads))

    def operation(self, front: _Front, level: int, u: int, column: int) -> Operation:
        """A unit of a level that is done row-wise."""
        unit = self.graph.levels[level].units[u]
        stands = [self.standing[Node("expert", level, e)] for e in unit.product or unit.reads]
        if unit.product:
            return Product(stands[0], stands[1], unit.width, column)
        made = self.unit(level, u, column, {e: i for i, e in enumerate(unit.reads)})
        static, channels = unit.static, {}
        if static and static.channels:
            channels = {e: static.offset + j * unit.width for j, e in enumerate(static.experts)}
        elements = tuple(channels.get(e, NOTHING) for e in unit.reads)
        mix = Mix(made, tuple(stands), elements, static.parameter if static and channels else NOTHING)
        return self.with_logits(front, level, mix, unit.gate) if unit.gate and unit.gate.sees else mix

    def with_logits(self, front: _Front, level: int, mix: Mix, gate: Gate) -> Mix:
        if gate.mlp:
            depth, last = self.mlp(front, level, gate.mlp, gate=True)
            logits = last if isinstance(last, Source) else front.place(depth, last)[0]
            return replace(mix, factor=gate.factor, logits=logits)
        if not gate.keys:
            return replace(mix, factor=gate.factor, free=gate.free)
        query = self.sources(front, level, gate.query, False)[1][0]
        keys = {j: self.sources(front, level, gate.keys[j], False)[1][0] for j in gate.seen.values()}
        by_read = tuple(keys.get(read.seen) for read in mix.unit.reads)
        return replace(mix, factor=gate.factor, query=query, keys=by_read)

    def towers(self) -> None:
        level = len(self.graph.levels)
        front = _Front(len(self.done))
        lasts = [self.mlp(front, level, tower)[1] for tower in self.graph.towers]
        linears = [last if isinstance(last, Linear) else Linear((last,), last.width) for last in lasts]
        self.done += front.segments("towers", level)
        width = linears[0].width
        last = _handing_on("towers", level, linears)
        self.done.append(
            replace(
                last,
                units=tuple(replace(unit, column=t * width) for t, unit in enumerate(last.units)),
                width=len(linears) * width,
            )
        )


def _linear(sources: tuple[Source, ...], stage: Stage) -> Linear:
    return Linear(sources, stage.width, stage.weight, stage.bias, stage.activation)


def _split(stage: Stage, uses: Counter[int]) -> tuple[Stage, ...]:
    """A stage as a linear with an activation, and what does not fit into one behind it: a bias that
    is not this linear's alone, PReLU, and dropout."""
    if stage.kind != LINEAR:
        return (stage,)
    shared = stage.bias != NOTHING and max(uses[stage.weight], uses[stage.bias]) > 1
    late = shared or stage.slope != NOTHING
    if not late and not stage.dropout:
        return (stage,)
    bias, activation = stage.bias if shared else NOTHING, stage.activation if late else IDENTITY
    own = {"bias": NOTHING if shared else stage.bias, "activation": IDENTITY if late else stage.activation}
    return (
        replace(stage, slope=NOTHING, dropout=0.0, stream=NOTHING, **own),
        replace(stage, kind=COPY, k=stage.width, weight=NOTHING, bias=bias, activation=activation),
    )


def _is_whole(vectors: tuple[Vector, ...]) -> bool:
    """Whether they are one vector that is read as it stands."""
    return len(vectors) == 1 and vectors[0].whole and not vectors[0].detached


def _is_dense(unit: GraphUnit) -> bool:
    """Whether a segment of linears has a place for the unit."""
    gate = unit.gate
    fits = not gate or not gate.sees or (bool(gate.mlps) and gate.factor == 1.0 and not gate.closed)
    return fits and not unit.product and not (unit.static and unit.static.channels)


def _read_experts(level: Level) -> set[int]:
    """The experts that gates and other experts of this level read."""
    gates = [unit.gate for unit in level.units if unit.computed and unit.gate and unit.gate.sees]
    mlps = [gate.mlp for gate in gates if gate.mlp]
    mlps += [expert.mlp for expert in level.experts if expert.computed]
    return {vector.index for mlp in mlps for vector in mlp.sources if vector.kind == "expert"}
