"""The plan of a forward: a program with its units in groups and its columns in tiles, as records in
one array of integers.

Records name each other by their place in the array; `layout.py` says what their fields mean.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusedmoe.activation import DEFAULT_PARAMETER
from fusedmoe.kernels import layout
from fusedmoe.kernels.layout import FROM_BUFFER, FROM_X, NO_SOFTMAX, TO_OUTPUT, WRITE_SOFTMAX, WRITE_WEIGHTS
from fusedmoe.kernels.program import NOTHING, Linear, Program, Segment, Source, Unit, X

# The number by which a plan names an activation.
CODES = {name: code for code, name in enumerate(DEFAULT_PARAMETER)}


@dataclass(frozen=True)
class Group:
    """Units of one width that share experts, and these experts, those of one source side by side."""

    units: tuple[int, ...]
    experts: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def groups_of(segment: Segment, most: int) -> tuple[Group, ...]:
    """Group neighbouring units of one width that share experts, at most `most` of them."""
    found: list[tuple[list[int], set[int]]] = []
    for u, unit in enumerate(segment.units):
        reads = {read.expert for read in unit.reads}
        if found:
            units, experts = found[-1]
            if len(units) < most and segment.units[units[0]].width == unit.width and experts & reads:
                units.append(u)
                experts |= reads
                continue
        found.append(([u], reads))
    return tuple(
        Group(tuple(units), tuple(sorted(experts, key=lambda e: (segment.experts[e].read, e))))
        for units, experts in found
    )


@dataclass(frozen=True)
class Launch:
    """One launch of the forward: for each program of a row block, the place of its first tile and
    behind its last one."""

    segments: tuple[int, ...]
    place: int
    programs: int


@dataclass(frozen=True, eq=False)
class Plan:
    """What goes to the device, and the launches. The softmax scratch is [softmax, B]; `rows` has
    the first row of each unit, by segment and number."""

    program: Program
    ints: tuple[int, ...]
    floats: tuple[float, ...]
    launches: tuple[Launch, ...]
    softmax: int
    rows: dict[tuple[int, int], int]
    units: int


class Writer:
    """Writes records into one array, each once."""

    def __init__(self, program: Program):
        self.program = program
        self.ints: list[int] = []
        self.floats: list[float] = []
        self.known: dict[object, int] = {}

    def put(self, values: Iterable[int]) -> int:
        """Append integers, and return the place of the first one."""
        place = len(self.ints)
        self.ints += values
        return place

    def launch(self, segments: Sequence[int], first: int, tiles: int, size: int, own: bool) -> Launch:
        """A launch of tiles that lie one after another: each has a program of its own (`own`), or
        all have the same one."""
        bounds = [first + size * tile for tile in range(tiles + 1)] if own else [first, first + size * tiles]
        place = self.put(end for pair in itertools.pairwise(bounds) for end in pair)
        return Launch(tuple(segments), place, len(bounds) - 1)

    def put_floats(self, values: Sequence[float]) -> int:
        place = len(self.floats)
        self.floats += values
        return place

    def place(self, segment: int, column: int) -> list[int]:
        """Where columns of x, of a segment's buffer or of the output begin."""
        if segment == X:
            return layout.PLACE.pack(kind=FROM_X, column=column, stride=0, buffer=0)
        width = self.program.segments[segment].width
        if segment + 1 == len(self.program.segments):
            return layout.PLACE.pack(kind=TO_OUTPUT, column=column, stride=width, buffer=0)
        return layout.PLACE.pack(kind=FROM_BUFFER, column=column, stride=width, buffer=self.program.offsets[segment])

    def source(self, source: Source, first: int = 0) -> list[int]:
        """A source that is multiplied by the columns of W from `first` on."""
        return layout.SOURCE.pack(place=self.place(source.segment, source.column), width=source.width, first=first)

    def linear(self, linear: Linear) -> int:
        if linear not in self.known:
            head = layout.LINEAR.pack(
                weight=linear.weight,
                bias=linear.bias,
                width=linear.width,
                reduction=linear.reduction,
                activation=CODES[linear.activation.name],
                parameter=self.put_floats([linear.activation.parameter]),
                hidden=self.linear(linear.hidden) if linear.hidden else NOTHING,
                sources=len(linear.sources),
            )
            firsts = itertools.accumulate((source.width for source in linear.sources), initial=0)
            sources = [
                number
                for source, first in zip(linear.sources, firsts, strict=False)
                for number in self.source(source, first)
            ]
            self.known[linear] = self.put(head + sources)
        return self.known[linear]

    def unit(self, segment: int, number: int) -> int:
        if (segment, number) not in self.known:
            unit: Unit = self.program.segments[segment].units[number]
            values = layout.UNIT.pack(
                gate=self.linear(unit.gate) if unit.gate else NOTHING,
                reads=len(unit.reads),
                seen=self.put(read.seen for read in unit.reads),
                statics=unit.static,
                elements=self.put(read.element for read in unit.reads),
                fixed=self.put_floats([read.value for read in unit.reads]),
                place=self.place(segment, unit.column),
                mixing=self.put(unit.mixing) if unit.mixing else NOTHING,
            )
            self.known[segment, number] = self.put(values)
        return self.known[segment, number]

    def group(self, segment: int, group: Group, most: int) -> int:
        level = self.program.segments[segment]
        units = [level.units[u] for u in group.units]
        rows = [sum(len(unit.reads) for unit in units[:i]) for i in range(len(units))]
        padding = [NOTHING] * (most - len(units))
        records = [self.unit(segment, u) for u in group.units]
        linears = [self.linear(level.experts[e]) for e in group.experts]
        places = [{read.expert: i for i, read in enumerate(unit.reads)} for unit in units]
        experts = {
            e: [*layout.EXPERT_READ.pack(linear=linear), *(place.get(e, NOTHING) for place in places), *padding]
            for e, linear in zip(group.experts, linears, strict=True)
        }
        copies = [e for e in group.experts if level.experts[e].weight == NOTHING]
        computed = [e for e in group.experts if e not in copies]
        runs = [list(run) for _, run in itertools.groupby(computed, key=lambda e: level.experts[e].read)]
        body = [number for run in runs for number in self.run(level.experts[run[0]].read[0], [experts[e] for e in run])]
        body += [number for e in copies for number in experts[e]]
        selectors = self.selectors(units, list(zip(records, rows, strict=True)))
        head = layout.GROUP.pack(
            units=len(units), width=units[0].width, runs=len(runs), copies=len(copies), selectors=selectors
        )
        return self.put([*head, *records, *padding, *rows, *padding, *body])

    def run(self, source: Source, readers: Sequence[Sequence[int]]) -> list[int]:
        """A source, and the records of those that read it."""
        head = layout.RUN.pack(source=self.source(source), count=len(readers))
        return [*head, *(number for reader in readers for number in reader)]

    def selectors(self, units: list[Unit], places: list[tuple[int, int]]) -> int:
        """The number of sources that the gates of these units read, and each with its gates; units
        without a gate read nothing."""
        by_source: dict[Source, list[list[int]]] = {}
        for unit, (record, row) in zip(units, places, strict=True):
            source = unit.gate.read[0] if unit.gate else Source(X, 0, 0)
            by_source.setdefault(source, []).append(layout.GATE_READ.pack(unit=record, row=row))
        runs = [self.run(source, gates) for source, gates in by_source.items()]
        return self.put([len(runs), *(number for run in runs for number in run)])


