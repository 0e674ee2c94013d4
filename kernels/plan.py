"""The plan of a forward: a program with its units in groups and its columns in tiles, as records in one array of integers.

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
from fusedmoe.kernels.program import NOTHING, Map, Mix, Program, Source, Stage, X

# The number by which a plan names an activation.
CODES = {name: code for code, name in enumerate(DEFAULT_PARAMETER)}


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

    def launch(self, stages: Sequence[int], first: int, tiles: int, size: int, own: bool) -> Launch:
        """A launch of tiles that lie one after another: each has a program of its own (`own`), or all have the same one."""
        bounds = [first + size * tile for tile in range(tiles + 1)] if own else [first, first + size * tiles]
        place = self.put(end for pair in itertools.pairwise(bounds) for end in pair)
        return Launch(tuple(stages), place, len(bounds) - 1)

    def put_floats(self, values: Sequence[float]) -> int:
        place = len(self.floats)
        self.floats += values
        return place

    def place(self, stage: int, column: int) -> list[int]:
        """Where columns of x, of a stage's buffer or of the output begin."""
        if stage == X:
            return layout.PLACE.pack(kind=FROM_X, column=column, stride=0, buffer=0)
        width = self.program.stages[stage].width
        if stage + 1 == len(self.program.stages):
            return layout.PLACE.pack(kind=TO_OUTPUT, column=column, stride=width, buffer=0)
        return layout.PLACE.pack(kind=FROM_BUFFER, column=column, stride=width, buffer=self.program.offsets[stage])

    def source(self, source: Source, first: int = 0) -> list[int]:
        """A source that is multiplied by the columns of W from `first` on."""
        return layout.SOURCE.pack(place=self.place(source.stage, source.column), width=source.width, first=first)

    def map(self, one: Map) -> int:
        if one not in self.known:
            head = layout.LINEAR.pack(
                weight=one.weight,
                bias=one.bias,
                width=one.width,
                reduction=one.reduction,
                activation=CODES[one.activation.name],
                parameter=self.put_floats([one.activation.parameter]),
                hidden=self.map(one.inner) if one.inner else NOTHING,
                sources=len(one.sources),
            )
            firsts = itertools.accumulate((source.width for source in one.sources), initial=0)
            sources = [number for source, first in zip(one.sources, firsts, strict=False) for number in self.source(source, first)]
            self.known[one] = self.put(head + sources)
        return self.known[one]

    def unit(self, stage: int, number: int) -> int:
        if (stage, number) not in self.known:
            unit: Mix = self.program.stages[stage].units[number]
            values = layout.UNIT.pack(
                gate=self.map(unit.gate) if unit.gate else NOTHING,
                reads=len(unit.reads),
                seen=self.put(read.seen for read in unit.reads),
                statics=unit.static,
                elements=self.put(read.element for read in unit.reads),
                fixed=self.put_floats([read.value for read in unit.reads]),
                place=self.place(stage, unit.column),
                mixing=self.put(unit.mixing) if unit.mixing else NOTHING,
            )
            self.known[stage, number] = self.put(values)
        return self.known[stage, number]

    def group(self, stage: int, group: Group, most: int) -> int:
        level = self.program.stages[stage]
        units = [level.units[u] for u in group.units]
        rows = [sum(len(unit.reads) for unit in units[:i]) for i in range(len(units))]
        padding = [NOTHING] * (most - len(units))
        records = [self.unit(stage, u) for u in group.units]
        maps = [self.map(level.experts[e]) for e in group.experts]
        places = [{read.expert: i for i, read in enumerate(unit.reads)} for unit in units]
        experts = {
            e: [*layout.EXPERT_READ.pack(linear=one), *(place.get(e, NOTHING) for place in places), *padding]
            for e, one in zip(group.experts, maps, strict=True)
        }
        copies = [e for e in group.experts if level.experts[e].weight == NOTHING]
        computed = [e for e in group.experts if e not in copies]
        runs = [list(run) for _, run in itertools.groupby(computed, key=lambda e: level.experts[e].read)]
        body = [number for run in runs for number in self.run(level.experts[run[0]].read[0], [experts[e] for e in run])]
        body += [number for e in copies for number in experts[e]]
        selectors = self.selectors(units, list(zip(records, rows, strict=True)))
        head = layout.GROUP.pack(units=len(units), width=units[0].width, runs=len(runs), copies=len(copies), selectors=selectors)
        return self.put([*head, *records, *padding, *rows, *padding, *body])

    def run(self, source: Source, readers: Sequence[Sequence[int]]) -> list[int]:
        """A source, and the records of those that read it."""
        head = layout.RUN.pack(source=self.source(source), count=len(readers))
        return [*head, *(number for reader in readers for number in reader)]

    def selectors(self, units: list[Mix], places: list[tuple[int, int]]) -> int:
        """The number of sources that the gates of these units read, and each with its gates; units without a gate read nothing."""
        by_source: dict[Source, list[list[int]]] = {}
        for unit, (record, row) in zip(units, places, strict=True):
            source = unit.gate.read[0] if unit.gate else Source(X, 0, 0)
            by_source.setdefault(source, []).append(layout.GATE_READ.pack(unit=record, row=row))
        runs = [self.run(source, gates) for source, gates in by_source.items()]
        return self.put([len(runs), *(number for run in runs for number in run)])


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
    write = Writer(program)
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
                    task = NO_SOFTMAX if not fresh else WRITE_WEIGHTS if column == 0 else WRITE_SOFTMAX
                    tiles.append(layout.TILE.pack(group=record, column=column, softmax=softmax, task=task, wait=int(wait)))
                    softmax += rows if len(stages) == 1 or column + columns >= units[0].width else 0
                    wait = False
        first = write.put(number for tile in tiles for number in tile)
        launches.append(write.launch(stages, first, len(tiles), layout.TILE.size, own=len(stages) == 1))
    return Plan(program, tuple(write.ints), tuple(write.floats), tuple(launches), softmax, first_rows, most)
