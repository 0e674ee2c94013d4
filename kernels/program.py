"""A table as GPU launches see it: stages of linear maps and units. Plain data, no tensors and no Triton.

A *stage* is what every program of a launch can do without waiting for another row: maps over what stands below, and units that mix their
outputs. A level is one stage. What lies below its last maps (the hidden layers of its experts and gates) makes stages of its own in front
of it, whose units hand on one map each; the towers are one more level. So one kernel runs everything.

An expert that gates select is computed in such a stage in front, and its level then only copies it: its gradients, from the mix and from
the gates, meet where all gradients of a source meet.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

from fusedmoe import codec
from fusedmoe.activation import IDENTITY, Activation
from fusedmoe.table import Layer, Level, Table, Unit, product

# Columns of a stage's buffer begin at a multiple of this many numbers: 32 bytes of bfloat16, and any vector load.
COLUMN = 16
# What the kernels' 32-bit offsets inside a tile reach.
MOST_COLUMNS = 65536
X = -1
NOTHING = -1


def rounded_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


class Source(NamedTuple):
    """A vector of every row: input slot `column` of x (stage X), or columns `column`.. of the buffer of a stage."""

    stage: int
    column: int
    width: int


@dataclass(frozen=True)
class Map:
    """act(W h + b); a copy of its one source where `weight` is NOTHING. h is the concatenation of the sources, or the output of `inner`."""

    sources: tuple[Source, ...]
    width: int
    weight: int = NOTHING
    bias: int = NOTHING
    activation: Activation = IDENTITY
    inner: Map | None = None

    @property
    def reduction(self) -> int:
        """K, the width of h."""
        return self.inner.width if self.inner else sum(source.width for source in self.sources)

    @property
    def read(self) -> tuple[Source, ...]:
        """The sources that are read in the end."""
        return self.inner.read if self.inner else self.sources


class Read(NamedTuple):
    """One expert that a unit reads: its map in the stage, its row of the gate, its fixed static weight, its element of the learned ones."""

    expert: int
    seen: int = NOTHING
    value: float = 0.0
    element: int = NOTHING


@dataclass(frozen=True)
class Mix:
    """One unit: out = sum over reads of (softmax of the gate + static weight) x expert, into columns `column`.. of the stage's buffer."""

    reads: tuple[Read, ...]
    width: int
    column: int
    gate: Map | None = None
    static: int = NOTHING
    mixing: tuple[int, ...] = ()  # the column of each read's mixing weight among [B, mixing]; empty: it has none


@dataclass(frozen=True)
class Stage:
    """Maps over earlier stages, and the units that mix them; `width` is the distance between the rows of its buffer."""

    name: str
    level: int
    experts: tuple[Map, ...]
    units: tuple[Mix, ...]
    width: int


@dataclass(frozen=True, eq=False)
class Program:
    """The stages of a table, in order; the last one writes the output. Parameters are numbered as `table.parameters`."""

    table: Table
    stages: tuple[Stage, ...]

    @functools.cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each level, towers last: those of one level can be one launch."""
        return tuple(tuple(numbers) for _, numbers in itertools.groupby(range(len(self.stages)), key=lambda number: self.stages[number].level))

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where the buffer of each stage begins, in numbers a row; the last stage writes to the output and has none."""
        return tuple(itertools.accumulate((stage.width for stage in self.stages[:-1]), initial=0))

    @property
    def kept(self) -> int:
        """Numbers a row of all buffers."""
        return self.offsets[-1]

    @functools.cached_property
    def maps(self) -> tuple[Map, ...]:
        """Every map of the experts and the gates."""
        return tuple(one for stage in self.stages for one in (*stage.experts, *(unit.gate for unit in stage.units if unit.gate)))

    @functools.cached_property
    def inner(self) -> bool:
        """Whether some map has one inside."""
        return any(one.inner for one in self.maps)

    @functools.cached_property
    def copies(self) -> bool:
        """Whether some expert is a copy."""
        return any(one.weight == NOTHING for stage in self.stages for one in stage.experts)

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        """Distances in memory that decide whether vector loads reach every row: those of the weights, and where sources begin and end."""
        maps = [*self.maps, *(one.inner for one in self.maps if one.inner)]
        return tuple({self.table.width, *(size for one in maps for size in (one.reduction, *(source.width for source in one.sources)))})

    @functools.cached_property
    def reads(self) -> int:
        """The most experts that a unit reads."""
        return max(len(unit.reads) for stage in self.stages for unit in stage.units)

    @functools.cached_property
    def activations(self) -> tuple[str, ...]:
        """The names of the activations that kernels may meet."""
        return tuple(sorted({one.activation.name for one in (*self.maps, *(one.inner for one in self.maps if one.inner))}))

    @functools.cached_property
    def gradients(self) -> tuple[tuple[int, ...], int]:
        """Where the gradient of each live parameter begins among all (NOTHING for the others), and how many numbers all are."""
        sizes = [product(p.shape) if p.live else 0 for p in self.table.parameters]
        ends = list(itertools.accumulate(sizes, initial=0))
        return tuple(first if p.live else NOTHING for first, p in zip(ends, self.table.parameters, strict=False)), ends[-1]


