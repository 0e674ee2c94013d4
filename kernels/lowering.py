"""From a table to its program: which linears and units make a segment, and what a forward alone leaves on the chip."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

from fusedmoe import codec
from fusedmoe.activation import IDENTITY
from fusedmoe.kernels.program import (
    COLUMN,
    MOST_COLUMNS,
    NOTHING,
    Linear,
    Program,
    Read,
    Segment,
    Source,
    Unit,
    X,
    rounded_up,
)
from fusedmoe.table import Layer, Level, Table
from fusedmoe.table import Unit as TableUnit


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
    for parameter in table.parameters:
        if max(parameter.shape, default=0) > MOST_COLUMNS and parameter.name.endswith("weight"):
            raise ValueError(
                f"{parameter.name}: the GPU backends expect at most {MOST_COLUMNS} columns, got "
                f"{max(parameter.shape)}; "
                'use backend="reference" for this network'
            )
    return Program(table, tuple(_Lowering(table).segments()))


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
    """One walk over a table, numbering parameters as it goes."""

    def __init__(self, table: Table):
        self.table = table
        self.numbers = itertools.count()
        self.statics = sum(not p.name.startswith("statics.") for p in table.parameters)
        self.done: list[Segment] = []
        self.slots = [Source(X, s, table.width) for s in range(table.slots)]
        self.root = self.slots[table.root]
        self.mixing = 0

    def segments(self) -> list[Segment]:
        for number, level in enumerate(self.table.levels):
            self.level(number, level)
        if self.table.has_towers:
            self.towers()
        return self.done

    def parameters(self, layers: tuple[Layer, ...]) -> list[tuple[Layer, int, int]]:
        """Each layer with the numbers of its weight and bias."""
        return [(layer, next(self.numbers), next(self.numbers) if layer.bias else NOTHING) for layer in layers]

    def level(self, number: int, level: Level) -> None:
        live_units, live_experts = self.table.live[number]
        mlps = [self.parameters(expert.layers) for expert in level.experts]
        gates = [
            self.parameters((*u.gate.hidden, Layer(len(u.gate.sees), IDENTITY, u.gate.bias))) if u.gate else []
            for u in level.units
        ]
        selected = {
            u.gate.selector.index
            for i, u in enumerate(level.units)
            if i in live_units and _has_gate(u) and u.gate.selector.kind == "expert"
        }
        front = _Front(len(self.done))
        linears, outputs = {}, {}
        for e in sorted(live_experts):
            depth, last = self.mlp(front, 0, mlps[e], (self.slots[level.experts[e].slot],))
            if e in selected:
                outputs[e] = depth + 1, front.place(depth, last)
                last = Linear((outputs[e][1],), last.width)
            linears[e] = last
        places = {e: i for i, e in enumerate(linears)}
        last_level = number + 1 == len(self.table.levels) and not self.table.has_towers
        units, slots, column = [], [Source(X, 0, 0)] * len(level.units), 0
        for u in sorted(live_units):
            unit = level.units[u]
            gate = None
            if _has_gate(unit):
                depth, source = (
                    outputs[unit.gate.selector.index]
                    if unit.gate.selector.kind == "expert"
                    else (0, self.selected(unit))
                )
                gate = self.mlp(front, depth, gates[u], (source,))[1]
            width = self.table.widths[number + 1][u]
            units.append(self.unit(unit, gate, width, column, places, u * len(level.experts)))
            slots[u] = Source(NOTHING, column, width)
            column += width if last_level else rounded_up(width, COLUMN)
        self.done += front.segments(f"level {number}", number)
        self.slots = [slot._replace(segment=len(self.done)) for slot in slots]
        self.done.append(Segment(f"level {number}", number, tuple(linears.values()), tuple(units), column))
        self.mixing += len(level.units) * len(level.experts)

    def mlp(
        self, front: _Front, depth: int, layers: list[tuple[Layer, int, int]], sources: tuple[Source, ...]
    ) -> tuple[int, Linear]:
        """Place all layers but the last in front; return the depth of the last one, and that linear."""
        for layer, weight, bias in layers[:-1]:
            sources = (front.place(depth, Linear(sources, layer.width, weight, bias, layer.activation)),)
            depth += 1
        layer, weight, bias = layers[-1]
        return depth, Linear(sources, layer.width, weight, bias, layer.activation)

    def selected(self, unit: TableUnit) -> Source:
        """The slot, or the root, that a gate reads."""
        return self.root if unit.gate.selector.kind == "root" else self.slots[unit.gate.selector.index]

    def unit(
        self, unit: TableUnit, gate: Linear | None, width: int, column: int, places: dict[int, int], first: int
    ) -> Unit:
        static = unit.static
        value = dict(zip(static.experts, static.values, strict=True)) if static and static.values else {}
        element = (
            {e: static.offset + j for j, e in enumerate(static.experts)} if static and static.tensor is not None else {}
        )
        seen = {e: j for j, e in enumerate(unit.gate.sees)} if gate else {}
        reads = tuple(
            Read(places[e], seen.get(e, NOTHING), value.get(e, 0.0), element.get(e, NOTHING)) for e in unit.reads
        )
        tensor = self.statics + static.tensor if element else NOTHING
        return Unit(reads, width, column, gate, tensor, tuple(self.mixing + first + e for e in unit.reads))

    def towers(self) -> None:
        front, linears = _Front(len(self.done)), []
        for task in self.table.tasks:
            sources = tuple(self.slots[u] for u in task.units)
            linears.append(self.mlp(front, 0, self.parameters(task.tower), sources)[1])
        level = len(self.table.levels)
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


def _has_gate(unit: TableUnit) -> bool:
    return unit.gate is not None and bool(unit.gate.sees)