def launches_of(program: Program, whole: bool) -> tuple[tuple[int, ...], ...]:
    """The segments of each launch: all of them (`whole`), or those of a level."""
    return (tuple(range(len(program.segments))),) if whole else program.levels


@functools.lru_cache(maxsize=1024)
def plan_of(program: Program, whole: bool, most: int, columns: int) -> Plan:
    """Write a program down.

    Args:
        program: the segments.
        whole: run all segments in one launch, whose programs own their rows; otherwise one launch a
            level.
        most: units that a program mixes at a time.
        columns: of a tile.

    A launch of one segment gives each tile a program of its own. A launch of several runs all tiles
    in each program, segment after segment.
    """
    write = Writer(program)
    softmax, launches, first_rows = 0, [], {}
    for launch in launches_of(program, whole):
        segments = [segment for segment in launch if program.segments[segment].units]
        tiles: list[list[int]] = []
        for segment in segments:
            wait = bool(tiles)
            for group in groups_of(program.segments[segment], most):
                record = write.group(segment, group, most)
                units = [program.segments[segment].units[u] for u in group.units]
                rows = softmax
                for u, unit in zip(group.units, units, strict=True):
                    first_rows[segment, u] = rows
                    rows += len(unit.reads)
                rows -= softmax
                for column in range(0, max(units[0].width, 1), columns):
                    # A program of its own has a softmax of its own: no two programs write to one
                    # address.
                    fresh = column == 0 or len(segments) == 1
                    task = NO_SOFTMAX if not fresh else WRITE_WEIGHTS if column == 0 else WRITE_SOFTMAX
                    tiles.append(
                        layout.TILE.pack(group=record, column=column, softmax=softmax, task=task, wait=int(wait))
                    )
                    softmax += rows if len(segments) == 1 or column + columns >= units[0].width else 0
                    wait = False
        first = write.put(number for tile in tiles for number in tile)
        launches.append(write.launch(segments, first, len(tiles), layout.TILE.size, own=len(segments) == 1))
    return Plan(program, tuple(write.ints), tuple(write.floats), tuple(launches), softmax, first_rows, most)
