"""The backward of a program, written down: the tiles of `backward_rows` from the last stage to the first, and those of `gradients`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fusedmoe.kernels.plan import Ints, Launch, Plan
from fusedmoe.kernels.program import COLUMN, NOTHING, Map, Program, Source, Stage, X, rounded_up

# Kinds of a tile, and of a task of `gradients`.
EXPERT, SOURCE = range(2)
MATRIX, STATIC = range(2)
# Numbers of a tile, of a reader, of a map that reads a source, of a gate that does, and of a term of a static weight.
TILE, READER, USE, SELECTION, TERM = 3, 8, 5, 9, 4


@dataclass(frozen=True, eq=False)
class BackwardPlan:
    """What goes to the device. `dz` is [B, columns] in all; `dw` [rows, B]; `tasks` programs of `gradients` find their records from `place` on."""

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
    return _Writer(plan, columns, block_n).write(whole)


class _Writer:
    def __init__(self, plan: Plan, columns: int, block_n: int):
        self.softmax = plan.rows
        self.program: Program = plan.program
        self.ints = Ints(self.program)
        self.block, self.block_n = columns, block_n
        self.dz: dict[tuple[int, str, int], int] = {}  # column of dz of a stage's expert, or of a unit's gate
        self.columns = 0
        self.dw: dict[tuple[int, int], tuple[int, int, int]] = {}  # first row, tiles and distance of a unit's dw
        self.rows = 0
        self.written: set[Source] = set()
        for number, stage in enumerate(self.program.stages):
            self.reserve(number, stage)

    def reserve(self, number: int, stage: Stage) -> None:
        for e, one in enumerate(stage.experts):
            self.dz[number, "expert", e] = self.columns
            self.columns += rounded_up(one.width, COLUMN)
        for u, unit in enumerate(stage.units):
            if unit.gate:
                self.dz[number, "gate", u] = self.columns
                self.columns += rounded_up(unit.gate.width, COLUMN)
            tiles = -(-unit.width // self.block)
            self.dw[number, u] = (self.rows, tiles, len(unit.reads))
            self.rows += tiles * len(unit.reads)

    def write(self, whole: bool) -> BackwardPlan:
        groups = [tuple(range(len(self.program.stages)))] if whole else list(self.program.groups)
        launches = []
        for stages in reversed(groups):
            phases = [tiles for number in reversed(stages) for tiles in (self.experts(number), self.sources(number))]
            if len(stages) == 1 and not whole:
                launches += [self.launch(stages, [tiles], own=True) for tiles in phases if tiles]
            else:
                launches.append(self.launch(stages, phases, own=False))
        tasks = self.tasks()
        place = self.ints.put(tasks)
        return BackwardPlan(tuple(self.ints.ints), tuple(self.ints.floats), tuple(launches), self.columns, self.rows, place, len(tasks))

    def launch(self, stages: tuple[int, ...], phases: list[list[tuple[int, int]]], own: bool) -> Launch:
        """A launch whose tiles have a program each (`own`), or all the same one."""
        tiles = [(kind, record, int(at == 0 and not own)) for phase in phases for at, (kind, record) in enumerate(phase)]
        first = self.ints.put(number for tile in tiles for number in tile)
        ends = [(first + TILE * i, first + TILE * (i + 1)) for i in range(len(tiles))] if own else [(first, first + TILE * len(tiles))]
        return Launch(stages, self.ints.put(end for pair in ends for end in pair), len(ends))

    def experts(self, number: int) -> list[tuple[int, int]]:
        stage = self.program.stages[number]
        tiles = []
        for e, one in enumerate(stage.experts):
            record = self.ints.map(one)
            for tile, column in enumerate(range(0, one.width, self.block)):
                readers: list[int] = []
                for u, unit in enumerate(stage.units):
                    for place, read in enumerate(unit.reads):
                        if read.expert == e:
                            first, _, distance = self.dw[number, u]
                            rows = [self.softmax[number, u] + place, first + tile * distance + place]
                            readers += [*self.ints.place(number, unit.column), *rows, self.ints.unit(number, u), place]
                head = [record, column, one.width, self.dz[number, "expert", e], len(readers) // READER]
                tiles.append((EXPERT, self.ints.put(head + readers)))
        return tiles

    def sources(self, number: int) -> list[tuple[int, int]]:
        stage = self.program.stages[number]
        uses: dict[Source, list[int]] = {}
        selections: dict[Source, list[list[int]]] = {}
        for e, one in enumerate(stage.experts):
            first = 0
            for source in one.sources:
                uses.setdefault(source, []).extend([one.weight, one.width, one.reduction, first, self.dz[number, "expert", e]])
                first += source.width
        for u, unit in enumerate(stage.units):
            if unit.gate:
                selections.setdefault(unit.gate.sources[0], []).append(self.selection(number, u, unit.gate))
        everything = [*uses, *(source for source in selections if source not in uses)]
        if number == 0:
            slots = [Source(X, s, self.program.table.width) for s in range(self.program.table.slots)]
            everything += [slot for slot in slots if slot not in everything and slot not in self.written]
        tiles = []
        for source in everything:
            for column in range(0, source.width, self.block):
                chosen = [number for one in selections.get(source, []) for number in (*one, int(column == 0))]
                head = [*self.ints.place(source.stage, source.column), column, source.width, int(source in self.written)]
                body = [len(uses.get(source, [])) // USE, len(chosen) // SELECTION, *uses.get(source, []), *chosen]
                tiles.append((SOURCE, self.ints.put(head + body)))
        self.written |= set(everything)
        return tiles

    def selection(self, number: int, u: int, gate: Map) -> list[int]:
        first, tiles, distance = self.dw[number, u]
        head = [self.ints.unit(number, u), gate.weight, gate.reduction, self.dz[number, "gate", u]]
        return [*head, self.softmax[number, u], first, tiles, distance]

    def tasks(self) -> list[int]:
        """The records of every tile of a dW, and of every element of a learned static tensor."""
        places, _ = self.program.gradients
        tasks: list[int] = []
        terms: dict[int, list[int]] = {}
        for number, stage in enumerate(self.program.stages):
            for e, one in enumerate(stage.experts):
                if one.weight != NOTHING:
                    tasks += self.matrix(one, self.dz[number, "expert", e], places)
            for u, unit in enumerate(stage.units):
                if unit.gate:
                    tasks += self.matrix(unit.gate, self.dz[number, "gate", u], places)
                if unit.static != NOTHING:
                    first, tiles, distance = self.dw[number, u]
                    for place, read in enumerate(unit.reads):
                        if read.element != NOTHING:
                            mixing = unit.mixing[place] if unit.mixing else NOTHING
                            terms.setdefault(places[unit.static] + read.element, []).extend([first + place, tiles, distance, mixing])
        for static in sorted({unit.static for stage in self.program.stages for unit in stage.units} - {NOTHING}):
            size = 1
            for length in self.program.table.parameters[static].shape:
                size *= length
            for element in range(places[static], places[static] + size):
                mine = terms.get(element, [])
                tasks.append(self.ints.put([STATIC, element, len(mine) // TERM, *mine]))
        return tasks

    def matrix(self, one: Map, dz: int, places: tuple[int, ...]) -> list[int]:
        tasks, first = [], 0
        for source in one.sources:
            place = [*self.ints.place(source.stage, source.column), source.width, first]
            for n in range(0, one.width, self.block_n):
                for k in range(0, source.width, self.block):
                    bias = places[one.bias] if one.bias != NOTHING and first == 0 and k == 0 else NOTHING
                    tasks.append(self.ints.put([MATRIX, places[one.weight], bias, one.width, one.reduction, dz, n, k, *place]))
            first += source.width
        return tasks
