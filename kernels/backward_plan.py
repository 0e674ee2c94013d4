"""The backward of a program, written down: the tiles of `backward_rows` from the last segment to
the first, and those of `gradients`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusedmoe.graph import product
from fusedmoe.kernels import layout
from fusedmoe.kernels.layout import EXPERT_KIND, MATRIX_KIND, SOURCE_KIND, STATIC_KIND
from fusedmoe.kernels.plan import Plan, launches_of
from fusedmoe.kernels.program import (
    COLUMN,
    NOTHING,
    Linear,
    Mix,
    Program,
    Rowwise,
    Segment,
    Source,
    Unit,
    X,
    rounded_up,
)
from fusedmoe.kernels.rowwise import Operations, sources_of
from fusedmoe.kernels.writer import Launch, Writer


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
        # The vectors whose gradients somebody has written so far.
        self.written: set[Source] = set()
        # What is added up to each element of a parameter that is no linear map's, by its place.
        self.terms: dict[int, list[list[int]]] = {}
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
        launches = []
        for segments in reversed(launches_of(self.program, whole)):
            if self.program.segments[segments[0]].operations:
                records = [record for number in reversed(segments) for record in self.operations(number)]
                launches.append(self.writer.operations(segments, records))
                continue
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

    def operations(self, number: int) -> list[tuple[int, int]]:
        """The operations of a segment from the last to the first, and what makes the gradients zero
        that they add to."""
        write, records = _Sums(self, number), []
        last = number + 1 == len(self.program.segments)
        for place, operation in reversed(list(enumerate(self.program.segments[number].operations))):
            given = last or Source(number, operation.column, operation.width) in self.written
            # A unit's mixing weights have a gradient also where its output has none.
            if given or isinstance(operation, Mix):
                records += self.zeros(write, sources_of(operation, given))
                records.append(write.record(operation, self.softmax[number, place], given))
        return records + (self.zeros(write, self.slots) if number == 0 else [])

    def zeros(self, write: Operations, sources: Iterable[Source]) -> list[tuple[int, int]]:
        new = [source for source in dict.fromkeys(sources) if source not in self.written]
        self.written |= set(new)
        return [write.zero(source) for source in new]

    @property
    def slots(self) -> list[Source]:
        given = self.program.table.graph.inputs[0]
        return [Source(X, s, given.width) for s in range(given.slots)]

    def reached(self, number: int, unit: Unit) -> bool:
        """Whether the output of a unit has a gradient."""
        last = number + 1 == len(self.program.segments)
        return last or Source(number, unit.column, unit.width) in self.written

    def reached_experts(self, number: int) -> dict[int, Linear]:
        """The linears of a segment, but for those whose readers have no gradient, by number."""
        segment = self.program.segments[number]
        reached = {read.expert for unit in segment.units if self.reached(number, unit) for read in unit.reads}
        if self.program.operations:
            # Also without those that no unit reads: what they copy may have no gradient.
            return {e: linear for e, linear in enumerate(segment.experts) if e in reached}
        others = {read.expert for unit in segment.units for read in unit.reads} - reached
        return {e: linear for e, linear in enumerate(segment.experts) if e not in others}

    def experts(self, number: int) -> list[tuple[int, int]]:
        segment = self.program.segments[number]
        tiles = []
        for e, linear in self.reached_experts(number).items():
            record = self.writer.linear(linear)
            for tile, column in enumerate(range(0, linear.width, self.block)):
                readers = [
                    self.reader(number, u, place, tile)
                    for u, unit in enumerate(segment.units)
                    for place, read in enumerate(unit.reads)
                    if read.expert == e and self.reached(number, unit)
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
            unit=self.writer.unit(number, self.program.segments[number].units[u]),
            read=place,
        )

    def sources(self, number: int) -> list[tuple[int, int]]:
        segment = self.program.segments[number]
        uses: dict[Source, list[list[int]]] = {}
        selections: dict[Source, list[tuple[int, Linear]]] = {}
        for e, linear in self.reached_experts(number).items():
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
            everything += [slot for slot in self.slots if slot not in everything and slot not in self.written]
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
        unit = self.program.segments[number].units[u]
        tiles = tiles if self.reached(number, unit) else 0
        return layout.SELECTION.pack(
            unit=self.writer.unit(number, unit),
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
        """The records of every tile of a dW, and of every element of other parameters."""
        places, _ = self.program.gradients
        tasks: list[int] = []
        uses: dict[int, list[tuple[Linear, int]]] = {}
        for number, segment in enumerate(self.program.segments):
            linears = [(linear, self.dz[number, "expert", e]) for e, linear in self.reached_experts(number).items()]
            linears += [(unit.gate, self.dz[number, "gate", u]) for u, unit in enumerate(segment.units) if unit.gate]
            for linear, dz in linears:
                if linear.weight != NOTHING:
                    uses.setdefault(linear.weight, []).append((linear, dz))
            for u, unit in enumerate(segment.units):
                first, tiles, stride = self.dw[number, u]
                elements = [read.element for read in unit.reads]
                self.add(unit.static, elements, first, tiles * self.reached(number, unit), stride, unit.mixing)
        for readers in uses.values():
            tasks += self.matrix(readers, places)
        for parameter in self.by_element:
            for element in range(
                places[parameter], places[parameter] + product(self.program.table.parameters[parameter].shape)
            ):
                own = self.terms.get(element, [])
                head = layout.STATIC_TASK.pack(kind=STATIC_KIND, element=element, terms=len(own))
                tasks.append(self.writer.put(itertools.chain(head, *own)))
        return tasks

    @property
    def by_element(self) -> list[int]:
        """The live parameters that are no linear map's."""
        found = {unit.static for segment in self.program.segments for unit in segment.units}
        for operation in self.program.operations:
            if isinstance(operation, Rowwise):
                found |= {operation.stage.weight, operation.stage.bias, operation.stage.slope}
            elif isinstance(operation, Mix):
                found |= {operation.unit.static, operation.free, operation.channels}
        return sorted(
            parameter for parameter in found - {NOTHING} if self.program.table.graph.parameters[parameter].live
        )

    def add(
        self, parameter: int, elements: Sequence[int], dw: int, tiles: int, stride: int, mixing: Sequence[int]
    ) -> None:
        """Add a term to the gradient of each element: a row of dw from `dw` on, in so many parts, and
        the gradient of a mixing weight."""
        if parameter == NOTHING:
            return
        first = self.program.gradients[0][parameter]
        for row, element in enumerate(elements):
            if element != NOTHING:
                column = mixing[row] if mixing else NOTHING
                term = layout.TERM.pack(dw=dw + row, tiles=tiles, stride=stride, mixing=column)
                self.terms.setdefault(first + element, []).append(term)

    def matrix(self, uses: list[tuple[Linear, int]], places: tuple[int, ...]) -> list[int]:
        """The tasks of a W, by the linears that have it and where their dz begins; several of them read
        one source each."""
        (linear, dz), *others = uses
        further = layout.FURTHER_USES.pack(uses=len(others)) if self.program.shared else []
        for other, begin in others:
            further += layout.MATRIX_USE.pack(dz=begin, source=self.writer.source(other.sources[0]))
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
                    tasks.append(self.writer.put(task + further))
            first += source.width
        return tasks


class _Sums(Operations):
    """Writes the operations of a segment of a backward."""

    def __init__(self, backward: _BackwardWriter, segment: int):
        super().__init__(backward.writer, segment)
        self.backward = backward

    def sums(self, parameter: int, elements: Iterable[int], given: bool = True, mixing: Sequence[int] = ()) -> int:
        if parameter == NOTHING or not self.writer.program.table.graph.parameters[parameter].live:
            return NOTHING
        first, elements = self.backward.rows, list(elements)
        self.backward.rows += len(elements)
        self.backward.add(parameter, elements, first, int(given), 0, mixing)
        return first
