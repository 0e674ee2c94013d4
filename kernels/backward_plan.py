"""The backward of a program, written down: the tiles of `backward_rows` from the last segment to
the first, and those of `gradients`."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from fusedmoe.graph import product
from fusedmoe.kernels import layout
from fusedmoe.kernels.layout import EXPERT_KIND, MATRIX_KIND, SOURCE_KIND, STATIC_KIND
from fusedmoe.kernels.plan import Launch, Plan, Writer
from fusedmoe.kernels.program import COLUMN, NOTHING, Linear, Program, Segment, Source, X, rounded_up


@dataclass(frozen=True, eq=False)
class BackwardPlan:
    """What goes to the device. `dz` is [B, columns] in all; `dw` [rows, B]; `tasks` programs of
    `gradients` find their records from `place` on."""

    ints: tuple[int, ...]
    floats: tuple[float, ...]
    launches: tuple[Launch, ...]
    columns: int
    rows: int
    place: int
    tasks: int


@functools.lru_cache(maxsize=1024)
def backward_plan_of(plan: Plan, whole: bool, columns: int, block_n: int) -> BackwardPlan:
    """Write the backward down.

    Args:
        plan: of the forward, which says where each unit's softmax stands.
        whole: run all row-local tiles in one launch.
        columns: of a row-local tile, and of the tile of a dW.
        block_n: rows of the tile of a dW.
    """
    return _BackwardWriter(plan, columns, block_n).write(whole)


class _BackwardWriter:
    def __init__(self, plan: Plan, columns: int, block_n: int):
        self.softmax = plan.rows
        self.program: Program = plan.program
        self.writer = Writer(self.program)
        self.block, self.block_n = columns, block_n
        # Column of dz of a segment's expert, or of a unit's gate.
        self.dz: dict[tuple[int, str, int], int] = {}
        self.columns = 0
        # First row, tiles and distance of a unit's dw.
        self.dw: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.rows = 0
        self.written: set[Source] = set()
        for number, segment in enumerate(self.program.segments):
            self.reserve(number, segment)

    def reserve(self, number: int, segment: Segment) -> None:
        for e, linear in enumerate(segment.experts):
            self.dz[number, "expert", e] = self.columns
            self.columns += rounded_up(linear.width, COLUMN)
        for u, unit in enumerate(segment.units):
            if unit.gate:
                self.dz[number, "gate", u] = self.columns
                self.columns += rounded_up(unit.gate.width, COLUMN)
            tiles = -(-unit.width // self.block)
            self.dw[number, u] = (self.rows, tiles, len(unit.reads))
            self.rows += tiles * len(unit.reads)

    def write(self, whole: bool) -> BackwardPlan:
        levels = [tuple(range(len(self.program.segments)))] if whole else list(self.program.levels)
        launches = []
        for segments in reversed(levels):
            phases = [tiles for number in reversed(segments) for tiles in (self.experts(number), self.sources(number))]
            if len(segments) == 1 and not whole:
                launches += [self.launch(segments, [tiles], own=True) for tiles in phases if tiles]
            else:
                launches.append(self.launch(segments, phases, own=False))
        tasks = self.tasks()
        place = self.writer.put(tasks)
        return BackwardPlan(
            tuple(self.writer.ints),
            tuple(self.writer.floats),
            tuple(launches),
            self.columns,
            self.rows,
            place,
            len(tasks),
        )

    def launch(self, segments: tuple[int, ...], phases: list[list[tuple[int, int]]], own: bool) -> Launch:
        """A launch whose tiles have a program each (`own`), or all the same one."""
        tiles = [
            layout.BACKWARD_TILE.pack(kind=kind, record=record, wait=int(i == 0 and not own))
            for phase in phases
            for i, (kind, record) in enumerate(phase)
        ]
        first = self.writer.put(number for tile in tiles for number in tile)
        return self.writer.launch(segments, first, len(tiles), layout.BACKWARD_TILE.size, own)

    def experts(self, number: int) -> list[tuple[int, int]]:
        segment = self.program.segments[number]
        tiles = []
        for e, linear in enumerate(segment.experts):
            record = self.writer.linear(linear)
            for tile, column in enumerate(range(0, linear.width, self.block)):
                readers = [
                    self.reader(number, u, place, tile)
                    for u, unit in enumerate(segment.units)
                    for place, read in enumerate(unit.reads)
                    if read.expert == e
                ]
                dz = self.dz[number, "expert", e]
                head = layout.EXPERT_TILE.pack(
                    linear=record, column=column, width=linear.width, dz=dz, readers=len(readers)
                )
                tiles.append((EXPERT_KIND, self.writer.put(itertools.chain(head, *readers))))
        return tiles

    def reader(self, number: int, u: int, place: int, tile: int) -> list[int]:
        """A unit that reads an expert, for one tile of the expert's columns."""
        first, _, stride = self.dw[number, u]
        return layout.READER.pack(
            place=self.writer.place(number, self.program.segments[number].units[u].column),
            p=self.softmax[number, u] + place,
            dw=first + tile * stride + place,
            unit=self.writer.unit(number, u),
            read=place,
        )

    def sources(self, number: int) -> list[tuple[int, int]]:
        segment = self.program.segments[number]
        uses: dict[Source, list[list[int]]] = {}
        selections: dict[Source, list[tuple[int, Linear]]] = {}
        for e, linear in enumerate(segment.experts):
            first = 0
            for source in linear.sources:
                dz = self.dz[number, "expert", e]
                use = layout.USE.pack(
                    weight=linear.weight, outputs=linear.width, reduction=linear.reduction, first=first, dz=dz
                )
                uses.setdefault(source, []).append(use)
                first += source.width
        for u, unit in enumerate(segment.units):
            if unit.gate:
                selections.setdefault(unit.gate.sources[0], []).append((u, unit.gate))
        everything = [*uses, *(source for source in selections if source not in uses)]
        if number == 0:
            slots = [
                Source(X, s, self.program.table.inputs[0].width) for s in range(self.program.table.inputs[0].slots)
            ]
            everything += [slot for slot in slots if slot not in everything and slot not in self.written]
        tiles = []
        for source in everything:
            for column in range(0, source.width, self.block):
                used = uses.get(source, [])
                chosen = [self.selection(number, u, gate, store=column == 0) for u, gate in selections.get(source, [])]
                head = layout.SOURCE_TILE.pack(
                    place=self.writer.place(source.segment, source.column),
                    column=column,
                    width=source.width,
                    add=int(source in self.written),
                    uses=len(used),
                    selections=len(chosen),
                )
                tiles.append((SOURCE_KIND, self.writer.put(itertools.chain(head, *used, *chosen))))
        self.written |= set(everything)
        return tiles

    def selection(self, number: int, u: int, gate: Linear, store: bool) -> list[int]:
        first, tiles, stride = self.dw[number, u]
        return layout.SELECTION.pack(
            unit=self.writer.unit(number, u),
            weight=gate.weight,
            reduction=gate.reduction,
            dz=self.dz[number, "gate", u],
            p=self.softmax[number, u],
            dw=first,
            tiles=tiles,
            stride=stride,
            store=int(store),
        )

    def tasks(self) -> list[int]:
        """The records of every tile of a dW, and of every element of a learned static tensor."""
        places, _ = self.program.gradients
        tasks: list[int] = []
        terms: dict[int, list[list[int]]] = {}
        for number, segment in enumerate(self.program.segments):
            for e, linear in enumerate(segment.experts):
                if linear.weight != NOTHING:
                    tasks += self.matrix(linear, self.dz[number, "expert", e], places)
            for u, unit in enumerate(segment.units):
                if unit.gate:
                    tasks += self.matrix(unit.gate, self.dz[number, "gate", u], places)
                if unit.static != NOTHING:
                    first, tiles, stride = self.dw[number, u]
                    for place, read in enumerate(unit.reads):
                        if read.element != NOTHING:
                            mixing = unit.mixing[place] if unit.mixing else NOTHING
                            term = layout.TERM.pack(dw=first + place, tiles=tiles, stride=stride, mixing=mixing)
                            terms.setdefault(places[unit.static] + read.element, []).append(term)
        for static in sorted({unit.static for segment in self.program.segments for unit in segment.units} - {NOTHING}):
            size = product(self.program.table.parameters[static].shape)
            for element in range(places[static], places[static] + size):
                own = terms.get(element, [])
                head = layout.STATIC_TASK.pack(kind=STATIC_KIND, element=element, terms=len(own))
                tasks.append(self.writer.put(itertools.chain(head, *own)))
        return tasks

    def matrix(self, linear: Linear, dz: int, places: tuple[int, ...]) -> list[int]:
        tasks, first = [], 0
        for source in linear.sources:
            for row in range(0, linear.width, self.block_n):
                for column in range(0, source.width, self.block):
                    with_bias = linear.bias != NOTHING and first == 0 and column == 0
                    task = layout.MATRIX_TASK.pack(
                        kind=MATRIX_KIND,
                        weight=places[linear.weight],
                        bias=places[linear.bias] if with_bias else NOTHING,
                        outputs=linear.width,
                        reduction=linear.reduction,
                        dz=dz,
                        row=row,
                        column=column,
                        source=self.writer.source(source, first),
                    )
                    tasks.append(self.writer.put(task))
            first += source.width
        return tasks