def lower(table: Table) -> Program:
    """Return the stages of a table; only what some output depends on. Raises: ValueError, naming the map, for one of more columns than MOST_COLUMNS."""
    return _lowered(table.text)


def of_text(text: str, training: bool) -> Program:
    """`lower` of a table by its text, or `fused`."""
    return _lowered(text) if training else _fused(text)


def fused(table: Table) -> Program:
    """Return the stages of a table with hidden layers computed inside the maps above them, where a level has one stage in front of it.

    For the forward alone: its launches then are of one stage each, and hidden layers never leave the chip. A tile of columns computes the
    whole hidden layer of its experts: with n tiles of the last layer's columns, n times the FLOPs of the layer below.
    """
    return _fused(table.text)


# By the text, whose hash Python keeps: that of a table would be worked out at every call.
@functools.lru_cache(maxsize=256)
def _fused(text: str) -> Program:
    program = _lowered(text)
    stages = list(program.stages)
    for group in program.groups:
        if len(group) == 2:
            front, last = group
            maps = {Source(front, unit.column, unit.width): stages[front].experts[e] for e, unit in enumerate(stages[front].units)}
            experts = tuple(_inlined(one, maps) for one in stages[last].experts)
            units = tuple(replace(unit, gate=unit.gate and _inlined(unit.gate, maps)) for unit in stages[last].units)
            # It stays in its place, because sources name stages by their numbers.
            stages[front] = replace(stages[front], experts=(), units=(), width=0)
            stages[last] = replace(stages[last], experts=experts, units=units)
    return Program(program.table, tuple(stages))


@functools.lru_cache(maxsize=256)
def of_one_slot(program: Program) -> Program:
    """Return the forward of a program whose slots are all the same vector, as [B, D] expanded to [B, S, D] is: everything reads slot 0.

    Its experts then share one tile of x, and its gates too. Rows of the softmax and columns of the buffers stay where they are, so the backward,
    whose gradients of the slots differ, is that of the program itself.
    """

    def read(one: Map) -> Map:
        sources = tuple(source._replace(column=0) if source.stage == X else source for source in one.sources)
        return replace(one, sources=sources, inner=one.inner and read(one.inner))

    def stage_of(stage: Stage) -> Stage:
        units = tuple(replace(unit, gate=unit.gate and read(unit.gate)) for unit in stage.units)
        return replace(stage, experts=tuple(read(one) for one in stage.experts), units=units)

    return Program(program.table, tuple(stage_of(stage) for stage in program.stages))


def _inlined(one: Map, maps: dict[Source, Map]) -> Map:
    """The map over what it reads in the stage in front, computed inside of it."""
    below = maps.get(one.sources[0])
    if below is None:
        return one
    return below if one.weight == NOTHING else replace(one, sources=(), inner=below)


@functools.lru_cache(maxsize=256)
def _lowered(text: str) -> Program:
    table = codec.decode(text)
    for parameter in table.parameters:
        if max(parameter.shape, default=0) > MOST_COLUMNS and parameter.name.endswith("weight"):
            raise ValueError(
                f"{parameter.name}: the GPU backends expect at most {MOST_COLUMNS} columns, got {max(parameter.shape)}; "
                'use backend="reference" for this network'
            )
    return Program(table, tuple(_Lowering(table).stages()))


class _Front:
    """The stages in front of a level's own: hidden maps by their depth, each handed on by a unit that reads it alone."""

    def __init__(self, first: int):
        self.first = first
        self.maps: list[list[Map]] = []

    def place(self, depth: int, new: Map) -> Source:
        """Put a map into the front stage of this depth; return where its output stands."""
        while len(self.maps) <= depth:
            self.maps.append([])
        column = sum(rounded_up(old.width, COLUMN) for old in self.maps[depth])
        self.maps[depth].append(new)
        return Source(self.first + depth, column, new.width)

    def stages(self, name: str, level: int) -> list[Stage]:
        return [_handing_on(f"{name}, hidden {depth}", level, maps) for depth, maps in enumerate(self.maps)]


