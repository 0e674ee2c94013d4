"""The integers that kernels read: a program with its units in groups and its columns in tiles, written into one array.

Records point at each other by their place in the array. `Ints` writes them; the orders below are what `records.py` reads.

    source   kind, column or slot, distance of rows, offset of the buffer in numbers a row, width, first column of W
    map      weight, bias, width, K, activation, its parameter (place among the floats), map inside (or -1), number of sources, sources
    unit     map of the gate, number of reads, seen rows, static tensor, its elements, fixed values, where it goes (4 of a source), columns of its
             mixing weights
    group    number of units, width, numbers of runs and of copies, its selectors; units and their first rows of softmax; runs; copies
    selectors  their number; of each the source, number of units whose gates read it; units and their first rows of softmax
    run      the source of its experts, their number; experts: map and place in each unit's reads; a copy is an expert too
    tile     group, first column, first row of softmax, whether to compute the softmax, whether to wait for the tiles before
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusedmoe.activation import DEFAULT_PARAMETER
from fusedmoe.kernels.program import NOTHING, Map, Mix, Program, Source, Stage, X

# The number by which a plan names an activation.
CODES = {name: code for code, name in enumerate(DEFAULT_PARAMETER)}
# Kinds of a source: input slot, buffer of a stage, the output.
FROM_X, FROM_BUFFER, TO_OUTPUT = range(3)
# Numbers of a tile, of a map before its sources, of a source, and of a group before its units.
TILE, MAP_HEAD, SOURCE, GROUP_HEAD = 5, 8, 6, 5


@dataclass(frozen=True)
class Group:
    """Units of one width that share experts, and these experts, those of one source side by side."""

    units: tuple[int, ...]
    experts: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def groups_of(stage: Stage, most: int) -> tuple[Group, ...]:
    """Group neighbouring units of one width that share experts, at most `most` of them."""
    groups: list[tuple[list[int], set[int]]] = []
    for u, unit in enumerate(stage.units):
        reads = {read.expert for read in unit.reads}
        if groups:
            units, experts = groups[-1]
            if len(units) < most and stage.units[units[0]].width == unit.width and experts & reads:
                units.append(u)
                experts |= reads
                continue
        groups.append(([u], reads))
    return tuple(Group(tuple(units), tuple(sorted(experts, key=lambda e: (stage.experts[e].read, e)))) for units, experts in groups)


@dataclass(frozen=True)
class Launch:
    """One launch of the forward: for each program of a row block, the place of its first tile and behind its last one."""

    stages: tuple[int, ...]
    place: int
    programs: int


@dataclass(frozen=True, eq=False)
class Plan:
    """What goes to the device, and the launches. The softmax scratch is [softmax, B]; `rows` has the first row of each unit, by stage and number."""

    program: Program
    ints: tuple[int, ...]
    floats: tuple[float, ...]
    launches: tuple[Launch, ...]
    softmax: int
    rows: dict[tuple[int, int], int]
    units: int


class Ints:
    """Writes records, each once."""

    def __init__(self, program: Program):
        self.program = program
        self.ints: list[int] = []
        self.floats: list[float] = []
        self.known: dict[object, int] = {}

    def put(self, values: Iterable[int]) -> int:
        place = len(self.ints)
        self.ints += values
        return place

    def put_floats(self, values: Sequence[float]) -> int:
        place = len(self.floats)
        self.floats += values
        return place

    def place(self, stage: int, column: int) -> tuple[int, int, int, int]:
        """The first four numbers of a source."""
        if stage == X:
            return FROM_X, column, 0, 0
        width = self.program.stages[stage].width
        if stage + 1 == len(self.program.stages):
            return TO_OUTPUT, column, width, 0
        return FROM_BUFFER, column, width, self.program.offsets[stage]

    def sources(self, sources: tuple[Source, ...]) -> list[int]:
        result, first = [], 0
        for source in sources:
            result += [*self.place(source.stage, source.column), source.width, first]
            first += source.width
        return result

    def map(self, one: Map) -> int:
        if one not in self.known:
            parameter = self.put_floats([one.activation.parameter])
            inner = self.map(one.inner) if one.inner else NOTHING
            head = [one.weight, one.bias, one.width, one.reduction, CODES[one.activation.name], parameter, inner, len(one.sources)]
            self.known[one] = self.put(head + self.sources(one.sources))
        return self.known[one]

    def unit(self, stage: int, number: int) -> int:
        if (stage, number) not in self.known:
            unit: Mix = self.program.stages[stage].units[number]
            gate = self.map(unit.gate) if unit.gate else NOTHING
            seen = self.put(read.seen for read in unit.reads)
            elements = self.put(read.element for read in unit.reads)
            mixing = self.put(unit.mixing) if unit.mixing else NOTHING
            fixed = self.put_floats([read.value for read in unit.reads])
            self.known[stage, number] = self.put([gate, len(unit.reads), seen, unit.static, elements, fixed, *self.place(stage, unit.column), mixing])
        return self.known[stage, number]

    def group(self, stage: int, group: Group, most: int) -> int:
        level = self.program.stages[stage]
        units = [level.units[u] for u in group.units]
        rows = [sum(len(unit.reads) for unit in units[:i]) for i in range(len(units))]
        padding = [NOTHING] * (most - len(units))
        records = [self.unit(stage, u) for u in group.units]
        maps = [self.map(level.experts[e]) for e in group.experts]
        places = [{read.expert: i for i, read in enumerate(unit.reads)} for unit in units]
        experts = {e: [one, *(place.get(e, NOTHING) for place in places), *padding] for e, one in zip(group.experts, maps, strict=True)}
        copies = [e for e in group.experts if level.experts[e].weight == NOTHING]
        runs = [list(run) for _, run in itertools.groupby((e for e in group.experts if e not in copies), key=lambda e: level.experts[e].read)]
        body = []
        for run in runs:
            body += [*self.sources(level.experts[run[0]].read[:1]), len(run), *(number for e in run for number in experts[e])]
        body += [number for e in copies for number in experts[e]]
        selectors = self.selectors(units, list(zip(records, rows, strict=True)))
        return self.put([len(units), units[0].width, len(runs), len(copies), selectors, *records, *padding, *rows, *padding, *body])

    def selectors(self, units: list[Mix], places: list[tuple[int, int]]) -> int:
        """What the gates of these units read, each source once; units without a gate read nothing."""
        by_source: dict[Source, list[int]] = {}
        for unit, place in zip(units, places, strict=True):
            by_source.setdefault(unit.gate.read[0] if unit.gate else Source(X, 0, 0), []).extend(place)
        bodies = [[*self.sources((source,)), len(of) // 2, *of] for source, of in by_source.items()]
        return self.put([len(bodies), *(number for body in bodies for number in body)])


def launches_of(program: Program, whole: bool) -> tuple[tuple[int, ...], ...]:
    """The stages of each launch: all of them (`whole`), or those of a level."""
    return (tuple(range(len(program.stages))),) if whole else program.groups


@functools.lru_cache(maxsize=1024)
def plan_of(program: Program, whole: bool, most: int, columns: int) -> Plan:
    """Write a program down.

    Args:
        program: the stages.
        whole: run all stages in one launch, whose programs own their rows; otherwise one launch a level.
        most: units that a program mixes at a time.
        columns: of a tile.

    A launch of one stage gives each tile a program of its own. A launch of several runs all tiles in each program, stage after stage.
    """
    write = Ints(program)
    softmax, launches, first_rows = 0, [], {}
    for launch in launches_of(program, whole):
        stages = [stage for stage in launch if program.stages[stage].units]
        tiles: list[list[int]] = []
        for stage in stages:
            wait = bool(tiles)
            for group in groups_of(program.stages[stage], most):
                record = write.group(stage, group, most)
                units = [program.stages[stage].units[u] for u in group.units]
                rows = softmax
                for u, unit in zip(group.units, units, strict=True):
                    first_rows[stage, u] = rows
                    rows += len(unit.reads)
                rows -= softmax
                for column in range(0, max(units[0].width, 1), columns):
                    # A program of its own has a softmax of its own: no two programs write to one address.
                    fresh = column == 0 or len(stages) == 1
                    tiles.append([record, column, softmax, int(fresh) + int(fresh and column == 0), int(wait)])
                    softmax += rows if len(stages) == 1 or column + columns >= units[0].width else 0
                    wait = False
        first = write.put(number for tile in tiles for number in tile)
        ends = [(first + TILE * i, first + TILE * (i + 1)) for i in range(len(tiles))] if len(stages) == 1 else [(first, first + TILE * len(tiles))]
        launches.append(Launch(tuple(stages), write.put(end for pair in ends for end in pair), len(ends)))
    return Plan(program, tuple(write.ints), tuple(write.floats), tuple(launches), softmax, first_rows, most)
