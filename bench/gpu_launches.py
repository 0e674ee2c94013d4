"""What each launch of a network computes and moves on a GPU, counted from its plans: no device, no time.

Forward: the bytes are `roofline.traffic`'s. A program multiplies its BLOCK_B rows with each number of a weight that it reads, so the FLOPs of
products are 2 x BLOCK_B x numbers of weights read: hidden layers and gates that several column tiles compute again are in it, and so are rows
beyond the batch. Backward: the records of `backward_plan.py`, tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import NamedTuple

from roofline import traffic

from fusedmoe.kernels import backward as kernels
from fusedmoe.kernels.backward_plan import EXPERT, TILE, BackwardPlan, backward_plan_of
from fusedmoe.kernels.launch_triton import ADD_BLOCK
from fusedmoe.kernels.plan import FROM_X, plan_of
from fusedmoe.kernels.program import COLUMN, NOTHING, Map, Program, X, rounded_up
from fusedmoe.kernels.records import MAP_HEAD, SOURCE
from fusedmoe.kernels.tiles import CHUNK, Tiles

FLOAT = 4  # bytes of float32
# Numbers in records: a reader, a use, a selection, a static element's term; a map's before its sources, and a source's.
READER, USE, SELECTION, TERM = (size.value for size in (kernels.READER, kernels.USE, kernels.SELECTION, kernels.TERM))
HEAD, STEP = MAP_HEAD.value, SOURCE.value


class Launched(NamedTuple):
    """One launch.

    name: of the kernel, and the stages that it runs. programs: in its grid. rows: of a program's tile. products: FLOPs of matrix products.
    mixes: FLOPs of weighted sums on the ordinary cores. once: bytes, each tensor that it takes or leaves once. moved: bytes, as its programs
    read and write them.
    """

    name: str
    programs: int
    rows: int
    products: int
    mixes: int
    once: int
    moved: int


@dataclass
class _Sum:
    """Bytes that grow with the rows, and bytes and FLOPs of one row block; `tensors` has what is moved at least, each by a key of its own."""

    row: int = 0
    block: int = 0
    products: int = 0  # FLOPs of one row
    mixes: int = 0
    tensors: dict[tuple, tuple[int, int]] = field(default_factory=dict)

    def moves(self, row: int = 0, block: int = 0) -> None:
        self.row += row
        self.block += block

    def tensor(self, key: tuple, row: int = 0, block: int = 0) -> None:
        """Bytes a row, or bytes in all, of a tensor; naming it again changes nothing."""
        self.tensors[key] = (row, block)

    def once(self, rows: int) -> int:
        return sum(rows * row + block for row, block in self.tensors.values())


def forward(program: Program, tiles: Tiles, rows: int, size: int) -> list[Launched]:
    """Return the launches of a forward over so many rows of numbers of `size` bytes."""
    matrices = {one.weight for outer in program.maps for one in _chain(outer)} - {NOTHING}
    names = {program.table.parameters[number].name for number in matrices}
    blocks = ceil(rows / tiles.rows)
    found = []
    for launch in plan_of(program, tiles.whole, tiles.units, tiles.columns).launches:
        part = only(program, launch.stages)
        # Row blocks are alike but for the last one.
        full, last = traffic(part, tiles, tiles.rows, size), traffic(part, tiles, (rows - 1) % tiles.rows + 1, size)
        weights = blocks * sum(full.read[name] for name in names) // size
        mixed = sum(len(unit.reads) * unit.width for stage in launch.stages for unit in program.stages[stage].units)
        found.append(
            Launched(
                f"forward, {', '.join(program.stages[stage].name for stage in launch.stages)}",
                blocks * launch.programs,
                tiles.rows,
                2 * tiles.rows * weights,
                2 * tiles.rows * blocks * mixed,
                each_once(program, launch.stages, rows, size),
                (blocks - 1) * full.total + last.total,
            )
        )
    return found


def _chain(one: Map | None) -> Iterator[Map]:
    """A map and those inside of it."""
    while one:
        yield one
        one = one.inner


def only(program: Program, stages: Sequence[int]) -> Program:
    """The program with what stands in other stages left out, every stage in its place."""
    return Program(program.table, tuple(s if n in stages else replace(s, experts=(), units=()) for n, s in enumerate(program.stages)))


def each_once(program: Program, stages: Sequence[int], rows: int, size: int) -> int:
    """Bytes of what the stages need from outside and of what they hand on, each once. All slots of x are one tensor, as a trunk expands it."""
    part = only(program, stages)
    maps = [one for outer in part.maps for one in _chain(outer)]
    sources = {source for one in maps for source in one.sources if source.stage not in stages}
    columns = sum(source.width for source in sources if source.stage != X) + program.table.width * any(source.stage == X for source in sources)
    columns += sum(unit.width for stage in stages for unit in program.stages[stage].units)
    params = {number for one in maps for number in (one.weight, one.bias)} | {unit.static for stage in stages for unit in program.stages[stage].units}
    return size * (rows * columns + sum(prod(program.table.parameters[number].shape) for number in params - {NOTHING}))


def backward(program: Program, tiles: Tiles, rows: int, size: int) -> list[Launched]:
    """Return the launches of a backward that returns no gradient of the mixing weights, and is given none."""
    plan = plan_of(program, tiles.whole, tiles.units, tiles.columns)
    written = backward_plan_of(plan, tiles.whole, tiles.columns, tiles.outputs)
    blocks, found = ceil(rows / tiles.rows), []
    for launch in written.launches:
        count = _Rows(written, tiles, size)
        ends = written.ints[launch.place : launch.place + 2 * launch.programs]
        for first, end in zip(ends[::2], ends[1::2], strict=True):
            for tile in range(first, end, TILE):
                kind, record = written.ints[tile : tile + 2]
                (count.expert if kind == EXPERT else count.source)(record)
        total, padded = count.sum, blocks * tiles.rows
        name = f"backward_rows, {', '.join(program.stages[stage].name for stage in launch.stages)}"
        moved = rows * total.row + blocks * total.block
        found.append(Launched(name, blocks * launch.programs, tiles.rows, padded * total.products, padded * total.mixes, total.once(rows), moved))
    total = program.gradients[1]
    if total:
        chunks = ceil(rows / CHUNK)
        found.append(_gradients(written, tiles, rows, size))
        added = total * (FLOAT * chunks + size)
        found.append(Launched("add_chunks", ceil(total / ADD_BLOCK), ADD_BLOCK, 0, total * chunks, added, added))
    return found


class _Rows:
    """Adds up the tiles of one launch of `backward_rows`."""

    def __init__(self, plan: BackwardPlan, tiles: Tiles, size: int):
        self.ints, self.block, self.size = plan.ints, tiles.columns, size
        self.sum = _Sum()

    def named(self, kind: str, place: int, width: int) -> None:
        """Columns of x, a buffer or the output (`h`), or of their gradients (`d`), which records name by four numbers."""
        at = self.ints[place : place + 4]
        # Slots of x are one tensor, and those of d_x are not.
        self.sum.tensor((kind, FROM_X) if kind == "h" and at[0] == FROM_X else (kind, *at), row=width * self.size)

    def expert(self, record: int) -> None:
        ints, size, add = self.ints, self.size, self.sum
        one, column, width, dz, readers = ints[record : record + 5]
        weight, bias, _, reduction = ints[one : one + 4]
        columns = min(self.block, width - column)
        for source in range(one + HEAD, one + HEAD + STEP * ints[one + HEAD - 1], STEP):
            self.named("h", source, ints[source + 4])
        if weight == NOTHING:
            add.moves(row=columns * size)
        else:
            add.moves(row=reduction * size, block=columns * (reduction + (bias != NOTHING)) * size)
            add.tensor(("weight", weight), block=width * reduction * size)
            add.tensor(("bias", weight), block=width * (bias != NOTHING) * size)
            add.products += 2 * columns * reduction
        for reader in range(record + 5, record + 5 + READER * readers, READER):
            self.named("d", reader, width)
            add.moves(row=columns * size + 2 * FLOAT)
            add.tensor(("p", ints[reader + 4]), row=FLOAT)
            add.tensor(("dw", ints[reader + 5]), row=FLOAT)
            unit, place = ints[reader + 6], ints[reader + 7]
            add.moves(block=(ints[ints[unit + 4] + place] != NOTHING) * size)
            # g y into dw, w g into dy.
            add.mixes += 4 * columns
        add.moves(row=min(self.block, rounded_up(width, COLUMN) - column) * size)
        add.tensor(("dz", dz), row=rounded_up(width, COLUMN) * size)

    def source(self, record: int) -> None:
        ints, size, add = self.ints, self.size, self.sum
        column, width, adds, uses, selections = ints[record + 4 : record + 9]
        columns = min(self.block, width - column)
        add.moves(row=(1 + adds) * columns * size)
        self.named("d", record, width)
        for use in range(record + 9, record + 9 + USE * uses, USE):
            weight, outputs, reduction, _, dz = ints[use : use + USE]
            if weight == NOTHING:
                add.moves(row=columns * size)
            else:
                add.moves(row=rounded_up(outputs, COLUMN) * size, block=outputs * columns * size)
                add.tensor(("weight", weight), block=outputs * reduction * size)
                add.products += 2 * outputs * columns
            add.tensor(("dz", dz), row=rounded_up(outputs, COLUMN) * size)
        for selection in range(record + 9 + USE * uses, record + 9 + USE * uses + SELECTION * selections, SELECTION):
            self.selection(selection, columns)

    def selection(self, record: int, columns: int) -> None:
        ints, size, add = self.ints, self.size, self.sum
        unit, weight, reduction, dz, p, dw, tiles, distance, stores = ints[record : record + SELECTION]
        reads = ints[unit + 1]
        seen = sum(place != NOTHING for place in ints[ints[unit + 2] : ints[unit + 2] + reads])
        add.moves(row=reads * FLOAT * (1 + tiles) + stores * seen * size, block=seen * columns * size)
        add.products += 2 * seen * columns
        add.tensor(("weight", weight), block=seen * reduction * size)
        add.tensor(("dz", dz), row=seen * size)
        for read in range(reads):
            add.tensor(("p", p + read), row=FLOAT)
            for tile in range(tiles):
                add.tensor(("dw", dw + tile * distance + read), row=FLOAT)


def _gradients(plan: BackwardPlan, tiles: Tiles, rows: int, size: int) -> Launched:
    """The launch that sums dW, db and dv over chunks of rows, in float32."""
    ints, add, chunks = plan.ints, _Sum(), ceil(rows / CHUNK)
    for task in ints[plan.place : plan.place + plan.tasks]:
        if ints[task] == 0:
            _, bias, outputs, _, dz, n, k, *source, width, _ = ints[task + 1 : task + 14]
            tile, columns = min(tiles.outputs, outputs - n), min(tiles.columns, width - k)
            read = min(tiles.outputs, rounded_up(outputs, COLUMN) - n)
            add.moves(row=(read + columns) * size, block=tile * (columns + (bias != NOTHING)) * FLOAT)
            add.products += 2 * tile * columns
            add.tensor(("dz", dz), row=rounded_up(outputs, COLUMN) * size)
            add.tensor(("h", *source) if source[0] != FROM_X else ("h", FROM_X), row=width * size)
        else:
            for term in range(task + 3, task + 3 + TERM * ints[task + 2], TERM):
                first, tiles_of_dw, distance, _ = ints[term : term + TERM]
                add.moves(row=tiles_of_dw * FLOAT)
                for tile in range(tiles_of_dw):
                    add.tensor(("dw", first + tile * distance), row=FLOAT)
            add.moves(block=FLOAT)
    add.tensor(("parts",), block=chunks * add.block)
    padded = sum(rounded_up(min(CHUNK, rows - first), tiles.reduction) for first in range(0, rows, CHUNK))
    moved = rows * add.row + chunks * add.block
    return Launched("gradients", plan.tasks * chunks, tiles.outputs, padded * add.products, 0, add.once(rows), moved)