def _handing_on(name: str, level: int, maps: list[Map]) -> Stage:
    """A stage whose units are its maps."""
    units, column = [], 0
    for e, one in enumerate(maps):
        units.append(Mix((Read(e, value=1.0),), one.width, column))
        column += rounded_up(one.width, COLUMN)
    return Stage(name, level, tuple(maps), tuple(units), column)


class _Lowering:
    """One walk over a table, numbering parameters as it goes."""

    def __init__(self, table: Table):
        self.table = table
        self.numbers = itertools.count()
        self.statics = sum(not p.name.startswith("statics.") for p in table.parameters)
        self.done: list[Stage] = []
        self.slots = [Source(X, s, table.width) for s in range(table.slots)]
        self.root = self.slots[table.root]
        self.mixing = 0

    def stages(self) -> list[Stage]:
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
        chains = [self.parameters(expert.layers) for expert in level.experts]
        gates = [self.parameters((*u.gate.hidden, Layer(len(u.gate.sees), IDENTITY, u.gate.bias))) if u.gate else [] for u in level.units]
        selected = {u.gate.selector.index for i, u in enumerate(level.units) if i in live_units and _has_gate(u) and u.gate.selector.kind == "expert"}
        front = _Front(len(self.done))
        maps, outputs = {}, {}
        for e in sorted(live_experts):
            depth, last = self.chain(front, 0, chains[e], (self.slots[level.experts[e].slot],))
            if e in selected:
                outputs[e] = depth + 1, front.place(depth, last)
                last = Map((outputs[e][1],), last.width)
            maps[e] = last
        places = {e: i for i, e in enumerate(maps)}
        last_level = number + 1 == len(self.table.levels) and not self.table.has_towers
        units, slots, column = [], [Source(X, 0, 0)] * len(level.units), 0
        for u in sorted(live_units):
            unit = level.units[u]
            gate = None
            if _has_gate(unit):
                depth, source = outputs[unit.gate.selector.index] if unit.gate.selector.kind == "expert" else (0, self.selected(unit))
                gate = self.chain(front, depth, gates[u], (source,))[1]
            width = self.table.widths[number + 1][u]
            units.append(self.unit(unit, gate, width, column, places, u * len(level.experts)))
            slots[u] = Source(NOTHING, column, width)
            column += width if last_level else rounded_up(width, COLUMN)
        self.done += front.stages(f"level {number}", number)
        self.slots = [slot._replace(stage=len(self.done)) for slot in slots]
        self.done.append(Stage(f"level {number}", number, tuple(maps.values()), tuple(units), column))
        self.mixing += len(level.units) * len(level.experts)

    def chain(self, front: _Front, depth: int, layers: list[tuple[Layer, int, int]], sources: tuple[Source, ...]) -> tuple[int, Map]:
        """Place all layers but the last in front; return the depth of the last one, and that map."""
        for layer, weight, bias in layers[:-1]:
            sources = (front.place(depth, Map(sources, layer.width, weight, bias, layer.activation)),)
            depth += 1
        layer, weight, bias = layers[-1]
        return depth, Map(sources, layer.width, weight, bias, layer.activation)

    def selected(self, unit: Unit) -> Source:
        """The slot, or the root, that a gate reads."""
        return self.root if unit.gate.selector.kind == "root" else self.slots[unit.gate.selector.index]

    def unit(self, unit: Unit, gate: Map | None, width: int, column: int, places: dict[int, int], first: int) -> Mix:
        static = unit.static
        value = dict(zip(static.experts, static.values, strict=True)) if static and static.values else {}
        element = {e: static.offset + j for j, e in enumerate(static.experts)} if static and static.tensor is not None else {}
        seen = {e: j for j, e in enumerate(unit.gate.sees)} if gate else {}
        reads = tuple(Read(places[e], seen.get(e, NOTHING), value.get(e, 0.0), element.get(e, NOTHING)) for e in unit.reads)
        tensor = self.statics + static.tensor if element else NOTHING
        return Mix(reads, width, column, gate, tensor, tuple(self.mixing + first + e for e in unit.reads))

    def towers(self) -> None:
        front, maps = _Front(len(self.done)), []
        for task in self.table.tasks:
            sources = tuple(self.slots[u] for u in task.units)
            maps.append(self.chain(front, 0, self.parameters(task.tower), sources)[1])
        level = len(self.table.levels)
        self.done += front.stages("towers", level)
        width = maps[0].width
        last = _handing_on("towers", level, maps)
        self.done.append(replace(last, units=tuple(replace(unit, column=t * width) for t, unit in enumerate(last.units)), width=len(maps) * width))


def _has_gate(unit: Unit) -> bool:
    return unit.gate is not None and bool(unit.gate.sees)
