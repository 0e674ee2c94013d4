"""From a table to its program: which linears and units make a segment, and what a forward alone leaves on the chip."""

from __future__ import annotations

import functools
from dataclasses import replace

from fusedmoe import codec
from fusedmoe.graph import NOTHING, Graph, Level, Mlp, Node, Stage, node_of
from fusedmoe.graph import Unit as GraphUnit
from fusedmoe.kernels.program import COLUMN, MOST_COLUMNS, Linear, Program, Read, Segment, Source, Unit, X, rounded_up
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
        if len(group) == 2:
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

    def read(linear: Linear) -> Linear:
        sources = tuple(source._replace(column=0) if source.segment == X else source for source in linear.sources)
        return replace(linear, sources=sources, hidden=linear.hidden and read(linear.hidden))

    def segment_of(segment: Segment) -> Segment:
        units = tuple(replace(unit, gate=unit.gate and read(unit.gate)) for unit in segment.units)
        return replace(segment, experts=tuple(read(linear) for linear in segment.experts), units=units)

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
    if table.lacking["triton"]:
        raise ValueError(f"table: expected one that the GPU backends can run, got one with {table.lacking['triton']}")
    for parameter in table.parameters:
        if max(parameter.shape, default=0) > MOST_COLUMNS and parameter.name.endswith("weight"):
            raise ValueError(
                f"{parameter.name}: the GPU backends expect at most {MOST_COLUMNS} columns, got "
                f"{max(parameter.shape)}; "
                'use backend="reference" for this network'
            )
    return Program(table, tuple(_Lowering(table.graph).segments()))


class _Front:
    """The segments in front of a level's own: hidden linears by their depth, each handed on by a unit
    that reads it alone."""

    def __init__(self, first: int):
        self.first = first
        self.linears: list[list[Linear]] = []

    def place(self, depth: int, new: Linear) -> Source:
        """Put a linear into the front segment of this depth; return where its output stands."""
        while len(self.linears) <= depth:
            self.linears.append([])
        column = sum(rounded_up(old.width, COLUMN) for old in self.linears[depth])
        self.linears[depth].append(new)
        return Source(self.first + depth, column, new.width)

    def segments(self, name: str, level: int) -> list[Segment]:
        return [_handing_on(f"{name}, hidden {depth}", level, linears) for depth, linears in enumerate(self.linears)]


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
        self.mixing = 0

    def segments(self) -> list[Segment]:
        for number, level in enumerate(self.graph.levels):
            self.level(number, level)
        if self.graph.towers:
            self.towers()
        return self.done

    def level(self, number: int, level: Level) -> None:
        front = _Front(len(self.done))
        read = _read_experts(level)
        linears = {}
        for e, expert in enumerate(level.experts):
            if not expert.computed:
                continue
            depth, last = self.mlp(front, number, expert.mlp)
            if e in read:
                node = Node("expert", number, e)
                self.standing[node], self.depths[node] = front.place(depth, last), depth + 1
                last = Linear((self.standing[node],), last.width)
            linears[e] = last
        places = {e: i for i, e in enumerate(linears)}
        last_level = number + 1 == len(self.graph.levels) and not self.graph.towers
        units, columns, column = [], {}, 0
        for u, unit in enumerate(level.units):
            if not unit.computed:
                continue
            gate = self.mlp(front, number, unit.gate.mlp)[1] if unit.gate and unit.gate.sees else None
            units.append(self.unit(unit, gate, column, places, u * len(level.experts)))
            columns[u] = column
            column += unit.width if last_level else rounded_up(unit.width, COLUMN)
        self.done += front.segments(f"level {number}", number)
        for u, first in columns.items():
            self.standing[Node("unit", number, u)] = Source(len(self.done), first, level.units[u].width)
        self.done.append(Segment(f"level {number}", number, tuple(linears.values()), tuple(units), column))
        self.mixing += len(level.units) * len(level.experts)

    def mlp(self, front: _Front, level: int, mlp: Mlp) -> tuple[int, Linear]:
        """Place all stages but the last in front; return the depth of the last one, and its linear."""
        nodes = [node_of(vector, level) for vector in mlp.sources]
        sources = tuple(self.standing[node] for node in nodes)
        depth = max(self.depths.get(node, 0) for node in nodes)
        for stage in mlp.stages[:-1]:
            sources = (front.place(depth, _linear(sources, stage)),)
            depth += 1
        if not mlp.stages:
            return depth, Linear(sources, mlp.width)
        return depth, _linear(sources, mlp.stages[-1])

    def unit(self, unit: GraphUnit, gate: Linear | None, column: int, places: dict[int, int], first: int) -> Unit:
        static = unit.static
        value = dict(zip(static.experts, static.values, strict=True)) if static and static.values else {}
        learned = static is not None and static.parameter != NOTHING
        element = {e: static.offset + j for j, e in enumerate(static.experts)} if static and learned else {}
        seen = {e: j for j, e in enumerate(unit.gate.sees)} if gate and unit.gate else {}
        reads = tuple(
            Read(places[e], seen.get(e, NOTHING), value.get(e, 0.0), element.get(e, NOTHING)) for e in unit.reads
        )
        tensor = static.parameter if static and element else NOTHING
        return Unit(reads, unit.width, column, gate, tensor, tuple(self.mixing + first + e for e in unit.reads))

    def towers(self) -> None:
        level = len(self.graph.levels)
        front = _Front(len(self.done))
        linears = [self.mlp(front, level, tower)[1] for tower in self.graph.towers]
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


def _read_experts(level: Level) -> set[int]:
    """The experts that gates and other experts of this level read."""
    mlps = [unit.gate.mlp for unit in level.units if unit.computed and unit.gate and unit.gate.sees]
    mlps += [expert.mlp for expert in level.experts if expert.computed]
    return {vector.index for mlp in mlps for vector in mlp.sources if vector.kind == "expert"}
