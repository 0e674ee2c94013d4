"""The plan of a forward: a program with its units in groups and its columns in tiles, as records in
one array of integers (`writer.py`)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fusedmoe.kernels import layout
from fusedmoe.kernels.layout import NO_SOFTMAX, WRITE_SOFTMAX, WRITE_WEIGHTS
from fusedmoe.kernels.program import NOTHING, Mix, Program, Segment, Source, Unit, X
from fusedmoe.kernels.rowwise import Operations
from fusedmoe.kernels.writer import Launch, Writer


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


@dataclass(frozen=True, eq=False)
class Plan:
    """What goes to the device, and the launches. The softmax scratch is [softmax, B]; `rows` has
    the first row of each unit, by segment and number, which counts operations in a segment of them."""

    program: Program
    ints: tuple[int, ...]
    floats: tuple[float, ...]
    launches: tuple[Launch, ...]
    softmax: int
    rows: dict[tuple[int, int], int]
    units: int


class _ForwardWriter(Writer):
    """A writer of launches. softmax: rows of its scratch; rows: the first one of each unit."""

    def __init__(self, program: Program):
        super().__init__(program)
        self.softmax = 0
        self.rows: dict[tuple[int, int], int] = {}

    def rowwise(self, launch: Sequence[int]) -> Launch:
        """A launch of segments of operations."""
        records = []
        for segment in launch:
            for number, operation in enumerate(self.program.segments[segment].operations):
                self.rows[segment, number] = self.softmax
                records.append(Operations(self, segment).record(operation, self.softmax))
                self.softmax += len(operation.unit.reads) if isinstance(operation, Mix) else 0
        return self.operations(launch, records)

    def tiles(self, launch: Sequence[int], most: int, columns: int) -> Launch:
        """A launch of segments of linears and units."""
        segments = [segment for segment in launch if self.program.segments[segment].units]
        tiles: list[list[int]] = []
        for segment in segments:
            wait = bool(tiles)
            for group in groups_of(self.program.segments[segment], most):
                record = self.group(segment, group, most)
                units = [self.program.segments[segment].units[u] for u in group.units]
                rows = self.softmax
                for u, unit in zip(group.units, units, strict=True):
                    self.rows[segment, u] = rows
                    rows += len(unit.reads)
                rows -= self.softmax
                for column in range(0, max(units[0].width, 1), columns):
                    # A program of its own has a softmax of its own: no two programs write to one
                    # address.
                    fresh = column == 0 or len(segments) == 1
                    task = NO_SOFTMAX if not fresh else WRITE_WEIGHTS if column == 0 else WRITE_SOFTMAX
                    tiles.append(
                        layout.TILE.pack(group=record, column=column, softmax=self.softmax, task=task, wait=int(wait))
                    )
                    self.softmax += rows if len(segments) == 1 or column + columns >= units[0].width else 0
                    wait = False
        first = self.put(number for tile in tiles for number in tile)
        return self.launch(segments, first, len(tiles), layout.TILE.size, own=len(segments) == 1)

    def group(self, segment: int, group: Group, most: int) -> int:
        level = self.program.segments[segment]
        units = [level.units[u] for u in group.units]
        rows = [sum(len(unit.reads) for unit in units[:i]) for i in range(len(units))]
        padding = [NOTHING] * (most - len(units))
        records = [self.unit(segment, unit) for unit in units]
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
    """The segments of each launch: all of them (`whole`), or those of a level, but for row-wise ones,
    which are launches of their own."""
    launches: list[tuple[int, ...]] = []
    for group in (tuple(range(len(program.segments))),) if whole else program.levels:
        for rowwise, run in itertools.groupby(group, key=lambda number: bool(program.segments[number].operations)):
            found = tuple(run)
            # Those that follow each other can be one.
            if rowwise and launches and program.segments[launches[-1][-1]].operations:
                found = launches.pop() + found
            launches.append(found)
    return tuple(launches)


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
    write = _ForwardWriter(program)
    launches = [
        write.rowwise(launch) if program.segments[launch[0]].operations else write.tiles(launch, most, columns)
        for launch in launches_of(program, whole)
    ]
    return Plan(program, tuple(write.ints), tuple(write.floats), tuple(launches), write.softmax, write.rows, most)
